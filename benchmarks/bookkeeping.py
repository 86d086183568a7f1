"""What IST itself costs a step, without its probes: drawing and switching 32 layers with LoRA on q, k, v, up and down.
And what two of the Trainer's walks over the modules cost, with LoRA on each linear layer."""
import time
from pathlib import Path
import torch
from ist_nb import IST,ISTConfig
from benchmarks import record
from benchmarks.small import spread,tiny_lora

def walked(steps, reps):
    "Milliseconds of `train` and `num_parameters`, which the Trainer calls at each step"
    model,ms = tiny_lora(32, targets=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'],
                         hidden=32).train(),[]
    for _ in range(reps):
        start = time.perf_counter()
        for _ in range(steps): model.train(); model.get_base_model().num_parameters(exclude_embeddings=True)
        ms.append((time.perf_counter()-start)/steps*1e3)
    return dict(modules=len(list(model.modules())), milliseconds=spread(ms))

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
                 milliseconds={k:spread(v) for k,v in ms.items()}, walks=walked(steps//10, reps))
    print(record.save(out, head, **found), found['milliseconds'], found['walks'])
