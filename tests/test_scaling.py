"The bench on several GPUs: its arithmetic on made-up numbers, processes that die, and all of it on a CPU"
import json,subprocess,sys
import pytest
from types import SimpleNamespace
from statistics import mean
from benchmarks import peers,processes,scaling
from benchmarks.scaling import launch,line,variant
from ist_nb.config import shrunk
from pathlib import Path

root = Path(__file__).parent.parent

def test_share_of_linear():
    "Two processes at the time of one are linear; half as fast is half of that; without one process nothing is known"
    found = dict(seconds=[1., 3., 2.], peak=[2**30]*3)
    one = variant(found, 1, 100)
    assert (one['tokens_a_second'], one['of_linear'], one['seconds']['max'], one['rounds'])==(50, 1, 3, 3)
    assert variant(found, 2, 100, one)['of_linear']==1 and variant(found, 2, 100)['of_linear'] is None
    slow = variant(dict(seconds=[4.], peak=[None]), 4, 100, one)
    assert (slow['tokens_a_second'], slow['of_linear'], slow['peak'])==(100, 0.5, None)
    case = dict(engine='DDP', processes=4, variants=dict(a=slow, b=one), failed=dict(c='no GPU'))
    assert ' 4000.0 ms' in line('a', case) and '50.0% of linear' in line('a', case) and 'GiB' not in line('a', case)
    assert '1.00 GiB' in line('b', case) and line('c', case).endswith('failed: no GPU')

def test_what_a_profile_says():
    "Milliseconds of kernels from microseconds; what the host does is left out"
    def event(key, time, count): return SimpleNamespace(key=key, self_device_time_total=time, count=count)
    events = event('ampere_gemm', 3000, 2),event('ncclDevKernel_AllReduce', 500, 1),event('aten::mm', 0, 9)
    assert scaling.kernels(events)==dict(gpu=3.5, exchange=0.5, launches=3)

def test_what_is_timed(monkeypatch):
    """Of a run of 21 steps, each a second, the last 20: the first takes memory. They train 0.4 of the layers on
    average, to within a hundredth, as a long run does"""
    for module,clock in (peers, peers.whole_run(dict(steps=20), False)),(scaling, scaling.clock_of(1, 21, False)):
        now = 0
        monkeypatch.setattr(module.time, 'perf_counter', lambda: now)
        for t in range(21):
            clock.on_step_begin()
            now += 100 if t==0 else 1
            clock.on_step_end(None, None, None)
        assert clock.seconds==1
    for N in 16,32,80:
        for steps in 10,15,20: assert abs(mean(shrunk(0.4*N, N, t, steps+1) for t in range(1, steps+1))/N-0.4)<0.01

def test_the_others_run_where_one_dies(monkeypatch):
    """Of two processes the second fails first and the first because of it; then one dies without a word. Each launch
    begins with what is left"""
    begun,a,d = [],dict(name='a', seconds=[1.]),dict(name='d', seconds=[2.])
    told = [([a, dict(name='b', failed='no answer', at=2.)],
             [a | dict(seconds=[9.]), dict(name='b', failed='full', at=1.)]),
            ([], []), ([d], [d])]
    def died(folder, size, until, module, **more):
        for r,lines in enumerate(told[len(begun)]):
            (folder/f'{r}.jsonl').write_text(''.join(json.dumps(o)+'\n' for o in lines))
        begun.append(json.loads((folder/'spec.json').read_text())['names'])
        return 'Segmentation fault'
    monkeypatch.setattr(processes, '_processes', died)
    found = launch(dict(names=list('abcd'), limit=9, end=2**40), 2)
    assert begun==[list('abcd'), list('cd'), ['d']]
    assert (found['a'], found['d'], found['b']['failed'])==(a, d, 'full')
    assert found['c']==dict(failed='a process died or hung', where='Segmentation fault')
    told.append(([], []))
    late = dict(failed=scaling.no_time)
    assert launch(dict(names=['x', 'y'], limit=9, end=0), 2)==dict(x=late, y=late)

@pytest.mark.parametrize('of_ddp', [scaling.cut, scaling.used])
def test_each_length_has_a_process_of_its_own_to_compare_with(of_ddp, monkeypatch, tmp_path):
    "For a way of DDP's alone, that is LoRA as it is"
    def launch(spec, n):
        return {o:dict(seconds=[spec['batch']*spec['length']*(1+(n>1 and o==of_ddp))], peak=[None], needs=1)
                for o in spec['names']}
    monkeypatch.setattr(scaling, 'launch', launch)
    names = ['LoRA, fast', of_ddp]
    scaling.main(shape='tiny', rows='4x64,2x32', sizes='1 2', only=';'.join(names), out=tmp_path/'found.json')
    found = {(c['batch'], c['length'], c['engine']):{k:v['of_linear'] for k,v in c['variants'].items()}
             for c in json.loads((tmp_path/'found.json').read_text())['cases']}
    one,both = {names[0]:1},{names[0]:1, names[1]:0.5}
    assert found=={(*o, k):both if k=='DDP' else one
                   for o in ((4, 64), (2, 32)) for k in (scaling.alone, 'DDP', 'FSDP2')}

@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    "One process, and two by each engine; what is refused is recorded, and the contender after it runs"
    out = tmp_path/'scaling.json'
    only = ['LoRA', 'recommended, fp8', 'recommended']
    command = [sys.executable, '-m', 'benchmarks', 'scaling', '--shape', 'tiny', '--rows', '4x64', '--sizes', '1 2',
               '--steps', '2', '--rounds', '2', '--only', ';'.join(only), '--out', str(out)]
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    cases = json.loads(out.read_text())['cases']
    assert [(c['engine'], c['processes']) for c in cases]==[('one process', 1), ('DDP', 2), ('FSDP2', 2)]
    for c in cases:
        assert set(c['failed'])=={'recommended, fp8'} and set(c['variants'])=={'LoRA', 'recommended'}, c
        for k,v in c['variants'].items():
            assert set(v['step'])=={'gpu', 'exchange', 'launches'}
            assert v['rounds']==2 and 0<v['seconds']['min']<=v['seconds']['median']
            assert v['tokens_a_second']==pytest.approx(c['processes']*4*64/v['seconds']['median'])
            one = cases[0]['variants'][k]['tokens_a_second']
            assert v['of_linear']==pytest.approx(v['tokens_a_second']/(c['processes']*one))
    assert 'torchao' in cases[0]['failed']['recommended, fp8'] and 'FSDP2' in cases[2]['failed']['recommended, fp8']

def test_what_the_gpu_waits_for():
    "Of two steps: stretches without a kernel go to what the host did within, to the innermost; overlaps count once"
    from benchmarks.waits import waiting
    def event(cat, name, ts, end): return dict(cat=cat, name=name, ts=ts*1e3, dur=(end-ts)*1e3)
    events = [event('kernel', 'a', 0, 10), event('kernel', 'b', 5, 12), event('gpu_memcpy', 'c', 20, 21),
              event('kernel', 'd', 27, 30), event('cpu_op', 'mm', 0, 30), event('user_annotation', 'step', 0, 30),
              event('user_annotation', 'host: forward', 11, 18), event('user_annotation', 'host: IST', 14, 15),
              event('user_annotation', 'host: clipping', 22, 26)]
    found = waiting(events, 2)
    assert (found['kernels'], found['span'], found['busy'])==(2, 15, 8)
    assert found['idle']=={'forward':2.5, 'IST':0.5, 'between':2, 'clipping':2}
    assert found['host']=={'forward':3.5, 'clipping':2, 'IST':0.5}
    assert waiting(events[4:], 2)['busy']==0

@pytest.mark.slow
def test_waits_on_a_cpu(tmp_path):
    "Where there are no kernels, what the host takes is still found, and nothing stays named"
    from transformers import Trainer
    from benchmarks import waits
    before = Trainer.compute_loss
    waits.main(shape='tiny', rows='4x64', only='recommended', device='cpu', out=tmp_path/'waits.json')
    res = json.loads((tmp_path/'waits.json').read_text())
    assert min(res[k] for k in ('matrix_flops', 'copy_bytes', 'unpack_bytes'))>1e6
    v = res['cases'][0]['variants']['recommended']
    assert Trainer.compute_loss is before and v['idle']=={} and len(v['ms'])==2
    assert {'forward', 'backward', 'clipping', 'optimizer', 'zero_grad', 'IST'}<=set(v['host'])
    assert v['host']['forward']+v['host']['backward']<1.5*max(v['ms'])
