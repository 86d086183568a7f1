"""Which of PEFT's methods IST works with: every entry of its registry, and the variants of LoRA.
What IST needs of a method is checked one thing after the other."""
import tempfile,warnings
from dataclasses import fields
from pathlib import Path
import torch
from peft import LoraConfig,PeftModel,get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as registry
from transformers import MixtralConfig,MixtralForCausalLM
import ist_nb.adapters   # puts ours into the registry
from ist_nb import IST,ISTConfig,ISTError,find_layers
from ist_nb.suppression import scaling_is_exact,suppress
from benchmarks import record
from benchmarks.small import lm_batch,tiny_llama,trainable

N = 4   # layers
linear = ['q_proj', 'v_proj', 'up_proj']
# what a method needs on a model this small; one that is not named gets what `config_for` finds in its fields
settings = {
    'ADALORA': dict(total_step=100, init_r=4),
    'ADAPTION_PROMPT': dict(target_modules=None, adapter_len=3, adapter_layers=N),
    'BOFT': dict(boft_block_size=4),
    'C3A': dict(block_size=4),
    'FOURIERFT': dict(n_frequency=20),
    'IA3': dict(feedforward_modules=['up_proj']),
    'LN_TUNING': dict(target_modules=['input_layernorm', 'post_attention_layernorm']),
    'OFT': dict(r=0, oft_block_size=4),
    'POLY': dict(n_tasks=2),
    'ROAD': dict(group_size=4),
    'SHADOW': dict(target_modules=None),
    'TRAINABLE_TOKENS': dict(target_modules=None, token_indices=[1, 2]),
    'UNILORA': dict(theta_d_length=64),
    'VBLORA': dict(num_vectors=8, vector_length=4),
    'WAVEFT': dict(n_frequency=20),
}
# LoRA's own variants are fields of its configuration, not methods of the registry
variants = {
    'rsLoRA': dict(use_rslora=True),
    'PiSSA': dict(init_lora_weights='pissa'),
    'OLoRA': dict(init_lora_weights='olora'),
    'MiCA': dict(init_lora_weights='mica'),
    'lora_bias': dict(lora_bias=True),
    'DoRA': dict(use_dora=True),
    'aLoRA': dict(alora_invocation_tokens=[3]),
    'VeLoRA': dict(velora_config={}),
    'MonteCLoRA': dict(monteclora_config={}),
    'BD-LoRA': dict(use_bdlora=dict(target_modules_bd_a=['up_proj', 'q_proj', 'v_proj'], nblocks=2)),
    'KaSA': dict(kasa_config={}),
    'experts of a mixture': dict(target_modules=[],
                                 target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']),
}
# what PEFT itself cannot do, with or without IST; if that changes, `check` fails and this list must
faults = {'XLORA': dict(
    load='PEFT 0.21 loads a saved X-LoRA without its classifier and its trained experts, with or without IST.',
    merge='PEFT 0.21 merges the experts but not the mixture of them, which depends on the input.')}
notes = {
    'ADALORA': 'Its own rank allocation (`update_and_allocate`) needs the gradient of every layer, which a step of IST '
               'does not compute: PEFT raises a TypeError. Without it AdaLoRA trains with the ranks it starts with.',
    'SHADOW': 'The shadow network beside the model trains at every step, so the backward pass always goes to the '
              'bottom.',
    'BOTTLENECK': "Not one of PEFT's own: [ours](../29_adapters.ipynb).",
    'XLORA': 'With `use_trainable_adapters=True`; otherwise only the classifier beside the model trains, and it is '
             'refused.',
}

def tiny(): return tiny_llama(N)

def tiny_mixture():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=N,
                                            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
                                            use_cache=False))

def config_for(name, folder):
    "Settings of the method `name`, or of a variant of LoRA, for `tiny`"
    if name in variants: return LoraConfig(**(dict(task_type='CAUSAL_LM', r=2, target_modules=linear) | variants[name]))
    cls = registry[name]
    have = {f.name:f.default for f in fields(cls)}
    guess = dict(task_type='CAUSAL_LM')
    if 'target_modules' in have: guess['target_modules'] = linear
    if isinstance(have.get('r'), int): guess['r'] = 2
    if 'num_virtual_tokens' in have: guess['num_virtual_tokens'] = 3
    if name=='XLORA': guess |= dict(hidden_size=16, xlora_size=8, use_trainable_adapters=True, adapters=experts(folder))
    return cls(**(guess | settings.get(name, {})))

def experts(folder):
    "Two LoRA adapters on disk, for X-LoRA to mix"
    lora = LoraConfig(r=2, target_modules=linear, init_lora_weights=False, task_type='CAUSAL_LM')
    for k in '01': get_peft_model(tiny(), lora).save_pretrained(folder/k)
    return {k:str(folder/k) for k in '01'}

def batch(name):
    ids = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    return lm_batch(ids) | (dict(task_ids=torch.zeros(4, dtype=torch.long)) if name=='POLY' else {})

@torch.no_grad()
def logits(model, b): return model(**{k:v for k,v in b.items() if k!='labels'}).logits
def off(a, b): return ((a-b).norm()/b.norm()).item()

def train(model, b, steps=20):
    "Steps of IST with every check that a step allows; the IST and its losses"
    ist = IST(model, ISTConfig(score_interval=5), probe=[b])
    opt = torch.optim.AdamW(trainable(model), lr=0.05, weight_decay=0.1)
    snap = lambda o: [(p.detach().clone(), {k:v.clone() for k,v in opt.state[p].items()}) for p in o.params]
    same = lambda a,b: all(torch.equal(p, q) and all(torch.equal(s[k], u[k]) for k in u) for (p,s),(q,u) in zip(a, b))
    able,losses = [p.requires_grad for p in model.parameters()],[]
    for _ in range(steps):
        before = [snap(o) for o in ist.layers]
        with ist.step():
            loss = model(**b).loss
            assert torch.isfinite(loss), f'loss {loss}'
            loss.backward()
            for i,o in enumerate(ist.layers):
                inside = [p for p in model.get_submodule(o.name).parameters()]
                if i not in ist.active.tolist():
                    none = not any(p.requires_grad or p.grad is not None for p in inside)
                    assert none, f'inactive layer {i} collects a gradient'
                elif len(losses)>=3:
                    assert any(p.grad is not None and p.grad.any() for p in inside), f'active layer {i} has no gradient'
            opt.step(); opt.zero_grad()
        for i,o in enumerate(ist.layers):
            if i not in ist.active.tolist(): assert same(snap(o), before[i]), f'inactive layer {i} changed'
        assert [p.requires_grad for p in model.parameters()]==able, 'not everything is trainable again after a step'
        losses.append(loss.item())
    return ist,losses

def agree(what, name, error, most):
    "The error must be small, and must not be where PEFT has a fault"
    fault = faults.get(name, {}).get(what)
    no_longer = f', so this is no longer so: {fault}' if fault else ''
    assert (error<most)!=bool(fault), f'{what}: differs by {error:.1e}{no_longer}'

def merges(name, model, b, y):
    "None if the method merges, else why not"
    try:
        with torch.no_grad(): merged = model.merge_and_unload()
    except Exception as e: return ' '.join(str(e).split())[:160] or type(e).__name__
    agree('merge', name, off(logits(merged, {k:v for k,v in b.items() if k!='task_ids'}), y), 1e-4)
    return faults.get(name, {}).get('merge')

def check(name):
    "What was found of the method `name`, as a dictionary; raises `AssertionError`, or what the method itself raised"
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as d:
        warnings.simplefilter('ignore')
        d = Path(d)
        base = tiny_mixture if name.startswith('experts') else tiny
        model,b = get_peft_model(base(), config_for(name, d)),batch(name)
        try: layers = find_layers(model)
        except ISTError as e: return dict(method=name, status='refused', reason=str(e))
        assert len(layers)==N, f'found {len(layers)} layers'
        start = [p.detach().clone() for p in trainable(model)]
        ist,losses = train(model.train(), b)
        assert any(not torch.equal(a, p) for a,p in zip(start, trainable(model))), 'nothing was trained'
        assert ist.importance.abs().max()>0, 'importance did not move'
        model.eval()
        y = logits(model, b)
        with suppress(layers, range(N), 1.):
            assert torch.equal(logits(model, b), y), 'suppression by factor 1 changes something'
        with suppress(layers, range(N), 0.): y_0 = logits(model, b)
        with suppress(layers, [0, 2], 0.5): y_half = logits(model, b)
        assert torch.equal(logits(model, b), y), 'suppression leaves something behind'
        with model.disable_adapter(): y_base = logits(model, b)
        response,error = off(y, y_base),off(y_0, y_base)
        assert response>1e-3, f'the adapter does nothing ({response:.1e}), so there is nothing to suppress'
        assert error<1e-6, f'suppression by factor 0 differs from the disabled adapter by {error:.1e}'
        assert min(off(y_half, y), off(y_half, y_base))>1e-5, 'suppression of half of the layers has no effect'
        model.save_pretrained(d/'saved')
        again = PeftModel.from_pretrained(base(), d/'saved', is_trainable=True).eval()
        agree('load', name, off(logits(again, b), y), 1e-6)
        assert [o.label for o in find_layers(again)]==[o.label for o in layers], 'loaded, it has other layers'
        forms = {'scaling' if scaling_is_exact(t) else 'response' for o in layers for t in o.tuners}
        return dict(method=name, status='supported', form=forms.pop(), shared=len(layers.shared),
                    outside=len(layers.outside), response=response, error=error,
                    loss=[losses[0], losses[-1]], loads=faults.get(name, {}).get('load'),
                    merges=merges(name, model, b, y))

def main(
    out:Path='peft_methods', # Where the table goes
):
    rows,lora = [check(str(o.value)) for o in registry],[check(o) for o in variants]
    for r in rows+lora: print(f"{r['method']:24} {r['status']:10} {r.get('reason') or r.get('merges') or ''}"[:150])
    record.save(out, record.about('what IST needs of each PEFT method'), rows=rows, variants=lora, notes=notes)
