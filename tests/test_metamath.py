"""IST in PEFT's public comparison: their script is stood in for by one of the same form, since it needs a GPU and the
hub"""
import types
import pytest,torch
from peft import LoraConfig,get_peft_model
from transformers import LlamaConfig,LlamaForCausalLM
from ist_nb import ISTConfig,ISTError
from benchmarks import metamath

def script(skip=()):
    """What `attach` relies on: the optimizer comes from a function of the module, a step begins with zero_grad,
    evaluation comes between steps"""
    run = types.SimpleNamespace(seen=[])
    def get_optimizer_and_scheduler(model, *, lr, max_steps):
        opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
        return opt,torch.optim.lr_scheduler.LinearLR(opt)
    run.get_optimizer_and_scheduler = get_optimizer_and_scheduler
    def train(model, batches):
        opt,sched = run.get_optimizer_and_scheduler(model, lr=1e-2, max_steps=len(batches))
        for i,ids in enumerate(batches):
            opt.zero_grad()
            before = {n:p.detach().clone() for n,p in model.named_parameters()}
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            if i not in skip: opt.step(); sched.step()
            run.seen.append({int(n.split('layers.')[1].split('.')[0]) for n,p in model.named_parameters()
                             if not torch.equal(p, before[n])})
            if i%3==2: model.eval(); model(input_ids=ids); model.train()
    run.train = train
    return run

def tiny():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                         num_attention_heads=2, num_key_value_heads=1))
    return get_peft_model(llama, LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM'))

batches = torch.randint(0, 64, (12, 4, 10), generator=torch.Generator().manual_seed(0))

def test_their_steps_train_what_is_drawn():
    run = script(skip={4}); drawn = []
    made = metamath.attach(run, ISTConfig(sampler='depth', scorer='fisher', score_interval=3, fast='fold'))
    assert not made
    real = metamath.IST.draw
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(metamath.IST, 'draw', lambda self: drawn.append(real(self)) or drawn[-1])
        run.train(tiny(), batches)
    ist, = made
    assert [set() if i==4 else set(o.tolist()) for i,o in enumerate(drawn)]==run.seen
    assert ist.t==11 and ist.times_active.sum()==sum(map(len, run.seen)) and any(len(o)<4 for o in run.seen)
    assert len(ist.history)>=3 and all(p.requires_grad for o in ist.layers for p in o.params)

def test_all_layers_are_their_run_bit_for_bit():
    plain,ours = tiny(),tiny()
    script().train(plain, batches)
    run = script()
    metamath.attach(run, ISTConfig(n_active=1.0, sampler='uniform'))
    run.train(ours, batches)
    assert all(torch.equal(a, b) for a,b in zip(plain.parameters(), ours.parameters()))

def test_a_scorer_that_needs_a_probe_is_refused():
    run = script()
    metamath.attach(run, ISTConfig(scorer='gate'))
    with pytest.raises(ISTError, match='probe'): run.train(tiny(), batches)

def test_default_knows_the_length_of_their_run():
    "All layers at their first step, the top one at the last, and none comes back"
    run = script()
    made = metamath.attach(run, ISTConfig.from_dict(metamath.default))
    run.train(tiny(), batches)
    ist, = made
    assert run.seen[0]=={0, 1, 2, 3} and run.seen[-1]=={3} and all(b<=a for a,b in zip(run.seen, run.seen[1:]))
    assert ist.t==12 and not ist.history
