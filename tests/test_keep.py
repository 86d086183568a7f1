"What a model forgets: the measure, the part that holds it, and the gates that turn an adapter back"
from types import SimpleNamespace
import contextlib,pytest,re,shutil,torch,warnings
from peft.tuners.lora.config import KasaConfig
from peft import (AdaptionPromptConfig,IA3Config,LoHaConfig,LoraConfig,PeftModel,PromptTuningConfig,VeraConfig,
                  get_peft_model)
from torch import nn
from transformers import (BartConfig,BartForConditionalGeneration,LlamaConfig,LlamaForCausalLM,
                          LlamaForSequenceClassification,LlamaForTokenClassification,T5Config,
                          T5ForConditionalGeneration)
from ist_nb import IST,ISTConfig,ISTError
from ist_nb.keep import Keep,_gated,_gate_gradient,_set_gates,divergence,fade,own_text,text_rows
from ist_nb.layers import find_layers
from ist_nb.model import load_model
from ist_nb.suppression import suppress

lora = dict(r=4, target_modules='all-linear', task_type='CAUSAL_LM')

def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                        num_attention_heads=2, num_key_value_heads=2))

def tuned(config=None, noise=0.3):
    "A model whose adapters do something"
    model = get_peft_model(llama(), config or LoraConfig(**lora))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(noise*torch.randn(p.shape, generator=g))
    return model.eval()

def some_text(rows=6, length=12, seed=2):
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    return dict(input_ids=ids, labels=labels)

def by_hand(model, text):
    "The formula, token by token"
    q = model(input_ids=text['input_ids']).logits[:, :-1].log_softmax(-1)
    with torch.no_grad(), model.disable_adapter():
        p = model(input_ids=text['input_ids']).logits[:, :-1].log_softmax(-1)
    return ((p.exp()*(p-q)).sum(-1))[text['labels'][:, 1:]!=-100].mean()

def test_divergence_is_the_formula_and_0_without_effect():
    model,text = tuned(),some_text()
    with torch.no_grad(): want = by_hand(model, text).item()
    assert want>0.01 and divergence(model, text)==pytest.approx(want, rel=1e-5)
    assert divergence(get_peft_model(llama(), LoraConfig(**lora)), text)==0

@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_is_not_read(side):
    model,text = tuned(),some_text()
    more = text | dict(attention_mask=torch.ones_like(text['input_ids']))
    def padded(v, fill): # a model reads what stands before
        parts = [v, torch.full((6, 5), fill)]
        return torch.cat(parts if side=='right' else parts[::-1], 1)
    longer = {k:padded(v, fill) for (k,v),fill in zip(more.items(), (7, -100, 0))}
    assert divergence(model, longer)==pytest.approx(divergence(model, text), rel=1e-4)

def test_own_text_is_the_base_models_and_moves_no_random_number():
    base,tokenizer = load_model('pico')
    text = own_text(base, tokenizer, rows=5, length=40, seed=3)
    assert text['input_ids'].shape==text['labels'].shape==(5, 40)
    began = (text['labels']==-100).sum(1)
    assert began[:3].tolist()==[1]*3 and (began[3:]>1).all()        # an empty page, and a chat
    written = text['labels']!=-100
    assert (text['labels'][written]==text['input_ids'][written]).all()
    model = get_peft_model(base, LoraConfig(**lora))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.1)
    model.train()
    state = torch.get_rng_state()
    again = own_text(model, tokenizer, rows=5, length=40, seed=3)     # the adapters have no part in it
    assert torch.equal(again['input_ids'], text['input_ids']) and torch.equal(torch.get_rng_state(), state)
    assert model.training and model.generation_config.eos_token_id==tokenizer.eos_token_id
    assert not torch.equal(own_text(model, tokenizer, rows=5, length=40, seed=4)['input_ids'], text['input_ids'])
    with pytest.raises(ISTError, match='leaves no room'): own_text(model, tokenizer, rows=2, length=1)

def test_keep_adds_the_gradient_of_the_divergence_to_the_layers_of_the_step():
    model,text = tuned(),some_text(rows=4)
    ist = IST(model, ISTConfig.rst(n_active=2))
    ist.add(part := Keep(text, weight=0.7, every=3, rows=4))
    for t in range(5):
        with ist.step():
            active = set(ist.active.tolist())
            for i,o in enumerate(ist.layers):
                if t%3 or i not in active: assert all(p.grad is None for p in o.params); continue
                want = torch.autograd.grad(0.7*3*by_hand(model, text), o.params)
                for p,w in zip(o.params, want): torch.testing.assert_close(p.grad, w, rtol=1e-4, atol=1e-6)
            model.zero_grad()
    assert [t for t,_ in part.seen]==[0, 3]
    assert part.seen[0][1]==pytest.approx(divergence(model, text), rel=1e-5)
    assert part.report().keys()=={'ist/divergence'} and part.report()=={}

def test_keep_moves_no_random_number_and_resumes_bit_for_bit():
    def run(upto, state=None, keep=True):
        model,text = tuned(LoraConfig(**lora, lora_dropout=0.1)),some_text()
        model.train()
        opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ist = IST(model, ISTConfig.rst(n_active=2))
        if keep: ist.add(Keep(text, every=2, rows=2))
        if state:
            ist.load_state_dict(state[0]); model.load_state_dict(state[1]); torch.set_rng_state(state[2])
        while ist.t<upto:
            batch = some_text(seed=10+ist.t)
            with ist.step(): model(**batch).loss.backward(); opt.step(); opt.zero_grad()
        return ist.state_dict(),{k:v.clone() for k,v in model.state_dict().items()},torch.get_rng_state()
    whole,half = run(6),run(3)
    resumed = run(6, half)
    assert all(torch.equal(whole[1][k], v) for k,v in resumed[1].items())
    bare = run(6, keep=False)
    assert torch.equal(bare[2], whole[2]) and not all(torch.equal(bare[1][k], v) for k,v in whole[1].items())

def test_keep_holds():
    "At the same number of steps the divergence is smaller, and the more so the heavier it weighs"
    def run(weight):
        model = get_peft_model(llama(), LoraConfig(**lora))
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        ist = IST(model, ISTConfig.rst(n_active=1.))
        if weight: ist.add(Keep(some_text(16), weight=weight))
        for t in range(24):
            with ist.step(): model(**some_text(8, seed=5)).loss.backward(); opt.step(); opt.zero_grad()
        return divergence(model, some_text(16, seed=9))
    none,little,much = map(run, (0, 0.3, 3.))
    assert much<little<none

@pytest.mark.parametrize('config', [None, IA3Config(task_type='CAUSAL_LM')])    # 0 is neutral in one, 1 in the other
def test_the_gradient_of_a_gate_is_that_of_the_loss(config):
    model,text = tuned(config, noise=0.5 if config else 0.05),some_text()
    gated = _gated(model)
    gates = torch.linspace(0.2, 0.9, len(gated))
    _set_gates(gated, gates)
    model(**text).loss.backward()
    found = _gate_gradient(gated)
    def loss_at(moved):
        _set_gates(gated, moved)
        with torch.no_grad(): return model(**text).loss.item()
    step = 0.02*torch.eye(len(gates))
    slopes = torch.tensor([(loss_at(gates+o)-loss_at(gates-o))/0.04 for o in step])
    torch.testing.assert_close(found, slopes, rtol=1e-2, atol=1e-2*slopes.abs().max().item())

configs = dict(lora=LoraConfig(**lora), rslora=LoraConfig(**lora, use_rslora=True), vera=VeraConfig(r=8),
               ia3=IA3Config(task_type='CAUSAL_LM'), loha=LoHaConfig(r=4, target_modules=['q_proj', 'up_proj']))

@pytest.mark.parametrize('name', configs)
def test_a_gate_is_the_share_of_the_response(name):
    "By the definition of suppression, whatever the method"
    model,text = tuned(configs[name]),some_text()
    layers = find_layers(model)
    with torch.no_grad():
        with suppress(layers, range(len(layers)), 0.3): want = model(**text).logits
        gated = _gated(model)
        _set_gates(gated, torch.full((len(gated),), 0.3))
        torch.testing.assert_close(model(**text).logits, want, rtol=1e-4, atol=1e-5)
        _set_gates(gated, torch.ones(len(gated)))

def test_a_faded_adapter_is_an_ordinary_one(tmp_path):
    model,text,task = tuned(),some_text(),[some_text(seed=8)]
    asked = [p.requires_grad for p in model.parameters()]
    before,full = divergence(model, text),{n:p.clone() for n,p in model.named_parameters()}
    gates = fade(model, task, text, price=0.5, steps=12)
    assert divergence(model, text)<before and [p.requires_grad for p in model.parameters()]==asked
    assert all(0<=g<=1 for g in gates.values()) and len(gates)==4*7
    for n,p in model.named_parameters():     # nothing but lora_B has changed, and that by its gate
        gate = gates[n.rpartition('.lora_B')[0]] if 'lora_B' in n else 1.
        torch.testing.assert_close(p, full[n]*gate)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**text).logits, model(**text).logits)
        torch.testing.assert_close(again.merge_and_unload()(**text).logits, model(**text).logits, rtol=1e-4, atol=1e-4)

def test_modules_of_another_adapter_are_left_out():
    "By the gates, and by scores from the training's gradients"
    def gates_and_scores(first):
        config = lambda o: LoraConfig(r=4, target_modules=[o], init_lora_weights=False, task_type='CAUSAL_LM')
        torch.manual_seed(3)
        model = get_peft_model(llama(), config('v_proj'))
        if first: model.add_adapter('beside', config('q_proj'))
        ist = IST(model, ISTConfig(scorer='fisher', score_interval=2, n_active=1.))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            with ist.step(): model(**some_text(seed=8)).loss.backward(); optimizer.step(); optimizer.zero_grad()
        return fade(model, [some_text(seed=8)], some_text(), price=0.5, steps=6),ist.importance
    (alone,scores),(found,same) = gates_and_scores(False),gates_and_scores(True)
    assert alone==found and len(found)==4 and torch.equal(scores, same) and scores.any()

@pytest.mark.parametrize('beside', ['a module of an adapter at rest', 'a frozen adapter'])
def test_what_is_not_trained_is_no_obstacle(beside):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=['v_proj'], task_type='CAUSAL_LM'))
    saved = dict(modules_to_save=['input_layernorm']) if 'rest' in beside else {}
    model.add_adapter('beside', LoraConfig(r=4, target_modules=['v_proj'], init_lora_weights=False, **saved))
    if not saved: model.base_model.set_adapter(['default', 'beside'])
    for n,p in model.named_parameters(): p.requires_grad = '.default.' in n and 'lora' in n
    ist = IST(model, ISTConfig(scorer='fisher'))
    mine = {id(o) for layer in ist.layers for o in layer.params}
    assert len(mine)==8 and all('.default.' in n for n,p in model.named_parameters() if id(p) in mine)
    if saved: assert len(_gated(model))==4

def test_fade_needs_an_adapter_that_is_active():
    model = tuned()
    model.base_model.set_adapter([])
    with pytest.raises(ISTError, match='No adapter of the model is active'):
        fade(model, [some_text(seed=8)], some_text(), price=0.5, steps=1)

def test_lora_on_an_embedding_is_faded():
    "By half a gate it adds half of what it adds"
    model,ids = tuned(LoraConfig(r=4, target_modules=['embed_tokens'], task_type='CAUSAL_LM')),torch.arange(64)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        full,without = embed(ids),embed.base_layer(ids)
        gated = _gated(model)
        _set_gates(gated, torch.tensor([0.5]))
        torch.testing.assert_close(embed(ids), (full+without)/2)
        _set_gates(gated, torch.ones(1))
    (gate,) = fade(model, [some_text(seed=8)], some_text(), price=0.5, steps=6).values()
    assert gate<1

def test_a_higher_price_fades_less():
    low,high = (sum(fade(tuned(), [some_text(seed=8)], some_text(), price=o, steps=8).values()) for o in (0.1, 3.))
    assert low<high

def test_fade_sees_its_own_gates_under_autocast():
    "Autocast keeps the weights that it has converted: each step would see the gates of the first"
    model,text = tuned(),some_text()
    full = {k:v.clone() for k,v in model.state_dict().items()}
    with torch.autocast('cpu', torch.bfloat16): around = fade(model, [text], text, price=0.5, steps=6, rate=0.2)
    model.load_state_dict(full)
    plain = model.forward
    def each(*args, **kwargs):
        with torch.autocast('cpu', torch.bfloat16): return plain(*args, **kwargs)
    model.forward = each
    assert around==fade(model, [text], text, price=0.5, steps=6, rate=0.2)

def test_a_fade_that_fails_changes_nothing():
    model,text = tuned(),some_text()
    full = {n:p.clone() for n,p in model.named_parameters()}
    def task():
        yield from [some_text()]*3
    with pytest.raises(ISTError, match='read only once'): fade(model, task(), text)
    assert all(torch.equal(p, full[n]) and p.grad is None for n,p in model.named_parameters())
    assert any(p.requires_grad for p in model.parameters())

def test_what_cannot_be_compared_or_faded_is_refused():
    text = some_text()
    model = tuned()
    model.get_input_embeddings().weight.requires_grad_(True)
    for f in (lambda: divergence(model, text), lambda: fade(model, [text], text)):
        with pytest.raises(ISTError, match='belongs to no adapter that PEFT can switch off'): f()
    prompts = tuned(AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type='CAUSAL_LM'))
    with pytest.raises(ISTError, match='belongs to no adapter'): divergence(prompts, text)
    dora = tuned(LoraConfig(**lora, use_dora=True))
    with pytest.raises(ISTError, match='LoRA without DoRA'): fade(dora, [text], text)
    ist = IST(tuned(), ISTConfig.rst())
    for bad in (dict(weight=-1.), dict(every=0), dict(rows=0), dict(weight=float('nan'))):
        with pytest.raises(ISTError, match='is not allowed'): ist.add(Keep(text, **bad))
    with pytest.raises(ISTError, match='no row'): fade(tuned(), [], text)

@pytest.mark.parametrize('config,says', [
    (LoraConfig(**lora, bias='all'), "bias='all' trains biases"),
    (LoraConfig(**lora, init_lora_weights='pissa'), "init_lora_weights='pissa' changes"),
    (LoraConfig(**lora, kasa_config=KasaConfig()), 'kasa_config changes'),
    (LoraConfig(**lora, layer_replication=[(0, 3), (1, 4)]), 'layer_replication changes'),
    (PromptTuningConfig(num_virtual_tokens=3, task_type='CAUSAL_LM'), 'prompt'),
    (AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type='CAUSAL_LM'), 'prompt')],
    ids=['bias', 'pissa', 'kasa', 'replication', 'prompt', 'adaption'])
def test_an_adapter_that_cannot_be_switched_off_is_refused_when_loaded_too(config, says, tmp_path):
    "Loaded for inference nothing of it is trainable, and its divergence would come out as 0 or as nonsense"
    tuned(config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    for f in (lambda: divergence(model, some_text()), lambda: fade(model, [some_text()], some_text())):
        with pytest.raises(ISTError, match=says): f()

@pytest.mark.parametrize('price', [0, -1., float('nan'), float('inf')])
def test_a_price_that_makes_no_sense_is_refused(price):
    with pytest.raises(ISTError, match='above 0'): fade(tuned(), [some_text()], some_text(), price=price)

@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    "On a model and a task of one's own, from the command line; a run that is known is not made again"
    import json,subprocess,sys
    from collections import Counter
    from ist_nb.model import assets
    file,out = tmp_path/'sun.jsonl',tmp_path/'out.json'
    rows = [dict(text=f'The sun is a star and the moon is not. {i} '*50) for i in range(60)]
    file.write_text('\n'.join(map(json.dumps, rows)))
    command = [sys.executable, '-m', 'benchmarks', 'retain', '--model', str(assets/'pico'), '--files', f'sun={file}',
               '--plan', 'smoke', '--out', str(out)]
    said = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    run, = json.loads(out.read_text())['runs']
    assert '1 runs, data ready' in said[0] and '0 runs, data ready' in said[1]
    made = Counter(o['name'] for o in run['points'])
    assert made==Counter({'before':1, 'trained':1, 'scaled':5, 'line, top kept':3, 'line, bottom kept':3,
        'two numbers':6, 'faded':1, 'faded, one gate a layer':1, 'the same, layers shuffled':1,
        'faded, modules shuffled':1})
    assert run['points'][0]['kl']==0<run['points'][1]['kl']
    assert len(next(o for o in run['points'] if o['name']=='faded')['gates'])==16*7

def test_zero_grad_before_backward_is_refused():
    "It would take away what Keep has added, without a word"
    ist = IST(tuned(), ISTConfig.rst(n_active=2))
    ist.add(Keep(some_text(), every=2))
    for t in range(4):
        if t%2:
            with ist.step(): ist.model.zero_grad(); ist.model(**some_text()).loss.backward(); ist.model.zero_grad()
        else:
            with ist.step():     # two backward passes add up
                for _ in range(2): ist.model(**some_text()).loss.backward()
                ist.model.zero_grad()
    with pytest.raises(ISTError, match='Call optimizer.zero_grad'):
        with ist.step(): ist.model.zero_grad(); ist.model(**some_text()).loss.backward()
    assert not ist.in_step and not ist.parts[-1].watched

def erase_in_place(model): model.zero_grad(set_to_none=False)
def erase_some(model):
    for n,p in model.named_parameters():
        if n.endswith('o_proj.lora_B.default.weight'): p.grad = None

@pytest.mark.parametrize('erase', [erase_in_place, erase_some])
def test_a_gradient_that_is_erased_in_part_or_in_place_is_refused(erase):
    "As by `zero_grad(set_to_none=False)`, or by one optimizer of two. After the step either is fine"
    ist = IST(tuned(), ISTConfig.rst(n_active=1.))
    ist.add(Keep(some_text(), every=1))
    for _ in range(2):
        with ist.step(): ist.model(**some_text()).loss.backward(); erase(ist.model)
    with pytest.raises(ISTError, match='was erased before'):
        with ist.step(): erase(ist.model); ist.model(**some_text()).loss.backward()

def test_a_loss_scaler_in_a_loop_of_ones_own_is_refused():
    "It would divide our gradient, which it has not multiplied; one that is switched off does nothing"
    def run(enabled):
        with IST(tuned(), ISTConfig.rst(n_active=1.)) as ist:
            ist.add(Keep(some_text(), every=1))
            optimizer = torch.optim.SGD([p for o in ist.layers for p in o.params], lr=0.01)
            scaler = torch.amp.GradScaler('cpu', enabled=enabled)
            other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.01)
            other.param_groups[0]['params'][0].grad = torch.ones(1)
            with ist.step():
                scaler.scale(ist.model(**some_text()).loss).backward()
                scaler.step(other)                     # of another model
                scaler.step(optimizer)
    run(False)
    with pytest.raises(ISTError, match='A GradScaler divides all gradients'): run(True)

def test_an_adapter_that_is_active_and_not_trained_is_refused():
    "It belongs to the model before, and PEFT switches all adapters off or none"
    model = tuned()
    model.add_adapter('new', LoraConfig(**lora))
    model.base_model.set_adapter(['default', 'new'])
    for n,p in model.named_parameters(): p.requires_grad = '.new.' in n
    with pytest.raises(ISTError, match="'default' is active and not trained"):
        IST(model, ISTConfig.rst(n_active=1.)).add(Keep(some_text()))
    model.set_adapter('new')
    IST(model, ISTConfig.rst(n_active=1.)).add(Keep(some_text()))

def test_own_text_heeds_no_settings_of_the_model():
    "A penalty on repetition, beams or a least probability that come with a model are not how it predicts"
    want = own_text(*load_model('pico'), rows=4, length=24)
    model,tokenizer = load_model('pico')
    own = model.generation_config
    for k,v in dict(repetition_penalty=1.3, min_p=0.2, num_beams=2, num_return_sequences=2, temperature=0.3).items():
        setattr(own, k, v)
    for m in (model, get_peft_model(model, LoraConfig(**lora))):
        assert torch.equal(own_text(m, tokenizer, rows=4, length=24)['input_ids'], want['input_ids'])
        assert model.generation_config is own

def test_rows_are_spread_over_the_texts():
    _,tokenizer = load_model('pico')
    texts = [f'{chr(97+i%26)*3} {i}' for i in range(63)]
    found = text_rows(texts, tokenizer, rows=32)
    said = [tokenizer.decode(o[m==1]) for o,m in zip(found['input_ids'], found['attention_mask'])]
    assert said==[texts[i*63//32] for i in range(32)] and len(text_rows(texts[:5], tokenizer)['input_ids'])==5
    with pytest.raises(ISTError, match='no row'): text_rows([], tokenizer)
    assert torch.equal(text_rows('one text', tokenizer)['input_ids'], text_rows(['one text'], tokenizer)['input_ids'])
    assert own_text(load_model('pico')[0], tokenizer, rows=1, length=8)['input_ids'].shape==(1, 8)

compiled = pytest.param(dict(fast='fold,compile'), marks=[pytest.mark.slow, pytest.mark.skipif(
    not shutil.which('g++'), reason='inductor needs a compiler')])

@pytest.mark.parametrize('n', [2, 1.], ids=['some layers', 'all layers'])
@pytest.mark.parametrize('settings', [dict(fast='fold'), dict(activation_budget='1GiB'), compiled])
def test_keep_beside_other_parts(settings, n):
    """Folded adapters can be switched off too, and blocks that are computed again, as all are in the first step with a
    budget, or compiled, give the same gradient"""
    def gradients(settings):
        ist = IST(tuned(), ISTConfig.rst(n_active=n, **settings))
        ist.add(part := Keep(some_text(), every=1))
        with ist.step():
            ist.model(**some_text(seed=8)).loss.backward()
            res = [p.grad.clone() for i in ist.active for p in ist.layers[i].params]
            ist.model.zero_grad()
        return part.seen,res
    (seen,found),(want_seen,want) = gradients(settings),gradients({})
    assert seen[0][1]==pytest.approx(want_seen[0][1], rel=1e-4) and seen[0][1]>0.01
    for a,b in zip(found, want): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

def test_a_budget_too_small_says_what_the_penalty_needs():
    "More than the batches, if its rows are longer; fewer or shorter ones less; without a penalty it is not named"
    def refused(text=None, **kwargs):
        ist = IST(tuned(), ISTConfig.rst(n_active=1., activation_budget='1KiB'))
        if text: ist.add(Keep(text, every=1, **kwargs))
        with pytest.raises(ISTError, match='cannot be kept') as said:
            for _ in range(2):
                with ist.step(): ist.model(**some_text(2, 8)).loss.backward(); ist.model.zero_grad()
        return str(said.value),float(re.search(r'needs ([\d.]+)KiB', str(said.value))[1])
    (bare,least),(held,more) = refused(),refused(some_text(rows=4))
    assert 'Keep' not in bare and more>1.3*least
    assert re.search(r'Keep needs memory too: it runs 4 rows of \d+ tokens.*fewer or shorter.*leave it out', held)
    (_,shorter),(fewer,less) = refused(some_text(4, 8)),refused(some_text(rows=4), rows=2)
    assert shorter<more and less<more and 'runs 2 rows' in fewer

@pytest.mark.parametrize('spoil', [
    lambda o: o.pop('labels'), lambda o: o['labels'].fill_(-100), lambda o: o.update(labels=o['labels'][:, 1:]),
    lambda o: o.update(input_ids=[[1, 2]])])
def test_a_text_without_a_divergence_is_refused(spoil):
    text = some_text()
    spoil(text)
    for f in (lambda: divergence(tuned(), text), lambda: Keep(text), lambda: fade(tuned(), [some_text()], text)):
        with pytest.raises(ISTError, match='at least one label'): f()

@pytest.mark.parametrize('make,task,classes', [
    *((LlamaForSequenceClassification, 'SEQ_CLS', n) for n in (2, 12, 64)),   # as many as tokens in a row, or in all
    *((LlamaForTokenClassification, 'TOKEN_CLS', n) for n in (2, 12))])
def test_a_classifier_has_nothing_to_hold(make, task, classes):
    "Its logits are of classes, which would be taken for those of tokens"
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_labels=classes,
                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    model = get_peft_model(make(config), LoraConfig(r=4, target_modules=['q_proj', 'up_proj'], task_type=task))
    with pytest.raises(ISTError, match='does not predict each next token'): divergence(model, some_text())
    ist,done = IST(model, ISTConfig.rst(), optimizer=torch.optim.SGD(model.parameters(), 0.1)),0
    ist.add(Keep(some_text(), every=1))
    with pytest.raises(ISTError, match='does not predict each next token'):
        with ist.step():
            labels = torch.zeros(6 if task=='SEQ_CLS' else (6, 12), dtype=torch.long)
            model(input_ids=some_text()['input_ids'], labels=labels).loss.backward()

@pytest.mark.parametrize('make,config', [
    (T5ForConditionalGeneration, T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)),
    (BartForConditionalGeneration, BartConfig(vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2,
                                              encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
                                              decoder_attention_heads=2, max_position_embeddings=32))])
def test_an_encoder_decoder_has_nothing_to_hold(make, config):
    model = get_peft_model(make(config), LoraConfig(**lora | dict(task_type='SEQ_2_SEQ_LM')))
    with pytest.raises(ISTError, match='does not predict each next token'): divergence(model, some_text())
    with pytest.raises(ISTError, match='does not predict each next token'):
        IST(model, ISTConfig.rst(), stack='all').add(Keep(some_text()))

def test_a_run_too_short_to_be_held_says_so_unless_it_failed():
    def run(n, fail=False):
        ist = IST(tuned(noise=0), ISTConfig.rst(n_active=1.))
        ist.add(Keep(some_text(), every=2))
        with warnings.catch_warnings(record=True) as said, contextlib.suppress(ZeroDivisionError), ist:
            warnings.simplefilter('always')
            for _ in range(n):
                with ist.step(): ist.model(**some_text(2, 8)).loss.backward()
            if fail: 1/0
        return [str(o.message) for o in said if 'Keep' in str(o.message)]
    (said,) = run(1)
    assert 'the run ended at step 1' in said and run(1, fail=True)==[]

def test_a_loss_scaler_is_refused(tmp_path):
    "It would leave a gradient of ours at a 65,536th of its weight"
    from types import SimpleNamespace
    from ist_nb.callback import _check_run
    args = SimpleNamespace(fp16=True, n_gpu=1)
    _check_run(args, ISTConfig())
    with pytest.raises(ISTError, match='bf16=True'): _check_run(args, ISTConfig(), parts=[Keep(some_text())])

def one_of_two(rank, folder):
    "One rank: what DDP leaves in the gradients, and what this rank added by itself"
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    model = tuned()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    ist = IST(wrapped, ISTConfig.rst(n_active=2))
    ist.add(Keep(some_text(8), weight=2., every=1, rows=3))
    for t in range(2):
        with ist.step():
            params = [p for i in ist.active for p in ist.layers[i].params]
            ours = [p.grad.clone() for p in params]
            batch = some_text(seed=20+2*t+rank)
            own = torch.autograd.grad(model(**batch).loss, params)
            wrapped(**batch).loss.backward()
            torch.save([ours, own, [p.grad for p in params]], f'{folder}/{rank}_{t}.pt')
            model.zero_grad()
    dist.destroy_process_group()

@pytest.mark.slow
def test_ddp_averages_what_keep_adds(tmp_path):
    "Each process holds the model on rows of its own, and all take the mean step"
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for t in range(2):
        (ours,own,got),(ours1,own1,got1) = (torch.load(tmp_path/f'{r}_{t}.pt') for r in range(2))
        assert not all(torch.equal(a, b) for a,b in zip(ours, ours1))
        for a,b,c,d,g,h in zip(ours, ours1, own, own1, got, got1):
            assert torch.equal(g, h)
            torch.testing.assert_close(g, (a+b+c+d)/2, rtol=1e-4, atol=1e-6)

def test_each_process_reads_rows_of_its_own(monkeypatch):
    "And others at the next step"
    from ist_nb import keep
    seen,rows_of = [],keep._rows_of
    def watched(text, ix, device):
        seen.append(tuple(sorted(ix.tolist())))
        return rows_of(text, ix, device)
    monkeypatch.setattr(keep, '_rows_of', watched)
    ist = IST(tuned(), ISTConfig.rst(n_active=2))
    ist.add(part := Keep(some_text(64), every=1, rows=4))
    for t in range(2):
        for rank in range(2):
            ist.t,ist.ranks = t,SimpleNamespace(size=2, rank=rank)
            part.frozen(range(2))
            part.end(True)
    assert len(seen)==4==len(set(seen))

@pytest.mark.parametrize('steps', [1, 4, 5])
def test_a_run_that_is_too_short_to_be_held_is_told(steps):
    "At the first step an adapter diverges by nothing, and the penalty looks again four steps later"
    model,text = tuned(noise=0),some_text()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        with IST(model, ISTConfig.rst(n_active=1.)) as ist:
            ist.add(Keep(text))
            for _ in range(steps):
                with ist.step():
                    model(input_ids=text['input_ids'], labels=text['input_ids']).loss.backward()
                    optimizer.step(); optimizer.zero_grad()
    said = [str(o.message) for o in told if 'Keep' in str(o.message)]
    assert len(said)==(steps<5) and all(f'at step {steps},' in o for o in said)
