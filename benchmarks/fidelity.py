"""How well each scorer's importance agrees with leaving one layer out, and what scoring costs.
pico learns the physics text with layers drawn uniformly, so that scoring does not influence training and all scorers
watch the same run. At the end the adapters of each layer are turned down, one layer at a time, on rows that no step and
no probe has seen."""
import statistics,time,warnings
from contextlib import ExitStack,contextmanager
from pathlib import Path
import torch, torch.multiprocessing as mp
from torch.utils.data import DataLoader
from ist_nb import IST,ISTConfig
from ist_nb.config import scorers
from ist_nb.probe import quietly
from ist_nb.scorers import ema_update,move_importance,sample_layers,standardize
from ist_nb.suppression import suppress
from benchmarks import record
from benchmarks.small import lm_batch,physics,pico,rank_correlation,trainable

length,batch = 64,16   # tokens in a row, rows in a step

@scorers.register('gate at 1', 'As gate, with the gates where the model is: the first-order score', gradients=True)
def _(importance, probe, config, generator):
    loss,gradient = probe.gates(1.)
    return ema_update(importance, -gradient),dict(losses=[loss])

@scorers.register('antithetic', 'As suppression, with each set of layers ema_updateed by its complement')
def _(importance, probe, config, generator):
    half = len(importance)//2
    sets = [sample_layers(torch.sigmoid(-importance), half, generator) for _ in range(config.n_candidates//2)]
    first = torch.stack([torch.zeros(len(importance), dtype=torch.bool).index_fill(0, s, True) for s in sets])
    S = torch.stack([first, ~first], 1).flatten(0, 1)   # [K, N], each set before its complement
    losses = torch.tensor([probe.loss(o.nonzero().flatten().tolist()) for o in S], dtype=torch.float64)   # [K]
    return move_importance(importance, S, standardize(losses), config.score_lr),dict(losses=losses.tolist())

def rivals():
    "Settings of every scorer; `passes` is how many forward passes a score costs"
    res = []
    def add(scorer, rows, interval, passes, **more):
        res.append(dict(scorer=scorer) | more | dict(score_batch_size=rows, score_interval=interval, passes=passes))
    for k,r,i in ((3, 16, 10), (3, 8, 10), (3, 4, 10), (2, 4, 10), (3, 2, 5), (3, 16, 40)):
        add('suppression', r, i, k, n_candidates=k)
    for r in (16, 4): add('paper', r, 10, 3, n_candidates=3)
    for k,r in ((2, 16), (2, 6), (4, 4)): add('antithetic', r, 10, k, n_candidates=k)
    for r,i in ((16, 5), (16, 10), (16, 20), (16, 40), (8, 10), (8, 20), (4, 5), (4, 10), (4, 20), (2, 5)):
        add('gate', r, i, 2)
    for r in (16, 4): add('gate at 1', r, 10, 2)
    res.append(dict(scorer='fisher', score_interval=10, passes=0))
    for s,i in (('gate', 20), ('gate', 24), ('gate+fisher', 24)): add(s, 8, i, 2, probe='held out')
    return res

def name_of(o):
    "As --only takes it"
    return f"{o['scorer']}/{o.get('score_batch_size', '')}/{o['score_interval']}{'/held' if 'probe' in o else ''}"

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
        see = type(w)._see
        def timed_see(optimizer):
            with self.timed(): see(w, optimizer)
        w._see = timed_see
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

def losses_of(model, rows):
    "The loss of each 16 of the held-out rows"
    with quietly(model):
        return torch.tensor([model(input_ids=o, labels=o).loss.item() for o in rows.split(16)], dtype=torch.float64)

def setting(seed, n_held, n_spare=0):
    "Held-out rows, a loader of the others, one of `n_spare` rows that neither has, and pico with LoRA"
    rows = physics('train', length)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=g)
    held,spare,train = rows[order[:n_held]],rows[order[n_held:n_held+n_spare]],rows[order[n_held+n_spare:]]
    loader = DataLoader([lm_batch(o) for o in train], batch_size=batch, shuffle=True, generator=g)
    return held,loader,DataLoader([lm_batch(o) for o in spare], batch_size=batch),pico(seed=seed)

def watched_steps(model, loader, ist, watched, steps, clip):
    "Train with the layers of `ist` while others watch: after each step its loss, and its seconds without theirs"
    opt = torch.optim.AdamW(trainable(model), lr=3e-3)
    while ist.t<steps:
        for b in loader:
            if ist.t==steps: break
            ist.begin_step()
            with ExitStack() as stack:
                for w in watched: stack.enter_context(w.step(ist.active.tolist()))
                before,start = sum(w.seconds for w in watched),time.perf_counter()
                loss = model(**b).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(clip(model), 1.)
                opt.step()
                opt.zero_grad()
                took = time.perf_counter()-start-(sum(w.seconds for w in watched)-before)
            ist.end_step()
            for w in watched: w.after(ist.t)
            yield loss.item(),took

def one_run(seed, steps, n_held, todo):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    held,loader,spare,model = setting(seed, n_held, 256 if any('probe' in o for o in todo) else 0)
    ist = IST(model, ISTConfig.rst(seed=seed))
    watched = [Watched(model, o, spare if 'probe' in o else loader, seed) for o in todo]
    losses,seconds = zip(*watched_steps(model, loader, ist, watched, steps, lambda m: m.parameters()))
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
    halves = {f:rank_correlation(o[:, ::2].mean(1), o[:, 1::2].mean(1)) for f,o in change.items()}
    def direct(f, n):
        "How well leaving layers out on `n` of the rows agrees with all the others"
        parts = change[f].shape[1]
        some = [(torch.arange(parts)//(n//16)==i) for i in range(parts//(n//16))]
        return statistics.mean(rank_correlation(change[f][:, o].mean(1), change[f][:, ~o].mean(1)) for o in some)
    step = sum(seconds)
    res = [dict(w.settings, spearman={str(f):rank_correlation(w.ist.importance, o) for f,o in truth.items()},
                share_of_training=w.seconds/step,
                forward_equivalents=(w.settings['passes']*w.settings.get('score_batch_size', 0)
                                     /w.settings['score_interval']/batch),
                importance=w.ist.importance.tolist()) for w in watched]
    print(f'seed {seed} is done', flush=True)
    return dict(seed=seed, loss_first=losses[0], loss_last=statistics.mean(losses[-10:]),
                loss_held_out=base.mean().item(), seconds_a_step=step/steps,
                step_in_forward_equivalents=step/steps/(forward*batch*length),
                loss_change={str(f):o.tolist() for f,o in truth.items()},
                split_half={str(f):o for f,o in halves.items()},
                direct={n:{str(f):direct(f, n) for f in change} for n in (16, 32, 64)},
                between_factors=rank_correlation(truth[0.25], truth[0.]), scorers=res)

def main(
    seeds:str='10 11 12', # Seeds of the runs: of the rows' order, the adapters, the layers drawn and the candidates
    steps:int=120, # Steps of each run
    held:int=512,  # Rows on which layers are left out
    only:str='',   # Such as 'gate/8/20 gate/8/20/held': scorer, rows, interval, and a probe of held-out rows; else all
    workers:int=1, # Runs side by side, in processes
    out:Path='fidelity', # Where the numbers go
):
    todo = [o for o in rivals() if name_of(o) in only.split() or not only and 'probe' not in o]
    jobs = [(int(o), steps, held, todo) for o in seeds.split()]
    if workers>1:
        with mp.get_context('spawn').Pool(workers) as pool: runs = pool.starmap(one_run, jobs, chunksize=1)
    else: runs = [one_run(*o) for o in jobs]
    table = []
    for i,o in enumerate(todo):
        got = [r['scorers'][i] for r in runs]
        mean = lambda f: statistics.mean(f(r) for r in got)
        table.append(dict(o, spearman={f:mean(lambda r: r['spearman'][f]) for f in got[0]['spearman']},
                          share_of_training=mean(lambda r: r['share_of_training']),
                          forward_equivalents=got[0]['forward_equivalents']))
    what = ('Spearman correlation of importance with the loss change when one layer is left out, and the seconds of '
            'scoring over those of training')
    model = ('pico, 16 layers, LoRA r=8 on all linear layers, 4 layers a step drawn uniformly, AdamW 3e-3, '
             'clipped at 1')
    record.save(out, record.about(what, threads=1), model=model, steps=steps, rows_a_step=batch, tokens_a_row=length,
                held_out_rows=held, factors=[0.25, 0.], table=table, runs=runs)
    for o in table: print(f"{name_of(o):20} {o['spearman']['0.0']:.2f} at {o['share_of_training']:.2%} of the time")
