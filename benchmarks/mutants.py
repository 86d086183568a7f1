"""Do the tests see a fault? Each fault of faults.diff is put into a copy of the package, and a test must fail.
The package and the notebook of a fault's module are changed alike, since a notebook runs its own code. What saw a fault
last time is tried first. Faults whose text has moved are named, and not tried."""
import json,multiprocessing,os,re,shlex,shutil,signal,sys,tempfile,time
from collections import Counter,namedtuple
from functools import cache
from importlib import import_module
from pathlib import Path
from benchmarks import record
from benchmarks.record import root

Fault = namedtuple('Fault', 'module about old new')
# the tests that should see a module's faults, after the module's own notebook
tests = dict(
    config='ist', layers='core ist probes peft', suppression='probes speed', scorers='probes ist', samplers='speed ist',
    ist='steps core ist probes', probe='core steps probes', state='resume steps',
    callback='core logging ist', speed='speed', activations='memory',
    keep='keep', memory='memory', moments='memory', questions='evaluate', evaluate='evaluate', finetune='finetune')
def checks(module):
    return [notebook_of(module).stem, *(f'tests/test_{o}.py' for o in tests[module].split())]
def exists(check):
    path = check.split()[0] if check.startswith('tests/') else f'nbs/{check}.ipynb'
    return (root/path).exists()

def read_faults(text):
    "The faults of a text as in faults.diff"
    res,module = [],None
    for block in re.split(r'\n\s*\n', text.strip()):
        lines = block.splitlines()
        if lines[0].startswith('@@'): module = lines[0].strip('@ ')
        elif module:
            part = lambda sign: '\n'.join(l[1:] for l in lines[1:] if l[0]==sign)
            res.append(Fault(module, lines[0].removeprefix('# '), part('-'), part('+')))
    return res
faults = read_faults((Path(__file__).parent/'faults.diff').read_text())

def code(module): return (root/'ist_nb'/f'{module}.py').read_text()

def wrong(m):
    "What is wrong with a fault, such as that its text is not there once; None if nothing is"
    n = code(m.module).count(m.old)
    if n!=1: return f'{m.module}: {m.about}: the text is there {n} times: {m.old!r}'
    try: compile(code(m.module).replace(m.old, m.new), m.module, 'exec')
    except SyntaxError as e: return f'{m.module}: {m.about}: {e}'

def notebook_of(module):
    "The notebook that a module comes from"
    return (root/'ist_nb'/code(module).split('File to edit: ')[1].split('.ipynb')[0]).with_suffix('.ipynb')

def mutated(m, at):
    "A tree that looks like this one, with the fault in it; None: without one"
    for p in root.iterdir():
        if p.name not in ('ist_nb', 'nbs', '.git'): (at/p.name).symlink_to(p)
    shutil.copytree(root/'nbs', at/'nbs', ignore=shutil.ignore_patterns('.*', '_*docs', '_proc'))
    (at/'ist_nb').mkdir()
    for p in (root/'ist_nb').iterdir():
        if p.is_dir(): (at/'ist_nb'/p.name).symlink_to(p)
        elif p.suffix=='.py': shutil.copy2(p, at/'ist_nb')
    if m is None: return
    (at/'ist_nb'/f'{m.module}.py').write_text(code(m.module).replace(m.old, m.new))
    path = at/notebook_of(m.module).resolve().relative_to(root)
    nb,there = json.loads(path.read_text()),0
    for c in nb['cells']:
        source = ''.join(c['source'])
        if c['cell_type']!='code' or not source.startswith('#| export') or m.old not in source: continue
        c['source'],there = source.replace(m.old, m.new).splitlines(True),there+1
    assert there==1, f'{path.name} has {m.old!r} in {there} cells'
    path.write_text(json.dumps(nb))

def arguments(check):
    if check.startswith('tests/'): return shlex.split(check)
    return ['tests/test_nbs.py', '-k', f'test_notebook and {check}']

def run_check(at, check, log):
    "In a process of its own: exits with 0 where the check passes, with 1 where a test fails"
    os.setsid()     # a test that sends a signal to its group reaches nobody else
    fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.chdir(at)
    sys.path[:] = [str(at), *(o for o in sys.path if o and Path(o).resolve()!=root)]
    os.environ['PYTHONPATH'] = str(at)
    for o in [o for o in sys.modules if o.partition('.')[0]=='benchmarks']: del sys.modules[o]   # tests use the copy's
    import pytest
    status = int(pytest.main(['-n0', '-x', '-q', '-p', 'no:cacheprovider', *arguments(check)]))
    import ist_nb
    os._exit(status if Path(ist_nb.__file__).is_relative_to(at) else 9)

def outcome(m, check, seconds):
    "'passed', 'failed' or 'too long'; raises where nothing was tried"
    with tempfile.TemporaryDirectory() as d:
        at,log = Path(d)/'tree',Path(d)/'log'
        at.mkdir()
        mutated(m, at)
        p = multiprocessing.get_context('fork').Process(target=run_check, args=(at, check, log))
        p.start()
        p.join(seconds)
        if p.is_alive():
            os.killpg(p.pid, signal.SIGKILL)
            p.join()
            return 'too long'
        if p.exitcode in (0, 1, 2, 5): return 'failed' if p.exitcode in (1, 2) else 'passed'   # 5: no such test
        raise SystemExit(f'{check}, {m and m.about}: pytest ended with {p.exitcode}\n{log.read_text()[-3000:]}')

@cache
def sound(check, seconds):
    "A check that fails without a fault says nothing"
    if (what := outcome(None, check, seconds))!='passed': raise SystemExit(f'{check} without a fault: {what}')

def judged(m, seconds, before):
    "Whether a test sees a fault, and which"
    start = time.perf_counter()
    seen_by = before.get((m.module, m.about))
    todo = [o for o in dict.fromkeys([seen_by, *checks(m.module)]) if o and exists(o)]
    for tried,check in enumerate(todo, 1):
        sound(check, seconds)
        what = outcome(m, check, seconds)
        if what!='passed': break
    by = None if what=='passed' else check+(' (too long)' if what=='too long' else '')
    return m._asdict() | dict(outcome='killed' if by else 'survived', by=by, checks=tried,
                              seconds=round(time.perf_counter()-start, 1))

def main(
    only:str='', # Modules, separated by commas; the others stay in the file as they are
    seconds:int=600, # Most for one check
    stale:bool=False, # Only name the faults whose text has moved
    out:Path='mutants', # Where the outcomes go
):
    moved = [o for o in map(wrong, faults) if o]
    print(f'{len(moved)} of {len(faults)} faults cannot be planted; renew them in faults.diff', *moved, sep='\n')
    if stale: return
    chosen = [m for m in faults if wrong(m) is None and (not only or m.module in only.split(','))]
    for o in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'matplotlib'): import_module(o)   # before the forks
    assert not any(o=='ist_nb' or o.startswith('ist_nb.') for o in sys.modules)
    old = record.read('mutants')['rows']
    before,rows = {(o['module'], o['about']):(o['by'] or '').removesuffix(' (too long)') for o in old},[]
    for m in chosen:
        rows.append(r := judged(m, seconds, before))
        print(f"{r['outcome']:8} {r['seconds']:6.1f} s  {m.module}: {m.about} -- {r['by']}", flush=True)
    rows = [o for o in old if only and o['module'] not in only.split(',')]+rows
    counts = dict(Counter(r['outcome'] for r in rows))
    head = record.about('whether the tests see planted faults', 'pytest', threads=1)
    record.save(out, head, counts=counts, rows=rows)
    print(counts)
