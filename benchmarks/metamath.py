"""IST in PEFT's public comparison on MetaMathQA: their script, data, clock and accuracy on GSM8K, our choice of layers.
It needs a GPU, the hub and their folder: `git clone https://github.com/huggingface/peft`, then
`python -m benchmarks metamath peft/method_comparison/MetaMathQA experiments/lora/llama-3.2-3B-rank32`. Their script
writes its result where it always does; what was trained goes beside it."""
import importlib,json,os,sys
from ist_nb import IST,ISTConfig

default = vars(ISTConfig.recommended(fast='fold'))   # without the minute that compiling takes: their clock runs

def attach(
    run, # Their script, as a module
    config, # An `ISTConfig`, whose scorer needs no probe
) -> list: # Holds the `IST` once their training has begun
    """From now on the training of `run` trains the layers that IST draws: a step of theirs begins with zero_grad and
    ends with the optimizer"""
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

def main(
    folder:str,     # Their folder, method_comparison/MetaMathQA of a checkout of PEFT
    experiment:str, # One of their experiments, as a path in that folder
    ist:str='{}',   # Settings of IST as JSON, such as '{"n_active": 0.5}', over those of this script
):
    config = ISTConfig.from_dict(default | json.loads(ist))
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
    run = importlib.import_module('run')
    # their script defines it only where it is the main module
    run.print_verbose = lambda *args, **kwargs: print(*args, **(kwargs | dict(file=sys.stderr)))
    made = attach(run, config)
    name = run.validate_experiment_path(experiment)
    run.main(path_experiment=experiment, experiment_name=name, clean=True)
    if not made:
        sys.exit('Their script has made no optimizer through get_optimizer_and_scheduler: its form has changed, and '
                 'IST took no part.')
    out = f"ist_{name.replace(os.sep, '_')}.json"
    with open(out, 'w') as f:
        json.dump(dict(config=config.__dict__, steps=made[0].t, times_active=made[0].times_active.tolist(),
                       importance=made[0].importance.tolist(), score_seconds=made[0].score_seconds), f)
    print(f'{made[0]!r}\nWhat was trained: {os.path.join(folder, out)}')
