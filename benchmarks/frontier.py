"""Frontiers of the runs of `retain`: at equal task loss, how far is a model from what it was before? A family is a way
to adapt, such as LoRA scaled by one number; a curve is what one run gives in it. The runs that choose say which curve
stands for a family, and other seeds judge it on other documents."""
from collections import defaultdict
from math import exp,log
from statistics import mean
import numpy as np
from scipy.stats import t as student,ttest_1samp
from benchmarks.record import read,results

def _plain(r): return not (r.get('keep') or r.get('replay') or r.get('ist'))
def _held(r): return r.get('keep') and not r.get('ist')
families = {    # by name: which runs, and which of their points beside the adapter as trained
    'LoRA':                  (_plain, ('stopped early',)),
    'LoRA, scaled':          (_plain, ('scaled',)),
    'LoRA, by depth':        (_plain, ('line, top kept', 'line, bottom kept', 'two numbers')),
    'LoRA, faded':           (_plain, ('faded',)),
    'a gate a layer':        (_plain, ('faded, one gate a layer',)),
    'gates shuffled':        (_plain, ('faded, modules shuffled',)),
    'layer gates shuffled':  (_plain, ('the same, layers shuffled',)),
    'LoRA, trained on':      (_plain, ('trained on',)),
    'replay':                (lambda r: r.get('replay'), ('scaled',)),
    'Keep':                  (_held, ('scaled',)),
    'Keep, faded':           (_held, ('faded',)),
    'freezing':              (lambda r: r.get('ist') and not r.get('keep'), ('scaled',)),
    'Keep and freezing':     (lambda r: r.get('keep') and r.get('ist'), ('scaled',))}

def setting(r): # of a run, without its seed and what it led to
    return ', '.join(f'{k} {r[k]}' for k in ('name', 'lr', 'steps', 'apart') if k in r)

def final(r): return next(p['task'] for p in r['points'] if p['name']=='trained')    # the task loss at the end of a run

def curves(runs, family):
    "By task, setting and seed: the points of a family"
    which,names = families[family]
    res = defaultdict(lambda: defaultdict(dict))
    for r in runs:
        points = [p for p in r['points'] if p['name'] in names]
        if which(r) and points: # as trained too, which is 1 in each gate; a model trained on has left it
            res[r['task']][setting(r)][r['seed']] = points+[p for p in r['points'] if p['name']=='trained']
    if family=='LoRA': # a shorter run or a lower rank has no other point
        for r in runs:
            trained = [p for p in r['points'] if p['name']=='trained']
            if _plain(r): res[r['task']][setting(r)].setdefault(r['seed'], trained)
    return res

def hull(points):
    "The lower convex hull from the least task loss to the least divergence: pairs of task loss and divergence"
    res = []
    for x,y in sorted(points):
        if res and y>=res[-1][1]: continue
        while len(res)>1 and (res[-1][1]-res[-2][1])*(x-res[-2][0])>=(y-res[-2][1])*(res[-1][0]-res[-2][0]): res.pop()
        res.append((x, y))
    return res

def at(points, loss):
    "The divergence of a hull at a task loss; None below its least loss, and the last one beyond its greatest"
    if loss<points[0][0]: return None
    for (a,u),(b,v) in zip(points, points[1:]):
        if loss<=b: return u+(v-u)*(loss-a)/(b-a)
    return points[-1][1]

def pairs(points): return [(p['task'], p['kl']) for p in points]

def before(runs, task):
    "The model before: its task loss, and no divergence; where each way to adapt begins, and what a scale of 0 gives"
    return next(p['task'] for r in runs if r['task']==task for p in r['points'] if p['name']=='before'),0.

def levels(runs, task, give_up):
    "The task loss that is left when a share of the most that LoRA gained, scaled or not, is given back"
    best = defaultdict(lambda: float('inf'))
    for by_seed in [*curves(runs, 'LoRA')[task].values(), *curves(runs, 'LoRA, scaled')[task].values()]:
        for s,points in by_seed.items(): best[s] = min(best[s], *(p['task'] for p in points))
    best = mean(best.values())
    return best+give_up*(before(runs, task)[0]-best)

def divergences(by_seed, loss, start):
    "By seed, where the loss is reached; `start` is where the curves begin, if they do"
    return divergences_of({s:pairs(o) for s,o in by_seed.items()}, loss, start)

def divergences_of(by_seed, loss, start):
    "The same of pairs of task loss and divergence"
    res = {s:at(hull(o+([start] if start else [])), loss) for s,o in by_seed.items()}
    return {s:v for s,v in res.items() if v is not None}

def start_of(runs, family, task):
    "A scale of 0 is the model before. An adapter that is only trained or stopped has no scale"
    return None if family=='LoRA' else before(runs, task)

def chosen(runs, family, task, give_up):
    "The setting whose curve diverges least at a level, reached in every seed; None if there is none"
    loss,best = levels(runs, task, give_up),{}
    for k,by_seed in curves(runs, family)[task].items():
        found = divergences(by_seed, loss, start_of(runs, family, task))
        if len(found)==len(by_seed): best[k] = mean(found.values())
    return min(best, key=best.get) if best else None

def judged(choose, judge, family, task, give_up):
    "Setting, and divergence by seed, of a family at a level; a family that reaches it in no run that chooses has none"
    k = chosen(choose, family, task, give_up)
    if not k: return None,{}
    by_seed = curves(judge, family)[task].get(k, {})
    return k,divergences(by_seed, levels(judge, task, give_up), start_of(judge, family, task))

def fixed(choose, judge, family, task, give_up=0.05):
    """Divergence by seed of a single point of the chosen setting: that of least divergence which reaches the level in
    the run that chooses. Its scale, price and number of steps are chosen there too"""
    k,loss = chosen(choose, family, task, give_up),levels(choose, task, give_up)
    def key(p): return tuple(str(p.get(o)) for o in ('name', 'v', 'price', 'at'))
    (points,) = curves(choose, family)[task][k].values()
    best = key(min((p for p in points if p['task']<=loss), key=lambda p: p['kl']))
    return {s:next(p['kl'] for p in o if key(p)==best) for s,o in curves(judge, family)[task].get(k, {}).items()}

def ratio(ours, theirs):
    "Of one divergence over another: geometric mean over common seeds, its 95% interval, p of a paired t-test of logs"
    d = [log(ours[s]/theirs[s]) for s in sorted(ours) if s in theirs]
    if not d: return None
    if len(d)<3: return exp(mean(d)),None,None,None
    half = student.ppf(0.975, len(d)-1)*np.std(d, ddof=1)/len(d)**0.5
    return exp(mean(d)),exp(mean(d)-half),exp(mean(d)+half),ttest_1samp(d, 0).pvalue

def holm(ps):
    "The p-values of several comparisons, corrected by Holm"
    res,most = [0.]*len(ps),0.
    for i,j in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1., (len(ps)-i)*ps[j]))
        res[j] = most
    return res

def over_documents(choose, judge, ours, theirs, task, give_up, draws=1000, seed=0):
    """A 95% interval of the ratio of two families at a level, when the documents and the rows that judge are drawn
    again, and the level with them"""
    of = {f:curves(judge, f)[task] for f in {ours, theirs, 'LoRA', 'LoRA, scaled'}}
    a,b = (of[f].get(chosen(choose, f, task, give_up), {}) for f in (ours, theirs))
    plain = [(s, o) for f in ('LoRA', 'LoRA, scaled') for by_seed in of[f].values() for s,o in by_seed.items()]
    mine = [r for r in judge if r['task']==task]
    start = next(p for r in mine for p in r['points'] if p['name']=='before')
    tokens = np.array(next(r['doc_tokens'] for r in mine if 'doc_tokens' in r), float)
    rng,n,res = np.random.default_rng(seed),len(start['kl_rows']),[]
    for _ in range(draws):
        docs,rows = rng.integers(len(tokens), size=len(tokens)),rng.integers(n, size=n)
        def loss(p): return np.average(np.array(p['documents'])[docs], weights=tokens[docs])
        def again(points): return [(loss(p), np.array(p['kl_rows'])[rows].mean()) for p in points if 'documents' in p]
        best,before = defaultdict(list),loss(start)
        for s,o in plain: best[s] += [x for x,_ in again(o)]
        best = mean(map(min, best.values()))
        level = best+give_up*(before-best)
        at_level = [divergences_of({s:again(o) for s,o in k.items()}, level, None if f=='LoRA' else (before, 0.))
                    for k,f in ((a, ours), (b, theirs))]
        d = [log(at_level[0][s]/at_level[1][s]) for s in at_level[0] if s in at_level[1]]
        if d: res.append(exp(mean(d)))
    return tuple(np.quantile(res, (0.025, 0.975)))

def _of(plan, model): return read(o) if (results/f"{(o := f'retain_{plan}_{model}')}.json").exists() else {}

def choosing(model, calls=None):
    "The runs that chose for a model, those of its first `calls` calls if given; None until they are made"
    runs = _of('choose', model).get('runs')
    return [r for r in runs if r['call']<calls] if runs and calls else runs

def found(model):
    """The runs that chose and those that judged a model; the latter are None until they are made. Those that chose are
    of another model where `judge` says so"""
    judge = _of('judge', model)
    return choosing(judge.get('choices', model), judge.get('choice_calls')),judge.get('runs')

# ------------------------------------------------------------------------------------------------------ for the pages
tasks = dict(german='German manual pages', python='modules of Python', chat='chats (GSM8K)', cloze='multiple choice',
             few='64 rows of German')
said = {
    'LoRA': 'LoRA as trained, or stopped', 'LoRA, scaled': 'LoRA, scaled by one number',
    'LoRA, by depth': 'LoRA, scaled by depth (as LiNeS)', 'LoRA, faded': 'LoRA, `fade`: a gate a module',
    'gates shuffled': 'the same gates, shuffled', 'a gate a layer': 'a gate a layer',
    'LoRA, trained on': 'LoRA, 16 or 64 more steps with the penalty', 'replay': 'LoRA with replay',
    'freezing': 'progressive freezing, scaled', 'Keep': 'LoRA with `Keep`',
    'Keep, faded': 'LoRA with `Keep`, then `fade`', 'Keep and freezing': 'progressive freezing with `Keep`'}

def table_of(model, give_up=0.05, beside='LoRA, scaled', have=tuple(tasks)):
    "Markdown: the divergence of each family at equal task loss, and its ratio to one of them"
    from benchmarks.render import made_by,table
    choose,judge = found(model)
    runs,head = judge or choose,read(f"retain_{'judge' if judge else 'choose'}_{model}")
    have = [t for t in have if any(p['name']=='before' for r in runs if r['task']==t for p in r['points'])]
    calls = [r['call'] for r in runs if r['task'] in have and 'call' in r]
    if calls: # the command of the first that ran one of these tasks, and the cards of all
        cards = sorted({head['calls'][o]['hardware'].split(' x ')[-1] for o in calls})
        head |= head['calls'][min(calls)] | dict(hardware=' and '.join(cards))
    more = f'; the first of {n} calls' if (n := len(set(calls)))>1 else ''
    values = {(f, t):judged(choose, runs, f, t, give_up)[1] for f in said for t in have}
    ran = {(f, t):len(curves(runs, f)[t].get(judged(choose, runs, f, t, give_up)[0], {})) for f,t in values}
    compare = {k:ratio(v, values[beside, k[1]]) for k,v in values.items() if k[0]!=beside}
    sure = {f:holm([compare[f, t][3] for t in have if (o := compare.get((f, t))) and o[3] is not None]) for f in said}
    def cell(f, t):
        v,o = values[f, t],compare.get((f, t))
        if not v or len(v)<ran[f, t]: return 'not reached'
        res = f'{mean(v.values()):.3f}'
        if not o: return res
        if o[1] is None: return f'{res} ({o[0]:.2f})'
        ps = dict(zip((t for t in have if (v := compare.get((f, t))) and v[3] is not None), sure[f]))
        return f"{res} ({o[0]:.2f}, {o[1]:.2f} to {o[2]:.2f}{', *' if ps[t]<0.05 else ''})"
    rows = [(said[f], *(cell(f, t) for t in have)) for f in said if any(values[f, t] for t in have)]
    limits = '; '.join(f'{tasks[t]} {levels(runs, t, give_up):.3f}' for t in have)
    n = sorted(set(ran.values())-{0})
    by = (f"{' to '.join(map(str, sorted({n[0], n[-1]})))} seeds on documents that chose nothing; interval "
          'of 95%, * where p < 0.05 (paired t-test of logs, Holm over tasks); *not reached*: in some seed, in the '
          'setting that was chosen' if judge else
          'one seed, on the documents that chose the settings: nothing is judged yet')
    return table(['way', *(tasks[t]+':' for t in have)], rows)+'\n\n'+made_by(head, (
        f'{head["model"]}; divergence from the model before, nats a token, at the task loss at which {give_up:.0%} of '
        f'what LoRA gained is given back ({limits}), and in brackets its ratio to that of {said[beside]}; {by}{more}'))

def level_with(points, loss, keys, start):
    "What a curve reads of `keys` where it reaches a task loss, on straight lines between its points"
    of = {(p['task'], p['kl']):p for p in points} | {(start['task'], 0.):start}
    line = hull(of)
    for (a,u),(b,v) in zip(line, line[1:]):
        if a<=loss<=b: return [of[a, u][k]+(of[b, v][k]-of[a, u][k])*(loss-a)/(b-a) for k in keys]

others = {'psychology':'psychology', 'introduction-business':'business', 'us-history':'history', 'other':'other domain'}
def rises(model, ways=('LoRA, scaled', 'LoRA, faded', 'Keep'), have=tuple(tasks), give_up=0.05):
    "By task and way: by how much the loss on text that no method saw is above that before, seed by seed"
    choose,runs = found(model)
    res = {}
    for t in have:
        loss,start = levels(runs, t, give_up),next(p for r in runs if r['task']==t for p in r['points']
                                                   if p['name']=='before')
        for f in ways:
            by = curves(runs, f)[t].get(chosen(choose, f, t, give_up), {})
            at_level = {s:level_with(o, loss, others, start) for s,o in by.items()}
            res[t, f] = {s:[v-start[k] for k,v in zip(others, o)] for s,o in at_level.items() if o}
    return res

def elsewhere_at(model, **kwargs):
    "Markdown: the same as a table"
    from benchmarks.render import table
    rows = [(tasks[t], said[f], *(f'{mean(v):+.3f}' for v in zip(*by.values()))) for (t,f),by in
            rises(model, **kwargs).items()]
    return table(['task', 'way', *(f'{o}:' for o in others.values())], rows)+'\n\n(The loss less that of the model '\
        'before, nats a token, where each way reaches the task loss of the table above; means over seeds, between the '\
        'points of a run on straight lines. *Other domain*: German if the task is Python, else modules of Python.)'

def elsewhere(model, have=tuple(tasks), ways=('LoRA, faded', 'Keep')):
    "Markdown: what no method was given, before and as trained: losses on books, and shares of questions answered"
    from benchmarks.render import table
    choose,runs = found(model)
    of = {'LoRA, faded':'LoRA', 'Keep':'LoRA with `Keep`'}
    start = next(p for r in runs for p in r['points'] if p['name']=='before')
    names = [k for k in start if k in ('psychology', 'introduction-business', 'us-history') or k.startswith('acc ')]
    rows = [('the model before', *(f'{start[k]:.3f}' for k in names))]
    for t in have:
        for f in ways:
            k = chosen(choose, f, t, 0.05)
            ends = [p for r in runs if (r['task'], setting(r))==(t, k) for p in r['points'] if p['name']=='trained']
            rows.append((f'{of[f]}, {tasks[t]}', *(f'{mean(p[k] for p in ends):.3f}' for k in names)))
    head = ['', *(k.replace('acc ', '').replace('introduction-', '').replace('us-', '')+':' for k in names)]
    return table(head, rows)+'\n\n(Loss on three books; right answers to 400 questions of each kind, chosen among the '\
        'options by their likelihood a character, with a standard error of about 0.02. As trained; means over seeds.)'

drawn = 'Keep', 'LoRA, scaled', 'LoRA, faded', 'LoRA, trained on', 'LoRA'
def picture(model, shown=drawn, have=tuple(tasks), width=8.):
    "Task loss against divergence, by task; a matplotlib figure"
    import matplotlib.pyplot as plt
    from ist_nb.plot import palette,style
    choose,judge = found(model)
    runs = judge or choose
    have = [t for t in have if any(p['name']=='before' for r in runs if r['task']==t for p in r['points'])]
    with style():
        fig,axes = plt.subplots(1, len(have), figsize=(width, 3.4), sharey=True, layout='constrained')
        for ax,t in zip(np.atleast_1d(axes), have):
            best,start = levels(runs, t, 0),before(runs, t)[0]
            for f,color in zip(shown, palette.values()):
                settings = {chosen(choose, f, t, o) for o in (0.02, 0.05, 0.1, 0.2)}-{None}
                points = [p for k in settings for o in curves(runs, f)[t].get(k, {}).values() for p in pairs(o)]
                if points: ax.plot(*zip(*hull(points)), 'o-', ms=3, lw=1.2, color=color, label=said[f].replace('`', ''))
            ax.locator_params('x', nbins=4)
            ax.set(xlim=(best-0.02*(start-best), best+0.3*(start-best)), yscale='log', title=tasks[t],
                   xlabel='task loss')
        np.atleast_1d(axes)[0].set_ylabel('divergence, nats a token')
        seen = {}
        for ax in np.atleast_1d(axes): seen |= dict(zip(*reversed(ax.get_legend_handles_labels())))
        fig.legend(seen.values(), seen.keys(), loc='outside lower left', ncols=3)
    return fig

def main(
    model:str='SmolLM2-135M-Instruct', # Whose runs
    tasks:str='german chat', # Which tasks
):
    "Draw the picture of the home page"
    from PIL import Image
    from benchmarks.record import root
    out = root/'nbs'/'images'/'keep.png'
    picture(model, have=tasks.split()).savefig(out, dpi=150)
    Image.open(out).convert('P', palette=Image.Palette.ADAPTIVE, colors=64).save(out, optimize=True)
