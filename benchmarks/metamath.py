"""PEFT's public comparison on MetaMathQA with IST in it: their script, their data, their clock and their accuracy on GSM8K; only which layers a step trains is ours.
It needs a GPU, the hub and what their folder asks for: `git clone https://github.com/huggingface/peft`, then, with the settings of IST as JSON,
`python benchmarks/metamath.py peft/method_comparison/MetaMathQA experiments/lora/llama-3.2-3B-rank32 --ist '{"n_active": 0.5}'`. Their script writes the result
where it writes its own, and beside it goes what was trained"""
import importlib,json,os,sys
from fastcore.script import call_parse
from ist_nb import IST,ISTConfig

default = vars(ISTConfig.recommended(fast='fold'))   # without the minute that compiling takes: their clock runs

def attach(
    run, # Their script, as a module
    config, # An `ISTConfig`, whose scorer needs no probe
) -> list: # Holds the `IST` once their training has begun
    "From now on the training of `run` trains the layers that IST draws: a step of theirs begins with zero_grad and ends with the optimizer"
    make,made = run.get_optimizer_and_scheduler,[]
    def with_ist(model, **kwargs):
        optimizer,scheduler = make(model, **kwargs)
        ist,zero = IST(model, config, optimizer=optimizer, n_steps=kwargs.get('max_steps')),optimizer.zero_grad
        def zero_grad(*args, **kw):
            zero(*args, **kw)
            if ist.in_step: ist.end_step(False)   # a loss scaler has skipped the last one
            ist.begin_step()
        optimizer.zero_grad = zero_grad
        optimizer.register_step_post_hook(lambda *_: ist.end_step())
        made.append(ist)
        return optimizer,scheduler
    run.get_optimizer_and_scheduler = with_ist
    return made

@call_parse
def main(
    folder:str,     # Their folder, method_comparison/MetaMathQA of a checkout of PEFT
    experiment:str, # One of their experiments, as a path in that folder
    ist:str='{}',   # Settings of IST as JSON, over those of this script
):
    config = ISTConfig.from_dict(default | json.loads(ist))
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
    run = importlib.import_module('run')
    run.print_verbose = lambda *args, **kwargs: print(*args, **(kwargs | dict(file=sys.stderr)))   # which they set where they are the main script
    made = attach(run, config)
    name = run.validate_experiment_path(experiment)
    run.main(path_experiment=experiment, experiment_name=name, clean=True)
    if not made: sys.exit('Their script has made no optimizer through get_optimizer_and_scheduler, so IST took no part: its form has changed.')
    out = f"ist_{name.replace(os.sep, '_')}.json"
    with open(out, 'w') as f: json.dump(dict(config=config.__dict__, steps=made[0].t, times_active=made[0].times_active.tolist(), importance=made[0].importance.tolist(), score_seconds=made[0].score_seconds), f)
    print(f'{made[0]!r}\nWhat was trained: {os.path.join(folder, out)}')
