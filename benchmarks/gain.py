"""Is a layer that hurts when it is left out also one that helps when it is trained?
pico learns the physics text with layers drawn uniformly. At several points of the run each layer is left out, and, from
the same point, each layer is trained alone for a few steps; held-out rows judge both. Importance of several scorers,
which watch the run without influence on it, is ranked against both."""
import statistics,warnings
from pathlib import Path
import torch
from ist_nb import IST,ISTConfig
from ist_nb.suppression import suppress
import benchmarks.quality   # registers the gradient's norm and the change of weights as scorers
from benchmarks import record
from benchmarks.fidelity import Watched,batch,length,losses_of,setting,watched_steps
from benchmarks.small import rank_correlation,trainable

watched = {'suppression':dict(scorer='suppression', score_batch_size=16, score_interval=10),
           'gate':dict(scorer='gate', score_batch_size=8, score_interval=20),
           'fisher':dict(scorer='fisher', score_interval=10),
           'gradient norm':dict(scorer='gradient norm', score_batch_size=8, score_interval=20),
           'weight change':dict(scorer='weight change', score_interval=20)}

def harm(model, layers, held):
    "Rise of the held-out loss when each layer's adapter is left out [N]"
    base = losses_of(model, held).mean().item()
    res = []
    for i in range(len(layers)):
        with suppress(layers, [i], 0.): res.append(losses_of(model, held).mean().item()-base)
    return res

def gain(model, layers, held, batches, lr):
    "Fall of the held-out loss when each layer's adapter alone is trained on `batches`, from the same point [N]"
    base,res = losses_of(model, held).mean().item(),[]
    for layer in layers:
        kept = [p.detach().clone() for p in layer.params]
        for o in layers:
            for p in o.params: p.requires_grad_(o is layer)
        opt = torch.optim.AdamW(layer.params, lr=lr, weight_decay=0.)
        for b in batches:
            model(**b).loss.backward()
            opt.step(); opt.zero_grad()
        res.append(base-losses_of(model, held).mean().item())
        with torch.no_grad():
            for p,o in zip(layer.params, kept): p.copy_(o)
    for o in layers:
        for p in o.params: p.requires_grad_(True)
    return res

def one_run(seed, at, n_held, alone, lr):
    held,loader,_,model = setting(seed, n_held)
    ist = IST(model, ISTConfig.rst(seed=seed))
    others = {k:Watched(model, v, loader, seed) for k,v in watched.items()}
    points = []
    for _ in watched_steps(model, loader, ist, others.values(), at[-1], trainable):
        if ist.t not in at: continue
        batches = [{k:v[:batch//2] for k,v in o.items()} for _,o in zip(range(alone), loader)]
        h,g = harm(model, ist.layers, held),gain(model, ist.layers, held, batches, lr)
        def judged(I): return dict(harm=rank_correlation(I, h), gain=rank_correlation(I, g), importance=I.tolist())
        points.append(dict(step=ist.t, harm=h, gain=g, harm_gain=rank_correlation(h, g),
                           scorers={k:judged(w.ist.importance) for k,w in others.items()}))
        print(f"seed {seed} step {ist.t}: harm and gain {points[-1]['harm_gain']:+.2f}", flush=True)
    return dict(seed=seed, points=points)

def main(
    seeds:str='10 11 12', # Seeds of the runs
    at:str='20 60 120', # Steps at which layers are left out and trained alone
    held:int=128,  # Rows that judge
    alone:int=10,  # Steps of each layer by itself
    lr:float=1e-3, # And their learning rate
    out:Path='gain', # Where the numbers go
):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    at = sorted(map(int, at.split()))
    runs = [one_run(seed, at, held, alone, lr) for seed in map(int, seeds.split())]
    mean = lambda f: statistics.mean(f(p) for r in runs for p in r['points'])
    table = dict(harm_gain=mean(lambda p: p['harm_gain']))
    for k in watched: table[k] = {o:mean(lambda p: p['scorers'][k][o]) for o in ('harm', 'gain')}
    what = ('Spearman correlation over the 16 layers: between the harm of leaving a layer out and the gain of training '
            'it alone, and of importance with both')
    record.save(out, record.about(what, threads=1), indent=None, at=at, held_out_rows=held, steps_alone=alone,
                learning_rate_alone=lr, rows_a_step=batch, tokens_a_row=length, settings=watched, table=table,
                runs=runs)
    print(table)
