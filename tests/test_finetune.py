"The command line: bad input is answered by a sentence, good input by a run"
import dataclasses,errno,importlib.util,json,os,re,shutil,subprocess,sys,pytest
from pathlib import Path
from types import SimpleNamespace
from ist_nb import ISTConfig,finetune,model,run_folder,runs
from ist_nb.config import refusal
from ist_nb.finetune import _methods,main,parse

pytestmark = pytest.mark.usefixtures('short_pico', 'text_once')

rows = [dict(prompt=f'What is {i}? ', completion=f'It is number {i}.') for i in range(40)]
ist = '--score_interval 2 --score_batch_size 4'.split()
quick = ('--max_steps 4 --per_device_train_batch_size 2 --max_length 32 --lora_r 2 --disable_tqdm true '
         '--logging_strategy no').split()
unlike_lora = ' '.join(quick).replace('--lora_r 2 ', '').split()     # other methods have no such rank
def weights(folder): return (folder/'adapter_model.safetensors').read_bytes()

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
def linked(d): (d/'out').mkdir(); (d/'mine.md').write_text('mine'); (d/'out'/'README.md').symlink_to(d/'mine.md')
def strict(d):
    "Folders with a model: its chat template refuses, loops or takes all memory; its weights are cut off"
    from transformers import AutoTokenizer,LlamaConfig,LlamaForCausalLM
    from ist_nb.finetune import assets
    tok = AutoTokenizer.from_pretrained(assets/'pico')
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2))
    for name,t in dict(strict="{% for m in messages %}{% if (m['role']=='user')!=(loop.index0%2==0) %}{{ "
                       "raise_exception('Roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}",
                       endless='{{ 10**(10**9) }}', greedy="{{ 'x'*10**10 }}", cut='{{ messages }}').items():
        tok.chat_template = t
        tok.save_pretrained(d/name); model.save_pretrained(d/name)
    cut = d/'cut'/'model.safetensors'
    cut.write_bytes(cut.read_bytes()[:100])
    jsonl(d/'chats.jsonl', [dict(messages=[dict(role=r, content='Hi') for r in rs])
                            for rs in (['user', 'assistant'], ['assistant', 'assistant'])*8])
def lost(d):
    "A model whose file of weights lacks one"
    from safetensors.torch import load_file,save_file
    strict(d)
    held = load_file(d/'strict'/'model.safetensors')
    held.pop('model.layers.0.mlp.up_proj.weight')
    (d/'strict').rename(d/'lost'); save_file(held, d/'lost'/'model.safetensors', metadata=dict(format='pt'))
small = '--max_steps 2 --per_device_train_batch_size 2 --max_length 32 --lora_r 2 --score_batch_size 4'
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
    ('fewer rows than the probe', nothing, '--data good.jsonl --score_batch_size 64',
     ['36 training rows', 'score_batch_size=64']),
    ('negative keep', nothing, '--data good.jsonl --keep -1', ['--keep -1', 'at least 0']),
    ('missing general text', nothing, '--data good.jsonl --general god.jsonl', ['god.jsonl', 'good.jsonl']),
    ('nothing to hold', nothing, '--data good.jsonl --keep 1 --peft adaption_prompt --peft_options '
     '{"adapter_len":4,"adapter_layers":2}', ['--keep', 'PEFT can switch off']),
    ('unknown model', nothing, '--data good.jsonl --model no/such-model', ["'no/such-model'", 'cannot be loaded']),
    ('misspelt model', nothing, '--data good.jsonl --model picco', ["did you mean 'pico'?"]),
    ('no stack of blocks', nothing, '--data good.jsonl --lora_target_modules embed_tokens',
     ['nn.ModuleList', 'target_modules']),
    ('no such stack', nothing, '--data good.jsonl --stack decoder', ["stack='decoder'", 'model.layers']),
    ('no such module', nothing, '--data good.jsonl --lora_target_modules query', ['query']),
    ('unknown method of PEFT', nothing, '--data good.jsonl --peft lorra', ["'lorra'", "did you mean 'lora'"]),
    ('nothing to hold layer by layer', nothing, '--data good.jsonl --peft prompt_tuning --peft_options '
     '{"num_virtual_tokens":4}', ['--keep 1', "outside of the model's blocks", 'give --keep 0']),
    ('method without layers', nothing,
     '--data good.jsonl --method ist --peft prompt_tuning --peft_options {"num_virtual_tokens":4}',
     ['PROMPT_TUNING', "outside of the model's blocks", 'Use a method']),
    ('unknown setting of a method', nothing, '--data good.jsonl --peft oft --peft_options {"block":4}',
     ["'block'", 'oft_block_size']),
    ('settings that are not JSON', nothing, '--data good.jsonl --peft_options r=4', ["'r=4'", 'JSON']),
    ('settings that a method refuses', nothing, '--data good.jsonl --peft bottleneck --peft_options {"form":"serial"}',
     ["form='serial'", "'parallel'"]),
    ('rank', nothing, '--data good.jsonl --lora_r 0', ['--lora_r 0', 'from 1 to']),
    ('rank of another method', nothing, '--data good.jsonl --peft vera --peft_options {"r":100000000}',
     ['r=100000000', 'from 1 to']),
    ('a switch without effect here', nothing, '--data good.jsonl --resume_from_checkpoint nofile',
     ['--resume_from_checkpoint nofile', '--resume instead']),
    ('dropout', nothing, '--data good.jsonl --lora_dropout 1', ['--lora_dropout', '[0, 1)']),
    ('scorer', nothing, '--scorer supression', ["did you mean 'suppression'?", 'Allowed']),
    ('sampler', nothing, '--sampler unifrom', ["did you mean 'uniform'?", 'Allowed']),
    ('n_active', nothing, '--n_active 0', ['n_active=0', 'fraction']),
    ('n_active too many', nothing, '--data good.jsonl --n_active 5', ['n_active=5', 'at most 4']),
    ('n_suppressed', nothing, '--n_suppressed 1.5', ['n_suppressed=1.5']),
    ('n_suppressed too many', nothing, '--data good.jsonl --n_suppressed 5 --score_batch_size 4',
     ['n_suppressed=5', 'at most 4']),
    ('suppression_factor', nothing, '--suppression_factor 1', ['suppression_factor=1', '[0, 1)']),
    ('n_candidates', nothing, '--n_candidates 1', ['n_candidates=1', 'at least 2']),
    ('scores that nothing asks for', nothing, '--method rst --score_interval 5', ['score_interval=5', 'uniform']),
    ('scores without importance', nothing, '--sampler top --scorer gate', ["scorer='gate'", 'top']),
    ('candidates of no scorer', nothing, '--scorer gate --n_candidates 5', ['n_candidates=5', "'gate'"]),
    ('a step of no scorer', nothing, '--scorer gate+fisher --score_lr 5', ['score_lr=5', "'gate+fisher'"]),
    ('a probe of no scorer', nothing, '--scorer fisher --score_batch_size 8', ['score_batch_size=8', "'fisher'"]),
    ('nothing to offload from', nothing, '--activation_offloading true --use_cpu', ['--activation_offloading', 'GPU']),
    ('rank in two places', nothing, '--data good.jsonl --peft_options {"r":4}', ['r has a flag', '--lora_r']),
    ('DoRA in two places', nothing, '--data good.jsonl --peft_options {"use_dora":true}', ['--peft dora']),
    ('text of a single row', file('g.txt', 'One line.'), '--data good.jsonl --general g.txt '+small,
     ['g.txt', 'at least 2']),
    ('score_interval', nothing, '--score_interval 0', ['score_interval=0', 'at least 1']),
    ('score_lr', nothing, '--score_lr -1', ['score_lr=-1', 'above 0']),
    ('score_batch_size', nothing, '--score_batch_size 0', ['score_batch_size=0', 'at least 1']),
    ('explore', nothing, '--explore often', ["explore='often'", '[0, 1]']),
    ('seed', nothing, '--seed -1', ['seed=-1', 'at least 0']),
    ('no such model folder', nothing, '--data good.jsonl --model ./nofolder', ['./nofolder: there is no such folder']),
    ('learning rate', nothing, '--learning_rate -1', ['--learning_rate -1', 'at least 0']),
    ('batch size', nothing, '--per_device_train_batch_size 0', ['--per_device_train_batch_size 0', 'at least 1']),
    ('workers', nothing, '--dataloader_num_workers 100000',
     ['--dataloader_num_workers 100000', 'four for each processor']),
    ('reporter not installed', nothing, f'--data good.jsonl --report_to wandb {small}',
     ['wandb', 'Look at --report_to wandb']),
    ('optimizer not installed', nothing, f'--data good.jsonl --optim schedule_free_adamw {small}',
     ['schedulefree', 'making the optimizer', '--optim']),
    ('scheduler refuses', nothing, '--data good.jsonl --lr_scheduler_kwargs {"nope":1} '+small,
     ['nope', 'take another']),
    ('PEFT refuses a pattern', nothing, '--data good.jsonl --peft_options {"target_modules":"("}',
     ['unterminated subpattern']),
    ('pattern takes for ever', nothing,
     ['--data', 'good.jsonl', '--peft_options', '{"target_modules":"(.*)*(.*)*(.*)*x$"}'],
     ['takes more than', 'simpler pattern']),
    ('weights are missing', lost, '--data good.jsonl --model lost', ["of the model 'lost' are missing"]),
    ('PEFT refuses a bias', nothing, '--data good.jsonl --peft_options {"bias":"zz"}', ['zz']),
    ('template refuses', strict, '--data chats.jsonl --model strict', ['of the training rows', 'Roles must alternate']),
    ('template takes for ever', strict, '--data chats.jsonl --model endless',
     ["chat template of 'endless'", 'seconds']),
    ('template needs all memory', strict, '--data chats.jsonl --model greedy', ["chat template of 'greedy'", 'MiB']),
    ('model folder is cut', strict, '--data good.jsonl --model cut', ["'cut' cannot be loaded"]),
    ('name too long', nothing, '--data good.jsonl --output_dir '+'y'*5000,
     ['cannot be the name of a file', 'too long']),
    ('surrogates in a name', nothing, '--data good.jsonl --output_dir a\udcff',
     ['cannot be the name of a file', 'surrogates']),
    ('empty name', nothing, '--data good.jsonl --output_dir=', ['--output_dir is empty']),
    ('yaml without a value', file('n.yaml', 'model: null'), '--config n.yaml', ['model has no value']),
    ('yaml with a number for a name', file('n.yaml', '5: 4'), '--config n.yaml', ["'5' is not the name of a setting"]),
    ('yaml of a wrong type', file('n.yaml', 'max_rows: 2.5'), '--config n.yaml', ['2.5', 'max_rows']),
    ('yaml nested', file('n.yaml', 'a: '+'['*5000), '--config n.yaml', ['n.yaml cannot be used']),
    ('overwrite what is not a run', old_run, '--data good.jsonl --output_dir out --overwrite',
     ['results.json was not left by a run']),
    ('overwrite a link', linked, '--data good.jsonl --output_dir out --overwrite', ['README.md is a link']),
    ('unknown argument', nothing, '--learnig_rate 1', ['--learnig_rate', '--learning_rate']),
    ('not a number', nothing, '--lora_r big', ['big', 'int']),
    ('not a choice', nothing, '--method sparse', ['sparse', 'dense']),
    ('dense with IST', nothing, '--method dense --explore 0.5', ['--explore', 'dense']),
    ('trainer says no', nothing, '--learning_rate 1e-3 --eval_strategy perhaps', ['perhaps']),
    ('no settings file', nothing, '--config no.yaml', ['no.yaml']),
    ('settings are not yaml', file('b.yaml', 'a: [1\nb: 2'), '--config b.yaml', ['b.yaml', 'line 2']),
    ('a setting twice', file('t.yaml', 'learning_rate: 1\nmax_steps: 2\nlearning_rate: 2'), '--config t.yaml',
     ['t.yaml', "'learning_rate' is given twice"]),
    ('a share beside test data', nothing, '--data good.jsonl --test_data good.jsonl --test_fraction 0.5',
     ['--test_fraction', 'no effect']),
    ('another column', nothing, '--data good.jsonl --dataset_text_field body', ['--dataset_text_field body', "'text'"]),
    ('settings are a list', file('l.yaml', '- a'), '--config l.yaml', ['l.yaml', 'list']),
    ('unknown setting', file('k.yaml', 'lora_rank: 4'), '--config k.yaml', ['lora_rank']),
    ('folder in use', old_run, '--data good.jsonl --output_dir out', ['out', '--overwrite', '--resume']),
    ('folder is a file', file('out', 'x'), '--data good.jsonl --output_dir out', ['out', 'folder']),
    ('nothing to resume', nothing, '--data good.jsonl --output_dir out --resume', ['--resume', 'no checkpoint']),
]

@pytest.mark.parametrize('prepare,line,parts', [c[1:] for c in cases], ids=[c[0] for c in cases])
def test_bad_input(here, capsys, monkeypatch, prepare, line, parts):
    prepare(here)
    before = tree(here)
    real = model._bounded
    monkeypatch.setattr(model, '_bounded', lambda f, seconds=20: real(f, seconds/10))
    assert main(line.split(' ') if isinstance(line, str) else line)==2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith('ist_finetune: ') and 'Traceback' not in err, err
    assert all(p in err for p in parts), err
    assert tree(here)==before, 'something was written'

def test_a_folder_with_an_adapter_is_no_model(done, here, capsys):
    "transformers would load both, and PEFT would replace the old adapter or mix the two"
    assert main(['--data', 'good.jsonl', '--model', str(done/'out'), '--output_dir', 'out', *quick])==2
    assert 'is an adapter, and not a model. Merge it' in capsys.readouterr().err and not (here/'out').exists()

def test_the_old_name_of_dtype():
    "`torch_dtype` of transformers before 4.56 is what the user asks for, not an addition to our default"
    import torch
    for k in ('torch_dtype', 'dtype'): assert model.load_model('pico', **{k:'bfloat16'})[0].dtype==torch.bfloat16

def test_numbers_in_yaml(here):
    "1e-5 is a number, as in Python, inside of a dictionary too"
    (here/'s.yaml').write_text('learning_rate: 1e-5\nlr_scheduler_type: cosine_with_min_lr\n'
                               'lr_scheduler_kwargs: {min_lr: 1e-6, num_cycles: 1}\nmax_steps: 7')
    _,_,sft = parse(['--config', 's.yaml'])
    assert (sft.learning_rate, sft.max_steps)==(1e-5, 7) and sft.lr_scheduler_kwargs==dict(min_lr=1e-6, num_cycles=1)

def test_few_rows_and_no_probe():
    "Only a run that probes needs a probe batch of training rows"
    few = SimpleNamespace(args=SimpleNamespace(max_length=32), train_dataset=[0]*3, eval_dataset=[0])
    for cfg in (None, ISTConfig.rst(), ISTConfig.recommended(), ISTConfig(scorer='fisher')):
        finetune._check_rows(few, cfg)
    for cfg in (ISTConfig(), ISTConfig(sampler='depth', scorer='gate')):
        assert '3 training rows' in refusal(lambda: finetune._check_rows(few, cfg))

def test_an_error_of_a_library_names_what_failed(here, capsys, monkeypatch):
    from trl import SFTTrainer
    def broken(*args, **kwargs): raise TypeError('no such thing')
    monkeypatch.setattr(SFTTrainer, 'training_step', broken)
    before = tree(here)
    assert main(['--data', 'good.jsonl', '--output_dir', 'out', *quick, *ist])==2
    assert 'training failed: no such thing (TypeError). Add --debug' in capsys.readouterr().err and tree(here)==before

def test_disk_fills_up(here, capsys, monkeypatch):
    from trl import SFTTrainer
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(SFTTrainer, 'save_model', full)
    assert main(['--data', 'good.jsonl', '--output_dir', 'out', *quick, *ist])==2
    assert 'the disk is full' in capsys.readouterr().err

def test_a_disk_without_room_for_a_checkpoint_is_refused(here, capsys, monkeypatch):
    "Before the first step: the weights of a LoRA of rank 32 in four layers and two moments are 4 MiB"
    monkeypatch.setattr(run_folder.shutil, 'disk_usage', lambda p: SimpleNamespace(free=2**20))
    before = tree(here)
    assert main(['--data', 'good.jsonl', '--output_dir', 'out', *quick, *ist, '--lora_r', '32'])==2
    assert 'has 1 MiB free, and one checkpoint takes about 4 MiB' in capsys.readouterr().err and tree(here)==before

def test_status_and_no_traceback(here, capsys):
    r = subprocess.run([sys.executable, '-m', 'ist_nb.finetune', '--scorre', 'x'], capture_output=True, text=True)
    assert r.returncode==2 and 'Traceback' not in r.stderr and "did you mean '--scorer'" in r.stderr
    assert main(['--scorer', 'x'])==2 and "scorer='x' is unknown" in capsys.readouterr().err

def test_help_is_fast(here):
    "In seconds of the processor, which other work on this machine does not change"
    def spent(): return sum(os.times()[2:4])    # by children
    start = spent()
    r = subprocess.run([sys.executable, '-m', 'ist_nb.finetune', '--help'], capture_output=True, text=True)
    assert spent()-start < 2
    assert r.returncode==0
    assert all(f'--{o} ' in r.stdout for o in ('model', 'data', 'n_active', 'explore', 'output_dir', 'help_all'))
    line = next(o for o in r.stdout.splitlines() if o.startswith('  --method '))
    assert all(o in line for o in _methods), line

def test_help_all(capsys):
    assert main(['--help_all'])==0
    out = capsys.readouterr().out
    assert all(f'--{o} ' in out for o in ('model', 'explore', 'packing', 'weight_decay'))

def run(line, folder):
    start = unlike_lora if '--peft' in line else quick
    scored = not any(o in line for o in ('dense', 'rst'))
    assert main([*start, *(ist if scored else []), *line.split(), '--output_dir', str(folder)])==0
    return json.loads((folder/'results.json').read_text())

@pytest.mark.parametrize('line', ['--peft dora', '--peft ia3', '--peft bottleneck --peft_options {"form":"parallel"}',
                                  '--method rst', '--method paper', '--method dense'])
def test_methods(here, line):
    res = run('--data good.jsonl '+line, here/'out')
    n = {'--method dense':None}.get(line, 4)
    assert res['steps']==4 and (res['times_active'] is None if n is None else sum(res['times_active'])==n)
    assert {'loss_before', 'loss_after', 'seconds', 'peak_memory_bytes', 'importance', 'times_active', 'config',
            'versions'} <= res.keys()
    assert (here/'out'/'importance.png').exists()==(n is not None)
    assert ('use_dora": true' in (here/'out'/'adapter_config.json').read_text())==(line=='--peft dora')

def test_all_layers_is_dense(here):
    "The same adapter, bit for bit, with every layer active and with no IST at all"
    run('--data good.jsonl --method dense', here/'a'); run('--data good.jsonl --n_active 1.0', here/'b')
    assert (here/'a'/'adapter_model.safetensors').read_bytes()==(here/'b'/'adapter_model.safetensors').read_bytes()

def test_resume(here):
    "A resumed run ends where the uninterrupted one ends"
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
    jsonl(here/'chat.jsonl',
          [dict(messages=[dict(role='user', content=f'Add {i}'), dict(role='assistant', content=f'It is {i+1}')])
           for i in range(20)])
    (here/'plain.txt').write_text('\n\n'.join(f'Paragraph {i} says that {i} is a number like any other number.'
                                              for i in range(80)))
    assert run('--data chat.jsonl', here/'a')['steps']==4
    assert run('--data plain.txt', here/'b')['steps']==4

# a resumed run is the run that was interrupted, and a finished run is finished
saving = '--save_strategy steps --save_steps 2 --lr_scheduler_type constant'
@pytest.fixture(scope='module')
def done(short_pico, tmp_path_factory):
    "A run of four steps with a checkpoint in the middle and one at the end"
    d = tmp_path_factory.mktemp('done')
    jsonl(d/'good.jsonl', rows)
    run(f'--data {d}/good.jsonl {saving}', d/'out')
    return d

@pytest.fixture
def half(done, tmp_path, monkeypatch):
    "The same after it was interrupted"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done/'out', tmp_path/'half')
    for o in ('results.json', 'adapter_model.safetensors', 'README.md'): (tmp_path/'half'/o).unlink()
    shutil.rmtree(tmp_path/'half'/'checkpoint-4')
    return tmp_path/'half'

others = dict(lora_alpha='8', lora_r='4', lora_dropout='0.5', peft='dora', lora_target_modules='q_proj',
              learning_rate='0.5', per_device_train_batch_size='4', optim='sgd', max_length='64',
              weight_decay='0.1', gradient_accumulation_steps='2', seed='7', max_steps='8', n_active='2',
              score_interval='3', sampler='depth', method='paper', max_rows='20', lr_scheduler_type='linear')
@pytest.mark.parametrize('name', others)
def test_resume_with_another_setting(done, half, capsys, name):
    before = tree(half)
    assert main([*quick, *ist, '--data', f'{done}/good.jsonl', *saving.split(), '--output_dir', 'half', '--resume',
                 f'--{name}', others[name]])==2
    err = capsys.readouterr().err
    assert re.search(rf"\b{name} was .* and is .*{re.escape(others[name])}", err), err
    assert tree(half)==before

def test_resume_with_other_output(done, half):
    "What only says where things go and what is shown may change; seconds are those of both parts"
    saved = json.loads((half/'checkpoint-2'/'trainer_state.json').read_text())['stateful_callbacks']
    first = saved['RunGuard']['attributes']['before']
    res = run(f'--data {done}/good.jsonl {saving} --logging_steps 1 --save_total_limit 5 --resume', half)
    assert res['seconds']>first>0 and res['steps']==4
    assert (half/'adapter_model.safetensors').read_bytes()==(done/'out'/'adapter_model.safetensors').read_bytes()

@pytest.mark.parametrize('how', ['--resume', '--auto_resume'])
@pytest.mark.parametrize('lost', [(), ('results.json', 'adapter_model.safetensors', 'ist_state.json')],
                         ids=['finished', 'died at its end'])
def test_finished_stays_finished(done, tmp_path, how, lost):
    "Under a constant schedule one step more would show"
    shutil.copytree(done/'out', tmp_path/'out')
    for o in lost: (tmp_path/'out'/o).unlink()
    before = tree(tmp_path/'out')
    res = run(f'--data {done}/good.jsonl {saving} {how}', tmp_path/'out')
    assert weights(tmp_path/'out')==weights(done/'out')
    state,want = (json.loads((d/'out'/'ist_state.json').read_text()) for d in (tmp_path, done))
    assert state==want
    assert res['steps']==4 and sum(res['times_active'])==4
    assert res['loss_after']==json.loads((done/'out'/'results.json').read_text())['loss_after']
    if not lost: assert tree(tmp_path/'out')==before

def test_a_dense_run_that_died_at_its_end(here):
    "Without IST nothing else keeps the Trainer from one step too many"
    line = f'--data good.jsonl --method dense {saving}'
    first,want = run(line, here/'out'),weights(here/'out')
    for o in ('results.json', 'adapter_model.safetensors'): (here/'out'/o).unlink()
    again = run(f'{line} --resume', here/'out')
    assert weights(here/'out')==want and (again['steps'], again['loss_after'])==(4, first['loss_after'])
    assert again['seconds']>0

@pytest.mark.parametrize('name', ['adapter_model.safetensors', 'optimizer.pt', 'scheduler.pt', 'rng_state.pth',
                                  'trainer_state.json'])
def test_damaged_checkpoint_is_passed_over(done, tmp_path, name):
    shutil.copytree(done/'out', tmp_path/'out')
    path = tmp_path/'out'/'checkpoint-4'/name
    b = bytearray(path.read_bytes()); b[len(b)//2] ^= 64; path.write_bytes(b)     # one bit
    with pytest.warns(UserWarning, match=f'checkpoint-4 is skipped: {name} differs from what was saved'):
        last = runs.last_checkpoint(tmp_path/'out')
    assert Path(last).name=='checkpoint-2'

def test_another_runs_checkpoint(done, half, capsys):
    "Intact, but of an adapter of another rank: torch would train with its moments"
    run(f'--data {done}/good.jsonl {saving} --lora_r 3', half.parent/'other')
    shutil.copytree(half.parent/'other'/'checkpoint-4', half/'checkpoint-4')
    (half/'checkpoint-4'/'adapter_model.safetensors').write_bytes(weights(done/'out'/'checkpoint-4'))
    state = json.loads((half/'checkpoint-4'/'trainer_state.json').read_text())
    (half/'checkpoint-4'/'trainer_state.json').write_text(json.dumps(state))
    runs._seal(half/'checkpoint-4')
    capsys.readouterr()
    assert main([*quick, *ist, '--data', f'{done}/good.jsonl', *saving.split(), '--output_dir', str(half),
                 '--resume'])==2
    assert 'a state of shape' in capsys.readouterr().err

def test_overwrite_takes_only_its_own(done, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(done/'out', out)
    for o in ('checkpoint-notes/notes.txt', 'checkpoint-4/mine.txt', 'checkpoint-x.txt', 'sub/results.json'):
        (out/o).parent.mkdir(exist_ok=True); (out/o).write_text('mine')
    run(f'--data {done}/good.jsonl --method dense --overwrite', out)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file()
                  and p.read_bytes()==b'mine')==['checkpoint-4/mine.txt', 'checkpoint-notes/notes.txt',
                  'checkpoint-x.txt', 'sub/results.json']
    assert not (out/'ist_state.json').exists() and not (out/'checkpoint-2').exists()

too_late = {'a budget too small':'--activation_budget 1KiB', 'two ways to compute twice':'--activation_budget 0.5 '
            '--gradient_checkpointing true', 'a scheduler that cannot be':'--lr_scheduler_kwargs {"nope":1}'}
@pytest.mark.parametrize('line', too_late.values(), ids=too_late)
def test_a_run_that_is_refused_in_its_first_steps_replaces_nothing(done, tmp_path, line):
    "The run that was there stays, or with --resume its settings; a run that works then takes the place"
    out,more = tmp_path/'out',['--data', f'{done}/good.jsonl', '--output_dir', str(tmp_path/'out')]
    shutil.copytree(done/'out', out)
    before = tree(out)
    assert main([*quick, *more, '--overwrite', *line.split()])==2 and tree(out)==before
    interrupted(out)
    before = tree(out)
    assert main([*quick, *ist, *more, *saving.split(), '--resume', *line.split()])==2 and tree(out)==before
    assert main([*quick, *more, '--max_steps', '1', '--save_strategy', 'no', '--overwrite'])==0
    left = {p.name for p in out.iterdir()}
    assert json.loads((out/'run.json').read_text())['settings']['max_steps']==1 and 'checkpoint-2' not in left

def test_auto_resume_after_a_failed_start(here, monkeypatch):
    "run.json could not be written; the same command begins when there is room again"
    write = run_folder._write_json
    def full(path, what):
        if path.name=='run.json':
            path.with_name('run.json.part').touch(); raise OSError(errno.ENOSPC, 'No space left on device')
        return write(path, what)
    line = ['--data', 'good.jsonl', '--output_dir', 'out', *quick, *ist, '--auto_resume']
    with monkeypatch.context() as m:
        m.setattr(run_folder, '_write_json', full)
        assert main(line)==2
    # of a process that was killed there
    (here/'out').mkdir(exist_ok=True); (here/'out'/'run.json.part').touch(); (here/'out'/'.ist_lock').touch()
    assert main(line)==0 and json.loads((here/'out'/'results.json').read_text())['steps']==4

def test_losses_are_those_of_the_held_out_rows(done):
    "Measured once more, on the rows that the report calls held out, by the adapter as it was saved"
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from ist_nb.data import load_data
    model,tok = AutoPeftModelForCausalLM.from_pretrained(done/'out'),AutoTokenizer.from_pretrained(done/'out')
    data = load_data(f'{done}/good.jsonl', seed=42)
    def loss(rows):
        total,n = 0.,0
        for r in rows:
            prompt = tok(r['prompt'])['input_ids']
            whole = tok(r['prompt']+r['completion'])['input_ids']+[tok.eos_token_id]
            # where the completion begins
            start = next(i for i,(a,b) in enumerate(zip(prompt+[None], whole)) if a!=b)
            ids = torch.tensor([whole])
            with torch.no_grad(): logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total,n = total-logp[range(start-1, len(whole)-1), whole[start:]].sum().item(),n+len(whole)-start
        return total/n
    res = json.loads((done/'out'/'results.json').read_text())
    assert abs(res['loss_after']-loss(data.test))<1e-4<abs(res['loss_after']-loss(data.train))
    with model.disable_adapter(): assert abs(res['loss_before']-loss(data.test))<1e-4

def test_rows_that_do_not_fit_are_said(here, capsys):
    from ist_nb.data import load_data
    from ist_nb.finetune import _rows_report,make_trainer
    jsonl(here/'long.jsonl', [dict(prompt='word '*(60 if i%2 else 2)+f'{i}: ', completion=f'It is {i}.')
                              for i in range(40)])
    line = ['--data', 'long.jsonl', '--test_fraction', '0.3', '--output_dir', 'out', *quick, *ist]
    data = load_data('long.jsonl', test_fraction=0.3, seed=42)
    trainer = make_trainer(*parse(line), data)
    for name,before,after in (('training', data.train, trainer.train_dataset),
                              ('held-out', data.test, trainer.eval_dataset)):
        lost = sum('word '*3 in r['prompt'] for r in before)
        assert lost==len(before)-len(after)>0
        assert f'{lost} of {len(before)} {name} rows are left out' in _rows_report(data, trainer)

def test_chats_without_an_answer_are_said(here, capsys):
    "Where the question alone fills a row, only the question is learned"
    def chat(i): return [dict(role='user', content='word '*(90 if i%2 else 9)+str(i)),
                         dict(role='assistant', content='ok '*40)]
    jsonl(here/'chats.jsonl', [dict(messages=chat(i)) for i in range(40)])
    args,cfg,sft = parse('--data chats.jsonl --test_fraction 0.5 --use_cpu --keep 0 --max_length 48'.split())
    data = finetune._read_data(args, sft)
    finetune.make_trainer(args, cfg, sft, data)
    said = capsys.readouterr().out
    for name,rows in (('training', data.train), ('held-out', data.test)):
        gone = sum('word '*90 in o['messages'][0]['content'] for o in rows)
        cut = f'{len(rows)} {name} rows fill max_length=48, and anything beyond it was cut off'
        assert f'{cut}; in {gone} of them nothing of the last answer is left' in said

def test_epochs_are_not_ignored_in_the_demonstration():
    assert [finetune.parse(o.split())[2].max_steps for o in ('', '--num_train_epochs 2', '--max_steps 7')]==[60, -1, 7]

def test_how_texts_become_rows_is_the_users_choice(here):
    "Each process packs its own shard, so their number is part of the run"
    (here/'text.txt').write_text('\n\n'.join(f'A paragraph on the number {i}. '*(1+i%9) for i in range(60)))
    def packed(line):
        args,cfg,sft = parse(f'--data text.txt --use_cpu --keep 0 --max_length 64 {line}'.split())
        trainer = finetune.make_trainer(args, cfg, sft, finetune._read_data(args, sft))
        return sft.packing,sft.packing_strategy,len(trainer.train_dataset)
    (on,how,n),(off,_,m),(*same,k) = map(packed, ('', '--packing false', '--packing true --packing_strategy bfd'))
    assert (on, how, off)==(True, 'wrapped', False) and same==[True, 'bfd'] and m==54!=n and k!=m
    from ist_nb.run_folder import _outcome_settings
    args,cfg,sft = parse('--data text.txt --use_cpu --dataset_num_proc 2'.split())
    assert _outcome_settings(args, cfg, sft)['dataset_num_proc']==2

def test_a_run_says_what_was_chosen_and_measured_on_the_way(here, capsys):
    "The method that a setting of IST chose, the held-out loss at each evaluation, the checkpoint that was loaded"
    line = '--max_steps 4 --max_length 32 --explore 0.2 --eval_strategy steps --eval_steps 2 --save_steps 2'
    assert main(f'--data good.jsonl {small} {line} --load_best_model_at_end true --output_dir out'.split())==0
    said,res = capsys.readouterr().out,json.loads((here/'out/results.json').read_text())
    assert 'Method: ist, because of --explore, and no --keep' in said
    assert [o for o,_ in res['eval_loss']]==[2, 4] and res['steps_skipped']==0
    assert f"Step 2: eval_loss {res['eval_loss'][0][1]:.4f}" in said
    best = min(res['eval_loss'], key=lambda o: o[1])[0]
    assert f'Loaded: the best checkpoint, checkpoint-{best}' in said

def test_rows_longer_than_the_model_was_made_for_are_said(here, capsys):
    assert main(f'{small} --keep 0 --max_length 600 --max_steps 1 --output_dir out'.split())==0
    assert 'made for at most 512 tokens, and a row has 600' in capsys.readouterr().out
    assert main(f'--data good.jsonl {small} --keep 0 --max_length 600 --max_steps 1 --output_dir fits'.split())==0
    assert 'Warning' not in capsys.readouterr().out

def test_the_card_of_an_adapter_of_ours_loads_it(here):
    "In a Python that has not seen this package"
    line = '--data good.jsonl --max_steps 2 --max_length 32 --keep 0 --peft bottleneck --output_dir out'
    assert main(line.split())==0
    code = (here/'out/README.md').read_text().split('```python')[1].split('```')[0]
    code = code.replace('FOLDER', str(here/'out'))
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-2000:]

def test_model_card(done):
    from huggingface_hub import ModelCard
    card = ModelCard.load(done/'out'/'README.md')
    res = json.loads((done/'out'/'results.json').read_text())
    # pico is not on the hub
    assert card.data.library_name=='peft' and 'ist_nb' in card.data.tags and card.data.base_model is None
    for o in (f"{res['loss_before']:.4f} before, {res['loss_after']:.4f} after", res['data'], 'Importance-aware Sparse '
              'Tuning', '2410.11772', f"in {max(res['times_active'])} of 4 steps"):
        assert o in card.text
    assert 'None' not in card.text.replace('| None |', '') and str(done) not in card.text
    code = card.text.split('```python')[1].split('```')[0].replace('FOLDER', str(done/'out'))
    held = {}
    exec(code, held)
    assert len(held['model'].peft_config)==1 and held['tokenizer'].eos_token

def test_what_a_run_says(here, capsys):
    "Every file it left, and what to do next; nothing of other libraries"
    run('--data good.jsonl', here/'out')
    out,err = capsys.readouterr()
    for p in (here/'out').iterdir(): assert p.name in out
    assert 'ist_evaluate --model' in out and 'Warning' not in err and 'kernels' not in err

def test_a_picture_does_not_fail_a_run(here, monkeypatch):
    from ist_nb import plot
    monkeypatch.setattr(plot, 'plot_importance', lambda *args: 1/0)
    with pytest.warns(UserWarning, match='importance.png could not be drawn'):
        assert run('--data good.jsonl', here/'out')['steps']==4
    assert not (here/'out'/'importance.png').exists()

def test_fast_answers(here):
    "--version, and a mistyped flag, before anything slow is imported"
    for argv,status,said in ((['--version'], 0, 'ist_nb'), (['--learnig_rate', '1'], 2, '--learning_rate')):
        code = (f"import sys; from ist_nb.finetune import main; s = main({argv!r}); assert s=={status}, s; "
                "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")
        r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert r.returncode==0 and said in r.stdout+r.stderr, r.stderr

def test_names_of_flags_are_those_of_the_parser():
    "What the fast check takes for a flag is what the parser takes"
    from ist_nb.cli import _check_names
    flags = [o for a in finetune._parser()._actions for o in a.option_strings]
    assert len(flags)>300
    _check_names('ist_finetune', flags, finetune._names())
    for o in flags[::50]:
        with pytest.raises(ValueError, match='is not an argument'):
            _check_names('ist_finetune', [o+'x'], finetune._names())

def test_debug_shows_the_traceback(here):
    with pytest.raises(Exception) as e:
        main(['--data', 'good.jsonl', '--report_to', 'wandb', '--output_dir', 'out', '--debug', *quick, *ist])
    assert 'wandb' in str(e.value) and not (here/'out').exists()

def test_a_run_says_what_it_forgot(here, capsys):
    res = run('--data good.jsonl --learning_rate 0.02', here/'out')
    o = res['forgotten']
    assert o['rows']==8 and o['text']=='sampled from the model' and o['divergence']>0
    said = f"Forgotten: {o['divergence']:.3f} nats a token away from the model before, on 8 rows that it wrote itself"
    assert said in capsys.readouterr().out
    assert f"nats per token | {o['divergence']:.3f} |" in (here/'out'/'README.md').read_text()

@pytest.mark.parametrize('method', ['ist', pytest.param('dense', marks=pytest.mark.slow)])
def test_keep_holds_the_model(here, method):
    "In a dense run too, which then has IST with all layers beside it; and on a text of one's own"
    jsonl(here/'mine.jsonl', [dict(text='The sun is a star. '*9)]*30)
    line = f'--data good.jsonl --method {method} --general mine.jsonl --max_steps 12 --learning_rate 0.001'
    free,held = (run(line+o, here/o.strip('- ')) for o in (' --keep 0', ' --keep 5'))
    assert held['forgotten']['text']=='mine.jsonl' and held['config']['finetune']['keep']==5
    assert held['forgotten']['divergence']<0.5*free['forgotten']['divergence']
    for o in (held, free): assert (o['times_active'] is None)==(method=='dense')

def test_what_is_run_if_no_method_is_named(here, capsys):
    "The same as with `--method dense --keep 1`, and nothing of IST is written"
    line = '--data good.jsonl --output_dir '
    assert main([*quick, *(line+'out').split()])==0
    said = capsys.readouterr().out
    assert 'Held by a penalty of weight 1 on how far it moves' in said and 'importance' not in said
    assert not {'ist_state.json', 'importance.png'} & {p.name for p in (here/'out').iterdir()}
    res = json.loads((here/'out'/'results.json').read_text())
    assert res['config']['ist']=={'fast':False, 'activation_budget':None} and res['importance'] is None
    assert '| `keep` | 1.0 |' in (here/'out'/'README.md').read_text()

@pytest.mark.slow
def test_the_default_is_dense_and_held(here):
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out'])==0
    for name,line in dict(plain='--method dense', held='--method dense --keep 1').items():
        run('--data good.jsonl '+line, here/name)
    assert weights(here/'out')==weights(here/'held')!=weights(here/'plain')

# settings that change only what a step costs go with every method, and choose none
costs = dict(fast='fold', activation_budget='11MiB')

def test_every_setting_of_cost_is_tried(): assert set(costs)==set(finetune._only_cost)

@pytest.mark.parametrize('name', costs)
def test_a_setting_of_cost_chooses_no_method(name):
    "It changes itself and nothing else; a setting of IST beside it still means IST"
    lines = {'':('dense', 1), '--lora_r 4':('dense', 1), '--keep 0':('dense', 0), '--method dense':('dense', 0),
             '--n_active 4':('ist', 0), '--n_active 4 --keep 2':('ist', 2), '--optimizer_state offload':('ist', 0)}
    for line,want in (lines | {f'--method {o}':(o, 0) for o in ('ist', 'recommended', 'paper', 'rst')}).items():
        (args,cfg,_),plain = parse(f'{line} --{name}={costs[name]}'.split()),vars(parse(line.split())[1])
        assert (args.method, args.keep)==want and getattr(cfg, name)==costs[name], line
        assert {k for k,v in vars(cfg).items() if v!=plain[k]}=={name}, line
        if args.method=='dense': assert (cfg.n_active, cfg.sampler)==(1., 'uniform')

def test_fast_needs_no_value(capsys):
    for line,fast in (('--fast', True), ('--fast --keep 1', True), ('--fast false', False), ('--fast=fold', 'fold')):
        args,cfg,_ = parse(line.split())
        assert (args.method, args.keep, cfg.fast)==('dense', 1, fast), line
    assert main(['--n_active'])==2 and 'n_active=True is not allowed. Give a fraction' in capsys.readouterr().err

@pytest.mark.parametrize('name', ['n_active', 'score_interval', 'optimizer_state'])
def test_a_dense_run_refuses_what_changes_the_training(capsys, name):
    assert main(['--method', 'dense', '--fast', f'--{name}', '4'])==2
    said = capsys.readouterr().err
    assert f'--{name} is a setting of IST' in said and 'give only --fast and --activation_budget' in said

settings = {o.name:o.default for o in dataclasses.fields(finetune.ISTConfig)
            if o.name not in ('seed', *finetune._only_cost)} | dict(depth='0.5 --sampler depth')

@pytest.mark.parametrize('name', settings)
def test_no_setting_of_ist_is_ignored_by_a_plain_dense_run(capsys, name):
    "It makes the run one of IST, unless the dense method is named: then it is refused"
    line = f'--keep 0 --{name} {settings[name]}'.split()
    assert parse(line)[0].method=='ist'
    assert main([*line, '--method', 'dense'])==2 and 'is a setting of IST' in capsys.readouterr().err

@pytest.mark.parametrize('line', ['--keep 0', '--method dense', '--fast false --keep 0'])
def test_a_stack_for_nothing_is_refused(capsys, line):
    assert main(['--stack', 'layers', *line.split()])==2
    assert '--stack layers has no effect' in capsys.readouterr().err
    for o in ('', '--fast', '--activation_budget 1GiB --keep 0', '--method ist'):
        assert parse(['--stack', 'layers', *o.split()])[0].stack=='layers'

def test_a_wrong_stack_is_not_to_be_named_without_the_penalty(here, capsys):
    "The advice of the refusal can be followed"
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', '--stack', 'nonsense'])==2
    assert "stack='nonsense'" in (said := capsys.readouterr().err) and 'give --keep 0 and no --stack.' in said

@pytest.fixture(scope='module')
def held(short_pico, tmp_path_factory):
    "The default run, which a cheaper one must equal"
    d = tmp_path_factory.mktemp('held')
    jsonl(d/'good.jsonl', rows)
    assert main([*quick, '--data', f'{d}/good.jsonl', *saving.split(), '--output_dir', f'{d}/out'])==0
    return d

def spied(monkeypatch):
    "Every `IST` that a run makes from now on"
    from ist_nb import callback
    made = []
    class Spied(callback.IST):
        def __init__(self, *args, **kwargs): made.append(self); super().__init__(*args, **kwargs)
    monkeypatch.setattr(callback, 'IST', Spied)
    return made

@pytest.mark.parametrize('name', costs)
def test_a_cheaper_default_is_the_default(held, tmp_path, monkeypatch, name):
    """Dense, held, every layer at every step, and the same adapter bit for bit: no adapter is frozen in a step, so
    folding changes nothing there, and a block that is computed again is the same. The files of the run say what was
    set, and nothing of IST"""
    made,line = spied(monkeypatch),[*quick, '--data', f'{held}/good.jsonl', f'--{name}={costs[name]}']
    assert main([*line, *saving.split(), '--output_dir', str(tmp_path/'out')])==0
    ist, = made
    assert ist.times_active.tolist()==[4]*4 and len([o for o in ist.parts if type(o).__name__=='Keep'])==1
    assert ist.activations.checkpointed if name=='activation_budget' else ist.model.ist_optimisations==['fold']
    assert weights(tmp_path/'out')==weights(held/'out')
    res,want = (json.loads((d/'out'/'results.json').read_text()) for d in (tmp_path, held))
    for k in ('loss_before', 'loss_after'): assert res[k]==pytest.approx(want[k], rel=1e-5)
    assert res['forgotten']['divergence']==pytest.approx(want['forgotten']['divergence'], rel=1e-3)
    assert res['config']['ist']==dict(fast=False, activation_budget=None) | {name:costs[name]}
    assert json.loads((tmp_path/'out'/'run.json').read_text())['settings'][name]==costs[name]
    card = (tmp_path/'out'/'README.md').read_text()
    assert f'| `{name}` | {costs[name]} |' in card and 'importance-aware-sparse-tuning' not in card
    assert '| `keep` | 1.0 |' in card and 'dense fine-tuning' in card and '`sampler`' not in card
    assert not {'ist_state.json', 'importance.png'} & {p.name for p in (tmp_path/'out').iterdir()}

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a compiler')
def test_a_compiled_default_is_the_default(here):
    "To rounding; without dropout, which compiled code draws in another way"
    line = [*quick, *'--data good.jsonl --lora_dropout 0 --logging_strategy steps --logging_steps 1'.split()]
    for name,more in dict(plain=[], fast=['--fast', 'fold,compile']).items():
        assert main([*line, *more, '--output_dir', name])==0
    plain,fast = (json.loads((here/o/'results.json').read_text()) for o in ('plain', 'fast'))
    assert len(plain['training_loss'])==4
    for a,b in zip(plain['training_loss'], fast['training_loss']): assert a==pytest.approx(b, rel=1e-4)
    for k in ('loss_before', 'loss_after'): assert plain[k]==pytest.approx(fast[k], rel=1e-4)
    assert plain['forgotten']['divergence']==pytest.approx(fast['forgotten']['divergence'], rel=1e-3)

def interrupted(folder, last=4):
    "Make a finished run one that was killed after its middle"
    for o in ('results.json', 'adapter_model.safetensors'): (folder/o).unlink()
    shutil.rmtree(folder/f'checkpoint-{last}')

@pytest.mark.parametrize('keep', ['0', '1'])
def test_a_fast_dense_run_resumes(here, keep):
    line = [*quick, '--data', 'good.jsonl', '--keep', keep, *saving.split(), '--fast', '--output_dir', 'out']
    assert main(line)==0
    want = weights(here/'out')
    interrupted(here/'out')
    assert main([*line, '--resume'])==0 and weights(here/'out')==want

other_costs = [[], ['--fast'], ['--activation_budget', '1GiB'], ['--gradient_checkpointing', 'true']]
@pytest.mark.parametrize('method', ['--keep 0', '--keep 1', '--method ist --score_interval 2 --score_batch_size 4'])
@pytest.mark.parametrize('first,then', [(0, 1), (1, 0), (0, 2), (2, 3)])
def test_a_run_resumes_with_steps_of_another_cost(here, capsys, method, first, then):
    "As after it ran out of memory: it goes on from the checkpoint, ends as it would have, and says what is different"
    from safetensors.torch import load_file
    line = [*quick, *method.split(), *saving.split(), *'--data good.jsonl --lora_dropout 0 --output_dir out'.split()]
    assert main([*line, *other_costs[first]])==0
    want = load_file(here/'out'/'adapter_model.safetensors')
    interrupted(here/'out')
    capsys.readouterr()
    assert main([*line, *other_costs[then], '--resume'])==0
    said,got = capsys.readouterr().out,load_file(here/'out'/'adapter_model.safetensors')
    changed = [o[0].removeprefix('--') for o in (other_costs[first], other_costs[then]) if o]
    assert 'not be bit for bit' in said and all(f'{o} was ' in said for o in changed)
    assert all((got[k]-want[k]).abs().max()<1e-5 for k in want)
    assert json.loads((here/'out'/'results.json').read_text())['steps']==4
    now,want = (json.loads((here/'out'/'run.json').read_text())['settings'][k] for k in ('fast', 'activation_budget'))
    assert (now, want)==(then==1, '1GiB' if then==2 else None)

def test_a_run_resumes_with_its_moments_elsewhere(done, half, capsys):
    "Bit for bit; but 'reset' loses them, and is another run"
    line = f'--data {done}/good.jsonl {saving} --resume'
    assert main([*quick, *ist, *line.split(), '--output_dir', 'half', '--optimizer_state', 'reset'])==2
    assert "optimizer_state was 'keep' and is 'reset'" in capsys.readouterr().err
    run(f'{line} --optimizer_state offload', half)
    assert weights(half)==weights(done/'out')

def test_a_fast_dense_run_in_python(here, monkeypatch):
    "`ist_finetune --fast` is ISTConfig.rst(n_active=1., fast=True) and the part `Keep` in a callback"
    from ist_nb import ISTCallback,ISTConfig
    from ist_nb.data import load_data
    from ist_nb.keep import Keep,own_text
    line = [*quick, '--data', 'good.jsonl', '--fast', '--output_dir', 'out']
    assert main(line)==0
    args,cfg,sft = parse([*line[:-1], 'python'])
    lm,tokenizer = model.load_model('pico')
    text = own_text(lm, tokenizer, 48, 32, 42)
    callback = ISTCallback(ISTConfig.rst(n_active=1., fast=True), parts=[Keep({k:v[1::2] for k,v in text.items()})])
    assert cfg==callback.config
    trainer = finetune._sft_trainer(lm, tokenizer, 'pico', sft, load_data('good.jsonl', seed=42),
                                    peft_config=model._adapter_config(args), callbacks=[callback])
    trainer.train(); trainer.save_model()
    assert weights(here/'python')==weights(here/'out')

def test_what_a_dense_run_cannot_have_is_named(here, capsys):
    "With all that must be left out, and then it trains"
    line = [*unlike_lora, '--data', 'good.jsonl', '--output_dir', 'out', '--peft', 'prompt_tuning', '--peft_options',
            '{"num_virtual_tokens":4}']
    assert main([*line, '--fast', '--activation_budget', '0.5'])==2
    said = capsys.readouterr().err
    assert '--fast True --activation_budget 0.5 --keep 1: ' in said
    off = '--fast False --activation_budget None --keep 0'
    assert f'To train without, give {off}.' in said and main([*line, *off.split()])==0

@pytest.mark.parametrize('peft', ['prompt_tuning', 'prefix_tuning', 'p_tuning', 'adaption_prompt'])
def test_a_setting_that_peft_has_no_default_for_is_named(here, capsys, peft):
    "With the option to give; and that option is then accepted"
    line = [*unlike_lora, '--data', 'good.jsonl', '--output_dir', 'out', '--keep', '0', '--peft', peft]
    assert main(line)==2
    option = re.search(r"--peft_options '(.*)'", capsys.readouterr().err)[1]
    args,*_ = parse([*line, '--peft_options', option])
    config = model._adapter_config(args)
    assert json.loads(option) and all(getattr(config, k)==v for k,v in json.loads(option).items())

@pytest.mark.parametrize('peft,flag', [('ia3', '--lora_r 8'), ('oft', '--lora_dropout 0.1'), ('vera', '--lora_alpha 8'),
                                       ('prompt_tuning', '--target_modules q_proj')])
def test_a_setting_of_lora_is_not_ignored_by_another_method(here, capsys, monkeypatch, peft, flag):
    "Nor is one that chooses modules by a method that has none; both before the model is loaded"
    monkeypatch.setattr(finetune, 'load_model', None)
    assert main([*unlike_lora, '--data', 'good.jsonl', '--output_dir', 'out', '--peft', peft, *flag.split()])==2
    said = capsys.readouterr().err
    assert f'has no effect on --peft {peft}. Leave it out' in said and flag.split()[0].split('_')[-1] in said

def test_a_scaled_loss_is_refused_before_the_model_is_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr(finetune, 'load_model', None)
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', '--fp16'])==2
    said = capsys.readouterr().err
    assert '--fp16' in said and '--keep 1' in said and '--bf16' in said

@pytest.mark.parametrize('line,parts', [
    ('--activation_budget 0.5 --gradient_checkpointing true', ['--activation_budget 0.5: ', 'every block twice']),
    ('--activation_budget 0.5 --gradient_checkpointing true --method ist', ['computes every block twice']),
    ('--activation_budget 0.5 --torch_compile true', ['torch_compile=True']),
    ('--enable_jit_checkpoint true', ['enable_jit_checkpoint=True']),
    ('--resume --restore_callback_states_from_checkpoint true', ['lacks your parts', 'Leave that flag off']),
    ('--use_liger_kernel true --keep 0', ['--use_liger_kernel', 'install liger-kernel']),
    ('--lr_scheduler_type warmup_stable_decay', ['warmup_stable_decay', 'num_decay_steps', '--lr_scheduler_kwargs']),
    ('--lr_scheduler_kwargs {"foo":1}', ["{'foo': 1}", 'unexpected keyword', 'take another']),
    ('--lr_scheduler_type cosine_with_min_lr', ['One of min_lr', '--lr_scheduler_kwargs']),
    ('--lr_scheduler_type polynomial --learning_rate 1e-8', ['--learning_rate 1e-08', 'lr_end']),
    ('--fsdp full_shard', ['--keep 1: ', 'not with FSDP', 'give --keep 0']),
    ('--fsdp full_shard --keep 0 --general good.jsonl', ['--general: ', 'not with FSDP']),
    ('--lr_scheduler_kwargs 5', ['--lr_scheduler_kwargs', 'Give a dictionary']),
    ('--lr_scheduler_type cosine_with_min_lr --learning_rate 0 --lr_scheduler_kwargs {"min_lr":1e-6}',
     ['--learning_rate 0 ', 'division by zero'])])
def test_what_must_fail_later_is_refused_before_the_model_is_loaded(here, capsys, monkeypatch, line, parts):
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda o, *a: None if o=='liger_kernel' else find(o, *a))
    for o in ('load_model', '_read_data'): monkeypatch.setattr(finetune, o, None)
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', *line.split()])==2
    said = capsys.readouterr().err
    assert all(o in said for o in parts), said
    assert not (here/'out').exists()

@pytest.mark.parametrize('given', [
    ['reduce_lr_on_plateau', '{"min_lr":[1e-6,1e-6]}'], ['greedy', '{"min_lr":[0,0]}'],
    ['warmup_stable_decay', '{"num_decay_steps":3}'], ['cosine_with_min_lr', '{"min_lr":0}']])
def test_a_schedule_that_can_be_is_not_refused(given):
    "With a setting for each group of parameters, of which the Trainer makes two"
    name,settings = given
    _,_,sft = parse(['--lr_scheduler_type', name, '--lr_scheduler_kwargs', settings, '--eval_strategy', 'steps'])
    assert sft.lr_scheduler_kwargs==json.loads(settings)

def test_an_optimizer_that_is_not_there_is_refused_before_anything_is_measured(here, capsys, monkeypatch):
    for o in ('_held_out', '_kept_text'): monkeypatch.setattr(finetune, o, None)
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', '--optim', 'schedule_free_adamw'])==2
    assert 'schedulefree' in capsys.readouterr().err

@pytest.mark.parametrize('n', ['1', '4'])
def test_a_budget_too_small_is_all_that_is_said(here, capsys, n):
    "In a run of one step too; the end of a run that fails is not also called too early for `Keep`"
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', '--activation_budget', '1KiB', '--max_steps', n,
                 '--save_strategy', 'no'])==2
    said = capsys.readouterr().err
    assert 'activation_budget=1KiB cannot be kept' in said and 'the run ended' not in said and not (here/'out').exists()

def no_compiler(*args, **kwargs): raise RuntimeError('No working compiler found\nat all')

@pytest.mark.parametrize('fast,lacks', [('fp8', "'fp8' needs"), ('fold, fp8', "'fp8' needs"),
    ('fold,compile', 'No working compiler found'), ('fold,loss', 'has a loss in pieces of its own')])
def test_what_this_machine_cannot_do_is_refused_before_the_model_is_loaded(here, capsys, monkeypatch, fast, lacks):
    "And before the data are read; whatever is missing here for 8 bits, torchao or a GPU"
    from ist_nb import speed
    monkeypatch.setitem(speed.optimisations.entries, 'fp8', speed._to_fp8)   # a notebook may have registered its own
    monkeypatch.setattr('torch.compile', no_compiler)
    for o in ('load_model', '_read_data'): monkeypatch.setattr(finetune, o, None)
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', '--fast', fast])==2
    said = capsys.readouterr().err
    assert lacks in said and re.search("leave '(fp8|loss)' out|give --fast fold", said, re.I) and 'at all' not in said
    assert not (here/'out').exists() and set(speed.optimisations.names())=={'fold', 'compile', 'fp8', 'loss'}

@pytest.mark.parametrize('peft', ['oft', 'ia3', 'bottleneck'])
def test_what_fast_cannot_make_faster_is_said(here, capsys, peft):
    "Adapters that do not fold"
    assert main([*unlike_lora, '--data', 'good.jsonl', '--output_dir', 'out', '--peft', peft, '--fast', '--keep',
                 '0'])==0
    said = capsys.readouterr().out
    assert 'nothing in this model can be made faster by fold' in said and 'fast steps with' not in said

def test_only_what_a_refusal_is_about_is_to_be_left_out(here, capsys):
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', '--torch_compile', 'true',
                 '--activation_budget', '0.5'])==2
    said = capsys.readouterr().err
    assert '--activation_budget 0.5: ' in said and 'To train without, give --activation_budget None.' in said
    assert '--keep' not in said

def test_a_model_that_cannot_be_held_is_refused(here, capsys, monkeypatch):
    "By default too, with what to do; and `--keep 0` then trains"
    def no_text(*args): raise RuntimeError('probability tensor contains nan.')
    monkeypatch.setattr('ist_nb.keep.own_text', no_text)
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out'])==2 and not (here/'out').exists()
    said = capsys.readouterr().err
    assert '--keep 1: probability tensor contains nan. To train without, give --keep 0.' in said
    assert main([*quick, '--data', 'good.jsonl', '--output_dir', 'out', '--keep', '0'])==0

def test_a_held_run_resumes_bit_for_bit(here):
    line = '--data good.jsonl --keep 1 --save_steps 2 --max_steps 6'
    whole = run(line, here/'whole')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, '_forgotten', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*quick, *ist, *line.split(), '--output_dir', str(here/'out')])==130
    shutil.rmtree(here/'out'/'checkpoint-6')
    again = run(line+' --resume', here/'out')
    assert weights(here/'out')==weights(here/'whole') and again['forgotten']==whole['forgotten']

def test_what_cannot_be_measured_does_not_stop_a_run(here, capsys, monkeypatch):
    def no_text(*args): raise RuntimeError('probability tensor contains nan')
    monkeypatch.setattr('ist_nb.keep.own_text', no_text)
    assert run('--data good.jsonl', here/'out')['forgotten'] is None
    assert 'What the model forgets is not measured: probability tensor' in capsys.readouterr().out

def test_settings_that_change_the_adapter_are_compared_on_resume(here):
    for name in ('load_best_model_at_end', 'keep', 'general'):
        assert name in run_folder._outcome_settings(*parse(['--data', 'good.jsonl'])), name

def test_another_general_text_is_another_run(here, capsys):
    jsonl(here/'mine.jsonl', [dict(text='The sun is a star. '*9)]*30)
    line = '--data good.jsonl --keep 1 --general mine.jsonl --save_steps 2'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, '_forgotten', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*quick, *ist, *line.split(), '--output_dir', str(here/'out')])==130
    jsonl(here/'mine.jsonl', [dict(text='The moon is not. '*9)]*30)
    assert main([*quick, *ist, *line.split(), '--resume', '--output_dir', str(here/'out')])==2
    assert 'not those that the run' in capsys.readouterr().err
