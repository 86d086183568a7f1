"""Give hostile and mistaken inputs to `ist_finetune` and `ist_evaluate`, and judge the answers.
A case is a folder of its own with an input made here, and a command line. It has 30 seconds and 2 GB. Good is one
sentence with status 2 that leaves the folder as it was, or a run that ends with the right outcome and leaves the user's
files as they were. Each case is a process forked from one that has imported the libraries, which saves most of the
time. The file also keeps the answers of the version before these cases were mended."""
import gzip,hashlib,json,math,os,pickle,shutil,signal,sys,tempfile,time,traceback
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
import psutil
from benchmarks import record

os.environ.update(HF_HUB_OFFLINE='1', MPLBACKEND='agg', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
limit_s,limit_bytes,longest_sentence = 30,2*10**9,1500

@dataclass
class Case:
    "An input, a command, and what is wanted: 'refused' (one sentence and status 2), 'runs' (status 0), or 'either'"
    kind:str
    name:str
    argv:list
    make:object = lambda: None # Called in the case's folder
    want:str = 'refused'
    kept:tuple = () # Paths in the run's folder that must be as they were, whatever happens
    check:object = lambda said: '' # Called in the case's folder after a run with status 0: what is wrong
    program:str = 'ist_finetune'
    typed:str = '' # On standard input

cases = []
def case(*args, **kwargs): cases.append(Case(*args, **kwargs))

# what cases are made of
def write(path, what):
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(what) if isinstance(what, bytes) else path.write_text(what, encoding='utf-8')
def lines(rows): return ''.join(json.dumps(o)+'\n' for o in rows)
def nested(n=100_000, of='['): return of*n
def edit(path, **values):
    "Set keys of a JSON file"
    write(path, json.dumps(json.loads(Path(path).read_text()) | values))
def zeros(path, start, end):
    "Zeros between two fractions of a file, as a power cut may leave it"
    b = bytearray(Path(path).read_bytes())
    i,j = int(start*len(b)),int(end*len(b))
    b[i:j] = bytes(j-i)
    write(path, bytes(b))
def drop(path): shutil.rmtree(path) if Path(path).is_dir() and not Path(path).is_symlink() else Path(path).unlink()
def folder(path):
    "A folder where a file is expected"
    if Path(path).exists(): drop(path)
    write(Path(path)/'mine.txt', 'mine')
def fifo(path):
    if Path(path).exists(): drop(path)
    os.mkfifo(path)
class Evil:
    "Runs a command where it is unpickled"
    def __reduce__(self): return os.system, ('touch pwned',)
def unharmed(said): return 'code from a file was run' if Path('pwned').exists() else ''
def torch_save(what, path):
    import torch
    torch.save(what, path)
def torch_edit(path, f):
    import torch
    what = torch.load(path, weights_only=False)
    torch.save(f(what) or what, path)
def pickled(name):
    def make():
        write(f'{now}/{name}', b''); torch_save(dict(a=Evil()), f'{now}/{name}')
        if name.startswith('adapter_model'): drop(f'{now}/adapter_model.safetensors')
    return make

quick = dict(model='m', data='a.jsonl', output_dir='out', max_steps=2, per_device_train_batch_size=2, max_length=32,
             lora_r=2, score_batch_size=2, score_interval=1, disable_tqdm='true', save_strategy='no',
             logging_strategy='no')
def argv(**values):
    "`quick` with other values; None leaves one out"
    return [s for k,v in (quick | values).items() if v is not None for s in (f'--{k}', str(v))]

# templates, made once by the package under test: a small model, an interrupted run with two checkpoints, a finished run
now,earlier = 'run/checkpoint-4','run/checkpoint-2'
resumed = dict(output_dir='run', max_steps=6, save_strategy='steps', save_steps=2, save_total_limit=3,
               logging_strategy='steps', logging_steps=1, lr_scheduler_type='constant')
def small_model(path, **config):
    import torch
    from transformers import AutoTokenizer,LlamaConfig,LlamaForCausalLM
    from ist_nb.finetune import assets
    tok = AutoTokenizer.from_pretrained(assets/'pico')
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
                 head_dim=16)
    LlamaForCausalLM(LlamaConfig(**shape | config, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
                                 pad_token_id=tok.pad_token_id)).save_pretrained(path)
    tok.save_pretrained(path)
    tok.chat_template = None

def templates():
    from ist_nb.finetune import main
    small_model('m')
    write('a.jsonl', lines(dict(prompt=f'What is {i}?', completion=f' It is number {i}.') for i in range(24)))
    def said(role, text): return dict(role=role, content=text)
    def chat(i): return dict(messages=[said('user', f'Hi {i}'), said('assistant', f'Hello {i}')])
    write('chats.jsonl', lines(map(chat, range(24))))
    assert main(argv(**resumed))==0
    shutil.copytree('run', 'done')
    for p in Path('done').glob('checkpoint-*'): drop(p)
    for p in Path('run').iterdir():   # as an interruption between the second and the third checkpoint leaves it
        if p.name not in ('run.json', Path(now).name, Path(earlier).name): drop(p)
    ask = 'Please answer the following question with true or false, question: is {} up?\n\nAnswer format: true/false'
    asked = [dict(instruction=ask.format(o), input='', answer='true') for o in ('the sky', 'the sea')]
    write('d/boolq/test.json', json.dumps(asked))
    write('d/MultiArith/test.json', json.dumps([dict(instruction='What is 1 and 2?', input='', answer='3')]))

def finite(home):
    "Whether the loss of a run is a number"
    for p in home.glob('*/results.json'):
        try: made = json.loads(p.read_text()) if p.is_file() else None
        except (ValueError, RecursionError): continue   # an input
        if isinstance(made, dict) and not math.isfinite(made.get('loss_after', 0)): return False
    return True
def same_adapter(said):
    "A resumed run ends where the whole one did"
    run,done = (digest(Path(o)/'adapter_model.safetensors') for o in ('run', 'done'))
    return '' if run==done else 'another adapter than without the interruption'

# flags
def flag(name, value, label=None, overwrite=None, **kwargs):
    case('flag', label or f'{name} {value!r}', argv(**{name:value}, overwrite=overwrite), **kwargs)

flag('output_dir', '', overwrite='true')
flag('output_dir', '.', 'output_dir .', overwrite='true', want='either',
    kept=('README.md', 'results.json', 'a.jsonl', 'm'),
     make=lambda: (write('README.md', 'mine'), write('results.json', '"mine"')))
flag('output_dir', 'y'*5000, 'output_dir path of 5000')
flag('output_dir', 'o\udcff', 'output_dir surrogate bytes', want='either')
flag('learning_rate', '-1')
flag('per_device_train_batch_size', '0')
flag('gradient_accumulation_steps', '0')
flag('lora_r', '1000000000')
flag('dataloader_num_workers', '100000')
flag('adam_beta1', '2')
flag('chat_template_path', '/etc/passwd')
case('flag', "model 'xxxxxxxxxxxxxxxxxxxx'", argv(model='x'*5000, output_dir=None))
flag('lr_scheduler_kwargs', '{"x": 1}')
flag('optim_args', 'a=b,c')
flag('activation_offloading', 'true')
flag('use_liger_kernel', 'true')
flag('gradient_checkpointing_kwargs', '[1]')
flag('model_init_kwargs', '[1]')
flag('model_init_kwargs', '{"nope": 1}')
flag('peft_options', '{"target_modules": "("}')
flag('peft_options', nested(50_000), f"peft_options {nested(60)!r}")
flag('peft_options', '{"bias": "zz"}')
flag('peft_options', '{"exclude_modules": "("}')
flag('peft_options', '{"runtime_config": 3}')
case('flag', 'peft vera r huge', argv(peft='vera', lora_r=32, peft_options='{"r": 100000000}'))
# of the same kinds, beyond those that were found first
for k,v in dict(warmup_steps='-1', weight_decay='nan', max_length='0', seed='-1', max_grad_norm='x', optim='zz',
                report_to='wandb', lr_scheduler_type='zz', dataloader_prefetch_factor='2', deepspeed='nofile',
                fsdp='zz', eos_token='zz', pad_token='zz', loss_type='zz', assistant_only_loss='true',
                packing_strategy='zz', resume_from_checkpoint='nofile', lora_dropout='nan', test_fraction='nan',
                model='nofolder', peft_options='{"init_lora_weights": "zz"}').items(): flag(k, v)
for k,v in dict(num_train_epochs='nan', dataset_num_proc='100000', max_rows='9'*30).items(): flag(k, v, want='either')
flag('output_dir', '/proc/nothing')
flag('output_dir', 'a.jsonl/x')
flag('optim', 'schedule_free_adamw')
flag('optim', 'lomo')
flag('peft_options', '{"trainable_token_indices": [1, 2]}', want='either')
flag('peft_options', '{"layers_to_transform": [99]}')
flag('peft_options', '{"rank_pattern": 5}')
flag('lora_target_modules', 'all-linear', want='runs')
flag('lora_target_modules', '.*q_proj', want='either')

# data
def data(name, make, path='a.jsonl', want='refused', **values):
    def remade(): drop('a.jsonl'); make()
    case('data', f'data {name}', argv(**dict(data=path) | values), remade, want)

def parquet(path, rows, times=1):
    import pyarrow as pa, pyarrow.parquet as pq
    t = pa.table(rows)
    with pq.ParquetWriter(path, t.schema) as f:
        for _ in range(times): f.write_table(t)
def many_rows(n):
    import numpy as np, pyarrow as pa
    return dict(text=pa.DictionaryArray.from_arrays(np.zeros(n, 'int32'), ['word']))
def packed(b, times=1): return gzip.compress(b, 6)*times   # parts of a gzip file unpack one after the other
pair = lines([dict(prompt='a', completion='b')]).encode()

data('parquet bomb 2e8 rows', lambda: parquet('a.parquet', many_rows(10**6), 200), 'a.parquet')
data('gz bomb lines', lambda: write('a.jsonl.gz', packed(b'\n'*2**24, 64)), 'a.jsonl.gz')
data('gz 64 MB of empty dicts', lambda: write('a.json.gz', packed(b'['+b'{},'*21_000_000+b'{}]')), 'a.json.gz')
data('path 5000 chars', lambda: None, 'x'*5000, output_dir=None)
data('path deep 5000', lambda: None, 'x/'*2500)
data('text 5 MB of spaces and a', lambda: write('a.jsonl',
    lines([dict(text='a short one'), dict(text=' '*5_000_000+'a')]*2)), want='either')
data('messages special tokens', lambda: write('a.jsonl', lines([dict(messages=[
    dict(role='user', content=f'<|user|>{i}<|endoftext|>'),
        dict(role='assistant', content='<|assistant|><s></s>')]) for i in range(20)])), want='either')
data('parquet one 400 MB text', lambda: parquet('a.parquet', dict(text=['a'*400_000_000, 'b'])), 'a.parquet')
data('gz bomb one line', lambda: write('a.jsonl.gz', packed(b'a'*2**24, 640)), 'a.jsonl.gz')
data('gz 63 MB of rows', lambda: write('a.jsonl.gz', packed(pair*(63*10**6//len(pair)))), 'a.jsonl.gz', 'either')
data('gz truncated', lambda: write('a.jsonl.gz', packed(pair*1000)[:-20]), 'a.jsonl.gz')
data('gz garbage', lambda: write('a.jsonl.gz', b'\x1f\x8b'+bytes(range(256))), 'a.jsonl.gz')
data('path surrogate', lambda: write('a\udcff.jsonl', pair*20), 'a\udcff.jsonl', 'either')

# YAML
def config(text, name=None, **kwargs):
    key = text.partition(':')[0]
    case('config', f'yaml {name or text}', ['--config', 'c.yaml', *argv(**{key:None} if key in quick else {})],
        lambda: write('c.yaml', text+'\n'), **kwargs)

config(nested(), 'nesting 100k')
config('3: 4', 'int key')
config('null: 4', 'null key')
config('"a\\0b": 1', 'NUL')
config('"\\ud800": 1', 'surrogate')
for text in ('max_rows: 2.5', 'model: 5', 'model: null', 'data: [a, b]', 'data: {a: b}', 'output_dir: "a\\0b"',
             'lora_target_modules: [1]', 'learning_rate: .nan', 'learning_rate: 2020-01-01', 'env: 3', 'env: {"": c}',
             'env: {A: "x\\0y"}', 'push_to_hub: [1]'): config(text)
for text in ('env: {3: 4}', 'method: [ist]', 'per_device_train_batch_size: [1]'):   # a list of one may be that one
    config(text, want='either')

# checkpoints
def state(name, make, program=None, kind='state', again=True, **kwargs):
    "Resume the interrupted run after `make` has changed something: refused, or with the outcome of the whole run"
    line = program or [*argv(**resumed), '--resume', 'true']
    settings = dict(want='either', check=lambda said: unharmed(said) or same_adapter(said)) | kwargs
    begin = dict(state='state', security='sec')[kind]
    case(kind, f'{begin} {name}', line, make, **settings)
    if again: case(kind, f'{begin} {name}, sealed anew', line, lambda: (make(), sealed()), **settings)
def sealed():
    "Make the manifest of the checkpoint anew, as someone who means harm would; older versions have none"
    try: from ist_nb.runs import _seal as seal
    except ImportError: return
    seal(Path(now))
def trainer_state(**values): return lambda: edit(f'{now}/trainer_state.json', **values)
def optimizer(f): return lambda: torch_edit(f'{now}/optimizer.pt', f)
def fewer(o): o['param_groups'][0]['params'].pop()
def rate(o): o['param_groups'][0]['lr'] = 'x'

for k,v in dict(log_history='x', stateful_callbacks=5, train_batch_size='x', logging_steps=0, total_flos='x',
               compute_interval=1).items():
    state(f'trainer_state {k}={v!r}', trainer_state(**{k:v}))
def twice():
    path = Path(f'{now}/trainer_state.json')
    write(path, path.read_text().rstrip()[:-1]+', "train_batch_size": null}')
state('trainer_state duplicate keys', twice)
state('optimizer.pt third quarter zeros (power cut)', lambda: zeros(f'{now}/optimizer.pt', .5, .75))
state('rng_state zeros', lambda: zeros(f'{now}/rng_state.pth', 0, .5))
state('adapter weights are a folder', lambda: folder(f'{now}/adapter_model.safetensors'))
state('adapter weights fifo', lambda: fifo(f'{now}/adapter_model.safetensors'))
state('optimizer list', lambda: torch_save([], f'{now}/optimizer.pt'))
state('optimizer fewer params', optimizer(fewer))
state('optimizer lr x', optimizer(rate))
state('optimizer no groups', optimizer(lambda o: o['param_groups'].clear()))
state('scheduler dict', lambda: torch_save({}, f'{now}/scheduler.pt'))
state('scheduler list', lambda: torch_save([], f'{now}/scheduler.pt'))
state('rng list', lambda: torch_save([], f'{now}/rng_state.pth'))
auto = [*argv(**resumed), '--auto_resume', 'true']
state('run.json dir', lambda: folder('run/run.json'), again=False, kept=('run/run.json',))
state('results.json nested', lambda: write('run/results.json', nested()), auto, again=False)
state('results.json nested dict', lambda: write('run/results.json', nested(of='{"a":')), auto, again=False)
state('results.json dir', lambda: folder('run/results.json'), again=False, kept=('run/results.json',))
state('results.json fifo', lambda: fifo('run/results.json'), auto, again=False)
for k,v in dict(peft='dora', lora_target_modules='q_proj').items():
    case('state', f'state resume with --{k} {v}', [*argv(**resumed, **{k:v}), '--resume', 'true'])

# files that would do harm
def security(name, make, want='refused', **kwargs):
    line = argv(**kwargs.pop('values', {}))+kwargs.pop('more', [])
    case('security', f'sec {name}', line, make, want, check=kwargs.pop('check', unharmed), **kwargs)

for o in 'optimizer.pt scheduler.pt adapter_model.bin scaler.pt'.split():
    state(f'pickle zip in {o}', pickled(o), kind='security')
security('pytorch_model.bin in a local model',
    lambda: (drop('m/model.safetensors'), torch_save(dict(a=Evil()), 'm/pytorch_model.bin')))
security('raw pickle pytorch_model.bin', lambda: (drop('m/model.safetensors'),
    write('m/pytorch_model.bin', pickle.dumps(dict(a=Evil())))))
for name,v in {'globals':'{{ cycler.__init__.__globals__ }}', 'strftime globals':"{{ strftime_now.__globals__['os'] }}",
               'range 1e9':'{% for i in range(10**9) %}a{% endfor %}', 'str 1e10':"{{ 'a'*10**10 }}",
               'pow':'{{ 9**(9**9) }}', 'syntax error':'{{ }}',
               'raise_exception':"{{ raise_exception('no') }}", 'div by zero':'{{ 1/0 }}'}.items():
    security(f'chat template: {name}', lambda v=v: write('m/chat_template.jinja', v), values=dict(data='chats.jsonl'))

def weights(b): return lambda: write('m/model.safetensors', b)
def slow_pattern():
    made = json.loads(Path('m/tokenizer.json').read_text())
    made['pre_tokenizer'] = dict(type='Split', pattern=dict(Regex='(a|aa)+$'), behavior='Isolated', invert=False)
    write('m/tokenizer.json', json.dumps(made))
    write('a.jsonl', lines([dict(prompt='a'*60+'!', completion='a'*60+'!')]*20))
security('model folder: tokenizer larger than vocabulary',
    lambda: (shutil.copytree('m', 'n'), small_model('m', vocab_size=64)))
security('model folder: tokenizer ReDoS', slow_pattern)
security('model folder: safetensors empty', weights(b''))
security('model folder: safetensors header 2^63', weights((2**63).to_bytes(8, 'little')+b'{}'))
security('model folder: safetensors wrong shape',
    lambda: (small_model('n', hidden_size=64, head_dim=32), shutil.copy('n/model.safetensors', 'm'), drop('n')))
bnb = dict(quant_method='bitsandbytes', load_in_4bit=True)
for k,v in dict(hidden_size=1000000000, num_hidden_layers='x', vocab_size=-5, num_attention_heads=[0, 3],
                dtype=['load', 'system'], rope_parameters=5, eos_token_id='x', bos_token_id=[[1]],
                quantization_config=bnb, use_cache='x').items():
    for o in v if isinstance(v, list) else [v]:
        security(f'model folder: config {k}={o}'[:81], lambda k=k, o=o: edit('m/config.json', **{k:o}),
            'either' if k in ('dtype', 'quantization_config') else 'refused')
security('model folder: config nested', lambda: write('m/config.json', nested(of='{"a":')))
security('model folder: tokenizer_config list', lambda: write('m/tokenizer_config.json', '[]'))
dollar = 'a$\\frac$b'
security(f'model name {dollar}', lambda: shutil.copytree('m', dollar), 'runs', values=dict(model=dollar))

# what a run finds in its folder and has not made
def overwritten(name, make, kept): security(name, make, 'either', more=['--overwrite', 'true'], kept=kept)
def link(name, to='precious'):
    if to=='precious': write(to, 'mine')
    else: write(f'{to}/mine.txt', 'mine')
    Path('out').mkdir(); Path('out', name).symlink_to(f'../{to}')
overwritten('overwrite keeps checkpoint-notes of the user', lambda: write('out/checkpoint-notes/notes.txt', 'mine'),
    ('out/checkpoint-notes',))
overwritten('overwrite keeps a file named checkpoint-x.txt', lambda: write('out/checkpoint-x.txt', 'mine'),
    ('out/checkpoint-x.txt',))
overwritten('overwrite adapter symlink', lambda: link('adapter_model.safetensors'), ('precious',))
overwritten('overwrite README.md symlink', lambda: link('README.md'), ('precious',))
overwritten('overwrite checkpoint symlink', lambda: link('checkpoint-2', 'folder'), ('folder',))
overwritten("overwrite keeps the user's README.md", lambda: write('out/README.md', 'mine'), ('out/README.md',))
overwritten('overwrite results.json is a folder', lambda: folder('out/results.json'), ('out/results.json',))
def no_checkpoint(name):
    shutil.copytree(earlier, f'run/{name}'); zeros(f'run/{name}/adapter_model.safetensors', .5, 1)
for digits,label in (('\uff11\uff12', '\uff11\uff12 (full-width digits)'), ('9'*20, '9'*20)):
    state(f'checkpoint-{label}', lambda d=digits: no_checkpoint(f'checkpoint-{d}'), kind='security', again=False,
          kept=(f'run/checkpoint-{digits}',), want='runs')

# evaluation
def evaluate(name, make, want='refused', model='done', tasks='boolq', how='likelihood', d='d', more=(), **kwargs):
    line = ['--model', model, '--data', d, '--tasks', tasks, '--how', how, '--batch_size', '4',
        *(['--max_new_tokens', '4', '--num_beams', '1'] if how=='generate' else []), *more]
    case('evaluate', f'eval {name}', line, make, want, program='ist_evaluate', check=unharmed, **kwargs)
def adapter(text, alone=True):
    return lambda: (write('done/adapter_config.json', text), drop('done/results.json') if alone else None)
adapter_json = lambda **values: lambda: edit('done/adapter_config.json', **values)
def no_base():
    made = json.loads(Path('done/adapter_config.json').read_text())
    del made['base_model_name_or_path']
    adapter(json.dumps(made))()

evaluate('adapter_config empty, no results.json', adapter(''))
evaluate('adapter_config nested, no results.json', adapter(nested(of='{"a":')))
evaluate('adapter_config no base, no results.json', no_base)
evaluate('adapter_config not utf8, no results.json', adapter(b'\xff\xfe{'))
evaluate('adapter_config target_modules=(', adapter_json(target_modules='('))
evaluate('adapter_config target_modules=(.*)*(.*)*(.*)*x$', adapter_json(target_modules='(.*)*(.*)*(.*)*x$'))
evaluate('adapter_config trainable_token_indices=[1000000000]', adapter_json(trainable_token_indices=[10**9]))
evaluate('results.json nested', lambda: write('done/results.json', nested()), 'either')
evaluate('adapter weights text', lambda: write('done/adapter_model.safetensors', 'not weights'))
evaluate('adapter pickle bin', lambda: (drop('done/adapter_model.safetensors'),
    torch_save(dict(a=Evil()), 'done/adapter_model.bin')))
auto_map = {o:f'evil.{o}' for o in ('AutoConfig', 'AutoModelForCausalLM')}
evaluate('auto_map model', lambda: (edit('m/config.json', auto_map=auto_map, model_type='evil'),
    write('m/evil.py', 'import os; os.system("touch $PWNED")\n')), model='m', typed='y\n'*9)

def task(name, want='refused', how='likelihood', file='boolq', make=None, **values):
    def changed():
        path = f'd/{file}/test.json'
        write(path, json.dumps([o | values for o in json.loads(Path(path).read_text())]))
    evaluate(name, make or changed, want, how=how, tasks=file)
form = 'What?\n\n{} Answer format: {}'
task('task instruction int (likelihood)', instruction=5)
task('task instruction list (generate)', how='generate', instruction=[5])
task('task input int (likelihood)', input=5)
task('task input list (likelihood)', input=[5])
task('task input list (generate)', how='generate', input=[5])
task('task surrogate instruction (generate)', how='generate',
    instruction='\ud800 true or false?\n\nAnswer format: true/false')
task('task surrogate answer (likelihood)', instruction=form.format('A\ud800: x B: y', 'A\ud800/B'), answer='A\ud800')
task('task answer name with regex (generate)', 'either', 'generate',
    instruction=form.format('answer(1: x answer2: y', 'answer(1/answer2'), answer='answer2')
task('task nan (likelihood)', instruction=float('nan'))
def choices(n=1000):
    names = [f'answer{i}' for i in range(n)]
    row = dict(instruction=form.format(' '.join(f'{o}: word {o}' for o in names), '/'.join(names)), input='',
        answer='answer7')
    write('d/boolq/test.json', json.dumps([row]*4))
task('task 1000 choices (likelihood)', 'either', make=choices)
task('math instruction int', how='generate', file='MultiArith', instruction=5)
evaluate('old result nested', lambda: write('o/boolq.json', nested()), more=['--output_dir', 'o'])
evaluate('old result settings str', lambda: write('o/boolq.json', '{"settings": "x"}'), more=['--output_dir', 'o'])
evaluate('output_dir is a file', lambda: write('o', 'mine'), more=['--output_dir', 'o'])
evaluate('output_dir too long', lambda: None, more=['--output_dir', 'x'*5000])
evaluate('data too long', lambda: None, d='x'*5000)
evaluate('flag dtype=load', lambda: None, more=['--dtype', 'load'])

# one case
def digest(p):
    h = hashlib.sha1()
    with p.open('rb') as f:
        while b := f.read(2**20): h.update(b)
    return h.hexdigest()

def content(home):
    "Relative path -> what is there"
    res = {}
    for top,ds,fs in os.walk(home):
        for o in (*ds, *fs):
            p = Path(top)/o
            what = f'link {os.readlink(p)}' if p.is_symlink() else 'folder' if p.is_dir() else 'other'
            if what=='other' and p.is_file(): what = digest(p)
            res[str(p.relative_to(home))] = what
    return res

def forked(home, f, log, typed='', seconds=limit_s, most=limit_bytes):
    "Status, seconds and peak bytes of `f` in a process of its own; 'hang' or 'memory' for one that had to be killed"
    start,peak = time.perf_counter(),0
    reading,writing = os.pipe()
    os.write(writing, typed.encode()); os.close(writing)
    if not (pid := os.fork()):
        try:
            os.setsid(); os.chdir(home); os.dup2(reading, 0)
            with open(log, 'wb') as o: os.dup2(o.fileno(), 1); os.dup2(o.fileno(), 2)
            sys.stdout.reconfigure(encoding='utf-8', errors='strict')
            os.environ['PWNED'] = str(home/'pwned')
            rc = f()
        except SystemExit as e: rc = e.code
        except BaseException: traceback.print_exc(); rc = 1
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(rc if isinstance(rc, int) else int(rc is not None))
    os.close(reading)
    stopped,process = None,psutil.Process(pid)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        try:
            workers = sum(o.memory_full_info().uss for o in process.children(recursive=True))   # what they do not share
            peak = max(peak, process.memory_info().rss+workers)
        except psutil.Error: pass
        stopped = 'memory' if peak>most else 'hang' if time.perf_counter()-start>seconds else None
        if stopped: os.killpg(pid, signal.SIGKILL); ended = os.waitpid(pid, 0); break
        time.sleep(.02)
    try: os.killpg(pid, signal.SIGKILL)   # workers that outlive their parent
    except ProcessLookupError: pass
    return stopped or os.waitstatus_to_exitcode(ended[1]),time.perf_counter()-start,peak

ours = 'run','runs','out','done/eval_','o/'   # where a run may write
def judge(c, home, status, said, before):
    "What a case came to; and more about it"
    if status in ('hang', 'memory'): return status,''
    trace = 'Traceback (most recent call last)' in said
    if status not in (0, 2): return ('traceback' if trace or status==1 else 'crash'),''
    after = content(home)
    changed = [p for p,o in before.items() if after.get(p)!=o]
    lost = [p for p in changed if p.startswith(c.kept)] if c.kept else []
    lost += [p for p in changed if not p.startswith(ours)]
    sentences = [l for l in said.splitlines() if l.startswith(f'{c.program}: ')]
    if 'pwned' in after: return 'code was run',''
    if status==0:
        here = os.getcwd(); os.chdir(home)
        try: wrong = c.check(said)
        finally: os.chdir(here)
        if lost: return 'files changed',', '.join(lost)
        if wrong or not finite(home): return 'wrong outcome',wrong or 'a loss that is not a number'
        if c.want=='refused': return 'accepted',''
        return 'ran',''
    if trace: return 'traceback',''
    if len(sentences)!=1: return 'no sentence',f'{len(sentences)} lines begin with {c.program}'
    if len(sentences[0])>longest_sentence: return 'no sentence',f'{len(sentences[0])} characters'
    if ' object at 0x' in sentences[0]: return 'no sentence','an address in memory'
    new = [p for p in after if p not in before]
    if new or changed: return 'left behind',', '.join(sorted(new+changed))
    return ('sentence' if c.want!='runs' else 'refused in error'),''

good = 'sentence','ran'
def answer(c, base, show=False):
    "The outcome of a case"
    with tempfile.TemporaryDirectory() as d:
        home,log = Path(d)/'case',Path(d)/'log'
        shutil.copytree(base, home, symlinks=True)
        status = forked(home, lambda: c.make() and None, log, seconds=120, most=2**34)[0]
        if status!=0: raise RuntimeError(f'{c.name} could not be made: {status}\n{log.read_text(errors="replace")}')
        before = content(home)
        def command():
            from ist_nb import evaluate,finetune
            sys.argv = [c.program, *c.argv]
            return dict(ist_finetune=finetune, ist_evaluate=evaluate)[c.program].main(list(c.argv))
        status,seconds,peak = forked(home, command, log, c.typed)
        said = log.read_text(errors='replace').replace(f'{home}/', '').replace(str(home), '.')
        outcome,more = judge(c, home, status, said, before)
    if show: print(said)
    words = [l.strip() for l in said.splitlines() if l.strip()]
    shown = [l for l in words if l.startswith(f'{c.program}: ')] or words or ['']
    text = ((more+': ' if more else '')+shown[-1])[:300]
    text = text.encode('utf-8', 'backslashreplace').decode()   # halves of surrogate pairs are written out
    return dict(outcome=outcome, status=status, seconds=round(seconds, 1), peak_mb=round(peak/1e6), said=text)

def counts(rows, when):
    "By kind: how many, and the outcomes"
    res = {}
    for kind in dict.fromkeys(r['kind'] for r in rows):
        found = [r[when]['outcome'] for r in rows if r['kind']==kind and when in r]
        res[kind] = dict(cases=len(found), good=sum(o in good for o in found),
            outcomes=dict(Counter(found).most_common()))
    return res

def libraries():
    "Import what every case needs, once"
    import torch
    names = ('datasets peft matplotlib.pyplot transformers.models.llama.modeling_llama transformers.trainer '
             'trl.trainer.sft_trainer ist_nb.callback ist_nb.data ist_nb.evaluate ist_nb.finetune ist_nb.plot '
             'ist_nb.runs')
    for o in names.split(): import_module(o)
    torch.set_num_threads(1)

def main(
    only:str='', # Cases whose kind and name hold one of these, separated by semicolons; the others stay as they are
    show:bool=False, # Print all that the commands say, and keep nothing
    out:Path='hostile', # Where the answers go
):
    wanted = [o.strip() for o in only.split(';')]
    chosen,found = [c for c in cases if any(o in f'{c.kind} {c.name}' for o in wanted)],{}
    with tempfile.TemporaryDirectory() as d:
        os.environ['HF_HOME'] = f'{d}/hf'
        libraries()
        (base := Path(d)/'base').mkdir()
        log = Path(d)/'log'
        status = forked(base, templates, log, seconds=300)[0]
        if status!=0: sys.exit(f'The templates could not be made: {status}\n'+log.read_text(errors='replace'))
        for c in chosen:
            found[c.name] = r = answer(c, base, show)
            line = f"{'ok ' if r['outcome'] in good else 'BAD'} {c.name[:70]}: {r['outcome']}, {r['said'][:150]}"
            print(line.encode('ascii', 'backslashreplace').decode(), flush=True)
    for kind,o in counts([dict(kind=c.kind, now=found[c.name]) for c in chosen], 'now').items(): print(kind, o)
    if show: return
    old,rows = {r['case']:r for r in record.read('hostile')['rows']},[]
    for c in cases:
        known = {k:v for k,v in old.get(c.name, {}).items() if k in ('before', 'after')}
        if c.name in found: known['after'] = found[c.name]
        rows.append(dict(kind=c.kind, case=c.name, wanted=c.want) | known)
    packages = 'trl accelerate datasets safetensors pyarrow'
    head = record.about('answers to hostile and mistaken inputs', packages, threads=1)
    passes = {k:counts(rows, k) for k in ('before', 'after') if any(k in r for r in rows)}
    record.save(out, head, limits=dict(seconds=limit_s, bytes=limit_bytes), **passes, rows=rows)
