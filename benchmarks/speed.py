"""What a training step costs, in the Trainer: LoRA on all layers, the released IST, RST and ours, with and without each lever
of `ist_nb.speed`, importance loop included. `python benchmarks/speed.py` finds the GPU by itself; the variants take turns,
several times, and every number is a median with its spread."""
import gc,json,os,platform,shlex,statistics,sys,tempfile,time
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from peft import LoraConfig,get_peft_model
from transformers import AutoModelForCausalLM,LlamaConfig,LlamaForCausalLM,Trainer,TrainerCallback,TrainingArguments,default_data_collator
from transformers.trainer_callback import PrinterCallback,ProgressCallback
from ist_nb import ISTCallback,ISTConfig,find_layers
from ist_nb.finetune import assets
from ist_nb.config import layer_count,samplers
from ist_nb.probe import generator_for
from ist_nb.speed import blocks_of,compile_blocks,fold,fuse_loss,kept_bytes,to_fp8,unfold,_liger
from estimate import block_shape,estimate,machine_rates,step_cost

os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')   # selections differ in what they keep; without it the allocator asks the driver again and again
gpu = torch.cuda.is_available()
shapes = {   # vocabulary, width, width of the MLP, blocks, heads, key and value heads
    '1b':(32000, 2048, 5632, 22, 32, 4), '7b':(32000, 4096, 11008, 32, 32, 32), '13b':(32000, 5120, 13824, 40, 40, 40)}
where = ['q_proj','k_proj','v_proj','up_proj','down_proj']

def config_of(shape):
    if shape=='pico': return LlamaConfig.from_pretrained(str(assets/'pico'))
    v,h,f,n,a,kv = shapes[shape]
    return LlamaConfig(vocab_size=v, hidden_size=h, intermediate_size=f, num_hidden_layers=n, num_attention_heads=a, num_key_value_heads=kv)

def make(shape):
    "A model of the true shape with random weights, and LoRA with r=32 as in the released recipe"
    torch.manual_seed(0)
    if shape=='pico': model = AutoModelForCausalLM.from_pretrained(str(assets/'pico'), dtype=torch.float32)
    else:
        cfg = config_of(shape)
        old = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
        with torch.device('cuda' if gpu else 'cpu'): model = LlamaForCausalLM(cfg)
        torch.set_default_dtype(old)
    model.config.use_cache = False
    model = get_peft_model(model.to('cuda' if gpu else 'cpu'), lora)
    for name,p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.01)
    return model

class Levers:
    "Each lever of a model on or off ('ahead' belongs to the Trainer): what the package only ever switches on is switched back here by putting the old parts back"
    def __init__(self, model):
        self.model,self.layers = model,find_layers(model)
        self.blocks,self.base,self.compiled,self.swaps = blocks_of(model, self.layers),model.get_base_model(),None,None
        self.forward = self.fused = None
    def set(self, names):
        unfold(self.model)
        if 'fold' in names: fold(self.model)
        if 'compile' in names and not self.compiled:
            compile_blocks(self.model, self.layers)
            self.compiled = [o._compiled_call_impl for o in self.blocks]
        for i,o in enumerate(self.blocks): o._compiled_call_impl = self.compiled[i] if 'compile' in names else None
        if 'loss' in names and not self.fused:
            fuse_loss(self.model)
            self.fused = self.base.__dict__['forward']
        self.base.__dict__.pop('forward', None)
        if 'loss' in names: self.base.__dict__['forward'] = self.fused
        if 'fp8' in names and not self.swaps:
            before = {n:m for n,m in self.model.named_modules() if type(m) is torch.nn.Linear}
            to_fp8(self.model, self.layers)
            self.swaps = [(n, before[n], m) for n,m in self.model.named_modules() if n in before and m is not before[n]]
        for n,plain,fp8 in self.swaps or []:
            parent,_,key = n.rpartition('.')
            self.model.get_submodule(parent)._modules[key] = fp8 if 'fp8' in names else plain

class Clock(TrainerCallback):
    "When steps begin, and the peak of memory above what is there then; it waits for the GPU only at the ends of what is timed, as a training does not wait either"
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

def run(lev, data, batch, steps, config, levers, checkpointing, seed, folder, warm=3):
    lev.set(levers)
    clock = Clock((warm, steps+warm))
    callbacks = [clock]
    if config is not None:
        cb = ISTCallback(ISTConfig(**(config | dict(seed=seed))))
        callbacks += [cb, Depth(cb)]
    args = TrainingArguments(folder, max_steps=steps+warm+1, per_device_train_batch_size=batch, learning_rate=1e-5, bf16=gpu, gradient_checkpointing=checkpointing, report_to='none',
                             logging_steps=10, disable_tqdm=True, logging_nan_inf_filter='ahead' not in levers, accelerator_config=dict(non_blocking='ahead' in levers), save_strategy='no', seed=seed, use_cpu=not gpu)
    model = lev.model
    trainer = Trainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=callbacks)
    for o in (PrinterCallback, ProgressCallback): trainer.pop_callback(o)
    trainer.train()
    assert not gpu or '_original_forward' in model.__dict__, 'this run had no autocast'
    if checkpointing: model.gradient_checkpointing_disable()
    model.disable_input_require_grads() if hasattr(model, 'disable_input_require_grads') else None
    for k in ('forward', '_original_forward', '_is_accelerate_prepared'): model.__dict__.pop(k, None)   # accelerate's autocast, which it puts around a model once
    t = clock.times
    res = dict(seconds=(t[-1]-t[warm])/(len(t)-1-warm), peak=max(clock.peaks[warm:], default=None), depth=1., active=len(lev.layers), share=0.)
    if config is not None:
        d = callbacks[-1]
        res |= dict(depth=statistics.mean(d.depths[warm:-1]), active=statistics.mean(d.counts[warm:-1]), share=cb.ist.score_seconds/(t[-1]-t[warm]))
    trainer.optimizer = trainer.lr_scheduler = None
    del trainer
    gc.collect()
    return res

def floors(model, tokens, flops):
    "Seconds for the products of a forward pass, and bytes that a block must keep for its backward pass, at the measured rate"
    cfg = model.config
    h,f,kv = cfg.hidden_size,cfg.intermediate_size,cfg.num_key_value_heads*(cfg.hidden_size//cfg.num_attention_heads)
    per_block = 2*h*h+2*h*kv+3*h*f
    return dict(forward_seconds=2*tokens*(per_block*cfg.num_hidden_layers+h*cfg.vocab_size)/flops,
                block_bytes=tokens*(4*h+2*kv+2*f)*(2 if gpu else 4))   # input, q, k, v, attention output, middle, gate, up

ours = dict(sampler='depth', scorer='fisher', score_interval=20)
budget = ours | dict(activation_budget=0.28)   # of what LoRA takes
lora = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=where, task_type='CAUSAL_LM')
variants = {   # name: settings of IST (None: all layers), levers, checkpointing
    'LoRA':(None, '', False), 'LoRA, compile+ahead':(None, 'compile ahead', False), 'LoRA, compile+loss+ahead':(None, 'compile loss ahead', False),
    'released IST':(dict(scorer='paper', explore=0., sampler='importance'), '', False),
    'RST':(dict(sampler='uniform'), '', False), 'RST, compile+ahead':(dict(sampler='uniform'), 'compile ahead', False),
    'ours':(ours, '', False), 'ours, fold':(ours, 'fold', False), 'ours, fold+compile':(ours, 'fold compile', False), 'ours, fold+compile+ahead':(ours, 'fold compile ahead', False),
    'ours, fold+compile+ahead, budget':(budget, 'fold compile ahead', False), 'ours, fold+compile+ahead+loss':(ours, 'fold compile ahead loss', False),
    'ours, fold+compile+ahead+fp8':(ours, 'fold compile ahead fp8', False),
    'LoRA, checkpointing':(None, '', True), 'ours, fold+compile+ahead, checkpointing':(ours, 'fold compile ahead', True),
}

def estimated(found, steps=24):
    "For each variant of a shape in the committed JSON: seconds and peak memory as shares of LoRA's that `estimate` foresees for the very steps that were drawn (no importance yet)"
    s,res,dtype = block_shape(config_of(found['shape']), lora),{},torch.float32 if found['shape']=='pico' else torch.bfloat16
    args = dict(rates=(found['matrix_flops'], found['copy_bytes']), dtype=dtype)
    dense = estimate(s, ISTConfig.rst(n_active=1.), found['batch'], found['length'], **args)
    for k,v in found['variants'].items():
        if k not in variants: continue
        config,levers,ckpt = variants[k]
        config = dict(config or dict(sampler='uniform', n_active=1.))
        if 'activation_budget' in config: config['activation_budget'] = f"{int(config['activation_budget']*dense['dense_bytes']/2**20)}MiB"
        rows = []
        for seed in range(v['reps']):
            o = ISTConfig(**(config | dict(seed=seed, fast=','.join(l for l in levers.split() if l!='ahead') or False)))
            drawn = [samplers[o.sampler](torch.zeros(s.n), layer_count(o.n_active, s.n), o, generator_for(seed, 'layers', t)).tolist() for t in range(steps)]
            rows.append(estimate(s, o, found['batch'], found['length'], draws=drawn[3:], checkpointing=ckpt, ahead='ahead' in levers, **args))
        res[k] = [statistics.median(r[f] for r in rows)/dense[f] for f in ('seconds', 'bytes')]
    return res

def kept(lev, batch, length):
    "Bytes that one block keeps for its backward pass, trained and frozen, plain and with levers"
    block,base,res = lev.blocks[0],lev.base,{}
    x = torch.randn(batch, length, lev.model.config.hidden_size, dtype=torch.bfloat16 if gpu else torch.float32, device='cuda' if gpu else 'cpu', requires_grad=True)
    kwargs = dict(position_embeddings=base.model.rotary_emb(x, torch.arange(length, device=x.device)[None]))
    for levers in ('', 'fold', 'compile', 'fold compile'):
        lev.set(levers.split())
        for name,active in (('trained', [0]), ('frozen', [1])):
            lev.layers.switch(active)
            with torch.autocast('cuda' if gpu else 'cpu', torch.bfloat16, enabled=gpu): res[f'{name}, {levers}'] = kept_bytes(lambda: block(x, **kwargs), block)
            lev.layers.thaw()
    return res

def profile(lev, batch, length, levers, n_active=0.25, reps=6):
    "Where the time of a step goes that trains the top layers: the host's work, the whole, and the kernels on the GPU (milliseconds)"
    from torch.profiler import profile as record,ProfilerActivity
    lev.set(levers.split())
    model,n = lev.model,len(lev.layers)
    lev.layers.switch(range(n-max(1, int(n_active*n)), n))
    ids = torch.randint(5, model.config.vocab_size, (batch, length), device='cuda')
    opt = torch.optim.AdamW([p for o in lev.layers for p in o.params], lr=1e-5, fused=True)
    def step():
        with torch.autocast('cuda', torch.bfloat16): loss = model(input_ids=ids, labels=ids).loss
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
    with record(activities=[ProfilerActivity.CUDA]) as p:
        step()
        torch.cuda.synchronize()
    lev.layers.thaw()
    kernels = sorted(((e.key[:80], round(e.self_device_time_total/1e3, 3), e.count) for e in p.key_averages()), key=lambda o: -o[1])
    return dict(host=statistics.median(a for a,_ in times), whole=statistics.median(b for _,b in times), gpu=sum(o[1] for o in kernels), launches=sum(o[2] for o in kernels), kernels=kernels[:12])

def summary(values):
    values = [v for v in values if v is not None]
    return dict(median=statistics.median(values), min=min(values), max=max(values)) if values else None

def result(shape, batch, length, steps, lev, runs, failed, speeds):
    flops,copy = speeds
    res = {k:{f:summary([r[f] for r in v]) for f in ('seconds', 'peak', 'depth', 'active', 'share')} | dict(reps=len(v)) for k,v in runs.items() if v}
    return dict(shape=shape, batch=batch, length=length, steps=steps, variants=res, failed=failed, matrix_flops=flops, copy_bytes=copy,
                floors=floors(lev.model, batch*length, flops), parameters=sum(p.numel() for p in lev.model.parameters()))

def bench(shape, batch, length, steps, reps, only, seconds, save):
    "Rounds over all variants; `save` gets what is known after each of them, so that a run that is cut short has its table"
    start = time.perf_counter()
    lev = Levers(make(shape))
    vocab = lev.model.config.vocab_size
    data = [dict(input_ids=o, labels=o) for o in torch.randint(5, vocab, (256, length), generator=torch.Generator().manual_seed(0)).tolist()]
    dtype,n = (torch.bfloat16, 8192) if gpu else (torch.float32, 1024)
    speeds = machine_rates('cuda' if gpu else 'cpu', dtype, n)
    chosen = [k for k in variants if (not only or k in only) and (gpu or 'fp8' not in k) and ('loss' not in variants[k][1] or _liger(lev.model))]
    runs,failed,dense,took,more = {k:[] for k in chosen},{},None,0,{}
    for rep in range(-1, reps):   # round -1 compiles and warms up, and is not counted
        begun = time.perf_counter()
        if rep>0 and begun-start+took>seconds: break
        for k in chosen:
            config,levers,ckpt = variants[k]
            if k in failed: continue
            if config and 'activation_budget' in config:
                if not dense: continue
                config = config | dict(activation_budget=f"{int(config['activation_budget']*dense/2**20)}MiB")
            first = rep<0
            if first and config and 'score_interval' in config: config = config | dict(score_interval=2)
            try: r = run(lev, data, batch, 3 if first else steps, config, levers.split(), ckpt, max(rep, 0), tempfile.gettempdir()+'/ist_speed')
            except Exception as e: failed[k] = f'{type(e).__name__}: {e}'[:300]
            else:
                if not first: runs[k].append(r)
                elif k=='LoRA': dense = r['peak']
            print(f'[{time.perf_counter()-start:.0f} s]', shape, rep, k, failed.get(k) or {a:round(b, 4) for a,b in r.items() if b is not None}, flush=True)
        took = time.perf_counter()-begun
        if rep==0:
            more = dict(kept=kept(lev, batch, length))
            if gpu: more |= dict(profile={o:profile(lev, batch, length, o) for o in dict.fromkeys(variants[k][1].replace(' ahead', '') for k in chosen if k not in failed and 'loss' not in variants[k][1])})
        save(result(shape, batch, length, steps, lev, runs, failed, speeds) | more)
    return result(shape, batch, length, steps, lev, runs, failed, speeds) | more

def typed(name):
    "The command, without where its output went"
    out = next((i for i,o in enumerate(sys.argv) if o=='--out'), len(sys.argv))
    return shlex.join(['python', f'benchmarks/{name}.py', *sys.argv[1:out], *sys.argv[out+2:]])

@call_parse
def main(
    shapes:str='7b', # Shapes separated by commas: 1b, 7b, 13b, pico
    batch:int=16,    # Rows in a batch
    length:int=256,  # Tokens in a row
    steps:int=20,    # Steps in a run
    reps:int=5,      # Runs of each variant
    only:str='',     # Variants separated by semicolons; all if empty
    seconds:float=1e9, # Start no further round that would end after so many seconds, for each shape
    threads:int=2,   # On a CPU
    out:Path=None,   # Where the numbers go
):
    if not gpu: torch.set_num_threads(threads)
    only = [o.strip() for o in only.split(';') if o.strip()]
    device = torch.cuda.get_device_name() if gpu else f'{platform.machine()} CPU, {threads} threads'
    versions = {'python':platform.python_version()} | {o:version(o) for o in ('torch','transformers','peft','accelerate')}
    out = out or Path(__file__).parent/'results'/f'speed_{"gpu" if gpu else "cpu"}.json'
    res,head = [],dict(command=typed('speed'), hardware=device, versions=versions)
    def save(r): out.write_text(json.dumps(head | dict(shapes=[*res, r]), indent=1)+'\n')
    for s in shapes.split(','):
        r = bench(s, batch, length, steps, reps, only, seconds, save)
        save(r)
        res.append(r)
        gc.collect()
        base = r['variants'].get('LoRA')
        for k,v in r['variants'].items():
            ratio = v['seconds']['median']/base['seconds']['median'] if base else float('nan')
            mem = f"{v['peak']['median']/2**30:6.2f} GiB" if v['peak'] else ''
            print(f"{r['shape']:5} {k:42} {v['seconds']['median']:.4f} s ({v['seconds']['min']:.4f}-{v['seconds']['max']:.4f}) {ratio:5.2f}x {mem} depth {v['depth']['median']:.2f} probes {v['share']['median']:.1%}")
