"Gates and tracked gradients agree with suppression, and no gradient is lost, counted twice or left behind"
import gc,json,sys,warnings,weakref
from itertools import product
from pathlib import Path
import numpy as np,pytest,torch
from datasets import Dataset
from peft import LoraConfig,get_peft_model
from torch.optim import optimizer as hooks
from torch.utils.data import DataLoader
from transformers import Trainer,TrainingArguments
from ist_nb import IST,ISTCallback,ISTConfig,ISTError,find_layers
from ist_nb.config import scorers
from ist_nb.scorers import Probe,GradientTracker,_linear_in,_linear_params
from ist_nb.suppression import suppress

from benchmarks import peft_methods as pm

def loss_of(model, b):
    return torch.nn.functional.cross_entropy(model(**{k:v for k,v in b.items()
                                                      if k!='labels'}).logits[:, :-1].flatten(0, 1),
                                                      b['labels'][:, 1:].flatten())

def trained(name, folder, steps=3):
    """A tiny Llama with the method or variant `name`, after a few steps that move its adapters from where they respond
    with nothing"""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model,b = get_peft_model(pm.tiny(), pm.config_for(name, folder)),pm.batch(name)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps): loss_of(model, b).backward(); opt.step(); opt.zero_grad()
    return model.double().eval(),b

def probe_of(model, b, factor=0.25): return Probe(model, find_layers(model), b, loss_of, factor)

# -- gates
@pytest.mark.parametrize('at', [1., 0.625])
@pytest.mark.parametrize('name', ['LORA', 'DoRA', 'IA3', 'BOTTLENECK', 'OFT'])
def test_gates_are_the_slope_of_suppression(name, at, tmp_path):
    "All layers damped to `at`, one of them a little more or less"
    model,b = trained(name, tmp_path)
    probe,h,slope = probe_of(model, b),1e-2,[]
    loss,got = probe.gates(at)
    for i in range(len(probe.layers)):
        ends = []
        for d in (h, -h):
            with torch.no_grad(), suppress(probe.layers, [j for j in range(len(probe.layers)) if j!=i],
                                           at), suppress(probe.layers, [i], at+d):
                ends.append(loss_of(model, b).item())
        slope.append((ends[0]-ends[1])/(2*h))
    slope = torch.tensor(slope, dtype=torch.float64)
    assert slope.norm()>1e-5 and (got-slope).norm()<2e-3*slope.norm(), (got, slope)
    with torch.no_grad(), suppress(probe.layers, range(len(probe.layers)), at):
        assert abs(loss-loss_of(model, b).item())<1e-6

def test_gates_leave_no_trace(tmp_path):
    model,b = trained('DoRA', tmp_path)
    before = {k:v.clone() for k,v in model.state_dict().items()}
    for p in model.parameters(): p.grad = torch.ones_like(p) if p.requires_grad else None
    on = [p.requires_grad for p in model.parameters()]
    probe_of(model, b).gates(0.5)
    assert on==[p.requires_grad for p in model.parameters()]
    assert all((p.grad==1).all() if p.requires_grad else p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())

def test_gates_of_a_loss_without_gradient(tmp_path):
    model,b = trained('LORA', tmp_path)
    with pytest.raises(ISTError, match='has no gradient'):
        Probe(model, find_layers(model), b, lambda m, b: loss_of(m, b).detach(), 0.25).gates()

def test_gate_drops_what_is_not_finite():
    class Bad:
        factor = 0.25
        def gates(self, at): return float('nan'),torch.zeros(4, dtype=torch.float64)
    I,record = scorers['gate'](torch.ones(4), Bad(), ISTConfig(), None)
    assert record['dropped'] and torch.equal(I, torch.ones(4))

# -- tracked gradients
exact = ['LORA', 'rsLoRA', 'PiSSA', 'lora_bias', 'ADALORA', 'IA3', 'BOTTLENECK', 'VERA', 'LOHA', 'LOKR', 'HIRA',
         'GRALORA', 'MISS', 'RANDLORA', 'DELORA', 'FOURIERFT', 'WAVEFT', 'C3A', 'SHIRA', 'BEFT']

@pytest.mark.parametrize('name', exact)
def test_tracked_gradients_are_the_gate(name, tmp_path):
    "From the gradients that training leaves, the gradient with respect to an explicit gate at 1"
    model,b = trained(name, tmp_path)
    probe = probe_of(model, b)
    _,want = probe.gates(1.)
    tracker = GradientTracker(probe.layers)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tracker.begin([0, 2]); loss_of(model, b).backward(); opt.step(); tracker.end()
    assert tracker.collect() and tracker.count.tolist()==[1, 0, 1, 0]
    assert want[[0, 2]].norm()>1e-6 and (tracker.mean+want)[[0, 2]].norm()<1e-5*want.norm(), (tracker.mean, want)
    assert tracker.mean[[1, 3]].tolist()==[0, 0]

def test_every_name_in_the_table_is_tested(tmp_path):
    "A name that no method has any more, or that no test covers, is found out here"
    met = set()
    for name in exact:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model = get_peft_model(pm.tiny(), pm.config_for(name, tmp_path))
        for o in find_layers(model)[0].tuners:
            ids = {id(p) for p,_ in _linear_params(o)}
            met |= {k for k in _linear_in for a in o.active_adapters if a in (getattr(o, k, None) or ())
                    for p in ([getattr(o, k)[a]] if isinstance(getattr(o, k)[a], torch.nn.Parameter)
                              else getattr(o, k)[a].parameters()) if id(p) in ids}
    # an embedding is in no block; `fade` turns it down, and tests/test_keep sees to that
    assert set(_linear_in)-met<={'lokr_w1_a', 'lora_embedding_B'}, set(_linear_in)-met

@pytest.mark.parametrize('name', ['DoRA', 'OFT', 'MiCA', 'LN_TUNING', 'BOFT'])
def test_fisher_refuses_what_it_cannot_see(name, tmp_path):
    model,_ = trained(name, tmp_path, 0)
    with pytest.raises(ISTError, match="Use scorer='gate'"): IST(model, ISTConfig(scorer='fisher'))

def lora(seed=0, dropout=0.1):
    torch.manual_seed(seed)
    return get_peft_model(pm.tiny(), LoraConfig(r=2, target_modules=pm.linear, lora_dropout=dropout,
                                                task_type='CAUSAL_LM'))
def params(model): return [p for p in model.parameters() if p.requires_grad]
cfg = dict(scorer='fisher', score_interval=3, n_active=2)

def test_needs_no_probe_and_watches_only_in_a_step():
    n = len(hooks._global_optimizer_pre_hooks)
    model,b = lora(),pm.batch('')
    ist,opt = IST(model, ISTConfig(**cfg)),torch.optim.SGD(params(model), lr=0.1)
    with ist.step():
        assert len(hooks._global_optimizer_pre_hooks)==n+2             # the tracker, and the watch of IST
        loss_of(model, b).backward(); opt.step(); opt.zero_grad()
    assert len(hooks._global_optimizer_pre_hooks)==n and len(ist.tracker.pending)==1
    loss_of(model, b).backward(); opt.step(); opt.zero_grad()          # outside of a step: none of ours
    assert len(ist.tracker.pending)==1
    with pytest.raises(KeyError), ist.step():
        loss_of(model, b).backward(); opt.step(); raise KeyError       # a step that fails does not count
    assert len(hooks._global_optimizer_pre_hooks)==n and len(ist.tracker.pending)==1
    ist.begin_step(); gone = weakref.ref(ist.tracker); del ist; gc.collect()
    # a step that was never ended leaves nothing behind
    assert gone() is None and len(hooks._global_optimizer_pre_hooks)==n

own = [o for o in scorers.names() if scorers[o].__module__.startswith('ist_nb')]
@pytest.mark.parametrize('scorer', own)
def test_a_scorer_reads_what_it_says(scorer):
    "Settings that it `ignores` are refused beside it, so all of these must be read, and no others"
    seen,b = set(),pm.batch('')
    class Watched(ISTConfig):
        def __getattribute__(self, name):
            if sys._getframe(1).f_globals['__name__'] in ('ist_nb.scorers', 'ist_nb.ist'): seen.add(name)
            return super().__getattribute__(name)
    model = lora()
    ist = IST(model, Watched(scorer=scorer, score_interval=2), probe=[b], loss_fn=loss_of)
    opt = torch.optim.SGD(params(model), lr=0.1)
    seen.clear()
    for _ in range(3):
        with ist.step(): loss_of(model, b).backward(); opt.step(); opt.zero_grad()
    asked = {'n_candidates', 'n_suppressed', 'score_lr'}
    assert seen & asked==asked-set(getattr(scorers[scorer], 'ignores', ()))

def test_frozen_layers_are_not_scored_and_another_models_optimizer_is_not_seen():
    model,other,b = lora(),lora(1),pm.batch('')
    ist = IST(model, ISTConfig(**cfg))
    opt,foreign = torch.optim.SGD(params(model), lr=0.1),torch.optim.SGD(params(other), lr=0.1)
    for _ in range(4):
        with ist.step():
            loss_of(other, b).backward(); foreign.step(); foreign.zero_grad()
            loss_of(model, b).backward(); opt.step(); opt.zero_grad()
    record = ist.history[0]
    assert record['step']==3 and record['seen']==record['times_active'] and sum(record['seen'])==6
    assert all(I==0 for I,n in zip(record['importance'], record['seen']) if n==0)

def test_several_optimizers_make_one_observation():
    "LoRA's A in one optimizer and its B split over two, against one for all"
    b,seen = pm.batch(''),[]
    for parts in (1, 3):
        model = lora(dropout=0.)
        for n,p in model.named_parameters():
            if 'lora_B' in n: torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(n)))
        groups = [params(model)] if parts==1 else [[p for n,p in model.named_parameters() if p.requires_grad
                                                    and test(n)] for test in (lambda n: 'lora_A' in n,
                                                    lambda n: 'lora_B' in n and 'q_proj' in n, lambda n: 'lora_B' in n
                                                    and 'q_proj' not in n)]
        ist,opts = IST(model, ISTConfig(**cfg)),[torch.optim.SGD(o, lr=0.1) for o in groups]
        with ist.step():
            loss_of(model, b).backward()
            for o in opts: o.step()
        assert ist.tracker.collect()
        seen.append((ist.tracker.mean, ist.tracker.count))
    assert torch.allclose(seen[0][0], seen[1][0], rtol=1e-6, atol=1e-9)
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[0][1].sum()==2

def test_an_optimizer_that_does_not_tell_is_found_out():
    model,b = lora(),pm.batch('')
    ist = IST(model, ISTConfig(**cfg))
    with pytest.warns(UserWarning, match='not finite'), pytest.raises(ISTError, match='has seen no optimizer'):
        for _ in range(GradientTracker.patience+1):
            with ist.step():
                loss_of(model, b).backward()
                with torch.no_grad():
                    for p in params(model): p -= 0.1*p.grad if p.grad is not None else 0.; p.grad = None
    assert ist.t==GradientTracker.patience-1 and all(p.requires_grad for o in ist.layers for p in o.params)

def test_gradients_that_are_not_finite_are_left_out():
    model,b = lora(),pm.batch('')
    ist,opt = IST(model, ISTConfig(**cfg|dict(n_active=1.0))),torch.optim.SGD(params(model), lr=0.)
    for t in range(4):
        with ist.step():
            loss_of(model, b).backward()
            B = next(p for n,p in model.named_parameters() if 'lora_B' in n)
            if t==1: B.grad.fill_(float('inf'))
            opt.step(); opt.zero_grad()
            with torch.no_grad(): B.zero_()   # heals what the step has spoilt
    assert ist.history[0]['seen']==[2]*4 and not ist.history[0]['dropped'] and ist.n_dropped==0

def test_scaled_gradients_are_unscaled():
    "Fused optimizers get scaled gradients from a GradScaler, and the scale beside them"
    means = []
    for scaled in (False, True):
        model,b = lora(dropout=0.),pm.batch('')
        for n,p in model.named_parameters():
            if 'lora_B' in n: torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(n)))
        ist,opt = IST(model, ISTConfig(**cfg)),torch.optim.SGD(params(model), lr=0., fused=True)
        scaler = torch.amp.GradScaler('cpu', init_scale=1024., enabled=scaled)
        with ist.step():
            scaler.scale(loss_of(model, b)).backward()
            scaler.step(opt)
        ist.tracker.collect(); means.append(ist.tracker.mean)
    assert means[0].any() and torch.allclose(*means, rtol=1e-6, atol=0)

# -- the rules, computed once more from what is recorded
def z(x): return (x-x.mean())/x.std()

@pytest.mark.parametrize('scorer', ['fisher'])
def test_importance_from_recorded_gradients(scorer):
    """60 steps, so that layers are seen more than the 20 times after which old steps fade; the mean, the variance and
    the importance by their definitions, in numpy"""
    model,b = lora(dropout=0.),pm.batch('')
    with torch.no_grad():
        for k,(n,p) in enumerate(model.named_parameters()):
            if 'lora_B' in n: p.normal_(0, 0.1, generator=torch.Generator().manual_seed(k))
    ist,opt = IST(model, ISTConfig(scorer=scorer, score_interval=10, n_active=3)),torch.optim.SGD(params(model), lr=0.3)
    seen,want = [[] for _ in range(4)],np.zeros(4)
    def check(t):
        if t%10 or not t: return
        told,target,mean,var = np.array([len(o)>0 for o in seen]),np.zeros(4),np.zeros(4),np.full(4, np.nan)
        for i,scores in enumerate(seen):
            # of each step: 1/n for the first 20, then all others fade by 0.95
            w = np.ones(len(scores))
            for k in range(len(scores)): w[:k] *= 1-max(1/(k+1), 0.05); w[k] = max(1/(k+1), 0.05)
            if len(scores): mean[i] = w@scores
            m = min(len(scores), 20)
            if m>1: var[i] = w@(np.array(scores)-mean[i])**2 * m/(m-1)
        target[told] = z(mean[told])
        if scorer=='fisher': target[~np.isnan(var)] += z(var[~np.isnan(var)])
        target[told] = z(target[told])
        want[:] += 0.1*(target-want)
        assert np.allclose(ist.importance, want, atol=1e-4), (t, ist.importance, want)
    for t in range(61):
        with ist.step():
            check(t)
            loss_of(model, {k:v.roll(t, 0)[:2] for k,v in b.items()}).backward()
            for i in ist.active.tolist():
                seen[i].append(-sum((p.grad*p).sum().item() for n,p in model.named_parameters() if f'layers.{i}.' in n
                                    and 'lora_B' in n))
            opt.step(); opt.zero_grad()
    assert len(ist.history)==6 and min(map(len, seen))>30 and np.abs(want).max()>0.3

@pytest.mark.parametrize('config', [dict(), dict(use_dora=True), dict(use_rslora=True, rank_pattern={'v_proj':1})])
def test_paper_is_the_released_rule(config):
    """Scaling times 0.25 in the layers of each candidate, whatever the variant; e to the minus loss, less the mean; -10
    p (1-p)"""
    torch.manual_seed(0)
    model = get_peft_model(pm.tiny(), LoraConfig(r=2, target_modules=pm.linear, task_type='CAUSAL_LM',
                                                 init_lora_weights=False, **config))
    b,opt = pm.batch(''),torch.optim.SGD(params(model), lr=0.5)
    ist = IST(model, ISTConfig.paper(score_interval=1, n_candidates=3), probe=[b])
    importance = np.zeros(4)
    for _ in range(4):
        with ist.step():
            if ist.history:
                record,losses = ist.history[-1],[]
                for S in record['suppressed']:
                    assert len(S)==2
                    own = [(m.scaling, dict(m.scaling)) for i in S
                           for m in model.base_model.model.model.layers[i].modules() if hasattr(m, 'lora_A')]
                    for held,_ in own: held['default'] *= 0.25
                    with torch.no_grad(): losses.append(model(**b).loss.item())
                    for held,was in own: held.update(was)
                assert np.allclose(losses, record['losses'], rtol=0, atol=1e-7)
                assert len({round(o, 7) for o in losses})==3
                r,p = np.exp(-np.array(losses)),1/(1+np.exp(importance))
                for k,S in enumerate(record['suppressed']): importance[S] -= (10*(r-r.mean())[k]*p*(1-p))[S]
                assert np.allclose(ist.importance, importance, atol=1e-6)
            model(**b).loss.backward(); opt.step(); opt.zero_grad()
    assert len(ist.history)==3 and np.abs(importance).min()>0
    # where the definition is another: the numbers above tell the two apart
    if 'use_dora' in config:
        with torch.no_grad():
            a,d = [Probe(model, ist.layers, b, lambda m, o: m(**o).loss, 0.25, form).loss([0, 1])
                   for form in ('scaling', 'response')]
        assert abs(a-d)>1e-5

# -- stop and resume
def rows(n=32):
    ids = torch.randint(0, 64, (n, 8), generator=torch.Generator().manual_seed(5))
    return [dict(input_ids=o, labels=o) for o in ids]

def loop(model, ist, opt, batches):
    "Two micro-batches a step, clipped"
    for pair in batches:
        with ist.step():
            for b in pair: (model(**b).loss/2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step(); opt.zero_grad()

@pytest.mark.parametrize('scorer', ['fisher', 'gate', 'gate+fisher'])
def test_resumed_loop_is_bit_exact(scorer):
    data = list(DataLoader(rows(64), batch_size=4))*2
    pairs = list(zip(data[::2], data[1::2]))                # 16 steps
    make = lambda: (m := lora(dropout=0.), IST(m, ISTConfig(**cfg|dict(scorer=scorer)),
                                               probe=DataLoader(rows(), batch_size=4) if 'gate' in scorer else None),
                                               torch.optim.AdamW(params(m), lr=0.02))
    model,ist,opt = make(); loop(model, ist, opt, pairs)
    a,i,o = make(); loop(a, i, o, pairs[:8])                # stops between two scores, with steps in hand
    saved = json.loads(json.dumps(i.state_dict()))
    if scorer!='gate': assert len(saved['tracker']['pending'])==2
    b,j,p = make()
    b.load_state_dict(a.state_dict())
    p.load_state_dict(o.state_dict())
    j.load_state_dict(saved)
    loop(b, j, p, pairs[8:])
    assert len(ist.history)==5 and ist.importance.any()
    assert json.dumps(j.state_dict())==json.dumps(ist.state_dict())
    assert all(torch.equal(x, y) for x,y in zip(model.state_dict().values(), b.state_dict().values()))

@pytest.mark.parametrize('scorer', ['fisher', 'gate', 'gate+fisher'])
def test_resumed_trainer_is_bit_exact(scorer, tmp_path):
    "Gradient accumulation and clipping on; dropout too"
    ds = Dataset.from_list([dict(input_ids=o['input_ids'].tolist(), labels=o['labels'].tolist()) for o in rows(64)])
    def run(folder, resume=None):
        cb = ISTCallback(ISTConfig(**cfg|dict(scorer=scorer)))
        args = TrainingArguments(str(folder), max_steps=8, save_steps=5, per_device_train_batch_size=4,
                                 gradient_accumulation_steps=2, learning_rate=0.02, max_grad_norm=0.1, report_to=[],
                                 disable_tqdm=True, use_cpu=True, logging_strategy='no')
        t = Trainer(lora(), args, train_dataset=ds, callbacks=[cb])
        t.train(resume_from_checkpoint=resume)
        return t.model,cb.ist
    model,ist = run(tmp_path/'a')
    again,ist2 = run(tmp_path/'b', str(tmp_path/'a'/'checkpoint-5'))
    assert ist.t==8 and len(ist.history)==2 and ist.importance.any()
    if scorer!='gate': assert sum(ist.history[-1]['seen'])==12 and len(ist.tracker.pending)==2
    plain = lambda o: json.loads(json.dumps(o.state_dict()))            # JSON keeps every bit of a number
    assert plain(ist)==plain(ist2)
    assert all(torch.equal(x, y) for x,y in zip(model.state_dict().values(), again.state_dict().values()))

def test_registry_says_what_they_are():
    assert {'gate', 'fisher', 'gate+fisher'} <= set(scorers.names())
    assert 'gate' in scorers.about['gate'] and 'no probe' in scorers.about['fisher']
    assert scorers['gate'].gradients
    assert scorers['fisher'].observes=='backward'
    assert not hasattr(scorers['suppression'], 'observes')

# -- several processes
def in_a_process(rank, port):
    """One run in one process against the halves of its batches in two, replicated and sharded: the same importance, bit
    for bit the same in both"""
    import os,torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    ids = torch.randint(0, 64, (8, 8), generator=torch.Generator().manual_seed(0))
    probe = [dict(input_ids=ids[:4], labels=ids[:4])]   # one batch: every process asks the same
    def run(wrap, ids, scorer):
        model = lora(dropout=0.)
        few = dict(score_batch_size=4) if scorer=='gate+fisher' else {}
        ddp,ist = wrap(model),IST(model, ISTConfig(**cfg|dict(scorer=scorer)|few), probe=probe)
        opt = torch.optim.AdamW(params(model), lr=0.01)
        for _ in range(7):
            with ist.step(): ddp(input_ids=ids, labels=ids).loss.backward(); opt.step(); opt.zero_grad()
        assert len(ist.history)==2 and ist.importance.any()
        return ist.importance
    def sharded(model):
        for o in model.base_model.model.model.layers: fully_shard(o)
        return fully_shard(model)
    want = {o:run(lambda m: m, ids, o) for o in (cfg['scorer'], 'gate+fisher')}
    for wrap,scorer in product((lambda m: torch.nn.parallel.DistributedDataParallel(m, find_unused_parameters=True),
                                sharded), want):
        got,want_ = run(wrap, ids[4*rank:][:4], scorer),want[scorer]
        assert torch.allclose(got, want_, atol=1e-5), (scorer, got, want_)
        both = [torch.zeros_like(got) for _ in range(2)]
        dist.all_gather(both, got)
        assert torch.equal(*both)
    dist.destroy_process_group()

@pytest.mark.slow
def test_fisher_on_two_processes():
    import socket,torch.multiprocessing as mp
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(in_a_process, (port,), nprocs=2)

class Kept(torch.nn.Module):
    "Keeps its weight for evaluation until `train()`, as LeViT keeps its attention biases and loralib a merged product"
    def __init__(self):
        super().__init__()
        self.w,self.kept = torch.nn.Parameter(torch.ones(1)),None
    def train(self, mode=True):
        self.kept = None if mode else self.w.detach().clone()
        return super().train(mode)
    def forward(self, x): return x*(self.w if self.kept is None else self.kept)

def test_a_module_that_acts_in_train_is_told_after_a_probe():
    "Also if it alone trains; and one that was in evaluation mode stays there"
    from ist_nb.probe import quietly
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Kept(), torch.nn.Dropout()).train()
    model[2].eval()
    with quietly(model): assert model[1].kept is not None
    assert model[1].kept is None and [m.training for m in model.modules()]==[True, True, True, False]
    model(torch.ones(1, 2)).sum().backward()
    assert model[1].w.grad is not None
    model.eval()
    with quietly(model): pass
    assert model[1].kept is not None and not any(m.training for m in model.modules())
    model[1].train()     # a part that trains in a model that does not
    with quietly(model): pass
    assert model[1].kept is None and [m.training for m in model.modules()]==[False, False, True, False]
