"A newcomer's way, timed: from an empty folder by the lines of the home page to the reason why a layer was trained in the newcomer's own run"
import json,os,platform,re,subprocess,sys,tempfile,time
from pathlib import Path
from fastcore.script import call_parse

root = Path(__file__).resolve().parent.parent
site = 'nbs/index.ipynb','nbs/tutorials/quickstart.ipynb'      # the pages on the way
speed = 230                                                     # words a minute: silent reading of English, an assumption

def text(page): return '\n\n'.join(''.join(c['source']) for c in json.loads((root/page).read_text())['cells'] if c['cell_type']=='markdown')
def blocks(page, kind, has): return next(o for o in re.findall(rf'```{kind}\n(.*?)```', text(page), re.S) if has in o)
def commands():
    "What the home page tells a newcomer to run, one command each"
    return [o for line in blocks(site[0], 'sh', 'git clone').splitlines() for o in line.split(' && ')]
def explanation():
    "The lines that the quickstart tells a newcomer to copy"
    return blocks(site[1], 'python', 'ist_state.json')
def words(page): return len(re.findall(r'[^\W\d_][\w\'’-]*', re.sub(r'```.*?```|\]\([^)]*\)|https?://\S+', ' ', text(page), flags=re.S)))

def check(said, run):
    "Raise unless what was `said` gives a layer's importance, probability and count, as they are in the folder of the `run`"
    import torch
    res,state = (json.loads((run/o).read_text()) for o in ('results.json', 'ist_state.json'))
    layer,times,t,I = re.search(r'Layer (\d+) was trained in (\d+) of (\d+) steps\. Its importance at the end is ([+-][\d.]+)', said).groups()
    p,chance = map(float, re.search(r'with probability ([\d.]+); by chance alone it would be ([\d.]+)\.', said).groups())
    i,n,N = int(layer),sum(res['times_active'])//res['steps'],len(res['importance'])
    assert (int(times), int(t))==(res['times_active'][i], res['steps']), said
    assert abs(float(I)-res['importance'][i])<=0.0051 and abs(chance-n/N)<=0.0051, said
    # the probability, another way: draw very often
    weights = torch.sigmoid(torch.tensor(res['importance'])).expand(200_000, N)
    drawn = (torch.multinomial(weights, n, generator=torch.Generator().manual_seed(0))==i).any(1).double().mean().item()
    explore = state['config']['explore']
    assert abs(p-((1-explore)*drawn+explore*n/N))<0.01, (p, drawn)
    assert said.count('loss with a set suppressed that is')==len(state['history'])>0, said
    return dict(layer=i, trained=int(times), steps=int(t), importance=float(I), probability=p, by_chance=chance, updates=len(state['history']))

@call_parse
def main(
    torch:str=None, # The torch to install first, such as 'torch==2.13.0': stands for the home page's line for machines without a GPU. Whatever `pip install .` takes if not given
    out:Path=Path(__file__).parent/'results'/'newcomer.json', # Where the numbers go
):
    cmds,load = commands(),[os.getloadavg()[0]]
    if torch: cmds.insert(next(i for i,o in enumerate(cmds) if o.startswith('pip install')), f"pip install '{torch}'")
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        (d/'home').mkdir(); (d/'empty').mkdir()
        (d/'why.py').write_text(explanation())
        cmds.append('python why.py')
        # the address of the home page becomes this checkout, and the lines to copy lie where the newcomer would have put them
        ran = [re.sub(r'^git clone \S+', f'git clone -q {root} ist_nb', o).replace('why.py', str(d/'why.py')) for o in cmds]
        lines = [f'{o} > {d/f"out{i}"} 2>&1\necho "$EPOCHREALTIME" >> {d/"times"}' for i,o in enumerate(ran)]
        mine = re.compile('PYTHON|VIRTUAL_ENV|OMP_|MKL_|MPL|HF_|TRANSFORMERS_|TOKENIZERS_')        # a newcomer has set none of these
        env = {k:v for k,v in os.environ.items() if not mine.match(k)} | dict(HOME=str(d/'home'), PIP_DISABLE_PIP_VERSION_CHECK='1', LC_ALL='C.UTF-8')
        start = time.time()
        rc = subprocess.run(['bash', '-e', '-c', '\n'.join(lines)], cwd=d/'empty', env=env).returncode
        load.append(os.getloadavg()[0])
        ends = [float(o) for o in (d/'times').read_text().split()] if (d/'times').exists() else []
        if rc: sys.exit(f'{cmds[len(ends)]!r} failed:\n' + (d/f'out{len(ends)}').read_text()[-3000:])
        said = (d/f'out{len(cmds)-1}').read_text()
        found = check(said, d/'empty'/'ist_nb'/'runs'/'pico-physics-ist')
        venv = d/'empty'/'ist_nb'/'.venv'/'bin'/'python'
        versions = json.loads(subprocess.run([venv, '-c', "import json;from importlib.metadata import version as v;print(json.dumps({o:v(o) for o in 'ist_nb torch transformers peft trl accelerate pip'.split()}))"], capture_output=True, text=True, check=True).stdout)
    stages = [dict(command=c, seconds=round(b-a, 2)) for c,a,b in zip(cmds, [start, *ends], ends)]
    n = {p:words(p) for p in site}
    res = dict(what="A newcomer's way: the lines of the home page in an empty folder with an empty home, then the lines that the quickstart gives to ask the run. The clone is of this checkout, not over a network; pip has no cache",
        command=' '.join(['python benchmarks/newcomer.py', *(f"'{o}'" if '=' in o else o for o in sys.argv[1:])]), hardware=f'{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}',
        load=f'load average {load[0]:.1f} before and {load[1]:.1f} after' + (', beside other work' if load[0]>0.5 else ''), versions={'python':platform.python_version()} | versions,
        seconds=round(ends[-1]-start, 1), stages=stages, explanation=found, lines=explanation().splitlines(), said=said.splitlines(),
        reading=dict(what='an estimate, not a measurement: words outside of code', pages=n, words=sum(n.values()), words_per_minute=speed, minutes=round(sum(n.values())/speed, 1)))
    out.write_text(json.dumps(res, indent=1)+'\n')
    print(json.dumps({k:res[k] for k in ('seconds', 'stages', 'explanation', 'reading', 'load')}, indent=1))
