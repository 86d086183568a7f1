"""Kill a training with SIGKILL, resume it from its newest whole checkpoint, and compare with the run that was never
interrupted, bit for bit"""
import gc,json,os,random,signal,time,warnings
import accelerate.accelerator
from multiprocessing import get_context
from pathlib import Path

steps,save_steps = 24,5
plain = accelerate.accelerator.save_accelerator_state
# where a run of the Trainer can die: at a moment of a step, or around or inside each file of a checkpoint
moments = 'on_step_begin forward on_pre_optimizer_step on_optimizer_step on_step_end'.split()
saves = 'model optimizer rng state_half state rotate'.split()

def die(): os.kill(os.getpid(), signal.SIGKILL)

def tiny_model():
    from benchmarks.small import tiny_lora
    return tiny_lora(vocab=32, dropout=0.1)

def rows():
    import torch
    return [dict(input_ids=o, labels=o) for o in ((torch.arange(12)+torch.arange(96)[:, None]*7)%32).tolist()]

def quiet():
    "A child of the server that holds the imports: one thread, no network, no warnings"
    import torch,transformers
    gc.freeze()      # the Trainer collects garbage: not among what the server has imported
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    transformers.utils.logging.set_verbosity_error()

def killer(point):
    "A callback that kills this process at `point`: (step, where)"
    from transformers import Trainer,TrainerCallback
    step,where = point
    class Killer(TrainerCallback): pass
    def now(state): return state.global_step==step
    if where in moments and where!='forward':
        setattr(Killer, where, lambda self, args, state, control, **kw: die() if now(state) else None)
    elif where=='forward':
        plain = Trainer.training_step
        def training_step(self, *args, **kw):
            out = plain(self, *args, **kw)
            if now(self.state): die()
            return out
        Trainer.training_step = training_step
    else: kill_in_save(step, where)
    return Killer()

def kill_in_save(step, where):
    "Die when half of a file is there, in the first checkpoint at or after `step`"
    from transformers import Trainer,TrainerState
    import transformers.trainer as t
    at = (step//save_steps+1)*save_steps
    def half(path):
        Path(path).write_bytes(Path(path).read_bytes()[:Path(path).stat().st_size//2])
        die()
    def after(name, f):
        plain = getattr(Trainer, name)
        def method(self, *args, **kw):
            out = plain(self, *args, **kw)
            if self.state.global_step==at and 'checkpoint-' in str(args[0]): f(Path(args[0]))
            return out
        setattr(Trainer, name, method)
    if where=='model': after('save_model', lambda d: half(d/'adapter_model.safetensors'))
    if where=='optimizer': after('_save_optimizer_and_scheduler', lambda d: half(d/'optimizer.pt'))
    if where=='rng': after('_save_rng_state', lambda d: half(d/'rng_state.pth'))
    if where in ('state', 'state_half'):
        plain = TrainerState.save_to_json
        def save_to_json(self, path):
            plain(self, path)
            if self.global_step==at: half(path) if where=='state_half' else die()
        TrainerState.save_to_json = save_to_json
    if where=='rotate':
        def rotate(output_dir, **kw):
            if Path(output_dir, f'checkpoint-{at}').exists():   # the oldest is on its way out
                old = min(Path(output_dir).glob('checkpoint-*'), key=lambda p: int(p.name.split('-')[1]))
                if old.name!=f'checkpoint-{at}': (old/'optimizer.pt').unlink()
                die()
        t.rotate_checkpoints = rotate

def train(folder, point, out):
    "A run of the Trainer in `folder` that goes on from what is there; dies at `point`, or writes its outcome to `out`"
    quiet()
    from datasets import Dataset
    from transformers import Trainer,TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from ist_nb import ISTCallback,ISTConfig
    from ist_nb.runs import RunGuard,last_checkpoint
    args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=0.02,
                             report_to='none', logging_steps=1, save_steps=save_steps, save_total_limit=2, use_cpu=True,
                             disable_tqdm=True)
    cb = ISTCallback(ISTConfig(score_interval=3))
    t = Trainer(tiny_model(), args, train_dataset=Dataset.from_list(rows()),
                callbacks=[cb, RunGuard(), *([killer(point)] if point else [])])
    t.pop_callback(PrinterCallback)
    t.train(resume_from_checkpoint=last_checkpoint(folder))
    keys = 'step', 'loss', 'grad_norm', 'learning_rate', 'epoch'
    logs = [{k:h[k] for k in keys} for h in t.state.log_history if 'loss' in h]
    write(out, cb.ist, t.model, t.optimizer, logs)

def write(out, ist, model, optimizer, logs):
    "Everything that must be the same: IST's state and history, losses, weights and moments; numbers as their bits"
    bits = lambda p: p.detach().float().numpy().tobytes().hex()
    state = optimizer.state_dict()['state']
    moments = {str(k):{n:bits(v) for n,v in s.items() if hasattr(v, 'detach')} for k,s in state.items()}
    weights = {n:bits(p) for n,p in model.named_parameters() if 'lora' in n}
    part = Path(out).with_suffix('.part')
    found = dict(ist=ist.state_dict(), losses=logs, weights=weights, moments=moments)
    part.write_text(json.dumps(found, sort_keys=True))
    part.replace(out)

def accelerate_loop(folder, point, out):
    "The same with accelerate's save_state and a loop of one's own"
    quiet()
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from datasets import Dataset
    from ist_nb import IST,ISTConfig
    from ist_nb.runs import AccelerateCheckpoint
    step,where = point or (-1, '')
    a,model,data = Accelerator(cpu=True),tiny_model(),Dataset.from_list(rows()).with_format('torch')
    loader = DataLoader(data, batch_size=8, generator=torch.Generator())
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model,opt,loader = a.prepare(model, opt, loader)
    ist,saved = IST(model, ISTConfig(score_interval=3), probe=loader),Path(folder)/'state'
    log = saved/'losses.json'
    checkpoint = AccelerateCheckpoint(a, ist, saved)
    a.register_save_state_pre_hook(lambda models, weights, to: Path(to, log.name).write_text(json.dumps(losses)))
    torch.manual_seed(0)
    checkpoint.load()
    losses = json.loads(log.read_text()) if saved.exists() else []
    replace = Path.replace
    def dies_between(self, to):
        if where=='before the rename' and ist.t>=step and self.suffix=='.part': die()
        res = replace(self, to)
        if where=='between the renames' and ist.t>=step and Path(to).suffix=='.old': die()
        return res
    def dies_inside(out_dir, *args, **kw):
        if ist.t<step: return plain(out_dir, *args, **kw)
        Path(out_dir, 'model.safetensors').write_bytes(b'half')
        die()
    if 'rename' in where: Path.replace = dies_between
    if where=='inside': accelerate.accelerator.save_accelerator_state = dies_inside
    while ist.t<steps:
        for batch in a.skip_first_batches(loader, ist.t%len(loader)):
            with ist.step():
                loss = model(**batch).loss
                a.backward(loss)
                if where=='forward' and ist.t==step: die()
                opt.step(); opt.zero_grad()
            losses.append(loss.item())
            if ist.t%save_steps==0: checkpoint.save()
            if ist.t==steps: break
    write(out, ist, model, opt.optimizer, losses)

def children():
    "A server that has imported everything once, and forks"
    ctx = get_context('forkserver')
    ctx.set_forkserver_preload(['torch', 'transformers', 'transformers.trainer', 'peft', 'accelerate', 'datasets',
                                'ist_nb.callback', 'ist_nb.runs', 'ist_nb.finetune', __name__])
    return ctx

def child(ctx, f, folder, point, out, after=None):
    "Run `f` in a process of its own; its exit code. With `after`, kill it from outside after so many seconds"
    p = ctx.Process(target=f, args=(str(folder), point, str(out)))
    p.start()
    if after is not None:
        p.join(after)
        p.kill()
    p.join(300)
    assert p.exitcode is not None, 'the child hangs'
    return p.exitcode

def points(n, seed=0):
    "`n` places to die in a run of the Trainer: half in a step, a quarter in a save, a quarter at any time"
    rng = random.Random(seed)
    def one(i):
        kind = (moments, saves, moments, None)[i%4] if n>3 else (moments, saves, None)[i%3]
        if kind is None: return 'clock',rng.random()
        return rng.randrange(save_steps+1, steps-save_steps),rng.choice(kind)
    return [one(i) for i in range(n)]

def accelerate_points(n, seed=0):
    rng = random.Random(seed)
    where = 'forward', 'inside', 'between the renames', 'before the rename'
    return [(rng.randrange(save_steps+1, steps-save_steps), where[i%4]) for i in range(n)]

def differs(a, b): return [k for k in a if a[k]!=b[k]]

def kill_points(
    ctx, # From `children`
    f, # `train` or `accelerate_loop`, or one like them
    where, # Places, from `points` or `accelerate_points`
    root, # A folder for all of it
    want=None, # The outcome of the uninterrupted run, if it is known
): # What became of each
    "Kill a run of `f` at each of the places `where`, and go on"
    root,res = Path(root),[]
    def outcome(folder, point=None, after=None):
        folder.mkdir(parents=True, exist_ok=True)
        code = child(ctx, f, folder, point, folder/'out.json', after)
        out = folder/'out.json'
        return code,json.loads(out.read_text()) if out.exists() else None
    # starts the server, so that the next run takes as long as those that are killed by the clock
    if any(p[0]=='clock' for p in where): outcome(root/'warm')
    start = time.perf_counter()
    if want is None:
        code,want = outcome(root/'whole')
        assert code==0 and want, 'the uninterrupted run has failed'
    seconds = time.perf_counter()-start
    for i,point in enumerate(where):
        folder = root/str(i)
        if point[0]=='clock': code,got = outcome(folder, None, after=seconds*(0.2+0.75*point[1]))
        else: code,got = outcome(folder, point)
        died = code==-signal.SIGKILL
        checkpoints = sorted((p.name for p in folder.glob('checkpoint-*')), key=lambda o: int(o.split('-')[1]))
        left = checkpoints or sorted(p.name for p in folder.iterdir())
        if got is None: code,got = outcome(folder)
        res.append(dict(point=list(point), died=died, left=left,
                        differs=differs(want, got) if got else ['it did not go on'],
                        ok=code==0 and bool(got) and not differs(want, got)))
    return res
