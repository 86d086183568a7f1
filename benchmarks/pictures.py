"""The runs behind the pictures of the page on plots: pico learns the physics text in four ways, several seeds of each.
Seconds are those of this process on one CPU thread, so that other work does not count; evaluation is not timed."""
import time
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from ist_nb import IST,ISTConfig
from ist_nb.evaluate import held_out_loss
from ist_nb.probe import model_loss,quietly
from ist_nb.scorers import Probe
from benchmarks import record
from benchmarks.small import lm_batch,physics,pico,trainable

methods = {'LoRA':dict(n_active=1.0, sampler='uniform'), 'RST':dict(sampler='uniform'), 'IST':dict(score_batch_size=4),
           'IST, depth and fold':dict(sampler='depth', score_batch_size=4, fast='fold')}
factors = [0., 0.25, 0.5, 0.75, 1.]
length,batch,every = 64,8,10    # tokens in a row, rows in a step, steps between two evaluations

def start(settings, seed, lr, train):
    "Model, IST and optimizer"
    model = pico(seed=seed).train()
    probe = DataLoader([lm_batch(o) for o in train], batch_size=batch)
    opt = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.)
    return model,IST(model, ISTConfig(**settings, seed=seed), probe=probe),opt

def steps_of(model, ist, opt, train, seed, steps):
    "Train, one step at a time: loss"
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = train[torch.randint(len(train), (batch,), generator=g)]
        with ist.step():
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward(); opt.step(); opt.zero_grad()
        yield loss.item()

def curve(method, seed, lr, train, test, steps):
    "Held-out loss against seconds of one run"
    model,ist,opt = start(methods[method], seed, lr, train)
    spent,at = 0.,[(0., held_out_loss(model, test))]
    began = time.process_time()
    for t,_ in enumerate(steps_of(model, ist, opt, train, seed, steps)):
        if (t+1)%every: continue
        spent += time.process_time()-began
        at.append((round(spent, 3), held_out_loss(model, test)))
        began = time.process_time()
    print(f'{method:20} seed {seed}: {at[-1][1]:.4f} after {spent:.1f} s', flush=True)
    return dict(method=method, seed=seed, seconds=[s for s,_ in at], losses=[l for _,l in at])

def portrait(lr, train, test, steps):
    "What one run of IST says of its layers: its state, suppression curves, the loss with each layer left out"
    model,ist,opt = start(dict(score_interval=5), 0, lr, train)
    losses = list(steps_of(model, ist, opt, train, 0, steps))
    def loss_without(i, factor): return Probe(model, ist.layers, lm_batch(test), model_loss, factor).loss([i])
    with quietly(model):
        curves = torch.tensor([[loss_without(i, f) for f in factors] for i in range(len(ist.layers))],
                              dtype=torch.float64)   # [N, F]
    return dict(state=ist.state_dict(), losses=losses, factors=factors, curves=curves.tolist(),
                left_out=(curves[:, 0]-curves[:, -1]).tolist())

def short(o):
    "Six digits of every number"
    if isinstance(o, float): return float(f'{o:.6g}')
    if isinstance(o, dict): return {k:short(v) for k,v in o.items()}
    return [short(v) for v in o] if isinstance(o, list) else o

def main(
    steps:int=100,   # Optimizer steps of the curves
    seeds:int=3,     # Seeds of each method
    lr:float=3e-3,   # Learning rate
    only:str='',     # One part: portrait or curves; the other stays as it is
    out:Path='pictures', # Where the numbers go
):
    torch.set_num_threads(1)
    train,test = physics('train', length),physics('test', length)[:64]
    batches = [lm_batch(o) for o in test.split(32)]
    parts = dict(portrait=lambda: portrait(lr, train, test, 2*steps),
                 curves=lambda: [curve(m, s, lr, train, batches, steps) for s in range(seeds) for m in methods])
    old = record.read('pictures') if only else {}
    found = {k:f() if only in ('', k) else old[k] for k,f in parts.items()}
    what = ('Runs of pico on the physics text, for the pictures of the page on plots; seconds are those of the '
            'process, without evaluation')
    model = f'pico, 16 layers, LoRA r=8 on all linear layers, {batch} rows of {length} tokens a step, AdamW {lr:g}'
    print(record.save(out, record.about(what, threads=1), indent=None, model=model, **short(found)))
