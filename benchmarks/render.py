"From the JSON of the benchmarks to the tables, sentences and pictures of the results pages"
import re,statistics
from functools import cache
from IPython.display import Markdown
from scipy.stats import t as student
from benchmarks.peers import variants
from benchmarks.record import read

def table(head, rows):
    "A Markdown table; a head that ends with a colon is of numbers, and its column is flush right"
    line = lambda cells: '| '+' | '.join(map(str, cells))+' |'
    rule = '|'+'|'.join('---:' if h.endswith(':') else '---' for h in head)+'|'
    return '\n'.join([line(h.rstrip(':') for h in head), rule, *map(line, rows)])

renamed = dict(gpu_check='gpu', models_matrix='models', peft_matrix='peft_methods', levers_quality=None)  # None: gone
def made_by(res, *said):
    "On what, with what, and by which command a result was made"
    v = res['versions']
    on = ', '.join([res['hardware'], *(f'{o} {v[o]}' for o in ('torch', 'transformers', 'peft') if o in v)])
    old = re.match(r'python benchmarks/(\w+)\.py', res['command'])     # made before a benchmark had its present name
    name = old and renamed.get(old[1], old[1])
    now = f', today `python -m benchmarks {name}`' if name else ', a script that is gone' if old else ''
    return f"({'. '.join([*said, on])}. Made by `{res['command']}`{now}.)"

def mean_difference(a, b, digits=3):
    "Of losses by seed, over common seeds: the mean of a-b with half of its 95% interval"
    d = [a[s]-b[s] for s in a if s in b]
    error = statistics.stdev(d)/len(d)**0.5 if len(d)>1 else 0
    if len(d)<3: return f"{statistics.mean(d):+.3f} ({len(d)} seed{'s'*(len(d)>1)})"
    return f'{statistics.mean(d):+.{digits}f} ± {student.ppf(0.975, len(d)-1)*error:.{digits}f}'

# -- beside other libraries
ours,llamas = ('LoRA, fast', 'recommended'),{'1b':'Llama-3.2-1B', '8b':'Llama-3-8B'}
def mine(name): return 'config' in variants[name][1]    # products in 8 bits too
def with_others(case):
    "A case with the variants that ran in a call of their own, beside some of the case's; `own` is that call's case"
    keys = 'shape', 'bits', 'batch', 'length', 'checkpointing', 'budget', 'hardware'
    own = next((c for c in read('peers_apart')['cases'] if all(c.get(k)==case.get(k) for k in keys)), None)
    more = {k:v | dict(apart=True) for k,v in own['variants'].items()} if own else {}
    return case | dict(variants=more | case['variants'], own=own)
def cases(**of):
    "Those in 16 bits without checkpointing or budget; or others"
    want = dict(bits=16, checkpointing=False, budget=None) | of
    return [with_others(c) for c in read('peers')['cases'] if all(c.get(k)==v for k,v in want.items())]
def fastest(case, what='seconds'):
    "The other library with the least time a step, or the least peak"
    v = case['variants']
    return min((k for k in v if not mine(k)), key=lambda k: v[k][what]['median'])
def least(case): return fastest(case, 'peak')
def beside(name, other=fastest, what='seconds'):
    "A variant over another, by name or by what chooses it in each case: the ratio in each case that has both"
    pairs = [(c['variants'], other if isinstance(other, str) else other(c)) for c in cases()]
    return [v[name][what]['median']/v[o][what]['median'] for v,o in pairs if name in v and o in v]
def named(name, v): return name+' †'*v.get('apart', False)
def by_time(case): return sorted(case['variants'].items(), key=lambda o: o[1]['seconds']['median'])

def peers_picture():
    "Bars of the time of a step and of its memory, ours in blue, a panel for each case"
    import matplotlib.pyplot as plt
    from ist_nb.plot import palette,style
    have = cases()
    with style():
        heights = [len(c['variants'])+1.2 for c in have]
        fig,axs = plt.subplots(len(have), 2, figsize=(7, 0.2*sum(heights)+0.5), sharex='col', width_ratios=(1.6, 1),
                               height_ratios=heights)
        for (left,right),c in zip(axs, have):
            rows,unit = by_time(c)[::-1],c['variants'][fastest(c)]['seconds']['median']
            for y,(k,v) in enumerate(rows):
                t,most,bar = v['seconds'],v['peak']['median']/2**30,dict(color='#BBBBBB', height=0.75)
                if mine(k): bar['color'] = palette['blue']
                left.barh(y, t['median']/unit, **bar)
                left.plot((t['min']/unit, t['max']/unit), (y, y), color=palette['red'], lw=1.2)
                left.text(t['max']/unit+0.03, y, f"{t['median']*1e3:.0f} ms", va='center',
                          bbox=dict(color='white', pad=0.5))
                right.barh(y, most, **bar)
                right.text(most+0.8, y, f'{most:.1f}', va='center')
            left.axvline(1, color='black', lw=0.7, ls=':', zorder=0.5)
            left.set_title(f"{llamas[c['shape']]}, {c['batch']} rows of {c['length']:,} tokens", fontweight='bold')
            left.set(xlim=(0, 2.6), yticks=range(len(rows)), yticklabels=[named(*o) for o in rows])
            right.set(xlim=(0, 72), yticks=[])
            for ax in (left, right): ax.tick_params(left=False)
        left.set_xlabel('time a step; fastest other library = 1')
        right.set_xlabel('peak memory, GiB')

def peers_table(shape):
    "Every contender at a shape"
    rows,have = [],[c for c in cases() if c['shape']==shape]
    for c in have:
        unit = dict(seconds=fastest(c), peak=least(c))
        of = lambda v, k: f"{v[k]['median']/c['variants'][unit[k]][k]['median']:.2f}"
        rows += [(f"{c['batch']} × {c['length']:,}", f'**{k}**' if mine(k) else named(k, v),
                  between(v['seconds'], 1e3, 1), f"{v['tokens_a_second']:,.0f}", between(v['peak'], 2**-30, 1),
                  of(v, 'seconds'), of(v, 'peak')) for k,v in by_time(c)]
    own = [c['own'] for c in have if c['own']]
    c,rounds = have[0],sorted({v['rounds'] for c in have for v in c['variants'].values() if 'apart' not in v})
    versions = {k:c['versions'][k] for k in ('torch', 'transformers', 'peft', 'trl', 'unsloth', 'liger_kernel')}
    head = ['rows × tokens', 'variant', 'ms a step:', 'tokens/s:', 'peak, GiB:', 'time, over the fastest other:',
            'memory, over the least of the others:']
    said = (f"bf16, LoRA r={c['rank']} on all linear layers, random weights, no checkpointing. Medians of "
            f"{' or '.join(map(str, rounds))} rounds of {c['steps']} steps, in brackets the least and the most. The "
            'peak includes the weights')
    for o in own:
        again = o['variants']['Unsloth, rows']
        said += (f". † In a call of its own, {again['rounds']} rounds of {o['steps']} steps, in which *Unsloth, "
                 f"rows* took {again['seconds']['median']*1e3:.1f} ms")
    on,by = ', '.join(f'{k} {v}' for k,v in versions.items()),' and '.join(f"`{c['command']}`" for c in have+own)
    return Markdown(f"{table(head, rows)}\n\n({said}. {c['hardware']}, {on}. Made by {by}.)")

unlike = {'with checkpointing':dict(checkpointing=True), 'in 4 bits':dict(bits=4)}
def over_unsloth(c, name, what='seconds'):
    return c['variants'][name][what]['median']/c['variants']['Unsloth, rows'][what]['median']
def of_unsloth(how, name, what='seconds'):
    "A variant over Unsloth in those cases: at the 8B shape, then at the 1B shape"
    return [over_unsloth(c, name, what) for c in cases(**unlike[how]) if name in c['variants']]
def unlike_table():
    "Where memory is short"
    have = [(how, c) for how,o in unlike.items() for c in cases(**o)]
    rows = [(how, f"{llamas[c['shape']]}, {c['batch']} × {c['length']:,}", f'**{k}**' if mine(k) else k,
             between(v['seconds'], 1e3, 1), v['rounds'], between(v['peak'], 2**-30, 1),
             *(f'{over_unsloth(c, k, o):.2f}' for o in ('seconds', 'peak')))
            for how,c in have for k,v in by_time(c)]
    head = ['', 'shape, rows × tokens', 'variant', 'ms a step:', 'rounds:', 'peak, GiB:', "time, over Unsloth's:",
            'memory, over the same:']
    said = '; '.join(f"{how}, {c['shape'].upper()} shape: rounds of {c['steps']} steps, `{c['command']}`"
                     for how,c in have)
    return Markdown(f"{table(head, rows)}\n\n({have[0][1]['hardware']}. {said}.)")

cold = 'LoRA, fast; PEFT', 'recommended; recommended, not fast', 'LoRA, fold; PEFT', 'LoRA, fold, loss; LoRA, fold'
def paid(pair):
    """Of two variants in each case of `peers --cold` that has both: what the first costs in seconds before its first
    step of usual length, the seconds that it saves at each step, after how many steps it has paid, and how many passes
    of a block these are"""
    from benchmarks.peers import shapes,warm
    found,(a,b) = {},pair.split('; ')
    for c in (o for o in read('peers_cold')['cases'] if {a, b}<=set(o['variants'])):
        a_step,b_step = (c['variants'][k]['seconds']['median'] for k in (a, b))
        saved = b_step-a_step
        cost = c['variants'][a]['warm']-c['variants'][b]['warm']+warm*saved
        steps = max(0., cost/saved) if saved>0 else None
        found[c['shape']] = cost,saved,steps,steps and steps*shapes[c['shape']][3]
    return found

def cold_picture():
    "Seconds that a run has won by compiling, over its steps; a dot where `fast=True` begins to compile"
    import matplotlib.pyplot as plt
    from benchmarks.peers import shapes
    from ist_nb.plot import palette,style
    from ist_nb.speed import _enough
    with style():
        fig,axs = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
        for ax,pair in zip(axs, cold):
            for (s,(cost,saved,*_)),color in zip(paid(pair).items(), ('blue', 'teal', 'red')):
                at = _enough(shapes[s][3], shapes[s][1])
                ax.plot((0, 800), (-cost, 800*saved-cost), color=palette[color], label=llamas.get(s, 'SmolLM2-135M'))
                ax.plot(at, at*saved-cost, 'o', color=palette[color], ms=5)
            ax.axhline(0, color='black', lw=0.7, ls=':')
            ax.set_title(pair.split('; ')[0], fontweight='bold')
            ax.set(xlabel='steps of a run', ylim=(-25, 60))
        axs[0].set_ylabel('seconds won')
        axs[0].legend(frameon=False, loc='lower right')

def cold_table():
    "What compiling costs at first, and when it has paid"
    rows,have = [],read('peers_cold')['cases']
    for pair in cold:
        a,b = pair.split('; ')
        for s,(cost,saved,steps,passes) in paid(pair).items():
            v = next(c['variants'] for c in have if c['shape']==s)
            rows.append((llamas.get(s, 'SmolLM2-135M'), a, b, f'{cost:.1f}',
                         *(between(v[k]['seconds'], 1e3, 0) for k in (a, b)),
                         *(('never',)*2 if steps is None else (f'{steps:.0f}', f'{passes:,.0f}'))))
    head = ['shape', 'variant', 'beside', 'costs at first, s:', 'ms a step:', 'ms a step of the other:',
            'has paid after steps:', 'passes of a block:']
    lost = '; '.join(f"{k} at the shape of {llamas[c['shape']]}" for c in have for k in c['failed'])
    said = f'16 rows of 256 tokens; no compiled code from before; medians of 2 rounds. Time ran out for {lost}'
    made = made_by(have[-1] | dict(command='` and `'.join(c['command'] for c in have)), said)
    return Markdown(f"{table(head, sorted(rows, key=lambda o: o[0], reverse=True))}\n\n{made}")

scaled = 'scaling', 'scaling_long', 'scaling_two', 'scaling_two_short', 'scaling_two_fsdp'   # the calls on several GPUs
def on_gpus(name, engine='DDP', n=2, rows='short'):
    "A contender on several GPUs, with short rows or long; one GPU is that of the calls on four"
    call = {'short':'scaling_two_short' if n==2 else 'scaling', 'long':'scaling_long' if n!=2 else
            'scaling_two' if engine=='DDP' else 'scaling_two_fsdp'}[rows]
    long = rows=='long'
    return next(c for c in read(call)['cases']
                if (c['engine'], c['processes'], c['length']>256)==(engine, n, long))['variants'][name]
def scaling_table():
    "One GPU and several"
    def shown(call, c, k): # by the later calls the first one's runs on two GPUs, and those with their first step
        return call!='scaling' or c['length']==256 and c['processes']!=2 and k!='recommended'
    rows = [(i, f"{c['batch']} × {c['length']:,}", c['engine'], c['processes'], f'**{k}**',
             between(v['seconds'], 1e3, 1), f'{kernels(v):.0f}', f"{v['tokens_a_second']:,.0f}",
             f"{v['of_linear']:.2f}", between(v['peak'], 2**-30, 1))
            for i,call in enumerate(scaled, 1) for c in read(call)['cases'] for k,v in c['variants'].items()
            if shown(call, c, k)]
    head = ['call:', 'rows × tokens', 'engine', 'GPUs:', 'variant', 'ms a step:', 'ms of kernels:', 'tokens/s:',
            'of linear:', 'peak of a GPU, GiB:']
    return Markdown(table(head, rows)+'\n\n'+made_by(read('scaling'), (
        "Llama-3-8B's shape, bf16, random weights, as many rows on each GPU; medians of 2 rounds, or 3 in the last two "
        'calls, in brackets the least and the most; kernels of one step halfway, without the exchange between GPUs; '
        '*of linear* divides by as many times the tokens of one GPU in the same call. *Cut*: compiled blocks are cut '
        'where a bucket of DDP ends. Call 1 is older than the loss in pieces, which explains its peaks; its command'))
        +' The others: '+'; '.join(f'`{read(o)["command"]}`' for o in scaled[1:])+'.')
@cache
def further():
    "On paper: shape, engine, hosts of eight GPUs, bits and checkpointing; and what `far` says of them"
    from benchmarks.estimate import far
    rates = [read('waits')[k] for k in ('matrix_flops', 'copy_bytes', 'unpack_bytes')]
    of = [('8b', e, h, 16, False) for h,es in ((1, ('DDP', 'FSDP2')), (2, ('DDP', 'FSDP2', 'HSDP'))) for e in es]
    of += [('70b', e, h, 16, True) for e,h in (('FSDP2', 1), ('FSDP2', 2), ('HSDP', 2))]
    of += [('70b', 'DDP', h, 4, True) for h in (1, 2)]
    return {o:far(*o[:3], rates, bits=o[3], checkpointing=o[4]) for o in of}
def further_table():
    rows = [(f"{shape.upper()}{', 4 bits'*(bits==4)}{', checkpointing'*less}", engine, f'{hosts} × 8',
             f'{work*1e3:,.0f}', f'{travel*1e3:,.0f}', f'{most/2**30:.0f}')
            for (shape,engine,hosts,bits,less),(work,travel,most) in further().items()]
    return Markdown(table(['shape', 'engine', 'hosts × GPUs', "a GPU's own work, ms:", 'what travels, ms:',
                           'peak of a GPU, GiB:'], rows)+'\n\n(On paper, [benchmark](../../benchmarks/estimate.py). '
                    '*LoRA, fast* with 4 rows of 2,048 tokens a GPU; *HSDP* is FSDP2 within each host and DDP between '
                    'them.)')
def kernels(v): return v['step']['gpu']-v['step']['exchange']   # milliseconds

def blocks_table():
    "What compiles a step best"
    res = read('blocks')
    cell = lambda o: f"{1e3*o['seconds']:.1f} / {1e3*o['host']:.1f}"
    turns = dict(all='all layers train', half='the upper half', turns='another part each step',
                 freezing='one layer less each step')
    rows = [(k, *(cell(v[o]) if o in v else '' for o in turns), f"{max(o['reserved'] for o in v.values())/2**30:.1f}")
            for k,v in res['variants'].items()]
    head = ['compiled', *(f'{o}:' for o in turns.values()), 'memory, GiB:']
    return Markdown(table(head, rows)+'\n\n'+made_by(res, (
        'Milliseconds of a step when steps follow each other / that the host needs to queue one. *More kept*: torch '
        'decides what is computed again. *Graphs*: CUDA graphs. *Whole*: the model as one. *Another part*: the lowest '
        'trained layer changes at each step. Memory is what torch reserves. '
        f"{llamas[res['shape']]}'s shape, {res['batch']} rows of {res['length']} tokens, "
        f"a loop without a Trainer, one run of {res['steps']} steps")))
def graphs_over(turn, what='seconds', a='blocks as graphs, loss', b='blocks, loss'):
    v = read('blocks')['variants']
    return v[a][turn][what]/v[b][turn][what]

@cache
def to_loss(): # of each task and case: seconds and steps of each variant to the loss of `recommended`
    from benchmarks.peers import to_same_loss
    return [(t, c, to_same_loss(c, t)) for t in learnt_tasks for c in cases() if c['length']==256]   # as they learned
learnt_tasks = 'german', 'chat'
def beside_to_loss(name): # its seconds over those of the fastest other library, in each
    return [v[name][0]/min(o for k,(o,_) in v.items() if not mine(k)) for *_,v in to_loss()]

def to_loss_table():
    "Seconds to the same loss"
    from benchmarks.frontier import tasks
    rows = []
    for (t,c,v),*ratios in zip(to_loss(), *map(beside_to_loss, ours)):
        rival = min((k for k in v if not mine(k)), key=lambda k: v[k][0])
        rows.append((tasks[t], f"{llamas[c['shape']]}, {c['batch']} × {c['length']:,}", f'{rival}: {v[rival][0]:.1f}',
                     *(f'{v[k][0]:.1f} ({r:.2f})' for k,r in zip(ours, ratios)),
                     f"{v['recommended'][1]:.0f} for {v[rival][1]:.0f}"))
    head = ['task', "step of", 'fastest other library, s:', *(f'{o}, s:' for o in ours), 'steps, against LoRA:']
    res = read('retain_lengths_SmolLM2-135M-Instruct')
    return Markdown(table(head, rows)+'\n\n'+made_by(res|res['calls'][1], (
        'Steps of SmolLM2-135M-Instruct to the loss that `recommended` reaches on every seed at its best length, each '
        'length at its own rate; times the seconds of a step at the shape; in brackets over the fastest other library; '
        'means of four seeds; the first of the two calls that judge')))

def learning_picture(shape='8b', length=256):
    "Held-out loss against seconds: the steps of the pretrained model, each as long as at a shape"
    import matplotlib.pyplot as plt
    from benchmarks.frontier import tasks
    from benchmarks.peers import learnt,way
    from ist_nb.plot import palette,style
    case = next(c for c in cases() if (c['shape'], c['length'])==(shape, length))
    drawn = {fastest(case):('black', '--'), 'LoRA, fast':(palette['blue'], '-'), 'recommended':(palette['red'], '-')}
    with style():
        fig,axes = plt.subplots(1, len(learnt_tasks), figsize=(8., 3.2), layout='constrained')
        for ax,t in zip(axes, learnt_tasks):
            for k,(color,line) in drawn.items():
                of,step = {},case['variants'][k]['seconds']['median']
                for r in learnt(t):
                    if r['name']==way(k): of.setdefault(r['steps'], []).append(r['loss'])
                x = [step*o for o in sorted(of)]
                ax.plot(x, [statistics.mean(of[o]) for o in sorted(of)], line, marker='o', ms=3, lw=1.2, color=color,
                        label=k)
                ax.vlines(x, *zip(*((min(of[o]), max(of[o])) for o in sorted(of))), color=color, lw=1)
            ax.set(title=tasks[t], xlabel='seconds of training', xlim=(0, None))
        axes[0].set_ylabel('held-out loss')
        axes[0].legend(frameon=False)
    return fig

@cache
def foreseen(**kind):
    "Of each step beside other libraries that can be estimated: case, variant, measured and estimated by what"
    from benchmarks.estimate import beside as counted
    rates = [read('waits')[k] for k in ('matrix_flops', 'copy_bytes', 'unpack_bytes')]
    return [(c, k, {o:(c['variants'][k][o]['median'], x) for o,x in zip(('seconds', 'peak'), v)} | dict(floor=v[2]))
            for c in cases(**kind) for k,v in counted(c, rates).items() if k in c['variants']]

def by_host(case, name):
    "Whether the host sets the pace of one of our variants"
    return name in ours and (case['shape'], case['length'])==('1b', 256)

def foreseen_table():
    "Seconds and memory, measured and estimated"
    def row(how, c, k, found):
        (s,s_),(b,b_) = found['seconds'],found['peak']
        return (f"{llamas[c['shape']]}, {c['batch']} × {c['length']:,}{how}", k, f'{s*1e3:.0f}',
                f"{found['floor']*1e3:.0f}", f'{s_*1e3:.0f}',
                f"{s_/s:.2f}{' (host)'*by_host(c, k)}", f'{b/2**30:.1f}', f'{b_/2**30:.1f}', f'{b_/b:.3f}')
    head = ['shape, rows × tokens', 'variant', 'ms a step:', 'products:', 'estimate:', 'ratio:', 'peak, GiB:',
            'estimate:', 'ratio:']
    kinds = {'':{}} | {f', {k}':o for k,o in unlike.items()}
    rows = [row(how, *o) for how,kind in kinds.items() for o in foreseen(**kind)]
    return Markdown(table(head, rows)+'\n\n'+made_by(read('waits'), (
        "*Products*: milliseconds of the matrix products with the model's weights, at the rate that this GPU reaches "
        'in a large product; no step in 16 bits can be faster. Steps are those of the tables above and below. *Host*: '
        'we think that the host sets the pace. The rates of products, copies and unpacking were measured')))

# -- seconds and bytes
best,same = 'ours, fold+compile+ahead','LoRA, compile+ahead'
def shape(name): return next(o for f in ('speed_gpu', 'speed_cpu') for o in read(f)['shapes'] if o['shape']==name)
def ratio(of, a, b, what='seconds'): return of['variants'][a][what]['median']/of['variants'][b][what]['median']
def share(x): return f'{x:.2f}' if x>0.05 else f'{x:.1%}'

def speed_targets():
    "What was wanted of a step, and what was measured"
    big,small = shape('7b'),shape('pico')
    rows = [('**`recommended`**: time of a step, over that of the fastest other library', 0.75,
             max(beside('recommended'))),
            ('`recommended`, seconds to the same held-out loss (steps times seconds), over the same', 0.75,
             max(beside_to_loss('recommended'))),
            ('`recommended`, peak memory, over the least of the other libraries', 1.00,
             max(beside('recommended', least, 'peak'))),
            ('*LoRA, fast*, the same', 1.00, max(beside('LoRA, fast', least, 'peak'))),
            ("*LoRA* with products in 8 bits (8B shape, long rows): time of a step, over Unsloth's", 0.75,
             beside('LoRA, fp8', 'Unsloth, rows')[-1]),
            ("`recommended` with checkpointing (long rows): time of a step, over Unsloth's", 0.75,
             max(of_unsloth('with checkpointing', 'recommended'))),
            ("its peak memory then, over Unsloth's", 1.00,
             max(of_unsloth('with checkpointing', 'recommended', 'peak'))),
            ("`recommended`, time of a step, over that of PEFT", 0.30, max(beside('recommended', 'PEFT'))),
            *((f"{name} on four GPUs with DDP (8B shape, {o} rows): tokens a second, over four times one's", -0.95,
               -on_gpus(k, n=4, rows=o)['of_linear']) for k,name,o in (
                   ('recommended', '`recommended`', 'long'), ('LoRA, fast', '*LoRA, fast*', 'long'),
                   ('LoRA, fast', '*LoRA, fast*', 'short'))),
            ("**`depth`, 7B shape**: seconds a step, over those of LoRA with the same optimisations", 0.60,
             ratio(big, best, same)),
            ("its peak memory of activations with a budget, over that of LoRA without optimisations", 0.30,
             ratio(big, best+', budget', 'LoRA', 'peak')),
            ('the same, over that of LoRA with the same optimisations', 0.40,
             ratio(big, best+', budget', same, 'peak')),
            ('its seconds a step with checkpointing, over those of LoRA with it, without optimisations', 0.55,
             ratio(big, best+', checkpointing', 'LoRA, checkpointing')),
            ('share of its time that scoring layers takes', 0.03, big['variants'][best]['share']['median']),
            ("**pico on a CPU**: seconds a step, over LoRA's", 0.60, ratio(small, 'ours, fold', 'LoRA'))]
    def verdict(goal, got): return share(abs(got)),'reached' if got<=goal else f'**missed** by {got-goal:.2f}'
    return Markdown(table(['what', 'wanted', 'measured', 'verdict'], [ # below zero: at least so much
        (n, f"{'≤' if g>0 else '≥'}\u00a0{share(abs(g))}", *verdict(g, x)) for n,g,x in rows]))

def between(d, scale=1., digits=3):
    "Median, and in brackets the least and the most, where they differ"
    f = lambda k: f'{d[k]*scale:.{digits}f}'
    return f('median') if f('min')==f('max') else f"{f('median')} ({f('min')}\u2060–\u2060{f('max')})"

def speed_variants(name):
    "Every variant of a shape: seconds, memory, what arithmetic foresees"
    of,res = shape(name),read('speed_cpu' if name=='pico' else 'speed_gpu')
    gpu,rows = same in of['variants'],[]
    for k,o in of['variants'].items():
        seconds = [between(o['seconds']), f"{ratio(of, k, 'LoRA'):.2f}",
                   *([f'{ratio(of, k, same):.2f}'] if gpu else [])]
        memory = [between(o['peak'], 2**-30, 1)] if gpu else []
        foreseen = '; '.join(f'{x:.2f}' for x in of['estimate'].get(k, [])[:2 if gpu else 1])
        rows.append([k, *seconds, *memory, foreseen, f"{o['depth']['median']:.2f}", f"{o['share']['median']:.1%}"])
    head = ['variant', 'seconds a step', '÷ LoRA', *(['÷ LoRA, same optimisations', 'peak, GiB'] if gpu else []),
            'estimate', 'depth', 'scoring']
    said = ("*÷ LoRA* divides the median time by that of plain LoRA"
            +(f", *÷ LoRA, same optimisations* by that of *{same}*. *Peak* is the largest memory "
              'above the weights' if gpu else '')+'. *Estimate* is what '
            f"[arithmetic alone](../../benchmarks/estimate.py) predicts for time{' and memory'*gpu}, divided by LoRA's."
            ' *Depth* is the share of the blocks that the backward pass goes through, *scoring* the share of the time '
            'that scoring layers takes. Brackets hold the smallest and the largest of the runs.')
    shown = (f"{name}: {of['parameters']/1e6:,.0f} million parameters, adapters included, {of['batch']} rows of "
             f"{of['length']} tokens, LoRA r=32 on q, k, v, up, down, dropout 0.05")
    return Markdown('\n\n'.join([said, table(head, rows), made_by(res, shown)]))

def speed_floor():
    "Bars of what a step takes, and of its matrix products alone"
    import matplotlib.pyplot as plt
    from ist_nb.plot import palette,style
    of = shape('7b')
    v,floor,names = of['variants'],of['floors']['forward_seconds'],list(of['variants'])[::-1]
    with style():
        fig,ax = plt.subplots(figsize=(7.5, 0.33*len(names)+0.9))
        passes = lambda k: 1+v[k]['depth']['median']*(1+('checkpointing' in k))
        ax.barh(names, [v[k]['seconds']['median'] for k in names], color='#BBBBBB', label='measured')
        ax.barh(names, [floor*passes(k) for k in names], color=palette['blue'], height=0.45,
                label='matrix products alone, in 16 bits, at the measured rate')
        ax.set(xlabel='seconds a step', title='Products are the floor; optimisations work on the rest')
        ax.legend(frameon=False, loc='upper right', bbox_to_anchor=(1, 0.5))

def speed_floor_said():
    of = shape('7b')
    f,b = of['floors']['forward_seconds'],of['variants'][best]
    low,took = f*(1+b['depth']['median']),b['seconds']['median']
    return Markdown(
        f"This GPU computes a large 16-bit product at {of['matrix_flops']/1e12:.0f} TFLOP/s and copies "
        f"{of['copy_bytes']/1e12:.1f} TB/s. At that rate the products of one forward pass take {f:.3f} s, so a step of "
        f"depth {b['depth']['median']:.2f} cannot take less than {low:.3f} s in 16 bits. It takes {took:.3f} s, "
        f"{took/low:.1f} times as long. A block must keep at least {of['floors']['block_bytes']/2**20:.0f} MiB for its "
        "backward pass.")

def speed_changes():
    "The effect of each optimisation: the ratio of two rows that differ in nothing else"
    steps = [('Depth: where the backward pass stops', 'ours', 'RST', 'Uniform drawing goes through nine tenths of the '
              'blocks to train a quarter of them. Drawing where the pass stops makes depth equal the trained share.'),
             ('Folding', 'ours, fold', 'ours', 'The adapters of frozen layers cost as much as trained ones, dropout '
              'included, until they are part of the weight.'),
             ('Compiling each block', 'ours, fold+compile', 'ours, fold',
              'Norms, rotations, gates and sums between the products are fused.'),
             ('A host that runs ahead', best, 'ours, fold+compile',
              'Otherwise the Trainer waits for the GPU twice a step, and then the GPU waits for the Trainer.'),
             ("Liger's fused loss", best+'+liger', best, 'The logits are never formed, which saves memory, but the '
              'tokens are counted and waited for, which costs time.'),
             ('Products in 8 bits', best+'+fp8', best,
              'Not faster here: the products take half the time, but the casts give the host more to queue. The '
              'rounds overlap.'),
             ('Activation budget', best+', budget', best, 'Only the deep steps compute some blocks twice.')]
    of = shape('7b')
    rows = [(f'**{n}**', f'{a} / {b}', f'{ratio(of, a, b):.2f}', f"{ratio(of, a, b, 'peak'):.2f}", why)
            for n,a,b,why in steps]
    return Markdown(table(['optimisation', 'rows compared', 'seconds', 'peak memory', '<span class="wide">why</span>'],
                          rows))

def speed_profile():
    of = shape('7b')
    floor = of['floors']['forward_seconds']*1.25e3
    rows = [(k or 'none', f"{o['host']:.0f}", f"{o['whole']:.0f}", f"{o['gpu']:.0f}", f"{o['launches']:,}",
             f'{floor:.0f}') for k,o in of['profile'].items()]
    return Markdown(table(['optimisations', 'host, ms:', 'whole step, ms:', 'kernels on the GPU, ms:',
                           'number of kernels:',
                           'products at the measured rate, ms:'], rows))

def speed_losses(name, res=None):
    res = res or read('speed_quality')
    return {r['seed']:r['loss'] for r in res['runs'] if r['method']==name and r['lr']==res['best_lr'][name]}
def speed_difference(a, b): return mean_difference(speed_losses(a), speed_losses(b), digits=4)

def speed_quality():
    "Held-out loss after the same steps"
    res,rows = read('speed_quality'),[]
    for m,lr in res['best_lr'].items():
        runs = [r for r in res['runs'] if r['method']==m and r['lr']==lr]
        mean = lambda k: statistics.mean(r[k] for r in runs)
        rows.append((m, f'{lr:g}', f"{mean('depth'):.2f}", f"{mean('active'):.1f}", f"{mean('loss'):.4f}",
                     '' if m=='RST' else speed_difference(m, 'RST'), '' if m=='LoRA' else speed_difference(m, 'LoRA')))
    said = (f"{res['steps']} steps of {res['batch']} rows of {res['length']} tokens, {len(speed_losses('RST'))} seeds, "
            'mean difference ± half of its 95% interval. 8-bit products are emulated: rounded as on the GPU, computed '
            'on the CPU')
    head = ['method', 'learning rate', 'depth', 'layers a step', 'held-out loss, nats', 'minus RST', 'minus LoRA']
    return Markdown(table(head, rows)+'\n\n'+made_by(res, said))

# -- models and PEFT's methods
def models():
    res = read('models')
    rows = [(r['model'], r['cls'], ' and '.join(f'`{o}`' for o in r['stacks']), r['outside'] or '')
            for r in res['rows']]
    return Markdown(table(['model', 'class', 'stack of blocks', 'adapter parameters outside'],
                          rows)+'\n\n'+made_by(res))

def why_no_merge(s):
    "In PEFT's words, cut to a clause"
    none = 'PEFT has no merging for it'
    s = none if s=='NotImplementedError' or 'has no attribute' in s else s
    return s.split(': ')[0].split('. ')[0].rstrip('.').replace('This method is not supported for Lily', none)

def peft_table(rows, notes):
    "Methods that work, with footnotes"
    def row(r):
        shared = f"{r['shared']} shared parameter{'s'*(r['shared']>1)}" if r['shared'] else ''
        outside = f"{r['outside']} parameters outside of the layers" if r['outside'] else ''
        why = '' if r['merges'] is None or r['loads'] else why_no_merge(r['merges'])
        mark = f"[^{r['method'].replace(' ', '-')}]" if r['method'] in notes or r['loads'] else ''
        yes = lambda k: 'yes' if r[k] is None else 'no'
        return (r['method']+mark, r['form'], f"{r['response']:.2g}", yes('loads'), yes('merges'),
                '; '.join(o for o in (shared, outside, why) if o))
    def note(r):
        said = notes.get(r['method']), r['loads'], r['merges'] if r['loads'] else None
        return f"[^{r['method'].replace(' ', '-')}]: " + ' '.join(o for o in said if o)
    head = ['method', 'suppressed by', 'response', 'saves and loads', 'merges', 'remarks']
    return '\n\n'.join([table(head, map(row, rows)), *(note(r) for r in rows if r['method'] in notes or r['loads'])])

def peft_of(status): return [r for r in read('peft_methods')['rows'] if r['status']==status]
def peft_supported():
    res = read('peft_methods')
    return Markdown(peft_table(peft_of('supported'), res['notes'])+'\n\n'+made_by(res))
def peft_variants(): return Markdown(peft_table(read('peft_methods')['variants'], {}))
def peft_refused():
    return Markdown(table(['method', 'what IST says'],
                          [(r['method'], r['reason'].split(' Use a method')[0]) for r in peft_of('refused')]))
def peft_on_gpu():
    gpu,res = read('gpu'),read('peft_methods')
    same = all(gpu['methods'][r['method']]==r['status'] for r in res['rows']+res['variants'])
    return Markdown(made_by(gpu, 'Every outcome is the same as above' if same else '**Not all outcomes are as above**'))

# -- what runs survive
def reliability_counts():
    "Faults, kills and hostile inputs, and what was lost"
    res,long = read('reliability'),read('long_run')
    faults,kills,fuzz = res['faults'],res['kills'].values(),res['fuzz']
    def cases(res):
        *few,last = map(str, sorted({o['processes'] for o in res['cases']}))
        bad = sum(not o['ok'] for o in res['cases'])
        return f"{len(res['cases'])}, on {', '.join(few)} and {last} processes" + (f'; {bad} open' if bad else '')
    gpus = read('processes_gpu')
    lost = faults['lost']+sum(o['lost'] for o in kills)+fuzz['crashes']+fuzz['hangs']
    rows = [('faults injected', faults['injected']), ('faults survived', faults['survived']),
            ('runs killed (SIGKILL)', sum(o['killed'] for o in kills)),
            ('of these, ended bit for bit as if never killed', sum(o['exact'] for o in kills)),
            ('damaged inputs read', f"{fuzz['inputs']:,}"), ('crashes, hangs', f"{fuzz['crashes']}, {fuzz['hangs']}"),
            ('[cases on several processes](../reference/processes.ipynb)', cases(read('processes'))),
            (f"the same on {gpus['hardware']}", cases(gpus)), ('steps of the long run', f"{long['steps']:,}"),
            ('**lost**', f'**{lost}**')]
    v = res['versions']
    return Markdown(table(['what', 'how many'], rows)+f"\n\n{res['hardware']}; torch {v['torch']}, transformers "
                    f"{v['transformers']}, trl {v['trl']}, accelerate {v['accelerate']}, Python {v['python']}.")

def reliability_faults():
    rows = read('reliability')['faults']['rows']
    return Markdown(table(['what happens', 'what the run does', 'outcome'],
                          [(r['fault'], r['answer'], r['outcome']) for r in rows]))

def reliability_kills():
    "Each kill: where, what was left, how it ended"
    def where(p): return 'at any time' if p[0]=='clock' else f"step {p[0]}, {p[1].replace('_', ' ')}"
    def row(p):
        return where(p['point']),', '.join(p['left']) or 'nothing','yes' if p['ok'] else 'NO: '+', '.join(p['differs'])
    head = ['killed', 'left behind', 'ended as if never killed']
    parts = [f"**{name}**: {o['killed']} killed, {o['exact']} exact\n\n{table(head, map(row, o['points']))}"
             for name,o in read('reliability')['kills'].items()]
    return Markdown('\n\n'.join(parts))

def reliability_fuzz():
    fuzz = read('reliability')['fuzz']
    names = dict(state='`IST.load_state_dict`', config='`ISTConfig.from_dict`', gz='data, .jsonl.gz')
    rows = [(names.get(k, f'data, .{k}'), *(f'{o[n]:,}' for n in ('tried', 'accepted', 'refused')))
            for k,o in fuzz['targets'].items()]
    grew = f"The memory of the process grew by at most {fuzz['peak_growth_bytes']/2**20:.0f} MiB meanwhile."
    return Markdown(table(['read by', 'inputs:', 'accepted:', 'refused:'], rows)+'\n\n'+grew)

def reliability_hostile():
    "Good answers by kind of input, in the version before and in this one"
    res = read('hostile')
    kinds = dict(flag='settings on the command line', data='data files', config='YAML files',
                 state='checkpoints and old results', security='model folders, templates, files that would do harm',
                 evaluate='`ist_evaluate`')
    passes,limits = [o for o in ('before', 'after') if o in res],res['limits']
    def faulty(k):
        bad = {o:n for o,n in res[passes[-1]][k]['outcomes'].items() if o not in ('sentence', 'ran')}
        return ', '.join(f'{n} {o}' for o,n in bad.items()) or 'none'
    of = lambda rows: f"{sum(o['good'] for o in rows)} of {sum(o['cases'] for o in rows)}"
    rows = [(what, *(of([res[p][k]]) for p in passes), faulty(k)) for k,what in kinds.items()]
    rows.append(('**all**', *(f'**{of(res[p].values())}**' for p in passes), ''))
    head = ['inputs', *(f'good answers, {p}' for p in passes), f'faults {passes[-1]}']
    return Markdown(table(head,
                          rows)+f"\n\n(Limits: {limits['seconds']} s and {limits['bytes']/1e9:.0f} GB for each input. "
                    f"{res['hardware']}. Made by `{res['command']}`.)")

def reliability_mutants():
    "How many planted faults the tests see"
    rows = read('mutants')['rows']
    def count(of): return len(of),sum(r['outcome']=='killed' for r in of)
    by = {m:[r for r in rows if r['module']==m] for m in dict.fromkeys(r['module'] for r in rows)}
    alive = '; '.join(f"`{r['module']}`: {r['about']}" for r in rows if r['outcome']!='killed')
    text = table(['module', 'faults:', 'seen by a test:'], [*((f'`{m}`', *count(o)) for m,o in by.items()),
        ('**all**', *count(rows))])
    return Markdown(text+'\n\n'+(f'Survived: {alive}. ' if alive else '')+'(Made by `python -m benchmarks mutants`, '
                    'and after a change again for the modules that it touched.)')

def reliability_long_run():
    l = read('long_run')
    blocks = [a/b for a,b in zip(l['block_ms'], l['block_fixed_ms'])][l['warm']//l['block']:]
    sizes,n = list(l['checkpoint_bytes'].values()),f"{l['block']:,}"
    rows = [('steps', f"{l['steps']:,}"),
            (f"memory of the process, from step {l['warm']:,} to the end", f"{100*l['rss_growth']:+.2f}%"),
            ('importance updates made, records kept',
             f"{l['importance_updates']:,}, {l['history_records']} (at most {l['history_limit']})"),
            ('size of a checkpoint, largest and at the end', f'{max(sizes)/1024:.0f} KiB, {sizes[-1]/1024:.0f} KiB'),
            (f'a step in units of the fixed work, first {n} after warming up', f"{l['first_steps']:.3f}"),
            (f'the same, last {n}', f"{l['last_steps']:.3f} ({100*l['slower']:+.1f}%)"),
            (f'the same, least and most of any {n} between', f'{min(blocks):.3f}, {max(blocks):.3f}'),
            (f'processor time alone, first and last {n}', f"{l['first_ms']:.2f} ms, {l['last_ms']:.2f} ms "
             f"({100*(l['last_ms']/l['first_ms']-1):+.1f}%)")]
    return Markdown(table(['what', 'measured'], rows)+f"\n\n{l['hardware']}, torch {l['versions']['torch']}.")

def reliability_long_runs_tried():
    percent = lambda x: 'not measured' if x is None else f'{100*x:+.1f}%'
    rows = [(r['machine'], *(percent(r[k]) for k in ('slower', 'slower_raw', 'rss_growth')))
            for r in read('long_run_tried')['runs']]
    return Markdown(table(['machine', 'last steps against first, in fixed work', 'processor time alone', 'memory'],
                          rows))

# -- the log
def gain_table():
    "How harm, gain and the importance of scorers agree"
    res = read('gain')
    t,n = res['table'],sum(len(r['points']) for r in res['runs'])
    rows = [('harm of leaving it out', '', f"{t['harm_gain']:+.2f}")]
    rows += [(f'importance, {k}', f"{t[k]['harm']:+.2f}", f"{t[k]['gain']:+.2f}") for k in res['settings']]
    said = (f"Rank correlation over the 16 layers, mean of {n} points: steps {', '.join(map(str, res['at']))} of "
            f"{len(res['runs'])} seeds; {res['steps_alone']} steps alone")
    return Markdown(table(['ranking of the layers by', 'against the harm of leaving a layer out',
                           'against the gain of training it alone'], rows)+'\n\n'+made_by(res, said))

def gain_of_the_best():
    "Gains of the best quarter of the layers over the mean gain: by step, one number for each seed"
    res = read('gain')
    def best_quarter(p): return sum(sorted(p['gain'])[-4:])/4/(sum(p['gain'])/16)
    return {s:[best_quarter(p) for r in res['runs'] for p in r['points'] if p['step']==s] for s in res['at']}
def gain_of_the_best_table():
    rows = [(s, f'{statistics.mean(m):.2f} ({min(m):.2f} to {max(m):.2f})') for s,m in gain_of_the_best().items()]
    return Markdown(table(['step', 'gain of the best quarter of the layers, over that of the average layer'], rows))
