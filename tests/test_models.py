"IST finds and trains the layers of many architectures, and the committed table says what is so"
import json,pytest
import models_matrix as m

rows = {r['model']:r for r in json.loads((m.Path(m.__file__).parent/'results'/'models_matrix.json').read_text())['rows']}

@pytest.mark.parametrize('name', m.models)
def test_model(name): assert m.check(name)==rows[name], 'run benchmarks/models_matrix.py'

def test_table_is_complete():
    assert set(rows)==set(m.models), 'run benchmarks/models_matrix.py'
    assert f'[{len(rows)} architectures]' in (m.Path(m.__file__).parent.parent/'README.md').read_text()
