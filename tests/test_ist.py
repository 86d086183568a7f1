"Faults inside IST that are not bad input"
import pytest,torch
from peft import LoraConfig,get_peft_model
from torch import nn
from ist_nb import IST,ISTCallback,ISTConfig,ISTError
from ist_nb.config import shrunk

class Block(nn.Module):
    def __init__(self): super().__init__(); self.up = nn.Linear(4, 4)
class Stack(nn.Module):
    def __init__(self, n): super().__init__(); self.blocks = nn.ModuleList([Block() for _ in range(n)])

def stack(n): return get_peft_model(Stack(n), LoraConfig(r=2, target_modules=['up']))
def steps(ist, n):
    for _ in range(n):
        with ist.step(): pass
    return ist

def test_nan_probe_is_dropped_said_once_and_counted():
    losses = iter([float('nan')]*6+[1.]*100)
    ist = IST(stack(4), ISTConfig(score_interval=1), probe=[0], loss_fn=lambda m, b: torch.tensor(next(losses)))
    with pytest.warns(UserWarning, match='not finite') as said: steps(ist, 4)
    assert len(said)==1 and ist.n_dropped==2 and len(ist.history)==3
    assert [h['dropped'] for h in ist.history]==[True, True, False] and torch.equal(ist.importance, torch.zeros(4))

@pytest.mark.parametrize('settings', [dict(sampler='depth', depth=0.1), dict(sampler='top', schedule='shrink')])
@pytest.mark.parametrize('n_active', [1., 4])
def test_settings_without_effect_where_each_step_trains_all(settings, n_active):
    with pytest.raises(ISTError, match='has no effect where each step trains all 4 layers'):
        IST(stack(4), ISTConfig(n_active=n_active, **settings), probe=[0], n_steps=9)

@pytest.mark.parametrize('make,says', [
    (lambda: ISTConfig.paper(sampler='uniform'), "The preset sets scorer='paper'"),
    (lambda: ISTConfig.recommended(sampler='depth', depth=0.5), "The preset sets schedule='shrink'"),
    (lambda: ISTConfig.recommended(depth=0.5), "The preset sets sampler='top'")])
def test_a_preset_says_what_it_has_set(make, says):
    with pytest.raises(ISTError, match=says): make()

def test_one_and_two_layers():
    for n in (1, 2):
        ist = IST(stack(n), ISTConfig(score_interval=1, n_candidates=9), probe=[0],
                  loss_fn=lambda m, b: torch.tensor(1.))
        assert steps(ist, 5).times_active.sum()==5

def test_every_layer_gets_its_share():
    "Draws at successive steps are independent enough: frequencies match the exact inclusion probabilities"
    from ist_nb.samplers import inclusion_probabilities
    ist = IST(stack(6), ISTConfig.paper(score_interval=10**6, n_active=2), probe=[0], loss_fn=lambda m, b: None)
    ist.importance = torch.tensor([-2., -1., 0., 0., 1., 2.])
    pi,n = inclusion_probabilities(torch.sigmoid(ist.importance), 2),4000
    f = steps(ist, n).times_active/n
    assert ((f-pi).abs() <= 4.5*(pi*(1-pi)/n).sqrt()).all(), (f, pi)

def test_the_callback_knows_how_long_the_run_is(tmp_path):
    "With schedule='shrink' the number of layers falls over the steps of the Trainer, not over more or fewer"
    from datasets import Dataset
    from transformers import Trainer,TrainingArguments
    from benchmarks.kill_points import rows,tiny_model
    args = TrainingArguments(str(tmp_path), max_steps=6, report_to='none', save_strategy='no', use_cpu=True,
                             disable_tqdm=True)
    cb = ISTCallback(ISTConfig(n_active=2, sampler='top', schedule='shrink'))
    Trainer(tiny_model(), args, train_dataset=Dataset.from_list(rows()), callbacks=[cb]).train()
    want = torch.zeros(4, dtype=torch.long)
    for t in range(6): want[-shrunk(2, 4, t, 6):] += 1
    assert torch.equal(cb.ist.times_active, want)

@pytest.mark.parametrize('accumulated', [1, 3])
def test_the_length_of_a_run_in_batches(tmp_path, accumulated, monkeypatch):
    "By it `fast=True` knows whether compiling pays: in the Trainer each step may have several"
    from datasets import Dataset
    from transformers import Trainer,TrainingArguments
    from ist_nb import parts
    taken = []
    monkeypatch.setattr(parts, 'apply_optimisations', lambda *args: taken.append(args[2:]))
    for how in (dict(n_steps=7), dict(n_steps=7, n_batches=14), dict()):
        IST(stack(4), ISTConfig.rst(fast=True), **how)
    assert taken==[(True, 7), (True, 14), (True, None)]
    args = TrainingArguments(str(tmp_path), max_steps=5, gradient_accumulation_steps=accumulated, use_cpu=True,
                             per_device_train_batch_size=1, report_to='none', disable_tqdm=True, save_strategy='no')
    from benchmarks.kill_points import rows,tiny_model
    cb = ISTCallback(ISTConfig.rst(fast=True))
    Trainer(tiny_model(), args, train_dataset=Dataset.from_list(rows()), callbacks=[cb]).train()
    assert taken[3:]==[(True, 5*accumulated)]

def test_callback_refuses_a_model_without_adapters():
    with pytest.raises(ISTError, match='get_peft_model'):
        ISTCallback().on_init_end(None, None, None, model=nn.Linear(2, 2))

def test_probe_is_asked_for():
    with pytest.raises(ISTError, match='probe=your training DataLoader'): IST(stack(4))

def test_bad_scorer_and_sampler_of_ones_own():
    from ist_nb.config import samplers,scorers
    samplers.register('twice the same', '')(lambda I, n, c, g: torch.zeros(n, dtype=torch.long))
    scorers.register('too short', '')(lambda I, p, c, g: (I[:1], {}))
    try:
        with pytest.raises(ISTError, match='twice the same'):
            steps(IST(stack(8), ISTConfig(sampler='twice the same'), probe=[0], loss_fn=lambda m, b: None), 1)
        with pytest.raises(ISTError, match='too short'):
            steps(IST(stack(8), ISTConfig(scorer='too short', score_interval=1), probe=[0],
                      loss_fn=lambda m, b: torch.tensor(1.)), 2)
    finally: samplers.entries.pop('twice the same'); scorers.entries.pop('too short')

wrong_scorers = dict(alone=lambda I: I, nothing=lambda I: None, no_record=lambda I: (I, None),
                     a_list=lambda I: (I.tolist(), {}), numpy=lambda I: (I.numpy(), {}),
                     tensor_in_record=lambda I: (I, dict(losses=I)))

@pytest.mark.parametrize('name', wrong_scorers)
def test_what_a_scorer_of_ones_own_may_return(name):
    "The importance and a record that a checkpoint can hold; anything else is named when it happens"
    from ist_nb.config import scorers
    scorers.register(name, '')(lambda I, p, c, g: wrong_scorers[name](I))
    try:
        with pytest.raises(ISTError, match=f"The scorer '{name}' returned .* a dictionary for the record"):
            steps(IST(stack(8), ISTConfig(scorer=name, score_interval=1), probe=[0],
                      loss_fn=lambda m, b: torch.tensor(1.)), 2)
    finally: scorers.entries.pop(name)

@pytest.mark.parametrize('found', [None, 3, [0., 1.], [[0, 1]], ['a', 'b']], ids=repr)
def test_what_a_sampler_of_ones_own_may_return(found):
    from ist_nb.config import samplers
    samplers.register('mine', '')(lambda I, n, c, g: found)
    try:
        with pytest.raises(ISTError, match="The sampler 'mine' returned .* 2 different positions"):
            steps(IST(stack(8), ISTConfig(sampler='mine'), probe=[0], loss_fn=lambda m, b: None), 1)
    finally: samplers.entries.pop('mine')

def test_what_a_configuration_may_be():
    "A dictionary; not a name, nor one whose field was set to nonsense since it was made"
    assert IST(stack(8), dict(n_active=1, sampler='uniform')).config==ISTConfig.rst(n_active=1)
    late = ISTConfig.rst()
    late.n_active = 2.
    for wrong in ('rst', 3, late):
        for make in (ISTCallback, lambda o: IST(stack(8), o)):
            with pytest.raises(ISTError, match='configuration|n_active=2.0 is not allowed'): make(wrong)

def test_lazy_names():
    import ist_nb
    assert {'IST', 'ISTConfig', 'ISTCallback', 'find_layers'} <= set(dir(ist_nb))
    with pytest.raises(AttributeError): ist_nb.nothing

def test_recommended_freezes_from_below_for_good():
    """A layer is trained from the first step to its last, and its adapter is bit-identical from then on, though AdamW
    has moments of it; the loss still falls"""
    torch.manual_seed(0)
    class Chain(Stack):
        def forward(self, x):
            for o in self.blocks: x = x+torch.tanh(o.up(x))
            return x
    model = get_peft_model(Chain(5), LoraConfig(r=2, target_modules=['up']))
    x,y,T = torch.randn(16, 4),torch.randn(16, 4),40
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    ist = IST(model, ISTConfig.recommended(fast='fold'), n_steps=T)
    sets,weights,losses = [],[],[]
    for _ in range(T):
        with ist.step():
            loss = (model(x)-y).square().mean(); loss.backward()
            opt.step(); opt.zero_grad()
        sets.append(ist.active.tolist()); losses.append(loss.item())
        weights.append([torch.cat([p.detach().flatten() for p in o.params]) for o in ist.layers])
    assert sets[0]==[0, 1, 2, 3, 4] and sets[-1]==[4] and all(set(b)<=set(a) for a,b in zip(sets, sets[1:]))
    assert abs(ist.times_active.sum().item()/T/5-0.4)<0.05 and losses[-1]<losses[0]-0.1
    for i in range(4):
        last = max(t for t,s in enumerate(sets) if i in s)
        assert last<T-1 and all(torch.equal(w[i], weights[last][i]) for w in weights[last:])
        assert not torch.equal(weights[last][i], weights[0][i])
    assert not ist.history                                     # nothing is scored

def test_sampler_top_with_a_number_that_stays():
    ist = steps(IST(stack(6), ISTConfig(sampler='top', n_active=2)), 5)
    assert ist.times_active.tolist()==[0, 0, 0, 0, 5, 5]

class Fails:
    "A part that fails in one of its methods"
    def __init__(self, event): setattr(self, event, self._fail)
    def _fail(self, *args): raise RuntimeError('a part of my own')

@pytest.mark.parametrize('event', ['ready', 'begin', 'end'])
def test_a_part_that_fails_leaves_every_layer_trainable(event):
    "Whatever it raises, the other parts end, the step does not count, and the next one can begin"
    class Counts:
        began = ended = 0
        def begin(self, active): self.began += 1
        def end(self, counted): self.ended += 1; self.counted = counted
    ist,counts = IST(stack(4), ISTConfig.rst(n_active=1)),Counts()
    ist.parts += [counts, Fails(event)]
    with pytest.raises(RuntimeError, match='of my own'):
        with ist.step(): pass
    assert all(p.requires_grad for o in ist.layers for p in o.params) and not ist.in_step and ist.t==0
    assert counts.ended>=counts.began and not getattr(counts, 'counted', False)
    ist.parts.pop()
    with ist.step(): pass
    assert ist.t==1
