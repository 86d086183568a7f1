"IST finds and trains the layers of many architectures, and the committed table says what is so"
import pytest
from benchmarks import models as m, record

rows = {r['model']:r for r in record.read('models')['rows']}

@pytest.mark.parametrize('name', m.models)
def test_model(name): assert m.check(name)==rows[name], 'run python -m benchmarks models'

def test_table_is_complete():
    assert set(rows)==set(m.models), 'run python -m benchmarks models'
    assert f'[{len(rows)} architectures]' in (record.root/'README.md').read_text()
