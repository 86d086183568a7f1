"What the home page tells a newcomer to run, timed, from an empty folder to why a layer of that run was trained"
import json,os,re,subprocess,sys,tempfile,time
from pathlib import Path
from benchmarks import record
from benchmarks.record import root

site = 'nbs/index.ipynb','nbs/tutorials/quickstart.ipynb'      # the pages on the way
speed = 230   # words a minute: silent reading of English, an assumption

def text(page):
    cells = json.loads((root/page).read_text())['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')
def blocks(page, kind, has): return next(o for o in re.findall(rf'```{kind}\n(.*?)```', text(page), re.S) if has in o)
def commands():
    "What the home page tells a newcomer to run, one command each"
    return [o for line in blocks(site[0], 'sh', 'git clone').splitlines() for o in line.split(' && ')]
def explanation():
    "The cell and the lines that the quickstart tells a newcomer to copy"
    cells = json.loads((root/site[1]).read_text())['cells']
    why = next(''.join(c['source']) for c in cells if c['cell_type']=='code' and 'def why(' in ''.join(c['source']))
    return f"{why}\n\n{blocks(site[1], 'python', 'ist_state.json')}"
def words(page):
    prose = re.sub(r'```.*?```|\]\([^)]*\)|https?://\S+', ' ', text(page), flags=re.S)
    return len(re.findall(r'[^\W\d_][\w\'’-]*', prose))

def check(said, run):
    "Raise unless a layer's importance, probability and count in what was `said` are those in the folder of the `run`"
    import torch
    res,state = (json.loads((run/o).read_text()) for o in ('results.json', 'ist_state.json'))
    trained = r'Layer (\d+) was trained in (\d+) of (\d+) steps\. Its importance at the end is ([+-][\d.]+)'
    by_chance = r'with probability ([\d.]+); by chance alone it would be ([\d.]+)\.'
    layer,times,t,I = re.search(trained, said).groups()
    p,chance = map(float, re.search(by_chance, said).groups())
    i,n,N = int(layer),sum(res['times_active'])//res['steps'],len(res['importance'])
    assert (int(times), int(t))==(res['times_active'][i], res['steps']), said
    assert abs(float(I)-res['importance'][i])<=0.0051 and abs(chance-n/N)<=0.0051, said
    # the probability, another way: draw very often
    weights = torch.sigmoid(torch.tensor(res['importance'])).expand(200_000, N)
    drawn = (torch.multinomial(weights, n, generator=torch.Generator().manual_seed(0))==i).any(1).double().mean().item()
    explore = state['config']['explore']
    assert abs(p-((1-explore)*drawn+explore*n/N))<0.01, (p, drawn)
    assert len(re.findall(r'^ *\d+   .*[+-]\d\.\d\d$', said, re.M))==len(state['history'])>0, said
    return dict(layer=i, trained=int(times), steps=int(t), importance=float(I), probability=p, by_chance=chance,
                updates=len(state['history']))

def environment(home):
    "What a newcomer has set: nothing of ours"
    ours = re.compile('PYTHON|VIRTUAL_ENV|OMP_|MKL_|MPL|HF_|TRANSFORMERS_|TOKENIZERS_')
    env = {k:v for k,v in os.environ.items() if not ours.match(k)}
    return env | dict(HOME=str(home), PIP_DISABLE_PIP_VERSION_CHECK='1', LC_ALL='C.UTF-8')

def versions_in(python):
    "Of the environment that the newcomer made"
    code = ("import json;from importlib.metadata import version as v;"
            "print(json.dumps({o:v(o) for o in 'ist_nb torch transformers peft trl accelerate pip'.split()}))")
    return json.loads(subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout)

def main(
    torch:str=None, # Installed first, such as 'torch==2.13.0': the home page's line for machines without a GPU
    out:Path='newcomer', # Where the numbers go
):
    cmds,load = commands(),[os.getloadavg()[0]]
    if torch: cmds.insert(next(i for i,o in enumerate(cmds) if o.startswith('pip install')), f"pip install '{torch}'")
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for o in ('home', 'empty'): (d/o).mkdir()
        (d/'why.py').write_text(explanation())
        cmds.append('python why.py')
        # the home page's address becomes this checkout; the lines to copy lie where the newcomer would have put them
        here = f'git clone -q {root} ist_nb'
        ran = [re.sub(r'^git clone \S+', here, o).replace('why.py', str(d/'why.py')) for o in cmds]
        lines = [f'{o} > {d/f"out{i}"} 2>&1\necho "$EPOCHREALTIME" >> {d/"times"}' for i,o in enumerate(ran)]
        start = time.time()
        rc = subprocess.run(['bash', '-e', '-c', '\n'.join(lines)], cwd=d/'empty', env=environment(d/'home')).returncode
        load.append(os.getloadavg()[0])
        ends = [float(o) for o in (d/'times').read_text().split()] if (d/'times').exists() else []
        if rc: sys.exit(f'{cmds[len(ends)]!r} failed:\n' + (d/f'out{len(ends)}').read_text()[-3000:])
        said = (d/f'out{len(cmds)-1}').read_text()
        found = check(said, d/'empty'/'ist_nb'/'runs'/'pico-physics-ist')
        versions = versions_in(d/'empty'/'ist_nb'/'.venv'/'bin'/'python')
    stages = [dict(command=c, seconds=round(b-a, 2)) for c,a,b in zip(cmds, [start, *ends], ends)]
    n = {p:words(p) for p in site}
    what = ("A newcomer's way: the lines of the home page in an empty folder with an empty home, then the lines that "
            "the quickstart gives to ask the run. The clone is of this checkout, not over a network; pip has no cache")
    head = record.about(what)
    head['versions'] |= versions
    beside = ', beside other work' if load[0]>0.5 else ''
    record.save(out, head, load=f'load average {load[0]:.1f} before and {load[1]:.1f} after{beside}',
                seconds=round(ends[-1]-start, 1), stages=stages, explanation=found, lines=explanation().splitlines(),
                said=said.splitlines(),
                reading=dict(what='an estimate, not a measurement: words outside of code', pages=n,
                             words=sum(n.values()), words_per_minute=speed, minutes=round(sum(n.values())/speed, 1)))
    print(f'{ends[-1]-start:.0f} s', *(f"{o['seconds']:6.1f} s  {o['command']}" for o in stages), sep='\n')
