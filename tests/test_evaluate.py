"""Answers by pattern and by likelihood: hand-worked cases for each of the fifteen tasks, the real files, references of
other libraries"""
import json,math,subprocess,sys,pytest,torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from ist_nb.config import ISTError
import ist_nb.questions as questions
from ist_nb.evaluate import *
from ist_nb.evaluate import _parse, _base_of, _wilson, _mean_interval as mean_interval
from ist_nb.questions import *
from ist_nb.questions import (_prompt_of, _answers_of as answers_of, _choices_of as choices_of, _generate as generate,
    _log_likelihoods as log_likelihoods, _released as extract_released, _split_answers as split_answer)
from ist_nb.finetune import assets, main as finetune_main

def ask(q, marks, texts, head='Please choose the correct answer to the question:', form='Answer format: '):
    named = ' '.join(f'{m.capitalize()}: {t}' for m,t in zip(marks, texts))
    return f"{head} {q}\n\n{named}\n\n{form}{'/'.join(marks)}"
def marks(o, n): return [f'{o}{i}' for i in range(1, n+1)]

# what is asked in the form of each set, the gold answer, and its choices read back; HellaSwag's file is not here, its
# form is
rows = {
    'boolq': ('Please answer the following question with true or false, question: is the sky up?\n\nAnswer format: '
              'true/false', 'true', dict(true='true', false='false')),
    'piqa': ('Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with bobby pin '
             '\n\nSolution2: finish, woodgrain with  bobby pin \n\nAnswer format: solution1/solution2',
             'solution2', dict(solution1='replace drawer with bobby pin',
                               solution2='finish, woodgrain with  bobby pin')),
    'social_i_qa': (ask('How is she?', marks('answer', 3), ['sad', 'like a person: glad', 'Answer1']), 'answer3',
                    dict(answer1='sad', answer2='like a person: glad', answer3='Answer1')),
    'hellaswag': (ask('Baking: A man opens the oven. He', marks('ending', 4),
                      ['sings.', 'takes [title] out', 'is 2: late', 'x'], 'Please choose the correct ending to '
                      'complete the given sentence:'),
                  'ending2', dict(ending1='sings.', ending2='takes [title] out', ending3='is 2: late', ending4='x')),
    'winogrande': ('Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was '
                   'better than Maria so _ won.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2',
                   'option1', dict(option1='Sarah', option2='Maria')),
    'ARC-Easy': (ask('Which Answer1: is it?', marks('answer', 3), ['a', 'b', 'c']), 'answer2',
                 dict(answer1='a', answer2='b', answer3='c')),
    'ARC-Challenge': (ask('What?', marks('answer', 5), 'abcde'), 'answer5', dict(zip(marks('answer', 5), 'abcde'))),
    'openbookqa': (ask('The sun is responsible for', marks('answer', 4), ['puppies', 'age', 'wilting', 'plants']),
                   'answer4', dict(zip(marks('answer', 4), ['puppies', 'age', 'wilting', 'plants']))),
    'AQuA': ('Find P(A) if (A) is even. Answer Choices: (A) 0.5 (B) 10% (C) 2 (D) 1,000 (E) none of (these)', 'D',
             dict(A='0.5', B='10%', C='2', D='1,000', E='none of (these)')),
    'MultiArith': ('Sam bought 13 and 17. How many?', '30.0', {}),
    'gsm8k': ('How much is it in dollars?', '1234.5', {}), 'AddSub': ('7 crayons less 3?', '4', {}),
    'SingleEq': ('0.2 and 0.4 of a loaf?', '0.6', {}), 'SVAMP': ('How many crackers?', '8.0', {}),
    'mawps': ('1.1666666666666667 from 3?', '1.8333333333333335', {})}

# what a model might write -> the answer, by us and by the released rule; None where there is none
said = {
    'boolq': [('the correct answer is true', 'true', 'true'), ('the correct answer is false', 'false', 'false'),
              ('True', 'true', None), ('FALSE.', 'false', None), ('untrue', None, 'true'),
              ('It is not false, the answer is true', 'true', 'false'), ('', None, None), ('yes', None, None),
              ('the answer is: "False"', 'false', None), ('true/false', 'true', 'true')],
    'piqa': [('the correct answer is solution2', 'solution2', 'solution2'), ('Solution1', 'solution1', None),
             ('solution3', None, None), ('solution12', None, 'solution1'),
             ('SOLUTION2 is better than solution1', 'solution2', 'solution1'),
             ('solution1 or solution2', 'solution1', 'solution1'), ('', None, None)],
    'social_i_qa': [('the correct answer is answer1', 'answer1', 'answer1'), ('Answer 1', None, None),
                    ('answer4', None, 'answer4'), ('the correct answer is Answer3.', 'answer3', None),
                    ('answer1 is wrong, the correct answer is answer2', 'answer2', 'answer1')],
    'hellaswag': [('the correct answer is ending4', 'ending4', 'ending4'), ('Ending2: takes it out', 'ending2', None),
                  ('ending5', None, None), ('pending1', None, 'ending1'), ('', None, None)],
    'winogrande': [('the correct answer is option2', 'option2', 'option2'), ('Option1: Sarah', 'option1', None),
                   ('Sarah', None, None), ('the answer is option1, the answer is option2', 'option2', 'option1'),
                   ('option1\n\n### Instruction:\noption2', 'option1', 'option1')],
    'ARC-Easy': [('the correct answer is answer1', 'answer1', 'answer1'),
                 ('the correct answer is answer4', None, 'answer4'), ('ANSWER3', 'answer3', None),
                 ('**answer2**', 'answer2', 'answer2'), ('', None, None)],
    'ARC-Challenge': [('the correct answer is answer5', 'answer5', 'answer5'),
                      ('answer: answer4', 'answer4', 'answer4'), ('answer6', None, None), ('5', None, None),
                      ('answer12', None, 'answer1')],
    'openbookqa': [('the correct answer is answer4', 'answer4', 'answer4'),
                   ('the correct answer is\nanswer3', 'answer3', 'answer3'), ('_answer2_', None, 'answer2'),
                   ('wilting', None, None)],
    'AQuA': [('The answer is (D).', 'D', 'D'), ('The answer is D', 'D', 'D'), ('Answer: B', 'B', 'A'),
             ('A train runs, hence C', 'C', 'A'), ('(b)', 'B', None), ('The answer is a train', None, None),
             ('B', 'B', 'B'), ('C) 2', 'C', 'C'),
             ('First (A), no: the answer is option (E)', 'E', 'A'), ('Because x = 4', None, 'B'), ('', None, None),
             ('the answer is A.', 'A', 'A'), ("A's share", None, 'A')],
    'MultiArith': [('\nA: 13 + 17 = 30. The answer is 30.', 30, 30), ('30 - 15 = 15', 15, 15),
                   ('20-5=15 and no more', 15, 15), ('none', None, None), ('', None, None),
                   ('The answer is 30.\n\n### Instruction:\nTom has 7', 30, 7)],
    'gsm8k': [('It costs $1,234.5', 1234.5, 1234.5), ('$12.', 12, 12), ('1,234,567', 1234567, 1234567),
              ('1, 2, 3', 3, 3), ('1,2', 2, 12), ('The answer is $1,234.50 in all.', 1234.5, 1234.5),
              ('The answer is 30 - 15 = 15.', 15, 15),
              ('#### 72', 72, 72), ('50%', 50, 50), ('The answer is unknown', None, None)],
    'AddSub': [('The answer is 4.', 4, 4), ('4 crayons', 4, 4), ('.5', .5, 5), ('0.6666666666666666', 2/3, 2/3),
               ('-.25', -.25, 25), ('2.50.', 2.5, 2.5)],
    'SingleEq': [('The answer is 3/4', .75, 4), ('9 hours; the answer is 0.6 of a loaf.', .6, .6), ('x=5', 5, 5),
                 ('1/2/3', 3, 3), ('5/0', math.nan, 0)],
    'SVAMP': [('The answer is -$293.', -293, 293), ('-8', -8, -8), ('−8', -8, 8), ('(-8)', -8, -8), ('10-8', 8, -8),
              ('The answer is 13 crackers and 15 cakes.', 15, 15), ('- 8', -8, 8)],
    'mawps': [('-15', -15, -15), ('1.8333', 1.8333, 1.8333), ('The answer is 12.0', 12, 12), ('It is 3.0.', 3, 3),
              ('answer is: 43 (forty-three)', 43, 43)]}

def test_all_tasks_are_here():
    assert set(rows)==set(said)==set(tasks) and len(tasks)==15 and all(len(o)>=4 for o in said.values())

@pytest.mark.parametrize('name', rows)
def test_row(name):
    ask,gold,choices = rows[name]
    row = dict(instruction=ask, answer=gold)
    assert choices_of(row)==choices and list(choices_of(row))==list(choices)
    assert tasks[name].gold(row)==(gold if choices else float(gold))

@pytest.mark.parametrize('name,text,ours,released', [(k,*o) for k,v in said.items() for o in v])
def test_extract(name, text, ours, released):
    t,names = tasks[name],list(rows[name][2])
    for got,want in ((t.extract(text, names), ours), (t.extract(text, names, released=True), released)):
        near = t.kind=='number' and want is not None and got==pytest.approx(want, nan_ok=True)
        assert got==want or near, (got, want)

def test_tolerance():
    t = tasks['mawps']
    assert t.same(1.833, 1.8333333)
    assert not t.same(1.83, 1.8333333)
    assert not t.same(math.nan, 1.)
    assert not t.same(None, 1.)
    assert not tasks['boolq'].same(None, None)

def test_broken_rows():
    for text in ('x\n\nAnswer1: a\n\nAnswer format: answer1/answer2', 'x Answer Choices: (A) 1 (A) 2'):
        with pytest.raises(ISTError, match='Correct the row'): choices_of(dict(instruction=text))

# --- the real files

@pytest.mark.parametrize('name', tasks)
def test_real_file(name, real_data):
    """Every row: its gold answer and its choices are read; a text that gives the answer is scored as right; the
    reference output's own answer is found"""
    t = tasks[name]
    if name=='hellaswag': pytest.skip('HellaSwag is too large for the folder')
    rows = read_task(t, real_data)
    assert len(rows)==t.size
    for row in rows:
        gold,choices = t.gold(row),choices_of(row)
        names = list(choices)
        assert bool(choices)==(t.kind!='number') and all(choices.values())
        if choices: assert gold in choices and all(o in row['instruction'] for o in choices.values() if o!=names[0])
        for text in ([answers_of(t, row)[gold], answers_of(t, row)[gold].upper()] if choices
                     else [f'The answer is {row["answer"]}.', f'So ${float(row["answer"]):,.6f} it is']):
            assert t.same(t.extract(text, names), gold), (text, gold)
        out = row['output']
        if t.group=='commonsense': assert t.extract(out, names)==t.extract(out, names, True)==gold
        elif t.kind=='letter' and 'answer is (' in out: assert t.extract(out, names)==out.rsplit('answer is (')[-1][0]
        elif t.kind=='number' and 'The answer is ' in out:
            end = out.rsplit('The answer is ')[-1].strip().rstrip('.').replace(',', '').lstrip('$')
            try: stated = float(end)
            except ValueError: continue      # '13 crackers and 15 cakes', '29/3'
            assert t.extract(out)==stated==t.extract(out, released=True)

def test_choices_are_the_whole_tail(real_data):
    "Names and texts of the choices, put together again, are what the row says"
    for name in ('ARC-Easy', 'ARC-Challenge', 'openbookqa', 'social_i_qa', 'piqa', 'winogrande'):
        for row in read_task(tasks[name], real_data):
            said = ''.join(row['instruction'].rpartition('Answer format:')[0].split()).lower()
            assert said.endswith(''.join(f"{k}:{''.join(v.split())}" for k,v in choices_of(row).items()).lower())

# --- the two ways

@pytest.fixture(scope='module')
def pico():
    model = AutoModelForCausalLM.from_pretrained(assets/'pico', dtype=torch.float32)
    return model.eval(),AutoTokenizer.from_pretrained(assets/'pico')

texts = ['The unit of force is', 'Energy', 'When a body is at rest, no net force acts on it, and so', 'In the year']
after = [[' the newton', ' a'], [' is'], [' it stays', ' it moves on at the same speed for ever', ' x', '. y', '\nz'],
         [' 1900', ' 2000 or so', ' one']]

def logp(model, ids, n):
    "Log-probability of the last `n` tokens, written out"
    with torch.no_grad(): p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    return sum(math.log(p[t-1, ids[t]]) for t in range(len(ids)-n, len(ids)))

@pytest.mark.parametrize('batch_size', [1, 3, 4])
def test_likelihood_is_the_naive_one(pico, batch_size):
    model,tok = pico
    got,cut = log_likelihoods(model, tok, texts, after, batch_size)
    for p,a,g in zip(texts, after, got):
        for s,l in zip(a, g):
            n = len(tok(p+s)['input_ids'])-len(tok(p)['input_ids'])
            assert tok(p+s)['input_ids'][:-n]==tok(p)['input_ids']
            assert l==pytest.approx(logp(model, tok(p+s)['input_ids'], n), abs=1e-5*max(1, abs(l)))
    assert cut==[0]*4

def test_likelihood_with_an_adapter(pico):
    "The adapter counts, and a model that cannot leave logits out gives the same"
    import copy
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(pico[0]),
                           LoraConfig(target_modules='all-linear', init_lora_weights=False)).eval()
    fast,_ = log_likelihoods(model, pico[1], texts, after)
    assert max(abs(a-b) for x,y in zip(fast, log_likelihoods(*pico, texts, after)[0]) for a,b in zip(x, y))>0.1
    base,plain = model.get_base_model(),model.get_base_model().forward
    def forward(input_ids, attention_mask, use_cache): return plain(input_ids=input_ids, attention_mask=attention_mask)
    base.forward = forward
    whole,_ = log_likelihoods(model, pico[1], texts, after)
    for a,b in zip(fast, whole): assert a==pytest.approx(b, rel=1e-5)

class Ids:
    "A tokenizer whose texts are lists of ids already"
    pad_token_id,eos_token_id = 0,2
    def __call__(self, texts): return dict(input_ids=[list(o) for o in texts])
    def batch_decode(self, ids, skip_special_tokens):
        return [' '.join(str(o) for o in r.tolist() if o not in (0, 2)) for r in ids]

@pytest.mark.parametrize('name,kwargs', [('gpt2', {}), ('bloom', {}), ('opt', {}), ('mistral', dict(sliding_window=4)),
                                         ('deepseek_v3', {}), ('mamba', {}),
                                         ('lfm2', dict(layer_types=['conv', 'full_attention', 'conv']))],
                         ids=lambda o: o if isinstance(o, str) else '')
def test_architectures(name, kwargs, monkeypatch):
    """Learned, rotary and no positions, a sliding window, states in place of a cache: padded and batched is one at a
    time"""
    from benchmarks import models as m
    monkeypatch.setitem(m.models, name, m.lm(**kwargs) if kwargs else m.models[name])
    model = m.make(name).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3 if p.dim()>1 else 1)
    g = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(5, 64, (n,), generator=g).tolist()
    pairs = [(ids(n), [ids(k) for k in ks]) for n,ks in ((9, [3, 1]), (3, [5]), (6, [2, 2, 4]), (1, [3, 2]))]
    monkeypatch.setattr(questions, '_split_answers', lambda tok, prompt, answers: (prompt, answers))
    got,_ = log_likelihoods(model, Ids(), *zip(*pairs))
    want = [[logp(model, p+o, len(o)) for o in r] for p,r in pairs]
    assert [o for r in got for o in r]==pytest.approx([o for r in want for o in r], abs=2e-5)
    assert max(map(max, want))-min(map(min, want))>5
    many = generate(model, Ids(), [p for p,_ in pairs], max_new_tokens=5)[0]
    assert many==[generate(model, Ids(), [p], max_new_tokens=5)[0][0] for p,_ in pairs]

def test_likelihood_by_hand(monkeypatch):
    """A model without layers that matter: the next token's probabilities are a table, and products of them are the
    answer"""
    from scipy.linalg import hadamard
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=16, n_embd=8, n_layer=1, n_head=1,
                                       layer_norm_epsilon=0., tie_word_embeddings=False)).eval()
    # [token, next token]
    p = torch.tensor([[.1, .2, .3, .4], [.4, .3, .2, .1], [.7, .1, .1, .1], [.25, .25, .25, .25]])
    # orthogonal, with mean 0 and variance 1: the last norm leaves them as they are
    w = torch.tensor(hadamard(8)[1:5], dtype=torch.float32)
    with torch.no_grad():
        for k,v in model.named_parameters():
            if '.h.' in k or 'wpe' in k: v.zero_()
        model.transformer.wte.weight.copy_(w)
        model.lm_head.weight.copy_(p.log().T@w/8)
    monkeypatch.setattr(questions, '_split_answers', lambda tok, prompt, answers: (prompt, answers))
    got,_ = log_likelihoods(model, Ids(), [[3, 0], [1]], [[[1, 0, 2], [2]], [[3, 3]]])
    assert got[0]==pytest.approx([math.log(.2*.4*.3), math.log(.3)], abs=1e-5)
    assert got[1]==pytest.approx([math.log(.1*.25)], abs=1e-5)

def test_seam():
    "A tokenizer that joins letters across the seam: the shared part ends before it"
    class Pairs:
        eos_token_id = None
        def __call__(self, texts):
            return dict(input_ids=[[tuple(o[i:i+2]) for i in range(0, len(o), 2)] for o in texts])
    prefix,rest = split_answer(Pairs(), 'abc', ['d', 'xyz'])
    assert prefix==[('a', 'b')] and rest==[[('c', 'd')], [('c', 'x'), ('y', 'z')]]
    with pytest.raises(ISTError, match='a choice is empty'): split_answer(Pairs(), 'ab', ['', 'cd'])

def test_generate(pico):
    """Batched is one at a time, plain beam search of transformers; modes, random states and the generation settings are
    as before"""
    model,tok = pico
    model.train()
    model.generation_config.temperature = 0.3
    state = torch.get_rng_state()
    got,cut = generate(model, tok, texts, max_new_tokens=10, batch_size=3)
    assert model.training and torch.equal(state, torch.get_rng_state()) and model.generation_config.temperature==0.3
    model.eval()
    model.generation_config.temperature = None
    for p,g in zip(texts, got):
        ids = tok([p], return_tensors='pt')
        with torch.no_grad():
            out = model.generate(**{k:ids[k] for k in ('input_ids', 'attention_mask')}, num_beams=4, do_sample=False,
                                 max_new_tokens=10)
        assert g==tok.decode(out[0, ids['input_ids'].shape[1]:], skip_special_tokens=True).strip()
    assert got==generate(model, tok, texts, max_new_tokens=10, batch_size=1)[0]
    assert got==generate(model, tok, texts[::-1], max_new_tokens=10)[0][::-1]

def test_cut_is_counted(pico):
    long = 'a force '*400
    ll,cut = log_likelihoods(*pico, [long, 'a'], [[' b', ' c d'], [' b']])
    assert cut[0]==len(pico[1](long)['input_ids'])-512+2 and cut[1]==0 and all(math.isfinite(o) for o in ll[0])

def test_interval_against_scipy():
    from scipy.stats import binomtest
    for k,n in ((0, 1), (1, 1), (3, 20), (850, 1000), (0, 50), (50, 50), (1, 3000)):
        for level in (.9, .95, .99):
            ref = binomtest(k, n).proportion_ci(level, method='wilson')
            assert _wilson(k, n, level)==pytest.approx((ref.low, ref.high), abs=1e-12)

def test_mean_interval_covers():
    """Of 2000 simulated evaluations of three tasks, the interval holds the true mean about 95 times in 100; near 0 and
    1, where a bootstrap claims too much, it does better"""
    import numpy as np
    rng = np.random.default_rng(1)
    def boot(k, n): return np.quantile((rng.binomial(n, k/n, (500, 3))/n).mean(1), [.025, .975])
    for p,n,least in (([.3, .6, .9], [200, 400, 100], .94), ([.01, .02, .01], [60, 90, 50], .91),
                      ([.02, .03, .97], [100]*3, .94)):
        p,n = np.array(p),np.array(n)
        draws = rng.binomial(n, p, (2000, 3))
        ours,theirs = (np.mean([lo<=p.mean()<=hi for lo,hi in ends])
                       for ends in ([mean_interval(list(zip(k.tolist(), n.tolist()))) for k in draws],
                                    [boot(k, n) for k in draws]))
        assert least<=ours<=.985 and ours>=theirs-.01, (ours, theirs)
        if p.max()<.05: assert ours>theirs+.04

# --- files, and the command line

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('tasks')
    for k in ('boolq', 'ARC-Easy', 'SVAMP', 'AQuA'):
        (d/k).mkdir()
        (d/k/'test.json').write_text(json.dumps([dict(instruction=f'{i}. '*i+rows[k][0], input='', output='',
                                                      answer=rows[k][1]) for i in range(5)]))
    return d

def test_order_and_files(pico, folder, tmp_path):
    "Rows come back in the order of the file, though sorted for speed; the file alone gives the same score again"
    kw = dict(names='boolq,SVAMP', data=folder, output_dir=tmp_path, max_new_tokens=4, num_beams=2)
    res = evaluate(*pico, batch_size=2, **kw)
    made = json.loads((tmp_path/'SVAMP.json').read_text())
    assert [o['index'] for o in made['rows']]==list(range(5)) and made['summary']==res['tasks']['SVAMP']
    assert [o['output'] for o in made['rows']]==[generate(*pico, [_prompt_of(o)], 2, 4)[0][0]
                                                 for o in read_task(tasks['SVAMP'], folder)]
    want = {k:v for k,v in res['tasks']['SVAMP'].items() if k!='seconds'}
    assert json.loads(json.dumps(rescore(tmp_path/'SVAMP.json')))==want
    made['rows'][3]['output'] = 'The answer is 8.'
    (tmp_path/'changed.json').write_text(json.dumps(made))
    assert rescore(tmp_path/'changed.json')['correct']==res['tasks']['SVAMP']['correct']+1

def test_an_adapter_that_is_switched_is_another_model(folder, tmp_path):
    "Off, scaled, or another one: the weights are the same, and what was made before is not read for it"
    from peft import LoraConfig,get_peft_model
    from ist_nb.evaluate import _fingerprint
    from ist_nb.model import load_model
    model,tokenizer = load_model('pico')
    lora = LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM')
    model = get_peft_model(model, lora)
    model.add_adapter('b', lora)
    marks = [_fingerprint(model)]
    with model.disable_adapter(): marks.append(_fingerprint(model))
    assert _fingerprint(model)==marks[0]
    model.set_adapter('b'); marks.append(_fingerprint(model))
    for m in model.modules():
        if isinstance(getattr(m, 'scaling', None), dict): m.scaling['b'] = 0.5
    marks.append(_fingerprint(model))
    assert len(set(marks))==4
    kw = dict(names='boolq', data=folder, how='likelihood', output_dir=tmp_path, limit=2)
    evaluate(model, tokenizer, **kw)
    with model.disable_adapter(), pytest.raises(ISTError, match='its adapters are others'):
        evaluate(model, tokenizer, **kw)

def test_resume(pico, folder, tmp_path, monkeypatch):
    "After an interruption only what is missing is made; whatever changes the result is noticed"
    import ist_nb.evaluate as e
    kw = dict(data=folder, how='likelihood', output_dir=tmp_path)
    real,made = e._by_likelihood,[]
    def score(model, tokenizer, task, *args, **kwargs):
        if task.name=='AQuA' and not made.count('AQuA'): made.append('AQuA'); raise KeyboardInterrupt
        made.append(task.name)
        return real(model, tokenizer, task, *args, **kwargs)
    monkeypatch.setattr(e, '_by_likelihood', score)
    with pytest.raises(KeyboardInterrupt): e.evaluate(*pico, 'boolq,AQuA,ARC-Easy', **kw)
    res = e.evaluate(*pico, 'boolq,AQuA,ARC-Easy', **kw)
    assert made==['boolq', 'AQuA', 'AQuA', 'ARC-Easy']
    assert e.evaluate(*pico, 'boolq,AQuA,ARC-Easy', batch_size=1, **kw)==res and len(made)==4
    for change,says in ((dict(answers='text'), "answers was 'name' and is 'text'"),
                        (dict(limit=3), 'questions was 5 and is 3'),
                        (dict(prompt=lambda o: o['instruction']), 'the questions are others')):
        with pytest.raises(ISTError, match=says): e.evaluate(*pico, 'boolq', **kw | change)
    import copy
    other = copy.deepcopy(pico[0])
    with torch.no_grad(): next(other.parameters()).mul_(1.01)
    with pytest.raises(ISTError, match="differently: the model's weights or its adapters are others"):
        e.evaluate(other, pico[1], 'boolq', **kw)
    assert e.evaluate(other, pico[1], 'boolq', overwrite=True, **kw)['tasks']['boolq']['n']==5
    (tmp_path/'boolq.json').write_text('{"sett')
    with pytest.raises(ISTError, match='earlier result .* cannot be read .*--overwrite'):
        e.evaluate(*pico, 'boolq', **kw)
    whole = json.loads((tmp_path/'AQuA.json').read_text())
    for broken,says in (('['*100_000, 'RecursionError'), ('[]', 'holds a list'),
                        (json.dumps(whole | dict(settings='as before')), 'holds no settings'),
                        (json.dumps(whole | dict(summary={})), 'is not complete'),
                        (json.dumps(whole | dict(rows=[])), 'is not complete'),
                        (json.dumps(whole | dict(rows=[dict(correct='x')]*5)), 'is not complete'),
                        (json.dumps(whole | dict(rows=3)), 'is not complete')):
        (tmp_path/'AQuA.json').write_text(broken)
        with pytest.raises(ISTError, match=says): e.evaluate(*pico, 'AQuA', **kw)

@pytest.mark.slow
def test_run_is_evaluated(folder, tmp_path, capsys):
    "From ist_finetune to ist_evaluate: a run's folder is found with its base model; what it was taught, it says"
    quiet = '--disable_tqdm true --logging_strategy no --save_strategy no --seed 0'
    (tmp_path/'d.json').write_text(json.dumps([dict(instruction=f'{i}. '*i+rows['ARC-Easy'][0], input='',
                                                    output='the correct answer is answer2', answer='answer2')
                                                    for i in range(5)]*8))
    args = '--max_steps 12 --per_device_train_batch_size 4 --learning_rate 1e-2 --score_batch_size 4'
    assert finetune_main(f'--data {tmp_path}/d.json --output_dir {tmp_path}/run {args} {quiet}'.split())==0
    assert _base_of(tmp_path/'run')==('pico', {})
    argv = f'--model {tmp_path}/run --tasks arc-e --data {folder} --max_new_tokens 12'.split()
    assert main(argv)==0
    out = capsys.readouterr().out
    made = json.loads((tmp_path/'run'/'eval_generate'/'ARC-Easy.json').read_text())
    assert made['summary']['accuracy']==made['summary']['accuracy_released']==1
    assert made['rows'][0]['output']=='the correct answer is answer2'
    assert '100.0%' in out
    assert {'settings', 'versions', 'rows', 'task', 'summary'}==set(made)
    summary = json.loads((tmp_path/'run'/'eval_generate'/'summary.json').read_text())
    assert summary['config']['tasks']=='arc-e' and summary['average']==1
    assert main([*argv, '--merge', '--output_dir', str(tmp_path/'merged')])==0      # folded, it says the same
    assert [o['output']
            for o in json.loads((tmp_path/'merged'/'ARC-Easy.json').read_text())['rows']]==[o['output']
            for o in made['rows']]
    conf = json.loads((tmp_path/'run'/'adapter_config.json').read_text())
    # made on another machine
    (tmp_path/'run'/'adapter_config.json').write_text(json.dumps(conf | dict(base_model_name_or_path='elsewhere/pico')))
    assert _base_of(tmp_path/'run')==('pico', {})
    assert main(f'--model pico --adapter {tmp_path}/run --tasks arc-e --data {folder} --how likelihood --limit 2 '
                f'--output_dir {tmp_path}/l'.split())==0
    assert main(f'--model {tmp_path}/run --adapter {tmp_path}/run --tasks arc-e --data {folder}'.split())==2

mistakes = [
    ('no data', '--tasks boolq', ['--data is missing', 'boolq/test.json']),
    ('no such folder', '--data nowhere', ["'nowhere'", 'boolq/test.json']),
    ('no such task', '--data {d} --tasks bolq', ["'bolq'", "did you mean 'boolq'", 'Allowed']),
    ('no file of a task', '--data {d} --tasks boolq,piqa',
     ['piqa/test.json', 'boolq, ARC-Easy, AQuA, SVAMP', 'Leave piqa out']),
    ('no choices', '--data {d} --tasks SVAMP --how likelihood', ['SVAMP', 'free number', '--how generate']),
    ('how', '--data {d} --how beams', ["'beams'", 'generate', 'likelihood']),
    ('answers', '--data {d} --tasks boolq --how likelihood --answers letter', ["'letter'", 'name', 'text']),
    ('beams of nothing', '--data {d} --how likelihood --num_beams 8', ['--num_beams', 'no effect', 'likelihood']),
    ('answers of nothing', '--data {d} --answers text', ['--answers', 'no effect', 'generate']),
    ('beams', '--data {d} --tasks boolq --num_beams 0', ['num_beams=0', 'at least 1']),
    ('limit', '--data {d} --tasks boolq --limit 0', ['limit', '1']),
    ('not a number', '--data {d} --limit few', ['--limit', "'few'"]),
    ('argument', '--data {d} --task boolq', ["'--task'", "did you mean '--tasks'"]),
    ('model', '--data {d} --tasks boolq --model picco', ["'picco'", "did you mean 'pico'", 'hub id']),
    ('adapter', '--data {d} --tasks boolq --adapter nowhere/run', ["'nowhere/run'", 'cannot be loaded']),
    ('dtype', '--data {d} --tasks boolq --dtype float23', ['float23']),
    ('room', '--data {d} --tasks boolq --max_new_tokens 600', ['600 tokens', '512 positions', 'max_new_tokens']),
    ('column', '--data {d}/bad --tasks boolq', ['row 1', "'answer'"]),
    ('gold', '--data {d}/bad --tasks ARC-Easy', ['row 1', "'answer9'", 'answer1, answer2, answer3']),
    ('broken', '--data {d}/bad --tasks SVAMP', ['test.json', 'broken JSON']),
]

@pytest.mark.parametrize('argv,parts', [o[1:] for o in mistakes], ids=[o[0] for o in mistakes])
def test_mistakes(argv, parts, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = folder/'bad'
    for k,s in (('boolq', json.dumps([dict(instruction='a')])),
                ('ARC-Easy', json.dumps([dict(instruction=rows['ARC-Easy'][0], answer='answer9')])),
                ('SVAMP', '[{"instruction": "a" "answer"')):
        (bad/k).mkdir(parents=True, exist_ok=True)
        (bad/k/'test.json').write_text(s)
    assert main(argv.format(d=folder).split())==2
    said = capsys.readouterr().err
    assert said.startswith('ist_evaluate: ') and said.count('\n')==1 and not [o for o in parts if o not in said], said
    assert not list(tmp_path.iterdir())     # nothing is left behind

# --- files that are broken, or made to do harm: a sentence, quickly, and nothing left behind

@pytest.fixture(scope='module')
def adapter(tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    d = tmp_path_factory.mktemp('adapter')
    get_peft_model(AutoModelForCausalLM.from_pretrained(assets/'pico'),
                   LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM')).save_pretrained(d)
    return d

def conf(**kw):
    def change(d):
        path = d/'adapter_config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | kw))
    return change
def put(name, body): return lambda d: (d/name).write_bytes(body if isinstance(body, bytes) else body.encode())
def weights(change):
    def _change(d):
        from safetensors.torch import load_file, save_file
        save_file(change(load_file(d/'adapter_model.safetensors')), d/'adapter_model.safetensors')
    return _change
def as_bin(d):
    (d/'adapter_model.safetensors').unlink()
    import pickle
    class Harm:
        def __reduce__(self): return open, (str(d/'harm'), 'w')
    torch.save(dict(a=Harm()), d/'adapter_model.bin')

broken_adapters = {
    'empty':          (put('adapter_config.json', ''), ['adapter_config.json cannot be read']),
    'nested':         (put('adapter_config.json', '['*100_000),
                       ['adapter_config.json cannot be read', 'RecursionError']),
    'a list':         (put('adapter_config.json', '[]'), ['holds a list']),
    'not utf-8':      (put('adapter_config.json', b'{"a": "\xff"}'),
                       ['adapter_config.json cannot be read', 'UnicodeDecodeError']),
    'no base':        (conf(base_model_name_or_path=None), ['names no base model', '--adapter']),
    'broken pattern': (conf(target_modules='('), ["target_modules: the pattern '(' cannot be used", 'unterminated',
                                                  'list of names']),
    'slow pattern':   (conf(target_modules='(.*)*(.*)*(.*)*x$'),
                       ['target_modules', 'takes more than', 'simpler pattern']),
    'slow ranks':     (conf(rank_pattern={'(.*)*(.*)*(.*)*x$':4}), ['rank_pattern', 'takes more than']),
    'huge rank':      (conf(r=10**9), ['r=1000000000', 'Copy or save it again']),
    'no such method': (conf(peft_type='LORE'), ['cannot be loaded', 'LORE']),
    'token index':    (conf(trainable_token_indices=[10**9]), ['cannot be loaded']),
    'text as weights': (put('adapter_model.safetensors', 'weights'), ['cannot be loaded', 'SafetensorError']),
    'pickle':         (as_bin, ['cannot be loaded']),
    'weights missing': (weights(lambda w: dict(list(w.items())[2:])), ['cannot be loaded', 'missing adapter keys']),
    'other names':    (weights(lambda w: {k.replace('layers', 'layer'):v for k,v in w.items()}),
                       ['cannot be loaded', 'missing adapter keys']),
    'nested results': (put('results.json', '['*100_000), []),      # not needed: the adapter names its base
}

@pytest.mark.parametrize('change,parts', broken_adapters.values(), ids=broken_adapters)
def test_broken_adapters(change, parts, adapter, folder, tmp_path, capsys, monkeypatch):
    import shutil,ist_nb.model as m
    real = m._bounded
    monkeypatch.setattr(m, '_bounded', lambda f, seconds: real(f, seconds=0.5))
    monkeypatch.chdir(tmp_path)
    d = tmp_path/'run'
    shutil.copytree(adapter, d)
    change(d)
    before = sorted(d.iterdir())
    status = main(f'--model run --data {folder} --tasks boolq --how likelihood --limit 1 --output_dir out'.split())
    said = capsys.readouterr().err
    assert (status,said.count('\n'))==((2, 1) if parts else (0, 0)), said
    assert not [o for o in parts if o not in said], said
    assert 'Traceback' not in said, said
    assert sorted(d.iterdir())==before and (parts==[])==(tmp_path/'out').exists()

def ask_row(**kw): return dict(instruction=rows['ARC-Easy'][0], input='', output='', answer='answer1') | kw
many = ask('Which?', [f'answer{i}' for i in range(1, 1001)], ['a']*1000)
broken_rows = {
    'int':            (ask_row(instruction=3), ["column 'instruction' holds 3 (int)"]),
    'list':           (ask_row(instruction=['a']), ["column 'instruction'", '(list)']),
    'nan':            (ask_row(instruction=math.nan), ["column 'instruction'", '(float)']),
    'empty':          (ask_row(instruction=' '), ['the instruction is empty']),
    'input':          (ask_row(input=3), ["column 'input' holds 3 (int)"]),
    'input list':     (ask_row(input=[1]), ["column 'input'", '(list)']),
    'surrogate':      (ask_row(instruction='\ud800 '+rows['ARC-Easy'][0]), ['surrogate']),
    'answer surrogate': (ask_row(answer='\ud800'), ["none of the row's choices"]),
    'answer int':     (ask_row(answer=1), ["the answer 1 is none of the row's choices"]),
    '1000 choices':   (ask_row(instruction=many), ['1,000 choices', 'at most 26']),
    'nameless choice': (ask_row(instruction='Which? answer1: a : b\n\nAnswer format: answer1//answer2'),
                        ['without a name']),
}

@pytest.mark.parametrize('row,parts', broken_rows.values(), ids=broken_rows)
def test_broken_task_rows(row, parts, tmp_path):
    (tmp_path/'ARC-Easy').mkdir()
    (tmp_path/'ARC-Easy'/'test.json').write_text(json.dumps([ask_row(), row]))
    with pytest.raises(ISTError) as e: read_task(tasks['ARC-Easy'], tmp_path)
    for o in ('ARC-Easy/test.json, row 2', *parts): assert o in str(e.value)

@pytest.mark.parametrize('answer', [math.nan, math.inf, 'seven', [1], None, True])
def test_a_number_that_is_none(answer, tmp_path):
    (tmp_path/'SVAMP').mkdir()
    (tmp_path/'SVAMP'/'test.json').write_text(json.dumps([dict(instruction='How many?', answer=answer)]))
    with pytest.raises(ISTError, match='SVAMP/test.json, row 1'): read_task(tasks['SVAMP'], tmp_path)

def test_names_with_regular_expressions():
    names = ['answer(1', 'answer[2']
    assert choices_of(dict(instruction=ask('Which?', names, 'ab')))==dict(zip(names, 'ab'))
    for o in names: assert tasks['ARC-Easy'].extract(f'so {o}', names)==extract_released(f'so {o}', names)==o

def test_where_results_cannot_go(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'f').write_text('a file')
    for out,says in (('f', 'in f: it is a file'), ('f/deeper/still', 'it is a file'), ('x'*3000, 'cannot be made'),
                     ('a/'+'x'*300, 'cannot be made')):
        assert main(f'--data {folder} --tasks boolq --how likelihood --output_dir {out}'.split())==2
        said = capsys.readouterr().err
        assert says in said and said.count('\n')==1, said
    for flags,says in ((f'--data {"x"*5000}', 'no folder'), (f'--data {folder} --dtype load', "'load'"),
                       (f'--data {folder} --num_beams 100000', 'at most 64'),
                       (f'--data {folder} --model ./nofolder', './nofolder: there is no such folder')):
        assert main(f'--tasks boolq {flags}'.split())==2
        assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()]==['f']

def test_no_code_of_a_model_is_run(folder, tmp_path, capsys, monkeypatch):
    "Nor is anybody asked; with the flag of the ecosystem it is run"
    import shutil
    monkeypatch.setattr('builtins.input', lambda *a: pytest.fail('asked on standard input'))
    monkeypatch.setenv('HF_MODULES_CACHE', str(tmp_path/'cache'))
    d = tmp_path/'m'
    shutil.copytree(assets/'pico', d)
    made = json.loads((d/'config.json').read_text())
    (d/'config.json').write_text(json.dumps(made | dict(model_type='mine',
                                                        auto_map=dict(AutoConfig='code.MyConfig',
                                                                      AutoModelForCausalLM='code.MyModel'))))
    (d/'code.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w')\nfrom transformers import "
                             f"LlamaConfig,LlamaForCausalLM\nclass MyConfig(LlamaConfig): pass\nclass "
                             f"MyModel(LlamaForCausalLM): pass\n")
    argv = f'--model {d} --data {folder} --tasks boolq --how likelihood --limit 1 --output_dir {tmp_path/"o"}'.split()
    assert main(argv)==2
    said = capsys.readouterr().err
    assert 'give --trust_remote_code if you trust it' in said
    assert 'Do you wish' not in said
    assert not (tmp_path/'ran').exists()
    main([*argv, '--trust_remote_code'])
    assert (tmp_path/'ran').exists()

def test_weights_that_are_missing_are_not_made_up(folder, tmp_path, capsys):
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(assets/'pico', tmp_path/'m')
    w = load_file(tmp_path/'m'/'model.safetensors')
    lost = next(k for k in w if 'q_proj' in k)
    save_file({k:v for k,v in w.items() if k!=lost}, tmp_path/'m'/'model.safetensors', metadata=dict(format='pt'))
    assert main(f'--model {tmp_path}/m --data {folder} --tasks boolq --output_dir {tmp_path}/o'.split())==2
    said = capsys.readouterr().err
    assert '1 weights of the model' in said and lost in said and 'random' in said

def test_debug_shows_where(folder, tmp_path, monkeypatch, capsys):
    "What nobody foresaw is a sentence too, and --debug raises it"
    import ist_nb.evaluate as e
    def fail(*a, **k): raise ZeroDivisionError('no such thing')
    monkeypatch.setattr(e, '_load_adapted', fail)
    argv = f'--data {folder} --tasks boolq --output_dir {tmp_path}/o'.split()
    assert main(argv)==2 and 'no such thing (ZeroDivisionError)' in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError): main([*argv, '--debug'])

@pytest.mark.parametrize('argv,status,says',
                         [(['--version'], 0, 'ist_evaluate 0.'), (['--modle', 'x'], 2, "did you mean '--model'"),
                          (['--data', '/nowhere'], 2, "no folder '/nowhere'")], ids=lambda o: o[0]
                          if isinstance(o, list) else '')
def test_what_needs_no_torch(argv, status, says):
    "The version, a mistyped flag and a folder that is not there are answered before anything large is imported"
    res = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'ist_nb.evaluate', *argv], capture_output=True,
                         text=True)
    assert res.returncode==status
    assert says in res.stdout+res.stderr
    assert not {'torch', 'transformers'} & {l.split('|')[-1].strip() for l in res.stderr.splitlines()}

# --- what tells the ways of scoring apart

def test_likelihood_over_the_length(monkeypatch):
    "Where the sum and the sum over the length in characters choose differently, each is what it says"
    import ist_nb.evaluate as e
    row = dict(instruction=ask('Which?', marks('answer', 3), ['no', 'a much longer one', 'four'] ), answer='answer2')
    monkeypatch.setattr(questions, '_log_likelihoods', lambda *a, **k: ([[-3., -8., -4.]], [0]))
    got, = e._by_likelihood(None, None, tasks['ARC-Easy'], [row], answers='text')
    # -3/2, -8/17, -4/4
    assert (got['predicted'],got['correct'],got['predicted_norm'],
            got['correct_norm'])==('answer1', False, 'answer2', True)
    assert got['lengths']==[2, 17, 4]
    assert (e._summarise([got])['accuracy'],e._summarise([got])['accuracy_norm'])==(0, 1)

@pytest.mark.parametrize('want,text', [('B', 'The answer is (A). No: the answer is (B).'),
                                       ('C', 'Not (A) and not (B) but (C)'), ('D', 'A. B. D.'),
                                       ('b', 'answer: (a), I mean answer: (b)'),
                                       ('A', 'The answer is (A).\n\n### Instruction:\nWhich? The answer is (C).'),
                                       ('B', 'The answer is B because it is cheap'),
                                       ('A', 'The answer is A because it is cheap'), ('A', 'I think A is right'),
                                       ('D', 'I choose D here, not a bit of C: D it is.'),
                                       ('C', 'Option C looks good. A dog is no answer.')])
def test_the_last_letter_counts(want, text): assert tasks['AQuA'].extract(text, 'ABCDE')==want.upper()
@pytest.mark.parametrize('text', ['A dog is nice.', 'No. A dog is nice.', 'Answer: A dog is nice.', 'So:\nA dog'])
def test_an_article_is_no_letter(text): assert tasks['AQuA'].extract(text, 'ABCDE') is None

@pytest.mark.parametrize('want,text', [('answer2', 'The answer is answer1. No, the answer is answer2'),
                                       ('answer1', 'answer1, not answer2'),
                                       ('answer1', 'the answer is answer1\n\nQuestion: Which?\nThe answer is answer2')])
def test_which_name_counts(want, text): assert tasks['boolq'].extract(text, ['answer1', 'answer2'])==want

@pytest.mark.parametrize('want,text', [(24, 'The answer is 24 dollars, not 12.'),
                                       (24, 'The answer is 24 (12 eggs at 2 dollars).'),
                                       (8, 'Answer: 8\n\n### Instruction:\nWhat is 2+2? Answer: 4'),
                                       (1500, 'Answer: 1 500'),
    (24, 'The answer is 24 because 12 eggs cost 2 each.'), (24, 'The answer is 24, since 12*2 is 24 and 1 more is 25'),
    (1234567, 'It costs 1\u00a0234\u00a0567 in all'), (15, 'The answer is 30 - 15 = 15.'),
    (7, 'The answer is the sum of 3 and 4 = 7'),
    (15, 'The answer is, as we saw, 15'), (8, 'So 8.\n\nQ: Tom has 7 pens and 2 more.'),
    (5, '\n### Question: again?\nThe answer is 5'), (72, 'it is so\n#### 72'), (1.5, 'answer: 1.5 of 10'),
    (-1500, 'The answer is -$1,500; 3 are left'), (3, 'Answer: [3]'), (4, 'The answer is 3. No: the answer is 4.'),
    (12, 'The answer is 12: 3 times 4')])
def test_numbers_and_what_is_said_of_them(want, text): assert tasks['SVAMP'].extract(text)==want

def test_help_is_quick_and_whole():
    out = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'ist_nb.evaluate', '--help'], capture_output=True,
                         text=True, check=True)
    assert all(f'--{o} ' in out.stdout for o in vars(_parse(['--data', 'd'])))
    assert 'torch' not in {l.split('|')[-1].strip() for l in out.stderr.splitlines()}
