"""The runs of the home page: `ist_finetune` as a newcomer types it, the same by four methods, and ARC-Easy.
ARC-Easy is part of the collection of LLM-Adapters: give its folder as --data, or in the environment as IST_NB_DATA;
without it that run stays in the file as it is."""
import json,os,subprocess,sys,tempfile
from pathlib import Path
from benchmarks import record

runs = {'default':'', 'ist':'--method ist', 'paper':'--method paper', 'rst':'--method rst', 'dense':'--method dense',
        'arc':'--method ist --data ARC-Easy/train.json --max_steps 40 --max_rows 600 --output_dir arc'}

def run(line, cwd):
    "What a command line of `ist_finetune` printed, and its results"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', COLUMNS='120')
    said = subprocess.run([sys.executable, '-m', 'ist_nb.finetune', *line.split()], cwd=cwd, env=env,
                          stdout=subprocess.PIPE, text=True, check=True).stdout
    made, = Path(cwd).rglob('results.json')
    return json.loads(made.read_text()) | dict(said=said.splitlines())

def main(
    only:str='', # Names of runs, separated by commas; the others stay as they are
    data:str=os.environ.get('IST_NB_DATA'), # The folder with commonsense/ARC-Easy
    out:Path='demo', # Where the numbers go
):
    found = record.read('demo')['runs']
    for k,line in runs.items():
        if only and k not in only.split(','): continue
        if k=='arc' and not data:
            print('arc is not made anew: give --data')
            continue
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as d:
            if k=='arc': (Path(d)/'ARC-Easy').symlink_to(Path(data).resolve()/'commonsense'/'ARC-Easy')
            found[k] = dict(command=f'ist_finetune {line}'.strip(), load=round(load, 1)) | run(line, d)
        print(f"{k}: {found[k]['loss_after']:.4f} in {found[k]['seconds']:.0f} s")
    what = ('ist_finetune without arguments, by four methods, and on ARC-Easy; one seed each. '
            '`load` is the load average before a run')
    record.save(out, record.about(what, threads=1), runs=found)
