"The page on which a reader moves layers, schedule and length shows what was measured, and the grid of the real sampler"
import json,re,pytest,torch
from pathlib import Path
from statistics import mean
from benchmarks import explore
from benchmarks.quality import best_rates,contenders
from benchmarks.record import read
from ist_nb import IST,ISTConfig
from test_numbers import quality

root = Path(__file__).parent.parent
data = explore.numbers()
cells = [(t, given, r) for t,given in zip(data['texts'], explore.texts) for r in t['runs']]

def runs_of(given, r):
    "The runs behind one of the page, by the code of another page"
    scale,task,_,few = given
    bench = quality()['benches'][scale]
    found = [quality()['chosen'](bench)[task, o] for o in (['repeated'] if few else ['full', 'short'])]
    one, = [runs for o in found for m,runs in o.items() if explore.place.get(m)==r['schedule'] and
            round(16*explore.settings_of(m).n_active, 1)==r['layers'] and runs[0]['curve'][-1]['step']==r['steps']]
    whole = bench['settings']['repeated' if few else 'full'][0]
    return one,found[0]['LoRA'],r['steps']/whole

def test_the_page_holds_these_numbers():
    "The saved page is what the committed files make now, and small"
    nb = json.loads((root/'nbs/results/explore.ipynb').read_text())
    html = next(''.join(o['data']['text/html']) for c in nb['cells'] for o in c.get('outputs', [])
                if 'text/html' in o.get('data', {}))
    assert html.strip()==explore.page(data).strip()
    inside = re.search(r'^\}\)\((\{.*\})\)$', html, re.M)[1]
    assert json.loads(inside)==data and len(inside)<60_000
    assert not re.search(r'(?:src|href)=|https?:|fetch\(|import ', html)       # it asks for nothing

def test_losses_and_memory():
    for t,given,r in cells:
        runs,lora,_ = runs_of(given, r)
        losses = [o['stopped']['test'] if t['few'] else o['test'] for o in runs.values()]
        assert r['seeds']==len(runs)>=3 and r['rate']==runs[0]['lr']
        assert r['loss']==pytest.approx([mean(losses), min(losses), max(losses)], abs=1e-5)
        assert r['end']==pytest.approx(mean(o['test'] for o in runs.values()), abs=1e-5)
        if given[0]=='pico': assert r['memory'] is None
        else: assert r['memory'][0]==pytest.approx(mean(o['peak'] for o in runs.values())
                                                   /mean(o['peak'] for o in lora.values()), abs=1e-4)

def test_learning_rates():
    "Each is the one whose best step was best on validation rows, with the first seed"
    for t,given,r in cells:
        run = runs_of(given, r)[0][0]
        assert r['rate']==best_rates(read(f'quality_{given[0]}')['runs'])[run['method'], run['task'], run['regime']]

def test_time():
    "As the page on two small models has it, where a run is as long as the whole run of LoRA; LoRA itself is 1"
    seen = 0
    for t,given,r in cells:
        runs,*_ = runs_of(given, r)
        key = 'stopped' if t['few'] else 'curve'
        costs = [(o[key] if t['few'] else o[key][-1])['cost'] for o in runs.values()]
        if r['schedule']==0 and r['steps']==t['steps'] and not t['few']: assert r['time'][0]==pytest.approx(1, abs=1e-4)
        if runs[0]['regime']=='short': continue         # that page compares these with LoRA's short run
        seen += 1
        assert r['time'][0]==pytest.approx(mean(costs), abs=1e-4)
    assert seen>60

def test_short_runs_are_compared_with_the_whole_run():
    bench = read('quality_larger')
    of = lambda regime, m, lr: [r['seconds'] for r in bench['runs']
                                if (r['task'], r['regime'], r['method'], r['lr'])==('book', regime, m, lr)]
    r, = [r for r in data['texts'][1]['runs'] if (r['schedule'], r['steps'])==(3, 80)]
    assert r['time'][0]==pytest.approx(mean(of('short', 'RST', 0.002))/mean(of('full', 'LoRA', 0.001)), abs=1e-4)

def test_differences():
    "Beside each sparse run stand its differences from every dense run, seed by seed"
    for t,given,r in cells:
        dense = [o for o in t['runs'] if o['schedule']==0]
        assert len(r['minus'])==(len(dense) if r['schedule'] else 0)
        runs = runs_of(given, r)[0]
        for o,(d,half) in zip(dense, r['minus']):
            other = runs_of(given, o)[0]
            of = lambda x: x['stopped']['test'] if t['few'] else x['test']
            found = quality()['pair'](dict(a=runs, b=other), 'a', 'b', of)
            assert (d, half)==pytest.approx(found[:2], abs=2e-5)

def test_every_run_with_three_seeds_is_there():
    "Of the schedules of the page, nothing that was measured is left out"
    want = 0
    for scale,task,_,few in explore.texts:
        runs = quality()['chosen'](quality()['benches'][scale])
        for regime in ['repeated'] if few else ['full', 'short']:
            want += sum(m in explore.place and sum(r['cost'] is not None for r in o.values())>2
                        for m,o in runs[task, regime].items())
    assert len(cells)==want
    assert len({(t['name'], r['schedule'], r['layers'], r['steps']) for t,_,r in cells})==want     # each is found again

def test_the_grid_is_what_the_runs_did():
    "For every schedule without importance: the layers of all steps, added up, are the counts that the bench kept"
    seen = set()
    for t,given,r in cells:
        if r['scored']: continue
        run = runs_of(given, r)[0][0]
        counts = torch.zeros(16, dtype=torch.long)
        layers = list(explore.drawn(run['method'], r['steps'], torch.zeros(16)))
        for o in layers: counts[o] += 1
        assert counts.tolist()==run['times_active'], run['method']
        shown = data['grids'][r['grid']]
        assert [int(shown[i:i+4], 16) for i in range(0, len(shown), 4)]==[sum(2**i for i in o.tolist())
                                                                        for o in layers[::t['stride']]]
        seen.add(run['method'])
    assert len(seen)>9 and {'RST', 'shrink to top', 'static bottom'}<=seen

@pytest.mark.parametrize('method', ['importance, suppression', 'depth, fisher', 'shrink to depth', 'RST'])
def test_the_grid_is_that_of_ist(method):
    "`IST` itself, with the same importance, draws the same layers"
    from peft import LoraConfig,get_peft_model
    from transformers import LlamaConfig,LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=16,
                                         num_attention_heads=1, num_key_value_heads=1))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM'))
    importance = torch.linspace(-2, 2, 16)
    ist = IST(model, ISTConfig(**contenders[method][0], seed=0), probe=[{}], n_steps=60)     # nothing is scored
    ist.importance = importance
    for t,layers in enumerate(explore.drawn(method, 60, importance)):
        ist.t = t
        assert torch.equal(ist.draw(), layers)
    ist.close()
