"Quantised and half-precision models: trained, scored and resumed"
import sys,pytest,torch
from datasets import Dataset
from peft import LoraConfig,get_peft_model,prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM,BitsAndBytesConfig,Trainer,TrainingArguments
from transformers.trainer_callback import PrinterCallback
from ist_nb import IST,ISTCallback,ISTConfig,find_layers
from ist_nb.finetune import assets
from ist_nb.suppression import _damp_response,scaling_is_exact,suppress

ids = torch.randint(5, 1000, (32, 24), generator=torch.Generator().manual_seed(0))
data = Dataset.from_list([dict(input_ids=o, labels=o) for o in ids.tolist()])
batch = dict(input_ids=ids[:4], labels=ids[:4])
lora = LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM')

@pytest.fixture(scope='module', autouse=True)
def on_four_layers(four_layers):
    with pytest.MonkeyPatch.context() as m: m.setattr(sys.modules[__name__], 'assets', four_layers.parent); yield

def quantised(bits):
    pytest.importorskip('bitsandbytes', reason='bitsandbytes is not installed')
    of = {8:dict(load_in_8bit=True),
          4:dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.float32)}
    q = BitsAndBytesConfig(**of[bits])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(assets/'pico'), quantization_config=q, dtype=torch.float32,
                                                 device_map={'':'cpu'})
    return get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), lora)

def half(dtype, **kwargs):
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(str(assets/'pico'), dtype=dtype), lora, **kwargs)

def arguments(folder, **kwargs):
    usual = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=5e-3, report_to='none', use_cpu=True,
                 logging_steps=1, disable_tqdm=True, save_strategy='steps', save_steps=4)
    return TrainingArguments(folder, **usual | kwargs)

def trained(model, folder, resume=None, config=None, **kwargs):
    cb = ISTCallback(config or ISTConfig(score_interval=3, score_batch_size=8))
    t = Trainer(model, arguments(folder, **kwargs), train_dataset=data, callbacks=[cb])
    t.pop_callback(PrinterCallback)
    t.train(resume_from_checkpoint=resume and str(resume))
    return cb.ist,[h['loss'] for h in t.state.log_history if 'loss' in h]

def adapters(model): return [p.detach().clone() for n,p in model.named_parameters() if 'lora' in n]
def base(model):
    return {k:v.clone() for k,v in model.state_dict().items() if 'lora' not in k and isinstance(v, torch.Tensor)}
def same(a, b): return len(a)==len(b) and all(torch.equal(x, y) for x,y in zip(a, b))

@pytest.mark.parametrize('bits', [4, pytest.param(8, marks=pytest.mark.slow)])
def test_quantised(bits, tmp_path):
    model = quantised(bits)
    before = base(model)
    ist,losses = trained(model, tmp_path/'whole')
    assert losses[-1]<losses[0] and ist.importance.abs().max()>0 and len(ist.history)==2
    kind = 'Linear4bit' if bits==4 else 'Linear8bitLt'
    assert {type(t.get_base_layer()).__name__ for t in ist.layers[0].tuners}=={kind}
    after = base(model)
    assert all(torch.equal(before[k], after[k]) for k in before), 'training or probing changed the quantised weights'
    again = quantised(bits)
    ist2,_ = trained(again, tmp_path/'resumed', resume=tmp_path/'whole'/'checkpoint-4')
    assert ist2.state_dict()==ist.state_dict() and same(adapters(again), adapters(model))
    # all layers active is the run without IST, though the probes run
    full,dense,few = quantised(bits),quantised(bits),dict(max_steps=4, save_strategy='no')
    _,a = trained(full, tmp_path/'full', config=ISTConfig(n_active=1., score_interval=3, score_batch_size=8), **few)
    t = Trainer(dense, arguments(tmp_path/'dense', **few), train_dataset=data)
    t.pop_callback(PrinterCallback); t.train()
    assert a==[h['loss'] for h in t.state.log_history if 'loss' in h] and same(adapters(full), adapters(dense))

@pytest.mark.parametrize('bits', [4, 8])
def test_suppression_of_quantised(bits):
    model = quantised(bits).train()   # as in a probe, bitsandbytes must not pack the weights anew
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=0.02)
    layers = find_layers(model)
    assert all(scaling_is_exact(t) for o in layers for t in o.tuners)
    with torch.no_grad():
        with suppress(layers, range(2), 0.25): fast = model(**batch).loss
        undo = [_damp_response(t, 0.25) for o in list(layers)[:2] for t in o.tuners]
        slow = model(**batch).loss
        for f in undo: f()
        assert abs(fast-slow)<1e-4*slow and abs(model(**batch).loss-slow)>1e-3

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [True, False])
def test_half_precision_weights(dtype, autocast):
    "The base in half precision, the adapters in single precision (PEFT's default) or half as well"
    model = half(dtype, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in model.parameters() if p.requires_grad}=={torch.float32 if autocast else dtype}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    ist = IST(model, ISTConfig(score_interval=2), probe=[batch])
    losses = []
    for _ in range(6):
        before = [[p.detach().clone() for p in o.params] for o in ist.layers]
        with ist.step():
            loss = model(**batch).loss
            loss.backward(); opt.step(); opt.zero_grad()
        losses.append(loss.item())
        assert [i for i,o in enumerate(ist.layers) if not same(before[i], o.params)]==ist.active.tolist()
    assert losses[-1]<losses[0] and ist.importance.abs().max()>0 and not ist.n_dropped
    with torch.no_grad():
        want = model(**batch).loss
        with suppress(ist.layers, range(4), 1.): assert torch.equal(model(**batch).loss, want)
        undo = [_damp_response(t, 1.) for o in ist.layers for t in o.tuners]
        assert torch.equal(model(**batch).loss, want)
        for f in undo: f()

def test_mixed_precision(tmp_path):
    "bf16=True of the Trainer: probes run under the same autocast"
    ist,losses = trained(half(torch.float32), tmp_path/'whole', bf16=True)
    assert losses[-1]<losses[0] and ist.importance.abs().max()>0
    again,_ = trained(half(torch.float32), tmp_path/'again', resume=tmp_path/'whole'/'checkpoint-4', bf16=True)
    assert again.state_dict()==ist.state_dict()
