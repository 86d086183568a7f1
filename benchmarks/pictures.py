"""The runs behind the pictures of the page on plot: pico learns the physics text in four ways, several seeds of each, and what one run says of its layers.
Seconds are those of this process on the CPU (one thread), so that other work on the machine does not count; evaluation is not timed.
`python benchmarks/pictures.py` writes results/pictures.json"""
import json,platform,time
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from peft import LoraConfig,get_peft_model
from transformers import AutoModelForCausalLM,AutoTokenizer
from ist_nb import IST,ISTConfig
from ist_nb.evaluate import held_out_loss
from ist_nb.finetune import assets
from ist_nb.probe import model_loss,quietly
from ist_nb.scorers import Probe,suppression_curves
from speed import typed

methods = {'LoRA':dict(n_active=1.0, sampler='uniform'), 'RST':dict(sampler='uniform'), 'IST':dict(score_batch_size=4), 'IST, depth and fold':dict(sampler='depth', score_batch_size=4, fast='fold')}
factors = [0., 0.25, 0.5, 0.75, 1.]
length,batch,every = 64,8,10    # tokens in a row, rows in a step, steps between two evaluations

def rows(name):
    tok = AutoTokenizer.from_pretrained(str(assets/'pico'))
    text = ' '.join(json.loads(o)['text'] for o in (assets/'physics'/f'{name}.jsonl').read_text().splitlines())
    ids = torch.tensor(tok(text, verbose=False)['input_ids'])
    return ids[:len(ids)//length*length].view(-1, length)

def batches(x, size): return [dict(input_ids=o, labels=o) for o in x.split(size)]

def start(settings, seed, lr, train):
    "Model, IST and optimizer"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(str(assets/'pico'), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules='all-linear', task_type='CAUSAL_LM')).train()
    probe = torch.utils.data.DataLoader([dict(input_ids=o, labels=o) for o in train], batch_size=batch)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.)
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
    with quietly(model): curves = suppression_curves(Probe(model, ist.layers, dict(input_ids=test, labels=test), model_loss, 0.25), factors)
    return dict(state=ist.state_dict(), losses=losses, factors=factors, curves=curves.tolist(), left_out=(curves[:, 0]-curves[:, -1]).tolist())

def memory(lr, train, budget, steps=60):
    "What each block keeps at each step within an activation budget"
    model,ist,opt = start(dict(score_batch_size=4, activation_budget=budget), 0, lr, train)
    kept,twice,peak = [],[],[]
    for _ in steps_of(model, ist, opt, train, 0, steps):
        a = ist.activations
        kept.append(a.kept(ist.active.tolist())); twice.append(list(a.checkpointed)); peak.append(a.expected)
    return dict(kept=kept, twice=twice, peak=peak, budget=ist.activations.budget)

@call_parse
def main(
    steps:int=100,   # Optimizer steps of the curves
    seeds:int=3,     # Seeds of each method
    lr:float=3e-3,   # Learning rate
    budget:str='56MiB', # For the picture of memory
    only:str='',     # One part: portrait, memory or curves; the others stay as they are
    out:Path=Path(__file__).parent/'results'/'pictures.json', # Where the numbers go
):
    torch.set_num_threads(1)
    train,test = rows('train'),rows('test')[:64]
    parts = dict(portrait=lambda: portrait(lr, train, test, 2*steps), memory=lambda: memory(lr, train, budget),
                 curves=lambda: [curve(m, s, lr, train, batches(test, 32), steps) for s in range(seeds) for m in methods])
    old = json.loads(out.read_text()) if only else {}
    res = {k:f() if only in ('', k) else old[k] for k,f in parts.items()}
    about = dict(what='Runs of pico on the physics text, for the pictures of the page on plot; seconds are those of the process, without evaluation', command=typed('pictures').split(' --only')[0],
        model=f'pico, 16 layers, LoRA r=8 on all linear layers, {batch} rows of {length} tokens a step, AdamW {lr:g}', hardware=f'{platform.machine()} CPU, one thread',
        versions={'python':platform.python_version()} | {o:version(o) for o in ('torch','transformers','peft')})
    def short(o): return float(f'{o:.6g}') if isinstance(o, float) else {k:short(v) for k,v in o.items()} if isinstance(o, dict) else [short(v) for v in o] if isinstance(o, list) else o
    out.write_text(json.dumps(about | short(res))+'\n')
    print(f"portrait: loss {res['portrait']['losses'][0]:.2f} -> {res['portrait']['losses'][-1]:.2f}; kept at most {max(map(sum, res['memory']['kept']))/2**20:.1f} MiB")
