"What IST itself costs a step, without its probes: drawing and switching 32 layers with LoRA on q, k, v, up and down"
import time
from pathlib import Path
import torch
from ist_nb import IST,ISTConfig
from benchmarks import record
from benchmarks.small import spread,tiny_lora

def main(
    steps:int=500, # Steps in a repetition
    reps:int=9,    # Repetitions; the two samplers take turns
    out:Path='bookkeeping', # Where the numbers go
):
    torch.set_num_threads(1)
    model = tiny_lora(32, r=32, targets=['q_proj', 'k_proj', 'v_proj', 'up_proj', 'down_proj'], hidden=32)
    silent = ISTConfig(score_interval=10**9)
    ists = dict(importance=IST(model, silent, probe=[0], loss_fn=lambda model, batch: None),
                uniform=IST(model, ISTConfig.rst()))
    ms = {k:[] for k in ists}
    for _ in range(reps):
        for name,ist in ists.items():
            start = time.perf_counter()
            for _ in range(steps):
                with ist.step(): pass
            ms[name].append((time.perf_counter()-start)/steps*1e3)
    head = record.about('milliseconds a step: draw, freeze, thaw', threads=1)
    n = sum(len(o.params) for o in ists['uniform'].layers)
    found = dict(layers=32, adapter_parameters=n, active=8, steps=steps, reps=reps,
                 milliseconds={k:spread(v) for k,v in ms.items()})
    print(record.save(out, head, **found), found['milliseconds'])
