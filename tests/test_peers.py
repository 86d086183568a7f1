"The bench beside other libraries: what can run on a CPU does, and its arithmetic on made-up numbers"
import json,subprocess,sys
import pytest
from benchmarks import peers
from benchmarks.peers import Child,line,merged,seconds_to,steps_to
from pathlib import Path

root = Path(__file__).parent.parent

def test_steps_between_two_runs():
    "Halfway in the loss is halfway in the logarithm of the steps; a longer run that is worse does not count"
    points = [(400, 2.0), (100, 3.0), (1600, 2.2)]
    assert steps_to(points, 3.5)==100 and steps_to(points, 3.0)==100
    assert steps_to(points, 2.5)==pytest.approx(200) and steps_to(points, 2.0)==pytest.approx(400)
    assert steps_to(points, 1.9) is None and steps_to([], 1.) is None
    assert steps_to([(100, 3.0), (200, 3.5), (400, 2.0)], 2.5)==pytest.approx(200)   # from 100, not from 200

def test_seconds_to_a_loss():
    "By seed; a variant takes its steps from the way that it learns"
    def runs(name, seed, *points): return [dict(name=name, seed=seed, steps=s, loss=l) for s,l in points]
    made = [*runs('LoRA', 1, (100, 3.), (400, 2.)), *runs('LoRA', 2, (100, 3.5)), *runs('recommended', 1, (200, 2.5))]
    found = seconds_to(made, {'PEFT':1., 'Unsloth, rows':0.5, 'recommended, fp8':0.25}, 2.5)
    assert found['PEFT']==dict(seconds={1:pytest.approx(200)}, missed=[2])
    assert found['Unsloth, rows']['seconds']=={1:pytest.approx(100)}
    assert found['recommended, fp8']==dict(seconds={1:50.}, missed=[])
    assert not seconds_to(made, {'x':1.}, 2.5, lambda name: 'never')

def test_seconds_to_the_loss_of_another(monkeypatch):
    "Each length with the rate of seed 0, which judges nothing; a seed that lacks a length does not count"
    def run(name, steps, lr, seed, loss): return dict(task='sun', name=name, steps=steps, lr=lr, seed=seed,
                                                      points=[dict(name='trained', task=loss)])
    runs = [run('LoRA', 10, 1, 0, 1.), run('LoRA', 10, 2, 0, 2.), run('LoRA', 40, 1, 0, 2.), run('LoRA', 40, 2, 0, 1.),
            run('recommended', 40, 1, 0, 1.),
            *(o for s in (1, 2) for o in (run('LoRA', 10, 1, s, 4.), run('LoRA', 40, 2, s, 2.),
                                          run('LoRA', 40, 1, s, 0.), run('recommended', 40, 1, s, 2.9+s/10))),
            run('LoRA', 10, 1, 3, 0.), run('recommended', 40, 1, 3, 9.)]
    monkeypatch.setattr(peers.record, 'read', lambda name: dict(runs=runs))
    made = peers.learnt('sun')
    assert {r['seed'] for r in made}=={1, 2} and {r['loss'] for r in made}=={4., 2., 3., 3.1}
    assert peers.level_of(peers.learnt('sun'))==3.1
    case = dict(variants={k:dict(seconds=dict(median=v)) for k,v in (('Unsloth, rows', 3.), ('recommended', 2.))})
    found = peers.to_same_loss(case, 'sun')
    steps = 10*4**0.45
    assert found['Unsloth, rows']==pytest.approx((3*steps, steps)) and found['recommended']==pytest.approx((80, 40))

def test_files_become_one(tmp_path):
    def case(bits, x, card='a'):
        return dict(shape='1b', bits=bits, batch=1, length=8, documents=1, checkpointing=False, hardware=card, x=x,
                    where={})
    for name,cases in (('a', [case(4, 1), case(16, 2)]), ('b', [case(16, 3), case(16, 4, 'b')])):
        (tmp_path/f'{name}.json').write_text(json.dumps(dict(cases=cases)))
    assert [c['x'] for c in merged([tmp_path/'a.json', tmp_path/'b.json'])]==[1, 3, 4]
    assert not any('where' in c for c in merged([tmp_path/'a.json']))

def child(tmp_path, code):
    "A process that says what `code` tells it to, on the pipe whose number is its last argument"
    spec = dict(name='x', folder=str(tmp_path))
    old,peers.command = peers.command,lambda spec, fd: [sys.executable, '-c', f'import os,sys,time\n{code}', str(fd)]
    try: return Child(spec)
    finally: peers.command = old
say = "say = lambda s: os.write(int(sys.argv[-1]), s)\n"

def test_child_that_dies_hangs_or_fails(tmp_path):
    c = child(tmp_path, say+"say(b'{\"loaded\": 1}\\n{\"rea'); say(b'dy\": 1}\\n')\n"
                        "input(); print('out of memory'); sys.exit(3)")
    assert c.until('loaded', 20) and c.until('ready', 20) and not c.failed
    c.go()
    assert not c.until('seconds', 20) and c.failed=='the process ended with 3 and was not seconds'
    assert 'out of memory' in c.where and c.process.poll()==3
    c = child(tmp_path, 'time.sleep(60)')
    assert not c.until('ready', 0.1) and c.failed=='not ready after 0 s' and c.process.poll() is not None
    c = child(tmp_path, say+"say(b'{\"failed\": \"no GPU\", \"where\": \"here\"}\\n'); time.sleep(60)")
    assert not c.until('ready', 20) and (c.failed, c.where)==('no GPU', 'here') and c.process.poll() is not None
    c.close()   # once more does nothing

def test_every_variant_is_known():
    assert set(peers.usual)|set(peers.on_cpu)<=set(peers.variants)
    assert {k for k,_ in peers.variants.values()}==set(peers.kinds)
    packing = {k for k,(kind,o) in peers.variants.items() if kind in ("trl", "unsloth")}
    assert all("packing" in peers.variants[k][1] for k in packing) and len(packing)>6

@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    "Every contender that a CPU can run computes the same loss, and one that is not installed is named"
    out = tmp_path/'peers.json'
    command = [sys.executable, '-m', 'benchmarks', 'peers', '--shape', 'tiny', '--device', 'cpu', '--rows', '4x64',
               '--documents', '2', '--steps', '2', '--rounds', '2', '--checkpointing', '--cold',
               '--folder', str(tmp_path/'m'), '--out', str(out)]
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    case, = json.loads(out.read_text())['cases']
    assert str(tmp_path) not in case['command'] and '--folder FOLDER' in case['command']
    ran = set(peers.on_cpu)-set(case['failed'])
    assert ran>={'PEFT', 'TRL, rows', 'TRL, padding-free, sdpa', 'LoRA, fast', 'recommended'}, case['failed']
    assert all('No module named' in o for o in case['failed'].values())
    for k in ran:
        v = case['variants'][k]
        assert v['rounds']==2 and v['warm']>v['seconds']['min']>0 and v['trained']==65536, (k, v)
        assert v['loss']==pytest.approx(8.32, abs=0.05), (k, v)      # log(4096) of random weights
        assert 'tokens/s' in line(k, case)
    assert 'failed: ModuleNotFoundError' in line('Unsloth, packed', case) or 'Unsloth, packed' in ran
