"""What does sparse tuning reach, at equal steps and at equal seconds, and what does importance add?
Dense LoRA and its relatives, layers fixed once, LISA's schedule, RST, the released IST and ours, each with its own
learning rate, on a held-out book, a second domain and multiple choice; in a short run, a full one, and one that repeats
few rows. On a CPU it runs on pico; with a GPU it first pretrains a model of 50 million parameters, or takes --model.
DATA holds `textbooks`, `textbooks_research` and `commonsense`. Runs go side by side in processes, results are saved as
they come, and a run that is known is not run again. `--plan alone --workers 1` measures seconds and bytes."""
import gzip,json,statistics,sys,tempfile,time
from collections import defaultdict
from contextlib import nullcontext
from functools import cache
from pathlib import Path
import torch, torch.multiprocessing as mp
from peft import AdaLoraConfig,LoraConfig,get_peft_model
from transformers import AutoModelForCausalLM,AutoTokenizer
from ist_nb import IST,ISTConfig,find_layers
from ist_nb.config import samplers,scorers,shrunk
from ist_nb.evaluate import _wilson,held_out_loss
from ist_nb.questions import _by_likelihood,read_task,tasks as known_tasks
from ist_nb.activations import _DeviceMeter,LiveBytes
from ist_nb.samplers import inclusion_by_depth
from ist_nb.scorers import ema_update
from ist_nb.speed import fold,_to_fp8
from benchmarks import record
from benchmarks.peers import as_long
from benchmarks.small import pico_path

# rows in a step, tokens in a row, rows to choose and to judge by, how often to judge; of each regime its steps, its
# training rows (None: all), and how often it is judged if that differs
scales = dict(
    smoke=dict(batch=2, length=96, held=4, evals=2, short=(6, None), full=(6, None), repeated=(6, 4, 3)),
    pico=dict(batch=4, length=128, held=48, evals=4, short=(50, None), full=(200, None), repeated=(400, 256, 8)),
    larger=dict(batch=16, length=256, held=384, evals=6, short=(80, None), full=(240, None), repeated=(200, 512, 10)))
small = dict(book='textbooks/physics', domain='textbooks_research/us-history')
large = dict(book='textbooks_research/us-history', domain='textbooks_research/anatomy-physiology')
books = dict(smoke=small, pico=small, larger=large)
kinds = ['book', 'domain', 'choice']
choice_sets = ['ARC-Easy', 'ARC-Challenge', 'openbookqa', 'boolq']

# the settings of the importance loop, each moved down and up
moved = dict(n_active=(0.125, 0.375), n_suppressed=(0.25, 0.75), suppression_factor=(0., 0.5), n_candidates=(2, 8),
             score_interval=(5, 80), score_lr=(3., 30.), explore=(0., 0.5))
ablations = [(k, v) for k,vs in moved.items() for v in vs]
# contenders: settings of IST (None: all layers at every step); then of the adapter, and of `run`
rst,every = dict(sampler='uniform'),dict(n_active=1.0, sampler='uniform')
def drawn_by(sampler, scorer, **kw):
    probe = {} if scorer=='fisher' else dict(score_batch_size=4)     # it has none
    return dict(sampler=sampler, scorer=scorer, score_interval=20) | probe | kw
def importance(scorer, **kw): return drawn_by('importance', scorer, **kw)
def depth(scorer='fisher', **kw): return drawn_by('depth', scorer, **kw)
by_depth = depth(n_active=0.4, schedule='shrink')
to_top = dict(sampler='top', n_active=0.4, schedule='shrink')
contenders = {
    'LoRA':(None, {}), 'rsLoRA':(None, dict(use_rslora=True)), 'DoRA':(None, dict(use_dora=True)),
    'AdaLoRA':(None, dict(ada=True)),
    'static top':(dict(sampler='top'), {}), 'static bottom':(dict(sampler='static bottom'), {}),
    'static spread':(dict(sampler='static spread'), {}),
    'LISA schedule':(rst, dict(hold=10)), 'RST':(rst, {}),
    'released IST':(dict(scorer='paper', explore=0., sampler='importance'), {}),
    **{f'importance, {o}':(importance(o), {})
       for o in ('suppression', 'gate', 'fisher', 'gradient norm', 'promise', 'weight change')},
    **{f'depth, {o}':(depth(o), {}) for o in ('suppression', 'gate', 'fisher', 'promise')},
    'depth, blind':(dict(sampler='depth, blind'), {}), 'depth 3/8, fisher':(depth(n_active=0.375), {}),
    'depth 1/2, fisher':(depth(n_active=0.5), {}), 'depth, fisher, folded':(depth(), dict(fold=True)),
    'depth 0.45, suppression':(depth('suppression', depth=0.45), {}),
    'depth 3/8, suppression':(depth('suppression', n_active=0.375), {}),
    'depth, suppression, folded':(depth('suppression'), dict(fold=True)),
    'depth, suppression, folded, 8 bits':(depth('suppression'), dict(fold=True, fp8=True)),
    'RST 3/8':(rst | dict(n_active=0.375), {}), 'RST 1/2':(rst | dict(n_active=0.5), {}),
    'anneal to depth':(depth(), dict(dense_first=0.2)), 'depth, own rates':(depth(), dict(own_rates=True)),
    'shrink to depth':(by_depth, {}), 'shrink to depth, 1/4':(depth(schedule='shrink'), {}),
    'shrink to top':(to_top, {}), 'shrink to top, 1/4':(to_top | dict(n_active=0.25), {}),
    'shrink to top, rates to zero':(to_top, dict(own_ends=0.)),
    'shrink to top, rates to zero, higher':(to_top, dict(own_ends=0.5)),
    'shrink to top, 0.6':(to_top | dict(n_active=0.6), {}), 'shrink to RST, 1/4':(rst | dict(schedule='shrink'), {}),
    'anneal to RST':(rst, dict(dense_first=0.2)),
    **{f'importance with {k}={v}':(importance('suppression') | {k:v}, {}) for k,v in ablations},
    'LoRA, 0.6 of the steps':(None, dict(part=0.6)), 'LoRA, 0.35 of the steps':(None, dict(part=0.35)),
    **{f'shrink to top, {k} times the steps':(to_top, dict(part=k)) for k in (1.5, 2.)},
    # for seconds and bytes: with all optimisations, and with half of the bytes that LoRA's activations take
    'LoRA, fast':(every | dict(fast=True), {}), 'shrink to depth, fast':(by_depth | dict(fast=True), {}),
    'shrink to top, fast':(to_top | dict(fast=True), {}), 'LoRA, checkpointing':(None, dict(checkpointing=True)),
    'LoRA, half the activations':(every | dict(activation_budget='half'), {}),
    'shrink to top, half the activations':(to_top | dict(activation_budget='half'), {}),
}

def bottom(N, n): return range(n)
def evenly(N, n): return sorted({round(i*(N-1)/max(1, n-1)) for i in range(n)})
for which,pick in dict(bottom=bottom, spread=evenly).items():
    @samplers.register(f'static {which}', 'The same layers at every step', needs_importance=False)
    def _(importance, n, config, generator, pick=pick): return torch.tensor(list(pick(len(importance), n)))
@samplers.register('depth, blind', 'Depth without importance', varies=True, uses_depth=True, needs_importance=False)
def _(importance, n, config, generator): return samplers['depth'](torch.zeros_like(importance), n, config, generator)
def from_gradients(importance, probe, of):
    "Importance that follows the log of `of` the gradients of a layer's adapters, on the probe"
    for o in probe.layers: o.thaw()
    loss = probe.loss_fn(probe.model, probe.batch)
    g = iter(torch.autograd.grad(loss, [p for o in probe.layers for p in o.params]))
    sizes = torch.stack([of([next(g).double() for _ in o.params]) for o in probe.layers])   # [N]
    return ema_update(importance, sizes.cpu().log()),dict(losses=[loss.item()])
@scorers.register('gradient norm', "Norm of the gradient of a layer's adapters, on the probe", gradients=True)
def _(importance, probe, config, generator):
    return from_gradients(importance, probe, lambda g: sum(o.square().sum() for o in g).sqrt())
@scorers.register('promise', 'What a step of Adam promises to gain: the sum of the sizes of the gradients',
                  gradients=True)
def _(importance, probe, config, generator):
    return from_gradients(importance, probe, lambda g: sum(o.abs().sum() for o in g))
@scorers.register('weight change', "How far a layer's adapters have moved")
def _(importance, probe, config, generator):
    def of(o): return (o.weight if hasattr(o, 'weight') else o).double().square().sum()
    far = [sum(of(o) for m in l.tuners for o in m.lora_B.values()).sqrt() for l in probe.layers]
    far = torch.stack(far).detach().cpu()   # [N]
    return (ema_update(importance, far),dict(losses=[])) if far.std()>0 else (importance, dict(dropped=True))

def lm_rows(path, tokenizer, length):
    "Rows of a book for training, choosing and judging: modules 5 and 9 of each 12 are held out"
    texts = [json.loads(o)['text'] for o in gzip.open(path, 'rt', encoding='utf-8')]
    def cut(texts):
        ids = torch.tensor([t for o in texts for t in tokenizer(o+'\n', verbose=False).input_ids])
        return [dict(input_ids=o, labels=o) for o in ids[:len(ids)//length*length].view(-1, length)]
    return [cut([t for i,t in enumerate(texts) if i%12 in where]) for where in (set(range(12))-{5, 9}, {5}, {9})]

def choice_prompt(row): return f"{row['instruction']}\n"

def choice_rows(folder, tokenizer, length, valid=400):
    "Rows of the four sets with training data; those of more than `length` tokens are left out"
    def rows(row):
        a,b = tokenizer(choice_prompt(row), verbose=False).input_ids,tokenizer(row['output'], verbose=False).input_ids
        ids = torch.tensor(a+b)
        return dict(input_ids=ids, labels=torch.cat([torch.full((len(a),), -100), ids[len(a):]]))
    train = [rows(o) for n in choice_sets for o in json.loads((folder/n/'train.json').read_text())]
    train = [train[i] for i in torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
             if len(train[i]['input_ids'])<=length]
    return train[valid:],train[:valid],None

def collate(rows):
    n = max(len(o['input_ids']) for o in rows)
    pad = lambda k, v: torch.stack([torch.nn.functional.pad(o[k], (0, n-len(o[k])), value=v) for o in rows])
    return dict(input_ids=pad('input_ids', 0), labels=pad('labels', -100),
                attention_mask=torch.stack([torch.arange(n)<len(o['input_ids']) for o in rows]).long())

@cache   # a process does many runs
def load_tokenizer(base): return AutoTokenizer.from_pretrained(base)
@cache
def load_task(kind, scale, data, tokenizer):
    length = scales[scale]['length']
    # a question with its choices is longer than a row of a book needs to be
    if kind=='choice': return choice_rows(data/'commonsense', tokenizer, 2*length)
    return lm_rows(data/f'{books[scale][kind]}.jsonl.gz', tokenizer, length)

def some(rows, n): return [rows[i*len(rows)//n] for i in range(n)] if len(rows)>n else rows

def load_base(base, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.config.use_cache = False
    return model

def pretrain(data, base, minutes):
    "A model of 50 million parameters, from all books that no task uses, in bfloat16, for so many minutes of a fast GPU"
    sys.path.insert(0, str(record.root/'tools'))
    import pretrain_pico as p
    tok = load_tokenizer(pico_path)
    out = {v for o in books.values() for v in o.values()}
    paths = [o for f in ('textbooks', 'textbooks_research') for o in sorted((data/f).glob('*.jsonl.gz'))
             if f'{f}/{o.name.split(".")[0]}' not in out]
    ids = p.stream(tok, [json.loads(l)['text'] for o in paths for l in gzip.open(o, 'rt', encoding='utf-8')]).cuda()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    model = p.make_model(tok, 16, 512, 8, 1408).cuda().train()
    opts,step_fn,T,bs = p.optimizers(model, 'muon', 2e-3, 0.1),torch.compile(p.loss_fn),512,64
    start,i,limit = time.perf_counter(),0,60*minutes
    done = 0.
    while done<1:
        ws = p.windows(ids, T, i%T)
        for x in ws[torch.randperm(len(ws), device=ids.device)].split(bs):
            if len(x)<bs or (done := (time.perf_counter()-start)/limit)>=1: continue
            for o in opts:
                # warm-up, then a last third that falls to 0
                for g in o.param_groups: g['lr'] = 2e-3*min(1, (i+1)/100, 3*(1-done))
            with torch.autocast('cuda', torch.bfloat16): loss = step_fn(model, x)
            loss.backward()
            for o in opts:
                o.step()
                o.zero_grad()
            i += 1
            if i%200==0:
                print(f'[{time.perf_counter()-start:.0f} s] pretraining step {i} loss {loss.item():.3f}', flush=True)
    model.bfloat16().save_pretrained(base)
    tok.save_pretrained(base)
    return dict(steps=i, tokens_a_step=bs*T, tokens=len(ids), parameters=model.num_parameters(),
                seconds=round(time.perf_counter()-start), last_loss=round(loss.item(), 3))

def adapter(more, steps):
    kw = dict(lora_alpha=32, lora_dropout=0.05, target_modules='all-linear', task_type='CAUSAL_LM')
    if 'ada' not in more: return LoraConfig(r=16, **kw, **{k:v for k,v in more.items() if k.startswith('use_')})
    return AdaLoraConfig(**kw, init_r=24, target_r=16, tinit=steps//10, tfinal=steps//2, deltaT=5, total_step=steps)

def half_of_lora(model, batch, amp, gpu):
    "Half of the bytes that one step of LoRA takes beyond the model, as an activation budget"
    meter = _DeviceMeter(torch.device('cuda')) if gpu else LiveBytes()
    meter.start([*model.parameters()])
    meter.restart()
    before = meter.now()
    with amp, nullcontext() if gpu else meter: model(**batch).loss.backward()
    budget = f'{(meter.peak()-before)/2**21:.2f}MiB'
    meter.stop()
    model.zero_grad()
    return budget

def optimizer(layers, settings, more, lr, steps, gpu):
    "AdamW with a rate for each layer, and its schedule: up, then down to zero at the end or when frozen for good"
    N,warm,ends = len(layers),max(1, steps//12),more.get('own_ends')
    pi = torch.ones(N)
    if 'own_rates' in more: pi = inclusion_by_depth(torch.zeros(N), N//4, ISTConfig(**settings))
    # a layer that is drawn less often may move further each time
    groups = [dict(params=o.params, lr=lr*min(4., (p/pi.mean()).item()**-0.5)) for o,p in zip(layers, pi)]
    opt = torch.optim.AdamW(groups, weight_decay=0., fused=gpu)
    n_at = [] if ends is None else [shrunk(settings['n_active']*N, N, t, steps) for t in range(steps)]
    def rate(i):
        end = steps if ends is None else max(t+1 for t in range(steps) if n_at[t]>=N-i)
        return lambda t: (steps/end)**(ends or 0)*min((t+1)/warm, max(0., (end-t)/max(1, end-warm)))
    return opt,torch.optim.lr_scheduler.LambdaLR(opt, [rate(i) for i in range(N)])

def make_ist(model, settings, more, seed, steps, rows, batch):
    "IST; LISA keeps a draw for some steps, annealing begins with all layers"
    probe = torch.utils.data.DataLoader(rows, batch_size=batch, collate_fn=collate)
    config = as_long(ISTConfig(**settings, seed=seed), next(model.parameters()).is_cuda)
    ist = IST(model, config, probe=probe, n_steps=steps)
    draw,hold = ist.draw,more.get('hold', 1)
    def held_draw():
        if ist.t<more.get('dense_first', 0.)*steps: return torch.arange(len(ist.layers))
        return draw() if ist.t%hold==0 else ist.active
    ist.draw = held_draw
    return ist

def make_model(base, dtype, more, steps, seed, device):
    model = load_base(base, dtype)
    torch.manual_seed(seed)
    model = get_peft_model(model, adapter(more, steps)).to(device).train()
    if 'fold' in more: fold(model)
    if 'fp8' in more: _to_fp8(model, find_layers(model), **({} if device=='cuda' else dict(emulate=True)))
    if 'checkpointing' in more:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model

def run(job, scale, data, base, device, dtype=torch.float32):
    "One fine-tuning run: losses on the way, seconds of training alone, how deep the steps went"
    name,kind,regime,lr,seed = job
    settings,more = contenders[name]
    s,settings,gpu = scales[scale],dict(settings or every),device=='cuda'
    steps,n_rows,*often = s[regime]
    B,evals,steps = s['batch'],(often or [s['evals']])[0],round(more.get('part', 1)*steps)
    base = base or pico_path
    tokenizer = load_tokenizer(base)
    train,valid,test = load_task(kind, scale, Path(data), tokenizer)
    train = train[:n_rows]
    if test is None: valid,test = valid[::2],valid[1::2]
    put = lambda b: {k:v.to(device) for k,v in b.items()}
    batches = lambda rows: [put(collate(rows[i:i+32])) for i in range(0, len(rows), 32)]
    valid,test = (batches(some(o, s['held'])) for o in (valid, test))
    model = make_model(base, dtype, more, steps, seed, device)
    amp = torch.autocast(device, torch.bfloat16, enabled=gpu)
    now = (lambda: torch.cuda.synchronize() or time.perf_counter()) if gpu else time.process_time
    if settings.get('activation_budget')=='half':
        settings['activation_budget'] = half_of_lora(model, put(collate(train[:B])), amp, gpu)
    if gpu: torch.cuda.reset_peak_memory_stats()
    opt,sched = optimizer(find_layers(model), settings, more, lr, steps, gpu)
    order = torch.cat([torch.randperm(len(train), generator=torch.Generator().manual_seed(1000*seed+e))
                       for e in range(steps*B//len(train)+1)]).tolist()
    ist = make_ist(model, settings, more, seed, steps, train, B)
    curve,deep,took,peak = [],[],[],0
    def judge(t):
        nonlocal peak
        if gpu: peak = max(peak, torch.cuda.max_memory_allocated())
        with amp: losses = dict(valid=held_out_loss(model, valid), test=held_out_loss(model, test))
        curve.append(dict(step=t, seconds=sum(took)) | losses)
        if gpu: torch.cuda.reset_peak_memory_stats()   # judging is not training
    judge(0)
    for t in range(steps):
        start = now()
        b = put(collate([train[i] for i in order[t*B:(t+1)*B]]))
        with ist.step():
            with amp: loss = model(**b).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.)
            opt.step()
            sched.step()
            if 'ada' in more: model.base_model.update_and_allocate(t)
            opt.zero_grad()
        took.append(now()-start)
        deep.append(1-int(ist.active[0])/len(ist.layers))
        if (t+1)*evals//steps>t*evals//steps: judge(t+1)
    best,spent = min(curve, key=lambda o: o['valid']),sum(took)
    steady = sum(statistics.median(took[i:i+10])*len(took[i:i+10]) for i in range(0, steps, 10))
    res = dict(method=name, task=kind, regime=regime, lr=lr, seed=seed, valid=curve[-1]['valid'],
               test=curve[-1]['test'], stopped={k:best[k] for k in ('step', 'seconds', 'valid', 'test')},
               seconds=spent, steady=steady, peak=peak,
               depth=statistics.mean(deep), active=float(ist.times_active.sum()/steps), share=ist.score_seconds/spent,
               curve=curve, importance=ist.importance.tolist(), times_active=ist.times_active.tolist())
    if kind=='choice' and scale!='pico':   # a model of pico's size answers by chance
        with amp: res['accuracy'] = accuracy(model, tokenizer, Path(data), 8 if scale=='smoke' else 500, 2*s['length'])
    return res

def accuracy(model, tokenizer, data, n, length):
    "On each set of questions: how many are right, of how many, and the 95% interval"
    res = {}
    for o in choice_sets:
        rows = [r for r in read_task(known_tasks[o], data/'commonsense', n)
                if len(tokenizer(choice_prompt(r), verbose=False).input_ids)<length]
        scored = _by_likelihood(model, tokenizer, known_tasks[o], rows, choice_prompt, batch_size=64)
        right = sum(r['correct'] for r in scored)
        res[o] = dict(correct=right, n=len(rows), interval=_wilson(right, len(rows)))
    return res

def work(jobs, done, args, gpu):
    torch.set_num_threads(1)
    if args['device']=='cuda': torch.cuda.set_device(gpu)
    while (job := jobs.get()) is not None:
        try: done.put(run(job, **args))
        except Exception as e: done.put(dict(job=job, error=f'{type(e).__name__}: {e}'[:300]))

def parallel(next_job, workers, args, deadline, keep):
    "Hand results to `keep` as they come; `next_job()` is None while it must wait, and none begins after `deadline`"
    todo,done = mp.Queue(),mp.Queue()
    procs = [mp.Process(target=work, args=(todo, done, args, i%max(1, torch.cuda.device_count())), daemon=True)
             for i in range(workers)]
    for p in procs: p.start()
    flying = 0
    while True:
        while flying<=workers and time.time()<deadline and (job := next_job()):
            todo.put(job)
            flying += 1
        if not flying: break
        keep(done.get())
        flying -= 1
    for _ in procs: todo.put(None)
    for p in procs: p.join()

def best_rates(runs):
    "The learning rate of each method, task and regime: the best on validation rows of the first seed, at its best step"
    res = {}
    for r in runs:
        if r['seed']==0: res.setdefault((r['method'], r['task'], r['regime']), {})[r['lr']] = r['stopped']['valid']
    return {k:min(v, key=v.get) for k,v in res.items()}

def planner(groups, runs, ended):
    "Jobs of `groups`, one a call: the learning rates of each cell with the first seed, then other seeds with the best"
    given,known = set(),set(map(key_of, runs))
    def cells(g):
        return [(m, kind, regime) for kind in g['tasks'].split() for regime in g['regimes'].split()
                for m in ([o.strip() for o in g['only'].split(';') if o.strip()] or contenders)]
    def fresh(job):
        if job in given or job in known: return None
        given.add(job)
        return job
    def next_job():
        for g in groups:
            sweep = [(*c, float(lr), 0) for c in cells(g) for lr in g['rates'].split()]
            for job in sweep:
                if fresh(job): return job
            best = best_rates(runs)
            for seed in range(1, g['seeds']):
                for c in cells(g):
                    if any(j[:3]==c and j in given and j not in ended for j in sweep): return None
                    if c in best and fresh(job := (*c, best[c], seed)): return job
    return next_job

# what is run if nothing else is asked for, in this order: tasks, regimes, contenders, and the learning rates that each
# tries with the first seed
short,top = 'LoRA;LoRA, 0.6 of the steps;LoRA, 0.35 of the steps','shrink to depth;shrink to top'
drawn,few = 'RST;depth, fisher;importance, suppression',f'LoRA;RST;depth, fisher;{top}'
few_data = f'LoRA;LoRA, 0.35 of the steps;RST;importance, suppression;{top}'
longer = 'shrink to top, 1.5 times the steps;shrink to top, 2.0 times the steps'
kept = 'static top;static bottom;static spread'
others = ('LISA schedule;released IST;depth, blind;importance, gate;importance, fisher;importance, gradient norm;'
          'importance, weight change;DoRA')
ideas = ('shrink to RST, 1/4;anneal to depth;anneal to RST;depth, own rates;depth, promise;RST 1/2;depth 1/2, fisher;'
         'shrink to top, rates to zero;shrink to top, rates to zero, higher')
larger_core = [
    ('book', 'full', f'{short};{top};shrink to top, 0.6', '5e-4 1e-3 2e-3'),
    ('book', 'full', drawn, '1e-3 2e-3 4e-3'),
    ('domain', 'full', f'{short};{drawn};{top};shrink to top, 0.6', '2e-3 4e-3 8e-3')]
larger_more = [
    ('book', 'full', longer, '5e-4 1e-3'), ('domain', 'full', longer, '2e-3 4e-3'),
    ('choice', 'full', f'{few};LoRA, 0.6 of the steps', '1e-3 2e-3'),
    ('book domain', 'repeated', few_data, '5e-4 1e-3'),
    ('book', 'short', few, '1e-3 2e-3'), ('domain', 'short', few, '4e-3 8e-3')]
larger_rest = [('book', 'full', f'{kept};{others}', '1e-3 2e-3'), ('book', 'full', 'rsLoRA', '2.5e-4 5e-4'),
               ('book', 'full', 'AdaLoRA', '4e-3 8e-3')]
pico_core = [
    ('book', 'full', f'{short};{drawn};{top};shrink to top, 0.6;{kept};depth, blind;shrink to depth, 1/4;'
                     'shrink to top, 1/4', '1e-3 2e-3 4e-3'),
    ('domain', 'full', f'{short};{drawn};{top};static top;static spread', '5e-4 1e-3 2e-3'),
    ('choice', 'full', f'LoRA;LoRA, 0.6 of the steps;{drawn};{top}', '1e-3 2e-3 4e-3')]
pico_more = [('book', 'repeated', few_data, '5e-4 1e-3'), ('book', 'short', few, '2e-3 4e-3'),
             ('domain', 'short', few, '2.5e-4 5e-4 1e-3')]
pico_rest = [
    ('book', 'full', others, '2e-3 4e-3'), ('book', 'full', 'rsLoRA', '5e-4 1e-3'),
    ('book', 'full', 'AdaLoRA', '8e-3 1.6e-2'),
    ('book', 'full', ';'.join(f'importance with {k}={v}' for k,v in ablations), '4e-3'),
    ('book', 'full', ideas, '2e-3')]
alone = [('book', 'short', ';'.join(f'LoRA{o}' for o in ('', ', fast', ', checkpointing', ', half the activations'))
          + f';RST;{top};shrink to depth, fast;shrink to top, fast;shrink to top, half the activations', '1e-3')]
optimisations = [('book', 'full', f'LoRA;{drawn};depth, suppression;depth 0.45, suppression;depth 3/8, suppression;'
                                  'depth, suppression, folded;depth, suppression, folded, 8 bits', '2e-3 4e-3')]
def with_seeds(groups, n): return [dict(zip(('tasks', 'regimes', 'only', 'rates', 'seeds'), (*o, n))) for o in groups]
def plan_of(*steps): return [o for groups,n in steps for o in with_seeds(groups, n)]
plans = dict(
    larger=plan_of((larger_core+larger_more, 1), (larger_core, 3), (larger_more, 3), (larger_rest, 3), (larger_core, 5),
                   (larger_more[2:4], 5)),
    pico=plan_of((pico_core, 3), (pico_more, 3), (pico_core, 5), (pico_rest, 3)),
    alone=plan_of((alone, 2)), optimisations=plan_of((optimisations, 5)))

def key_of(r): return r['method'],r['task'],r['regime'],r['lr'],r['seed']

def chosen(bench):
    "Runs by (task, regime), method and seed, each method at the learning rate at which its best step is best"
    rate,res = {},defaultdict(lambda: defaultdict(dict))
    for r in bench['runs']:
        k = r['task'],r['regime'],r['method']
        if r['seed']==0 and (k not in rate or r['stopped']['valid']<rate[k][0]): rate[k] = r['stopped']['valid'],r['lr']
    for r in bench['runs']:
        k = r['task'],r['regime'],r['method']
        if r['lr']==rate[k][1]: res[k[:2]][k[2]][r['seed']] = r
    return res

def main(
    data:Path,            # Folder with `textbooks`, `textbooks_research` and `commonsense`
    scale:str='',         # smoke, pico or larger; larger if there is a GPU
    base:Path=Path(tempfile.gettempdir())/'ist_quality_base', # Where the larger model, pretrained, is or goes
    model:str='',         # In its place a model of the hub, or a folder, with the type of its own weights
    minutes:float=2.5,    # Of pretraining
    plan:str='',          # Runs to make, a name in `plans`; that of the scale if empty
    tasks:str='',         # In place of a plan: which of book, domain and choice; all if empty
    regimes:str='',       # Which of short, full and repeated; all if empty
    only:str='',          # Contenders separated by semicolons; all if empty
    rates:str='1e-3 2e-3 4e-3', # Learning rates, each tried with the first seed
    seeds:int=5,          # Seeds
    workers:int=2,        # Processes side by side, spread over the GPUs
    seconds:float=1e9,    # Begin no run after so many seconds
    out:Path=None,        # Where the numbers go; what is there is kept and not run again
):
    if plan and plan not in plans: sys.exit(f"--plan {plan} is unknown. Allowed: {', '.join(plans)}.")
    mp.set_start_method('spawn')
    gpu,deadline = torch.cuda.is_available(),time.time()+seconds
    scale = scale or ('larger' if gpu or model else 'pico')
    name = model.rstrip('/').split('/')[-1] or (plan if plan not in scales else '') or scale
    out = out or record.results/f'quality_{name}.json'
    old = json.loads(out.read_text()) if out.exists() else {}
    runs,failed,ended,made = old.get('runs', []),[],set(),old.get('pretrained')
    trained = not model and scale=='larger'
    if model: made = dict(model=model)
    elif trained and not (base/'config.json').exists():
        made = pretrain(data, base, minutes)
        (base/'made.json').write_text(json.dumps(made))
    elif trained and (base/'made.json').exists(): made = json.loads((base/'made.json').read_text())
    args = dict(scale=scale, data=str(data), base=model or (str(base) if trained else ''),
                device='cuda' if gpu else 'cpu',
                dtype='auto' if model else torch.bfloat16 if trained else torch.float32)
    asked = model or tasks or regimes or only
    if (plan or scale) in plans and not asked: groups = plans[plan or scale]
    else: groups = [dict(tasks=tasks or 'book domain choice', regimes=regimes or 'short full repeated', only=only,
                         rates=rates, seeds=seeds)]
    on = f', {workers} runs side by side' if gpu else ' a run, seconds of the processor'
    head = record.about('held-out loss, seconds and memory of fine-tuning runs', '', None if gpu else 1, gpu, on,
                        DATA=str(data))
    this = {k:v for k,v in head.items() if k!='what'}
    calls = old.get('calls', [])   # runs add up, and each knows the call that made it
    if this not in calls: calls = [*calls, this]
    def save():
        order = {k:i for i,k in enumerate(contenders)}
        runs.sort(key=lambda r: (kinds.index(r['task']), r['regime'], order[r['method']], r['lr'], r['seed']))
        about = head | dict(calls=calls, settings=scales[scale], pretrained=made, books=books[scale])
        text = json.dumps(about | dict(runs=runs), separators=(',', ':'))
        out.write_text(text.replace('{"method"', '\n{"method"')+'\n')
    def keep(r):
        ended.add(tuple(r['job']) if 'job' in r else key_of(r))
        if 'error' in r:
            failed.append(r)
            print('FAILED', r, flush=True)
            return
        runs.append(r | dict(call=calls.index(this)))
        save()
        print(*key_of(r), f"{r['test']:.4f} in {r['seconds']:.1f} s", flush=True)
    parallel(planner(groups, runs, ended), workers, args, deadline, keep)
    save()
    print(f'{len(runs)} runs, {len(failed)} failed -> {out}')
    if failed: sys.exit(1)
