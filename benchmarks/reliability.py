"""Inject faults, kill runs and read hostile files, and count what was lost.
All of it takes a quarter of an hour; `--only` does one part anew and keeps the others."""
import os,subprocess,sys,tempfile,time
import xml.etree.ElementTree as ET
from pathlib import Path
from benchmarks import record
from benchmarks import fuzz as fz
from benchmarks import kill_points as kp

def outcome_of(case):
    "Of a test, in the report of pytest"
    if case.find('skipped') is not None: return 'skipped'
    return 'survived' if case.find('failure') is None and case.find('error') is None else 'lost'

def faults():
    "Run the tests of faults: what each injects, how the run answers, and whether it did"
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-n0', '-m', 'slow or not slow', f'--junitxml={d}/r.xml',
                        'tests/test_faults.py'], cwd=record.root, env=os.environ | dict(OMP_NUM_THREADS='1'))
        rows = []
        for c in ET.parse(f'{d}/r.xml').getroot().iter('testcase'):
            props = {p.get('name'):p.get('value') for p in c.iter('property')}
            if 'fault' not in props: continue
            rows.append(dict(fault=props['fault'], answer=props['answer'], test=c.get('name'), outcome=outcome_of(c)))
    return dict(rows=rows, injected=sum(r['outcome']!='skipped' for r in rows),
                **{o:sum(r['outcome']==o for r in rows) for o in ('survived', 'lost', 'skipped')})

def kills(n=20, n_accelerate=8):
    "Kill runs of the Trainer and of a loop with accelerate: where, and whether they ended as if they had not been"
    ctx,res = kp.children(),{}
    runs = dict(Trainer=(kp.train, kp.points(n, seed=1)),
                accelerate=(kp.accelerate_loop, kp.accelerate_points(n_accelerate, seed=1)))
    with tempfile.TemporaryDirectory() as d:
        for name,(f,where) in runs.items():
            rows = kp.kill_points(ctx, f, where, Path(d)/name)
            res[name] = dict(points=rows, killed=sum(r['died'] for r in rows), exact=sum(r['ok'] for r in rows),
                             lost=sum(not r['ok'] for r in rows))
    return res

def fuzz(n=100_000): return fz.fuzz(n, seed_=1)

parts = dict(faults=faults, kills=kills, fuzz=fuzz)

def main(
    only:str='', # Parts separated by commas: faults, kills, fuzz; all if empty
    out:Path='reliability', # Where the numbers go
):
    todo = only.split(',') if only else list(parts)
    if unknown := set(todo)-set(parts): sys.exit(f"--only {', '.join(unknown)}: the parts are {', '.join(parts)}")
    for name in todo:
        start,found = time.perf_counter(),parts[name]()
        old = {k:v for k,v in record.read('reliability').items() if k in parts}   # another part may be newer by now
        head = record.about('faults injected, runs killed, hostile files read; what was lost',
                            'trl accelerate datasets hypothesis', threads=1)
        record.save(out, head, **old | {name:found})
        print(f'{name}: {time.perf_counter()-start:.0f} s', file=sys.stderr)
