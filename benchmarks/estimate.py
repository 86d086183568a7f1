"What a training step costs by arithmetic: products at the measured rate, and bytes moved; `speed` measures it"
import statistics
from dataclasses import dataclass
from functools import cache
from math import ceil,inf
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM
from ist_nb import ISTConfig,find_layers
from ist_nb.config import _layer_count,samplers,scorers,shrunk
from ist_nb.probe import generator_for
from ist_nb.speed import _blocks_of,_Lean
from benchmarks import peers

# variants of `peers`: settings, and what the Trainer and `fast=True` apply
fast,dense = 'fold compile loss ahead',ISTConfig.rst(n_active=1.)
unpacked = 4.127/8+2     # bytes of a weight that is read in 4 bits, with 0.127 for its scales, and written in 16
planned = {'PEFT':(dense, ''), 'LoRA, fast':(dense, fast), 'recommended':(ISTConfig.recommended(), fast)}

@dataclass
class Shape:
    "What the cost of a model's steps depends on"
    n:int     # Blocks
    h:int     # Width
    kv:int    # Width of keys and values together with their heads
    f:int     # Width of the MLP
    vocab:int # Words
    P:int     # Weights of the linear layers of a block
    P_a:int   # Of those with adapters
    sin:int   # Numbers a token that layers with adapters read
    sout:int  # That they write
    rank:int
    trained:int # Weights of all adapters
    frozen:int  # All others

def shape_of(c, lora):
    "The shape of a configuration of transformers with LoRA; it costs no memory"
    with torch.device('meta'): model = get_peft_model(AutoModelForCausalLM.from_config(c), lora)
    blocks = _blocks_of(model, find_layers(model))
    adapted = [m for m in blocks[0].modules() if isinstance(m, LoraLayer)]
    inside = {id(o) for m in adapted for o in m.modules()}-{id(m.base_layer) for m in adapted}
    linears = [m for m in blocks[0].modules() if isinstance(m, nn.Linear) and not isinstance(m, LoraLayer)]
    head = getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Shape(len(blocks), c.hidden_size, c.num_key_value_heads*head, c.intermediate_size, c.vocab_size,
                 sum(m.weight.numel() for m in linears if id(m) not in inside),
                 sum(m.in_features*m.out_features for m in adapted), sum(m.in_features for m in adapted),
                 sum(m.out_features for m in adapted), lora.r, trained,
                 sum(p.numel() for p in model.parameters())-trained)

@cache
def llama(name): return shape_of(peers.config_of(name), peers.lora())   # of `peers`

def kept_per_token(s, kind, compiled, e, mask):
    """Bytes that a block ('trained', 'frozen' or 'folded') keeps of a token for its backward pass. An adapter keeps
    what it reads. Compiled code without dropout (`mask=0`) computes it again, all but what attention gives"""
    base = e*(4*s.h+2*s.kv+2*s.f) if compiled else 8*s.h+e*(2*s.h+2*s.kv+3*s.f)
    if compiled: mask = min(mask, 1)
    own = e*(s.h if compiled and not mask else s.sin)
    return base + dict(trained=own+mask*s.sin, frozen=mask*s.sin, folded=0)[kind]

def moved_per_token(s, kind, compiled, e):
    "Bytes that the operations of a block's forward pass move, products apart; norms and adapters work in 32 bits"
    cast = e<4
    if compiled: base,own = e*(8*s.h+2*(s.h+s.kv)+3*s.f),3*e/2*(s.sin+s.sout)
    else:
        base = (72 if cast else 56)*s.h + e*(10*(s.h+s.kv)+5*s.f+10*s.h)
        own = (23*s.sin+12*s.sout) if cast else (17*s.sin+24*s.sout)
    return base + (0 if kind=='folded' else own)

def loss_bytes(s, names, T, e):
    """Bytes at the peak, which comes when the loss is known. Plain: of each logit its logarithm and two gradients in
    32 bits. In pieces: a piece's logits and their gradient, and the gradient of the hidden states. Liger: pieces too"""
    if 'loss' in names: return e*(2*min(T, _Lean.size)*s.vocab + T*s.h)
    return T*s.vocab*(2 if 'liger' in names else 12)

def step_cost(s, active, tokens, seq, rates, names=(), budget=inf, e=2, mask=1, checkpointing=False, wait=1e-3):
    """Seconds and bytes of a step that trains the blocks `active` (none: a forward pass) on `tokens` in rows of `seq`.
    `e` and `mask` are bytes of a number and of an element of dropout's mask; `wait` is for how many seconds a block the
    host keeps the GPU waiting unless it runs ahead"""
    compiled,T,k,n = 'compile' in names,tokens,s.n-min(active, default=s.n),len(active)
    rest = 'folded' if 'fold' in names and T*(s.sin+2*s.sout)>2*s.P_a else 'frozen'
    kept = T*kept_per_token(s, rest, compiled, e, mask)*(k-n) + T*kept_per_token(s, 'trained', compiled, e, mask)*n
    head = loss_bytes(s, names, T, e)
    freed = kept/k-e*s.h*T if k else 0   # by a block that keeps only its input
    again = k if checkpointing else min(k, ceil((kept+head-budget)/freed)) if kept+head>budget else 0
    # a block that is computed again: all that it keeps, and the gradients inside of its MLP
    if again: head = max(head, freed+T*e*(3*s.f+2*s.h))
    move = lambda kind: T*moved_per_token(s, kind, compiled, e) + (2*e*s.P_a if kind=='folded' else 0)
    moved = move('trained')*2.2*n + move(rest)*(s.n-n+1.2*(k-n)+again)
    # in pieces: written, read twice, read and turned into the gradient, which is read
    moved += T*s.vocab*(10 if 'liger' in names else 6*e if 'loss' in names else 42)
    products = 2*T*s.P*(s.n+k+again) + 2*T*s.h*s.vocab*(3 if 'liger' in names else 2)
    tile,part = (128, 0.3) if e<4 else (0, 0.9)   # a GPU computes tiles on the diagonal whole; 0.3 is profiled
    attention = 2*T*(seq+tile)*s.h*(s.n+2.5*k+again)/(part*rates[0])
    folded = rest=='folded'
    small = 2*T*s.rank*(s.sin+s.sout)*((n if folded else s.n)+(n if folded else k)+n)
    if 'fp8' in names: products,moved = products/2,moved+5*(s.P+T*s.P/s.h)*(s.n+k+again)
    waits = 'liger' in names or 'fp8' in names or checkpointing or 'ahead' not in names   # the host has more to do
    seconds = products/(0.9*rates[0]) + small/(0.3*rates[0]) + attention + moved/(0.75*rates[1]) + wait*s.n*waits
    return seconds,kept-again*freed+head

def drawn(s, o, steps):
    "The layers that each step of a run trains"
    def count(t):
        return _layer_count(o.n_active, s.n) if o.schedule=='constant' else shrunk(o.n_active*s.n, s.n, t, steps)
    return [samplers[o.sampler](torch.zeros(s.n), count(t), o, generator_for(o.seed, 'layers', t)).tolist()
            for t in range(steps)]

def estimated(found, lora, config_of, variants, steps=24):
    "Name of each variant in the JSON of a shape -> seconds and peak memory, as shares of LoRA's, of the steps it drew"
    s,T,seq = shape_of(config_of(found['shape']), lora),found['batch']*found['length'],found['length']
    e = 4 if found['shape']=='pico' else 2
    args = dict(seq=seq, rates=(found['matrix_flops'], found['copy_bytes']), e=e, mask=1 if e<4 else e,
                wait=1e-3 if e<4 else 0)
    dense,res = step_cost(s, range(s.n), T, **args),{}
    for name,v in found['variants'].items():
        if name not in variants: continue
        settings,names,checkpointing = variants[name]
        settings = dict(settings or dict(sampler='uniform', n_active=1.))
        share = settings.pop('activation_budget', None)
        budget = inf if share is None else int(share*dense[1]/2**20)*2**20
        how = args | dict(names=names.split(), checkpointing=checkpointing)
        rows = []
        for seed in range(v['reps']):
            o = ISTConfig(**settings, seed=seed)
            costs = [step_cost(s, d, T, budget=budget, **how) for d in drawn(s, o, steps)[3:]]
            rows.append((statistics.mean(c[0] for c in costs)+probes(s, o, how), max(c[1] for c in costs)))
        res[name] = [statistics.median(r[i] for r in rows)/dense[i] for i in range(2)]
    return res

def beside(case, rates):
    """Variant -> seconds and peak memory in a case of `peers`, the weights, the optimizer's moments and all included,
    and the seconds of the products with the model's weights alone; `rates` are those that `waits` measures, of
    products, copies and unpacking of 4 bits"""
    s,T,res = llama(case['shape']),case['batch']*case['length'],{}
    first = case.get('first', 0)     # older cases have none: they timed a schedule from the very first step
    packed = s.P*s.n if case['bits']==4 else 0
    fixed = 2*(s.frozen-packed)+(unpacked-2)*packed
    budget = float(case['budget'].removesuffix('GiB'))*2**30 if case.get('budget') else inf
    for name,(o,names) in planned.items():
        layers = drawn(s, o, case['steps']+1)
        costs = [step_cost(s, d, T, case['length'], rates, names.split(), budget, mask=0,
                           checkpointing=case['checkpointing']) for d in layers]
        # adapters in 32 bits, and in 16 if that copy is not computed again; AdamW's moments, after the first step
        own = [4+2*('compile' not in names)+8*(t>0) for t in range(len(costs))]
        peaks = [fixed+b+n*s.trained for n,(_,b) in zip(own, costs)]
        # weights in 4 bits are unpacked in the forward pass, and in the backward pass as deep as it goes
        deep = [s.n-min(d) for d in layers]
        unpacking = [(s.n+k)/s.n*unpacked*packed/rates[2] if packed else 0 for k in deep]
        least = [2*T*(s.P*(s.n+k*(1+case['checkpointing']))+2*s.h*s.vocab)/rates[0] for k in deep]
        mean = lambda o: statistics.mean(o[first:first+case['steps']])
        res[name+', budget'*(budget<inf)] = mean([c for c,_ in costs])+mean(unpacking),max(peaks),mean(least)
    return res

nvlink,network = 450e9,50e9     # bytes a second that a GPU gets: an H200 in its host, and over 400 Gbit/s
def far(shape, engine, hosts, rates, each=8, bits=16, rows=4, seq=2048, checkpointing=False):
    """Of *LoRA, fast* on hosts of `each` GPUs, as arithmetic has it: seconds of a GPU's own work in a step, seconds in
    which weights and gradients travel, and its peak. 'HSDP' is FSDP2 within each host and DDP between hosts"""
    s,T,n = llama(shape),rows*seq,hosts*each
    work,kept = step_cost(s, range(s.n), T, seq, rates, fast.split(), mask=0, checkpointing=checkpointing)
    packed = s.P*s.n if bits==4 else 0
    work += (2+checkpointing)*unpacked*packed/rates[2]
    weights,m = 2*(s.frozen-packed)+(unpacked-2)*packed,dict(DDP=1, FSDP2=n, HSDP=each)[engine]   # m share the weights
    inner,outer = (network if o>each else nvlink for o in (m, n))
    copies,gradients = n/m,4*s.trained      # gathered for both passes, reduced to shards, and between copies
    travel = (2*weights+gradients)*(1-1/m)/inner + 2*gradients/m*(1-1/copies)/outer
    whole = 4*(s.P+s.vocab*s.h) if m>1 else gradients     # two blocks and both ends in 16 bits; or DDP's buckets
    return work,travel,weights/m+whole+16*s.trained/m+kept      # adapters, gradients, and AdamW's moments

def probes(s, config, how):
    "Seconds a step for the importance loop"
    scorer = scorers[config.scorer]
    no_scores = not getattr(samplers[config.sampler], 'needs_importance', True)
    if no_scores or getattr(scorer, 'observes', None)=='backward': return 0
    once = lambda active: step_cost(s, active, config.score_batch_size*how['seq'], **how)[0]
    each = once(range(s.n)) if getattr(scorer, 'gradients', False) else config.n_candidates*once(())
    return each/config.score_interval
