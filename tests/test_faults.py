"""What can go wrong around a run, made to happen: each time the run ends with a sentence or goes on, and nothing that
was saved is lost"""
import contextlib,errno,json,os,shutil,signal,subprocess,sys,time,warnings,pytest
from pathlib import Path
import torch
from datasets import Dataset
from transformers import Trainer,TrainerCallback,TrainingArguments
from transformers.trainer_callback import PrinterCallback
from benchmarks import kill_points as kp
from ist_nb import IST,ISTCallback,ISTConfig,ISTError
from ist_nb.finetune import main
from ist_nb.runs import RunGuard,last_checkpoint,_checkpoints,_locked,_why_incomplete

posix = pytest.mark.skipif(os.name!='posix', reason='needs signals and file modes of Unix')
slow = pytest.mark.slow   # variants of what is tested beside them
pytestmark = pytest.mark.usefixtures('text_once')
data = [dict(prompt=f'What is {i}? ', completion=f'It is number {i}.') for i in range(40)]
quick = ('--model tiny --data d.jsonl --max_steps 6 --save_steps 2 --save_strategy steps '
         '--per_device_train_batch_size 2 --max_length 32 --lora_r 2 --disable_tqdm true --logging_strategy no '
         '--score_interval 2 --score_batch_size 4').split()

@pytest.fixture(autouse=True)
def same_signals():
    "Each test leaves Ctrl-C as it found it"
    was = {s:signal.signal(s, f) for s,f in ((signal.SIGINT, signal.default_int_handler),
                                             (signal.SIGTERM, signal.SIG_DFL))}
    yield
    for s,f in was.items(): signal.signal(s, f)

@pytest.fixture
def fault(record_property):
    "Write down what is injected and how the run answers, for the page of results"
    def note(name, answer): record_property('fault', name); record_property('answer', answer)
    return note

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A model of four small layers with pico's tokenizer, in a folder"
    from transformers import AutoTokenizer,LlamaConfig,LlamaForCausalLM
    from ist_nb.finetune import assets
    d,tok = tmp_path_factory.mktemp('model')/'tiny',AutoTokenizer.from_pretrained(assets/'pico')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                                 num_attention_heads=2, num_key_value_heads=2)).save_pretrained(d)
    tok.save_pretrained(d)
    return d

@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory):
    "A run of ist_finetune that nothing happened to"
    d = tmp_path_factory.mktemp('whole')
    write_data(d)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(d); (d/'tiny').symlink_to(tiny)
        assert main([*quick, '--output_dir', 'out'])==0
    return d/'out'

def write_data(d): (d/'d.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in data))

@pytest.fixture
def here(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'tiny').symlink_to(tiny)
    write_data(tmp_path)
    return tmp_path

def same_run(a, b):
    "Whether two runs of ist_finetune have left the same adapter, bit for bit, and the same state"
    state = lambda d: json.loads((Path(d)/'ist_state.json').read_text())
    def weights(folder): return (Path(folder)/'adapter_model.safetensors').read_bytes()
    return weights(a)==weights(b) and state(a)==state(b)

def trainer(folder, *callbacks, cls=Trainer, rows=None, config=None, **kwargs):
    args = TrainingArguments(str(folder),
                             **(dict(max_steps=8, per_device_train_batch_size=8, learning_rate=0.02, report_to='none',
                                     logging_steps=1, save_steps=2, use_cpu=True, disable_tqdm=True) | kwargs))
    t = cls(kp.tiny_model(), args, train_dataset=Dataset.from_list(rows or kp.rows()),
            callbacks=[ISTCallback(config or ISTConfig(score_interval=3)), *callbacks])
    t.pop_callback(PrinterCallback)
    return t

def ist_of(t): return next(c.ist for c in t.callback_handler.callbacks if isinstance(c, ISTCallback))
def outcome(t):
    logs = [(h['step'], h['loss']) for h in t.state.log_history if 'loss' in h]
    return json.dumps([ist_of(t).state_dict(), {n:p.tolist() for n,p in t.model.named_parameters() if 'lora' in n},
                       logs], sort_keys=True)

uninterrupted = []
def resumes_exactly(folder, tmp_path):
    "Whether a run that goes on from `folder` ends as one that was never interrupted"
    if not uninterrupted:
        t = trainer(tmp_path/'never', save_strategy='no'); t.train()
        uninterrupted.append(outcome(t))
    again = trainer(folder, save_strategy='no'); again.train(resume_from_checkpoint=last_checkpoint(folder))
    return outcome(again)==uninterrupted[0]

class At(TrainerCallback):
    "Does something at an event of a step"
    def __init__(self, event, step, f):
        setattr(self, event, lambda args, state, control, **kw: f() if state.global_step==step else None)

# the disk
@pytest.fixture
def small_disk(tmp_path):
    "A disk of 64 MB, where this process may make one"
    d = tmp_path/'disk'; d.mkdir()
    if not shutil.which('mount') or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', str(d)],
                                                   capture_output=True).returncode:
        pytest.skip('may not mount a small disk')
    yield d
    subprocess.run(['umount', '-l', str(d)], check=True)

def fill(d):
    "Leave nothing"
    with contextlib.suppress(OSError), (d/'filler').open('wb') as f:
        while True: f.write(b'x'*2**16); f.flush()
    with contextlib.suppress(OSError), (d/'filler').open('ab') as f:
        while True: f.write(b'x'*512); f.flush()   # the rest, in small pieces

@posix
@pytest.mark.parametrize('name,method', [('adapter_model.safetensors', 'save_model'),
                                         pytest.param('optimizer.pt', '_save_optimizer_and_scheduler', marks=slow),
                                         pytest.param('trainer_state.json', '_save_rng_state', marks=slow)])
def test_disk_full(small_disk, tmp_path, name, method, fault):
    "The disk is full from the moment when this file of the checkpoint of step 4 is about to be written"
    fault(f'The disk is full when {name} is saved', 'stops with one sentence; the previous checkpoint is intact, and '
          'the run resumes from it exactly')
    from ist_nb.cli import _storage_trouble
    plain = getattr(Trainer, method)
    def full(self, *args, **kwargs):
        if method=='_save_rng_state': plain(self, *args, **kwargs)   # what comes next is the state
        if self.state.global_step==4: fill(small_disk)
        if method!='_save_rng_state': plain(self, *args, **kwargs)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Trainer, method, full)
        with pytest.raises(Exception) as e: trainer(small_disk/'run', RunGuard()).train()
    assert _storage_trouble(e.value)=='the disk is full', e.value
    assert _why_incomplete(small_disk/'run'/'checkpoint-4') and not _why_incomplete(small_disk/'run'/'checkpoint-2')
    (small_disk/'filler').unlink()
    assert resumes_exactly(small_disk/'run', tmp_path)

@posix
def test_disk_full_in_finetune(here, small_disk, whole, capsys, fault):
    fault('The disk is full during ist_finetune',
          'stops with one sentence and no traceback; --resume continues exactly')
    plain = Trainer._save_checkpoint
    def full(self, *args):
        if self.state.global_step==4: fill(small_disk)
        return plain(self, *args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Trainer, '_save_checkpoint', full)
        assert main([*quick, '--output_dir', str(small_disk/'out')])==2
        err = capsys.readouterr().err
        assert 'the disk is full' in err and '--resume' in err and 'Traceback' not in err
    (small_disk/'filler').unlink()
    assert main([*quick, '--output_dir', str(small_disk/'out'), '--resume'])==0
    assert same_run(small_disk/'out', whole)

@posix
def test_file_size_limit(here, capsys, fault):
    "A limit of the system on the size of a file (RLIMIT_FSIZE) stands for a quota"
    fault('A quota: files may not grow beyond a limit', 'stops with one sentence; existing files are intact')
    import resource
    (here/'out').mkdir()
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, was[1]))
    try: status = main([*quick, '--output_dir', 'out'])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert status==2
    assert ('larger than this system allows' in (err := capsys.readouterr().err) or 'disk is full' in err)
    assert 'Traceback' not in err
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert last_checkpoint(here/'out') is None and main([*quick, '--output_dir', 'out', '--auto_resume'])==0

def as_nobody(f):
    "Run `f` in a child that is no longer root; its exit code"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if os.getuid()==0: os.setgid(65534); os.setuid(65534)
        os._exit(f() or 0)
    except BaseException:
        import traceback; traceback.print_exc(); os._exit(99)

@posix
def test_read_only_folder(here, fault):
    fault('The folder may not be written to', 'refused with one sentence before training')
    for p in (here, *here.parents[:2]): os.chmod(p, 0o755)   # pytest's own folders, closed to others
    (here/'ro').mkdir(mode=0o555); os.chmod(here/'ro', 0o555)
    def f():
        for folder in (here/'ro', here/'ro'/'run', Path('/dev/null/run')):
            with pytest.raises(ISTError, match='cannot be written to|may not'):
                with _locked(folder): pass
    assert as_nobody(f)==0
    assert list((here/'ro').iterdir())==[]

@posix
def test_folder_becomes_read_only(here, capsys, fault, monkeypatch):
    fault('The folder becomes read-only during the run', 'stops with one sentence; the previous checkpoint is intact')
    save = Trainer._save_checkpoint
    def gone(self, model, trial):
        if self.state.global_step==4: raise OSError(errno.EROFS, os.strerror(errno.EROFS), 'out')
        return save(self, model, trial)
    monkeypatch.setattr(Trainer, '_save_checkpoint', gone)
    assert main([*quick, '--output_dir', 'out'])==2
    assert 'the disk is read-only' in (err := capsys.readouterr().err) and '--resume' in err
    assert last_checkpoint('out')=='out/checkpoint-2'

# numbers that are not numbers
class Explodes(Trainer):
    "The loss of these steps is not finite"
    by = {}
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)*self.by.get(self.state.global_step+1, 1)

@pytest.mark.parametrize('value', [float('nan'), pytest.param(float('inf'), marks=slow),
                                   pytest.param(-float('inf'), marks=slow)], ids=str)
def test_loss_is_not_finite(tmp_path, fault, value):
    fault(f'The loss of a step is {value}', 'the step is skipped, with one warning; no weight changes')
    t,weights = trainer(tmp_path, RunGuard(), cls=Explodes, save_strategy='no'),{}
    t.by = {3:value, 5:value}
    snap = lambda: {n:p.detach().clone() for n,p in t.model.named_parameters()}
    for step in (2, 3, 4, 5): t.add_callback(At('on_step_end', step, lambda step=step: weights.update({step:snap()})))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        t.train()
    same = lambda a, b: all(torch.equal(weights[a][k], weights[b][k]) for k in weights[a])
    assert same(2, 3) and not same(3, 4) and same(4, 5)
    assert all(p.isfinite().all() for p in t.model.parameters()) and t.state.global_step==8
    assert sum('are not finite' in str(o.message) for o in w)==1
    assert next(c for c in t.callback_handler.callbacks if isinstance(c, RunGuard)).n_skipped==2

def test_without_the_guard_the_adapter_is_lost(tmp_path):
    "So the test above tests something"
    t = trainer(tmp_path, cls=Explodes, save_strategy='no'); t.by = {3:float('nan')}
    t.train()
    assert not all(p.isfinite().all() for p in t.model.parameters())

def test_loss_stays_not_finite(tmp_path, fault):
    fault('The loss is never finite again', 'stops with one sentence after `patience` steps; the previous checkpoint '
          'is intact and finite')
    t = trainer(tmp_path, RunGuard(patience=3), cls=Explodes); t.by = {s:float('nan') for s in range(4, 99)}
    with pytest.raises(ISTError, match='3 steps in a row had gradients that are not finite.*after step 5'): t.train()
    assert last_checkpoint(tmp_path).endswith('checkpoint-4')
    assert all(p.isfinite().all() for p in t.model.parameters())
    # that run has left out a step that this one made: its checkpoint is of what happened
    assert resumes_exactly(tmp_path, tmp_path/'x') is False
    assert trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path/'checkpoint-2')).global_step==8

def nothing_scored(ist, steps):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for _ in range(steps):
            with ist.step(): pass
    return [str(o.message) for o in w if 'IST' in str(o.message)]

@pytest.mark.parametrize('scorer', ['suppression', 'gate'])
@pytest.mark.parametrize('batch,what', [('nan', 'is NaN'), ('inf', 'is infinite'), ('empty', 'has no rows'),
                                        ('nothing', 'is empty'), ('masked', 'has all labels masked')])
def test_probe_without_evidence(fault, scorer, batch, what):
    fault(f'A probe of {scorer!r} {what}', 'the importance update is dropped, with one warning; the model is unchanged')
    ids = torch.arange(48).view(4, 12)%32
    b = dict(nan=dict(input_ids=ids, labels=ids), inf=dict(input_ids=ids, labels=ids),
             empty=dict(input_ids=ids[:0], labels=ids[:0]), nothing={},
             masked=dict(input_ids=ids, labels=torch.full_like(ids, -100)))[batch]
    by = dict(nan=float('nan'), inf=float('inf')).get(batch, 1)
    ist = IST(kp.tiny_model(), ISTConfig(score_interval=2, scorer=scorer), probe=[b],
              loss_fn=lambda model, batch: model(**batch).loss*by)
    before = {k:v.clone() for k,v in ist.model.state_dict().items()}
    said = nothing_scored(ist, 9)
    assert ist.n_dropped==4 and ist.t==9 and ist.importance.eq(0).all() and len(said)==1 and 'dropped' in said[0]
    assert all(torch.equal(v, before[k]) for k,v in ist.model.state_dict().items())
    assert all(p.grad is None for p in ist.model.parameters())

def test_training_on_masked_labels(tmp_path, fault):
    fault('A training batch has all labels masked', 'the run continues, and every weight stays finite')
    rows = kp.rows()
    for r in rows[:8]: r['labels'] = [-100]*len(r['labels'])
    class InOrder(Trainer):
        def _get_train_sampler(self, *args): return None
    t = trainer(tmp_path, RunGuard(), cls=InOrder, rows=rows, save_strategy='no'); t.train()
    assert t.state.global_step==8 and all(p.isfinite().all() for p in t.model.parameters())

def test_training_on_an_empty_batch(tmp_path, fault):
    fault('A training batch has no rows', 'the model raises an error; the previous checkpoint is intact, and the run '
          'resumes from it exactly')
    class Empties(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step==3: inputs = {k:v[:0] for k,v in inputs.items()}
            return super().training_step(model, inputs, *args, **kwargs)
    with pytest.raises(RuntimeError): trainer(tmp_path/'run', RunGuard(), cls=Empties).train()
    assert resumes_exactly(tmp_path/'run', tmp_path)

# memory
def picky(rows):
    "A loss function that needs memory for more than there is, above so many rows"
    def loss_fn(model, batch):
        n = len(batch['input_ids'])
        if n>rows: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        seen.append(n)
        return model(**batch).loss
    seen = loss_fn.seen = []
    return loss_fn

@pytest.mark.parametrize('scorer', ['suppression', pytest.param('gate', marks=slow)])
def test_probe_out_of_memory(fault, scorer):
    fault(f'A probe of {scorer!r} runs out of memory', 'the probe is halved and repeated, with one warning; the state '
          'keeps the new size')
    ids = torch.arange(16*12).view(16, 12)%32
    def make(rows):
        f = picky(rows)
        return IST(kp.tiny_model(), ISTConfig(score_interval=2, scorer=scorer), probe=[dict(input_ids=ids, labels=ids)],
                   loss_fn=f),f
    ist,f = make(5)
    said = nothing_scored(ist, 9)
    assert ist.probe_rows==4
    assert set(f.seen)=={4}
    assert len(ist.history)==4
    assert ist.n_dropped==0
    assert len(said)==1
    assert 'a probe of 16 rows does not fit' in said[0]
    assert all(p.requires_grad for o in ist.layers for p in o.params)
    want,_ = make(99)   # as if the batch had had four rows from the start
    want.prober.batches.source = [dict(input_ids=ids[:4], labels=ids[:4])]
    assert nothing_scored(want, 9)==[] and torch.equal(want.importance, ist.importance)
    again,g = make(5); again.load_state_dict(json.loads(json.dumps(ist.state_dict())))
    assert nothing_scored(again, 4)==[] and set(g.seen)=={4}
    none,_ = make(0)
    said = nothing_scored(none, 5)
    assert none.n_dropped==2 and none.probe_rows==1 and len(said)==2   # a row does not fit either: that is said too

def test_other_errors_in_a_probe_pass(fault):
    def loss_fn(model, batch): raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')
    ist = IST(kp.tiny_model(), ISTConfig(score_interval=1), probe=[dict(x=torch.ones(4, 2))], loss_fn=loss_fn)
    with ist.step(): pass
    with pytest.raises(RuntimeError, match='mat1'): ist.begin_step()

# signals
@posix
@pytest.mark.parametrize('name,status', [pytest.param('SIGINT', 130, marks=slow), ('SIGTERM', 143)])
def test_signal_in_finetune(here, whole, capsys, fault, monkeypatch, name, status):
    fault(f'{name} in ist_finetune', 'a checkpoint at the end of the step, a sentence on how to continue, the exit '
          'status of the signal; the run resumes exactly')
    step = Trainer.training_step
    def sent(self, *args, **kwargs):
        if self.state.global_step==3: signal.raise_signal(getattr(signal, name))
        return step(self, *args, **kwargs)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as m:
        m.setattr(Trainer, 'training_step', sent)
        assert main([*quick, '--output_dir', 'out'])==status
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]==before
    assert f'Stopped by {name} after step 4 of 6' in (err := capsys.readouterr().err) and '--resume' in err
    assert last_checkpoint('out')=='out/checkpoint-4'
    assert not (here/'out'/'results.json').exists()
    assert not (here/'out'/'.ist_lock').exists()
    assert main([*quick, '--output_dir', 'out', '--auto_resume'])==0
    assert same_run('out', whole)

@posix
@pytest.mark.parametrize('event', [pytest.param('on_step_begin', marks=slow), 'on_pre_optimizer_step',
                                   pytest.param('on_optimizer_step', marks=slow), 'on_step_end'])
def test_signal_in_a_trainer(tmp_path, fault, event):
    fault(f'Ctrl-C at {event} of a Trainer with RunGuard', 'a checkpoint at the end of the step, then '
          'KeyboardInterrupt as usual; the run resumes exactly')
    t = trainer(tmp_path/'run', RunGuard(), At(event, 3, lambda: signal.raise_signal(signal.SIGINT)),
                save_strategy='no')
    with pytest.raises(KeyboardInterrupt): t.train()
    step = 3 if event=='on_step_end' and not t.state.global_step==4 else 4
    assert [p.name for p in _checkpoints(tmp_path/'run')]==[f'checkpoint-{step}']
    assert resumes_exactly(tmp_path/'run', tmp_path)

@posix
def test_second_signal_is_at_once(tmp_path, fault):
    fault('Ctrl-C twice', 'stops at once; saved files stay')
    def twice(): signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
    t = trainer(tmp_path, RunGuard(), At('on_pre_optimizer_step', 5, twice))
    with pytest.raises(KeyboardInterrupt): t.train()
    assert t.state.global_step==5 and last_checkpoint(tmp_path).endswith('checkpoint-4')
    assert resumes_exactly(tmp_path, tmp_path/'x')

@posix
def test_signal_after_a_failure(tmp_path, fault):
    fault('Ctrl-C after training has failed', 'raises KeyboardInterrupt: the guard does not interfere')
    def fail(): raise ZeroDivisionError
    t = trainer(tmp_path, RunGuard(), At('on_pre_optimizer_step', 5, fail))
    with pytest.raises(ZeroDivisionError): t.train()
    with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError): t.train()
    t = trainer(tmp_path/'run', RunGuard(), At('on_pre_optimizer_step', 3, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt): t.train()   # the guard of the run that failed is not in the way either
    assert last_checkpoint(tmp_path/'run').endswith('checkpoint-4')

@posix
def test_ctrl_c_during_the_last_evaluation(here, fault, monkeypatch, capsys):
    fault('Ctrl-C after training, while the result is measured', 'the adapter is saved already; --resume measures it')
    import ist_nb.evaluate as module
    plain,calls = module.held_out_loss,[]
    def held_out_loss(*args):
        calls.append(1)
        if len(calls)==2: raise KeyboardInterrupt
        return plain(*args)
    monkeypatch.setattr(module, 'held_out_loss', held_out_loss)
    assert main([*quick, '--output_dir', 'out'])==130 and '--resume' in capsys.readouterr().err
    assert (here/'out'/'adapter_model.safetensors').exists()
    saved = (here/'out'/'adapter_model.safetensors').read_bytes()
    assert main([*quick, '--output_dir', 'out', '--resume'])==0
    assert (here/'out'/'adapter_model.safetensors').read_bytes()==saved

# the data, the folder, the clock
def test_data_change_under_a_run(here, whole, capsys, fault):
    fault('The data file changes under a run', 'the run is not affected; resuming with other rows is refused, and '
          'works once they are back')
    text = Path('d.jsonl').read_text()
    with pytest.MonkeyPatch.context() as m:
        step = Trainer.training_step
        def changed(self, *args, **kwargs):
            if self.state.global_step==2: Path('d.jsonl').write_text(text.replace('number', 'figure'))
            if self.state.global_step==3: raise KeyboardInterrupt
            return step(self, *args, **kwargs)
        m.setattr(Trainer, 'training_step', changed)
        assert main([*quick, '--output_dir', 'out'])==130
    before = {p:p.read_bytes() for p in Path('out').rglob('*') if p.is_file()}
    assert main([*quick, '--output_dir', 'out', '--resume'])==2
    assert 'not those that the run in out began with' in capsys.readouterr().err
    assert {p:p.read_bytes() for p in Path('out').rglob('*') if p.is_file()}==before
    Path('d.jsonl').write_text(text)
    assert main([*quick, '--output_dir', 'out', '--resume'])==0
    assert same_run('out', whole)

def hold(folder):
    return subprocess.Popen([sys.executable, '-c', f'import filelock\nwith '
                             f'filelock.FileLock({str(folder/".ist_lock")!r}): print("locked", flush=True); input()'],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

def test_two_runs_in_a_folder(here, capsys, fault):
    fault('A second run in the same folder', 'refused with one sentence; the lock left by a dead process is ignored')
    (here/'out').mkdir()
    other = hold(here/'out')
    assert other.stdout.readline()=='locked\n'
    assert main([*quick, '--output_dir', 'out'])==2 and 'Another run is writing to out' in capsys.readouterr().err
    other.kill(); other.wait()
    assert (here/'out'/'.ist_lock').exists()
    assert main([*quick, '--output_dir', 'out'])==0
    assert not (here/'out'/'.ist_lock').exists()

def test_clock_is_set_back(tmp_path, fault):
    fault('The clock is set back during a run', 'the newest checkpoints stay; without the guard the Trainer removes '
          'the one just written')
    def ahead():
        # written before the clock was set back by a day
        for p in (tmp_path/'run').glob('checkpoint-*'): os.utime(p, (time.time()+86400+int(p.name.split('-')[1]),)*2)
    def run(*callbacks):
        shutil.rmtree(tmp_path/'run', ignore_errors=True)
        t = trainer(tmp_path/'run', At('on_step_begin', 4, ahead), *callbacks, save_total_limit=2, max_steps=6)
        t.train()
        return {p.name for p in _checkpoints(tmp_path/'run')}
    assert run(RunGuard())=={'checkpoint-4', 'checkpoint-6'}
    assert run()!={'checkpoint-4', 'checkpoint-6'}

def test_clock_jumps_do_not_reach_the_numbers(tmp_path, fault, monkeypatch):
    fault('The clock jumps back and forth', 'seconds come from a monotonic clock; nothing changes')
    t = trainer(tmp_path/'a', save_strategy='no'); t.train(); want = outcome(t)
    uninterrupted[:] = [want]
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, 'time', lambda: 1e9+(-1)**next(jumps)*1e8)
    t = trainer(tmp_path/'b', RunGuard(), save_strategy='no'); t.train()
    assert outcome(t)==want and 0<ist_of(t).score_seconds<60
