"The faults that `python -m benchmarks mutants` plants: their texts are where they should be"
from collections import Counter
from benchmarks.mutants import checks,exists,faults,read_faults,tests,wrong

def test_can_be_planted():
    moved = [o for o in map(wrong, faults) if o]
    assert not moved, 'renew these in benchmarks/faults.diff\n'+'\n'.join(moved)

def test_whole():
    assert [o for o,n in Counter((m.module, m.old, m.new) for m in faults).items() if n>1]==[]
    assert {m.module for m in faults}==tests.keys() and len(faults)>=100
    assert [c for m in tests for c in checks(m) if not exists(c)]==[]

def test_faults_are_read_as_they_are_written():
    text = '# about the file\n\n@@ ist @@\n\n# no sign\n-a = -b\n-c\n+a = b\n+c\n\n# a line less\n-d\n'
    assert read_faults(text)==[('ist', 'no sign', 'a = -b\nc', 'a = b\nc'), ('ist', 'a line less', 'd', '')]
