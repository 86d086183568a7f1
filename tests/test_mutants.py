"The faults that benchmarks/mutants.py plants can be planted: their texts are where they should be"
import pytest
from collections import Counter
from mutants import full,mutants,notebook_of,root,wrong

@pytest.mark.parametrize('m', mutants, ids=[f'{m.module}: {m.about}' for m in mutants])
def test_can_be_planted(m): assert wrong(m) is None

def test_whole():
    assert [o for o,n in Counter((m.module, m.old, m.new) for m in mutants).items() if n>1]==[] and {m.module for m in mutants}==full.keys()
    checks = {c for m in mutants for c in m.checks}|{c for o in full.values() for c in o}
    for c in checks: assert (root/c.split(' ')[0]).exists() if c.startswith('tests/') else (root/'nbs'/f'{c}.ipynb').exists(), c
    for o in full: assert notebook_of(o).with_suffix('.ipynb').resolve().exists()
