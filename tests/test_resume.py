"""A run that is killed at any moment goes on as if it had not been, bit for bit; and a state of another version, or of
an enemy, does no harm"""
import ast,json,os,shutil,sys,warnings,pytest
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
import torch
from benchmarks import fuzz as fz
from benchmarks import kill_points as kp
from ist_nb import ISTCallback,ISTConfig,ISTError
from ist_nb.ist import IST
from ist_nb.runs import RunGuard,last_checkpoint,_checkpoints,_why_incomplete

pytestmark = pytest.mark.usefixtures('text_once')


@pytest.fixture(scope='module')
def ctx(): return kp.children()

@pytest.fixture(scope='module')
def want(ctx, tmp_path_factory):
    "The outcome of the run that is never interrupted"
    d = tmp_path_factory.mktemp('whole')
    assert kp.child(ctx, kp.train, d, None, d/'out.json')==0
    return json.loads((d/'out.json').read_text())

def check(results):
    assert all(r['ok'] for r in results), [r for r in results if not r['ok']]
    return results

@pytest.mark.slow
def test_kill_points(ctx, tmp_path, want):
    "In a step, and inside two of the files of a checkpoint"
    res = check(kp.kill_points(ctx, kp.train, [(8, 'on_optimizer_step'), (7, 'state_half'), (12, 'optimizer')],
                               tmp_path, want))
    assert all(r['died'] for r in res)
    assert [r['left'][-1] for r in res]==['checkpoint-5', 'checkpoint-10', 'checkpoint-15']

@pytest.mark.slow
def test_kill_points_accelerate(ctx, tmp_path):
    res = check(kp.kill_points(ctx, kp.accelerate_loop, kp.accelerate_points(3), tmp_path))
    assert all(r['died'] for r in res) and 'state.part' in res[1]['left'] and 'state.old' in res[2]['left']

@pytest.mark.slow
def test_twenty_kill_points(ctx, tmp_path):
    check(kp.kill_points(ctx, kp.train, kp.points(20, seed=1), tmp_path/'a'))
    check(kp.kill_points(ctx, kp.accelerate_loop, kp.accelerate_points(8, seed=1), tmp_path/'b'))

def blind(folder, point, out):
    "A run that takes the checkpoint with the highest number, as the Trainer does"
    import ist_nb.runs
    from transformers.trainer_utils import get_last_checkpoint
    ist_nb.runs.last_checkpoint = get_last_checkpoint
    kp.train(folder, point, out)

def forgetful(folder, point, out):
    "A run whose IST starts over"
    ISTCallback._restore = lambda self, state, optimizer: None
    kp.train(folder, point, out)

@pytest.mark.slow
def test_the_comparison_can_fail(ctx, tmp_path, want):
    "What is tested above does not come by itself"
    res, = kp.kill_points(ctx, blind, [(7, 'state_half')], tmp_path/'a', want)
    assert res['died'] and res['differs']==['it did not go on']
    res, = kp.kill_points(ctx, forgetful, [(8, 'on_step_begin')], tmp_path/'b', want)
    assert res['died'] and {'ist', 'losses', 'weights'} <= set(res['differs'])

def test_history_is_bounded(monkeypatch):
    "Two halves with a state between them have the history of the whole, and it ends"
    import ist_nb.state
    history_limit = 32
    monkeypatch.setattr(ist_nb.state, '_history_limit', history_limit)
    def run(ist, n):
        for _ in range(n):
            with ist.step(): pass
        return ist
    fresh = lambda: IST(kp.tiny_model(), ISTConfig(score_interval=1), probe=[dict(x=torch.ones(2, 1))],
                        loss_fn=lambda model, batch: torch.tensor(1.))
    n = 4*history_limit
    whole,half = run(fresh(), n).state_dict(),run(fresh(), n-30).state_dict()
    again = fresh(); again.load_state_dict(json.loads(json.dumps(half)))
    assert run(again, 30).state_dict()==whole
    steps = [h['step'] for h in whole['history']]
    assert len(steps)<=history_limit and steps[0]==1 and steps[-1]==n-1 and steps==sorted(steps)
    assert steps[-history_limit//2:]==list(range(n-history_limit//2, n))

# what a resume must not do in silence
def trainer(folder, *callbacks, **kwargs):
    from datasets import Dataset
    from transformers import Trainer,TrainingArguments
    args = TrainingArguments(str(folder),
                             **(dict(max_steps=6, per_device_train_batch_size=8, report_to='none', save_steps=3,
                                     use_cpu=True, disable_tqdm=True) | kwargs))
    return Trainer(kp.tiny_model(), args, train_dataset=Dataset.from_list(kp.rows()), callbacks=list(callbacks))

def edit(checkpoint, f):
    path = checkpoint/'trainer_state.json'
    state = json.loads(path.read_text())
    f(state)
    path.write_text(json.dumps(state))

def test_resume_is_never_a_silent_restart(tmp_path):
    trainer(tmp_path, ISTCallback(ISTConfig(score_interval=2))).train()
    c = tmp_path/'checkpoint-3'
    def again(**kwargs):
        t = trainer(tmp_path/'new', ISTCallback(ISTConfig(score_interval=2)), save_strategy='no', **kwargs)
        t.train(resume_from_checkpoint=str(c))
        return t
    again()
    def earlier(s):
        s['stateful_callbacks']['ISTCallback']['attributes']['saved'].update(t=2, times_active=[1, 1, 0, 0])
    edit(c, earlier)
    with pytest.raises(ISTError, match='of step 3, but the state of IST in it is of step 2'): again()
    edit(c, lambda s: s['stateful_callbacks']['ISTCallback']['attributes'].update(saved=None))
    with pytest.raises(ISTError, match='written without ISTCallback'): again()
    cb = ISTCallback(ISTConfig())
    cb.ist = IST(kp.tiny_model(), cb.config, probe=[dict(x=torch.ones(1))], loss_fn=lambda model, batch: None)
    for wrong in ([], 'x', {}, {'attributes':7}, {'attributes':{'saved':[1]}}, {'attributes':{'saved':{'version':1}}}):
        with pytest.raises(ISTError):
            cb._restore(SimpleNamespace(global_step=3, stateful_callbacks=dict(ISTCallback=wrong)), None)

class Part:
    "What accompanies a run, such as `Keep`"
    def __init__(self, weight): self.weight = weight
    def __repr__(self): return f'Part({self.weight})'

@pytest.mark.parametrize('parts,said', [([Part(1)], False), ([Part(2)], True), ([], True), (Part(1), False)])
def test_resume_without_a_part_is_said(tmp_path, parts, said):
    trainer(tmp_path, ISTCallback(ISTConfig.rst(), parts=[Part(1)])).train()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        trainer(tmp_path/'new', ISTCallback(ISTConfig.rst(), parts=parts), save_strategy='no').train(
            resume_from_checkpoint=str(tmp_path/'checkpoint-3'))
    assert any("written with parts=['Part(1)']" in str(o.message) for o in w)==said

def test_checkpoints_of_an_adapter_with_a_name_are_rotated(tmp_path):
    "PEFT saves it in a folder of its own"
    t = trainer(tmp_path, ISTCallback(ISTConfig.rst()), RunGuard(), save_steps=1, save_total_limit=1)
    t.model.add_adapter('mine', t.model.peft_config['default'])
    t.model.set_adapter('mine')
    t.model.delete_adapter('default')
    t.optimizer = None
    t.train()
    left = sorted(p.name for p in tmp_path.glob('checkpoint-*'))
    assert left==['checkpoint-6'] and (tmp_path/'checkpoint-6'/'mine'/'adapter_config.json').is_file()

@pytest.mark.parametrize('schedule', ['constant', 'linear'])
def test_a_finished_run_stays_finished(tmp_path, schedule):
    "Resumed at its last step or past it, nothing moves; with more steps it goes on"
    args = dict(max_steps=3, lr_scheduler_type=schedule, learning_rate=0.01)
    done = trainer(tmp_path, ISTCallback(ISTConfig.rst()), **args); done.train()
    want = {n:p.detach().clone() for n,p in done.model.named_parameters()}
    same = lambda t: all(torch.equal(p, want[n]) for n,p in t.model.named_parameters())
    for steps in (3, 2, 4):
        t = trainer(tmp_path/'new', ISTCallback(ISTConfig.rst()), save_strategy='no', **args | dict(max_steps=steps))
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            assert t.train(resume_from_checkpoint=str(tmp_path/'checkpoint-3')).global_step==max(steps, 3)
        assert any('the run is finished' in str(o.message) for o in w)==(steps<=3)
        assert same(t)==(steps<=3 or schedule=='linear')      # which has sunk to 0 in the checkpoint

def test_resume_without_the_optimizer_is_said(tmp_path):
    trainer(tmp_path, ISTCallback(ISTConfig(score_interval=2)), RunGuard(), save_only_model=True).train()
    assert 'no optimizer state' in _why_incomplete(tmp_path/'checkpoint-3')
    t = trainer(tmp_path/'new', ISTCallback(ISTConfig(score_interval=2)), save_strategy='no')
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        t.train(resume_from_checkpoint=str(tmp_path/'checkpoint-3'))
    assert any('with an empty optimizer' in str(o.message) for o in w)

def test_finetune_passes_over_a_torn_checkpoint(tmp_path, monkeypatch, capsys, short_pico):
    "--resume and --auto_resume end where the uninterrupted run ends; a run that is done stays as it is"
    from ist_nb.finetune import main
    monkeypatch.chdir(tmp_path)
    Path('d.jsonl').write_text(''.join(json.dumps(dict(prompt=f'What is {i}? ', completion=f'It is number {i}.'))+'\n'
                                       for i in range(40)))
    line = ('--data d.jsonl --max_steps 6 --save_steps 2 --save_strategy steps --per_device_train_batch_size 2 '
            '--max_length 32 --lora_r 2 --disable_tqdm true --logging_strategy no --score_interval 2 '
            '--score_batch_size 4').split()
    def run(*args): return main([*line, *args])
    assert run('--output_dir', 'a', '--auto_resume')==0
    done = {p:p.read_bytes() for p in Path('a').rglob('*') if p.is_file()}
    assert run('--output_dir', 'a', '--auto_resume')==0 and 'is finished' in capsys.readouterr().out
    assert {p:p.read_bytes() for p in Path('a').rglob('*') if p.is_file()}==done
    shutil.copytree('a', 'b')
    for o in ('results.json', 'adapter_model.safetensors', 'checkpoint-6/trainer_state.json'): (Path('b')/o).unlink()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        assert run('--output_dir', 'b', '--auto_resume')==0
    assert any('checkpoint-6 is skipped' in str(o.message) for o in w)
    assert 'Resuming from b/checkpoint-4' in capsys.readouterr().out
    assert (Path('a')/'adapter_model.safetensors').read_bytes()==(Path('b')/'adapter_model.safetensors').read_bytes()
    assert json.loads((Path('a')/'ist_state.json').read_text())==json.loads((Path('b')/'ist_state.json').read_text())
    (Path('b')/'results.json').unlink()
    for p in _checkpoints('b'): (p/'trainer_state.json').unlink()
    assert run('--output_dir', 'b', '--resume')==2
    assert 'no intact checkpoint in b (checkpoint-6, checkpoint-4 cannot' in capsys.readouterr().err
    assert run('--output_dir', 'a', '--resume', '--overwrite')==2 and 'Give one of them' in capsys.readouterr().err

# nothing executes
def test_no_code_in_files():
    "Nothing of ours unpickles, evaluates, or trusts remote code by itself"
    root = Path(__file__).parent.parent/'ist_nb'
    banned = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve', 'runpy', 'imp'}
    for path in root.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import): names = {o.name.split('.')[0] for o in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: names = {(node.module or '').split('.')[0]}
            assert not names&banned, (path.name, names)
            if not isinstance(node, ast.Call): continue
            f = ast.unparse(node.func)
            if f=='torch.load':
                assert any(k.arg=='weights_only' and ast.unparse(k.value)=='True'
                           for k in node.keywords), (path.name, node.lineno)
            assert f not in ('eval', 'exec', 'compile', '__import__', 'np.load', 'numpy.load', 'yaml.load',
                             'yaml.unsafe_load', 'yaml.full_load', 'os.system'), (path.name, node.lineno, f)
            for k in node.keywords:
                if k.arg=='trust_remote_code': assert ast.unparse(k.value)!='True', (path.name, node.lineno)
                assert k.arg!='shell', (path.name, node.lineno)

def watched(folder, point, out):
    "A run that goes on, and what was unpickled by name in it"
    found = []
    sys.addaudithook(lambda event, args: found.append('.'.join(map(str, args[:2]))) if event=='pickle.find_class'
                     else None)
    kp.train(folder, point, str(out)+'.run')
    Path(out).write_text(json.dumps(found))

def test_nothing_is_unpickled(tmp_path):
    "A run that goes on from a checkpoint loads no object by name, the libraries' part of it included"
    ctx = get_context('fork')
    (tmp_path/'run').mkdir()
    assert kp.child(ctx, kp.train, tmp_path/'run', (12, 'on_step_begin'), tmp_path/'o.json')==-9
    assert kp.child(ctx, watched, tmp_path/'run', None, tmp_path/'names.json')==0
    assert json.loads((tmp_path/'names.json').read_text())==[]
    import pickle
    seen = []
    sys.addaudithook(lambda event, args: seen.append(args) if event=='pickle.find_class' else None)
    pickle.loads(pickle.dumps(Path))
    assert seen   # the hook sees what it should

class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ['BOMB'],)

def test_hostile_checkpoint(tmp_path, monkeypatch):
    "A pickle in the place of any file of a checkpoint is not executed"
    monkeypatch.setenv('BOMB', str(tmp_path/'went off'))
    trainer(tmp_path/'run', ISTCallback(ISTConfig(score_interval=2))).train()
    for name in ('optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'training_args.bin'):
        shutil.copytree(tmp_path/'run'/'checkpoint-3', tmp_path/'c')
        torch.save(Bomb(), tmp_path/'c'/name)
        t = trainer(tmp_path/'new', ISTCallback(ISTConfig(score_interval=2)), save_strategy='no')
        if name=='training_args.bin': t.train(resume_from_checkpoint=str(tmp_path/'c'))   # nobody reads it
        else:
            with pytest.raises(Exception, match='[Ww]eights.only|Unpickl|unpickl'):
                t.train(resume_from_checkpoint=str(tmp_path/'c'))
        shutil.rmtree(tmp_path/'c')
    assert not (tmp_path/'went off').exists()
    torch.load(_bomb(tmp_path), weights_only=False)
    assert (tmp_path/'went off').exists()   # it would have

def _bomb(d): torch.save(Bomb(), d/'b.pt'); return d/'b.pt'

def test_fuzz():
    found = fz.fuzz(500)
    assert found['inputs']>=450 and all(o['tried'] for o in found['targets'].values())
    assert sum(o['accepted'] for o in found['targets'].values())
    accept = fz.load_state(fz.make_ists())
    for o in fz.states(): accept(o)                  # what is valid is taken: not everything is refused
    fz.load_config(dict(ISTConfig().__dict__))

@pytest.mark.slow
def test_fuzz_long(): assert fz.fuzz(100_000, seed_=1)['inputs']>=90_000
