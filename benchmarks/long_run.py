"20,000 steps of a tiny model in the Trainer: memory, history, checkpoints and seconds at the end as at the beginning"
import gc,statistics,tempfile,time,warnings
from pathlib import Path
import psutil,torch,transformers
from datasets import Dataset
from transformers import Trainer,TrainerCallback,TrainingArguments
from transformers.trainer_callback import PrinterCallback
from ist_nb import ISTCallback,ISTConfig
from ist_nb.state import _history_limit
from ist_nb.runs import RunGuard
from benchmarks import record
from benchmarks import kill_points as kp

steps,warm,block,save_steps = 20_000,3_000,1_000,1_000   # the first `warm` steps fill caches and the history

class Meter(TrainerCallback):
    """Memory of the process, and its processor time for each step; not the clock's, which other work on the machine
    bends"""
    def __init__(self):
        self.process,self.cpu,self.fixed,self.rss,self.sizes,self.last = psutil.Process(),[],[],{},{},None
        self.model,self.batch = kp.tiny_model(),{k:torch.tensor([r[k] for r in kp.rows()[:8]])
                                                 for k in ('input_ids', 'labels')}
    def measure(self):
        "Processor time of a fixed piece of work of the same kind: how fast this shared machine is just now"
        with torch.random.fork_rng():
            start = time.process_time()
            self.model(**self.batch).loss.backward()
            self.model.zero_grad()
        self.fixed.append(time.process_time()-start)
    def on_step_begin(self, args, state, control, **kwargs):
        now = time.process_time()
        # from one step to the next: all that happens between them, saving and logging included
        if self.last is not None: self.cpu.append(now-self.last)
        if state.global_step%10==0: self.measure()
        self.last = time.process_time()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step%block==0: gc.collect(); self.rss[state.global_step] = self.process.memory_info().rss
    def on_save(self, args, state, control, **kwargs):
        files = (Path(args.output_dir)/f'checkpoint-{state.global_step}').iterdir()
        self.sizes[state.global_step] = sum(p.stat().st_size for p in files)

def run(
    steps, # How many
    folder, # For its checkpoints
): # The callbacks of IST and of the meter
    warnings.simplefilter('ignore')
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    meter,cb = Meter(),ISTCallback(ISTConfig(score_interval=5))
    args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3,
                             report_to='none', logging_steps=block, save_steps=min(save_steps, steps),
                             save_total_limit=2, use_cpu=True, disable_tqdm=True)
    t = Trainer(kp.tiny_model(), args, train_dataset=Dataset.from_list(kp.rows()), callbacks=[meter, cb, RunGuard()])
    t.pop_callback(PrinterCallback)
    t.train()
    return cb,meter

def summary(cb, meter):
    "What must not have grown"
    med = lambda xs: statistics.median(xs)*1000
    first,last = meter.cpu[warm:warm+block],meter.cpu[-block:]
    first_fixed,last_fixed = meter.fixed[warm//10:(warm+block)//10],meter.fixed[-block//10:]
    flat = [v for k,v in meter.rss.items() if k>=warm]
    sizes = [v for k,v in meter.sizes.items() if k>2*warm]
    return dict(steps=len(meter.cpu)+1, warm=warm, block=block,
                rss_mib={k:round(v/2**20, 1) for k,v in meter.rss.items()}, rss_growth=flat[-1]/flat[0]-1,
                rss_spread=max(flat)/min(flat)-1,
                importance_updates=len(meter.cpu)//cb.config.score_interval, history_records=len(cb.ist.history),
                history_limit=_history_limit, checkpoint_bytes=meter.sizes, checkpoint_spread=max(sizes)/min(sizes)-1,
                first_ms=med(first), last_ms=med(last), first_fixed_ms=med(first_fixed), last_fixed_ms=med(last_fixed),
                first_steps=med(first)/med(first_fixed), last_steps=med(last)/med(last_fixed),
                slower=med(last)/med(last_fixed)/(med(first)/med(first_fixed))-1,
                block_ms=[round(med(meter.cpu[i:i+block]), 3) for i in range(0, len(meter.cpu), block)],
                block_fixed_ms=[round(med(meter.fixed[i:i+block//10]), 3)
                                for i in range(0, len(meter.fixed), block//10)])

def main(
    out:Path='long_run', # Where the numbers go
):
    with tempfile.TemporaryDirectory() as d: found = summary(*run(steps, d))
    head = record.about('memory, history, checkpoints and time of a long run', 'accelerate', threads=1)
    print(record.save(out, head, **found), f"{found['slower']:+.1%} time, {found['rss_growth']:+.2%} memory")
