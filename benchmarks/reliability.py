"""Make happen what can happen to a run, and count what was lost: results/reliability.json, from which nbs/results/reliability.ipynb is made.
`python benchmarks/reliability.py` does all of it, which takes a quarter of an hour; `faults`, `kills` or `fuzz` after it do that part anew and keep the others"""
import json,os,platform,subprocess,sys,tempfile,time
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

root = Path(__file__).resolve().parent.parent
out = root/'benchmarks'/'results'/'reliability.json'
n_kills,n_accelerate,n_fuzz = 20,8,100_000

def environment():
    return dict(versions={'python':platform.python_version()}|{o:version(o) for o in 'torch transformers peft trl accelerate datasets hypothesis'.split()}, hardware=f'{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}, one thread')

def faults():
    "Run the tests of faults; what each injects, how the run answers, and whether it did"
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-n0', '-m', 'slow or not slow', f'--junitxml={d}/r.xml', 'tests/test_faults.py'], cwd=root, env=os.environ | dict(OMP_NUM_THREADS='1'))
        cases = ET.parse(f'{d}/r.xml').getroot().iter('testcase')
        rows = []
        for c in cases:
            props = {p.get('name'):p.get('value') for p in c.iter('property')}
            if 'fault' not in props: continue
            outcome = 'skipped' if c.find('skipped') is not None else 'lost' if c.find('failure') is not None or c.find('error') is not None else 'survived'
            rows.append(dict(fault=props['fault'], answer=props['answer'], test=c.get('name'), outcome=outcome))
    return dict(rows=rows, injected=sum(r['outcome']!='skipped' for r in rows), **{o:sum(r['outcome']==o for r in rows) for o in ('survived', 'lost', 'skipped')})

def kills():
    "Kill runs of the Trainer and of a loop with accelerate; where, and whether they ended as if they had not been"
    import kill_points as kp
    ctx,res = kp.children(),{}
    with tempfile.TemporaryDirectory() as d:
        for name,f,where in (('Trainer', kp.train, kp.points(n_kills, seed=1)), ('accelerate', kp.accelerate_loop, kp.accelerate_points(n_accelerate, seed=1))):
            rows = kp.kill_points(ctx, f, where, Path(d)/name)
            res[name] = dict(points=rows, killed=sum(r['died'] for r in rows), exact=sum(r['ok'] for r in rows), lost=sum(not r['ok'] for r in rows))
    return res

def fuzz():
    import fuzz as fz
    return fz.fuzz(n_fuzz, seed_=1)

parts = dict(faults=faults, kills=kills, fuzz=fuzz)

if __name__=='__main__':
    if unknown := set(sys.argv[1:])-set(parts): sys.exit(f"{', '.join(unknown)}: the parts are {', '.join(parts)}")
    for name in sys.argv[1:] or parts:
        start,found = time.perf_counter(),parts[name]()
        res = json.loads(out.read_text()) if out.exists() else {}   # now, since another part may have been written meanwhile
        res |= dict(command='python benchmarks/reliability.py', **environment()) | {name:found}
        out.write_text(json.dumps(res, indent=1)+'\n')
        print(f'{name}: {time.perf_counter()-start:.0f} s', file=sys.stderr)
