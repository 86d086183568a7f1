"""No lever may cost quality unseen: held-out loss of pico on a physics book after the same steps on the same rows, for LoRA, RST,
importance and depth-aware sampling, with folded adapters and with 8-bit products. Learning rates are chosen per method on the first
seed (out of `rates`), the other seeds only see the best. `python benchmarks/levers_quality.py physics.jsonl.gz`"""
import gzip,json,os,platform,statistics,sys,time
from importlib.metadata import version
from pathlib import Path
import torch, torch.multiprocessing as mp
from fastcore.script import call_parse
from peft import LoraConfig,get_peft_model
from transformers import AutoModelForCausalLM,AutoTokenizer
from ist_nb import IST,ISTConfig,find_layers
from ist_nb.evaluate import held_out_loss
from ist_nb.finetune import assets
from ist_nb.speed import fold,to_fp8
from speed import typed

cheap = dict(score_batch_size=4, score_interval=20)
methods = {   # name: settings of IST (None: all layers), levers
    'LoRA':(None, ''), 'RST':(dict(sampler='uniform'), ''), 'importance':(dict(sampler='importance') | cheap, ''),
    'depth':(dict(sampler='depth') | cheap, ''), 'depth, 0.45':(dict(sampler='depth', depth=0.45) | cheap, ''),
    'depth, 3/8 active':(dict(sampler='depth', n_active=0.375) | cheap, ''),
    'depth, fold':(dict(sampler='depth') | cheap, 'fold'), 'depth, fold+fp8':(dict(sampler='depth') | cheap, 'fold fp8')}
rates = [2e-3, 4e-3]

def rows(path, length):
    "Training and held-out rows of a book, each of the same length: every twelfth module is held out"
    tok = AutoTokenizer.from_pretrained(str(assets/'pico'))
    texts = [json.loads(o)['text'] for o in gzip.open(path, 'rt')]
    def cut(texts):
        ids = torch.tensor([t for o in texts for t in tok(o+'\n').input_ids])
        return ids[:len(ids)//length*length].view(-1, length)
    return cut([t for i,t in enumerate(texts) if i%12!=5]),cut([t for i,t in enumerate(texts) if i%12==5])

def run(method, lr, seed, steps, batch, data, device):
    settings,levers = methods[method]
    train,test = [o.to(device) for o in data]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(str(assets/'pico'), dtype=torch.float32).to(device)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules='all-linear', task_type='CAUSAL_LM')).train()
    if 'fold' in levers: fold(model)
    if 'fp8' in levers: to_fp8(model, find_layers(model), **({} if device=='cuda' else dict(emulate=True)))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.)
    warm = max(1, steps//12)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min((t+1)/warm, max(0., (steps-t)/(steps-warm))))
    order = torch.cat([torch.randperm(len(train), generator=torch.Generator().manual_seed(1000*seed+e)) for e in range(steps*batch//len(train)+1)])
    probe = torch.utils.data.DataLoader([dict(input_ids=o, labels=o) for o in train], batch_size=batch)
    config = ISTConfig(n_active=1.0, sampler='uniform') if settings is None else ISTConfig(**(settings | dict(seed=seed)))
    ist,depth = IST(model, config, probe=probe),[]
    for t in range(steps):
        ids = train[order[t*batch:][:batch]]
        with ist.step():
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.)
            opt.step(); sched.step(); opt.zero_grad()
        depth.append(1-int(ist.active[0])/len(ist.layers))
    loss = held_out_loss(model, [dict(input_ids=o, labels=o) for o in test.split(32)])
    return dict(method=method, lr=lr, seed=seed, loss=loss, depth=statistics.mean(depth), active=float(ist.times_active.sum()/steps))

def work(jobs, done, args):
    torch.set_num_threads(1)
    data = rows(args['data'], args['length'])
    while (job := jobs.get()) is not None: done.put(run(*job, args['steps'], args['batch'], data, args['device']))

def parallel(jobs, workers, args):
    "Results of `jobs`, from processes side by side"
    todo,done = mp.Queue(),mp.Queue()
    for j in [*jobs, *[None]*workers]: todo.put(j)
    procs = [mp.Process(target=work, args=(todo, done, args)) for _ in range(workers)]
    for p in procs: p.start()
    res = []
    for _ in jobs:
        res.append(done.get())
        print(res[-1], flush=True)
    for p in procs: p.join()
    return res

@call_parse
def main(
    data:Path,       # The book: textbooks/physics.jsonl.gz
    steps:int=200,   # Optimizer steps
    batch:int=8,     # Rows in a batch
    length:int=128,  # Tokens in a row
    seeds:int=5,     # Seeds
    workers:int=1,   # Processes side by side
    only:str='',     # Methods separated by semicolons; all if empty
    out:Path=Path(__file__).parent/'results'/'levers_quality.json', # Where the numbers go
):
    mp.set_start_method('spawn')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    args = dict(data=str(data), steps=steps, batch=batch, length=length, device=device)
    names = [o.strip() for o in only.split(';') if o.strip()] or list(methods)
    start = time.perf_counter()
    first = parallel([(m, lr, 0) for m in names for lr in rates], workers, args)
    best = {m:min((r for r in first if r['method']==m), key=lambda r: r['loss'])['lr'] for m in names}
    rest = parallel([(m, best[m], s) for s in range(1, seeds) for m in names], workers, args)
    runs = sorted([*first, *rest], key=lambda r: (names.index(r['method']), r['lr'], r['seed']))
    out.write_text(json.dumps(dict(command=typed('levers_quality').replace(str(data), data.name), hardware=torch.cuda.get_device_name() if device=='cuda' else f'{platform.machine()} CPU, one thread a run',
        versions={'python':platform.python_version()} | {o:version(o) for o in ('torch','transformers','peft')}, steps=steps, batch=batch, length=length, best_lr=best, runs=runs, seconds=round(time.perf_counter()-start)), indent=1)+'\n')
    for m in names:
        mine = [r for r in runs if r['method']==m and r['lr']==best[m]]
        print(f"{m:20} lr {best[m]:g} depth {statistics.mean(r['depth'] for r in mine):.2f} held-out loss {statistics.mean(r['loss'] for r in mine):.4f} +- {statistics.stdev([r['loss'] for r in mine]) if len(mine)>1 else 0:.4f}")
