"""Tokens a second and memory on 1, 2, 4 or 8 GPUs of one host, by DDP and FSDP2, in the Trainer.
LoRA, LoRA with our optimisations, and the recommended setting take turns in one set of processes for each number of
GPUs and engine. Every process has a batch of its own, so with linear scaling n GPUs read n times the tokens of one in
the same time. A contender that fails or hangs is recorded, and the others run in new processes."""
import gc,json,os,sys,tempfile,time,traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from benchmarks import record
from benchmarks.peers import arguments,as_long,eight,lora,peak,quiet,random_model,shapes

warm,settle = 4,2   # steps of a first run, in which libraries compile, and those before the timed ones of a round
alone,no_time = 'one process','not run: out of time'

def contenders(cuda=False):
    "Name -> the settings of IST, or None without"
    from ist_nb import ISTConfig
    fast = ISTConfig.rst(n_active=1., fast=True)
    of = {'LoRA':None, 'LoRA, fast':fast, cut:fast, used:fast, 'LoRA, folded':ISTConfig.rst(n_active=1., fast='fold'),
          'recommended':ISTConfig.recommended(), 'recommended, fp8':ISTConfig.recommended(fast=eight)}
    return {k:o and as_long(o, cuda) for k,o in of.items()}
usual = ['LoRA', 'LoRA, fast', 'recommended']
# of DDP alone: cut at its buckets, as torch does; and told that every parameter gets a gradient
cut,used = 'LoRA, fast, cut','LoRA, fast, all used'

# ---------------------------------------------------------------------------------------------------- in the processes
def gathered(value=None):
    "That of every process, when all of them and their GPUs have come to this point"
    import torch, torch.distributed as dist
    if torch.cuda.is_available(): torch.cuda.synchronize()
    if not dist.is_initialized(): return [value]
    res = [None]*dist.get_world_size()
    dist.all_gather_object(res, value)
    return res

def clock_of(begin, end, cuda):
    "A callback that times the steps from `begin` to before `end`, which end the run"
    import torch
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        t,start,seconds,peak = 0,None,None,None
        def on_step_begin(self, *args, **kwargs):
            if self.t==0 and cuda: torch.cuda.reset_peak_memory_stats()
            if self.t==begin:
                gathered()
                self.start = time.perf_counter()
            self.t += 1
        def on_step_end(self, *args, **kwargs):
            if self.t<end: return
            gathered()
            self.seconds,self.peak = (time.perf_counter()-self.start)/(end-begin),peak(cuda)
    return Clock()

def kernels(events):
    "Of a profile: milliseconds of the GPU's kernels, of those that exchange with other GPUs, and how many there are"
    of = [(e.key.lower(), e.self_device_time_total/1e3, e.count) for e in events if e.self_device_time_total]
    return dict(gpu=sum(o[1] for o in of), exchange=sum(o[1] for o in of if 'nccl' in o[0]),
                launches=sum(o[2] for o in of))

def profiler_of(at, cuda):
    "A callback that profiles one step: if the kernels take less than the step, the GPU has waited"
    from torch.profiler import ProfilerActivity,profile
    from transformers import TrainerCallback
    class Profiler(TrainerCallback):
        t,running,found = 0,None,None
        def on_step_begin(self, *args, **kwargs):
            if self.t==at:
                gathered()
                self.running = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
                self.running.start()
            self.t += 1
        def on_step_end(self, *args, **kwargs):
            if self.t!=at+1: return
            gathered()
            self.running.stop()
            self.found = kernels(self.running.key_averages())
    return Profiler()

def wrapped_by(trainer):
    "The engine that the Trainer has used"
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel
    if isinstance(trainer.model_wrapped, DistributedDataParallel): return 'DDP'
    sharded = {isinstance(o, FSDPModule) for o in trainer.model.get_base_model().model.layers}
    return 'FSDP2' if sharded=={True} else alone

def cutter():
    "A callback that lets torch cut compiled blocks where a bucket of DDP ends, which `compile_blocks` turns off"
    import torch
    from transformers import TrainerCallback
    class Cutter(TrainerCallback):
        def on_train_begin(self, *args, **kwargs): torch._dynamo.config.optimize_ddp = True
    return Cutter()

def trained(spec, model, data, config, steps, *callbacks, name=None):
    from transformers import Trainer,TrainingArguments,default_data_collator
    from ist_nb import ISTCallback
    from benchmarks.processes import fresh_accelerate
    block = type(model.get_base_model().model.layers[0]).__name__   # after the first run FSDPLlamaDecoderLayer
    how = dict(fsdp=True, fsdp_config=dict(version=2, transformer_layer_cls_to_wrap=block))
    how = how if spec['engine']=='FSDP2' else dict(ddp_find_unused_parameters=False) if name==used else {}
    with fresh_accelerate('fsdp' in how):
        trainer = quiet(Trainer(model, arguments(TrainingArguments, spec, steps, **how), train_dataset=data,
                                data_collator=default_data_collator,
                                callbacks=[*callbacks, *([ISTCallback(config)] if config else []),
                                           *([cutter()] if name==cut else [])]))
        trainer.train()
    if (found := wrapped_by(trainer))!=spec['engine']: raise RuntimeError(f"{found} in place of {spec['engine']}")
    # accelerate puts its autocast around a model once
    for k in ('forward', '_original_forward', '_is_accelerate_prepared'): model.__dict__.pop(k, None)
    trainer.optimizer = trainer.lr_scheduler = None
    del trainer
    gc.collect()   # the wrapper too

def measured(spec, name, size, device):
    """Seconds of a step and the most memory of a GPU, by round. A schedule is timed from its second step on: the first
    takes memory, and the others train as many layers on average as those of a long run"""
    import torch
    from peft import get_peft_model
    from benchmarks.small import lm_batch
    begun,cuda = time.time(),spec['device']=='cuda'
    config = contenders(cuda)[name]
    held = torch.cuda.memory_allocated() if cuda else None   # nothing, unless the contender before has left something
    begin = 1 if config and config.schedule!='constant' else settle
    end = begin+spec['steps']
    ids = torch.randint(5, shapes[spec['shape']][0], (spec['batch']*size*end, spec['length']),
                        generator=torch.Generator().manual_seed(0))
    with torch.device(device): model = get_peft_model(random_model(spec, device, use_cache=False), lora())
    data = [lm_batch(o) for o in ids.tolist()]
    train = partial(trained, spec, model, data, config, name=name)
    train(warm)
    seconds,peaks,needs = [],[],None
    for r in range(spec['rounds']):
        start,clock = time.time(),clock_of(begin, end, cuda)
        if r and not gathered(start+1.2*took<spec['end'])[0]: break
        train(end, clock)
        took,needs = time.time()-start,needs or time.time()-begun
        seconds.append(clock.seconds)
        peaks.append(max(gathered(clock.peak)) if cuda else None)
    step = {}
    if gathered(time.time()+took<spec['end'])[0]:
        train(end, profiler := profiler_of((begin+end)//2, cuda)) # not timed
        step = profiler.found
    return dict(seconds=seconds, peak=peaks, needs=needs, held=held, step=step)

def child(folder, rank, size):
    "One process: every contender in turn, a line of JSON for each. It ends where one fails"
    import torch, torch.distributed as dist
    folder,cuda = Path(folder),torch.cuda.is_available()
    spec,device = json.loads((folder/'spec.json').read_text()),torch.device('cuda', rank) if cuda else 'cpu'
    if cuda: torch.cuda.set_device(rank)
    if size>1: dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(seconds=spec['limit']/2),
                                       **(dict(device_id=device) if cuda else {}))
    else:
        for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'): os.environ.pop(k)   # a plain Trainer
    with open(folder/f'{rank}.jsonl', 'a', buffering=1) as out:
        def tell(**said): out.write(json.dumps(said)+'\n')
        for name in spec['names']:
            need = spec['needs'].get(name, max(spec['needs'].values(), default=0))
            if not gathered(time.time()+1.2*need<spec['end'])[0]: tell(name=name, failed=no_time)
            else:
                try: tell(name=name, **measured(spec, name, size, device))
                except Exception as e:
                    tell(name=name, at=time.time(), failed=f'{type(e).__name__}: {" ".join(str(e).split())}'[:400],
                         where=traceback.format_exc()[-1500:].replace(f'{record.root}/', ''))
                    os._exit(1)   # others may wait for this one, and the GPU may be full
            torch._dynamo.reset()
            gc.collect()
            if cuda: torch.cuda.empty_cache()
    if size>1: dist.destroy_process_group()

# ------------------------------------------------------------------------------------------------------ in the parent
def launch(spec, size):
    "What is known of each contender; when one has failed or hung, the others run in new processes"
    from benchmarks.processes import _processes
    known,more = {},dict(PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True', NCCL_NVLS_ENABLE='0',
                         OMP_NUM_THREADS=str(max(1, os.cpu_count()//size)))
    if size==1: more['CUDA_VISIBLE_DEVICES'] = (os.environ.get('CUDA_VISIBLE_DEVICES') or '0').split(',')[0]
    while todo := [o for o in spec['names'] if o not in known]:
        with tempfile.TemporaryDirectory() as d:
            d = Path(d)
            (d/'spec.json').write_text(json.dumps(spec | dict(names=todo)))
            until = min(spec['end']-time.time(), spec['limit']*len(todo))
            log = _processes(d, size, time.monotonic()+until, 'benchmarks.scaling', **more)
            def told(r): return (d/f'{r}.jsonl').read_text().splitlines() if (d/f'{r}.jsonl').exists() else []
            lines = [json.loads(o) for r in range(size) for o in told(r) if r==0 or '"failed"' in o]
        lines.sort(key=lambda o: -o.get('at', float('inf')))   # the first failure counts: it is the cause of others
        known |= {o['name']:o for o in lines}
        left = [o for o in todo if o not in known]
        if time.time()>spec['end']: known |= {o:dict(failed=no_time) for o in left}
        elif left and not any('failed' in o for o in lines):
            known[left[0]] = dict(failed='a process died or hung', where=log[-1500:])
    return known

def variant(found, n, rows, one=None):
    "The numbers of a contender on `n` processes; `one` are those of one process"
    from benchmarks.small import spread
    s = spread(found['seconds'])
    rate = n*rows/s['median']
    return dict(seconds=s, tokens_a_second=rate, peak=spread(found['peak']), held=found.get('held'),
                rounds=len(found['seconds']), step=found.get('step'),
                of_linear=1. if n==1 else rate/(n*one['tokens_a_second']) if one else None)

def line(name, case):
    "One line on a contender, for people"
    head = f"{case['engine']:12} {case['processes']} {name:18}"
    if name in case['failed']: return f"{head} failed: {case['failed'][name]}"
    v = case['variants'][name]
    share = f"{v['of_linear']:6.1%} of linear" if v['of_linear'] else ''
    memory = f"{v['peak']['median']/2**30:6.2f} GiB" if v['peak'] else ''
    return (f"{head} {v['seconds']['median']*1e3:8.1f} ms ({v['seconds']['min']*1e3:.1f} to "
            f"{v['seconds']['max']*1e3:.1f}) {v['tokens_a_second']:9.0f} tokens/s {share} {memory}")

def main(
    shape:str='8b',           # 1b and 8b (Llama 3), or tiny
    rows:str='16x256',        # Rows x tokens in the batch of one process, separated by commas, such as 16x256,4x2048
    sizes:str='1 2 4',        # How many GPUs; 1 is what the others are compared with
    engines:str='DDP FSDP2',  # For more than one
    only:str='',              # Contenders, separated by semicolons; the usual ones if empty
    steps:int=12,             # Timed steps of a round
    rounds:int=3,             # Rounds of a contender
    seconds:float=400,        # Begin nothing that cannot end in so many seconds
    limit:float=200,          # Seconds that one contender may take
    out:Path='scaling',       # Where the numbers go
):
    import torch
    cuda,begun,cases,needs = torch.cuda.is_available(),time.time(),[],{}
    names = [o.strip() for o in only.split(';') if o.strip()] or usual
    if wrong := [o for o in names if o not in contenders()]:
        raise SystemExit(f'No contender is called {wrong[0]!r}: {list(contenders())}')
    if wrong := [o for o in engines.split() if o not in ('DDP', 'FSDP2')]:
        raise SystemExit(f'No engine is called {wrong[0]!r}: DDP and FSDP2 are')
    spec = dict(shape=shape, checkpointing=False, steps=steps, rounds=rounds, limit=limit,
                device='cuda' if cuda else 'cpu', end=begun+seconds, names=names)
    head = record.about('tokens a second and memory on several GPUs', 'accelerate triton', gpu=cuda)
    wanted = [(b, l, n, e) for b,l in (map(int, o.split('x')) for o in rows.split(','))
              for n in map(int, sizes.split()) for e in (engines.split() if n>1 else [alone])]
    for batch,length,n,engine in wanted:
        if cuda and n>torch.cuda.device_count(): continue
        case = dict(engine=engine, processes=n, shape=shape, batch=batch, length=length, steps=steps, variants={},
                    failed={}, where={})
        cases.append(case)
        todo = [o for o in names if o not in (cut, used) or engine=='DDP']
        for name,found in launch(spec | dict(batch=batch, length=length, engine=engine, names=todo, needs=needs),
                                 n).items():
            if 'failed' in found: case['failed'][name],case['where'][name] = found['failed'],found.get('where', '')
            else:
                one = next((c['variants'].get(o) for c in cases for o in ['LoRA, fast' if name in (cut, used) else name]
                            if (c['processes'], c['batch'], c['length'])==(1, batch, length)), None)
                needs[name],case['variants'][name] = found['needs'],variant(found, n, batch*length, one)
            print(f'[{time.time()-begun:.0f} s] {line(name, case)}', flush=True)
        record.save(out, head, seconds=round(time.time()-begun), cases=cases)

if __name__=='__main__': child(sys.argv[1], *map(int, sys.argv[2:]))
