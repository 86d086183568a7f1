"`ist_keep`: an adapter that was trained elsewhere is measured, and faded into an ordinary adapter"
import json,pytest,subprocess,sys,torch
from peft import LNTuningConfig,LoraConfig,PeftModel,PromptTuningConfig,get_peft_model
from ist_nb import fading,keep
from ist_nb.evaluate import held_out_loss
from ist_nb.fading import main
from ist_nb.keep import divergence,own_text
from ist_nb.model import load_model

lora = dict(r=4, target_modules=['q_proj', 'down_proj'], task_type='CAUSAL_LM')

def make(path, config=None, noise=0.05):
    "An adapter that someone else left: plain PEFT, with a response of `noise`"
    torch.manual_seed(1)
    model = get_peft_model(load_model('pico')[0], config or LoraConfig(**lora))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(noise*torch.randn(p.shape))
    model.save_pretrained(path)
    return path

chats = [dict(messages=[dict(role='user', content=f'How far is stop {i}?'),
                        dict(role='assistant', content=f'Stop {i} is {i+2} minutes away.')]) for i in range(40)]

@pytest.fixture(scope='module')
def here(short_pico, tmp_path_factory):
    d = tmp_path_factory.mktemp('elsewhere')
    make(d/'lora')
    make(d/'nothing', noise=0.)
    (d/'chats.jsonl').write_text('\n'.join(map(json.dumps, chats)))
    return d

quick = '--rows 3 --max_length 40'

def digest(folder): return {p.name:p.read_bytes() for p in folder.iterdir() if p.is_file()}

def test_the_measure_is_the_divergence(here, capsys, monkeypatch):
    "0 for an adapter that changes nothing; otherwise what `divergence` says of PEFT's own model, scaled as one likes"
    monkeypatch.chdir(here)
    assert main(f'nothing {quick}'.split())==0 and 'Forgotten: 0.000 nats' in capsys.readouterr().out
    conf = json.loads((here/'lora'/'adapter_config.json').read_text())
    for alpha in (8, 3):
        (here/'lora'/'adapter_config.json').write_text(json.dumps(conf | dict(lora_alpha=alpha)))
        base,tokenizer = load_model('pico')
        text = own_text(base, tokenizer, 3, 40, 0)
        want = divergence(PeftModel.from_pretrained(base, here/'lora'), text)
        assert main(f'lora {quick}'.split())==0 and f'Forgotten: {want:.3f} nats' in capsys.readouterr().out
        assert want>0.002
    assert not (here/'runs').exists()

@pytest.fixture(scope='module')
def faded(here):
    "The folder of a faded adapter, and what was seen on the way"
    seen,was,real = {},digest(here/'lora'),keep.fade
    with pytest.MonkeyPatch.context() as mp:
        def fade(model, task, text, price, steps=6):
            seen.update(model=model, task=[b['input_ids'] for b in task], text=text)
            return real(model, task, text, price, steps)
        def judge(model, text): seen['judge'] = text; return divergence(model, text)
        def held_out(model, batches):
            batches = list(batches)
            seen['rows'] = [b['input_ids'] for b in batches]
            return held_out_loss(model, batches)
        mp.setattr(keep, 'fade', fade); mp.setattr(keep, 'divergence', judge)
        mp.setattr('ist_nb.evaluate.held_out_loss', held_out)
        assert main(f'{here}/lora --data {here}/chats.jsonl --output_dir {here}/out {quick}'.split())==0
    assert digest(here/'lora')==was
    return here/'out',seen

def rows(batches): return {tuple(i for i in r if i) for b in batches for r in b.tolist()}

def test_what_judges_chose_nothing(faded):
    _,seen = faded
    assert len(rows(seen['task']))==len(rows(seen['rows']))==20 and not rows(seen['task'])&rows(seen['rows'])
    texts = [rows([seen[o]['input_ids']]) for o in ('judge', 'text')]
    assert all(len(o)==3 for o in texts) and not texts[0]&texts[1]

def test_plain_peft_loads_the_faded_function(faded, here):
    "Bit for bit what was judged, merged too; and it is the adapter's own weights times the gates"
    folder,seen = faded
    again,ids = PeftModel.from_pretrained(load_model('pico')[0], folder).eval(),seen['text']['input_ids']
    with torch.no_grad():
        want = seen['model'].eval()(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, want)
    gates,old = json.loads((folder/'results.json').read_text())['gates'],make(here/'again')
    full = dict(PeftModel.from_pretrained(load_model('pico')[0], old).named_parameters())
    assert len(gates)==8 and min(gates.values())<0.9
    for n,p in again.named_parameters():
        torch.testing.assert_close(p, full[n]*(gates[n.rpartition('.lora_B')[0]] if 'lora_B' in n else 1))
    with torch.no_grad():
        torch.testing.assert_close(again.merge_and_unload()(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)

def test_the_folder_says_what_was_done(faded, here, capsys, monkeypatch):
    "The record, the card, and that the other commands find the base model"
    monkeypatch.chdir(here)
    res = json.loads((faded[0]/'results.json').read_text())
    assert res['faded']['divergence']<res['trained']['divergence'] and res['without']['divergence']==0
    assert res['rows']==[20, 20] and res['config']['keep']['price']==4
    assert '## Faded' in (faded[0]/'README.md').read_text()
    assert main(f'out {quick}'.split())==0
    assert f"Forgotten: {res['faded']['divergence']:.3f} nats" in capsys.readouterr().out
    assert main(f'lora --data chats.jsonl --output_dir out {quick}'.split())==2
    assert 'out is not empty' in capsys.readouterr().err

def test_a_general_text(here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    assert main(f'lora --general chats.jsonl {quick}'.split())==0
    assert 'on 3 rows of chats.jsonl' in capsys.readouterr().out

def other(name, **kw): return lambda d: make(d/name, LoraConfig(**lora | kw))
mistakes = [
    ('no adapter named', None, '', ['required: ADAPTER', '--help']),
    ('a model, and no adapter', lambda d: (d/'model').mkdir(), 'model', ['model is not an adapter', 'save_pretrained']),
    ('a file', lambda d: (d/'file').write_text(''), 'file', ['file is not an adapter']),
    ('no such folder', None, './nowhere', ['./nowhere', 'no such folder']),
    ('no such id', None, 'nobody/nothing', ["'nobody/nothing'", 'no folder here, nor an adapter']),
    ('flag', None, 'lora --pirce 3', ["'--pirce'", "did you mean '--price'"]),
    ('price below 0', None, 'lora --data chats.jsonl --price -1', ['--price -1', 'above 0']),
    ('price 0', None, 'lora --data chats.jsonl --price 0', ['--price 0', 'above 0']),
    ('no price', None, 'lora --data chats.jsonl --price nan', ['--price nan', 'above 0']),
    ('rows', None, 'lora --rows 0', ['--rows 0', 'at least 1']),
    ('nothing to fade on', None, 'lora --output_dir out', ['--output_dir', 'needs --data']),
    ('a price of nothing', None, 'lora --price 99', ['--price', 'needs --data']),
    ('steps of nothing', None, 'lora --steps 3', ['--steps', 'needs --data']),
    ('output is a file', None, 'lora --data chats.jsonl --output_dir chats.jsonl', ['chats.jsonl', 'it is a file']),
    ('no such data', None, 'lora --data chat.jsonl', ['chat.jsonl', "did you mean 'chats.jsonl'"]),
    ('few rows', lambda d: (d/'few.jsonl').write_text('\n'.join(map(json.dumps, chats[:9]))), 'lora --data few.jsonl',
     ['rows that choose', 'at least 8']),
    ('base model gone', lambda d: edit(make(d/'gone'), base_model_name_or_path='/gone/away'), 'gone',
     ["'/gone/away' as its base model", 'no such folder', '--model']),
    ('another base model', None, 'lora --model picco', ["'picco'", "did you mean 'pico'"]),
    ('DoRA is measured only', other('dora', use_dora=True), 'dora --data chats.jsonl', ['LoRA without DoRA']),
    ('a whole module', other('whole', modules_to_save=['lm_head']), 'whole --data chats.jsonl', ['lm_head', 'linear']),
    ('PiSSA', other('pissa', init_lora_weights='pissa'), 'pissa', ['pissa', 'model itself']),
    ('layers twice', other('twice', layer_replication=[[0, 2], [1, 4]]), 'twice',
     ['layer_replication', 'model itself']),
    ('a prompt', lambda d: make(d/'prompt', PromptTuningConfig(num_virtual_tokens=4, task_type='CAUSAL_LM')), 'prompt',
     ['prompt', 'switch off'])]

def edit(folder, **kw):
    path = folder/'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | kw))

@pytest.mark.parametrize('prepare,line,parts', [o[1:] for o in mistakes], ids=[o[0] for o in mistakes])
def test_mistakes(prepare, line, parts, here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    if prepare: prepare(here)
    capsys.readouterr()
    before = set(here.iterdir())
    assert main([*line.split(), *quick.split()] if '--rows' not in line else line.split())==2
    said = capsys.readouterr().err
    assert said.startswith('ist_keep: ') and said.count('\n')==1 and not [o for o in parts if o not in said], said
    assert set(here.iterdir())==before     # nothing is left behind

def test_dora_and_other_methods_are_measured(here, capsys, monkeypatch):
    "What cannot be faded can still be measured"
    monkeypatch.chdir(here)
    make(here/'dora2', LoraConfig(**lora, use_dora=True))
    make(here/'norms', LNTuningConfig(task_type='CAUSAL_LM'))
    for o in ('dora2', 'norms'): assert main(f'{o} {quick}'.split())==0 and 'Forgotten: 0.' in capsys.readouterr().out

def test_an_adapter_without_use_is_told(here, capsys, monkeypatch):
    "Rows of another task would fade everything"
    monkeypatch.chdir(here)
    real = fading._fade
    def no_better(*args):
        res = real(*args)
        return res | dict(without=dict(loss=0., divergence=0.))
    monkeypatch.setattr(fading, '_fade', no_better)
    monkeypatch.setattr('ist_nb.keep.fade', lambda model, *args: dict.fromkeys(['a.q_proj', 'a.v_proj'], 1.))
    assert main(f'lora --data chats.jsonl --output_dir useless {quick}'.split())==0
    assert 'Are they rows of its task?' in capsys.readouterr().out

@pytest.mark.parametrize('argv,status,says', [(['--help'], 0, '--price'), (['--version'], 0, 'ist_keep 0.'),
                                              (['x', '--price', '0'], 2, 'above 0')], ids=lambda o: str(o)[:12])
def test_what_needs_no_torch(argv, status, says):
    res = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'ist_nb.fading', *argv], capture_output=True,
                         text=True)
    assert res.returncode==status and says in res.stdout+res.stderr
    assert not {'torch', 'transformers'} & {l.split('|')[-1].strip() for l in res.stderr.splitlines()}

def test_the_revision_of_the_model_is_kept(here, monkeypatch, capsys, tmp_path):
    "A run on another revision of a model of the hub names it to PEFT and in its card, and is measured against it"
    import transformers
    from ist_nb.finetune import main as finetune
    from ist_nb.model import assets
    main_model = load_model('pico')[0]
    with torch.no_grad():
        for n,p in main_model.named_parameters():
            if 'down_proj' in n: p.mul_(0.5)
    main_model.save_pretrained(tmp_path/'main')
    load_model('pico')[1].save_pretrained(tmp_path/'main')
    asked,places = [],[]     # of the model and its tokenizer
    for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        def load(path, *args, real=cls.from_pretrained, **kwargs):
            if str(path)!='me/tiny': return real(path, *args, **kwargs)
            asked.append(kwargs.get('revision'))
            places.append(kwargs.get('cache_dir'))
            res = real(assets/'pico' if kwargs.pop('revision')=='v1' else tmp_path/'main', *args, **kwargs)
            if isinstance(res, tuple): res[0].name_or_path = res[0].config._name_or_path = path     # a model
            return res
        monkeypatch.setattr(cls, 'from_pretrained', load)
    monkeypatch.chdir(tmp_path)
    line = ('--model me/tiny --model_init_kwargs {"revision":"v1","cache_dir":"c"} --output_dir run --max_steps 8 '
            f'--learning_rate 0.01 --keep 0 --max_length 32 --disable_tqdm true --data {here}/chats.jsonl')
    assert finetune(line.split())==0
    assert asked==['v1']*2 and places==['c']*2
    assert json.loads((tmp_path/'run'/'adapter_config.json').read_text())['revision']=='v1'
    assert "from_pretrained('me/tiny', revision='v1')" in (tmp_path/'run'/'README.md').read_text()
    capsys.readouterr()
    said = []
    for more in ('', '--model pico'):
        assert main(f'run {more} {quick}'.split())==0
        said.append(capsys.readouterr().out.partition('.\n')[0])
    assert asked==['v1']*4 and said[0]==said[1]
    assert main(f'run --data {here}/chats.jsonl --output_dir less --steps 2 {quick}'.split())==0
    assert "from_pretrained('me/tiny', revision='v1')" in capsys.readouterr().out
    assert json.loads((tmp_path/'less'/'adapter_config.json').read_text())['revision']=='v1'
