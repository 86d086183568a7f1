"""How much could the best choice of layers gain over chance, and how smooth is the loss for few layers? The squared
gradient of each layer's adapter, free of noise, and the largest curvature of all layers and of random quarters, on the
way of a run. `--model` takes a causal language model of the hub, or a folder, and `--text` a file of texts."""
import statistics
from pathlib import Path
import numpy as np, torch
from scipy.sparse.linalg import LinearOperator,eigsh
from ist_nb import find_layers
from ist_nb.theory import ceiling
from benchmarks import record
from benchmarks.mass import rows_of
from benchmarks.small import lm_batch,pico,trainable

def flat(grads): return torch.cat([g.reshape(-1) for g in grads])

def squared_gradients(net, layers, halves):
    "Of each layer, without bias: the product of the gradients of two halves of the rows, which share no noise"
    def gradient(rows):
        net.zero_grad()
        for b in rows.split(8): (net(**lm_batch(b)).loss*len(b)/len(rows)).backward()
        return [flat([p.grad for p in o.params]).double() for o in layers]
    res = torch.stack([a@b for a,b in zip(*map(gradient, halves))]).cpu()
    net.zero_grad()
    return res

def curvature(net, params, rows, digits=2e-2):
    "The largest eigenvalue of the Hessian in `params`"
    size = sum(p.numel() for p in params)
    def product(v):
        parts = torch.tensor(v.ravel(), dtype=torch.float32, device=rows.device).split([p.numel() for p in params])
        total = 0.
        for b in rows.split(8):
            slope = torch.autograd.grad(net(**lm_batch(b)).loss*len(b)/len(rows), params, create_graph=True)
            along = sum((g*d.view_as(g)).sum() for g,d in zip(slope, parts))
            total = total+flat(torch.autograd.grad(along, params)).double()
        return total.cpu().numpy()
    start = np.random.default_rng(0).standard_normal(size)
    return float(eigsh(LinearOperator((size, size), matvec=product, dtype=np.float64), k=1, which='LA', v0=start,
                       tol=digits, ncv=8, return_eigenvectors=False)[0])

def main(
    model:str='', # A causal language model of the hub, or a folder; the model that comes with the package if empty
    text:str='', # A file of JSON lines with a field `text`, perhaps gzipped; the package's physics text if empty
    at:str='0 20 80', # Steps at which to measure
    lr:float=1e-3, # Learning rate, constant
    batch:int=4, # Rows in a step
    length:int=128, # Tokens in a row
    rows:int=128, # Rows that gradients are measured on
    curved:int=16, # Rows that curvature is measured on; 0: do not measure it
    sets:int=3, # Random quarters
    out:Path=None, # Where the numbers go
):
    torch.manual_seed(0)
    device,name = 'cuda' if torch.cuda.is_available() else 'cpu',Path(model).name or 'pico'
    data = rows_of(text, model, length)[0].to(device)
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).to(device)]
    net = pico(16, 32, 0., 0, **(dict(path=model) if model else {})).to(device).train()
    net.set_attn_implementation('eager')     # the others have no second derivative
    layers,steps = find_layers(net),[int(o) for o in at.split()]
    N = len(layers)
    n,held,train = N//4,data[:rows],data[rows:]
    opt,found = torch.optim.AdamW(trainable(net), lr=lr, weight_decay=0.),[]
    quarters = [torch.randperm(N, generator=torch.Generator().manual_seed(s))[:n].tolist() for s in range(sets)]
    for t in range(max(steps)+1):
        if t in steps:
            G = squared_gradients(net, layers, held.chunk(2))
            few = held[:curved]
            found.append(r := dict(step=t, grad2=G.tolist(), ceiling=float(ceiling(G, n)), loss=float('nan')))
            with torch.no_grad(): r['loss'] = statistics.mean(net(**lm_batch(b)).loss.item() for b in held.split(8))
            if curved:
                r['all'] = curvature(net, trainable(net), few)
                r['quarters'] = [curvature(net, [p for i in S for p in layers[i].params], few) for S in quarters]
            print({k:v for k,v in r.items() if k!='grad2'}, flush=True)
        if t==max(steps): break
        ix = torch.arange(t*batch, (t+1)*batch)%len(train)
        net(**lm_batch(train[ix.to(device)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(net), 1.)
        opt.step(); opt.zero_grad()
    head = record.about('squared gradients and curvatures of the layers', 'scipy', 1, device=='cuda',
                        **{k:v for k,v in (('MODEL', model), ('TEXT', text)) if v})
    record.save(out or f'ceiling_{name}', head, model=name, text=Path(text).name or 'physics', layers=N, n=n,
                quarters=quarters, rows=found)
