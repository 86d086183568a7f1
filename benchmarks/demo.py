"""The runs of the home page: `ist_finetune` as a newcomer types it, the same by four methods, and ARC-Easy.
A model of the hub learns GSM8K's questions as chats, with the default and as plain LoRA. ARC-Easy and GSM8K are part of
the collection of LLM-Adapters: give its folder as --data, or in the environment as IST_NB_DATA, and the model as
--model; without them these runs stay in the file as they are."""
import json,os,subprocess,sys,tempfile
from pathlib import Path
from benchmarks import record

runs = {'default':'', 'ist':'--method ist', 'paper':'--method paper', 'rst':'--method rst', 'dense':'--method dense',
        'arc':'--method ist --data ARC-Easy/train.json --max_steps 40 --max_rows 600 --output_dir arc'}
chats = ('--model MODEL --data chats.jsonl --max_steps 24 --per_device_train_batch_size 2 '
         '--max_length 192 --learning_rate 1e-3')
runs |= {'hub':f'{chats} --output_dir hub', 'hub_dense':f'{chats} --method dense --output_dir plain'}

def write_chats(path, rows, n=400):
    "Questions and answers of GSM8K as chats"
    turns = lambda o: [dict(role='user', content=o['instruction']),
                       dict(role='assistant', content=o['output'].strip().removeprefix('A: '))]
    path.write_text(''.join(json.dumps(dict(messages=turns(o)))+'\n' for o in rows[:n]))

def run(line, cwd):
    "What a command line of `ist_finetune` printed, and its results"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', COLUMNS='120')
    said = subprocess.run([sys.executable, '-m', 'ist_nb.finetune', *line.split()], cwd=cwd, env=env,
                          stdout=subprocess.PIPE, text=True, check=True).stdout
    made, = Path(cwd).rglob('results.json')
    return json.loads(made.read_text()) | dict(said=said.splitlines())

def main(
    only:str='', # Names of runs, separated by commas; the others stay as they are
    data:str=os.environ.get('IST_NB_DATA'), # The folder with commonsense/ARC-Easy and math/gsm8k
    model:Path=None, # The folder of a chat model
    out:Path='demo', # Where the numbers go
):
    found = record.read('demo')['runs']
    for k,line in runs.items():
        if only and k not in only.split(','): continue
        hub = k.startswith('hub')
        if (k=='arc' or hub) and not data or hub and not model:
            print(f"{k} is not made anew: give --data{' and --model'*hub}")
            continue
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as d:
            sets = Path(data).resolve() if data else None
            if k=='arc': (Path(d)/'ARC-Easy').symlink_to(sets/'commonsense'/'ARC-Easy')
            if hub:
                write_chats(Path(d)/'chats.jsonl', json.loads((sets/'math'/'gsm8k'/'test.json').read_text()))
                (Path(d)/model.name).symlink_to(model.resolve())
                line = line.replace('MODEL', model.name)
            found[k] = dict(command=f'ist_finetune {line}'.strip(), load=round(load, 1)) | run(line, d)
        print(f"{k}: {found[k]['loss_after']:.4f} in {found[k]['seconds']:.0f} s")
    what = ('ist_finetune without arguments, by four methods, and on ARC-Easy; one seed each. '
            '`load` is the load average before a run')
    record.save(out, record.about(what, threads=1, **dict(MODEL=str(model), DATA=data) if model else {}), runs=found)
