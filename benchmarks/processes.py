"""IST on several processes, engine by engine: what works, what is refused, and that it is the same run as on one process.
`python benchmarks/processes.py` runs every case on 1, 2 and 4 processes of the CPU (gloo), or on 1 and as many GPUs as there are up to 2 (NCCL),
and writes results/processes.json, or processes_gpu.json. Each case compares weights, gradients and importance with a run on one process that has the same global batches."""
import argparse,json,os,platform,socket,subprocess,sys,tempfile,time,traceback,warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
from contextlib import contextmanager,nullcontext
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from importlib.metadata import PackageNotFoundError,version
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from peft import LoraConfig,get_peft_model
from transformers import LlamaConfig,LlamaForCausalLM
from ist_nb import IST,ISTCallback,ISTConfig,ISTError,find_layers

N,rows,tokens,steps = 4,8,8,8   # layers, rows of a global batch, tokens of a row, optimizer steps
dials = dict(n_active=1, score_interval=2, score_batch_size=8, explore=0.)
cuda = torch.cuda.is_available()
if not cuda: os.environ['DS_ACCELERATOR'] = 'cpu'   # DeepSpeed asks for it
def device(): return torch.device('cuda', torch.cuda.current_device()) if cuda else torch.device('cpu')

def make(adapter=None, dtype=torch.float64, **kwargs):
    "A Llama of random weights in float64, so that what differs by more than rounding is seen"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=N, num_attention_heads=2, num_key_value_heads=2, use_cache=False, **kwargs)
    return get_peft_model(LlamaForCausalLM(config), adapter or LoraConfig(r=4, target_modules=['q_proj', 'down_proj'], init_lora_weights=False, task_type='CAUSAL_LM')).to(device(), dtype)

ids = torch.randint(0, 64, (steps*rows, tokens), generator=torch.Generator().manual_seed(1))
data = [dict(input_ids=o, labels=o) for o in ids]
def collate(parts): return {k:torch.stack([torch.as_tensor(o[k]) for o in parts]) for k in ('input_ids', 'labels')}
def loader(): return DataLoader(data, batch_size=rows, collate_fn=collate)
def batch(t, rank=0, size=1): return {k:v.to(device()) for k,v in collate(data[t*rows:(t+1)*rows][rank::size]).items()}
def blocks(model): return model.base_model.model.model.layers
def params(model): return [p for p in model.parameters() if p.requires_grad]

def whole(t):
    "A tensor, or the whole of a sharded one, on the CPU"
    if t is None: return None
    return (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().cpu().clone()

def loss_of(model, b): return nn.functional.cross_entropy(model(input_ids=b['input_ids']).logits[:, :-1].flatten(0, 1), b['labels'][:, 1:].flatten())   # transformers' own is rounded to float32

# -- one run
adam = partial(torch.optim.AdamW, lr=0.01)
sgd = partial(torch.optim.SGD, lr=0.5)    # where something is rounded to float32: Adam makes whole steps of the differences of tiny gradients
def clean(name): return name.replace('_fsdp_wrapped_module.', '').removeprefix('module.')
def grads_of(model): return {clean(k):whole(p.grad) for k,p in model.named_parameters() if p.grad is not None}
def weights_of(model): return {clean(k):whole(p) for k,p in model.named_parameters() if 'lora' in k or 'vera' in k}

def run(rank=0, size=1, wrap=lambda m: m, config=None, give=None, optimizer=adam, accumulate=1, before=None, model=None, weights=weights_of, grads=grads_of, n=steps):
    "Train; what came out of it, in things that one process and several have in common"
    model = make() if model is None else model
    outer = wrap(model)
    opt = optimizer(params(outer))
    ist = IST(give(model, outer) if give else model, ISTConfig(**(dials | (config or {}))), probe=loader(), loss_fn=loss_of, optimizer=opt)
    seen,skipped = [],0
    for t in range(n):
        if before: before(t, ist, outer)
        with ist.step():
            for k in range(accumulate):
                sync = nullcontext() if k==accumulate-1 or not hasattr(outer, 'no_sync') else outer.no_sync()
                b = {n:v[k::accumulate] for n,v in batch(t, rank, size).items()}
                with sync: (outer(**b).loss/accumulate).backward()
            seen.append(grads(outer))
            skipped += sum(all(p.grad is None for p in o.params) for o in ist.layers)
            opt.step(); opt.zero_grad()
    return dict(weights=weights(outer), grads=seen, importance=ist.importance.double(), history=[h['importance'] for h in ist.history], times_active=ist.times_active, skipped=skipped/(n*N)), ist, outer

def largest(a, b):
    "The largest difference of two dictionaries of tensors with the same names"
    if a.keys()!=b.keys(): return float('inf')
    return max([(a[k]-b[k]).abs().max().item() for k in a] or [0.])

def compare(got, want):
    "How far a run is from the one on one process"
    res = dict(weights=largest(got['weights'], want['weights']), importance=(got['importance']-want['importance']).abs().max().item(),
               same_layers=got['times_active'].tolist()==want['times_active'].tolist(), updates=len(got['history']))
    if got['grads']: res['gradients'] = max(largest(a, b) for a,b in zip(got['grads'], want['grads']))
    return res

def judged(res, weights=1e-9, importance=1e-6, gradients=1e-12, sparse=True):
    "The same numbers, if they are those of a run that is equal to the one on one process"
    assert res['same_layers'] and res['updates'] and res['same_on_all_ranks'], res
    assert res['weights']<weights and res['importance']<importance and res.get('gradients', 0)<gradients, res
    assert not sparse or res.get('gradients_skipped', 1)>0.5, res
    return res

def same_on_all(tensors, size):
    "Whether the ranks have the same, to the bit"
    if size==1: return True
    flat = torch.cat([o.flatten().double() for o in tensors]).to(device())
    parts = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(parts, flat)
    return all(torch.equal(parts[0], o) for o in parts)

def bytes_kept(outer, ist, b):
    "Bytes that a forward keeps for the backward, with the layers of one step and with all; parameters apart"
    found = []
    for active in ([N//2], range(N)):
        ist.layers.switch(active)
        seen,alive = {},[]
        def pack(t):
            if not isinstance(t, nn.Parameter) and t.untyped_storage().nbytes(): seen[t.untyped_storage()._cdata] = t.numel()*t.element_size()
            alive.append(t)
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): loss = outer(**b).loss
        loss.backward()
        found.append(sum(seen.values()))
        for p in outer.parameters(): p.grad = None
    ist.layers.thaw()
    return found

# -- engines
def ddp(model, **kwargs): return DDP(model, **(dict(find_unused_parameters=True) | kwargs))
def fsdp2(model, per_block=True):
    from torch.distributed.fsdp import fully_shard
    if per_block:
        for o in blocks(model): fully_shard(o)
    return fully_shard(model)
def fsdp1(model, use_orig_params=True):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    return FSDP(model, use_orig_params=use_orig_params, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), device_id=device() if cuda else torch.device('cpu'))
def fsdp1_weights(outer):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    with FSDP.summon_full_params(outer): return weights_of(outer)
def fsdp1_grads(outer):
    "The slices of all ranks put together; FSDP's own way (`summon_full_params(with_grads=True)`) fails where the slice of a rank has no gradient"
    own,parts = {clean(k):p.grad.detach().cpu().flatten() for k,p in outer.named_parameters() if p.grad is not None},[None]*dist.get_world_size()
    dist.all_gather_object(parts, own)
    shapes = {k:p.shape for k,p in make().named_parameters()}
    return {k:torch.cat([o[k] for o in parts if k in o]).view(shapes[k]) for k in {k for o in parts for k in o}}

engines = {   # name: how to wrap, and what else is special
    'DDP': dict(wrap=ddp),
    'FSDP2': dict(wrap=fsdp2),
    'FSDP1': dict(wrap=fsdp1, give=lambda model, outer: outer, weights=fsdp1_weights, grads=fsdp1_grads),
}
works = {   # name: engine, what is done, and the arguments of `run`
    'DDP': ('DDP', 'probes', {}),
    'DDP, given to IST as it is': ('DDP', 'the wrapper in place of the model', dict(give=lambda model, outer: outer)),
    'DDP, gate': ('DDP', 'gradients in probes', dict(config=dict(scorer='gate'))),
    'DDP, fisher': ('DDP', 'no probes', dict(config=dict(scorer='fisher'))),
    'DDP, accumulation': ('DDP', '2 micro-batches, no_sync', dict(accumulate=2)),
    'DDP, gradient_as_bucket_view': ('DDP', 'gradients are views', dict(wrap=partial(ddp, gradient_as_bucket_view=True))),
    'DDP, checkpointing': ('DDP', 'activation checkpointing, not reentrant', dict(checkpointing=True)),
    'DDP, fold': ('DDP', "fast='fold'", dict(config=dict(fast='fold'))),
    'DDP, offload': ('DDP', "optimizer_state='offload'", dict(config=dict(optimizer_state='offload'))),
    'DDP, reset': ('DDP', "optimizer_state='reset'", dict(config=dict(optimizer_state='reset'))),
    'DDP, activation_budget': ('DDP', "activation_budget='1GiB'", dict(config=dict(activation_budget='1GiB'))),
    'DDP, one row in a probe': ('DDP', 'more processes than rows', dict(config=dict(score_batch_size=1))),
    'FSDP2': ('FSDP2', 'probes', {}),
    'FSDP2, one row in a probe': ('FSDP2', 'more processes than rows', dict(config=dict(score_batch_size=1))),
    'FSDP2, one unit': ('FSDP2', 'only the root is sharded', dict(wrap=partial(fsdp2, per_block=False))),
    'FSDP2, gate': ('FSDP2', 'gradients in probes', dict(config=dict(scorer='gate'))),
    'FSDP2, fisher': ('FSDP2', 'no probes', dict(config=dict(scorer='fisher'))),
    'FSDP2, evaluation between steps': ('FSDP2', 'only the root is sharded', dict(wrap=partial(fsdp2, per_block=False), evaluate=True)),
    'FSDP2, accumulation': ('FSDP2', '2 micro-batches', dict(accumulate=2)),
    'FSDP2, checkpointing': ('FSDP2', 'activation checkpointing, not reentrant', dict(checkpointing=True)),
    'FSDP2, fold': ('FSDP2', "fast='fold'", dict(config=dict(fast='fold'))),
    'FSDP2, reset': ('FSDP2', "optimizer_state='reset'", dict(config=dict(optimizer_state='reset'))),
    'FSDP1': ('FSDP1', 'probes, use_orig_params=True', {}),
    'FSDP1, the model inside given': ('FSDP1', 'the model in place of the wrapper', dict(give=None)),
    'DDP, compiled blocks': ('DDP', "fast='compile'", dict(config=dict(fast='compile'), optimizer=sgd, slow=True)),
    'FSDP2, compiled blocks': ('FSDP2', "fast='compile'", dict(config=dict(fast='compile'), optimizer=sgd, slow=True)),
}

def arguments(name):
    "The arguments of `run` for a case; without an engine for the run on one process that it is compared with; folding changes nothing, compiling rounds the norms (32 bits) in another way"
    engine,_,kwargs = works[name]
    kwargs = dict(kwargs)
    plain = dict(config={k:v for k,v in kwargs.get('config', {}).items() if (k, v)!=('fast', 'fold')}) | {k:kwargs[k] for k in ('accumulate', 'optimizer') if k in kwargs}
    kwargs.pop('slow', None)
    if kwargs.pop('checkpointing', False):
        def before(t, ist, outer):
            if t==0: ist.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False)); outer.train()
        kwargs['before'] = before
    if kwargs.pop('evaluate', False):
        @torch.no_grad()
        def before(t, ist, outer): outer(**batch(0, dist.get_rank(), dist.get_world_size()))
        kwargs['before'] = before
    return engines[engine] | kwargs,plain

def key(plain): return json.dumps(plain, sort_keys=True, default=str)
def work(name, rank, size, refs):
    "One case of those that work"
    engine,(kwargs,plain) = works[name][0],arguments(name)
    got,ist,outer = run(rank, size, **kwargs)
    res = compare(got, refs[key(plain)]) | dict(same_on_all_ranks=same_on_all([ist.importance, *got['weights'].values()], size), gradients_skipped=got['skipped'], engine_found=ist.engine.name)
    assert res['engine_found']==engine, res
    if name in engines: res['bytes_kept'] = bytes_kept(outer, ist, batch(0, rank, size))
    return judged(res, **compiled) if 'compiled' in name else judged(res)
compiled = dict(weights=2e-4, importance=1e-3, gradients=1e-4)   # norms in float32, rounded in another way; gradients reach 1e-2, weights go 1e-2 in all, at most four steps of SGD each

def uneven(rank, size, wrap=ddp):
    "A probe of rows with different numbers of labels, and of a rank without any: the loss of all, not the mean of means"
    from ist_nb.processes import Ranks,SharedProbe,weight
    model = make()
    wrap(model)
    whole = batch(0)
    for i in range(rows): whole['labels'][i, 1:1+i] = -100
    whole['labels'][0::size] = -100 if size>2 else whole['labels'][0::size]      # the first rank has nothing to predict
    own = {k:v[rank::size] for k,v in whole.items()}
    with torch.no_grad():
        want = loss_of(model, whole).item()
        got = SharedProbe(Ranks(), weight(model, own, rows//size), model.eval(), find_layers(model), own, loss_of, 0.25).loss()
        mean = loss_of(model, own).item()
    assert abs(got-want)<1e-12 and (size==1 or not abs(mean-want)<=1e-3), (got, want, mean)
    return dict(one_process=want, several=got)

# -- what is refused, before the first step
def frozen_at_wrap(model):
    layers = find_layers(model); layers.switch([0])
    outer = ddp(model)
    layers.thaw()
    return outer
def reentrant(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=True))
    return ddp(model.train())
def shared():
    from peft import VBLoRAConfig
    return make(VBLoRAConfig(target_modules=['q_proj'], num_vectors=8, vector_length=16, topk=2, task_type='CAUSAL_LM'))
refused = {   # name: engine, the setting, the arguments of `run`, a part of the message
    'DDP, find_unused_parameters=False': ('DDP', dict(wrap=partial(ddp, find_unused_parameters=False)), 'ddp_find_unused_parameters=True'),
    'DDP, static_graph': ('DDP', dict(wrap=partial(ddp, static_graph=True)), 'static_graph=False'),
    'DDP, reentrant checkpointing': ('DDP', dict(wrap=reentrant), 'use_reentrant=False'),
    'DDP, frozen at wrap': ('DDP', dict(wrap=frozen_at_wrap), 'Wrap the model while every adapter is trainable'),
    'DDP, compiled as a whole': ('DDP', dict(wrap=lambda m: torch.compile(ddp(m), backend='eager')), 'compiled as a whole'),
    'FSDP2, shared parameters': ('FSDP2', dict(model=shared, wrap=partial(fsdp2, per_block=False)), 'parameters that several layers share'),
    'FSDP2, activation_budget': ('FSDP2', dict(config=dict(activation_budget='1GiB')), 'Leave activation_budget out'),
    'FSDP2, fp8': ('FSDP2', dict(config=dict(fast='fp8')), "Use the optimisations 'fold'"),
    'FSDP2, offload': ('FSDP2', dict(config=dict(optimizer_state='offload')), 'CPUOffloadPolicy'),
    'FSDP2, sharded after IST was made': ('FSDP2', dict(late=True), 'Make IST after the model is wrapped'),
    'DDP, wrapped after IST was made': ('DDP', dict(wrap=partial(ddp, find_unused_parameters=False), late=True), 'ddp_find_unused_parameters=True'),
    'FSDP1, use_orig_params=False': ('FSDP1', dict(wrap=partial(fsdp1, use_orig_params=False), uniform=True), 'use_orig_params=True'),
    'FSDP1, compiled blocks': ('FSDP1', dict(config=dict(fast='fold, compile')), "Use fast='fold', or FSDP2"),
    'FSDP1, fisher': ('FSDP1', dict(config=dict(scorer='fisher')), "or FSDP2"),
    'FSDP1, gate': ('FSDP1', dict(config=dict(scorer='gate')), "or FSDP2"),
}

def refuse(name, rank, size):
    "What is said of a case that is refused; fails if it is not"
    engine,kwargs,part = refused[name]
    kwargs = engines[engine] | kwargs
    if 'model' in kwargs: model = kwargs['model']()
    else: model = make()
    if kwargs.get('uniform'):      # such a unit takes parameters that are all trained or all frozen
        for p in model.parameters(): p.requires_grad_(True)
    if not kwargs.get('late'): outer = kwargs['wrap'](model)
    try:
        ist = IST(kwargs['give'](model, outer) if kwargs.get('give') else model, ISTConfig(**(dials | kwargs.get('config', {}))), probe=loader(), loss_fn=loss_of, optimizer=torch.optim.AdamW(params(model)))
        if kwargs.get('late'): outer = kwargs['wrap'](model)
        ist.begin_step()
    except ISTError as e:
        assert part in str(e), e
        return dict(said=str(e))
    raise AssertionError(f'{name} was not refused')

# -- a process that goes its own way
def by_rank(ist, rank): 
    ist.sampler = lambda importance, n, config, g: torch.tensor([rank%N])
def moved(ist, rank):
    if rank: ist.importance[0] += 1e-3
def own_scorer(ist, rank):
    ist.scorer = lambda importance, *_: (importance+rank, dict(dropped=False))
def ahead(ist, rank): ist.t += rank>0
def nothing(ist, rank): pass
diverging = {   # name: settings of a rank, what happens to it, at which step, a part of the message, the steps that went well
    'seed': (lambda rank: dict(seed=7+(rank>0)), nothing, 0, 'seed: 8 on rank', 0),
    'a dial': (lambda rank: dict(suppression_factor=0.5 if rank else 0.25), nothing, 0, 'suppression_factor: 0.5 on rank', 0),
    'step': (lambda rank: {}, ahead, 0, 'step: 1 on rank', 0),
    'selection': (lambda rank: {}, by_rank, 0, 'drawn: ', 0),
    'importance': (lambda rank: {}, moved, 3, 'importance: ', 4),
    'what the scorer returns': (lambda rank: {}, own_scorer, 0, 'importance: ', 2),
}
def diverge(name, rank, size, wrap=ddp):
    "What every rank says when one goes its own way; fails if nobody notices, or only some"
    settings,happens,when,part,went_well = diverging[name]
    model = make()
    outer = wrap(model)
    ist = IST(model, ISTConfig(**(dials | settings(rank))), probe=loader(), loss_fn=loss_of)
    opt = torch.optim.AdamW(params(outer), lr=0.01)
    try:
        for t in range(steps):
            if t==when: happens(ist, rank)
            with ist.step(): outer(**batch(t, rank, size)).loss.backward(); opt.step(); opt.zero_grad()
    except ISTError as e:
        assert part in str(e) or f"{part.split(':')[0]}: " in str(e), e
        assert t==went_well, (t, e)
        return dict(said=str(e), at_step=t)
    raise AssertionError(f'{name}: nobody noticed')

# -- the Trainer
def trainer_run(folder, size=1, config=None, resume=None, n=steps, model=None, callback=None, dtype=torch.float64, one_gpu=True, **kwargs):
    "The same with a Trainer, which reads the rows in order"
    from torch.utils.data import SequentialSampler
    from transformers import Trainer,TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    class InOrder(Trainer):
        def _get_train_sampler(self, *args): return SequentialSampler(self.train_dataset)
    cb = callback or ISTCallback(ISTConfig(**(dials | (config or {}))), loss_fn=loss_of)
    args = TrainingArguments(str(folder), **(dict(max_steps=n, per_device_train_batch_size=rows//size, learning_rate=0.01, lr_scheduler_type='constant', report_to='none', logging_steps=1, save_strategy='no',
                             use_cpu=not cuda, disable_tqdm=True, dataloader_pin_memory=False) | kwargs))
    if one_gpu: args._n_gpu = min(1, args.n_gpu)   # one process would take all GPUs, by DataParallel
    t = InOrder(make(dtype=dtype) if model is None else model, args, train_dataset=[{k:v.tolist() for k,v in o.items()} for o in data], callbacks=[cb])
    t.pop_callback(PrinterCallback)
    t.train(resume_from_checkpoint=resume and str(resume))
    got = dict(weights=trainer_weights(t), grads=[], importance=cb.ist.importance.double(), history=[h['importance'] for h in cb.ist.history], times_active=cb.ist.times_active)
    return got,cb.ist,t

def trainer_weights(t):
    "FSDP1 holds slices, and puts them together on its wrapper only"
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    return fsdp1_weights(t.model_wrapped) if isinstance(t.model_wrapped, FSDP) else weights_of(t.model)

@contextmanager
def fresh_accelerate(fsdp_on_cpu=False):
    "accelerate remembers the engine of the first Trainer of a process, and writes it into the environment"
    from accelerate.state import AcceleratorState,DistributedType,GradientState,PartialState
    kept = {k:v for k,v in os.environ.items()}
    def forget():
        for cls in (AcceleratorState, GradientState, PartialState): cls._reset_state()
    def init(self, *args, **kwargs):
        if not cuda and PartialState._shared_state: PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU   # on a CPU accelerate takes DDP where FSDP is asked for
        AcceleratorState.real_init(self, *args, **kwargs)
    forget()
    if not hasattr(AcceleratorState, 'real_init'): AcceleratorState.real_init = AcceleratorState.__init__
    AcceleratorState.__init__ = init if fsdp_on_cpu else AcceleratorState.real_init
    try: yield
    finally:
        AcceleratorState.__init__ = AcceleratorState.real_init
        forget()
        for k in set(os.environ)-set(kept): del os.environ[k]
        os.environ.update(kept)

sharded = lambda version: dict(fsdp=True, fsdp_config=dict(version=version, transformer_layer_cls_to_wrap='LlamaDecoderLayer', use_orig_params=True, sync_module_states=cuda))
trainers = {   # name: arguments
    'Trainer, DDP': {},
    'Trainer, DDP, checkpointing': dict(gradient_checkpointing=True),
    'Trainer, FSDP2': sharded(2),
    'Trainer, FSDP2, fisher': sharded(2) | dict(config=dict(scorer='fisher')),
    'Trainer, FSDP1': sharded(1) | dict(dtype=torch.float32),   # it takes norms in float32 only
}
def trainer_plain(name): return {k:v for k,v in trainers[name].items() if k in ('config', 'dtype')}
def train(name, rank, size, refs, folder):
    "One case with a Trainer"
    with fresh_accelerate('FSDP' in name): got,ist,t = trainer_run(folder, size, **trainers[name])
    res = compare(got, refs['trainer'+key(trainer_plain(name))]) | dict(same_on_all_ranks=same_on_all([ist.importance, *got['weights'].values()], size), engine_found=ist.engine.name)
    assert ist.engine.name==name.split(', ')[1], res
    return judged(res, weights=1e-3, importance=1e-3) if 'dtype' in trainers[name] else judged(res)

trainer_refused = {
    'Trainer, ddp_find_unused_parameters=False': (dict(ddp_find_unused_parameters=False), 'ddp_find_unused_parameters=True'),
    'Trainer, reentrant checkpointing': (dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)), 'use_reentrant'),
    'Trainer, torch_compile': (dict(torch_compile=True, torch_compile_backend='eager'), 'torch_compile=False'),
    'Trainer, DataParallel': (dict(one_gpu=False), 'torchrun --nproc_per_node='),
    'Trainer, processes apart': (dict(use_cpu=False), 'every one would train the whole run by itself'),
}
def trainer_refuse(name, rank, size, folder):
    kwargs,part = trainer_refused[name]
    cb = ISTCallback(ISTConfig(**dials), loss_fn=loss_of)
    try:
        with fresh_accelerate(): trainer_run(folder, size, callback=cb, **kwargs)
    except ISTError as e:
        assert part in str(e), e
        return dict(said=str(e))
    raise AssertionError(f'{name} was not refused')

def resume(name, rank, size, folder):
    "Half a run, and the rest from its checkpoint, against the whole, bit for bit"
    with fresh_accelerate('FSDP' in name): whole,ist,_ = trainer_run(Path(folder)/'whole', size, save_strategy='steps', save_steps=5, **trainers[name])
    with fresh_accelerate('FSDP' in name): again,ist2,_ = trainer_run(Path(folder)/'again', size, resume=Path(folder)/'whole'/'checkpoint-5', **trainers[name])
    assert largest(whole['weights'], again['weights'])==0 and ist.state_dict()==ist2.state_dict(), (largest(whole['weights'], again['weights']), ist.importance, ist2.importance)
    return dict(bit_for_bit=True)

def checkpoint(name, rank, size):
    "The same in a loop of one's own, with torch's own checkpoint of a sharded model: layers that no step has trained yet are in it"
    from torch.distributed.checkpoint.state_dict import get_state_dict,set_state_dict
    how = dict(optimizer_state=name.split(', ')[1], sampler='importance', n_active=1, score_interval=4)
    def begin():
        model = make()
        outer = fsdp2(model)
        opt = torch.optim.AdamW(params(outer), lr=0.01)
        return outer,opt,IST(model, ISTConfig(**(dials | how)), probe=loader(), loss_fn=loss_of, optimizer=opt)
    def go(outer, opt, ist, times):
        for t in times:
            with ist.step(): outer(**batch(t, rank, size)).loss.backward(); opt.step(); opt.zero_grad()
        return weights_of(outer)
    outer,opt,ist = begin()
    go(outer, opt, ist, range(2))
    assert (ist.times_active==0).any()
    held = [{k:v for k,v in o.items()} for o in get_state_dict(outer, opt)]
    held = json_of(ist),[torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, o) for o in held]
    whole = go(outer, opt, ist, range(2, steps))
    outer,opt,ist2 = begin()
    set_state_dict(outer, opt, model_state_dict=held[1][0], optim_state_dict=held[1][1])
    ist2.load_state_dict(json.loads(held[0]))
    again = go(outer, opt, ist2, range(2, steps))
    assert largest(whole, again)==0 and json_of(ist)==json_of(ist2), largest(whole, again)
    return dict(bit_for_bit=True)
def json_of(ist): return json.dumps(ist.state_dict())
checkpoints = ['FSDP2, keep', 'FSDP2, reset']

# -- DeepSpeed, where it is installed
deepspeeds = {f'DeepSpeed ZeRO-{s}, {what}':(s, opt, config, part) for s in range(4) for what,opt,config,part in (
    ('AdamW', adam, {}, None if s==0 else 'has momentum or weight decay'), ('SGD without momentum', sgd, {}, None), ('AdamW, all layers active', adam, dict(n_active=1.), None),
    ('SGD, fisher', sgd, dict(scorer='fisher'), None if s==0 else 'its optimizer holds one flat tensor'))}
def ds_plain(name):
    _,opt,config,_ = deepspeeds[name]
    return dict(config=config, sgd=opt is sgd)
def ds_reference(config, sgd): return run(config=config, optimizer=globals()['sgd'] if sgd else adam, model=make(dtype=torch.float32))[0]

def ds(name, rank, size, refs):
    "One case with DeepSpeed: the same loop, by its own backward and step"
    import deepspeed
    stage,optimizer,config,part = deepspeeds[name]
    model = make(dtype=torch.float32)
    settings = dict(train_micro_batch_size_per_gpu=rows//size, zero_optimization=dict(stage=stage), zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    engine,*_ = deepspeed.initialize(model=model, optimizer=optimizer(params(model)), config=settings)
    def value(p):
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, 'ds_id') else nullcontext(): return p.detach().cpu().clone()
    def now(): return {clean(k):value(p) for k,p in engine.named_parameters() if 'lora' in k}
    try: ist = IST(model, ISTConfig(**(dials | config)), probe=loader(), loss_fn=loss_of)
    except ISTError as e:
        assert part and part in str(e), e
        return dict(said=str(e))
    assert part is None, f'{name} was not refused'
    moved,skipped = 0.,0
    for t in range(steps):
        before = now()
        with ist.step():
            engine.backward(engine(**batch(t, rank, size)).loss)
            resting = [clean(k) for k,p in engine.named_parameters() if 'lora' in k and not p.requires_grad]
            engine.step()
        skipped += len(resting)/len(before)/steps
        after = now()
        moved = max([moved, *((after[k]-before[k]).abs().max().item() for k in resting)])
    got = dict(weights=now(), grads=[], importance=ist.importance.double(), history=ist.history, times_active=ist.times_active)
    res = compare(got, refs['ds'+key(ds_plain(name))]) | dict(same_on_all_ranks=same_on_all([ist.importance, *got['weights'].values()], size), gradients_skipped=skipped, frozen_layers_moved=moved, engine_found=ist.engine.name)
    assert moved==0, res
    return judged(res, weights=1e-3, importance=1e-3, sparse='n_active' not in config)   # float32

# -- many cases
main_cases = ['DDP', 'DDP, fisher', 'DDP, one row in a probe', 'FSDP2', 'FSDP2, gate', 'FSDP2, fisher', 'FSDP2, one row in a probe', 'FSDP1', 'uneven labels', 'seed', 'importance', 'Trainer, DDP', 'Trainer, FSDP2', 'Trainer, processes apart', 'FSDP2, keep',
              'DDP, find_unused_parameters=False', 'DeepSpeed ZeRO-2, AdamW', 'DeepSpeed ZeRO-2, SGD without momentum', 'DeepSpeed ZeRO-3, SGD without momentum']   # on more than two processes

def works_here(name, size):
    "accelerate has no FSDP1 on a CPU, and the Trainer no DDP for one GPU"
    return 'FSDP1' not in name if not cuda else size>1 or 'DDP' not in name

def refused_here(name, size):
    "DataParallel is one process with several GPUs; processes work apart that have none and are not told to do without"
    if name=='Trainer, DataParallel': return size==1 and torch.cuda.device_count()>1
    if name=='Trainer, processes apart': return size>1 and not cuda
    return size>1 or not cuda

def all_cases(size, slow=True):
    "Pairs of a kind and a name"
    fast = [('works', n) for n,(*_,k) in works.items() if not k.get('slow')] + [('refused', n) for n in refused]
    fast += [('probe', 'uneven labels')]
    fast += [('diverging', n) for n in diverging]*(size>1) + [('trainer', n) for n in trainers if works_here(n, size)]
    fast += [('trainer refused', n) for n in trainer_refused if refused_here(n, size)] + [('resume', 'Trainer, DDP')] + [('checkpoint', n) for n in checkpoints] + [('resume', 'Trainer, FSDP2')]*cuda   # on a CPU PEFT does not save what FSDP2 has sharded
    if find_spec('deepspeed'): fast += [('deepspeed', n) for n in deepspeeds]
    every = fast + [('works', n) for n,(*_,k) in works.items() if k.get('slow')]*slow
    return every if size<=2 else [o for o in every if o[1] in main_cases]

def one(kind, name, rank, size, refs, folder):
    if kind=='works': return work(name, rank, size, refs)
    if kind=='refused': return refuse(name, rank, size)
    if kind=='probe': return uneven(rank, size)
    if kind=='diverging': return diverge(name, rank, size)
    if kind=='trainer': return train(name, rank, size, refs, folder)
    if kind=='trainer refused': return trainer_refuse(name, rank, size, folder)
    if kind=='checkpoint': return checkpoint(name, rank, size)
    if kind=='resume': return resume(name, rank, size, Path(folder)/'resume')
    return ds(name, rank, size, refs)

def make_references(cases, path):
    "The runs on one process that those on several are compared with"
    found = {}
    for kind,name in cases:
        if kind=='works': k,f = key(arguments(name)[1]),lambda: run(**arguments(name)[1])[0]
        elif kind=='trainer': k,f = 'trainer'+key(trainer_plain(name)),lambda: trainer_run(tempfile.mkdtemp(), **trainer_plain(name))[0]
        elif kind=='deepspeed': k,f = 'ds'+key(ds_plain(name)),lambda: ds_reference(**ds_plain(name))
        else: continue
        if k not in found: found[k] = f()
    torch.save(found, path)

def worker(folder, rank, size):
    "One process of a launch: every case in turn, a line of JSON for each"
    folder = Path(folder)
    todo = json.loads((folder/'cases.json').read_text())
    torch.set_num_threads(1); warnings.simplefilter('ignore')
    if cuda: torch.cuda.set_device(rank)
    dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(seconds=40 if cuda else 180), **(dict(device_id=device()) if cuda else {}))
    refs = torch.load(folder/'references.pt')
    with open(folder/f'{rank}.jsonl', 'a') as out:
        for kind,name in todo:
            start = time.perf_counter()
            try: res = dict(ok=True) | one(kind, name, rank, size, refs, folder)
            except Exception as e: res = dict(ok=False, error=f'{type(e).__name__}: {str(e)[:600]}', where=traceback.format_exc()[-1500:].replace(f'{Path(__file__).parent.parent}/', ''))
            out.write(json.dumps(dict(kind=kind, name=name, seconds=round(time.perf_counter()-start, 2)) | res)+'\n'); out.flush()
            dist.barrier()
    dist.destroy_process_group()

def launch(cases, size, seconds=600):
    "Run `cases` on `size` processes; one that hangs or dies is recorded, and the rest run in a new launch"
    done,until = [],time.monotonic()+seconds
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        try: make_references(cases, d/'references.pt')
        except Exception as e: return [dict(kind=k, name=n, ok=False, error=f'reference: {e}') for k,n in cases]
        while len(done)<len(cases) and time.monotonic()<until:
            (d/'cases.json').write_text(json.dumps(cases[len(done):]))
            for f in d.glob('*.jsonl'): f.unlink()
            log = _processes(d, size, until)
            lines = [[json.loads(o) for o in (d/f'{r}.jsonl').read_text().splitlines()] if (d/f'{r}.jsonl').exists() else [] for r in range(size)]
            n = min(map(len, lines))
            done += [_merge([o[i] for o in lines]) for i in range(n)]
            if len(done)<len(cases) and time.monotonic()<until:
                kind,name = cases[len(done)]
                done.append(dict(kind=kind, name=name, ok=False, error='a process died or hung', where=log[-1500:]))
    return done + [dict(kind=k, name=n, ok=None, error='not run: out of time') for k,n in cases[len(done):]]

def _processes(d, size, until):
    "One launch; what it printed"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), PYTHONWARNINGS='ignore')
    with open(d/'log', 'w') as log:
        procs = [subprocess.Popen([sys.executable, __file__, '--worker', str(d), str(r), str(size)], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=log, stderr=log) for r in range(size)]
        try:
            while any(p.poll() is None for p in procs) and not any(p.poll() for p in procs) and time.monotonic()<until: time.sleep(0.1)
            if any(p.poll() for p in procs): time.sleep(3)
        finally:
            for p in procs:
                if p.poll() is None: p.kill()
                p.wait()
    return (d/'log').read_text(errors='replace')

def _merge(of):
    "What the ranks found, as one"
    bad = next((o for o in of if not o['ok']), None)
    if bad: return bad
    said = [o.get('said') for o in of]
    return of[0] | dict(ok=len(set(said))==1, said_by_all_ranks=len(set(said))==1)

def versions(): 
    res = dict(python=platform.python_version())
    for o in ('torch', 'transformers', 'accelerate', 'peft', 'deepspeed'):
        try: res[o] = version(o)
        except PackageNotFoundError: pass
    return res

def hardware():
    if cuda: return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}'
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    return f'{os.cpu_count()} CPUs, {cpu}'

def merged(old, new):
    "The old cases, in their places with what was run again"
    by = lambda cases: {(o['processes'], o['kind'], o['name']):o for o in cases}
    return list((by(old) | by(new)).values())

def main():
    p = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent/'results'
    p.add_argument('--out', default=here/('processes_gpu.json' if cuda else 'processes.json'), type=Path)
    p.add_argument('--sizes', type=int, nargs='*', default=[o for o in (1, 2) if o<=torch.cuda.device_count()] if cuda else [1, 2, 4], help='how many processes')
    p.add_argument('--only', nargs='*', help='cases whose name contains one of these; the others stay in the file as they are')
    p.add_argument('--seconds', type=float, default=55 if cuda else 900, help='for each number of processes')
    p.add_argument('--slow', action='store_true', help='on a CPU too, compile')
    p.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker: return worker(a.worker[0], *map(int, a.worker[1:]))
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    start,found = time.perf_counter(),[]
    for size in a.sizes:
        cases = [(k, n) for k,n in all_cases(size, slow=cuda or a.slow) if not a.only or any(o in n for o in a.only)]
        for o in launch(cases, size, a.seconds):
            print(size, o['kind'], '-', o['name'], 'ok' if o['ok'] else o.get('error', 'the ranks do not say the same'), flush=True)
            found.append(dict(processes=size) | o)
    took = round(time.perf_counter()-start)
    old = json.loads(a.out.read_text()) if a.only and a.out.exists() else {}   # what was not run again is kept
    found = merged(old.get('cases', []), found)
    res = dict(command='python benchmarks/processes.py', versions=old.get('versions', {}) | versions(), hardware=hardware(), backend='nccl' if cuda else 'gloo', seconds=old.get('seconds', took),
               run=dict(layers=N, rows=rows, tokens=tokens, steps=steps, dtype='float64 (DeepSpeed: float32)') | dials, cases=found)
    res |= {k:v for k,v in old.items() if k not in res}
    a.out.write_text(json.dumps(res, indent=1)+'\n')
    print(f"{sum(o['ok'] is True for o in found)} of {len(found)} as expected, in {took} s -> {a.out}")

if __name__=='__main__': main()
