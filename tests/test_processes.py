"""Several processes: the same layers and importance on each, equal to the run on one process; what an engine does not
allow is refused; a process that goes its own way stops all"""
import json,os,re,subprocess,sys,warnings
from pathlib import Path
import pytest,torch
from ist_nb import IST,ISTConfig,ISTError
from ist_nb.processes import Ranks,_weight,_weighted,limits
from ist_nb.probe import _share
from benchmarks import processes as P, record

root = Path(__file__).parent.parent
committed,on_gpus = map(record.read, ('processes', 'processes_gpu'))

def launched(cases, size, seconds, **kwargs):
    found = P.launch(cases, size, seconds, **kwargs)
    bad = [f"{o['kind']} - {o['name']}: {o.get('error', 'the ranks do not say the same')}\n{o.get('where', '')}"
           for o in found if not o['ok']]
    assert not bad, '\n'.join(bad)
    return {o['name']:o for o in found}

fast = {'works': ['DDP', 'DDP, one row in a probe', 'FSDP2', 'FSDP2, gate', 'FSDP1'],
        'trainer': ['Trainer, DDP', 'Trainer, FSDP2'],
        'resume': ['Trainer, DDP'], 'probe': None, 'refused': None, 'diverging': None, 'trainer refused': None,
        'checkpoint': None, 'deepspeed': []}

def test_two_processes():
    "One launch: engines that work equal one process, all refusals, all ways to diverge, resume bit for bit"
    cases = [(k, n) for k,n in P.all_cases(2, slow=False) if fast[k] is None or n in fast[k]]
    assert len(cases)>=36
    found = launched(cases, 2, 600, fork=True)
    assert found['FSDP2']['engine_found']=='FSDP2' and found['Trainer, FSDP2']['engine_found']=='FSDP2'
    assert 'seed: 7 on rank 0; 8 on rank 1' in found['seed']['said']
    if not P.cuda: assert 'use_cpu=True' in found['Trainer, processes apart']['said']

@pytest.mark.slow
@pytest.mark.parametrize('size', [1, 2, 4])
def test_every_case(size): launched(P.all_cases(size), size, 1200)

def test_committed_table():
    "The table of the tutorial is of these cases, and all came out as they should"
    for size in (1, 2, 4):
        have = {(o['kind'], o['name']):o for o in committed['cases'] if o['processes']==size}
        want = set(P.all_cases(size, slow=False)) | {('deepspeed', n) for n in P.deepspeeds}
        assert set(have)==want if size<4 else set(have)<=set(P.all_cases(2)) | want, (size, set(have)^want)
        assert {'DDP', 'FSDP2', 'DDP, fisher', 'FSDP2, fisher'} <= {n for _,n in have}
        assert all(o['ok'] for o in have.values())
    assert {w for w,*_ in P.engines.items()}=={'DDP', 'FSDP2', 'FSDP1'}

def test_committed_gpu_table():
    """On one GPU all came out as they should; what did not on two is what the page names, and nothing else; nobody has
    forgotten a case"""
    have = {n:{(o['kind'], o['name']):o for o in on_gpus['cases'] if o['processes']==n} for n in (1, 2)}
    assert sum(map(len, have.values()))==len(on_gpus['cases']) and on_gpus['backend']=='nccl'
    assert all(o['ok'] for o in have[1].values())
    only_cpu = ('trainer refused', 'Trainer, processes apart')
    want = set(P.all_cases(2))-{('deepspeed', n) for n in P.deepspeeds}-{only_cpu}
    assert set(have[2])==want | {('trainer', 'Trainer, FSDP1'), ('resume', 'Trainer, FSDP2')}
    cells = json.loads((root/'nbs/reference/processes.ipynb').read_text())['cells']
    page = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', []))
    bad = [(o['name'], str(o['processes'])) for o in on_gpus['cases'] if not o['ok']]
    assert re.findall(r'^- \*(.+)\* on (\d) GPUs: ', page, re.M)==bad
    assert re.findall(r'^\| ([^|]+) \| [^|]* \| open \|$', page, re.M)==sorted((n for n,_ in bad), key=page.index)
    assert on_gpus['hardware'] in page and f"torch {on_gpus['versions']['torch']}" in page

def test_merged_keeps_what_was_not_run_again():
    "Cases of one name and two kinds are two; each stays in its place"
    case = lambda kind, ok, size=1: dict(kind=kind, name='FSDP2, reset', processes=size, ok=ok)
    assert P.merged([case('works', 1), case('checkpoint', 2), case('works', 3, 2)],
                    [case('new', 4), case('works', 5)])==[case('works', 5), case('checkpoint', 2), case('works', 3, 2),
                    case('new', 4)]

def test_every_limit_is_tried():
    "Each limit is what some case is refused for"
    said = ' '.join(o['said'] for o in committed['cases'] if 'said' in o)
    missing = [f'{o.engine}: {o.what}' for o in limits if o.what not in said]
    assert missing==["DeepSpeed: optimizer_state other than 'keep'"], missing   # tried below

def test_which_optimizers_deepspeed_may_have():
    """Every optimizer of torch is answered, and only SGD without momentum and decay leaves a parameter without a
    gradient"""
    from ist_nb.processes import _harmless
    def made(name, **kwargs): return getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2, 2))], **kwargs)
    names = [k for k,v in vars(torch.optim).items()
             if isinstance(v, type) and issubclass(v, torch.optim.Optimizer) and v is not torch.optim.Optimizer]
    assert len(names)>=10 and [o for o in names if _harmless(made(o))]==['SGD']
    assert not _harmless(made('SGD', lr=1, momentum=0.9)) and not _harmless(made('SGD', lr=1, weight_decay=0.1))

def test_deepspeed_has_no_state_to_move():
    class Engine:
        zero_optimization_stage,fp16_enabled,bfloat16_enabled = lambda s: 2,lambda s: False,lambda s: False
    from types import SimpleNamespace as O
    limit = next(o for o in limits if o.engine=='DeepSpeed' and 'optimizer_state' in o.what)
    case = lambda how: O(config=ISTConfig(optimizer_state=how), engine=O(wrapper=Engine()))
    assert limit.broken(case('reset')) and not limit.broken(case('keep'))

# -- the parts
def test_weight():
    model = P.make()
    labels = torch.tensor([[1, 2, -100, 4], [5, 6, 7, 8]])
    assert _weight(model, dict(labels=labels), 2)==5           # of 8 tokens 2 are first, 1 is masked
    assert _weight(torch.nn.Linear(1, 1), dict(labels=labels), 2)==7
    assert _weight(model, dict(labels=torch.tensor([0.5, 1.])), 2)==2 and _weight(model, [1, 2], 3)==3
    assert _weight(model, dict(labels=torch.tensor([1, 0])), 2)==2

def test_weighted_by_what_it_is_the_mean_of():
    g = torch.Generator().manual_seed(0)
    values = torch.rand(11, generator=g, dtype=torch.float64)
    parts = [values[r::4] for r in range(4)]
    table = torch.stack([torch.stack([torch.tensor(float(len(o))), o.mean()]) for o in parts])
    assert torch.allclose(_weighted(table), values.mean()[None])
    assert _weighted(torch.tensor([[0, float('nan')], [0, float('nan')]])).isnan().all()   # nobody has anything to say

def test_shares_are_the_batch():
    for n in range(1, 9):
        for size in range(1, 6):
            parts = [_share(list(range(n)), r, size) for r in range(size)]
            assert sorted(i for own,counts in parts if counts for i in own)==list(range(n))
            assert all(own for own,_ in parts)                # each rank makes a pass

def test_one_process_sends_nothing():
    ranks = Ranks()
    assert (ranks.size, ranks.rank, ranks.gather('a'))==(1, 0, ['a'])
    I = torch.tensor([1., 2.])
    assert ranks.same(0, I) is I and ranks.spread(I) is I

def test_launched_but_not_joined(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        IST(P.make(), ISTConfig.rst())
    assert any('one of 2 processes' in str(o.message) for o in seen)

def test_fisher_before_any_layer_was_seen_twice():
    "Two steps, two layers"
    model = P.make()
    ist = IST(model, ISTConfig(n_active=1, score_interval=2, scorer='fisher', explore=1., seed=0))
    opt = torch.optim.SGD(P.params(model), lr=0.01)
    for t in range(3):
        with ist.step(): model(**P.batch(t)).loss.backward(); opt.step(); opt.zero_grad()
    assert len(ist.history)==1 and max(ist.history[0]['seen'])==1 and ist.importance.any()

# -- the command
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='cases of our own reach other processes by fork')
def test_loss_in_pieces_on_two_processes(monkeypatch, tmp_path):
    """As with the loss of transformers on one process, which in float64 rounds to 32 bits in other places. FSDP2
    gathers the last layer for its own forward pass only, so there the logits are whole"""
    from ist_nb.speed import _Lean
    plain,pieces = P.trainer_plain,_Lean.pieces
    def seen(self, logits, *args, **kwargs):
        (tmp_path/f'{os.getpid()}').touch()
        return pieces(self, logits, *args, **kwargs)
    monkeypatch.setattr(_Lean, 'pieces', seen)
    monkeypatch.setattr(P, 'trainer_plain', lambda name: plain(name) | dict(config={}))
    monkeypatch.setattr(P, 'judged', lambda res, judge=P.judged, **kw: judge(res, weights=1e-3, importance=1e-3))
    for k in ('DDP', 'FSDP2'):
        name = f'Trainer, {k}'
        monkeypatch.setitem(P.trainers, name, P.trainers[name] | dict(config=dict(fast='loss')))
    for k,n in (('DDP', 2), ('FSDP2', 0)):
        for o in tmp_path.iterdir(): o.unlink()
        launched([('trainer', f'Trainer, {k}')], 2, 600, fork=True)
        assert len(list(tmp_path.iterdir()))==n

@pytest.mark.slow
def test_finetune_under_torchrun(tmp_path):
    "Two processes make one run, with the losses of the run on one process; one of them writes"
    args = ['--max_steps', '6', '--score_interval', '2', '--lora_dropout', '0', '--lr_scheduler_type', 'constant',
            '--seed', '1']
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(root))
    def go(folder, command, rows):
        return subprocess.run([*command, '-m', 'ist_nb.finetune', *args, '--output_dir', str(tmp_path/folder),
                               '--per_device_train_batch_size', str(rows)], env=env, capture_output=True, text=True,
                               timeout=400)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    one,two = go('one', [sys.executable], 8),go('two', torchrun, 4)
    assert one.returncode==0 and two.returncode==0, (one.stderr[-2000:], two.stderr[-2000:])
    a,b = (json.loads((tmp_path/o/'results.json').read_text()) for o in ('one', 'two'))
    assert two.stdout.count('Held-out loss before')==1 and two.stdout.count('Saved in')==1
    assert abs(a['loss_before']-b['loss_before'])<1e-6, (a['loss_after'], b['loss_after'])
    assert abs(a['loss_after']-b['loss_after'])<2e-3, (a['loss_after'], b['loss_after'])
    assert a['times_active']==b['times_active'] and max(abs(x-y) for x,y in zip(a['importance'], b['importance']))<1e-2
    assert sorted(p.name for p in (tmp_path/'one').iterdir())==sorted(p.name for p in (tmp_path/'two').iterdir())
    again = go('two', torchrun, 4)                            # refused by both, said by one
    assert again.returncode!=0 and again.stderr.count('is not empty')==1, again.stderr

def test_finetune_refuses_processes_that_are_apart(monkeypatch):
    """A scheduler's variable alone does not make a group; and in a group, a Trainer that was not told to use the CPU
    trains alone"""
    from types import SimpleNamespace as O
    import ist_nb.finetune as F, ist_nb.processes as Q
    sft = lambda n: O(device='cpu', output_dir='x', world_size=n, n_gpu=0)
    F._join_processes(sft(1))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ISTError, match='2 processes were launched, but they are not in one group.*--use_cpu'):
        F._join_processes(sft(1))
    monkeypatch.setattr(Q, 'Ranks', lambda: O(size=2, gather=lambda o: [o]))
    F._join_processes(sft(2))
    with pytest.raises(ISTError, match='not in one group.*--use_cpu'): F._join_processes(sft(1))

def with_gpus(n, folder):
    "Training arguments as they are for one process on a machine with so many GPUs"
    from transformers import TrainingArguments
    args = TrainingArguments(str(folder), use_cpu=True, report_to='none', max_steps=1, per_device_train_batch_size=2)
    args._n_gpu = n
    return args

def test_one_process_with_several_gpus_is_refused(tmp_path):
    """When the Trainer is made, or when training begins if the callback came later; a model that device_map has spread
    is another thing"""
    from transformers import Trainer
    from ist_nb import ISTCallback
    both = r'nn\.DataParallel.*torchrun --nproc_per_node=2 .*accelerate launch.*CUDA_VISIBLE_DEVICES=0'
    def trainer(n, *callbacks, model=None):
        return Trainer(P.make() if model is None else model, with_gpus(n, tmp_path), train_dataset=P.data,
                       callbacks=list(callbacks))
    with pytest.raises(ISTError, match=both): trainer(2, ISTCallback())
    late = trainer(2)
    late.add_callback(ISTCallback())
    with pytest.raises(ISTError, match=both): late.callback_handler.on_train_begin(late.args, late.state, late.control)
    for n in (0, 1): trainer(n, ISTCallback())
    spread = P.make()
    spread.hf_device_map = {'model.embed_tokens':0, 'model.layers':1}
    assert trainer(2, ISTCallback(), model=spread).args.n_gpu==1

def test_finetune_takes_one_gpu_of_several(tmp_path, monkeypatch, capsys):
    "And says so, before its trainer is made; the callback then has nothing to refuse"
    import ist_nb.finetune as F
    def go(n, *more):
        args,cfg,sft = F.parse(['--output_dir', str(tmp_path/'run'), '--max_rows', '64', '--use_cpu', *more])
        sft.device
        sft._n_gpu = n
        F._join_processes(sft)
        return sft.n_gpu,capsys.readouterr().out
    used,said = go(2)
    assert used==1, said
    assert said.count('\n')==1, said
    assert 'one GPU of 2' in said, said
    assert 'torchrun --nproc_per_node=2 -m ist_nb.finetune' in said, said
    assert go(2, '--method', 'dense')[0]==1
    for n in (0, 1):
        used,said = go(n)
        assert used==n and 'GPU' not in said

def test_what_fast_takes_on_each_engine(monkeypatch):
    "All that is safe; FSDP1 would refuse compiled blocks, so there it folds"
    from types import SimpleNamespace as S
    from ist_nb import parts
    taken = []
    monkeypatch.setattr(parts, 'apply_optimisations', lambda model, layers, fast, n: taken.append(fast))
    monkeypatch.setattr(parts, 'shorten_backward', lambda model: [])
    for fast in (True, 'fold,compile'):
        for name in ('one process', 'DDP', 'FSDP2', 'FSDP1'):
            parts._Faster(S(model=S(), layers=None, config=S(fast=fast), engine=S(name=name), n_batches=9))
    assert taken==[True, True, True, 'fold', *4*['fold,compile']]
