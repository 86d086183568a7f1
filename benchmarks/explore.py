"""From the runs of `benchmarks.quality` to the page on which a reader moves layers, schedule and length. Its controls
and pictures are in explore.html."""
import json
from pathlib import Path
from statistics import mean,stdev
import torch
from scipy.stats import t as student
from ist_nb.config import ISTConfig,samplers,shrunk
from ist_nb.probe import generator_for
from benchmarks.quality import chosen,contenders,every
from benchmarks.record import read

N = 16      # layers of both models
# what the page calls a schedule, and the methods of the bench that follow it
schedules = {
    'Every layer at every step (dense LoRA)':'LoRA; LoRA, 0.6 of the steps; LoRA, 0.35 of the steps',
    'All at first, then frozen from below':'shrink to top; shrink to top, 0.6; shrink to top, 1/4; '
        'shrink to top, 1.5 times the steps; shrink to top, 2.0 times the steps',
    'All at first, then fewer, drawn by depth':'shrink to depth; shrink to depth, 1/4',
    'Random layers, new ones at each step':'RST',
    'Drawn by importance, new ones at each step':'importance, suppression; importance with n_active=0.125; '
        'importance with n_active=0.375',
    'Drawn by depth, new ones at each step':'depth, fisher; depth 1/2, fisher',
    'Always the same: the top layers':'static top', 'Always the same: the bottom layers':'static bottom',
    'Always the same: evenly spread':'static spread'}
names = list(schedules)
place = {m:i for i,o in enumerate(schedules.values()) for m in o.split('; ')}      # method -> number of its schedule
# scale, task, what the page calls the text, and whether a run reads few rows many times
texts = [('larger', 'domain', 'Anatomy', False), ('larger', 'book', 'History', False),
         ('pico', 'book', 'Physics', False), ('pico', 'domain', 'History', False),
         ('larger', 'book', 'History', True), ('larger', 'domain', 'Anatomy', True),
         ('pico', 'book', 'Physics', True)]

def settings_of(method): return ISTConfig(**(contenders[method][0] or every))

def drawn(method, steps, importance, seed=0):
    "The layers of each step, as `IST` draws them"
    c = settings_of(method)
    for t in range(steps):
        n = shrunk(c.n_active*N, N, t, steps) if c.schedule=='shrink' else round(c.n_active*N)
        g = generator_for(seed, 'layers', t)
        yield torch.arange(N) if n==N else samplers[c.sampler](importance, n, c, g)

def packed(layers): return f'{sum(1<<int(i) for i in layers):04x}'     # a bit for each layer

def code_of(method):
    "How a user of the package says it; two of the fixed choices are samplers of the bench"
    given = contenders[method][0]
    if given is None or given['sampler'] not in ('uniform', 'importance', 'top', 'depth'): return ''
    return f"ISTConfig({', '.join(f'{k}={v!r}' for k,v in given.items())})"

def spread(xs, digits): return [round(f(xs), digits) for f in (mean, min, max)]
def paired(a, b):
    "Mean difference over common seeds, and half of its 95% interval"
    d = [a[s]-b[s] for s in a if s in b]
    return [round(mean(d), 5), round(student.ppf(0.975, len(d)-1)*stdev(d)/len(d)**0.5, 5)]

def one_run(method, runs, unit, memory, few, stride):
    "What the page shows of a method on a text, and its loss by seed"
    first,c = min(runs.values(), key=lambda r: r['seed']),settings_of(method)
    steps = first['curve'][-1]['step']
    at = {s:r['stopped'] if few else r['curve'][-1] for s,r in runs.items()}      # the step that is judged
    layers = list(drawn(method, steps, torch.tensor(first['importance'])))
    curve = [[o[0]['step'], round(mean(p['seconds']/unit[r['call']] for p,r in zip(o, runs.values())), 4),
              round(mean(p['test'] for p in o), 4)] for o in zip(*(r['curve'] for r in runs.values()))]
    return dict(schedule=place[method], layers=round(c.n_active*N, 1), steps=steps, seeds=len(runs), rate=first['lr'],
                code=code_of(method), varies=len({len(o) for o in layers})>1,
                scored=getattr(samplers[c.sampler], 'needs_importance', True),
                grid=''.join(map(packed, layers[::stride])),
                time=spread([at[s]['seconds']/unit[r['call']] for s,r in runs.items()], 4),
                memory=spread([r['peak']/memory for r in runs.values()], 4) if memory else None,
                loss=spread([o['test'] for o in at.values()], 5), end=round(mean(r['test'] for r in runs.values()), 5),
                curve=curve),{s:o['test'] for s,o in at.items()}

def one_text(scale, task, title, few):
    "All runs of one model on one text that have three seeds or more"
    bench = read(f'quality_{scale}')
    s,regime = bench['settings'],'repeated' if few else 'full'
    found = [chosen(bench)[task, o] for o in ([regime] if few else [regime, 'short'])]
    lora = list(found[0]['LoRA'].values())
    # LoRA's seconds by the call of the bench: a run is compared with LoRA on the same machine
    unit = {c:mean(r['seconds'] for r in lora if r['call']==c) for c in {r['call'] for r in lora}}
    memory = mean(r.get('peak', 0) for r in lora)
    steps,stride = s[regime][0],max(1, s[regime][0]//60)
    beside = [(m, {k:r for k,r in runs.items() if r['call'] in unit}) for o in found for m,runs in o.items()
              if m in place]
    made = sorted((one_run(m, runs, unit, memory, few, stride) for m,runs in beside if len(runs)>2),
                  key=lambda o: [o[0][k] for k in ('schedule', 'layers', 'steps')])
    dense = [losses for r,losses in made if r['schedule']==0]
    for r,losses in made: r['minus'] = [paired(losses, o) for o in dense] if r['schedule'] else []
    size = f"{bench['pretrained']['parameters']/1e6:.0f} million" if bench['pretrained'] else '3.7 million'
    rows = f'{s[regime][1]} training rows, read many times' if few else 'each training row read once'
    name = f"{title}{', few rows' if few else ''}: {'the larger model' if scale=='larger' else scale}"
    about = (f"Text: a textbook of {title.lower()}; a step reads {s['batch']} rows of {s['length']} tokens, {rows}. "
             f"Model: {size} parameters. Measured on {bench['hardware']}.")
    return dict(name=name, about=about, few=few, steps=steps, stride=stride,
                start=round(lora[0]['curve'][0]['test'], 5), runs=[r for r,_ in made])

def numbers():
    "All numbers of the page; equal grids are kept once"
    found,grids = [one_text(*o) for o in texts],[]
    for r in (r for t in found for r in t['runs']):
        if r['grid'] not in grids: grids.append(r['grid'])
        r['grid'] = grids.index(r['grid'])
    return dict(schedules=names, first=[1, 6.4, 240], texts=found, grids=grids)

def table(data):
    "Every run, for those who cannot use the controls"
    between = lambda v, n: f'{v[0]:.{n}f} ({v[1]:.{n}f} to {v[2]:.{n}f})' if v else 'not measured'
    line = lambda cells, tag='td': '<tr>'+''.join(f'<{tag}>{o}</{tag}>' for o in cells)+'</tr>'
    head = "text, schedule, layers, steps, seeds, time / LoRA's, peak of memory / LoRA's, held-out loss".split(', ')
    rows = [[t['name'], names[r['schedule']], f"{r['layers']:g}", r['steps'], r['seeds'], between(r['time'], 2),
             between(r['memory'], 2), between(r['loss'], 3)] for t in data['texts'] for r in t['runs']]
    return '\n'.join(['<table class="runs"><thead>', line(head, 'th'), '</thead><tbody>', *map(line, rows),
                      '</tbody></table>'])

def page(data):
    "The page's HTML, with its numbers inside: it asks for nothing from outside"
    form = Path(__file__).with_name('explore.html').read_text()
    return form.replace('TABLE', table(data)).replace('DATA', json.dumps(data, separators=(',', ':')))
