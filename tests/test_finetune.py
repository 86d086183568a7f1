"The command line: bad input is answered by a sentence, good input by a run"
import errno,json,os,shutil,subprocess,sys,time,pytest
from pathlib import Path
from ist_nb.finetune import finetune,main,parse

rows = [dict(prompt=f'What is {i}? ', completion=f'It is number {i}.') for i in range(40)]
ist = '--score_interval 2 --score_batch_size 4'.split()
quick = '--max_steps 4 --per_device_train_batch_size 2 --max_length 32 --lora_r 2 --disable_tqdm true --logging_strategy no'.split()

def jsonl(path, rows): path.write_text(''.join(json.dumps(r)+'\n' for r in rows), encoding='utf-8'); return str(path)

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder to work in, with good data in it"
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path/'good.jsonl', rows)
    return tmp_path

def tree(d): return {str(p.relative_to(d)):p.read_bytes() if p.is_file() else None for p in d.rglob('*')}

def file(name, text): return lambda d: (d/name).write_bytes(text if isinstance(text, bytes) else text.encode())
def mixed(d): (d/'mix').mkdir(); jsonl(d/'mix'/'a.jsonl', rows); jsonl(d/'mix'/'b.jsonl', [dict(text='x')]*3)
def old_run(d): (d/'out').mkdir(); (d/'out'/'results.json').write_text('{}')
nothing = lambda d: None

# id, what to prepare, the command line, what the sentence must contain: the thing given, and what to do
cases = [
    ('missing file', nothing, '--data god.jsonl', ['god.jsonl', 'good.jsonl']),
    ('empty file', file('e.jsonl', ''), '--data e.jsonl', ['e.jsonl']),
    ('broken json', file('b.jsonl', '{"text": "a"}\n{"text": \n'), '--data b.jsonl', ['b.jsonl', 'line 2']),
    ('broken json list', file('b.json', '[{"text": "a"},\n{"text" "b"}]'), '--data b.json', ['b.json', 'line 2']),
    ('wrong columns', file('w.jsonl', '{"txt": "a"}\n{"txt": "b"}\n'), '--data w.jsonl', ['txt', 'text']),
    ('mixed formats', mixed, '--data mix', ['b.jsonl, line 1', 'keep one format']),
    ('not text', file('n.jsonl', '{"text": "a"}\n{"text": 5}\n'), '--data n.jsonl', ['line 2', 'text']),
    ('no usable row', file('z.jsonl', '{"text": ""}\n{"text": ""}\n'), '--data z.jsonl', ['z.jsonl']),
    ('one usable row', file('o.jsonl', '{"text": "a"}\n'), '--data o.jsonl', ['at least 2']),
    ('not utf-8', file('u.txt', b'ab\xff\xfe'), '--data u.txt', ['u.txt']),
    ('unknown ending', file('x.docx', 'a'), '--data x.docx', ['x.docx', '.jsonl']),
    ('unreachable hub data', nothing, '--data someone/something', ['someone/something']),
    ('missing test data', nothing, '--data good.jsonl --test_data no.jsonl', ['no.jsonl']),
    ('test fraction', nothing, '--data good.jsonl --test_fraction 2', ['test_fraction', 'between 0 and 1']),
    ('fewer rows than the probe', nothing, '--data good.jsonl --score_batch_size 64', ['36 training rows', 'score_batch_size=64']),
    ('unknown model', nothing, '--data good.jsonl --model no/such-model', ["'no/such-model'", 'cannot be loaded']),
    ('misspelt model', nothing, '--data good.jsonl --model picco', ["did you mean 'pico'?"]),
    ('no stack of blocks', nothing, '--data good.jsonl --lora_target_modules embed_tokens', ['nn.ModuleList', 'target_modules']),
    ('no such stack', nothing, '--data good.jsonl --stack decoder', ["stack='decoder'", 'model.layers']),
    ('no such module', nothing, '--data good.jsonl --lora_target_modules query', ['query']),
    ('unknown method of PEFT', nothing, '--data good.jsonl --peft lorra', ["'lorra'", "did you mean 'lora'"]),
    ('method without layers', nothing, '--data good.jsonl --peft prompt_tuning --peft_options {"num_virtual_tokens":4}', ['PROMPT_TUNING', "outside of the model's blocks", 'Use a method']),
    ('unknown setting of a method', nothing, '--data good.jsonl --peft oft --peft_options {"block":4}', ["'block'", 'oft_block_size']),
    ('settings that are not JSON', nothing, '--data good.jsonl --peft_options r=4', ["'r=4'", 'JSON']),
    ('settings that a method refuses', nothing, '--data good.jsonl --peft bottleneck --peft_options {"form":"serial"}', ["form='serial'", "'parallel'"]),
    ('rank', nothing, '--data good.jsonl --lora_r 0', ['--lora_r 0', 'at least 1']),
    ('dropout', nothing, '--data good.jsonl --lora_dropout 1', ['--lora_dropout', '[0, 1)']),
    ('scorer', nothing, '--scorer supression', ["did you mean 'suppression'?", 'Allowed']),
    ('sampler', nothing, '--sampler unifrom', ["did you mean 'uniform'?", 'Allowed']),
    ('n_active', nothing, '--n_active 0', ['n_active=0', 'fraction']),
    ('n_active too many', nothing, '--data good.jsonl --n_active 17', ['n_active=17', 'at most 16']),
    ('n_suppressed', nothing, '--n_suppressed 1.5', ['n_suppressed=1.5']),
    ('n_suppressed too many', nothing, '--data good.jsonl --n_suppressed 17 --score_batch_size 4', ['n_suppressed=17', 'at most 16']),
    ('suppression_factor', nothing, '--suppression_factor 1', ['suppression_factor=1', '[0, 1)']),
    ('n_candidates', nothing, '--n_candidates 1', ['n_candidates=1', 'at least 2']),
    ('score_interval', nothing, '--score_interval 0', ['score_interval=0', 'at least 1']),
    ('score_lr', nothing, '--score_lr -1', ['score_lr=-1', 'above 0']),
    ('score_batch_size', nothing, '--score_batch_size 0', ['score_batch_size=0', 'at least 1']),
    ('explore', nothing, '--explore often', ["explore='often'", '[0, 1]']),
    ('seed', nothing, '--seed -1', ['seed=-1', 'at least 0']),
    ('unknown argument', nothing, '--learnig_rate 1', ['--learnig_rate', '--learning_rate']),
    ('not a number', nothing, '--lora_r big', ['big', 'int']),
    ('not a choice', nothing, '--method sparse', ['sparse', 'dense']),
    ('dense with IST', nothing, '--method dense --explore 0.5', ['--explore', 'dense']),
    ('trainer says no', nothing, '--learning_rate 1e-3 --eval_strategy perhaps', ['perhaps']),
    ('no settings file', nothing, '--config no.yaml', ['no.yaml']),
    ('settings are not yaml', file('b.yaml', 'a: [1\nb: 2'), '--config b.yaml', ['b.yaml', 'line 2']),
    ('settings are a list', file('l.yaml', '- a'), '--config l.yaml', ['l.yaml', 'list']),
    ('unknown setting', file('k.yaml', 'lora_rank: 4'), '--config k.yaml', ['lora_rank']),
    ('folder in use', old_run, '--data good.jsonl --output_dir out', ['out', '--overwrite', '--resume']),
    ('folder is a file', file('out', 'x'), '--data good.jsonl --output_dir out', ['out', 'folder']),
    ('nothing to resume', nothing, '--data good.jsonl --output_dir out --resume', ['--resume', 'no checkpoint']),
]

@pytest.mark.parametrize('prepare,line,parts', [c[1:] for c in cases], ids=[c[0] for c in cases])
def test_bad_input(here, capsys, prepare, line, parts):
    prepare(here)
    before = tree(here)
    assert main(line.split())==2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith('ist_finetune: ') and 'Traceback' not in err, err
    assert all(p in err for p in parts), err
    assert tree(here)==before, 'something was written'

def test_no_space(here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9-10**6, 10**6))
    before = tree(here)
    assert main(['--data', 'good.jsonl', *quick, *ist])==2
    assert '1 MiB free' in capsys.readouterr().err
    assert tree(here)==before

def test_disk_fills_up(here, capsys, monkeypatch):
    from trl import SFTTrainer
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(SFTTrainer, 'save_model', full)
    assert main(['--data', 'good.jsonl', '--output_dir', 'out', *quick, *ist])==2
    assert 'the disk is full' in capsys.readouterr().err

def test_status_and_no_traceback(here):
    r = subprocess.run([sys.executable, '-m', 'ist_nb.finetune', '--scorer', 'x'], capture_output=True, text=True)
    assert r.returncode==2 and 'Traceback' not in r.stderr and "scorer='x' is unknown" in r.stderr

def test_help_is_fast(here):
    start = time.perf_counter()
    r = subprocess.run([sys.executable, '-m', 'ist_nb.finetune', '--help'], capture_output=True, text=True)
    assert time.perf_counter()-start < 3
    assert r.returncode==0 and all(f'--{o} ' in r.stdout for o in ('model', 'data', 'n_active', 'explore', 'output_dir', 'help_all'))

def test_help_all(capsys):
    assert main(['--help_all'])==0
    out = capsys.readouterr().out
    assert all(f'--{o} ' in out for o in ('model', 'explore', 'packing', 'weight_decay'))

def run(line, folder):
    assert main([*quick, *([] if 'dense' in line else ist), *line.split(), '--output_dir', str(folder)])==0
    return json.loads((folder/'results.json').read_text())

@pytest.mark.parametrize('line', ['--peft dora', '--peft ia3', '--peft bottleneck --peft_options {"form":"parallel"}', '--method rst', '--method paper', '--method dense'])
def test_methods(here, line):
    res = run('--data good.jsonl '+line, here/'out')
    n = {'--method dense':None}.get(line, 4*4)
    assert res['steps']==4 and (res['times_active'] is None if n is None else sum(res['times_active'])==n)
    assert {'loss_before', 'loss_after', 'seconds', 'peak_memory_bytes', 'importance', 'times_active', 'config', 'versions'} <= res.keys()
    assert (here/'out'/'importance.png').exists()==(n is not None)
    assert ('use_dora": true' in (here/'out'/'adapter_config.json').read_text())==(line=='--peft dora')

def test_all_layers_is_dense(here):
    "The same adapter, bit for bit, with every layer active and with no IST at all"
    run('--data good.jsonl --method dense', here/'a'); run('--data good.jsonl --n_active 1.0', here/'b')
    assert (here/'a'/'adapter_model.safetensors').read_bytes()==(here/'b'/'adapter_model.safetensors').read_bytes()

def test_resume(here):
    "A run that goes on from a checkpoint ends where the uninterrupted one ends"
    whole = run('--data good.jsonl --save_strategy steps --save_steps 2', here/'a')
    shutil.copytree(here/'a', here/'b')
    for p in [here/'b'/'results.json', here/'b'/'adapter_model.safetensors']: p.unlink()
    shutil.rmtree(here/'b'/'checkpoint-4')
    again = run('--data good.jsonl --save_strategy steps --save_steps 2 --resume', here/'b')
    assert again['importance']==whole['importance'] and again['times_active']==whole['times_active']
    assert (here/'a'/'adapter_model.safetensors').read_bytes()==(here/'b'/'adapter_model.safetensors').read_bytes()

def test_overwrite(here):
    run('--data good.jsonl', here/'out')
    (here/'out'/'mine.txt').write_text('keep')
    run('--data good.jsonl --method dense --overwrite', here/'out')
    assert not (here/'out'/'ist_state.json').exists() and (here/'out'/'mine.txt').read_text()=='keep'

def test_arc_easy(here, real_data):
    "The real training file of the paper's commonsense tasks"
    res = run(f"--data {real_data/'commonsense'/'ARC-Easy'/'train.json'} --max_rows 64 --max_length 256", here/'out')
    assert 'Alpaca' in res['data'] and res['steps']==4

def test_data_kinds(here):
    "Chats and plain text train too"
    jsonl(here/'chat.jsonl', [dict(messages=[dict(role='user', content=f'Add {i}'), dict(role='assistant', content=f'It is {i+1}')]) for i in range(20)])
    (here/'plain.txt').write_text('\n\n'.join(f'Paragraph {i} says that {i} is a number like any other number.' for i in range(80)))
    assert run('--data chat.jsonl', here/'a')['steps']==4
    assert run('--data plain.txt', here/'b')['steps']==4
