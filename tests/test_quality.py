"The bench of the evidence: every contender runs, on every kind of task, and a run that is known is not run again"
import json,math,os
import pytest
from benchmarks import quality
from ist_nb import ISTConfig

data = os.environ.get('IST_NB_DATA', '')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not data, reason='needs the textbooks and the commonsense files, '
                                                   'which are not part of the repository, in the folder named by '
                                                   'IST_NB_DATA')]

@pytest.mark.parametrize('name', list(quality.contenders))
def test_contender(name):
    if '8 bits' in name: pytest.importorskip('torchao', reason='products in 8 bits need torchao')
    r = quality.run((name, 'book', 'short', 1e-3, 0), 'smoke', str(data), '', 'cpu')
    assert all(math.isfinite(o[k]) for o in r['curve'] for k in ('valid', 'test')) and len(r['curve'])==3
    steps = r['curve'][-1]['step']
    assert steps==round(6*quality.contenders[name][1].get('part', 1))
    assert sum(r['times_active'])==round(steps*r['active'])
    if 'static' in name: assert set(r['times_active'])=={0, 6}
    if 'to top' in name:
        assert r['times_active']==sorted(r['times_active'])
        assert r['times_active'][-1]==steps
        assert r['times_active'][0]<steps
    if name=='anneal to depth': assert min(r['times_active'])>=2 and r['depth']<1
    if name=='LISA schedule': assert len({n for n in r['times_active']})==2   # one draw, held for all of six steps
    # the same again, but for the time
    assert r==quality.run((name, 'book', 'short', 1e-3, 0), 'smoke', str(data), '',
                          'cpu') | {k:r[k] for k in ('seconds', 'steady', 'curve', 'share', 'stopped')}

@pytest.mark.parametrize('kind', ['domain', 'choice'])
def test_task(kind):
    r = quality.run(('depth, fisher', kind, 'repeated', 1e-3, 0), 'smoke', str(data), '', 'cpu')
    assert r['task']==kind and math.isfinite(r['test'])
    if kind=='choice': assert {k:v['n'] for k,v in r['accuracy'].items()}.keys()==set(quality.choice_sets)

def test_a_model_from_elsewhere(tmp_path):
    "Any causal model with its tokenizer, with weights of its own type"
    import torch
    from transformers import AutoModelForCausalLM,AutoTokenizer,Qwen2Config
    tok = AutoTokenizer.from_pretrained(quality.pico_path); tok.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64,
                                                 num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1),
                                                 dtype=torch.bfloat16).save_pretrained(tmp_path)
    r = quality.run(('depth, fisher', 'book', 'short', 1e-3, 0), 'smoke', str(data), str(tmp_path), 'cpu', 'auto')
    assert len(r['importance'])==4 and math.isfinite(r['test'])

def test_rates_are_chosen_on_validation_rows_of_the_first_seed():
    run = lambda lr, seed, valid, test, best: dict(method='a', task='book', regime='short', lr=lr, seed=seed,
                                                   valid=valid, test=test, stopped=dict(valid=best))
    # the best of the run, not its end
    assert quality.best_rates([run(1, 0, 2., 9., 2.), run(2, 0, 1., 1., 1.5), run(3, 0, 3., 1., 1.),
                               run(4, 1, 0., 0., 0.)])=={('a', 'book', 'short'):3}

def test_plan():
    """Every learning rate with the first seed, then the other seeds with the best of them, which is waited for; what is
    known is not run again"""
    run = lambda m, lr, seed, valid=1.: dict(method=m, task='book', regime='short', lr=lr, seed=seed,
                                             stopped=dict(valid=valid))
    runs,ended = [run('LoRA', 1., 0, 3.)],set()
    ask = quality.planner([dict(tasks='book', regimes='short', only='LoRA;RST', rates='1 2', seeds=3)], runs, ended)
    assert [ask() for _ in range(4)]==[('LoRA', 'book', 'short', 2., 0), ('RST', 'book', 'short', 1., 0),
                                       ('RST', 'book', 'short', 2., 0), None]
    runs.append(run('LoRA', 2., 0, 2.)); ended.add(('LoRA', 'book', 'short', 2., 0))
    assert ask()==('LoRA', 'book', 'short', 2., 1) and ask() is None                       # RST's rates are still out
    ended |= {('RST', 'book', 'short', 1., 0), ('RST', 'book', 'short', 2., 0)}             # one of them failed
    runs.append(run('RST', 1., 0))
    assert [ask() for _ in range(4)]==[('RST', 'book', 'short', 1., 1), ('LoRA', 'book', 'short', 2., 2),
                                       ('RST', 'book', 'short', 1., 2), None]
    # what the pages call the recommended setting
    assert ISTConfig(**quality.contenders['shrink to top'][0])==ISTConfig.recommended(fast=False)
    for plan in quality.plans.values():
        assert all(o['only'] and {n.strip() for n in o['only'].split(';')}<=set(quality.contenders) for o in plan)
