"What IST itself costs a step, without the probes: drawing layers and switching adapters of 32 layers with LoRA on q, k, v, up, down"
import json,platform,statistics,sys,time
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from peft import LoraConfig,get_peft_model
from transformers import LlamaConfig,LlamaForCausalLM
from ist_nb import IST,ISTConfig

@call_parse
def main(
    steps:int=500, # Steps in a repetition
    reps:int=9,    # Repetitions; the two samplers take turns
    out:Path=Path(__file__).parent/'results'/'bookkeeping.json', # Where the numbers go
):
    torch.set_num_threads(1)
    cfg = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=32, num_attention_heads=2, num_key_value_heads=2)
    model = get_peft_model(LlamaForCausalLM(cfg), LoraConfig(r=32, target_modules=['q_proj','k_proj','v_proj','up_proj','down_proj'], task_type='CAUSAL_LM'))
    ists = dict(importance=IST(model, ISTConfig(score_interval=10**9), probe=[0], loss_fn=lambda model, batch: None), uniform=IST(model, ISTConfig.rst()))
    ms = {k:[] for k in ists}
    for _ in range(reps):
        for name,ist in ists.items():
            start = time.perf_counter()
            for _ in range(steps):
                with ist.step(): pass
            ms[name].append((time.perf_counter()-start)/steps*1e3)
    res = dict(what='milliseconds a step: draw, freeze, thaw', layers=32, adapter_parameters=sum(len(o.params) for o in ists['uniform'].layers), active=8, steps=steps, reps=reps,
               milliseconds={k:dict(median=statistics.median(v), min=min(v), max=max(v)) for k,v in ms.items()},
               command='python benchmarks/bookkeeping.py', hardware=f'{platform.machine()} CPU, one thread',
               versions={'python':platform.python_version()} | {o:version(o) for o in ('torch','peft','transformers')})
    out.write_text(json.dumps(res, indent=1)+'\n')
    print(json.dumps(res['milliseconds'], indent=1))
