"""IST on several processes, by engine: what works, what is refused, and that it is the same run as on one process.
Every case runs on 1, 2 and 4 processes of the CPU (gloo), or on 1 GPU and on 2 if there are (NCCL). Each compares
weights, gradients and importance with a run on one process that has the same global batches."""
import gc,json,os,platform,socket,subprocess,sys,tempfile,time,traceback,warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
from contextlib import contextmanager,nullcontext
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from multiprocessing.context import ForkProcess
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from peft import LoraConfig,get_peft_model
from ist_nb import IST,ISTCallback,ISTConfig,ISTError,find_layers
from ist_nb.config import scorers
from benchmarks import record
from benchmarks.small import lm_batch,tiny_llama,trainable as params

N,rows,tokens,steps = 4,8,8,8   # layers, rows of a global batch, tokens of a row, optimizer steps
usual = dict(n_active=1, score_interval=2, score_batch_size=8, explore=0.)
def config_of(given=None):
    found = usual | (given or {})
    unread = getattr(scorers[found.get('scorer', ISTConfig.scorer)], 'ignores', ())
    return ISTConfig(**{k:v for k,v in found.items() if k not in unread})
cuda = torch.cuda.is_available()
if not cuda: os.environ['DS_ACCELERATOR'] = 'cpu'   # DeepSpeed asks for it
def device(): return torch.device('cuda', torch.cuda.current_device()) if cuda else torch.device('cpu')

lora = LoraConfig(r=4, target_modules=['q_proj', 'down_proj'], init_lora_weights=False, task_type='CAUSAL_LM')
def make(adapter=lora, dtype=torch.float64, **kwargs):
    "A Llama of random weights in float64, so that what differs by more than rounding is seen"
    return get_peft_model(tiny_llama(N, hidden=32, **kwargs), adapter).to(device(), dtype)

ids = torch.randint(0, 64, (steps*rows, tokens), generator=torch.Generator().manual_seed(1))
data = [lm_batch(o) for o in ids]
def collate(parts): return {k:torch.stack([torch.as_tensor(o[k]) for o in parts]) for k in ('input_ids', 'labels')}
def loader(): return DataLoader(data, batch_size=rows, collate_fn=collate)
def batch(t, rank=0, size=1): return {k:v.to(device()) for k,v in collate(data[t*rows:(t+1)*rows][rank::size]).items()}
def blocks(model): return model.base_model.model.model.layers

def whole(t):
    "A tensor, or the whole of a sharded one, on the CPU"
    if t is None: return None
    return (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().cpu().clone()

def loss_of(model, b):
    "In float64, where transformers' own is rounded to float32"
    logits = model(input_ids=b['input_ids']).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, b['labels'][:, 1:].flatten())
def new_ist(model, config=None, **kwargs):
    return IST(model, config_of(config), probe=loader(), loss_fn=loss_of, **kwargs)

# -- one run
adam = partial(torch.optim.AdamW, lr=0.01)
# where something is rounded to float32: Adam makes whole steps of the differences of tiny gradients
sgd = partial(torch.optim.SGD, lr=0.5)
def clean(name): return name.replace('_fsdp_wrapped_module.', '').removeprefix('module.')
def grads_of(model): return {clean(k):whole(p.grad) for k,p in model.named_parameters() if p.grad is not None}
def weights_of(model): return {clean(k):whole(p) for k,p in model.named_parameters() if 'lora' in k or 'vera' in k}

def run(rank=0, size=1, wrap=lambda m: m, config=None, give=None, optimizer=adam, accumulate=1, before=None, model=None,
        weights=weights_of, grads=grads_of, n=steps):
    "Train; what came out of it, in things that one process and several have in common"
    model = make() if model is None else model
    outer = wrap(model)
    opt = optimizer(params(outer))
    ist = new_ist(give(model, outer) if give else model, config, optimizer=opt)
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
            opt.step()
            opt.zero_grad()
    return found_of(ist, weights(outer), seen) | dict(skipped=skipped/(n*N)), ist, outer

def found_of(ist, weights, grads=()):
    return dict(weights=weights, grads=grads, importance=ist.importance.double(),
                history=[h['importance'] for h in ist.history], times_active=ist.times_active)

def largest(a, b):
    "The largest difference of two dictionaries of tensors with the same names"
    if a.keys()!=b.keys(): return float('inf')
    return max([(a[k]-b[k]).abs().max().item() for k in a] or [0.])

def compare(got, want):
    "How far a run is from the one on one process"
    res = dict(weights=largest(got['weights'], want['weights']),
               importance=(got['importance']-want['importance']).abs().max().item(),
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

def beside(got, want, ist, size):
    "`compare`, whether the ranks agree, and the engine that IST saw"
    same = same_on_all([ist.importance, *got['weights'].values()], size)
    return compare(got, want) | dict(same_on_all_ranks=same, engine_found=ist.engine.name)

def bytes_kept(outer, ist, b):
    "Bytes that a forward keeps for the backward, with the layers of one step and with all; parameters apart"
    found = []
    for active in ([N//2], range(N)):
        ist.layers.switch(active)
        seen,alive = {},[]
        def pack(t):
            if not isinstance(t, nn.Parameter) and t.untyped_storage().nbytes():
                seen[t.untyped_storage()._cdata] = t.numel()*t.element_size()
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
    return FSDP(model, use_orig_params=use_orig_params, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
                device_id=device() if cuda else torch.device('cpu'))
def fsdp1_weights(outer):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    with FSDP.summon_full_params(outer): return weights_of(outer)
def fsdp1_grads(outer):
    "The slices of all ranks put together; `summon_full_params(with_grads=True)` fails where a slice has no gradient"
    own = {clean(k):p.grad.detach().cpu().flatten() for k,p in outer.named_parameters() if p.grad is not None}
    parts = [None]*dist.get_world_size()
    dist.all_gather_object(parts, own)
    shapes = {k:p.shape for k,p in make().named_parameters()}
    return {k:torch.cat([o[k] for o in parts if k in o]).view(shapes[k]) for k in {k for o in parts for k in o}}

engines = {   # name: how to wrap, and what else is special
    'DDP': dict(wrap=ddp),
    'FSDP2': dict(wrap=fsdp2),
    'FSDP1': dict(wrap=fsdp1, give=lambda model, outer: outer, weights=fsdp1_weights, grads=fsdp1_grads),
}
def one_unit(model): return fsdp2(model, per_block=False)
def row_of_settings(engine): # name: arguments of `run`, for the settings that both DDP and FSDP2 take
    of = {'one row in a probe':dict(score_batch_size=1), 'gate':dict(scorer='gate'), 'fisher':dict(scorer='fisher'),
          'fold':dict(fast='fold'), 'reset':dict(optimizer_state='reset')}
    more = {'accumulation':dict(accumulate=2), 'checkpointing':dict(checkpointing=True),
            'compiled blocks':dict(config=dict(fast='compile'), optimizer=sgd, slow=True)}
    return {f'{engine}, {k}':v for k,v in ({k:dict(config=v) for k,v in of.items()} | more).items()}
works = {   # name, which begins with the engine: the arguments of `run`
    'DDP': {}, 'DDP, given to IST as it is': dict(give=lambda model, outer: outer), **row_of_settings('DDP'),
    'DDP, gradient_as_bucket_view': dict(wrap=partial(ddp, gradient_as_bucket_view=True)),
    'DDP, offload': dict(config=dict(optimizer_state='offload')),
    'DDP, activation_budget': dict(config=dict(activation_budget='1GiB')),
    'FSDP2': {}, 'FSDP2, one unit': dict(wrap=one_unit), **row_of_settings('FSDP2'),
    'FSDP2, evaluation between steps': dict(wrap=one_unit, evaluate=True),
    'FSDP1': {}, 'FSDP1, the model inside given': dict(give=None),
}

def engine_of(name): return name.split(',')[0]
def arguments(name):
    """The arguments of `run` for a case, and those of the run on one process that it is compared with, which has no
    engine and does not fold (folding changes nothing; compiling rounds the norms, of 32 bits, in another way)"""
    kwargs = dict(works[name])
    config = {k:v for k,v in kwargs.get('config', {}).items() if (k, v)!=('fast', 'fold')}
    plain = dict(config=config) | {k:kwargs[k] for k in ('accumulate', 'optimizer') if k in kwargs}
    kwargs.pop('slow', None)
    def checkpointing(t, ist, outer):
        if t: return
        ist.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        outer.train()
    @torch.no_grad()
    def evaluate(t, ist, outer): outer(**batch(0, dist.get_rank(), dist.get_world_size()))
    if kwargs.pop('checkpointing', False): kwargs['before'] = checkpointing
    if kwargs.pop('evaluate', False): kwargs['before'] = evaluate
    return engines[engine_of(name)] | kwargs,plain

def key(plain): return json.dumps(plain, sort_keys=True, default=str)
def work(name, rank, size, refs):
    "One case of those that work"
    kwargs,plain = arguments(name)
    got,ist,outer = run(rank, size, **kwargs)
    res = beside(got, refs[key(plain)], ist, size) | dict(gradients_skipped=got['skipped'])
    assert res['engine_found']==engine_of(name), res
    if name in engines: res['bytes_kept'] = bytes_kept(outer, ist, batch(0, rank, size))
    return judged(res, **compiled) if 'compiled' in name else judged(res)
# norms in float32, rounded in another way; gradients reach 1e-2, weights go 1e-2 in all, at most four steps of SGD each
compiled = dict(weights=2e-4, importance=1e-3, gradients=1e-4)

def uneven(rank, size, wrap=ddp):
    "A probe of rows with different numbers of labels, and a rank without any: the loss of all, not the mean of means"
    from ist_nb.processes import Ranks
    model = make()
    wrap(model)
    whole = batch(0)
    for i in range(rows): whole['labels'][i, 1:1+i] = -100
    whole['labels'][0::size] = -100 if size>2 else whole['labels'][0::size]      # the first rank has nothing to predict
    own = {k:v[rank::size] for k,v in whole.items()}
    with torch.no_grad():
        want = loss_of(model, whole).item()
        got = Ranks().probe(rows//size, model.eval(), find_layers(model), own, loss_of, 0.25).loss()
        mean = loss_of(model, own).item()
    assert abs(got-want)<1e-12 and (size==1 or not abs(mean-want)<=1e-3), (got, want, mean)
    return dict(one_process=want, several=got)

# -- what is refused, before the first step
def frozen_at_wrap(model):
    layers = find_layers(model)
    layers.switch([0])
    outer = ddp(model)
    layers.thaw()
    return outer
def reentrant(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=True))
    return ddp(model.train())
def shared():
    from peft import VBLoRAConfig
    return make(VBLoRAConfig(target_modules=['q_proj'], num_vectors=8, vector_length=16, topk=2, task_type='CAUSAL_LM'))
used = partial(ddp, find_unused_parameters=False)
refused = {   # name, which begins with the engine: the arguments of `run`, a part of the message
    'DDP, find_unused_parameters=False': (dict(wrap=used), 'ddp_find_unused_parameters=True'),
    'DDP, static_graph': (dict(wrap=partial(ddp, static_graph=True)), 'static_graph=False'),
    'DDP, reentrant checkpointing': (dict(wrap=reentrant), 'use_reentrant=False'),
    'DDP, frozen at wrap': (dict(wrap=frozen_at_wrap), 'Wrap the model while every adapter is trainable'),
    'DDP, compiled as a whole': (dict(wrap=lambda m: torch.compile(ddp(m), backend='eager')), 'compiled as a whole'),
    'FSDP2, shared parameters': (dict(model=shared, wrap=one_unit), 'parameters that several layers share'),
    'FSDP2, activation_budget': (dict(config=dict(activation_budget='1GiB')), 'Leave activation_budget out'),
    'FSDP2, fp8': (dict(config=dict(fast='fp8')), "'fold'"),
    'FSDP2, offload': (dict(config=dict(optimizer_state='offload')), 'CPUOffloadPolicy'),
    'FSDP2, sharded after IST was made': (dict(late=True), 'Make IST after the model is wrapped'),
    'DDP, wrapped after IST was made': (dict(wrap=used, late=True), 'ddp_find_unused_parameters=True'),
    'FSDP1, use_orig_params=False': (dict(wrap=partial(fsdp1, use_orig_params=False), uniform=True),
                                     'use_orig_params=True'),
    'FSDP1, compiled blocks': (dict(config=dict(fast='fold, compile')), "Use fast='fold', or FSDP2"),
    'FSDP1, gate': (dict(config=dict(scorer='gate')), 'or FSDP2'),
    'FSDP1, fisher': (dict(config=dict(scorer='fisher')), 'or FSDP2'),
}

def refuse(name, rank, size):
    "What is said of a case that is refused; fails if it is not"
    kwargs,part = refused[name]
    kwargs = engines[engine_of(name)] | kwargs
    model = kwargs.get('model', make)()
    if kwargs.get('uniform'):      # such a unit takes parameters that are all trained or all frozen
        for p in model.parameters(): p.requires_grad_(True)
    if not kwargs.get('late'): outer = kwargs['wrap'](model)
    try:
        given = kwargs['give'](model, outer) if kwargs.get('give') else model
        ist = new_ist(given, kwargs.get('config'), optimizer=torch.optim.AdamW(params(model)))
        if kwargs.get('late'): outer = kwargs['wrap'](model)
        ist.begin_step()
    except ISTError as e:
        assert part in str(e), e
        return dict(said=str(e))
    raise AssertionError(f'{name} was not refused')

# -- a process that goes its own way
def by_rank(ist, rank): ist.sampler = lambda importance, n, config, g: torch.tensor([rank%N])
def moved(ist, rank):
    if rank: ist.importance[0] += 1e-3
def own_scorer(ist, rank): ist.scorer = lambda importance, *_: (importance+rank, dict(dropped=False))
def ahead(ist, rank): ist.t += rank>0
def nothing(ist, rank): pass
# name: settings of a rank, what happens to it, at which step, a part of the message, the steps that went well
diverging = {
    'seed': (lambda rank: dict(seed=7+(rank>0)), nothing, 0, 'seed: 8 on rank', 0),
    'a setting': (lambda rank: dict(suppression_factor=0.5 if rank else 0.25), nothing, 0,
                  'suppression_factor: 0.5 on rank', 0),
    'step': (lambda rank: {}, ahead, 0, 'step: 1 on rank', 0),
    'selection': (lambda rank: {}, by_rank, 0, 'drawn: ', 0),
    'importance': (lambda rank: {}, moved, 3, 'importance: ', 4),
    'what the scorer returns': (lambda rank: {}, own_scorer, 0, 'importance: ', 2),
}
def one_step(ist, outer, opt, b):
    with ist.step():
        outer(**b).loss.backward()
        opt.step()
        opt.zero_grad()

def diverge(name, rank, size, wrap=ddp):
    "What every rank says when one goes its own way; fails if nobody notices, or only some"
    settings,happens,when,part,went_well = diverging[name]
    model = make()
    outer = wrap(model)
    ist,opt = new_ist(model, settings(rank)),adam(params(outer))
    try:
        for t in range(steps):
            if t==when: happens(ist, rank)
            one_step(ist, outer, opt, batch(t, rank, size))
    except ISTError as e:
        assert part in str(e) or f"{part.split(':')[0]}: " in str(e), e
        assert t==went_well, (t, e)
        return dict(said=str(e), at_step=t)
    raise AssertionError(f'{name}: nobody noticed')

# -- the Trainer
def trainer_run(folder, size=1, config=None, resume=None, n=steps, model=None, callback=None, dtype=torch.float64,
                **kwargs):
    "The same with a Trainer, which reads the rows in order"
    from torch.utils.data import SequentialSampler
    from transformers import Trainer,TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    class InOrder(Trainer):
        def _get_train_sampler(self, *args): return SequentialSampler(self.train_dataset)
    cb = callback or ISTCallback(config_of(config), loss_fn=loss_of)
    args = dict(max_steps=n, per_device_train_batch_size=rows//size, learning_rate=0.01, lr_scheduler_type='constant',
                report_to='none', logging_steps=1, save_strategy='no', use_cpu=not cuda, disable_tqdm=True,
                dataloader_pin_memory=False)
    args = TrainingArguments(str(folder), **args | kwargs)
    args._n_gpu = min(1, args.n_gpu)   # one process would take all GPUs, by DataParallel
    t = InOrder(make(dtype=dtype) if model is None else model, args,
                train_dataset=[{k:v.tolist() for k,v in o.items()} for o in data], callbacks=[cb])
    t.pop_callback(PrinterCallback)
    t.train(resume_from_checkpoint=resume and str(resume))
    return found_of(cb.ist, trainer_weights(t)),cb.ist,t

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
        # on a CPU accelerate takes DDP where FSDP is asked for
        if not cuda and PartialState._shared_state:
            PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU
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

def sharded(version):
    return dict(fsdp=True, fsdp_config=dict(version=version, transformer_layer_cls_to_wrap='LlamaDecoderLayer',
                                            use_orig_params=True, sync_module_states=cuda))
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
    res = beside(got, refs['trainer'+key(trainer_plain(name))], ist, size)
    assert ist.engine.name==name.split(', ')[1], res
    return judged(res, weights=1e-3, importance=1e-3) if 'dtype' in trainers[name] else judged(res)

trainer_refused = {
    'Trainer, ddp_find_unused_parameters=False': (dict(ddp_find_unused_parameters=False),
                                                  'ddp_find_unused_parameters=True'),
    'Trainer, reentrant checkpointing': (dict(gradient_checkpointing=True,
                                              gradient_checkpointing_kwargs=dict(use_reentrant=True)), 'use_reentrant'),
    'Trainer, torch_compile': (dict(torch_compile=True, torch_compile_backend='eager'), 'torch_compile=False'),
    'Trainer, processes apart': (dict(use_cpu=False), 'every one would train the whole run by itself'),
}
def trainer_refuse(name, rank, size, folder):
    kwargs,part = trainer_refused[name]
    cb = ISTCallback(ISTConfig(**usual), loss_fn=loss_of)
    try:
        with fresh_accelerate(): trainer_run(folder, size, callback=cb, **kwargs)
    except ISTError as e:
        assert part in str(e), e
        return dict(said=str(e))
    raise AssertionError(f'{name} was not refused')

def resume(name, rank, size, folder):
    "Half a run, and the rest from its checkpoint, against the whole, bit for bit"
    def go(to, **kwargs):
        with fresh_accelerate('FSDP' in name): return trainer_run(Path(folder)/to, size, **trainers[name], **kwargs)
    whole,ist,_ = go('whole', save_strategy='steps', save_steps=5)
    again,ist2,_ = go('again', resume=Path(folder)/'whole'/'checkpoint-5')
    far = largest(whole['weights'], again['weights'])
    assert far==0 and ist.state_dict()==ist2.state_dict(), (far, ist.importance, ist2.importance)
    return dict(bit_for_bit=True)

def checkpoint(name, rank, size):
    "The same in a loop of one's own, with torch's checkpoint of a sharded model, before every layer has been trained"
    from torch.distributed.checkpoint.state_dict import get_state_dict,set_state_dict
    how = dict(optimizer_state=name.split(', ')[1], sampler='importance', n_active=1, score_interval=4)
    def begin():
        model = make()
        outer = fsdp2(model)
        opt = adam(params(outer))
        return outer,opt,new_ist(model, how, optimizer=opt)
    def go(outer, opt, ist, times):
        for t in times: one_step(ist, outer, opt, batch(t, rank, size))
        return weights_of(outer)
    def clones(tree):
        return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)
    outer,opt,ist = begin()
    go(outer, opt, ist, range(2))
    assert (ist.times_active==0).any()
    state,(weights,moments) = json_of(ist),[clones(dict(o)) for o in get_state_dict(outer, opt)]
    whole = go(outer, opt, ist, range(2, steps))
    outer,opt,ist2 = begin()
    set_state_dict(outer, opt, model_state_dict=weights, optim_state_dict=moments)
    ist2.load_state_dict(json.loads(state))
    again = go(outer, opt, ist2, range(2, steps))
    assert largest(whole, again)==0 and json_of(ist)==json_of(ist2), largest(whole, again)
    return dict(bit_for_bit=True)
def json_of(ist): return json.dumps(ist.state_dict())
checkpoints = ['FSDP2, keep', 'FSDP2, reset']

# -- DeepSpeed, where it is installed
deepspeeds = {f'DeepSpeed ZeRO-{s}, {what}':(s, opt, config, part if s else None) for s in range(4)
              for what,opt,config,part in (('AdamW', adam, {}, 'has momentum or weight decay'),
                                           ('SGD without momentum', sgd, {}, None),
                                           ('AdamW, all layers active', adam, dict(n_active=1.), None),
                                           ('SGD, fisher', sgd, dict(scorer='fisher'),
                                            'its optimizer holds one flat tensor'))}
def ds_plain(name):
    _,opt,config,_ = deepspeeds[name]
    return dict(config=config, sgd=opt is sgd)
def ds_reference(config, sgd):
    return run(config=config, optimizer=globals()['sgd'] if sgd else adam, model=make(dtype=torch.float32))[0]

def ds(name, rank, size, refs):
    "One case with DeepSpeed: the same loop, by its own backward and step"
    import deepspeed
    stage,optimizer,config,part = deepspeeds[name]
    model = make(dtype=torch.float32)
    settings = dict(train_micro_batch_size_per_gpu=rows//size, zero_optimization=dict(stage=stage),
                    zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    engine,*_ = deepspeed.initialize(model=model, optimizer=optimizer(params(model)), config=settings)
    def value(p):
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, 'ds_id') else nullcontext():
            return p.detach().cpu().clone()
    def now(): return {clean(k):value(p) for k,p in engine.named_parameters() if 'lora' in k}
    try: ist = new_ist(model, config)
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
    res = beside(found_of(ist, now()), refs['ds'+key(ds_plain(name))], ist, size)
    res |= dict(gradients_skipped=skipped, frozen_layers_moved=moved)
    assert moved==0, res
    return judged(res, weights=1e-3, importance=1e-3, sparse='n_active' not in config)   # float32

# -- many cases
main_cases = [   # on more than two processes
    'DDP', 'DDP, fisher', 'DDP, one row in a probe', 'FSDP2', 'FSDP2, gate', 'FSDP2, fisher',
    'FSDP2, one row in a probe', 'FSDP1', 'uneven labels', 'seed', 'importance', 'Trainer, DDP', 'Trainer, FSDP2',
    'Trainer, processes apart', 'FSDP2, keep', 'DDP, find_unused_parameters=False', 'DeepSpeed ZeRO-2, AdamW',
    'DeepSpeed ZeRO-2, SGD without momentum', 'DeepSpeed ZeRO-3, SGD without momentum']

def works_here(name, size):
    "accelerate has no FSDP1 on a CPU, and the Trainer no DDP for one GPU"
    return 'FSDP1' not in name if not cuda else size>1 or 'DDP' not in name

def refused_here(name, size):
    "Processes work apart that have no GPU and are not told to do without"
    if name=='Trainer, processes apart': return size>1 and not cuda
    return size>1 or not cuda

def all_cases(size, slow=True):
    "Pairs of a kind and a name"
    def of(kind, names, keep=lambda n: True): return [(kind, n) for n in names if keep(n)]
    fast = of('works', works, lambda n: 'slow' not in works[n]) + of('refused', refused)
    fast += of('probe', ['uneven labels']) + of('diverging', diverging, lambda n: size>1)
    fast += of('trainer', trainers, lambda n: works_here(n, size))
    fast += of('trainer refused', trainer_refused, lambda n: refused_here(n, size)) + of('checkpoint', checkpoints)
    fast += of('resume', ['Trainer, DDP'] + ['Trainer, FSDP2']*cuda)   # on a CPU PEFT does not save what FSDP2 shards
    if find_spec('deepspeed'): fast += of('deepspeed', deepspeeds)
    every = fast + of('works', works, lambda n: slow and 'slow' in works[n])
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
        elif kind=='trainer':
            k,f = 'trainer'+key(trainer_plain(name)),lambda: trainer_run(tempfile.mkdtemp(), **trainer_plain(name))[0]
        elif kind=='deepspeed': k,f = 'ds'+key(ds_plain(name)),lambda: ds_reference(**ds_plain(name))
        else: continue
        if k not in found: found[k] = f()
    torch.save(found, path)

def worker(folder, rank, size):
    "One process of a launch: every case in turn, a line of JSON for each"
    folder = Path(folder)
    todo = json.loads((folder/'cases.json').read_text())
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    if cuda: torch.cuda.set_device(rank)
    dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(seconds=40 if cuda else 180),
                            **(dict(device_id=device()) if cuda else {}))
    refs = torch.load(folder/'references.pt')
    gc.freeze()      # IST looks for wrappers among the living objects: not among the half million of the libraries
    with open(folder/f'{rank}.jsonl', 'a') as out:
        for kind,name in todo:
            start = time.perf_counter()
            try: res = dict(ok=True) | one(kind, name, rank, size, refs, folder)
            except Exception as e:
                res = dict(ok=False, error=f'{type(e).__name__}: {str(e)[:600]}',
                           where=traceback.format_exc()[-1500:].replace(f'{Path(__file__).parent.parent}/', ''))
            out.write(json.dumps(dict(kind=kind, name=name, seconds=round(time.perf_counter()-start, 2)) | res)+'\n')
            out.flush()
            dist.barrier()
    dist.destroy_process_group()

def launch(cases, size, seconds=600, fork=False):
    """Run `cases` on `size` processes, copies of this one where `fork`, which saves their imports; one that hangs or
    dies is recorded, and the rest run in a new launch"""
    done,until = [],time.monotonic()+seconds
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        try: make_references(cases, d/'references.pt')
        except Exception as e: return [dict(kind=k, name=n, ok=False, error=f'reference: {e}') for k,n in cases]
        while len(done)<len(cases) and time.monotonic()<until:
            (d/'cases.json').write_text(json.dumps(cases[len(done):]))
            for f in d.glob('*.jsonl'): f.unlink()
            log = _processes(d, size, until, fork=fork)
            def of(path): return [json.loads(o) for o in path.read_text().splitlines()] if path.exists() else []
            lines = [of(d/f'{r}.jsonl') for r in range(size)]
            n = min(map(len, lines))
            done += [_merge([o[i] for o in lines]) for i in range(n)]
            if len(done)<len(cases) and time.monotonic()<until:
                kind,name = cases[len(done)]
                done.append(dict(kind=kind, name=name, ok=False, error='a process died or hung', where=log[-1500:]))
    return done + [dict(kind=k, name=n, ok=None, error='not run: out of time') for k,n in cases[len(done):]]

class _Fork(ForkProcess):
    "A process with the methods of `subprocess.Popen`"
    def poll(self): return self.exitcode
    def wait(self): self.join()

def _as_rank(d, rank, size, env, log):
    for o in (1, 2): os.dup2(log.fileno(), o)
    os.environ.update(env)
    worker(d, rank, size)

def _processes(d, size, until, module='benchmarks.processes', fork=False, **more):
    "One launch, with `more` of an environment; what it printed"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(record.root), os.environ.get('PYTHONPATH')]))
    env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(size),
               LOCAL_WORLD_SIZE=str(size), PYTHONWARNINGS='ignore', PYTHONPATH=path) | more
    def start(rank, log):
        own = env | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        if not fork:
            return subprocess.Popen([sys.executable, '-m', module, str(d), str(rank), str(size)], env=own, stdout=log,
                                    stderr=log)
        p = _Fork(target=_as_rank, args=(d, rank, size, own, log))
        p.start()
        return p
    with open(d/'log', 'w') as log:
        procs = [start(r, log) for r in range(size)]
        try:
            while any(p.poll() is None for p in procs) and not any(p.poll() for p in procs) and time.monotonic()<until:
                time.sleep(0.1)
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

def hardware():
    if cuda: return record.hardware(gpu=True)
    info = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    cpu = next((l.split(':')[1].strip() for l in info if l.startswith('model name')), platform.processor())
    return f'{os.cpu_count()} CPUs, {cpu}'

def merged(old, new):
    "The old cases, in their places with what was run again"
    by = lambda cases: {(o['processes'], o['kind'], o['name']):o for o in cases}
    return list((by(old) | by(new)).values())

def main(
    sizes:str='1 2' if cuda else '1 2 4', # How many processes, one launch each
    only:str='', # Cases whose name contains one of these, separated by semicolons; the others stay in the file
    seconds:float=55 if cuda else 900, # For each number of processes
    slow:bool=False, # On a CPU too, compile
    out:Path='processes_gpu' if cuda else 'processes', # Where the table goes
):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    start,found,wanted = time.perf_counter(),[],[o.strip() for o in only.split(';') if o.strip()]
    for size in map(int, sizes.split()):
        if cuda and size>torch.cuda.device_count(): continue
        cases = [o for o in all_cases(size, cuda or slow) if not wanted or any(w in o[1] for w in wanted)]
        for o in launch(cases, size, seconds):
            print(size, o['kind'], '-', o['name'], 'ok' if o['ok'] else o.get('error', 'the ranks differ'), flush=True)
            found.append(dict(processes=size) | o)
    took = round(time.perf_counter()-start)
    old = record.read(out) if wanted else {}   # what was not run again is kept
    found = merged(old.get('cases', []), found)
    head = record.about('IST on several processes, by engine, against the run on one process', 'accelerate deepspeed')
    head |= dict(hardware=hardware(), versions=old.get('versions', {}) | head['versions'])
    shape = dict(layers=N, rows=rows, tokens=tokens, steps=steps, dtype='float64 (DeepSpeed: float32)') | usual
    new = dict(backend='nccl' if cuda else 'gloo', seconds=old.get('seconds', took), run=shape, cases=found)
    record.save(out, head, **new | {k:v for k,v in old.items() if k not in head and k not in new})
    print(f"{sum(o['ok'] is True for o in found)} of {len(found)} as expected, in {took} s")

if __name__=='__main__': worker(sys.argv[1], *map(int, sys.argv[2:]))
