"A step that dies is undone, the data of the training is left alone, and what would train the wrong layers is refused"
import gc,itertools,random,sys,warnings,pytest,torch
import numpy as np
from functools import partial
from hashlib import blake2b
from pathlib import Path
from datasets import Dataset as Rows
from peft import LoraConfig,get_peft_model
from torch.optim import optimizer as hooks
from torch.utils.data import DataLoader,Dataset,IterableDataset
from transformers import LlamaConfig,LlamaForCausalLM,Trainer,TrainerCallback,TrainingArguments
from transformers.trainer_callback import PrinterCallback
from ist_nb import IST,ISTCallback,ISTConfig,ISTError
from ist_nb.probe import ProbeBatches
from ist_nb.speed import _embedding_hooks

def model(n=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=n,
                                        num_attention_heads=2, num_key_value_heads=2))
    m = get_peft_model(base, LoraConfig(r=2, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM', **kwargs))
    for n,p in m.named_parameters():
        # so that every parameter has a gradient from the first step
        if 'lora_B' in n: torch.nn.init.normal_(p, std=0.1)
    return m

def params(m): return [p for p in m.parameters() if p.requires_grad]
ids = (torch.arange(8)+torch.arange(32)[:, None])%32
def batch(n=4): return dict(input_ids=ids[:n], labels=ids[:n])
rst = lambda **kw: ISTConfig.rst(**dict(n_active=1) | kw)

# -- a step that dies
class Dies(TrainerCallback):
    def __init__(self, event, error):
        setattr(self, event, lambda args, state, *_, **__: self.die(error) if state.global_step==2 else None)
    def die(self, error): raise error

class DiesInside(Trainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step==2: raise torch.OutOfMemoryError('out of memory')
        return super().compute_loss(*args, **kwargs)

def make(m, folder, *callbacks, cls=Trainer, **kwargs):
    args = TrainingArguments(str(folder), **dict(max_steps=5, per_device_train_batch_size=4, report_to='none',
                                                 save_strategy='no', use_cpu=True, disable_tqdm=True) | kwargs)
    t = cls(m, args, train_dataset=Rows.from_list([dict(input_ids=o, labels=o) for o in ids.tolist()]),
            callbacks=list(callbacks))
    t.pop_callback(PrinterCallback)
    return t

def traces(m):
    "All that IST might leave on a model or in torch"
    compiled,forward = zip(*((o._compiled_call_impl, len(o._forward_hooks)) for o in m.modules()))
    marks = [k for p in m.parameters() for k in p.__dict__ if 'ist' in k]
    return ([p.requires_grad for p in m.parameters()],m.config.use_cache,compiled,len(_embedding_hooks(m)),forward,
            len(hooks._global_optimizer_pre_hooks),len(hooks._global_optimizer_post_hooks),marks)

deaths = dict(interrupt=lambda f, m, cb: make(m, f, cb, Dies('on_pre_optimizer_step', KeyboardInterrupt())),
              memory=lambda f, m, cb: make(m, f, cb, cls=DiesInside),
              before=lambda f, m, cb: make(m, f, Dies('on_step_begin', ValueError()), cb),
              behind=lambda f, m, cb: make(m, f, cb, Dies('on_step_begin', ValueError())),
              ends=lambda f, m, cb: make(m, f, Dies('on_step_end', ValueError()), cb),
              never=lambda f, m, cb: make(m, f, cb))

@pytest.mark.parametrize('death,late', [*((k, False) for k in deaths), ('interrupt', True), ('never', True)])
def test_whatever_ends_training_leaves_the_model_as_it_was(death, late, tmp_path):
    "Also where the callback was added later; then a plain Trainer trains every layer"
    m = model()
    m.enable_input_require_grads()
    cb = ISTCallback(ISTConfig(n_active=1, scorer='fisher', score_interval=2, activation_budget='2GiB'))
    t = deaths[death](tmp_path, m, cb)
    if late: t.remove_callback(cb); t.add_callback(cb)
    m.config.use_cache = True
    want = traces(m)
    if death=='never': t.train()
    else:
        with pytest.raises(BaseException) as e: t.train()
        assert not isinstance(e.value, ISTError)
    assert cb.ist.t==dict(never=5, ends=1).get(death, 2) and not cb.ist.in_step and traces(m)==want
    was = [p.detach().clone() for p in params(m)]
    make(m, tmp_path, max_steps=1).train()
    assert not any(torch.equal(a, b) for a,b in zip(was, params(m)))

def test_a_loop_that_dies():
    m = model(); m.enable_input_require_grads()
    want = traces(m)
    def loop(ist):
        ist.begin_step()
        assert sum(p.requires_grad for p in m.parameters())==4
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), IST(m, rst()) as ist: loop(ist)
    assert traces(m)==want and ist.t==0
    # nobody ends it, but nobody holds it either
    with pytest.raises(KeyboardInterrupt): loop(IST(m, rst(activation_budget='2GiB')))
    gc.collect()
    assert traces(m)[0]==want[0] and traces(m)[2]==want[2]
    ist = IST(m, rst())
    ist.begin_step()
    ist.end_step(False)                                     # who catches the error ends the step
    assert ist.t==0 and traces(m)[0]==want[0]
    ist.close(); ist.close()
    with ist.step(): pass                                   # and may go on
    assert ist.t==1

def test_an_IST_that_cannot_be_made_leaves_nothing():
    m = model(); m.enable_input_require_grads()
    want = traces(m)
    for wrong in (dict(optimizer_state='offload'), dict(activation_budget='1KiB', fast='fp8'),
                  dict(sampler='importance')):
        with pytest.raises(ISTError): IST(m, rst(**wrong))
        assert traces(m)==want

# -- the training's own data
shared_rng,counter = random.Random(5),0
class Plain(Dataset):
    "Rows whose numbers come from a state of the data set's own"
    def __init__(self, draw): self.draw,self.n = draw,0
    def __len__(self): return 24
    def __getitem__(self, i): self.n += 1; return torch.tensor([float(i), float(self.draw()), self.n])
class ByClass(Plain):
    seen = 0
    def __init__(self): super().__init__(lambda: 0)
    def __getitem__(self, i): ByClass.seen += 1; return torch.tensor([float(i), float(ByClass.seen)])
class Slots:
    __slots__ = 'rng','n'
    def __init__(self): self.rng,self.n = np.random.RandomState(1),torch.zeros(1)
    def __call__(self): self.n += 1; return self.rng.rand()+self.n.item()
class CountsInSlot:
    "A number that is put into its slot anew"
    __slots__ = 'n',
    def __init__(self): self.n = 0
    def __call__(self): self.n += 1; return self.n
class Pops(Dataset):
    "Gives its own rows away"
    # more than a probe looks through
    def __init__(self, n=1200): self.rows = [dict(x=torch.tensor(float(i)), y=torch.tensor(1.)) for i in range(n)]
    def __len__(self): return len(self.rows)
    def __getitem__(self, i): return self.rows[i]
def pop(rows): return torch.stack([r.pop('x') for r in rows])
def by_closure():
    g,n = torch.Generator().manual_seed(3),0
    def f(): nonlocal n; n += 1; return torch.rand((), generator=g).item()+n
    return f
def by_variable():
    global counter
    counter += 1
    return shared_rng.random()+counter
class Stream(IterableDataset):
    "Rows from where the last reader stopped"
    def __init__(self): self.pos,self.rng = 0,np.random.default_rng(2)
    def __iter__(self):
        while self.pos<24: self.pos += 1; yield torch.tensor([self.pos, self.rng.random()])
class OneIterator(IterableDataset):
    def __init__(self): self.it = iter(torch.arange(24.).tolist())
    def __iter__(self): return (torch.tensor([o, by_variable()]) for o in self.it)

class Collate:
    def __init__(self, rng, draw): self.rng,self.draw,self.log = rng,draw,[]
    def __call__(self, rows): self.log.append(len(rows)); return torch.stack(rows)+self.draw(self.rng)+len(self.log)

def hf():
    rng = np.random.default_rng(0)
    ds = Rows.from_dict(dict(x=[float(i) for i in range(24)]))
    ds.set_transform(lambda rows: dict(x=[torch.tensor(o+rng.random()) for o in rows['x']]))
    return ds

def own(rows): return torch.stack([r['x'] for r in rows])
data = dict(closure=lambda: (Plain(by_closure()), None), variable=lambda: (Plain(by_variable), None),
            method=lambda: (Plain(random.Random(1).random), None),
            bound=lambda: (Plain(np.random.default_rng(1).random), None),
            iterator=lambda: (Plain(itertools.count().__next__), None), slots=lambda: (Plain(Slots()), None),
            slot=lambda: (Plain(CountsInSlot()), None), of_class=lambda: (ByClass(), None),
            transform=lambda: (hf(), own),
            collate_torch=lambda: ([torch.zeros(2)]*24,
                                   Collate(torch.Generator().manual_seed(0), lambda g: torch.rand(2, generator=g))),
            collate_numpy=lambda: ([torch.zeros(2)]*24, Collate(np.random.default_rng(0), lambda g: g.random())),
            collate_python=lambda: ([torch.zeros(2)]*24, Collate(random.Random(0), lambda g: g.random())),
            collate_iterator=lambda: ([torch.zeros(2)]*24, Collate(itertools.cycle([1, 2, 3, 5]), next)),
            globals=lambda: ([torch.zeros(2)]*24,
                             Collate(None, lambda _: torch.rand(())+random.random()+np.random.rand())),
            stream=lambda: (Stream(), None), one_iterator=lambda: (OneIterator(), None))

def read(kind, ist):
    "What a training sees of the data"
    global counter
    counter,ByClass.seen = 0,0
    shared_rng.seed(5); random.seed(0); np.random.seed(0); torch.manual_seed(0)
    ds,collate = data[kind]()
    shuffle = dict(shuffle=True,
                   generator=torch.Generator().manual_seed(0)) if not isinstance(ds, IterableDataset) else {}
    loader,seen,probed = DataLoader(ds, batch_size=4, collate_fn=collate, **shuffle),[],[]
    m = small
    ist = IST(m, ISTConfig(score_interval=1, score_batch_size=3, n_active=1.0), probe=loader,
              loss_fn=lambda model, b: probed.append(b) or torch.tensor(1.)) if ist else None
    for b in loader:
        seen.append(b)
        if ist:
            with ist.step(): pass
    return seen,probed
small = model(2)

@pytest.mark.parametrize('kind', data)
def test_a_probe_changes_no_batch_of_the_training(kind):
    (want,_),(got,probed) = read(kind, False),read(kind, True)
    assert len(want)==len(got)==6 and all(map(torch.equal, want, got)) and len(probed)>=9
    assert any(not torch.equal(want[0], o) for o in want)     # the state is seen

def test_a_probe_leaves_the_rows():
    "Of a data set that gives its own rows to a collate function that takes them apart"
    loader = DataLoader(Pops(), batch_size=4, collate_fn=pop)
    probe = ProbeBatches(loader, 400, 0)
    assert torch.cat([probe[m]
                      for m in range(3)]).sort().values.tolist()==torch.cat(list(loader)).tolist()==list(range(1200))

class Counts:
    "A class with instances that are iterators, which a collate function may name"
    def __iter__(self): return self
    def __next__(self): return 1
def test_a_class_is_no_iterator():
    assert ProbeBatches(DataLoader([torch.zeros(1)]*8, collate_fn=Collate(None, lambda _: next(Counts()))), 4,
                        0)[0].shape==(4, 1)

def test_what_cannot_be_copied_is_refused():
    once = (i for i in range(10**6))
    class Gen(IterableDataset):
        def __init__(self): self.rows = (torch.zeros(1) for _ in range(9))
        def __iter__(self): return self.rows
    for loader in (DataLoader(Plain(lambda: next(once))), DataLoader(Gen()),
                   DataLoader([torch.zeros(1)]*20, collate_fn=Collate((i for i in range(9)), next)),
                   DataLoader(Plain(partial(next, itertools.count())))):
        with pytest.raises(ISTError, match='probe would take|rows from the training'):
            IST(small, ISTConfig(), probe=loader, loss_fn=lambda m, b: None)
    assert next(once)==0

# -- numbers, computed here
def generator(*what):
    digest = blake2b('/'.join(map(str, what)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little')//2)

@pytest.mark.parametrize('seed', [0, 3, 2**40])
def test_probe_batches_by_seed_and_pass(seed):
    rows,size = torch.arange(11),4
    probe = ProbeBatches(DataLoader(rows), size, seed)
    for m in range(6):
        order = torch.randperm(11, generator=generator(seed, 'probe', m//2))
        assert probe[m].tolist()==order[m%2*4:m%2*4+4].tolist()

def test_passes_and_seeds_differ():
    at = lambda seed, m: ProbeBatches(DataLoader(torch.arange(64)), 64, seed)[m].tolist()
    orders = [at(s, m) for s in range(4) for m in range(4)]
    assert len(set(map(tuple, orders)))==16 and all(sorted(o)==list(range(64)) for o in orders)

@pytest.mark.parametrize('seed', [0, 3])
def test_draws_by_seed_and_step(seed):
    ist,drawn = IST(model(8), rst(n_active=3, seed=seed)),[]
    for t in range(5):
        with ist.step():
            assert ist.active.tolist()==torch.multinomial(torch.ones(8), 3,
                                                          generator=generator(seed, 'layers', t)).sort().values.tolist()
        drawn.append(tuple(ist.active.tolist()))
    assert len(set(drawn))>1

# -- optimizers
class Decays(torch.optim.Optimizer):
    "All parameters shrink, with a gradient or without"
    def __init__(self, params): super().__init__(params, dict(lr=0.1))
    @torch.no_grad()
    def step(self, closure=None): [p.mul_(0.9) for g in self.param_groups for p in g['params']]
class Drifts(Decays):
    "Momentum goes on where there is no gradient"
    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for g in self.param_groups for p in g['params']):
            m = self.state[p].setdefault('m', torch.zeros_like(p))
            m.mul_(0.9).add_(0 if p.grad is None else p.grad)
            p.data.sub_(0.1*m)
class Needs(Decays):
    def step(self, closure=None): [p.data.sub_(0.1*p.grad) for g in self.param_groups for p in g['params']]
class Newton(torch.optim.LBFGS):
    def __init__(self, params): super().__init__(params, lr=0.1, max_iter=2)

def train(m, make_opt, config, steps=6):
    opt = make_opt(params(m))
    ist = IST(m, config)
    def loss(): opt.zero_grad(); l = m(**batch()).loss; l.backward(); return l
    for _ in range(steps):
        with ist.step():
            rest = [(p, p.detach().clone()) for o in ist.resting() for p in o.params]
            loss()
            yield ist,rest,opt
            opt.step(loss if isinstance(opt, torch.optim.LBFGS) else None)
        assert all(torch.equal(p, was) for p,was in rest)

@pytest.mark.parametrize('bad', [Decays, Drifts, Needs, Newton])
def test_an_optimizer_that_moves_layers_at_rest_is_refused(bad):
    "Within the first steps, with its values put back; and with every layer active it is none of our business"
    for _ in train(model(), bad, rst(n_active=1.0), 2): pass
    m,last = model(),None
    with pytest.raises(ISTError, match=f'{bad.__name__} has .*such as torch.optim.AdamW'):
        for last in train(m, bad, rst(n_active=2)): pass
    ist,rest,_ = last
    assert ist.t<=2
    assert rest
    assert all(torch.equal(p, was) for p,was in rest)
    assert all(p.requires_grad for o in ist.layers for p in o.params)

good = dict(SGD=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
            AdamW=lambda p: torch.optim.AdamW(p, lr=0.1), fused=lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
            foreach=lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True, weight_decay=0.1),
            Adafactor=lambda p: torch.optim.Adafactor(p), RMSprop=lambda p: torch.optim.RMSprop(p, momentum=0.9),
            Muon=lambda p: torch.optim.Muon([o for o in p if o.dim()==2]))
@pytest.mark.parametrize('name', good)
def test_optimizers_that_leave_layers_at_rest_alone(name):
    m = model()
    for ist,_,opt in train(m, good[name], rst(n_active=1)): pass
    assert ist.t==6 and opt in ist.parts[-1].passed       # it was looked at, and no longer is

def test_lora_fa_is_refused_with_advice_that_works(tmp_path):
    from peft.optimizers import create_lorafa_optimizer
    fa = lambda m: create_lorafa_optimizer(m, r=2, lora_alpha=8, lr=1e-2)
    m = model(); opt = fa(m)
    with pytest.raises(ISTError, match='LoraFAOptimizer has failed.*AdamW'): make_with(m, opt, tmp_path).train()
    m = model(); opt = fa(m)
    with pytest.raises(ISTError, match='LoraFAOptimizer has failed.*AdamW'), IST(m, rst()).step():
        m(**batch()).loss.backward(); opt.step()
    m = model()
    for n,p in m.named_parameters(): p.requires_grad_(p.requires_grad and 'lora_A' not in n)
    t = make_with(m, torch.optim.AdamW(p for p in m.parameters() if p.requires_grad), tmp_path)
    assert t.train().global_step==5

def make_with(m, opt, folder):
    t = make(m, folder, ISTCallback(rst()))
    t.optimizer = opt
    return t

def test_an_optimizer_in_the_backward_pass():
    "One for each parameter, as layer-wise optimizers have them"
    m = model()
    opts = {p:torch.optim.SGD([p], lr=0.1) for p in params(m)}
    def step(p): opts[p].step(); p.grad = None
    for p in opts: p.register_post_accumulate_grad_hook(step)
    ist = IST(m, rst())
    for _ in range(4):
        was = {p:p.detach().clone() for p in opts}
        with ist.step(): m(**batch()).loss.backward()
        assert {p for p in opts if not torch.equal(p, was[p])}=={p for i in ist.active.tolist()
                                                                 for p in ist.layers[i].params}

# -- the loop
def test_gradients_that_would_be_lost():
    "accelerate's accumulate around the step of IST, or the same by hand; and what looks like it and is not"
    from accelerate import Accelerator
    def outside(ist, m, opt):
        for i in range(4):
            with ist.step():
                m(**batch()).loss.backward()
                if i==3: opt.step(); opt.zero_grad()
    def accumulate(ist, m, opt, inside):
        acc = Accelerator(cpu=True, gradient_accumulation_steps=4)
        mm,oo = acc.prepare(m, opt)
        def micro():
            with acc.accumulate(mm): acc.backward(mm(**batch()).loss); oo.step(); oo.zero_grad()
        if inside:
            with ist.step(): [micro() for _ in range(4)]
        else:
            for _ in range(4):
                with acc.accumulate(mm), ist.step(): acc.backward(mm(**batch()).loss); oo.step(); oo.zero_grad()
    def at_the_start(ist, m, opt):
        for _ in range(4):
            with ist.step(): opt.zero_grad(); m(**batch()).loss.backward(); opt.step()
    def behind(ist, m, opt):
        for _ in range(4):
            with ist.step(): opt.zero_grad(); m(**batch()).loss.backward()
            opt.step()
    def zeros(ist, m, opt):
        for _ in range(4):
            with ist.step(): m(**batch()).loss.backward(); opt.zero_grad(set_to_none=False)
    def overflow(ist, m, opt):
        for _ in range(4):
            with ist.step(): opt.zero_grad(); (m(**batch()).loss*float('inf')).backward()
    def fails(ist, m, opt):
        for _ in range(4):
            with pytest.raises(KeyError), ist.step(): m(**batch()).loss.backward(); raise KeyError
        with ist.step(): m(**batch()).loss.backward(); opt.step()
    for loop,steps in ((outside, None), (lambda *o: accumulate(*o, False), None), (lambda *o: accumulate(*o, True), 1),
                       (at_the_start, 4), (behind, 4), (zeros, 4), (overflow, 4), (fails, 1)):
        m = model()
        ist,opt = IST(m, rst()),torch.optim.SGD(params(m), lr=0.1)
        if steps: loop(ist, m, opt); assert ist.t==steps
        else:
            with pytest.raises(ISTError, match='no optimizer has used.*accumulate'): loop(ist, m, opt)
            assert all(p.requires_grad for o in ist.layers for p in o.params)

def test_begin_and_end():
    ist = IST(model(), rst())
    with pytest.raises(ISTError, match='No step has begun'): ist.end_step()
    ist.begin_step()
    with pytest.raises(ISTError, match='begun and not ended'): ist.begin_step()
    ist.end_step()
    with pytest.raises(ISTError, match='No step has begun'): ist.end_step()
    assert ist.t==ist.times_active.sum()==1

def test_two_at_a_time():
    m = model()
    a,b = IST(m, rst()),IST(m, rst(seed=1))
    with a.step():
        with pytest.raises(ISTError, match='Another IST'): b.begin_step()
    with b.step(): pass                                    # one after the other is no harm
    a.begin_step()
    c = IST(m, rst())                                      # as after a step that died: the new one takes over
    with pytest.raises(ISTError, match='A new IST'): a.end_step()
    assert all(p.requires_grad for o in c.layers for p in o.params)
    with IST(model(seed=1), rst()).step(), c.step(): pass  # two models

def test_layers_that_change():
    "Between the steps and inside of one"
    def second(m): m.add_adapter('b', LoraConfig(r=2, target_modules=['q_proj', 'v_proj'])); m.set_adapter('b')
    def beside(m):
        m.add_adapter('b', LoraConfig(r=2, target_modules=['q_proj', 'v_proj']))
        m.base_model.set_adapter(['default', 'b'])
    def again(m):
        m.delete_adapter('default')
        m.add_adapter('default', LoraConfig(r=2, target_modules=['q_proj', 'v_proj']))
        m.set_adapter('default')
    def unfrozen(m): m.base_model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    def frozen(m): next(p for p in m.parameters() if p.requires_grad).requires_grad_(False)
    def replaced(m):
        lin = next(o for n,o in m.named_modules() if n.endswith('lora_A.default'))
        lin.weight = torch.nn.Parameter(lin.weight.detach().clone())
    def half(m): m.half()
    def off(m):
        with m.disable_adapter(): pass
    def back(m): second(m); m.set_adapter('default')
    for change,fine in ((second, False), (beside, False), (again, False), (unfrozen, False), (frozen, False),
                        (replaced, False), (half, True), (off, True), (back, True)):
        m = model(); ist = IST(m, rst())
        with ist.step(): pass
        change(m)
        if fine:
            with ist.step(): pass
        else:
            with pytest.raises(ISTError, match='has changed since the first step'): ist.begin_step()
            assert not ist.in_step
    m = model(); ist = IST(m, rst())
    ist.begin_step(); m.requires_grad_(True)
    with pytest.raises(ISTError, match='made trainable in the middle'): ist.end_step()
    assert ist.t==0 and not ist.in_step

# -- probes
def test_probes_that_cannot_be_computed_are_refused_at_once():
    m,rows = model(),Rows.from_list([dict(input_ids=o, labels=o) for o in ids.tolist()])
    plain = batch(); plain.pop('labels')
    bad = dict(rows=(rows, 'data set'), dataset=(Pops(), 'data set'), tensors=(rows.with_format('torch'), 'data set'),
               listed=(list(rows), 'no tensors'), unlabelled=([plain], 'no labels'),
               pairs=([(ids, ids)], 'a dictionary'),
               generator=((o for o in [batch()]), 'only once'), iterator=(iter([batch()]), 'only once'),
               nothing=([], 'no batches'), number=(7, 'cannot be iterated'),
               empty_loader=(DataLoader([], batch_size=None), 'no batches'),
               few=(DataLoader(rows, batch_size=2, collate_fn=lambda r: r), 'a dictionary'),
               text=('abc', 'a dictionary'), words=([dict(input_ids=['a'])], 'no tensors'))
    for name,(probe,why) in bad.items():
        with pytest.raises(ISTError, match=why) as e: IST(m, ISTConfig(score_batch_size=4), probe=probe)
        assert len(str(e.value))<700, (name, str(e.value))
    class Strict(torch.nn.Module):
        def __init__(self): super().__init__(); self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
        def forward(self, x): return x
    with pytest.raises(ISTError, match='input_ids, labels, which Strict does not take: it takes x'):
        IST(get_peft_model(Strict(), LoraConfig(target_modules=['0'])), ISTConfig(), probe=[batch()])

def test_ready_batches_from_a_loader():
    "As a list of them, whatever the workers of the training are"
    got = []
    for probe in ([batch(), batch(3)], DataLoader([batch(), batch(3)], batch_size=None)):
        ist,seen = IST(model(), ISTConfig(score_interval=1, n_active=1), probe=probe),[]
        for _ in range(5):
            with ist.step(): seen.append(ist.importance.tolist())
        got.append(seen)
    assert got[0]==got[1] and got[0][4]!=got[0][0]
