"""Does the sum of a layer's learning rates explain its loss? Runs in which every layer gets the same sum on average, in
different orders: frozen from below, frozen from above, drawn at random, and a shorter run of all layers. Beside them a
whole run of all layers, and as many layer updates at random. The whole run chooses the learning rate on seed 0, other
seeds judge. `--model` takes a causal language model of the hub, or a folder, and `--text` a file of texts."""
import gzip,json,statistics,time
from concurrent.futures import ProcessPoolExecutor,as_completed
from multiprocessing import get_context
from pathlib import Path
import torch
from scipy.stats import ttest_rel
from transformers import AutoTokenizer
from ist_nb import IST,ISTConfig
from ist_nb.config import samplers
from benchmarks import record
from benchmarks.small import lm_batch,physics,pico,pico_path,trainable

@samplers.register('from above', 'The lowest layers; with schedule="shrink" frozen from above', needs_importance=False)
def _(importance, n, config, generator): return torch.arange(n)

def shrunk(sampler): return dict(sampler=sampler, schedule='shrink')
arms = {'all layers':None, 'all layers, shorter':None, 'frozen from below':shrunk('top'),
        'frozen from above':shrunk('from above'), 'random, as many at each step':shrunk('uniform'),
        'random, as many layer updates':dict(sampler='uniform')}

def rows_of(text, model, length): # training rows and held-out rows
    if not text: return physics('train', length),physics('test', length)
    tok = AutoTokenizer.from_pretrained(model or pico_path)
    lines = gzip.open(text, 'rt') if text.endswith('.gz') else open(text)
    ids = torch.tensor([t for o in lines for t in tok(json.loads(o)['text']+'\n', verbose=False).input_ids])
    rows = ids[:len(ids)//length*length].view(-1, length)
    return rows[:len(rows)*9//10],rows[len(rows)*9//10:]

def run(arm, lr, seed, model, text, steps, batch, length, share, held=64):
    "One run with linear decay: its losses, and the sum of each layer's rates as a share of what all layers get"
    torch.set_num_threads(1)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    amp = torch.autocast(device, torch.bfloat16, enabled=device=='cuda')
    train,test = rows_of(text, model, length)
    net = pico(16, 32, 0.05, seed, **(dict(path=model) if model else {})).to(device).train()
    N = net.config.num_hidden_layers
    n = int(share*N)
    whole = sum(1-t/steps for t in range(steps))
    if arm=='all layers, shorter': steps = round(steps*2*n/(N+n))
    config = ISTConfig(**(arms[arm] or dict(sampler='uniform')), n_active=n if arms[arm] else N, seed=seed)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    order = order.repeat(-(-steps*batch//len(order)))[:steps*batch].view(steps, batch)
    ist,opt = IST(net, config, n_steps=steps),torch.optim.AdamW(trainable(net), lr=lr, weight_decay=0.)
    mass = torch.zeros(N)
    def loss():
        net.eval()
        with torch.no_grad(), amp: ls = [net(**lm_batch(b.to(device))).loss.item() for b in test[:held].split(8)]
        net.train()
        return statistics.mean(ls)
    before,start = loss(),time.perf_counter()
    for t,ix in enumerate(order):
        opt.param_groups[0]['lr'] = lr*(1-t/steps)
        with ist.step():
            with amp: l = net(**lm_batch(train[ix].to(device))).loss
            l.backward()
            torch.nn.utils.clip_grad_norm_(trainable(net), 1.)
            opt.step(); opt.zero_grad()
        mass[ist.active] += 1-t/steps
    seconds = time.perf_counter()-start
    shares = [round(o, 4) for o in (mass/whole).tolist()]
    return dict(arm=arm, lr=lr, seed=seed, steps=steps, layers=n, before=before, after=loss(),
                seconds=round(seconds, 1), updates=int(ist.times_active.sum()), mass=shares)

def compared(rows, arm, other='all layers, shorter'):
    "Mean difference in held-out loss over the seeds that judge, its standard error, and the p of a paired t-test"
    of = lambda a: {r['seed']:r['after'] for r in rows if r['arm']==a and r['seed']>0}
    a,b = of(arm),of(other)
    d = [a[s]-b[s] for s in sorted(a)]
    se = statistics.stdev(d)/len(d)**0.5
    return dict(arm=arm, minus=other, mean=statistics.mean(d), se=se,
                p=float(ttest_rel([a[s] for s in sorted(a)], [b[s] for s in sorted(a)]).pvalue))

def main(
    model:str='', # A causal language model of the hub, or a folder; the model that comes with the package if empty
    text:str='', # A file of JSON lines with a field `text`, perhaps gzipped; the package's physics text if empty
    rates:str='5e-4 1e-3 2e-3', # Learning rates to choose from
    seeds:int=8, # Seeds that judge
    steps:int=200, # Of a whole run
    batch:int=4, # Rows in a step
    length:int=128, # Tokens in a row
    share:float=0.4, # Layers trained at a step, on average
    workers:int=1, # Runs side by side
    out:Path=None, # Where the numbers go
):
    name = Path(model).name or 'pico'
    done = dict(model=model, text=text, steps=steps, batch=batch, length=length, share=share)
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        def make(jobs):
            rows = []
            for o in as_completed([pool.submit(run, *j, **done) for j in jobs]):
                rows.append(r := o.result())
                print(f"{r['arm']:32} {r['lr']:g} seed {r['seed']} {r['before']:.4f} -> {r['after']:.4f} in "
                      f"{r['seconds']} s, mass {statistics.mean(r['mass']):.3f}", flush=True)
            return rows
        tried = make([('all layers', float(lr), 0) for lr in rates.split()])
        lr = min(tried, key=lambda r: r['after'])['lr']
        rows = make([(arm, lr, s) for s in range(1, seeds+1) for arm in arms])
    rows.sort(key=lambda r: (list(arms).index(r['arm']), r['seed']))
    head = record.about('held-out loss of runs with equal sums of learning rates', 'scipy', 1,
                        torch.cuda.is_available(), **{k:v for k,v in (('MODEL', model), ('TEXT', text)) if v})
    found = [compared(rows, a) for a in arms if a!='all layers, shorter']
    record.save(out or f'mass_{name}', head, model=name, text=Path(text).name or 'physics', lr=lr, compared=found,
                tried=tried, rows=rows)
    for o in found: print(f"{o['arm']:32} minus {o['minus']}: {o['mean']:+.4f} +- {o['se']:.4f}, p {o['p']:.2g}")
