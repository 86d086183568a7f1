"""A training step beside what people would pick: Unsloth, TRL with packing, Liger, PEFT with torch.compile, and ours.
Each contender has a process of its own, because Unsloth patches other libraries when it is imported. Contenders that
are alive together take turns, and one that fails is recorded with what failed."""
import gc,json,os,select,signal,subprocess,sys,tempfile,time,traceback
from collections import Counter,defaultdict
from dataclasses import replace
from importlib import import_module
from math import exp,log
from pathlib import Path
from statistics import mean
from benchmarks import record

shapes = {   # of Llama: vocabulary, width, width of the MLP, blocks, heads, key and value heads, tied embeddings
    '1b':(128256, 2048, 8192, 16, 32, 8, True), '8b':(128256, 4096, 14336, 32, 32, 8, False),
    '70b':(128256, 8192, 28672, 80, 64, 8, False), 'tiny':(4096, 64, 128, 4, 4, 2, True),
    '135m':(49152, 576, 1536, 30, 9, 3, True)}    # of SmolLM2
where = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
rank,warm,settle = 16,4,2   # steps before the first round, in which libraries compile, and before each round
packages = 'accelerate trl datasets unsloth unsloth_zoo liger_kernel bitsandbytes torchao triton xformers'
fused = {o:False for o in ('rope', 'swiglu', 'rms_norm', 'cross_entropy')} | dict(fused_linear_cross_entropy=True)

eight = 'fold,compile,fp8,loss'    # what `fast=True` does in a long run, with products in 8 bits
# kind, its arguments; `needs` is imported first, so that what is missing is named before a model is loaded
variants = {
    'PEFT':('trainer', {}),
    'PEFT, compiled':('trainer', dict(torch_compile=True)),
    'TRL, rows':('trl', dict(packing='wrapped')),
    'TRL, rows, Liger':('trl', dict(packing='wrapped', use_liger_kernel=True, needs='liger_kernel')),
    'TRL, padding-free, sdpa':('trl', dict(packing='bfd')),
    'TRL, padding-free, flex, Liger':('trl', dict(packing='bfd', attention='flex_attention', use_liger_kernel=True,
                                                  needs='liger_kernel')),
    'TRL, padding-free, flash, Liger':('trl', dict(packing='bfd', attention='flash_attention_2',
                                                   use_liger_kernel=True, needs='flash_attn')),
    'Unsloth, rows':('unsloth', dict(packing=None, needs='unsloth')),
    'Unsloth, packed':('unsloth', dict(packing='bfd', needs='unsloth')),
    'Unsloth, packed, xformers':('unsloth', dict(packing='bfd', needs='unsloth xformers')),
    'LoRA, fast':('ours', dict(config=dict(fast=True))),
    'LoRA, fast, in TRL':('trl', dict(packing='wrapped', config=dict(fast=True))),     # as `ist_finetune` trains
    'LoRA, fast, in TRL, offloaded':('trl', dict(packing='wrapped', config=dict(fast=True),
                                                 activation_offloading=True)),
    'LoRA, fast, Liger loss':('ours', dict(config=dict(fast=True), liger=True, needs='liger_kernel')),
    'LoRA, fast, budget':('ours', dict(config=dict(fast=True))),    # of `--budget`, as large as a peer's peak, say
    'recommended':('ours', dict(config=dict(recommended=True))),
    'recommended, budget':('ours', dict(config=dict(recommended=True))),
    'LoRA, fold':('ours', dict(config=dict(fast='fold'))),       # what a run that is too short to compile may use
    'LoRA, fold, loss':('ours', dict(config=dict(fast='fold,loss'))),
    'recommended, not fast':('ours', dict(config=dict(recommended=True, fast=False))),
    'recommended, fold, loss':('ours', dict(config=dict(recommended=True, fast='fold,loss'))),
    'LoRA, fp8':('ours', dict(config=dict(fast=eight), needs='torchao')),
    'recommended, fp8':('ours', dict(config=dict(recommended=True, fast=eight), needs='torchao')),
    'recommended, Liger loss':('ours', dict(config=dict(recommended=True), liger=True, needs='liger_kernel')),
}
usual = ['PEFT', 'PEFT, compiled', 'TRL, rows, Liger', 'TRL, padding-free, flex, Liger', 'Unsloth, rows',
         'Unsloth, packed', 'LoRA, fast', 'recommended', 'recommended, Liger loss', 'TRL, padding-free, flash, Liger']
on_cpu = ['PEFT', 'TRL, rows', 'TRL, padding-free, sdpa', 'Unsloth, packed', 'LoRA, fast', 'LoRA, fast, in TRL',
          'recommended']

# ------------------------------------------------------------------- in the child; libraries are imported when needed
class Turn:
    "The child's end of the conversation: it tells one thing, and waits to be told to go on"
    def __init__(self, fd): self.fd = fd
    def tell(self, **said): os.write(self.fd, (json.dumps(said)+'\n').encode())
    def wait(self, cuda):
        if cuda:
            import torch
            gc.collect()
            torch.cuda.empty_cache()   # others run meanwhile
        if sys.stdin.readline().strip()!='go': sys.exit(0)

def config_of(shape, **kwargs):
    from transformers import LlamaConfig
    v,h,f,n,a,kv,tied = shapes[shape]
    return LlamaConfig(vocab_size=v, hidden_size=h, intermediate_size=f, num_hidden_layers=n, num_attention_heads=a,
                       num_key_value_heads=kv, tie_word_embeddings=tied, max_position_embeddings=8192,
                       rope_parameters=dict(rope_type='default', rope_theta=500000.), rms_norm_eps=1e-5, **kwargs)

def random_model(spec, device, **kwargs):
    "A Llama of the true shape with random weights, made on the device"
    import torch
    from transformers import LlamaForCausalLM
    config = config_of(spec['shape'], **kwargs)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype_of(spec))
    try:
        with torch.device(device): return LlamaForCausalLM(config)
    finally: torch.set_default_dtype(torch.float32)

def make_folder(spec):
    "A model with random weights and pico's tokenizer, as any local folder"
    from transformers import AutoTokenizer
    from ist_nb.finetune import assets
    tok = AutoTokenizer.from_pretrained(str(assets/'pico'))
    model = random_model(spec, spec['device'], bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
                         pad_token_id=tok.pad_token_id)
    model.save_pretrained(spec['folder'], max_shard_size='4GB')
    tok.save_pretrained(spec['folder'])

def dtype_of(spec):
    import torch
    return torch.bfloat16 if spec['device']=='cuda' else torch.float32

def load(spec, attention='sdpa', prepare=False):
    "The base model, in 4 bits if so wished; `prepare` is what PEFT's guide does to such a model"
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM,BitsAndBytesConfig
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=dtype_of(spec),
                              bnb_4bit_use_double_quant=True) if spec['bits']==4 else None
    model = AutoModelForCausalLM.from_pretrained(spec['folder'], dtype=dtype_of(spec), attn_implementation=attention,
                                                 device_map={'':spec['device']}, quantization_config=four)
    model.config.use_cache = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if four and prepare else model

def lora():
    from peft import LoraConfig
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0., target_modules=where, task_type='CAUSAL_LM')

def data_of(spec, packed=False, labels=False):
    "Rows of random tokens, or the documents that fill them, enough for all steps of a run; TRL makes labels itself"
    import torch
    from datasets import Dataset
    rows = spec['batch']*max(all_steps(spec), spec['steps']+1)
    length = spec['length']//spec['documents'] if packed else spec['length']
    ids = torch.randint(5, shapes[spec['shape']][0], (rows, spec['length']), generator=torch.Generator().manual_seed(0))
    ids = ids.view(-1, length).tolist()
    return Dataset.from_dict(dict(input_ids=ids) | (dict(labels=ids) if labels else {}))

def arguments(cls, spec, steps, **kwargs):
    cuda = spec['device']=='cuda'
    shared = dict(max_steps=steps, per_device_train_batch_size=spec['batch'], learning_rate=1e-4, bf16=cuda,
                  gradient_accumulation_steps=1,   # Unsloth's default is 2
                  gradient_checkpointing=spec['checkpointing'], report_to='none', logging_steps=10, disable_tqdm=True,
                  save_strategy='no', seed=0, use_cpu=not cuda)
    kwargs = shared | kwargs
    return cls('run', **{k:v for k,v in kwargs.items() if v is not None})

def clock_of(spec, turn):
    """A callback that times rounds of steps inside one run. Between two rounds it hands over; the steps after it, in
    which memory is taken again, are not timed."""
    import torch
    from transformers import TrainerCallback
    cuda = spec['device']=='cuda'
    wait = torch.cuda.synchronize if cuda else lambda: None
    class Clock(TrainerCallback):
        def __init__(self): self.t,self.begins,self.start = 0,warm,None
        def on_step_begin(self, *args, **kwargs):
            if self.t==self.begins+settle:
                wait()
                if cuda: torch.cuda.reset_peak_memory_stats()
                self.start = time.perf_counter()
            elif self.t==self.begins: hand_over(turn, cuda)
            self.t += 1
        def on_step_end(self, args, state, control, **kwargs):
            if self.start is None or self.t<self.begins+settle+spec['steps']: return
            wait()
            turn.tell(seconds=(time.perf_counter()-self.start)/spec['steps'], peak=peak(cuda))
            self.begins,self.start = self.t,None   # after the last round the run ends
    return Clock()

def hand_over(turn, cuda):
    turn.tell(ready=True)
    turn.wait(cuda)

def peak(cuda):
    import torch
    return torch.cuda.max_memory_allocated() if cuda else None

def quiet(trainer):
    from transformers.trainer_callback import PrinterCallback,ProgressCallback
    for o in (PrinterCallback, ProgressCallback): trainer.pop_callback(o)
    return trainer

def all_steps(spec): return warm+spec['rounds']*(spec['steps']+settle)

def told(spec, turn, trainer):
    "The whole run of a trainer whose clock hands over between rounds"
    rows = trainer.args.per_device_train_batch_size*trainer.args.gradient_accumulation_steps
    if rows!=spec['batch']: raise ValueError(f"a step has {rows} rows in place of {spec['batch']}")
    found = quiet(trainer).train()
    turn.tell(done=True, loss=found.training_loss)

def plain_trainer(spec, turn, **kwargs):
    from peft import get_peft_model
    from transformers import Trainer,TrainingArguments,default_data_collator
    model = loaded(turn, get_peft_model(load(spec, prepare=True), lora()), spec)
    told(spec, turn, Trainer(model, arguments(TrainingArguments, spec, all_steps(spec), **kwargs),
                             train_dataset=data_of(spec, labels=True), data_collator=default_data_collator,
                             callbacks=[clock_of(spec, turn)]))

def loaded(turn, model, spec):
    "Tell what the model takes before it is trained, and on what; the first steps wait for their turn"
    import torch
    cuda = spec['device']=='cuda'
    gc.collect()
    turn.tell(loaded=torch.cuda.memory_allocated() if cuda else None, versions=record.versions(*packages.split()),
              hardware=record.hardware(gpu=True) if cuda else record.hardware(torch.get_num_threads()),
              trained=sum(p.numel() for p in model.parameters() if p.requires_grad))
    turn.wait(cuda)
    return model

def as_long(config, cuda, names='fold,compile,loss'):
    "With what `fast=True` does in a run that is longer than those here"
    return replace(config, fast=names) if cuda and config.fast is True else config

def trl_arguments(spec, packing, **kwargs):
    "`packing`: 'bfd' is padding-free, and a batch is one row; 'wrapped' makes rows; None takes rows as they are"
    from trl import SFTConfig
    how = dict(packing=True, packing_strategy=packing) if packing else dict(packing=False, padding_free=False)
    return arguments(SFTConfig, spec, all_steps(spec), max_length=spec['length'], **how, **kwargs)

def trl_trainer(spec, turn, packing, attention='sdpa', config=None, **kwargs):
    from peft import get_peft_model
    from transformers import AutoTokenizer
    from trl import SFTTrainer   # before a model is loaded
    if config:
        from ist_nb import ISTCallback,ISTConfig
        config = ISTConfig.rst(n_active=1., **config)
        config = [ISTCallback(as_long(config, spec['device']=='cuda', 'fold,compile'))]
    # TRL takes a model with adapters as it takes one and a LoraConfig
    model = loaded(turn, get_peft_model(load(spec, attention), lora()), spec)
    told(spec, turn, SFTTrainer(model, trl_arguments(spec, packing, **kwargs),
                                train_dataset=data_of(spec, bool(packing)),
                                processing_class=AutoTokenizer.from_pretrained(spec['folder']),
                                callbacks=[clock_of(spec, turn), *(config or [])]))

def unsloth_trainer(spec, turn, packing):
    "As Unsloth's guides do it; its import comes before those of the libraries that it patches"
    from unsloth import FastLanguageModel
    from trl import SFTTrainer
    if 'xformers' in spec['name']:
        from unsloth.utils.attention_dispatch import HAS_XFORMERS
        if not HAS_XFORMERS: raise ImportError('Unsloth cannot load xformers beside this torch, and would do without.')
    how = dict(use_gradient_checkpointing='unsloth' if spec['checkpointing'] else False)
    model,tok = FastLanguageModel.from_pretrained(spec['folder'], max_seq_length=spec['length'], dtype=dtype_of(spec),
                                                  load_in_4bit=spec['bits']==4, **how)
    model = FastLanguageModel.get_peft_model(model, r=rank, target_modules=where, lora_alpha=rank, lora_dropout=0,
                                             bias='none', random_state=0, **how)
    loaded(turn, model, spec)
    # checkpointing follows from the model
    args = trl_arguments(spec, packing, gradient_checkpointing=None)
    told(spec, turn, SFTTrainer(model=model, processing_class=tok, args=args,
                                train_dataset=data_of(spec, bool(packing)), callbacks=[clock_of(spec, turn)]))

def ours(spec, turn, config, liger=False):
    """In the Trainer with `ISTCallback`. A schedule is timed over a whole run, because its first steps cost more than
    its last ones, from the second step on: the first takes memory, and the others train as many layers on average as
    those of a long run. Before each, a short run compiles."""
    import torch
    from peft import get_peft_model
    from transformers import Trainer,TrainingArguments,default_data_collator
    from ist_nb import ISTCallback,ISTConfig
    cuda,config = spec['device']=='cuda',dict(config)
    if 'budget' in spec['name']: config['activation_budget'] = spec['budget']
    make = ISTConfig.recommended if config.pop('recommended', False) else lambda **kw: ISTConfig.rst(n_active=1., **kw)
    model,data = loaded(turn, get_peft_model(load(spec), lora()), spec),data_of(spec, labels=True)
    how = dict(use_liger_kernel=True, liger_kernel_config=fused) if liger else {}
    def trained(steps, *callbacks):
        args = arguments(TrainingArguments, spec, steps, **how)
        found = quiet(Trainer(model, args, train_dataset=data, data_collator=default_data_collator,
                              callbacks=[*callbacks, ISTCallback(as_long(make(**config), cuda))])).train()
        if spec['checkpointing']:
            model.gradient_checkpointing_disable()
            if hasattr(model, 'disable_input_require_grads'): model.disable_input_require_grads()
        # accelerate puts its autocast around a model once
        for k in ('forward', '_original_forward', '_is_accelerate_prepared'): model.__dict__.pop(k, None)
        gc.collect()
        return found.training_loss
    trained(warm)
    for _ in range(spec['rounds']):
        hand_over(turn, cuda)
        trained(settle)
        whole = whole_run(spec, cuda)
        loss = trained(1+spec['steps'], whole)
        turn.tell(seconds=whole.seconds, peak=whole.peak)
    turn.tell(done=True, loss=loss)

def whole_run(spec, cuda):
    "A callback that times a run of `steps` steps after a first one"
    import torch
    from transformers import TrainerCallback
    class Whole(TrainerCallback):
        def __init__(self): self.t,self.start,self.seconds,self.peak = 0,None,None,None
        def on_step_begin(self, *args, **kwargs):
            if self.t==0 and cuda: torch.cuda.reset_peak_memory_stats()
            if self.t==1:
                if cuda: torch.cuda.synchronize()
                self.start = time.perf_counter()
            self.t += 1
        def on_step_end(self, *args, **kwargs):
            if self.t<=spec['steps']: return
            if cuda: torch.cuda.synchronize()
            self.seconds,self.peak = (time.perf_counter()-self.start)/spec['steps'],peak(cuda)
    return Whole()

kinds = dict(trainer=plain_trainer, trl=trl_trainer, unsloth=unsloth_trainer, ours=ours)

def child(spec, fd):
    turn = Turn(fd)
    try:
        if spec['name']=='make': make_folder(spec)
        else:
            kind,kwargs = variants[spec['name']]
            for o in kwargs.get('needs', '').split(): import_module(o)
            kinds[kind](spec, turn, **{k:v for k,v in kwargs.items() if k!='needs'})
    except Exception as e:
        where = traceback.format_exc()[-2000:].replace(f'{record.root}/', '')
        turn.tell(failed=f'{type(e).__name__}: {" ".join(str(e).split())}'[:400], where=where)
    else: turn.tell(finished=True)

# ------------------------------------------------------------------------------------------------------ in the parent
def command(spec, fd): return [sys.executable, '-m', 'benchmarks.peers', json.dumps(spec), str(fd)]

class Child:
    "A contender's process: what it tells, a line at a time, until it ends, is too slow or is closed"
    def __init__(self, spec, xformers=''):
        self.name,self.said,self.failed,self.where,self.rounds = spec['name'],{},None,None,[]
        path = [str(record.root), *filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))]
        env = dict(CUDA_VISIBLE_DEVICES='0') | os.environ | dict(
            HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false',
            UNSLOTH_DISABLE_STATISTICS='1', PYTHONWARNINGS='ignore', HF_DATASETS_CACHE=f"{spec['folder']}/datasets",
            PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True')
        if spec.get('cold'):    # nobody has compiled its graphs before
            cache = tempfile.mkdtemp(dir=spec['folder'])
            env |= dict(TORCHINDUCTOR_CACHE_DIR=f'{cache}/inductor', TRITON_CACHE_DIR=f'{cache}/triton')
        if xformers and 'xformers' in spec['name']:
            path.append(xformers)
            env['LD_LIBRARY_PATH'] = os.pathsep.join(filter(None, [f'{xformers}/lib', env.get('LD_LIBRARY_PATH')]))
        r,w = os.pipe()
        own = Path(spec['folder'], 'work', spec['name'].replace(' ', '_').replace(',', ''))
        own.mkdir(parents=True, exist_ok=True)   # Unsloth writes what it compiles into the working directory
        self.log = open(own/'log', 'w+', errors='replace')   # a bar of progress may be cut within a character
        self.process = subprocess.Popen(command(spec, w), stdin=subprocess.PIPE, stdout=self.log, stderr=self.log,
                                        text=True, pass_fds=[w], env=env | dict(PYTHONPATH=os.pathsep.join(path)),
                                        cwd=own, start_new_session=True)
        os.close(w)
        self.pipe,self.rest = r,b''

    def until(self, key, seconds):
        "Read until `key` is told; whether it was"
        end = time.monotonic()+seconds
        while not self.failed:
            *lines,self.rest = self.rest.split(b'\n')
            for i,line in enumerate(lines):
                said = json.loads(line)
                if 'failed' in said: self.fail(said['failed'], said['where'])
                elif 'seconds' in said: self.rounds.append(said)
                self.said |= said
                if key in said:
                    self.rest = b'\n'.join([*lines[i+1:], self.rest])
                    return True
            if self.failed: break
            ready,_,_ = select.select([self.pipe], [], [], max(0, end-time.monotonic()))
            if not ready: self.fail(f'not {key} after {seconds:.0f} s')
            elif chunk := os.read(self.pipe, 65536): self.rest += chunk
            else: self.fail(f'the process ended with {self.process.wait()} and was not {key}')
        return False

    def go(self):
        try:
            self.process.stdin.write('go\n')
            self.process.stdin.flush()
        except OSError: self.fail('the process has ended')

    def fail(self, why, where=None):
        self.log.flush()
        self.log.seek(0)
        self.failed = why
        self.where = where or self.log.read()[-2000:].replace(f'{record.root}/', '')
        self.close()

    def close(self):
        "End the process and those that it started"
        if self.process.poll() is None:
            try: os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.process.wait()
        if self.pipe is not None:
            os.close(self.pipe)
            self.log.close()
            self.process.stdin.close()
            self.pipe = None

def case_of(spec, runs, failed, wheres):
    "What is known of a case: medians with the least and the most of the rounds"
    from benchmarks.small import spread
    def of(rounds, said):
        s = spread([o['seconds'] for o in rounds])
        return dict(seconds=s, tokens_a_second=spec['batch']*spec['length']/s['median'],
                    peak=spread([o['peak'] for o in rounds]), weights=said.get('loaded'), trained=said.get('trained'),
                    loss=said.get('loss'), warm=said.get('warm'), rounds=len(rounds))
    found = {k:of(v, said) for k,(v,said) in runs.items() if v}
    keys = 'shape', 'bits', 'batch', 'length', 'documents', 'checkpointing', 'steps', 'budget', 'cold'
    asked = {k:spec[k] for k in keys if spec[k] is not None} | dict(first=1)    # the first timed step of a schedule
    return asked | dict(rank=rank, variants=found, failed=failed, where=wheres)

def line(name, case):
    "One line on a variant, for people"
    if name in case['failed']: return f"{name:34} failed: {case['failed'][name]}"
    v = case['variants'].get(name)
    if not v: return f'{name:34} not run'
    memory = f"{v['peak']['median']/2**30:6.2f} GiB" if v['peak'] else ''
    return (f"{name:34} {v['seconds']['median']*1e3:8.1f} ms ({v['seconds']['min']*1e3:.1f} to "
            f"{v['seconds']['max']*1e3:.1f}) {v['tokens_a_second']:9.0f} tokens/s {memory}")

def groups(names, n): return [names[i:i+n] for i in range(0, len(names), n)]

def measure(spec, names, alive, passes, limit, seconds, xformers, about, save):
    "Let the contenders of a case take turns; `save` gets what is known after each turn"
    start,runs,failed,wheres,on = time.monotonic(),{k:([], {}) for k in names},{},{},{}
    took = lambda: time.monotonic()-start
    allowed = lambda: max(1, min(limit, seconds-took()))
    def note(c, r='', new=()):
        rounds,said = runs[c.name]
        rounds.extend(new)
        said.update(c.said)
        if 'versions' in c.said:
            on.update(hardware=c.said['hardware'], versions=on.get('versions', {}) | c.said['versions'])
        if c.failed:
            wheres[c.name] = c.where
            if not rounds: failed[c.name] = c.failed
        case = about() | on | case_of(spec, runs, failed, wheres)
        save(case)
        then = f'; then {c.failed}' if c.failed and rounds else ''
        print(f'[{took():.0f} s] {r} {line(c.name, case)}{then}', flush=True)
    for p in range(passes):
        for group in groups(names[::-1] if p%2 else names, alive):
            living = []
            try:
                for name in group:   # they import and load side by side
                    if name not in failed and seconds-took()>30: living.append(Child(spec | dict(name=name), xformers))
                for c in living:
                    if c.until('loaded', allowed()): c.go()
                    begun = time.monotonic()
                    if not c.until('ready', allowed()): note(c)
                    c.said['warm'] = time.monotonic()-begun     # seconds of the first steps, and of compiling
                for r in range(spec['rounds']):
                    for c in (living[::-1] if r%2 else living):
                        if c.failed or seconds-took()<5: continue
                        c.go()
                        c.until('seconds', allowed())
                        if not c.failed: c.until('ready' if r<spec['rounds']-1 else 'done', allowed())
                        note(c, r, c.rounds[r:])
            finally:
                for c in living: c.close()
    return about() | on | case_of(spec, runs, failed, wheres)

def made(spec, limit):
    "The folder of a shape, made once"
    Path(spec['folder']).mkdir(parents=True, exist_ok=True)
    if Path(spec['folder'], 'tokenizer.json').exists(): return
    c = Child(spec | dict(name='make'))
    ok = c.until('finished', limit)
    c.close()
    if not ok: raise SystemExit(f'The model could not be made: {c.failed}\n{c.where}')

# ------------------------------------------------------------------------------------ seconds to the same held-out loss
def steps_to(points, loss):
    """Steps after which a way to train reaches a held-out loss: `points` are pairs of the steps of a run and the loss
    at its end. Between two runs the loss falls linearly in the logarithm of the steps. None: no run is long enough."""
    best,before = float('inf'),None
    for steps,value in sorted(points):
        if value<=loss:
            if before is None or before[1]<=value: return steps
            share = (before[1]-loss)/(before[1]-value)
            return exp(log(before[0])+share*(log(steps)-log(before[0])))
        if value<best: best,before = value,(steps, value)
    return None

def way(name):
    "How a variant learns: all libraries compute the same LoRA, and freezing has a curve of its own"
    return 'recommended' if name.startswith('recommended') else 'LoRA'

def seconds_to(runs, seconds, loss, learns_as=way):
    """Seconds that each variant takes to a held-out loss, by seed. `runs` are of learning: a list of `name`, `seed`,
    `steps` and `loss`. `seconds` are those of a step, by variant; `learns_as` names the runs of a variant"""
    found = {}
    for variant,step in seconds.items():
        mine = [r for r in runs if r['name']==learns_as(variant)]
        by_seed = {s:steps_to([(r['steps'], r['loss']) for r in mine if r['seed']==s], loss)
                   for s in dict.fromkeys(r['seed'] for r in mine)}
        if mine: found[variant] = dict(seconds={s:n*step for s,n in by_seed.items() if n is not None},
                                       missed=[s for s,n in by_seed.items() if n is None])
    return found

def learnt(task, model='SmolLM2-135M-Instruct'):
    """Runs of `retain --plan lengths` for `seconds_to`: each length with the rate that seed 0 chose for it, of those
    other seeds that have run all lengths"""
    from benchmarks.frontier import final
    from benchmarks.retain import best_rate
    runs = [r for r in record.read(f'retain_lengths_{model}')['runs'] if r['task']==task]
    runs = [r for r in runs if r['seed'] and r['lr']==best_rate(runs, r)]
    count = Counter(r['seed'] for r in runs)
    return [dict(name=r['name'], lr=r['lr'], seed=r['seed'], steps=r['steps'], loss=final(r)) for r in runs
            if count[r['seed']]==max(count.values())]

def level_of(runs, name='recommended'):
    "The loss that a way to train reaches on every seed, at the length at which it is best"
    by = defaultdict(list)
    for r in runs:
        if r['name']==name: by[r['steps']].append(r['loss'])
    return max(min(by.values(), key=mean))

def to_same_loss(case, task):
    "Of a case: seconds of each variant to the loss of `recommended`, and its steps, as means over seeds"
    runs,step = learnt(task),{k:v['seconds']['median'] for k,v in case['variants'].items()}
    found = seconds_to(runs, step, level_of(runs))
    return {k:(mean(o['seconds'].values()), mean(o['seconds'].values())/step[k]) for k,o in found.items()
            if not o['missed']}

def merged(files):
    """The cases of several files as one list, without what was printed where one failed; a later case of the same
    settings replaces an earlier one"""
    keys = 'shape', 'bits', 'batch', 'length', 'documents', 'checkpointing', 'budget', 'cold', 'hardware'
    cases = [c for f in files for c in json.loads(Path(f).read_text())['cases']]
    return list({tuple(c.get(k) for k in keys):{k:v for k,v in c.items() if k!='where'} for c in cases}.values())

def main(
    shape:str='1b',      # 1b and 8b (Llama 3), 135m (SmolLM2), or tiny
    rows:str='16x256',   # Rows x tokens in a batch, separated by commas, such as 16x256,4x2048
    bits:str='16',       # 16 or 4 or both, separated by a comma
    documents:int=1,     # Documents in a row: what packing packs
    checkpointing:bool=False, # Each contender's own gradient checkpointing
    cold:bool=False,     # Each contender compiles anew, so that the seconds of its first steps can be compared
    budget:str=None,     # The `activation_budget` of the variants with one, such as 8GiB
    steps:int=20,        # Steps of a round
    rounds:int=3,        # Rounds while the processes of a group live
    passes:int=1,        # How often all are started anew, every other time in reverse order
    alive:int=0,         # Contenders alive together; 0: what the memory holds
    only:str='',         # Variants separated by semicolons; `all`, or the usual ones if empty
    seconds:float=540,   # Start nothing after so many seconds
    limit:float=200,     # Seconds that one contender may take to load and compile, or for a round
    device:str='cuda',   # cuda or cpu
    xformers:str='',     # A folder with xformers, and in its `lib` the CUDA runtime that it needs, for one variant
    folder:str='',       # Where the models go; a temporary folder if empty
    merge:str='',        # Files of earlier calls, separated by spaces, to put into one; nothing is run
    out:Path='peers',    # Where the numbers go
):
    named = {k:v for k,v in dict(FOLDER=folder, XFORMERS=xformers, FILES=merge).items() if v}   # not of this machine
    head = dict(what='seconds a step and peak memory beside other libraries', command=record.typed(**named))
    about = lambda: {k:v for k,v in record.about('a training step', **named).items() if k!='what'}
    if merge: return record.save(out, head, cases=merged(merge.split()))
    known = list(variants) if device=='cuda' else on_cpu
    names = known if only=='all' else [o.strip() for o in only.split(';') if o.strip()]
    names = names or (usual if device=='cuda' else on_cpu)
    if wrong := [o for o in names if o not in known]: raise SystemExit(f'No variant is called {wrong[0]!r}: {known}')
    start,found = time.monotonic(),[]
    root = os.path.abspath(folder or os.path.join(tempfile.gettempdir(), 'ist_peers'))
    base = dict(shape=shape, documents=documents, checkpointing=checkpointing, cold=cold or None, steps=steps,
                rounds=rounds, budget=budget, device=device, folder=os.path.join(root, f'{shape}_{device}'))
    for b in map(int, bits.split(',')):
        for o in rows.split(','):
            batch,length = map(int, o.split('x'))
            spec = base | dict(batch=batch, length=length, bits=b, name='make')
            made(spec, max(limit, 300))
            print(f'{shape}, {b} bits, {o}, checkpointing {checkpointing}', flush=True)
            n = alive or (1 if shape=='8b' and b==16 else 3 if shape=='8b' else 6)
            left = seconds-(time.monotonic()-start)
            case = measure(spec, names, n, passes, limit, left, xformers, about,
                           lambda case: record.save(out, head, cases=[*found, case]))
            found.append(case)
            record.save(out, head, cases=found)
            for k in names: print(line(k, case), flush=True)

if __name__=='__main__': child(json.loads(sys.argv[1]), int(sys.argv[2]))
