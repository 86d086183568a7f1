"The shipped model and data are what their cards say"
import json,re,sys,pytest,torch
from pathlib import Path
from transformers import AutoModelForCausalLM,AutoTokenizer

root = Path(__file__).parent.parent
assets = root/'ist_nb/assets'
sys.path.insert(0, str(root/'tools'))
from make_physics import held_out,read_book

def rows(name):
    return [json.loads(l) for l in (assets/'physics'/f'{name}.jsonl').read_text(encoding='utf-8').split('\n') if l]

@pytest.fixture(scope='module')
def tok(): return AutoTokenizer.from_pretrained(assets/'pico')

@pytest.fixture(scope='module')
def model(): return AutoModelForCausalLM.from_pretrained(assets/'pico').eval()

def test_size(model):
    assert (assets/'pico/model.safetensors').stat().st_size <= 8_000_000
    assert model.config.num_hidden_layers >= 12
    assert model.dtype==torch.float32
    assert not [p for p in (assets/'pico').iterdir() if p.suffix in ('.bin','.pt','.pkl','.pth')]

@pytest.mark.parametrize('s', ['The cat sat.', ' two  spaces\n\n\tand a tab', 'Ünïcödé ’ — Ω = 5 µm',
                               '漢字 и кириллица 🔎', '\x00\x7f'])
def test_round_trip(tok, s): assert tok.decode(tok(s)['input_ids'])==s

def test_special(tok):
    assert tok.pad_token_id!=tok.eos_token_id==tok.bos_token_id
    msgs = [dict(role='user', content='Hi'), dict(role='assistant', content='Yo')]
    d = tok.apply_chat_template(msgs, return_dict=True, return_assistant_tokens_mask=True)
    assert tok.decode([i for i,m in zip(d['input_ids'], d['assistant_masks']) if m])=='Yo<|endoftext|>'

@torch.no_grad()
def test_loss(tok, model):
    "Over the windows of 512 tokens that the script makes"
    ids = torch.tensor([i for r in rows('test') for i in [tok.bos_token_id]+tok(r['text'], verbose=False)['input_ids']])
    x = ids.unfold(0, 513, 512)
    loss = sum(torch.nn.functional.cross_entropy(model(b[:,:-1]).logits.flatten(0,1), b[:,1:].flatten(),
                                                 reduction='sum').item() for b in x.split(8))
    said = json.loads((root/'benchmarks/results/pico.json').read_text())['physics_test']
    assert len(ids)==said['tokens']
    assert loss/x[:,1:].numel()==pytest.approx(said['nats_per_token'], abs=0.02)
    card = (assets/'pico/README.md').read_text(encoding='utf-8')
    assert f"test.jsonl` | {said['nats_per_token']:.3f} | {said['bits_per_byte']:.3f} |" in card

def test_generate(tok, model):
    "Most words that it writes are words of a textbook it never saw"
    def words(s): return re.findall('[a-z]+', s.lower())
    known = {w for n in ('train','test') for r in rows(n) for w in words(r['text'])}
    with torch.random.fork_rng():
        torch.manual_seed(42)
        out = model.generate(torch.full((4,1), tok.bos_token_id), attention_mask=torch.ones(4, 1), max_new_tokens=64,
                             do_sample=True, temperature=0.7)
    ws = [w for s in tok.batch_decode(out, skip_special_tokens=True) for w in words(s)]
    assert len(ws) > 80
    assert sum(w in known for w in ws)/len(ws) > 0.6

def test_physics_split():
    train,test = ({r['text'] for r in rows(n)} for n in ('train','test'))
    assert not train & test
    assert all(set(r)=={'title','text'} for n in ('train','test') for r in rows(n))

def test_source(real_data):
    "Every row is a module of the held-out book as `read_book` gives it, and of no other book"
    mods = {p.name.split('.')[0]:{r['text'] for r in read_book(p)} for p in (real_data/'textbooks').glob('*.jsonl.gz')}
    shipped = {r['text'] for n in ('train','test') for r in rows(n)}
    assert shipped <= mods.pop(held_out)
    assert not shipped & set().union(*mods.values())
