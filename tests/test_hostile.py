"""The harness of hostile inputs: what it takes for a good answer, what it kills, and that its file is of the cases as
they are"""
import os,time,psutil,pytest
from benchmarks import hostile,record

said = 'ist_finetune: --lora_r 0 is not allowed. Give at least 1.\n'
def refuse(home): return 2,said
def finish(home):
    (home/'out').mkdir(); (home/'out'/'results.json').write_text('{"loss_after": 1.5}'); return 0,'Saved in out\n'
def not_a_number(home): finish(home); (home/'out'/'results.json').write_text('{"loss_after": NaN}'); return 0,''
def litter(home): (home/'out').mkdir(); return 2,said
def overwrite(home): (home/'mine.txt').write_text(''); return 0,''
def lose(home): (home/'run'/'mine.txt').unlink(); return 0,''
def run_code(home): (home/'pwned').touch(); return 2,said
def trace(home): return 1,'Traceback (most recent call last):\nKeyError: 1\n'
def say_nothing(home): return 2,'usage: ist_finetune\n'
def say_twice(home): return 2,said*2
def say_a_lot(home): return 2,said[:-1]*100
def hang(home): return 'hang',''
def crash(home): return -11,''

@pytest.mark.parametrize('act,outcome', [(refuse, 'sentence'), (finish, 'accepted'), (not_a_number, 'wrong outcome'),
                                         (litter, 'left behind'),
    (overwrite, 'files changed'), (lose, 'files changed'), (run_code, 'code was run'), (trace, 'traceback'),
    (say_nothing, 'no sentence'),
    (say_twice, 'no sentence'), (say_a_lot, 'no sentence'), (hang, 'hang'), (crash, 'crash')])
def test_judge(tmp_path, act, outcome):
    case = hostile.Case('flag', 'lora_r 0', [], kept=('run/mine.txt',))
    (tmp_path/'mine.txt').write_text('mine'); (tmp_path/'run').mkdir(); (tmp_path/'run'/'mine.txt').write_text('mine')
    before = hostile.content(tmp_path)
    assert hostile.judge(case, tmp_path, *act(tmp_path), before)[0]==outcome

def test_judge_what_may_run(tmp_path):
    case = lambda **kw: hostile.Case('flag', 'lora_r 0', [], **kw)
    assert hostile.judge(case(want='either'), tmp_path, *finish(tmp_path), {})[0]=='ran'
    assert hostile.judge(case(want='either', check=lambda said: 'another adapter'), tmp_path, 0, '',
                         {})==('wrong outcome', 'another adapter')
    assert hostile.judge(case(want='runs'), tmp_path, *refuse(tmp_path),
                         hostile.content(tmp_path))[0]=='refused in error'

def test_limits(tmp_path):
    "What takes too long, or too much, is ended; what ends by itself has its status"
    log = tmp_path/'log'
    assert hostile.forked(tmp_path, lambda: time.sleep(60), log, seconds=.3)[0]=='hang'
    # of a child, which has not all pages of its parent: a worker that ran many tests is larger by files it has mapped
    size = tmp_path/'size'
    hostile.forked(tmp_path, lambda: size.write_text(str(psutil.Process().memory_info().rss)), log)
    own = int(size.read_text())
    grow = lambda: [bytes(range(256))*2**21, time.sleep(60)]
    assert hostile.forked(tmp_path, grow, log, seconds=20, most=own+2**28)[0]=='memory'
    assert hostile.forked(tmp_path, lambda: os.write(1, os.read(0, 99)), log, typed='typed')[0]==5
    assert log.read_text()=='typed'

def test_file():
    "Every case was tried with the version before and, once it was, with this one; there it has a good answer"
    res = record.read('hostile')
    assert [r['case'] for r in res['rows']]==[c.name for c in hostile.cases]
    assert len(set(c.name for c in hostile.cases))==len(hostile.cases)>=152
    assert all('before' in r for r in res['rows'])
    assert not [r['case'] for r in res['rows'] if 'after' in r and r['after']['outcome'] not in hostile.good]
    for o in ('before', 'after'): assert res.get(o)==(hostile.counts(res['rows'], o) if o in res else None)
