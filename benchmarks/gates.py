"""Are a task's loss and the divergence from the model before quadratic in the gates of the layers? An adapter is tuned;
gradient and Hessian in one gate a layer are measured at the trained adapter, on rows that it was not trained on; the
gates that are best for that quadratic (free, one number, a line over depth) are set and measured, and so are the best
that gradient descent finds. Then layers are switched off one by one. `--model` takes a causal language model of the
hub, or a folder, and `--text` a file of texts."""
from pathlib import Path
import torch
from transformers import AutoTokenizer
from ist_nb.keep import _divergence,_gate_gradient,_gated,_set_gates,own_text
from ist_nb.probe import quietly
from ist_nb.theory import best_gates
from benchmarks import record
from benchmarks.mass import rows_of
from benchmarks.small import lm_batch,pico,pico_path,trainable

class Measured:
    "What is forgotten and the task's loss as functions of one gate a layer, on rows that never change"
    def __init__(self, model, kept, task, at_once=4):
        self.model,self.gated,self.at_once = model,_gated(model),at_once
        self.kept,self.task = kept,task
        blocks = sorted({self.block(k) for k in self.gated})
        self.at = torch.tensor([blocks.index(self.block(k)) for k in self.gated])     # the layer of each module
        self.N = len(blocks)
    def block(self, name): return int(next(o for o in name.split('.') if o.isdigit()))
    def __call__(self, gates):
        "Divergence and loss, in nats a token, and their gradients in the gates"
        _set_gates(self.gated, gates[self.at].float())
        found = []
        with quietly(self.model, grad=True):
            for f,rows in ((self.divergence, self.kept), (self.loss, self.task)):
                self.model.zero_grad()
                total = 0.
                for b in rows:
                    part = f(b)/len(rows)
                    part.backward()
                    total += part.item()
                slope = torch.zeros(self.N, dtype=torch.double)
                found.append((total, slope.index_add(0, self.at, _gate_gradient(self.gated).double())))
        self.model.zero_grad()
        _set_gates(self.gated, torch.ones(len(self.at)))
        return found
    def divergence(self, b):
        total,n = _divergence(self.model, b)
        return total/n
    def loss(self, b): return self.model(**b).loss
    def hessians(self, h=0.05):
        "Of both in the gates where all are 1, by central differences of the gradients"
        def column(i):
            e = h*torch.eye(self.N)[i]
            return [(a-b)/(2*h) for (_,a),(_,b) in zip(self(torch.ones(self.N)+e), self(torch.ones(self.N)-e))]
        H = [torch.stack(o) for o in zip(*map(column, range(self.N)))]
        return [(o+o.T)/2 for o in H]

def descended(f, price, steps, rate=0.05):
    "The best gates in [0, 1] that Adam finds for what was measured"
    gates = torch.nn.Parameter(torch.ones(f.N))
    opt,best = torch.optim.Adam([gates], lr=rate),(float('inf'), None)
    for _ in range(steps):
        (K,a),(T,b) = f(gates.data)
        if K+price*T<best[0]: best = K+price*T,gates.data.clone()
        gates.grad = (a+price*b).float()
        opt.step()
        with torch.no_grad(): gates.clamp_(0, 1)
    return best[1]

def main(
    model:str='', # A causal language model of the hub, or a folder; the model that comes with the package if empty
    text:str='', # A file of JSON lines with a field `text`, perhaps gzipped; the package's physics text if empty
    lr:float=2e-3, # Learning rate, falling to zero
    steps:int=200, # Of tuning
    batch:int=4, # Rows in a step
    length:int=128, # Tokens in a row
    rows:int=32, # Rows of the task, and of the model's own text, that measure
    prices:str='1 2 4 8', # Nats of divergence that a nat of the task's loss is worth
    descent:int=40, # Steps of the search for the best gates
    out:Path=None, # Where the numbers go
):
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = Path(out).stem.removeprefix('gates_') if out else Path(model).name or 'pico'
    train,test = (o.to(device) for o in rows_of(text, model, length))
    net = pico(16, 32, 0., 0, **(dict(path=model) if model else {})).to(device).train()
    kept = own_text(net, AutoTokenizer.from_pretrained(model or pico_path), rows, length)
    order = torch.randint(len(train), (steps, batch), generator=torch.Generator().manual_seed(0))
    opt = torch.optim.AdamW(trainable(net), lr=lr, weight_decay=0.)
    for t,ix in enumerate(order):
        opt.param_groups[0]['lr'] = lr*(1-t/steps)
        net(**lm_batch(train[ix.to(device)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(net), 1.)
        opt.step(); opt.zero_grad()
    f = Measured(net, [{k:v[ix].to(device) for k,v in kept.items()} for ix in torch.arange(rows).split(4)],
                 [lm_batch(o) for o in test[:rows].split(4)])
    ones = torch.ones(f.N)
    (K,a),(T,b) = f(ones)
    A,B = f.hessians()
    (_,_),(before,_) = f(0*ones)
    print(f'divergence {K:.4f}, task {before:.4f} -> {T:.4f}', flush=True)
    one = torch.ones(f.N, 1, dtype=torch.double)
    depth = torch.linspace(0, 1, f.N, dtype=torch.double)[:, None]
    spans = dict(free=None, number=one, line=torch.cat([one, depth], 1))
    table = []
    for price in map(float, prices.split()):
        c,H = a+price*b,A+price*B
        least = torch.linalg.eigvalsh(H).min().item()
        for k,U in spans.items():
            gates,gain = best_gates(c, H, U)
            x = gates.clamp(0, 1)
            (k1,_),(t1,_) = f(x)
            said = -(c@(x-1)+(x-1)@H@(x-1)/2).item()
            table.append(dict(price=price, gates=k, least=least, predicted=said, unclamped=gain.item(),
                              measured=K+price*T-k1-price*t1, divergence=k1, task=t1, values=x.tolist()))
        x = descended(f, price, descent)
        (k1,_),(t1,_) = f(x)
        said = -(c@(x.double()-1)+(x.double()-1)@H@(x.double()-1)/2).item()
        table.append(dict(price=price, gates='found by descent', predicted=said, measured=K+price*T-k1-price*t1,
                          divergence=k1, task=t1, values=x.tolist()))
        for o in table[-4:]: print({k:v for k,v in o.items() if k!='values'}, flush=True)
    singles = [f(ones-torch.eye(f.N)[i]) for i in range(f.N)]
    off = dict(divergence=[K-k1 for (k1,_),_ in singles], task=[t1-T for _,(t1,_) in singles])   # given back, and cost
    alone = dict(divergence=sum(off['divergence'])/K, task=sum(off['task'])/(before-T),
                 formula=[(2-A.trace()/A.sum()).item(), (B.trace()/B.sum()).item()])
    print(alone)
    head = record.about('losses as functions of one gate a layer', '', 1, device=='cuda',
                        **{k:v for k,v in (('MODEL', model), ('TEXT', text)) if v})
    record.save(out or f'gates_{name}', head, model=name, text=Path(text).name or 'physics', layers=f.N,
                divergence=K, task=T, before=before, singles=off, alone=alone, table=table)
