"""What the tests check on a CPU, once on a GPU: every PEFT method, 4-bit and 8-bit bases, float16 and bfloat16.
It needs a CUDA GPU and bitsandbytes."""
import os,tempfile,time,traceback,warnings
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')   # the same product twice is the same number
from pathlib import Path
import torch
from peft import LoraConfig,get_peft_model,prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM,BitsAndBytesConfig,Trainer,TrainingArguments
from transformers.trainer_callback import PrinterCallback
from ist_nb import ISTCallback,ISTConfig,find_layers
from ist_nb.suppression import _damp_response,scaling_is_exact,suppress
from benchmarks import record
from benchmarks.small import lm_batch,pico_path,same

gpu = torch.device('cuda', 0)
ids = torch.randint(5, 1000, (32, 24), generator=torch.Generator().manual_seed(0))
data = [dict(input_ids=o, labels=o) for o in ids.tolist()]

def load(dtype=torch.float32, bits=None):
    torch.manual_seed(0)
    four = dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True)
    how = {8:dict(load_in_8bit=True), 4:four}.get(bits)
    model = AutoModelForCausalLM.from_pretrained(pico_path, dtype=dtype, device_map={'':0},
                                                 quantization_config=how and BitsAndBytesConfig(**how))
    if bits: model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM'))

def adapters(model): return [p.detach().clone() for n,p in model.named_parameters() if 'lora' in n]

def trained(model, folder, *callbacks, resume=None, **kwargs):
    "The losses of a run of the Trainer"
    args = TrainingArguments(folder, max_steps=16, per_device_train_batch_size=8, learning_rate=5e-3, report_to='none',
                             logging_steps=1, disable_tqdm=True, save_strategy='steps', save_steps=8, **kwargs)
    t = Trainer(model, args, train_dataset=data, callbacks=list(callbacks))
    t.pop_callback(PrinterCallback)
    t.train(resume_from_checkpoint=resume)
    return [h['loss'] for h in t.state.log_history if 'loss' in h]

def train(model, folder, resume=None, n_active=0.25, **kwargs):
    "The same with IST: the `IST`, and the losses"
    cb = ISTCallback(ISTConfig(n_active=n_active, score_interval=3, score_batch_size=8))
    losses = trained(model, folder, cb, resume=resume, **kwargs)
    return cb.ist,losses

def check(name, dtype=torch.float32, bits=None, **kwargs):
    "Train, look at the layers left out, suppress in both forms, resume"
    with tempfile.TemporaryDirectory() as d:
        model = load(dtype, bits)
        frozen = {k:v.clone() for k,v in model.state_dict().items() if 'lora' not in k and isinstance(v, torch.Tensor)}
        ist,losses = train(model, f'{d}/whole', **kwargs)
        assert losses[-1]<losses[0], losses
        assert ist.importance.abs().max()>0 and not ist.n_dropped
        now = model.state_dict()
        assert all(torch.equal(v, now[k]) for k,v in frozen.items()), 'the base has changed'
        again = load(dtype, bits)
        ist2,_ = train(again, f'{d}/resumed', resume=f'{d}/whole/checkpoint-8', **kwargs)
        b = {k:v.to(gpu) for k,v in lm_batch(ids[:4]).items()}
        model.eval()
        layers = find_layers(model)
        assert all(scaling_is_exact(t) for o in layers for t in o.tuners)
        with torch.no_grad():
            full = model(**b).loss
            with suppress(layers, range(8), 0.25): fast = model(**b).loss
            undo = [_damp_response(t, 0.25) for o in list(layers)[:8] for t in o.tuners]
            slow = model(**b).loss
            for f in undo: f()
            assert torch.equal(model(**b).loss, full)
        exact = same(adapters(model), adapters(again)) and ist.state_dict()==ist2.state_dict()
        return dict(what=name, loss=[losses[0], losses[-1]], resumed_bit_for_bit=exact,
                    suppressed=dict(untouched=full.item(), by_scaling=fast.item(), by_response=slow.item()),
                    times_active=ist.times_active.tolist())

def all_layers(dtype, **kwargs):
    "With every layer active a run is the run without IST, bit for bit"
    with tempfile.TemporaryDirectory() as d:
        full,dense = load(dtype),load(dtype)
        _,a = train(full, f'{d}/a', n_active=1., **kwargs)
        b = trained(dense, f'{d}/b', **kwargs)
        return same(adapters(full), adapters(dense)) and a==b

def methods():
    "Every method of the registry, on the GPU"
    import benchmarks.peft_methods as m
    tiny,mixture,batch = m.tiny,m.tiny_mixture,m.batch
    m.tiny,m.tiny_mixture = lambda: tiny().to(gpu),lambda: mixture().to(gpu)
    m.batch = lambda name: {k:v.to(gpu) for k,v in batch(name).items()}
    # AdaLoRA's ranknum becomes trainable when it is moved to a GPU, and is not saved; with or without IST
    m.faults['ADALORA'] = dict(load='PEFT 0.21 trains ranknum of AdaLoRA on a GPU and does not save it.')
    res = {}
    for name in [*(str(o.value) for o in m.registry), *m.variants]:
        try: res[name] = m.check(name)['status']
        except Exception as e: res[name] = f'{type(e).__name__}: {e}'[:200]
    return res

precisions = {
    'float32':{}, '4-bit, compute in bfloat16':dict(bits=4, dtype=torch.bfloat16),
    '8-bit':dict(bits=8, dtype=torch.float16), 'bfloat16 weights':dict(dtype=torch.bfloat16),
    'float16 weights':dict(dtype=torch.float16), 'mixed precision, bfloat16':dict(bf16=True),
    'mixed precision, float16 with loss scaling':dict(fp16=True)}

def main(
    out:Path='gpu', # Where the outcome goes
):
    warnings.simplefilter('ignore')
    torch.use_deterministic_algorithms(True, warn_only=True)
    rows,start = [],time.time()
    for name,kwargs in precisions.items():
        try: rows.append(check(name, **kwargs))
        except Exception as e:
            traceback.print_exc()
            rows.append(dict(what=name, failed=f'{type(e).__name__}: {e}'[:500]))
    mixed = dict(float32={}, bf16=dict(bf16=True), fp16=dict(fp16=True))
    dense = {k:all_layers(torch.float32, **kw) for k,kw in mixed.items()}
    found = methods()
    head = record.about('what the tests check on a CPU, on a GPU', 'accelerate bitsandbytes', gpu=True)
    record.save(out, head, seconds=time.time()-start, precisions=rows, all_layers_active_is_dense=dense, methods=found)
    print(dense, [r['what'] for r in rows if 'failed' in r],
          {k:v for k,v in found.items() if v not in ('supported', 'refused')})
