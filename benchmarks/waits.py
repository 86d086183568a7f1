"""Where does the GPU wait in a training step? A few steps of a run are traced, with or without IST. Each stretch in
which no kernel runs is put down to what the host was doing meanwhile, such as the forward pass or clipping. The rates
of the card's products, copies and unpacking stand beside them."""
import functools,json,tempfile,time
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from benchmarks import record
from benchmarks.peers import lora,random_model,shapes
from benchmarks.scaling import alone,clock_of,contenders,gathered,trained,warm

seen,steps = 8,20     # steps that are traced, and steps that are timed without a trace

@contextmanager
def phases():
    "Name what the host does in a step"
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.profiler import record_function
    from transformers import Trainer
    from ist_nb import ISTCallback
    of = {'batch':(Trainer, 'get_batch_samples'), 'forward':(Trainer, 'compute_loss'),
          'backward':(Accelerator, 'backward'), 'clipping':(Trainer, '_clip_grad_norm'),
          'optimizer':(AcceleratedOptimizer, 'step'), 'zero_grad':(torch.nn.Module, 'zero_grad'),
          'work done':(Trainer, 'floating_point_ops'), 'IST':(ISTCallback, 'on_step_begin'),
          'IST, end':(ISTCallback, 'on_step_end')}
    held = {k:getattr(*o) for k,o in of.items()}
    def named(k, f):
        @functools.wraps(f)
        def new(*args, **kwargs):
            with record_function(f'host: {k}'): return f(*args, **kwargs)
        return new
    for k,(cls,name) in of.items(): setattr(cls, name, named(k, held[k]))
    try: yield
    finally:
        for k,(cls,name) in of.items(): setattr(cls, name, held[k])

def tracer_of(begin, path, cuda):
    "A callback that traces `seen` steps from `begin` on"
    from torch.profiler import ProfilerActivity as A,profile
    from transformers import TrainerCallback
    class Tracer(TrainerCallback):
        t = 0
        def on_step_begin(self, *args, **kwargs):
            if self.t==begin:
                gathered()
                self.trace = profile(activities=[A.CPU, A.CUDA] if cuda else [A.CPU])
                self.trace.start()
            elif self.t==begin+seen:
                gathered()
                self.trace.stop()
                self.trace.export_chrome_trace(str(path))
            self.t += 1
    return Tracer()

def waiting(events, n):
    "Of a trace of `n` steps: milliseconds a step in which kernels run and in which none does, by what the host did"
    of = lambda o: (o['ts'], o['ts']+o['dur'])
    kernels = sorted(of(e) for e in events if e.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset'))
    host = sorted((*of(e), e['name'].removeprefix('host: ')) for e in events
                  if e.get('cat')=='user_annotation' and e['name'].startswith('host: '))
    took = Counter()
    for a,b,name in host: took[name] += b-a
    edges = sorted({t for a,b,_ in host for t in (a, b)})
    def doing(t): return max(((a, name) for a,b,name in host if a<=t<b), default=(0, 'between'))[1]  # the innermost
    idle,end = Counter(),kernels[0][0] if kernels else 0
    for a,b in kernels:
        while end<a:
            i = bisect_right(edges, end)
            until = min(a, edges[i]) if i<len(edges) else a
            idle[doing(end)] += until-end
            end = until
        end = max(end, b)
    span = end-kernels[0][0] if kernels else 0
    ms = lambda o: {k:v/1e3/n for k,v in o.most_common()}
    return dict(kernels=len(kernels)/n, span=span/1e3/n, busy=(span-idle.total())/1e3/n, idle=ms(idle), host=ms(took))

def measured(spec, name):
    "Milliseconds of a step without a trace, and what a trace says"
    import torch
    from peft import get_peft_model
    from benchmarks.small import lm_batch
    cuda = spec['device']=='cuda'
    config = contenders(cuda)[name]
    begin = 1 if config and config.schedule!='constant' else 2
    device = spec['device']
    with torch.device(device): model = get_peft_model(random_model(spec, device, use_cache=False), lora())
    ids = torch.randint(5, shapes[spec['shape']][0], (spec['batch']*(begin+steps), spec['length']))
    data,found = [lm_batch(o) for o in ids.tolist()],[]
    trained(spec, model, data, config, warm)
    for _ in range(2):
        trained(spec, model, data, config, begin+steps, clock := clock_of(begin, begin+steps, cuda))
        found.append(clock.seconds*1e3)
    path = Path(tempfile.mkdtemp())/'trace.json'
    with phases(): trained(spec, model, data, config, begin+steps, tracer_of(begin+(steps-seen)//2, path, cuda))
    return dict(ms=found) | waiting(json.loads(path.read_text())['traceEvents'], seen)

def main(
    shape:str='8b',      # 1b and 8b (Llama 3), or tiny
    rows:str='16x256,4x2048', # Rows x tokens in a batch, separated by commas
    only:str='LoRA, fast;recommended', # Contenders of `scaling`, separated by semicolons
    device:str='cuda',   # cuda or cpu
    out:Path='waits',    # Where the numbers go
):
    import gc,torch
    from benchmarks.speed import machine_rates
    names = 'matrix_flops','copy_bytes','unpack_bytes'
    found,rates = [],dict(zip(names, machine_rates(8192 if device=='cuda' else 512)))
    print(rates, flush=True)
    for o in rows.split(','):
        batch,length = map(int, o.split('x'))
        spec = dict(shape=shape, batch=batch, length=length, checkpointing=False, device=device, engine=alone)
        case = {k:spec[k] for k in ('shape', 'batch', 'length')} | dict(steps=steps, traced=seen, variants={})
        found.append(case)
        for name in only.split(';'):
            start = time.time()
            case['variants'][name] = v = measured(spec, name)
            gc.collect()
            if device=='cuda': torch.cuda.empty_cache()
            print(f"{shape} {o} {name}: {min(v['ms']):.1f} ms a step; traced {v['span']:.1f}, of which kernels run "
                  f"{v['busy']:.1f}; {time.time()-start:.0f} s", flush=True)
            head = record.about('where the GPU waits in a step', 'accelerate', gpu=device=='cuda')
            record.save(out, head | rates, cases=found)
