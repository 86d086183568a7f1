"The one form in which benchmarks keep numbers: what was measured, by which command, when, on what, with which versions"
import json,os,platform,shlex,sys
from datetime import date
from importlib.metadata import PackageNotFoundError,version
from pathlib import Path

root = Path(__file__).resolve().parent.parent
results = root/'benchmarks'/'results'
always = 'torch', 'transformers', 'peft'

def versions(*packages):
    "Of Python, torch, transformers, peft and `packages`; one that is not installed is left out"
    res = dict(python=platform.python_version())
    for o in dict.fromkeys((*always, *packages)):
        try: res[o] = version(o)
        except PackageNotFoundError: pass
    return res

def hardware(threads=None, gpu=False):
    "The GPU, or the CPU with how many threads a run had"
    if gpu:
        import torch
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}" + (
        '' if threads is None else f", {threads} thread{'s'*(threads!=1)}")

def typed(**replaced):
    "The command as it was typed, without `--out`; values that name a folder of this machine are `replaced`"
    argv = sys.argv[1:]
    if '--out' in argv: del argv[(i := argv.index('--out')):i+2]
    argv = [{v:k for k,v in replaced.items()}.get(o, o) for o in argv]
    return shlex.join(['python', '-m', 'benchmarks', *argv])

def about(what, packages='', threads=None, gpu=False, on='', **replaced):
    "The head of a result: `what` in a sentence; `packages` beyond the usual; `on` adds to the hardware"
    return dict(what=what, command=typed(**replaced), date=date.today().isoformat(),
                hardware=hardware(threads, gpu)+on, versions=versions(*packages.split()))

def read(name): return json.loads((results/f'{name}.json').read_text())

def save(out, head, indent=1, **found):
    "Write one result: to results/`out`.json, or to the path `out`"
    path = Path(out) if str(out).endswith('.json') else results/f'{out}.json'
    path.write_text(json.dumps(head | found, indent=indent)+'\n')
    return path
