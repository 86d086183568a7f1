"""What a training step costs, in the Trainer: LoRA, the released IST, RST and ours, with and without each optimisation.
It finds the GPU by itself. The variants take turns, several times, the importance loop included, and every number is a
median with its spread."""
import gc,inspect,os,statistics,tempfile,time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
import torch
from peft import LoraConfig,get_peft_model
from transformers import (AutoModelForCausalLM,LlamaConfig,LlamaForCausalLM,Trainer,TrainerCallback,TrainingArguments,
                          default_data_collator)
from transformers.trainer_callback import PrinterCallback,ProgressCallback
from ist_nb import ISTCallback,ISTConfig,find_layers
from ist_nb.activations import kept_bytes
from ist_nb.speed import _blocks_of,compile_blocks,compile_loss,fold,_to_fp8,unfold
from benchmarks import estimate,record
from benchmarks.small import lm_batch,pico_path,spread

# selections differ in what they keep; without it the allocator asks the driver again and again
os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')
gpu = torch.cuda.is_available()
device,dtype = ('cuda', torch.bfloat16) if gpu else ('cpu', torch.float32)
autocast = partial(torch.autocast, device, torch.bfloat16, enabled=gpu)
shapes = {   # vocabulary, width, width of the MLP, blocks, heads, key and value heads
    '1b':(32000, 2048, 5632, 22, 32, 4), '7b':(32000, 4096, 11008, 32, 32, 32), '13b':(32000, 5120, 13824, 40, 40, 40)}
where = ['q_proj','k_proj','v_proj','up_proj','down_proj']

def config_of(shape):
    if shape=='pico': return LlamaConfig.from_pretrained(pico_path)
    v,h,f,n,a,kv = shapes[shape]
    return LlamaConfig(vocab_size=v, hidden_size=h, intermediate_size=f, num_hidden_layers=n, num_attention_heads=a,
                       num_key_value_heads=kv)

def make(shape):
    "A model of the true shape with random weights, and LoRA with r=32 as in the released recipe"
    torch.manual_seed(0)
    if shape=='pico': model = AutoModelForCausalLM.from_pretrained(pico_path, dtype=torch.float32)
    else:
        torch.set_default_dtype(dtype)
        with torch.device(device): model = LlamaForCausalLM(config_of(shape))
        torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    model = get_peft_model(model.to(device), lora)
    for name,p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.01)
    return model

def liger(model):
    "Liger's function for this kind of model, or None"
    if not find_spec('liger_kernel'): return None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    return MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)

def fuse_loss(model):
    "Compute the loss without forming the logits, and nothing else of Liger's"
    f = liger(model)
    switches = {k:False for k,v in inspect.signature(f).parameters.items() if isinstance(v.default, bool)}
    f(**(switches | dict(fused_linear_cross_entropy=True)), model=model.get_base_model())

class Switches:
    """Each optimisation of a model on or off ('ahead' belongs to the Trainer): what the package can only switch on is
    switched off here by putting the old parts back"""
    def __init__(self, model):
        self.model,self.layers = model,find_layers(model)
        self.blocks,self.base = _blocks_of(model, self.layers),model.get_base_model()
        self.compiled = self.swaps = self.fused = None
        self.plain = self.base.loss_function
        compile_loss(self.model)
        self.lean = self.base.loss_function
    def set(self, names):
        unfold(self.model)
        if 'fold' in names: fold(self.model)
        if 'compile' in names and not self.compiled:
            compile_blocks(self.model, self.layers)
            self.compiled = [o._compiled_call_impl for o in self.blocks]
        for i,o in enumerate(self.blocks): o._compiled_call_impl = self.compiled[i] if 'compile' in names else None
        if 'liger' in names and not self.fused:
            fuse_loss(self.model)
            self.fused = self.base.__dict__['forward']
        self.base.loss_function = self.lean if 'loss' in names else self.plain
        self.base.__dict__.pop('forward', None)
        if 'liger' in names: self.base.__dict__['forward'] = self.fused
        if 'fp8' in names and not self.swaps:
            before = {n:m for n,m in self.model.named_modules() if type(m) is torch.nn.Linear}
            _to_fp8(self.model, self.layers)
            self.swaps = [(n, before[n], m) for n,m in self.model.named_modules() if n in before and m is not before[n]]
        for n,plain,fp8 in self.swaps or []:
            parent,_,key = n.rpartition('.')
            self.model.get_submodule(parent)._modules[key] = fp8 if 'fp8' in names else plain

class Clock(TrainerCallback):
    "When steps begin, and their peak of memory above what was there; waits for the GPU where timing starts or ends"
    def __init__(self, ends): self.ends,self.times,self.peaks,self.base = ends,[],[],0
    def on_step_begin(self, *args, **kwargs):
        if gpu:
            if len(self.times) in self.ends: torch.cuda.synchronize()
            self.base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())
    def on_step_end(self, *args, **kwargs):
        if gpu: self.peaks.append(torch.cuda.max_memory_allocated()-self.base)

class Depth(TrainerCallback):
    def __init__(self, cb): self.cb,self.depths,self.counts = cb,[],[]
    def on_step_end(self, *args, **kwargs):   # runs after ISTCallback's, which leaves `active` as it was
        n,active = len(self.cb.ist.layers),self.cb.ist.active
        self.depths.append((n-int(active[0]))/n)
        self.counts.append(len(active))

def run(switches, data, batch, steps, config, names, checkpointing, seed, folder, warm=3):
    switches.set(names)
    clock = Clock((warm, steps+warm))
    callbacks = [clock]
    if config is not None:
        cb = ISTCallback(ISTConfig(**(config | dict(seed=seed))))
        callbacks += [cb, Depth(cb)]
    args = TrainingArguments(folder, max_steps=steps+warm+1, per_device_train_batch_size=batch, learning_rate=1e-5,
                             bf16=gpu, gradient_checkpointing=checkpointing, report_to='none',
                             logging_steps=10, disable_tqdm=True, logging_nan_inf_filter='ahead' not in names,
                             accelerator_config=dict(non_blocking='ahead' in names), save_strategy='no', seed=seed,
                             use_cpu=not gpu)
    model = switches.model
    trainer = Trainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=callbacks)
    for o in (PrinterCallback, ProgressCallback): trainer.pop_callback(o)
    trainer.train()
    assert not gpu or '_original_forward' in model.__dict__, 'this run had no autocast'
    if checkpointing: model.gradient_checkpointing_disable()
    if hasattr(model, 'disable_input_require_grads'): model.disable_input_require_grads()
    # accelerate's autocast, which it puts around a model once
    for k in ('forward', '_original_forward', '_is_accelerate_prepared'): model.__dict__.pop(k, None)
    t = clock.times
    res = dict(seconds=(t[-1]-t[warm])/(len(t)-1-warm), peak=max(clock.peaks, default=None), depth=1.,
               active=len(switches.layers), share=0.)
    if config is not None:
        d = callbacks[-1]
        res |= dict(depth=statistics.mean(d.depths[warm:-1]), active=statistics.mean(d.counts[warm:-1]),
                    share=cb.ist.score_seconds/(t[-1]-t[warm]))
    trainer.optimizer = trainer.lr_scheduler = None
    del trainer
    gc.collect()
    return res

def floors(model, tokens, flops):
    "Seconds for the products of a forward pass at the measured rate, and bytes that a block must keep for its backward"
    cfg = model.config
    h,f,kv = cfg.hidden_size,cfg.intermediate_size,cfg.num_key_value_heads*(cfg.hidden_size//cfg.num_attention_heads)
    per_block = 2*h*h+2*h*kv+3*h*f
    return dict(forward_seconds=2*tokens*(per_block*cfg.num_hidden_layers+h*cfg.vocab_size)/flops,
                # input, q, k, v, attention output, middle, gate, up
                block_bytes=tokens*(4*h+2*kv+2*f)*(2 if gpu else 4))

ours = dict(sampler='depth', scorer='fisher', score_interval=20)
budget = dict(activation_budget=0.28)   # of what LoRA takes
recommended = dict(sampler='top', schedule='shrink', n_active=0.4)     # its first steps train all layers
lora = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=where, task_type='CAUSAL_LM')
variants = {   # name: settings of IST (None: all layers), optimisations, checkpointing
    'LoRA':(None, '', False), 'LoRA, compile+ahead':(None, 'compile ahead', False),
    'LoRA, compile+loss+ahead':(None, 'compile loss ahead', False),
    'LoRA, compile+liger+ahead':(None, 'compile liger ahead', False),
    'released IST':(dict(scorer='paper', explore=0., sampler='importance'), '', False),
    'RST':(dict(sampler='uniform'), '', False), 'RST, compile+ahead':(dict(sampler='uniform'), 'compile ahead', False),
    'ours':(ours, '', False), 'ours, fold':(ours, 'fold', False), 'ours, fold+compile':(ours, 'fold compile', False),
    'ours, fold+compile+ahead':(ours, 'fold compile ahead', False),
    'ours, fold+compile+ahead, budget':(ours | budget, 'fold compile ahead', False),
    'recommended, fold+compile+ahead':(recommended, 'fold compile ahead', False),
    'recommended, fold+compile+loss+ahead':(recommended, 'fold compile loss ahead', False),
    'recommended, fold+compile+ahead, budget':(recommended | budget, 'fold compile ahead', False),
    'ours, fold+compile+ahead+liger':(ours, 'fold compile ahead liger', False),
    'ours, fold+compile+ahead+fp8':(ours, 'fold compile ahead fp8', False),
    'LoRA, checkpointing':(None, '', True),
    'ours, fold+compile+ahead, checkpointing':(ours, 'fold compile ahead', True),
}

def estimated(found): return estimate.estimated(found, lora, config_of, variants)

def machine_rates(n):
    """FLOP/s of a large product, and bytes/s read and written by a large copy and by unpacking of 4 bits, which is None
    without bitsandbytes"""
    a,b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if gpu else lambda: None
    def clock(f, reps=20):
        f()
        f()
        wait()
        start = time.perf_counter()
        for _ in range(reps): f()
        wait()
        return (time.perf_counter()-start)/reps
    c = torch.empty_like(a)
    rates = 2*n**3/clock(lambda: a@b),2*a.nbytes/clock(lambda: c.copy_(a))
    try: import bitsandbytes.functional as bnb
    except ImportError: return *rates,None
    packed = bnb.quantize_4bit(a, blocksize=64, quant_type='nf4', compress_statistics=True)
    return *rates,estimate.unpacked*a.numel()/clock(lambda: bnb.dequantize_4bit(*packed))

def kept(switches, batch, length):
    "Bytes that one block keeps for its backward pass, trained and frozen, plain and optimised"
    block,model,res = switches.blocks[0],switches.model,{}
    x = torch.randn(batch, length, model.config.hidden_size, dtype=dtype, device=device, requires_grad=True)
    positions = torch.arange(length, device=device)[None]
    kwargs = dict(position_embeddings=switches.base.model.rotary_emb(x, positions))
    for names in ('', 'fold', 'compile', 'fold compile'):
        switches.set(names.split())
        for name,active in (('trained', [0]), ('frozen', [1])):
            switches.layers.switch(active)
            with autocast(): res[f'{name}, {names}'] = kept_bytes(lambda: block(x, **kwargs), block)
            switches.layers.thaw()
    return res

def profile(switches, batch, length, names, n_active=0.25, reps=6):
    "Milliseconds of a step that trains the top layers: the host's work, the whole, the kernels on the GPU"
    from torch.profiler import profile as record_kernels,ProfilerActivity
    switches.set(names.split())
    model,n = switches.model,len(switches.layers)
    switches.layers.switch(range(n-max(1, int(n_active*n)), n))
    ids = torch.randint(5, model.config.vocab_size, (batch, length), device='cuda')
    opt = torch.optim.AdamW([p for o in switches.layers for p in o.params], lr=1e-5, fused=True)
    def step():
        with autocast(): loss = model(**lm_batch(ids)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
    times = []
    for i in range(reps+3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host = time.perf_counter()
        torch.cuda.synchronize()
        if i>=3: times.append(((host-start)*1e3, (time.perf_counter()-start)*1e3))
    with record_kernels(activities=[ProfilerActivity.CUDA]) as p:
        step()
        torch.cuda.synchronize()
    switches.layers.thaw()
    kernels = sorted(((e.key[:80], round(e.self_device_time_total/1e3, 3), e.count) for e in p.key_averages()),
                     key=lambda o: -o[1])
    return dict(host=statistics.median(a for a,_ in times), whole=statistics.median(b for _,b in times),
                gpu=sum(o[1] for o in kernels), launches=sum(o[2] for o in kernels), kernels=kernels[:12])

def result(shape, batch, length, steps, model, runs, failed, rates):
    def of(v): return {f:spread([r[f] for r in v]) for f in ('seconds', 'peak', 'depth', 'active', 'share')}
    return dict(shape=shape, batch=batch, length=length, steps=steps,
                variants={k:of(v) | dict(reps=len(v)) for k,v in runs.items() if v}, failed=failed,
                matrix_flops=rates[0], copy_bytes=rates[1], floors=floors(model, batch*length, rates[0]),
                parameters=sum(p.numel() for p in model.parameters()))

def bench(shape, batch, length, steps, reps, only, seconds, save):
    "Rounds over all variants; `save` gets what is known after each, so that a run that is cut short has its table"
    start,switches = time.perf_counter(),Switches(make(shape))
    model,g = switches.model,torch.Generator().manual_seed(0)
    data = [lm_batch(o) for o in torch.randint(5, model.config.vocab_size, (256, length), generator=g).tolist()]
    rates = machine_rates(8192 if gpu else 1024)
    chosen = [k for k in variants if (not only or k in only) and (gpu or 'fp8' not in k)
              and ('liger' not in variants[k][1] or liger(model))]
    runs,failed,dense,took,more = {k:[] for k in chosen},{},None,0,{}
    for rep in range(-1, reps):   # round -1 compiles and warms up, and is not counted
        begun,first = time.perf_counter(),rep<0
        if rep>0 and begun-start+took>seconds: break
        for k in chosen:
            config,names,checkpointing = variants[k]
            if k in failed: continue
            if config and 'activation_budget' in config:
                if not dense: continue
                config = config | dict(activation_budget=f"{int(config['activation_budget']*dense/2**20)}MiB")
            if first and config and 'score_interval' in config: config = config | dict(score_interval=2)
            try:
                r = run(switches, data, batch, 3 if first else steps, config, names.split(), checkpointing, max(rep, 0),
                        tempfile.gettempdir()+'/ist_speed')
            except Exception as e: failed[k] = f'{type(e).__name__}: {e}'[:300]
            else:
                if not first: runs[k].append(r)
                elif k=='LoRA': dense = r['peak']
            print(f'[{time.perf_counter()-start:.0f} s]', shape, rep, k, failed.get(k) or r, flush=True)
        took = time.perf_counter()-begun
        if rep==0:
            more = dict(kept=kept(switches, batch, length))
            sets = dict.fromkeys(variants[k][1].replace(' ahead', '') for k in chosen if k not in failed)
            if gpu: more |= dict(profile={o:profile(switches, batch, length, o) for o in sets if 'liger' not in o})
        save(result(shape, batch, length, steps, model, runs, failed, rates) | more)
    found = result(shape, batch, length, steps, model, runs, failed, rates) | more
    return found | dict(estimate=estimated(found))

def main(
    shapes:str='7b', # Shapes separated by commas: 1b, 7b, 13b, pico
    batch:int=16,    # Rows in a batch
    length:int=256,  # Tokens in a row
    steps:int=20,    # Steps in a run
    reps:int=5,      # Runs of each variant
    only:str='',     # Variants separated by semicolons; all if empty
    seconds:float=1e9, # Start no further round that would end after so many seconds, for each shape
    threads:int=2,   # On a CPU
    out:Path=f'speed_{"gpu" if gpu else "cpu"}', # Where the numbers go
):
    if not gpu: torch.set_num_threads(threads)
    only = [o.strip() for o in only.split(';') if o.strip()]
    what = 'seconds and peak memory of a training step, by variant'
    head = record.about(what, 'accelerate', None if gpu else threads, gpu)
    found = []
    def save(r): record.save(out, head, shapes=[*found, r])
    for shape in shapes.split(','):
        r = bench(shape, batch, length, steps, reps, only, seconds, save)
        save(r)
        found.append(r)
        gc.collect()
        for k,v in r['variants'].items(): print(f"{shape:5} {k:42} {v['seconds']}")
