"""How well each scorer's importance agrees with leaving one layer out, and what it costs.
pico learns the physics text with layers drawn uniformly, so that scoring does not influence training and all scorers can watch the same run. At the end the adapters
of each layer are damped, one layer at a time, on rows that no step and no probe has seen. Both on the CPU with one thread.
`python benchmarks/fidelity.py` writes results/fidelity.json"""
import json,platform,statistics,time,warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
import torch, torch.multiprocessing as mp
from fastcore.script import call_parse
from peft import LoraConfig,get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM,AutoTokenizer
from ist_nb import IST,ISTConfig
from ist_nb.config import scorers
from ist_nb.finetune import assets
from ist_nb.probe import quietly
from ist_nb.scorers import ema_update,move_importance,sample_layers,standardize
from ist_nb.suppression import suppress
from speed import typed

length,batch = 64,16   # tokens in a row, rows in a step

@scorers.register('gate at 1', 'As gate, with the gates where the model is: the first-order score', gradients=True)
def _(importance, probe, config, generator):
    loss,gradient = probe.gates(1.)
    return ema_update(importance, -gradient),dict(losses=[loss])

@scorers.register('antithetic', 'As suppression, with each set of layers followed by its complement')
def _(importance, probe, config, generator):
    S = [sample_layers(torch.sigmoid(-importance), len(importance)//2, generator) for _ in range(config.n_candidates//2)]
    S = torch.stack([o if side else ~o for s in S for o in [torch.zeros(len(importance), dtype=torch.bool).index_fill(0, s, True)] for side in (True, False)])   # [K, N]
    losses = torch.tensor([probe.loss(o.nonzero().flatten().tolist()) for o in S], dtype=torch.float64)                                                     # [K]
    return move_importance(importance, S, standardize(losses), config.score_lr),dict(losses=losses.tolist())

def rivals():
    "Settings of each, by name"
    sets = [('suppression', k, r, i) for k,r,i in ((3, 16, 10), (3, 8, 10), (3, 4, 10), (2, 4, 10), (3, 2, 5), (3, 16, 40))]
    sets += [('paper', 3, 16, 10), ('paper', 3, 4, 10), ('antithetic', 2, 16, 10), ('antithetic', 2, 6, 10), ('antithetic', 4, 4, 10)]
    one = [('gate', r, i) for r,i in ((16, 5), (16, 10), (16, 20), (16, 40), (8, 10), (8, 20), (4, 5), (4, 10), (4, 20), (2, 5))] + [('gate at 1', 16, 10), ('gate at 1', 4, 10)]
    other = [dict(scorer=s, score_batch_size=8, score_interval=i, passes=2, probe='held out') for s,i in (('gate', 20), ('gate', 24), ('gate+fisher', 24))]   # rows that neither trains nor judges
    free = [('fisher', 10)]
    return ([dict(scorer=s, n_candidates=k, score_batch_size=r, score_interval=i, passes=k) for s,k,r,i in sets] +
            [dict(scorer=s, score_batch_size=r, score_interval=i, passes=2) for s,r,i in one] + [dict(scorer=s, score_interval=i, passes=0) for s,i in free] + other)

class Watched:
    "A scorer beside a run that it does not influence: the importance loop of `IST`, without its draws"
    def __init__(self, model, settings, loader, seed):
        self.settings,self.seconds = settings,0.
        kw = {k:v for k,v in settings.items() if k not in ('passes', 'probe')}
        self.ist = IST(model, ISTConfig(**kw, seed=seed), probe=loader)

    @contextmanager
    def step(self, active):
        "Around one step of the run; only what the tracker does is timed"
        w = self.ist.tracker
        if not w: yield; return
        with self.timed(): w.begin(active)
        see = type(w).see
        def timed_see(optimizer):
            with self.timed(): see(w, optimizer)
        w.see = timed_see
        yield
        with self.timed(): w.end()

    @contextmanager
    def timed(self):
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter()-start

    def after(self, t):
        self.ist.t = t
        if t%self.settings['score_interval']==0:
            with self.timed(): self.ist.score()

def rank(x):
    x = torch.as_tensor(x, dtype=torch.float64)
    return (x[:, None]>x).double().sum(1)+((x[:, None]==x).double().sum(1)-1)/2
def spearman(a, b): return torch.corrcoef(torch.stack([rank(a), rank(b)]))[0, 1].item()

def losses_of(model, rows):
    "The loss of each 16 of the held-out rows"
    with quietly(model): return torch.tensor([model(input_ids=o, labels=o).loss.item() for o in rows.split(16)], dtype=torch.float64)

def setting(seed, n_held, n_spare=0):
    "Held-out rows, a loader of the others, one of `n_spare` rows that neither has, and pico with LoRA"
    tokenizer = AutoTokenizer.from_pretrained(str(assets/'pico'))
    text = ' '.join(json.loads(o)['text'] for o in (assets/'physics'/'train.jsonl').read_text().splitlines())
    ids = torch.tensor(tokenizer(text, verbose=False)['input_ids']); rows = ids[:len(ids)//length*length].view(-1, length)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=g)
    held,spare,train = rows[order[:n_held]],rows[order[n_held:n_held+n_spare]],rows[order[n_held+n_spare:]]
    loader = DataLoader([dict(input_ids=o, labels=o) for o in train], batch_size=batch, shuffle=True, generator=g)
    spare = DataLoader([dict(input_ids=o, labels=o) for o in spare], batch_size=batch)
    torch.manual_seed(seed)
    return held,loader,spare,get_peft_model(AutoModelForCausalLM.from_pretrained(str(assets/'pico'), dtype=torch.float32), LoraConfig(r=8, lora_alpha=16, target_modules='all-linear', task_type='CAUSAL_LM'))

def one_run(seed, steps, n_held, todo):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    held,loader,spare,model = setting(seed, n_held, 256 if any('probe' in o for o in todo) else 0)
    ist = IST(model, ISTConfig.rst(seed=seed))
    watched = [Watched(model, o, spare if 'probe' in o else loader, seed) for o in todo]
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    seconds,losses = [],[]
    while ist.t<steps:
        for b in loader:
            if ist.t==steps: break
            ist.begin_step()
            steps_of = [w.step(ist.active.tolist()) for w in watched]
            for o in steps_of: o.__enter__()
            spent,start = sum(w.seconds for w in watched),time.perf_counter()
            loss = model(**b).loss; loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.); opt.step(); opt.zero_grad()
            seconds.append(time.perf_counter()-start-(sum(w.seconds for w in watched)-spent))
            for o in steps_of: o.__exit__(None, None, None)
            ist.end_step(); losses.append(loss.item())
            for w in watched: w.after(ist.t)
    start = time.perf_counter()
    base = losses_of(model, held)
    forward = (time.perf_counter()-start)/(n_held*length)                              # seconds a token
    change = {}
    for factor in (0.25, 0.):
        parts = []
        for i in range(len(ist.layers)):
            with suppress(ist.layers, [i], factor): parts.append(losses_of(model, held)-base)
        change[factor] = torch.stack(parts)                                            # [N, parts]
    truth = {f:o.mean(1) for f,o in change.items()}
    halves = {f:spearman(o[:, ::2].mean(1), o[:, 1::2].mean(1)) for f,o in change.items()}
    def direct(f, n):
        "How well leaving layers out on `n` of the rows agrees with all the others"
        parts = change[f].shape[1]
        some = [(torch.arange(parts)//(n//16)==i) for i in range(parts//(n//16))]
        return statistics.mean(spearman(change[f][:, o].mean(1), change[f][:, ~o].mean(1)) for o in some)
    step = sum(seconds)
    res = [dict(w.settings, spearman={str(f):spearman(w.ist.importance, o) for f,o in truth.items()}, share_of_training=w.seconds/step,
                forward_equivalents=w.settings['passes']*w.settings.get('score_batch_size', 0)/w.settings['score_interval']/batch,
                importance=w.ist.importance.tolist()) for w in watched]
    print(f'seed {seed} is done', flush=True)
    return dict(seed=seed, loss_first=losses[0], loss_last=statistics.mean(losses[-10:]), loss_held_out=base.mean().item(), seconds_a_step=step/steps, step_in_forward_equivalents=step/steps/(forward*batch*length),
                loss_change={str(f):o.tolist() for f,o in truth.items()}, split_half={str(f):o for f,o in halves.items()}, direct={n:{str(f):direct(f, n) for f in change} for n in (16, 32, 64)}, between_factors=spearman(truth[0.25], truth[0.]), scorers=res)

@call_parse
def main(
    seeds:str='10 11 12', # Seeds of the runs: of the base order of the rows, the adapters, the layers drawn and the candidates
    steps:int=120, # Steps of each run
    held:int=512,  # Rows on which layers are left out
    only:str='',   # Settings as scorer/rows/interval, separated by spaces, such as gate/8/20, or gate/8/20/held with a probe of rows that are held out too; all if empty
    workers:int=1, # Runs side by side, in processes
    out:Path=Path(__file__).parent/'results'/'fidelity.json', # Where the numbers go
):
    todo = [o for o in rivals() if not only and 'probe' not in o or f"{o['scorer']}/{o.get('score_batch_size', '')}/{o['score_interval']}{'/held' if 'probe' in o else ''}" in only.split()]
    jobs = [(int(o), steps, held, todo) for o in seeds.split()]
    if workers>1:
        with mp.get_context('spawn').Pool(workers) as pool: runs = pool.starmap(one_run, jobs, chunksize=1)
    else: runs = [one_run(*o) for o in jobs]
    table = []
    for i,o in enumerate(todo):
        got = [r['scorers'][i] for r in runs]
        mean = lambda f: statistics.mean(f(r) for r in got)
        table.append(dict(o, spearman={f:mean(lambda r: r['spearman'][f]) for f in got[0]['spearman']}, share_of_training=mean(lambda r: r['share_of_training']), forward_equivalents=got[0]['forward_equivalents']))
    res = dict(what='Spearman correlation of importance with the loss change when one layer is left out, and the seconds of scoring over those of training', command=typed('fidelity'),
               model='pico, 16 layers, LoRA r=8 on all linear layers, 4 layers a step drawn uniformly, AdamW 3e-3, clipped at 1', steps=steps, rows_a_step=batch, tokens_a_row=length, held_out_rows=held, factors=[0.25, 0.],
               hardware=f'{platform.machine()} CPU, one thread', versions={'python':platform.python_version()} | {o:version(o) for o in ('torch', 'transformers', 'peft')}, table=table, runs=runs)
    out.write_text(json.dumps(res, indent=1)+'\n')
    for o in table: print(f"{o['scorer']:12} {o.get('n_candidates', ''):2} {o.get('score_batch_size', ''):3} {o['score_interval']:3}   {o['spearman']['0.25']:.2f} {o['spearman']['0.0']:.2f}   {o['share_of_training']:.2%}  {o['forward_equivalents']:.3f}", flush=True)
