"Every method in PEFT's registry does what IST needs, or is refused; and the committed table says what is so"
import peft,pytest
from benchmarks import peft_methods as m, record

committed = record.read('peft_methods')
rows = {r['method']:r for r in committed['rows']+committed['variants']}
names = [str(o.value) for o in m.registry]

@pytest.mark.parametrize('name', [*names, *m.variants])
def test_method(name):
    r = m.check(name)
    if name not in rows: return   # a method that is newer than the table
    want = rows[name]
    assert r['status']==want['status'], 'run python -m benchmarks peft_methods'
    for k in ('reason', 'form', 'shared', 'outside', 'loads'):
        assert r.get(k)==want.get(k), f'{k}: run python -m benchmarks peft_methods'
    assert (r.get('merges') is None)==(want.get('merges') is None), 'merges: run python -m benchmarks peft_methods'

def test_table_is_complete():
    "With the PEFT that the table names; a newer one may have more methods, which `test_method` checks all the same"
    now = set(names)|set(m.variants)
    assert set(rows)==now or peft.__version__!=committed['versions']['peft'], 'run python -m benchmarks peft_methods'

def test_readme_counts():
    "The README says how many methods of PEFT's own are supported"
    rows = [r for r in committed['rows'] if r['method']!='BOTTLENECK']
    assert f"{sum(r['status']=='supported' for r in rows)} of PEFT's {len(rows)} methods" in (
        record.root/'README.md').read_text()

def test_xlora_is_not_loaded_by_peft_itself():
    "The fault named in the table is PEFT's: no IST here, only random weights"
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        d = m.Path(d)
        model = m.get_peft_model(m.tiny(), m.config_for('XLORA', d)).eval()
        for p in model.parameters():
            if p.requires_grad: p.data += m.torch.randn_like(p)
        model.save_pretrained(d/'saved')
        again = m.PeftModel.from_pretrained(m.tiny(), d/'saved').eval()
        assert m.off(m.logits(again, m.batch('')), m.logits(model, m.batch('')))>0.1

def test_adalora_cannot_allocate_ranks():
    "As the table's note says: PEFT's allocator wants the gradient of every layer"
    model,b = m.get_peft_model(m.tiny(), m.config_for('ADALORA', None)),m.batch('')
    ist = m.IST(model, m.ISTConfig.rst())
    with pytest.raises(TypeError), ist.step():
        model(**b).loss.backward()
        model.base_model.update_and_allocate(1)
    assert all(p.requires_grad for o in ist.layers for p in o.params)

def test_adamss_freezes_its_own():
    "What a method freezes itself during training stays frozen after a step"
    model = m.get_peft_model(m.tiny(), m.config_for('ADAMSS', None))
    ist = m.IST(model, m.ISTConfig.rst(n_active=1))
    p = ist.layers[0].params[0]
    p.requires_grad_(False)
    for _ in range(4):
        with ist.step(): pass
        assert not p.requires_grad
