"""What a training step costs, counted from the shape of a model before anything is run: products of matrices, numbers moved between
memory and the arithmetic, and a host that keeps the GPU waiting. `estimate` compares a configuration of IST with LoRA on all layers."""
import time
from dataclasses import dataclass
from math import ceil,inf
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from ist_nb.config import ISTError,layer_count,samplers,scorers,shrunk,to_bytes
from ist_nb.layers import find_layers
from ist_nb.speed import blocks_of
import ist_nb.samplers,ist_nb.scorers   # which fill the registries

def machine_rates(
    device='cpu', # Where
    dtype:torch.dtype=torch.float32, # Of the numbers
    n:int=1024, # Side of the matrices; 8192 on a GPU
) -> tuple: # FLOP/s of a large product, bytes/s read and written by a large copy
    "What this machine can do"
    a,b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    def clock(f, reps=20):
        f(); f(); wait()
        start = time.perf_counter()
        for _ in range(reps): f()
        wait()
        return (time.perf_counter()-start)/reps
    c = torch.empty_like(a)
    return 2*n**3/clock(lambda: a@b),2*a.nbytes/clock(lambda: c.copy_(a))

@dataclass
class BlockShape:
    "What the cost of a model's steps depends on"
    n:int      # Blocks, $N$
    h:int      # Width
    kv:int     # Width of keys and values together with their heads
    f:int      # Width of the MLP
    vocab:int  # Words
    P:int      # Weights of the linear layers of a block
    P_a:int    # Of those with adapters
    sin:int    # Numbers a token that layers with adapters read, $\Sigma_{in}$
    sout:int   # That they write, $\Sigma_{out}$
    rank:int   # $r$

def block_shape(
    model, # A model with LoRA, or a configuration of transformers
    lora=None, # PEFT's `LoraConfig`, with a configuration
) -> BlockShape: # Raises `ISTError` where the model is not a stack of attention and MLP blocks
    "The shape of a model; a configuration costs no memory"
    if lora is not None:
        from transformers import AutoModelForCausalLM
        with torch.device('meta'): model = get_peft_model(AutoModelForCausalLM.from_config(model), lora)
    layers,c = find_layers(model),model.config.get_text_config()
    block = blocks_of(model, layers)[layers[0].index]
    f,adapted = getattr(c, 'intermediate_size', None),[m for m in block.modules() if isinstance(m, LoraLayer)]
    if not f or not adapted: raise ISTError(f"estimate knows blocks of attention and an MLP with LoRA; {type(model.get_base_model()).__name__} has {'no LoRA' if f else 'no intermediate_size'}. Measure it with benchmarks/speed.py instead.")
    inside = {id(o) for m in adapted for o in m.modules()}-{id(m.base_layer) for m in adapted}
    P = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear) and not isinstance(m, LoraLayer) and id(m) not in inside)
    kv = getattr(c, 'num_key_value_heads', None) or c.num_attention_heads
    kv = kv*(getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads)
    return BlockShape(len(blocks_of(model, layers)), c.hidden_size, kv, f, c.vocab_size, P, sum(m.in_features*m.out_features for m in adapted),
                      sum(m.in_features for m in adapted), sum(m.out_features for m in adapted), max(next(iter(m.r.values())) for m in adapted))

def kept_per_token(
    s:BlockShape, # From `block_shape`
    kind:str, # 'trained', 'frozen' or 'folded'
    compiled:bool, # Whether blocks are compiled
    e:int=2, # Bytes of a number
    mask:int=1, # Bytes of an element of dropout's mask: 1 on a GPU, `e` on a CPU
) -> int: # Bytes
    "What a block keeps of a token for its backward pass"
    base = e*(4*s.h+2*s.kv+2*s.f) if compiled else 8*s.h+e*(2*s.h+2*s.kv+3*s.f)
    if compiled: mask = 1
    return base + dict(trained=e+mask, frozen=mask, folded=0)[kind]*s.sin

def moved_per_token(
    s:BlockShape, # From `block_shape`
    kind:str, # 'trained', 'frozen' or 'folded'
    compiled:bool, # Whether blocks are compiled
    e:int=2, # Bytes of a number
) -> int: # Bytes
    "What the operations of a block's forward pass move, products apart"
    cast = e<4   # norms and adapters work in 32 bits
    if compiled: base,own = e*(8*s.h+2*(s.h+s.kv)+3*s.f),3*e/2*(s.sin+s.sout)
    else:
        base = (72 if cast else 56)*s.h + e*(10*(s.h+s.kv)+5*s.f+10*s.h)
        own = (23*s.sin+12*s.sout) if cast else (17*s.sin+24*s.sout)
    return base + (0 if kind=='folded' else own)

def step_cost(
    s:BlockShape, # From `block_shape`
    active:list, # Positions of the blocks that are trained; none for a forward pass alone
    tokens:int, # In the batch, $T$
    seq:int, # In a row
    names=(), # Levers: 'fold', 'compile', 'loss', 'fp8', 'ahead'
    rates=(8e14, 2.9e12), # FLOP/s, bytes/s, as `machine_rates` measures them
    budget:float=inf, # Bytes for activations
    e:int=2, # Bytes of a number
    mask:int=1, # Of an element of dropout's mask
    checkpointing:bool=False, # Whether every block that the backward pass reaches is computed a second time
    wait:float=1e-3, # Seconds a block that the host keeps the GPU waiting where it does not run ahead
) -> tuple: # Seconds, bytes
    "What one training step costs"
    compiled,T,k,n = 'compile' in names,tokens,s.n-min(active, default=s.n),len(active)
    rest = 'folded' if 'fold' in names and T*(s.sin+2*s.sout)>2*s.P_a else 'frozen'   # as `worth_folding`, all layers together
    kept = T*kept_per_token(s, rest, compiled, e, mask)*(k-n) + T*kept_per_token(s, 'trained', compiled, e, mask)*n
    head = T*s.vocab*(2 if 'loss' in names else 12)
    freed = kept/k-e*s.h*T if k else 0                                             # by a block that keeps only its input
    again = k if checkpointing else min(k, ceil((kept+head-budget)/freed)) if kept+head>budget else 0   # blocks computed a second time
    move = lambda kind: T*moved_per_token(s, kind, compiled, e) + (2*e*s.P_a if kind=='folded' else 0)
    moved = move('trained')*2.2*n + move(rest)*(s.n-n+1.2*(k-n)+again) + T*s.vocab*(10 if 'loss' in names else 42)
    products = 2*T*s.P*(s.n+k+again) + 2*T*s.h*s.vocab*(3 if 'loss' in names else 2) + 2*T*seq*s.h*(s.n+2.5*k)
    small = 2*T*s.rank*(s.sin+s.sout)*(n if rest=='folded' else s.n)
    small += 2*T*s.rank*(s.sin+s.sout)*((n if rest=='folded' else k)+n)
    if 'fp8' in names: products,moved = products/2,moved+5*(s.P+T*s.P/s.h)*(s.n+k+again)
    host = 0 if 'ahead' in names and not ({'loss', 'fp8'} & set(names) or checkpointing) else wait*s.n   # Liger waits; the others give the host more to do than the GPU
    return products/(0.9*rates[0]) + small/(0.3*rates[0]) + moved/(0.75*rates[1]) + host,kept-again*freed+head

def _probes(s, config, names, args):
    "Seconds a step for the importance loop"
    scorer = scorers[config.scorer]
    if getattr(scorer, 'observes', None)=='backward' or not getattr(samplers[config.sampler], 'needs_importance', True): return 0
    once = lambda active: step_cost(s, active, config.score_batch_size*args['seq'], names=names, **args)[0]
    return (once(range(s.n)) if getattr(scorer, 'gradients', False) else config.n_candidates*once(()))/config.score_interval

def _draws(n, config, steps=1000):
    "Positions of the layers of `steps` steps"
    if isinstance(config.n_active, dict): raise ISTError(f"estimate knows one stack of blocks, and n_active={config.n_active} has several. Measure it with benchmarks/speed.py instead.")
    g,I = torch.Generator().manual_seed(config.seed),torch.zeros(n)
    k,mean = layer_count(config.n_active, n),config.n_active*n if isinstance(config.n_active, float) else config.n_active
    many = [shrunk(mean, n, t, steps) if config.schedule=='shrink' else k for t in range(steps)]
    return [samplers[config.sampler](I, o, config, g).tolist() if o<n else list(range(n)) for o in many]

def _budget(config):
    "Bytes for activations"
    if isinstance(config.activation_budget, float): raise ISTError(f"activation_budget={config.activation_budget} is a share of what is free when training begins, which is not known yet. Give estimate a size, such as '8GiB'.")
    return inf if config.activation_budget is None else to_bytes(config.activation_budget)

def estimate(
    model, # A model with LoRA, a configuration of transformers, or a `BlockShape`
    config, # An `ISTConfig`
    batch:int, # Rows
    seq:int, # Tokens in a row
    lora=None, # PEFT's `LoraConfig`, with a configuration
    rates=None, # FLOP/s and bytes/s of `machine_rates`; an H100 with 16-bit numbers if not given
    dtype:torch.dtype=torch.bfloat16, # In which the products are computed
    draws=None, # Positions of trained layers, step by step; drawn from an importance of zero if not given
    checkpointing:bool=False, # On both sides, as in `step_cost`
    ahead:bool=True, # Whether the host runs ahead where levers are pulled, as in a Trainer
    wait:float=1e-3, # As in `step_cost`
) -> dict: # seconds (mean), bytes (most), each also for LoRA (dense_...) and as a share of it (ratio_...)
    "What training with `config` costs beside LoRA on all layers, before it is tried"
    s,e,T = model if isinstance(model, BlockShape) else block_shape(model, lora),dtype.itemsize,batch*seq
    gpu,rates = e<4,rates or (8e14, 2.9e12)
    mask = 1 if gpu else e
    names = [] if not config.fast else ['fold', *(['compile'] if gpu else [])] if config.fast is True else [o.strip() for o in config.fast.split(',')]
    if ahead and gpu and config.fast: names.append('ahead')
    args = dict(seq=seq, rates=rates, e=e, mask=mask, checkpointing=checkpointing, wait=wait if gpu else 0)
    dense = step_cost(s, range(s.n), T, **args)
    costs = [step_cost(s, o, T, names=names, budget=_budget(config), **args) for o in (_draws(s.n, config) if draws is None else draws)]
    seconds,most = sum(o[0] for o in costs)/len(costs)+_probes(s, config, names, args),max(o[1] for o in costs)
    return dict(seconds=seconds, bytes=most, dense_seconds=dense[0], dense_bytes=dense[1], ratio_seconds=seconds/dense[0], ratio_bytes=most/dense[1])
