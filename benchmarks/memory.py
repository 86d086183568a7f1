"""Activation budgets and offloaded optimizer state on a GPU, at the shape of Llama-7B.
`python benchmarks/memory.py` writes results/memory.json; it needs a CUDA GPU with 60 GiB. An argument is the number of layers, 32 if not given"""
import json,os,random,statistics,sys,time
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')   # the same product twice is the same number
from importlib.metadata import version
from pathlib import Path
import torch
from peft import LoraConfig,get_peft_model
from transformers import LlamaConfig,LlamaForCausalLM
from ist_nb.layers import find_layers
from ist_nb.memory import ActivationBudget
from ist_nb.moments import OptimizerState

gpu,GiB = torch.device('cuda', 0),2**30

def llama(n, d=4096, dtype=torch.bfloat16, vocab=32000, r=32, dropout=0.05, **kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=d, intermediate_size=int(d*2.6875), num_hidden_layers=n, num_attention_heads=d//128, use_cache=False, **kwargs)
    torch.set_default_dtype(dtype)
    with gpu: model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    peft = LoraConfig(r=r, lora_alpha=2*r, lora_dropout=dropout, target_modules=['q_proj', 'k_proj', 'v_proj', 'up_proj', 'down_proj'], task_type='CAUSAL_LM')
    return get_peft_model(model, peft).train()

def batches(n, vocab, rows, length):
    x = torch.randint(0, vocab, (n, rows, length), generator=torch.Generator().manual_seed(1)).to(gpu)
    return [dict(input_ids=o, labels=o) for o in x]

def run(model, budget=None, steps=14, rows=16, length=256, how='keep', grads=False, accumulate=1):
    "Each step: seconds, peak above what was there before, what was foreseen, how many blocks were checkpointed"
    layers,g = find_layers(model),random.Random(3)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    limit = ActivationBudget(model, layers, budget) if budget else None
    rest = OptimizerState(opt, layers, how) if how!='keep' else None
    torch.manual_seed(5)
    res,vocab = [],model.config.vocab_size
    for i in range(steps):
        active = sorted(g.sample(range(len(layers)), max(1, len(layers)//4)))
        mine = batches(accumulate, vocab, rows, length)
        torch.cuda.synchronize(); start = time.perf_counter()
        if rest: rest.begin(active)
        if limit: limit.begin(active)
        layers.switch(active)
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        for b in mine: model(**b).loss.backward()
        peak = torch.cuda.max_memory_allocated()-before
        opt.step()
        kept = [p.grad.clone() for p in model.parameters() if p.grad is not None] if grads else None
        opt.zero_grad()
        if limit: limit.end()
        layers.thaw()
        torch.cuda.synchronize()
        res.append(dict(seconds=time.perf_counter()-start, peak=peak, lowest=min(active), foreseen=limit and limit.expected, checkpointed=len(limit.checkpointed) if limit else 0,
                        on_gpu=sum(v.nbytes for s in opt.state.values() for v in s.values() if v.is_cuda)) | (dict(grads=kept) if grads else {}))
    return res,[p.detach().clone() for o in layers for p in o.params],limit,opt

def summary(name, res, budget=None):
    later = res[1:]                                                  # the first step is checkpointed and measured
    row = dict(name=name, budget_gib=budget and budget/GiB, peak_gib=max(o['peak'] for o in later)/GiB, seconds_median=statistics.median(o['seconds'] for o in later[1:]),
               first_step_seconds=res[0]['seconds'], checkpointed=[o['checkpointed'] for o in later], lowest=[o['lowest'] for o in later], peaks_gib=[o['peak']/GiB for o in later])
    if budget: row |= dict(foreseen_over_true=[min(o['foreseen']/o['peak'] for o in later), max(o['foreseen']/o['peak'] for o in later)], kept=all(o['peak']<=budget for o in later))
    print({k:v for k,v in row.items() if not isinstance(v, list) or k=='foreseen_over_true'}, row['checkpointed'], flush=True)
    return row

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b))

def exactness():
    "A small model in float32: gradients with and without a budget, weights with and without offload"
    make = lambda: llama(6, d=256, dtype=torch.float32, vocab=1000, r=4, attn_implementation='eager')
    args = dict(rows=4, length=64, grads=True)
    res = {}
    for accumulate in (1, 2):
        free,w,*_ = run(make(), accumulate=accumulate, **args)
        most = max(o['peak'] for o in free)
        for share in (0.5, 0.35):
            row,w2,limit,_ = run(make(), int(share*most), accumulate=accumulate, **args)
            res[f'budget {share}, {accumulate} batches a step'] = dict(same_gradients=all(same(a['grads'], b['grads']) for a,b in zip(free, row)), same_weights=same(w, w2),
                kept=all(o['peak']<=limit.budget for o in row), checkpointed=[o['checkpointed'] for o in row], foreseen_over_true=[o['foreseen']/o['peak'] for o in row[1:]])
    keep,w,*_ = run(make(), **args)
    off,w2,_,opt = run(make(), how='offload', **args)
    per_layer = 8*sum(p.numel() for p in find_layers(make())[0].params)
    res['offload'] = dict(same_weights=same(w, w2), moments_on_gpu=[o['on_gpu']//per_layer for o in off], without=[o['on_gpu']//per_layer for o in keep],
                          pinned=all(v.is_pinned() for s in opt.state.values() for v in s.values() if not v.is_cuda and v.dim()))
    for k,v in res.items(): print(k, v, flush=True)
    return res

if __name__=='__main__':
    n = int(sys.argv[1]) if len(sys.argv)>1 else 32
    found = dict(command=' '.join(['python benchmarks/memory.py', *sys.argv[1:]]), hardware=torch.cuda.get_device_name(), versions={o:version(o) for o in ('torch', 'transformers', 'peft')},
                 shape=dict(layers=n, hidden=4096, vocabulary=32000, rows=16, tokens=256, rank=32, active=n//4), exact=exactness(), rows=[])
    model = llama(n)
    free = run(model)[0]
    most = max(o['peak'] for o in free)
    found['rows'].append(summary('no budget', free))
    for share in (0.75, 0.5, 0.25):
        budget = int(share*most)
        found['rows'].append(summary(f'{share:.0%}', run(model, budget)[0], budget))
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    found['rows'].append(summary('gradient checkpointing', run(model)[0]))
    model.base_model.model.gradient_checkpointing_disable()
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False          # torch before 2.12: see ist.check_compiled
    for b in model.get_submodule(find_layers(model).stacks[0]): b.compile()
    free = run(model)[0][2:]                                                 # less those that compile
    most = max(o['peak'] for o in free)
    found['rows'].append(summary('compiled blocks, no budget', free))
    for share in (0.5, 0.25):
        budget = int(share*most)
        found['rows'].append(summary(f'compiled blocks, {share:.0%}', run(model, budget)[0], budget))
    out = Path(os.environ.get('OUT', Path(__file__).parent/'results'))/'memory.json'
    out.write_text(json.dumps(found, indent=1)+'\n')
