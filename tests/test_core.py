"What planted faults have shown to be untested: see `python -m benchmarks mutants`"
import pytest,random,numpy as np,torch
from peft import LoraConfig,get_peft_model
from transformers import LlamaConfig,LlamaForCausalLM,Trainer,TrainingArguments
from benchmarks import peft_methods as pm
from ist_nb import ISTCallback,ISTConfig,ISTError,find_layers
from ist_nb.probe import quietly
from ist_nb.layers import tuner_layers

def test_layers_are_in_the_order_of_the_model():
    "Layer 10 after layer 9"
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
                                                        num_hidden_layers=12, num_attention_heads=1)),
                                                        LoraConfig(r=1, target_modules=['q_proj']))
    assert [o.index for o in find_layers(model)]==list(range(12))

def test_an_adapter_within_an_adapter_belongs_to_the_outer_one():
    "The experts of a mixture, with one around the other for each of their two parameters"
    model = get_peft_model(pm.tiny_mixture(),
                           LoraConfig(r=2, target_modules=[],
                                      target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']))
    assert [n.rpartition('.')[2] for n in tuner_layers(model)]==['experts']*pm.N
    assert sum(type(m).__name__=='ParamWrapper' for m in model.modules())==2*pm.N

def test_random_numbers_are_left_alone():
    model = pm.tiny()
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())
    def seed(): random.seed(0); np.random.seed(0); torch.manual_seed(0)
    seed(); want = draw()
    seed()
    with quietly(model): assert draw()==want
    assert draw()==want

def test_the_probe_that_is_given_is_asked(tmp_path):
    ids = torch.randint(0, 64, (8, 6), generator=torch.Generator().manual_seed(0))
    rows,back,asked = [dict(input_ids=o, labels=o) for o in ids],ids[:2].flip(1),[]
    mine = [dict(input_ids=back, labels=back)]
    def loss(model, b):
        asked.append(b['input_ids'].tolist())
        return model(**b).loss
    cb = ISTCallback(ISTConfig(score_interval=1, n_candidates=2), probe=mine, loss_fn=loss)
    args = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                             save_strategy='no', logging_strategy='no', disable_tqdm=True)
    Trainer(get_peft_model(pm.tiny(), LoraConfig(r=2, target_modules=pm.linear, task_type='CAUSAL_LM')), args,
            train_dataset=rows, callbacks=[cb]).train()
    assert asked==[mine[0]['input_ids'].tolist()]*4

def test_a_probe_keeps_its_labels(tmp_path):
    "A Trainer that smooths labels takes them out of what it is given"
    from ist_nb.callback import trainer_loss
    ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    model,b = pm.tiny(),dict(input_ids=ids, labels=ids)
    loss = trainer_loss(Trainer(model, TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[],
                                                         use_cpu=True)))
    assert loss(model, b).item()==loss(model, b).item()!=model(**b).loss.item() and 'labels' in b
    with pytest.raises(ISTError, match='A probe batch is a list'): loss(model, [dict(prompt='as in GRPO')])
