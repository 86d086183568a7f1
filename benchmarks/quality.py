"""Does importance pay? Dense LoRA and its relatives, layers fixed once, LISA's schedule, RST, the released IST and ours, each with its own learning rate,
on adapting to a held-out book, to a second domain, and on multiple choice; in an under-trained, a matched and an over-trained regime.
`python benchmarks/quality.py DATA` runs on pico and the CPU; with a GPU it first pretrains a base of 50 million parameters. DATA holds `textbooks`,
`textbooks_research` and `commonsense`; `--model` takes a model of the hub in place of that base. Runs go side by side in processes, results are saved as they come, and a run that is known is not run again.
`python benchmarks/quality.py DATA --plan alone --workers 1` measures seconds and bytes, one run at a time"""
import gzip,json,platform,statistics,sys,tempfile,time
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
import torch, torch.multiprocessing as mp
from fastcore.script import call_parse
from peft import AdaLoraConfig,LoraConfig,get_peft_model
from transformers import AutoModelForCausalLM,AutoTokenizer
from ist_nb import IST,ISTConfig,find_layers
from ist_nb.config import samplers,scorers,shrunk
from ist_nb.evaluate import confidence_interval,held_out_loss,read_task,score_likelihood,tasks as known_tasks
from ist_nb.finetune import assets
from ist_nb.memory import DeviceMeter,LiveBytes
from ist_nb.samplers import inclusion_by_depth
from ist_nb.scorers import ema_update
from ist_nb.speed import fold
from speed import typed

here = Path(__file__).parent
scales = dict(   # of pico a smoke test and a small version, and what a GPU runs: rows in a step, tokens in a row, rows to choose and to judge by, how often; steps and training rows (None: all) of the regimes, and how often there if it differs
    smoke=dict(batch=2, length=96, held=4, evals=2, under=(6, None), matched=(6, None), over=(6, 4, 3)),
    pico=dict(batch=4, length=128, held=48, evals=4, under=(50, None), matched=(200, None), over=(400, 256, 8)),
    base=dict(batch=16, length=256, held=384, evals=6, under=(80, None), matched=(240, None), over=(200, 512, 10)))
small = dict(book='textbooks/physics', domain='textbooks_research/us-history')
books = dict(smoke=small, pico=small, base=dict(book='textbooks_research/us-history', domain='textbooks_research/anatomy-physiology'))
kinds = ['book', 'domain', 'choice']
choice_sets = ['ARC-Easy', 'ARC-Challenge', 'openbookqa', 'boolq']

# the dials of the importance loop, each moved down and up
ablations = [(k, v) for k,vs in dict(n_active=(0.125, 0.375), n_suppressed=(0.25, 0.75), suppression_factor=(0., 0.5), n_candidates=(2, 8), score_interval=(5, 80), score_lr=(3., 30.), explore=(0., 0.5)).items() for v in vs]
# contenders: settings of IST (None: all layers at every step), of the adapter, and more of this file
fixed = lambda which: dict(sampler='top' if which=='top' else f'static {which}')
every = dict(n_active=1.0, sampler='uniform')
by_depth,to_top = dict(sampler='depth', scorer='fisher', score_interval=20, n_active=0.4, schedule='shrink'),dict(sampler='top', n_active=0.4, schedule='shrink')
contenders = {
    'LoRA':(None, {}), 'rsLoRA':(None, dict(use_rslora=True)), 'DoRA':(None, dict(use_dora=True)), 'AdaLoRA':(None, dict(ada=True)),
    'static top':(fixed('top'), {}), 'static bottom':(fixed('bottom'), {}), 'static spread':(fixed('spread'), {}),
    'LISA schedule':(dict(sampler='uniform', hold=10), {}), 'RST':(dict(sampler='uniform'), {}), 'released IST':(dict(scorer='paper', explore=0., sampler='importance'), {}),
    **{f'importance, {o}':(dict(sampler='importance', scorer=o, score_interval=20, score_batch_size=4), {}) for o in ('suppression', 'gate', 'fisher', 'gradient norm', 'promise', 'weight change')},
    **{f'depth, {o}':(dict(sampler='depth', scorer=o, score_interval=20, score_batch_size=4), {}) for o in ('suppression', 'gate', 'fisher', 'promise')},
    'depth, blind':(dict(sampler='depth, blind'), {}), 'depth 3/8, fisher':(dict(sampler='depth', scorer='fisher', score_interval=20, n_active=0.375), {}),
    'depth 1/2, fisher':(dict(sampler='depth', scorer='fisher', score_interval=20, n_active=0.5), {}),
    'depth, fisher, folded':(dict(sampler='depth', scorer='fisher', score_interval=20), dict(fold=True)),
    'RST 3/8':(dict(sampler='uniform', n_active=0.375), {}), 'RST 1/2':(dict(sampler='uniform', n_active=0.5), {}),
    'anneal to depth':(dict(sampler='depth', scorer='fisher', score_interval=20, dense_first=0.2), {}),
    'depth, own rates':(dict(sampler='depth', scorer='fisher', score_interval=20, own_rates=True), {}),
    'shrink to depth':(by_depth, {}), 'shrink to depth, 1/4':(dict(sampler='depth', scorer='fisher', score_interval=20, schedule='shrink'), {}),
    'shrink to top':(to_top, {}), 'shrink to top, 1/4':(to_top | dict(n_active=0.25), {}),
    'shrink to top, rates to zero':(to_top | dict(own_ends=0.), {}), 'shrink to top, rates to zero, higher':(to_top | dict(own_ends=0.5), {}),
    'shrink to top, 0.6':(to_top | dict(n_active=0.6), {}),
    'shrink to RST, 1/4':(dict(sampler='uniform', schedule='shrink'), {}),
    'anneal to RST':(dict(sampler='uniform', dense_first=0.2), {}),
    **{f'importance with {k}={v}':(dict(sampler='importance', scorer='suppression', score_interval=20, score_batch_size=4) | {k:v}, {}) for k,v in ablations},
    'LoRA, 0.6 of the steps':(None, dict(part=0.6)), 'LoRA, 0.35 of the steps':(None, dict(part=0.35)),
    **{f'shrink to top, {k} times the steps':(to_top, dict(part=k)) for k in (1.5, 2.)},
    # for seconds and bytes: with the levers, and with half of the bytes that LoRA's activations take
    'LoRA, levers':(every | dict(fast=True), {}), 'shrink to depth, levers':(by_depth | dict(fast=True), {}), 'shrink to top, levers':(to_top | dict(fast=True), {}),
    'LoRA, checkpointing':(None, dict(checkpointing=True)), 'LoRA, half the activations':(every | dict(activation_budget='half'), {}),
    'shrink to top, half the activations':(to_top | dict(activation_budget='half'), {}),
}

for which,pick in dict(bottom=lambda N,n: range(n), spread=lambda N,n: sorted({round(i*(N-1)/max(1, n-1)) for i in range(n)})).items():
    @samplers.register(f'static {which}', 'The same layers at every step', needs_importance=False)
    def _(importance, n, config, generator, pick=pick): return torch.tensor(list(pick(len(importance), n)))
@samplers.register('depth, blind', 'Depth without importance', varies=True, uses_depth=True, needs_importance=False)
def _(importance, n, config, generator): return samplers['depth'](torch.zeros_like(importance), n, config, generator)
def from_gradients(importance, probe, of):
    "Importance that follows the log of `of` the gradients of a layer's adapters, on the probe"
    for o in probe.layers: o.thaw()
    loss = probe.loss_fn(probe.model, probe.batch)
    g = iter(torch.autograd.grad(loss, [p for o in probe.layers for p in o.params]))
    return ema_update(importance, torch.stack([of([next(g).double() for _ in o.params]) for o in probe.layers]).cpu().log()),dict(losses=[loss.item()])
@scorers.register('gradient norm', 'Norm of the gradient of the adapters of a layer, on the probe', suppresses=False, gradients=True)
def _(importance, probe, config, generator): return from_gradients(importance, probe, lambda g: sum(o.square().sum() for o in g).sqrt())
@scorers.register('promise', 'How much a step of Adam, as long in each weight, promises to gain: the sum of the sizes of the gradients', suppresses=False, gradients=True)
def _(importance, probe, config, generator): return from_gradients(importance, probe, lambda g: sum(o.abs().sum() for o in g))
@scorers.register('weight change', 'How far the adapters of a layer have moved', suppresses=False)
def _(importance, probe, config, generator):
    moved = [sum((o.weight if hasattr(o, 'weight') else o).double().square().sum() for m in l.tuners for o in m.lora_B.values()).sqrt() for l in probe.layers]
    moved = torch.stack(moved).detach().cpu()
    return (ema_update(importance, moved),dict(losses=[])) if moved.std()>0 else (importance, dict(dropped=True))

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
    train = [train[i] for i in torch.randperm(len(train), generator=torch.Generator().manual_seed(0)) if len(train[i]['input_ids'])<=length]
    return train[valid:],train[:valid],None

def collate(rows):
    n = max(len(o['input_ids']) for o in rows)
    pad = lambda k, v: torch.stack([torch.nn.functional.pad(o[k], (0, n-len(o[k])), value=v) for o in rows])
    return dict(input_ids=pad('input_ids', 0), labels=pad('labels', -100), attention_mask=torch.stack([torch.arange(n)<len(o['input_ids']) for o in rows]).long())

@cache   # a process does many runs
def load_tokenizer(base): return AutoTokenizer.from_pretrained(base)
@cache
def load_task(kind, scale, data, tokenizer):
    length = scales[scale]['length']
    if kind=='choice': return choice_rows(data/'commonsense', tokenizer, 2*length)   # a question with its choices is longer than a row of a book needs to be
    return lm_rows(data/f'{books[scale][kind]}.jsonl.gz', tokenizer, length)

def spread(rows, n): return [rows[i*len(rows)//n] for i in range(n)] if len(rows)>n else rows

def load_base(base, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.config.use_cache = False
    return model

def pretrain(data, base, minutes):
    "A base of 50 million parameters, from all the books that no task uses, in bfloat16; for so many minutes of a fast GPU"
    sys.path.insert(0, str(here.parent/'tools'))
    from pretrain_pico import loss_fn,make_model,optimizers,stream,windows
    tok = AutoTokenizer.from_pretrained(str(assets/'pico'))
    out = {v for o in books.values() for v in o.values()}
    paths = [p for f in ('textbooks', 'textbooks_research') for p in sorted((data/f).glob('*.jsonl.gz')) if f'{f}/{p.name.split(".")[0]}' not in out]
    ids = stream(tok, [json.loads(l)['text'] for p in paths for l in gzip.open(p, 'rt', encoding='utf-8')]).cuda()
    torch.manual_seed(0); torch.set_float32_matmul_precision('high')
    model = make_model(tok, 16, 512, 8, 1408).cuda().train()
    opts,step_fn,T,bs = optimizers(model, 'muon', 2e-3, 0.1),torch.compile(loss_fn),512,64
    start,i,limit = time.perf_counter(),0,60*minutes
    done = 0.
    while done<1:
        ws = windows(ids, T, i%T)
        for x in ws[torch.randperm(len(ws), device=ids.device)].split(bs):
            if len(x)<bs or (done := (time.perf_counter()-start)/limit)>=1: continue
            for o in opts:
                for g in o.param_groups: g['lr'] = 2e-3*min(1, (i+1)/100, 3*(1-done))   # warm-up, then a last third that falls to 0
            with torch.autocast('cuda', torch.bfloat16): loss = step_fn(model, x)
            loss.backward()
            for o in opts: o.step(); o.zero_grad()
            i += 1
            if i%200==0: print(f'[{time.perf_counter()-start:.0f} s] pretraining step {i} loss {loss.item():.3f}', flush=True)
    model.bfloat16().save_pretrained(base); tok.save_pretrained(base)
    return dict(steps=i, tokens_a_step=bs*T, tokens=len(ids), parameters=model.num_parameters(), seconds=round(time.perf_counter()-start), last_loss=round(loss.item(), 3))

def adapter(more, steps):
    kw = dict(r=16, lora_alpha=32, lora_dropout=0.05, target_modules='all-linear', task_type='CAUSAL_LM') | {k:v for k,v in more.items() if k.startswith('use_')}
    return AdaLoraConfig(**{k:v for k,v in kw.items() if k!='r'}, init_r=24, target_r=16, tinit=steps//10, tfinal=steps//2, deltaT=5, total_step=steps) if 'ada' in more else LoraConfig(**kw)

def run(job, scale, data, base, device, dtype=torch.float32):
    "One fine-tuning run: losses on the way, seconds of training alone, how deep the steps went"
    name,kind,regime,lr,seed = job
    settings,more = contenders[name]
    s = scales[scale]
    steps,n_rows,*often = s[regime]
    base = base or str(assets/'pico')
    tokenizer = load_tokenizer(base)
    train,valid,test = load_task(kind, scale, Path(data), tokenizer)
    train,steps = train[:n_rows],round(more.get('part', 1)*steps)
    if test is None: valid,test = valid[::2],valid[1::2]
    put = lambda b: {k:v.to(device) for k,v in b.items()}
    batches = lambda rows: [put(collate(rows[i:i+32])) for i in range(0, len(rows), 32)]
    valid,test,B,evals = batches(spread(valid, s['held'])),batches(spread(test, s['held'])),s['batch'],(often or [s['evals']])[0]
    model = load_base(base, dtype)
    torch.manual_seed(seed)
    model = get_peft_model(model, adapter(more, steps)).to(device).train()
    if 'fold' in more: fold(model)
    if 'checkpointing' in more: model.gradient_checkpointing_enable(); model.enable_input_require_grads()
    dials = dict(settings or every)
    gpu = device=='cuda'
    amp = torch.autocast(device, torch.bfloat16, enabled=gpu)
    now = (lambda: torch.cuda.synchronize() or time.perf_counter()) if gpu else time.process_time
    if dials.get('activation_budget')=='half':   # of what one step of LoRA takes beyond the model
        b,meter = put(collate(train[:B])),DeviceMeter(torch.device('cuda')) if gpu else LiveBytes()
        meter.start([*model.parameters()]); meter.restart(); before = meter.now()
        with amp, meter if isinstance(meter, LiveBytes) else nullcontext(): model(**b).loss.backward()
        dials['activation_budget'] = f'{(meter.peak()-before)//2}B'
        meter.stop(); model.zero_grad()
    if gpu: torch.cuda.reset_peak_memory_stats()
    hold,dense,own,ends = dials.pop('hold', 1),dials.pop('dense_first', 0.),dials.pop('own_rates', False),dials.pop('own_ends', None)
    layers = find_layers(model)
    # a layer that is drawn less often may move further each time
    pi = inclusion_by_depth(torch.zeros(len(layers)), len(layers)//4, ISTConfig(**dials)) if own else torch.ones(len(layers))
    opt = torch.optim.AdamW([dict(params=o.params, lr=lr*min(4., (p/pi.mean()).item()**-0.5)) for o,p in zip(layers, pi)], weight_decay=0., fused=gpu)
    warm = max(1, steps//12)
    N = len(layers)
    n_at = [shrunk(dials['n_active']*N, N, t, steps) for t in range(steps)] if ends is not None else []
    def rate(i):
        "The rate of a layer over the steps, as a share: up, then down to zero at the end of the run, or when the layer is frozen for good"
        end = steps if ends is None else max(t+1 for t in range(steps) if n_at[t]>=N-i)
        return lambda t: (steps/end)**(ends or 0)*min((t+1)/warm, max(0., (end-t)/max(1, end-warm)))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, [rate(i) for i in range(N)])
    order = torch.cat([torch.randperm(len(train), generator=torch.Generator().manual_seed(1000*seed+e)) for e in range(steps*B//len(train)+1)]).tolist()
    ist = IST(model, ISTConfig(**dials, seed=seed), probe=torch.utils.data.DataLoader(train, batch_size=B, collate_fn=collate), n_steps=steps)
    draw = ist.draw
    def held_draw():   # LISA keeps a draw for some steps; annealing begins with all layers
        if ist.t<dense*steps: return torch.arange(len(ist.layers))
        return draw() if hold==1 or ist.t%hold==0 else ist.active
    ist.draw = held_draw
    curve,depth,took,spent,peak = [],[],[],0.,0
    def judge(t):
        nonlocal peak
        if gpu: peak = max(peak, torch.cuda.max_memory_allocated())
        with amp: curve.append(dict(step=t, seconds=spent, valid=held_out_loss(model, valid), test=held_out_loss(model, test)))
        if gpu: torch.cuda.reset_peak_memory_stats()   # judging is not training
    judge(0)
    for t in range(steps):
        start = now()
        b = put(collate([train[i] for i in order[t*B:(t+1)*B]]))
        with ist.step():
            with amp: loss = model(**b).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.)
            opt.step(); sched.step()
            if 'ada' in more: model.base_model.update_and_allocate(t)
            opt.zero_grad()
        took.append(now()-start); spent += took[-1]
        depth.append(1-int(ist.active[0])/len(ist.layers))
        if (t+1)*evals//steps>t*evals//steps: judge(t+1)
    best = min(curve, key=lambda o: o['valid'])
    res = dict(method=name, task=kind, regime=regime, lr=lr, seed=seed, valid=curve[-1]['valid'], test=curve[-1]['test'], stopped=dict(step=best['step'], seconds=best['seconds'], valid=best['valid'], test=best['test']), seconds=spent, steady=sum(statistics.median(took[i:i+10])*len(took[i:i+10]) for i in range(0, steps, 10)), peak=peak,
               depth=statistics.mean(depth), active=float(ist.times_active.sum()/steps), share=ist.score_seconds/spent, curve=curve, importance=ist.importance.tolist(), times_active=ist.times_active.tolist())
    if kind=='choice' and scale!='pico':   # a model of pico's size answers by chance
        res['accuracy'] = {}
        for o in choice_sets:
            rows = [r for r in read_task(known_tasks[o], Path(data)/'commonsense', 8 if scale=='smoke' else 500) if len(tokenizer(choice_prompt(r), verbose=False).input_ids)<2*s['length']]
            with amp: right = sum(r['correct'] for r in score_likelihood(model, tokenizer, known_tasks[o], rows, batch_size=64, prompt=choice_prompt))
            res['accuracy'][o] = dict(correct=right, n=len(rows), interval=confidence_interval(right, len(rows)))
    return res

def work(jobs, done, args, gpu):
    torch.set_num_threads(1)
    if args['device']=='cuda': torch.cuda.set_device(gpu)
    while (job := jobs.get()) is not None:
        try: done.put(run(job, **args))
        except Exception as e: done.put(dict(job=job, error=f'{type(e).__name__}: {e}'[:300]))

def parallel(next_job, workers, args, deadline, keep):
    "Results of jobs as they come, from processes side by side; `next_job()` is None while one must wait for another, and none is begun after `deadline`"
    todo,done = mp.Queue(),mp.Queue()
    procs = [mp.Process(target=work, args=(todo, done, args, i%max(1, torch.cuda.device_count())), daemon=True) for i in range(workers)]
    for p in procs: p.start()
    flying = 0
    while True:
        while flying<=workers and time.time()<deadline and (job := next_job()): todo.put(job); flying += 1
        if not flying: break
        keep(done.get()); flying -= 1
    for _ in procs: todo.put(None)
    for p in procs: p.join()

def best_rates(runs):
    "The learning rate of each method, task and regime: the best on validation rows of the first seed, each stopped where it is best"
    res = {}
    for r in runs:
        if r['seed']==0: res.setdefault((r['method'], r['task'], r['regime']), {})[r['lr']] = r['stopped']['valid']
    return {k:min(v, key=v.get) for k,v in res.items()}

def planner(groups, runs, ended):
    "Jobs of `groups`, one call at a time: the learning rates of each method, task and regime with the first seed, then the other seeds with the best of them"
    given,known = set(),{(r['method'], r['task'], r['regime'], r['lr'], r['seed']) for r in runs}
    def cells(g): return [(m, kind, regime) for kind in g['tasks'].split() for regime in g['regimes'].split() for m in ([o.strip() for o in g['only'].split(';') if o.strip()] or contenders)]
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

# what is run if nothing else is asked for, in this order: tasks, regimes, contenders, and the learning rates that each tries with the first seed
short,top = 'LoRA;LoRA, 0.6 of the steps;LoRA, 0.35 of the steps','shrink to depth;shrink to top'
drawn,few = 'RST;depth, fisher;importance, suppression',f'LoRA;RST;depth, fisher;{top}'
data_are_few,longer = f'LoRA;LoRA, 0.35 of the steps;RST;importance, suppression;{top}','shrink to top, 1.5 times the steps;shrink to top, 2.0 times the steps'
kept = 'static top;static bottom;static spread'
others = 'LISA schedule;released IST;depth, blind;importance, gate;importance, fisher;importance, gradient norm;importance, weight change;DoRA'
ideas = 'shrink to RST, 1/4;anneal to depth;anneal to RST;depth, own rates;depth, promise;RST 1/2;depth 1/2, fisher;shrink to top, rates to zero;shrink to top, rates to zero, higher'
base_core = [
    ('book', 'matched', f'{short};{top};shrink to top, 0.6', '5e-4 1e-3 2e-3'),
    ('book', 'matched', drawn, '1e-3 2e-3 4e-3'),
    ('domain', 'matched', f'{short};{drawn};{top};shrink to top, 0.6', '2e-3 4e-3 8e-3')]
base_more = [
    ('book', 'matched', longer, '5e-4 1e-3'), ('domain', 'matched', longer, '2e-3 4e-3'),
    ('choice', 'matched', f'{few};LoRA, 0.6 of the steps', '1e-3 2e-3'),
    ('book domain', 'over', data_are_few, '5e-4 1e-3'),
    ('book', 'under', few, '1e-3 2e-3'), ('domain', 'under', few, '4e-3 8e-3')]
base_rest = [('book', 'matched', f'{kept};{others}', '1e-3 2e-3'), ('book', 'matched', 'rsLoRA', '2.5e-4 5e-4'), ('book', 'matched', 'AdaLoRA', '4e-3 8e-3')]
pico_core = [
    ('book', 'matched', f'{short};{drawn};{top};shrink to top, 0.6;{kept};depth, blind;shrink to depth, 1/4;shrink to top, 1/4', '1e-3 2e-3 4e-3'),
    ('domain', 'matched', f'{short};{drawn};{top};static top;static spread', '5e-4 1e-3 2e-3'),
    ('choice', 'matched', f'LoRA;LoRA, 0.6 of the steps;{drawn};{top}', '1e-3 2e-3 4e-3')]
pico_more = [('book', 'over', data_are_few, '5e-4 1e-3'), ('book', 'under', few, '2e-3 4e-3'), ('domain', 'under', few, '2.5e-4 5e-4 1e-3')]
pico_rest = [
    ('book', 'matched', others, '2e-3 4e-3'), ('book', 'matched', 'rsLoRA', '5e-4 1e-3'), ('book', 'matched', 'AdaLoRA', '8e-3 1.6e-2'),
    ('book', 'matched', ';'.join(f'importance with {k}={v}' for k,v in ablations), '4e-3'), ('book', 'matched', ideas, '2e-3')]
alone = [('book', 'under', 'LoRA;LoRA, levers;LoRA, checkpointing;LoRA, half the activations;RST;shrink to depth;shrink to depth, levers;shrink to top;shrink to top, levers;shrink to top, half the activations', '1e-3')]
def with_seeds(groups, n): return [dict(zip(('tasks', 'regimes', 'only', 'rates', 'seeds'), (*o, n))) for o in groups]
plans = dict(base=[o for groups,n in ((base_core+base_more, 1), (base_core, 3), (base_more, 3), (base_rest, 3), (base_core, 5), (base_more[2:4], 5)) for o in with_seeds(groups, n)],
             pico=[o for groups,n in ((pico_core, 3), (pico_more, 3), (pico_core, 5), (pico_rest, 3)) for o in with_seeds(groups, n)],
             alone=with_seeds(alone, 2))

@call_parse
def main(
    data:Path,            # Folder with `textbooks`, `textbooks_research` and `commonsense`
    scale:str='',         # smoke, pico or base; base if there is a GPU
    base:Path=Path(tempfile.gettempdir())/'ist_quality_base', # Where the pretrained base is, or goes
    model:str='',         # In its place a model of the hub, or a folder; at the scale base, with the type of its own weights
    minutes:float=2.5,    # Of pretraining
    plan:str='',          # Runs to make, a name in `plans`; that of the scale if empty
    tasks:str='',         # In place of a plan: which of book, domain and choice; all if empty
    regimes:str='',       # Which of under, matched and over; all if empty
    only:str='',          # Contenders separated by semicolons; all if empty
    rates:str='1e-3 2e-3 4e-3', # Learning rates, each tried with the first seed
    seeds:int=5,          # Seeds
    workers:int=2,        # Processes side by side, spread over the GPUs
    seconds:float=1e9,    # Begin no run after so many seconds
    out:Path=None,        # Where the numbers go; what is there is kept and not run again
):
    if plan and plan not in plans: sys.exit(f"plan={plan!r} is unknown. Allowed: {', '.join(plans)}.")
    mp.set_start_method('spawn')
    gpu = torch.cuda.is_available()
    scale,deadline = scale or ('base' if gpu or model else 'pico'),time.time()+seconds
    out = out or here/'results'/f"quality_{model.rstrip('/').split('/')[-1] or (plan if plan not in scales else '') or scale}.json"
    old = json.loads(out.read_text()) if out.exists() else {}
    runs,failed = old.get('runs', []),[]
    made = old.get('base')
    if model: made = dict(model=model)
    elif scale=='base' and not (base/'config.json').exists():
        made = pretrain(data, base, minutes)
        (base/'made.json').write_text(json.dumps(made))
    elif scale=='base' and (base/'made.json').exists(): made = json.loads((base/'made.json').read_text())
    args = dict(scale=scale, data=str(data), base=model or (str(base) if scale=='base' else ''), device='cuda' if gpu else 'cpu', dtype='auto' if model else torch.bfloat16 if scale=='base' else torch.float32)
    groups = plans[plan or scale] if (plan or scale) in plans and not (model or tasks or regimes or only) else [dict(tasks=tasks or 'book domain choice', regimes=regimes or 'under matched over', only=only, rates=rates, seeds=seeds)]
    ended = set()
    start = time.perf_counter()
    this = dict(command=typed('quality').replace(str(data), 'DATA'), hardware=f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {workers} runs side by side' if gpu else f'{platform.machine()} CPU, one thread a run, seconds of the processor',
                versions={'python':platform.python_version()} | {o:version(o) for o in ('torch', 'transformers', 'peft')})
    calls = old.get('calls', [])   # runs add up, and each knows the call that made it
    if this not in calls: calls = [*calls, this]
    def save():
        order = {k:i for i,k in enumerate(contenders)}
        runs.sort(key=lambda r: (kinds.index(r['task']), r['regime'], order[r['method']], r['lr'], r['seed']))
        head = dict(calls=calls, settings={k:(list(v) if isinstance(v, tuple) else v) for k,v in scales[scale].items()}, base=made, books=books[scale])
        out.write_text(json.dumps(head | dict(runs=runs), indent=None, separators=(',', ':')).replace('{"method"', '\n{"method"')+'\n')
    def keep(r):
        ended.add(tuple(r['job']) if 'job' in r else (r['method'], r['task'], r['regime'], r['lr'], r['seed']))
        if 'error' in r: failed.append(r); print('FAILED', r, flush=True); return
        runs.append(r | dict(call=calls.index(this))); save()
        print(f"[{time.perf_counter()-start:.0f} s] {r['task']} {r['regime']} {r['method']} lr {r['lr']:g} seed {r['seed']}: {r['test']:.4f} (best {r['stopped']['test']:.4f} at {r['stopped']['step']}) in {r['seconds']:.1f} s, depth {r['depth']:.2f}, scores {r['share']:.1%}", flush=True)
    parallel(planner(groups, runs, ended), workers, args, deadline, keep)
    save()
    print(f'{len(runs)} runs, {len(failed)} failed -> {out}')
    if failed: sys.exit(1)
