"The arrows between the rooms point one way, and the house stays as small as it is"
import re
from pathlib import Path
import house

package = Path(house.root/'ist_nb')
# a module may import those before it
order = ('config layers suppression scorers samplers state probe ist callback guard activations memory moments '
         'processes speed parts keep files data runs cli model questions evaluate plot run_folder finetune fading '
         'theory adapters').split()
# found by name when they are first needed: what fills a registry, what accompanies a step, and a picture
late = {('config', 'scorers'), ('config', 'samplers'), ('config', 'speed'), ('ist', 'parts'), ('callback', 'plot')}

def modules(): return {p.stem:p.read_text() for p in package.glob('*.py') if p.stem[0]!='_'}

def test_every_import_points_back():
    assert set(modules())==set(order)
    for name,text in modules().items():
        wrong = house.imports(text)-set(order[:order.index(name)])-{name, '__version__'}
        assert not wrong, f'{name} imports {sorted(wrong)}, which comes after it'

def test_what_is_found_late():
    found = {(name, o) for name,text in modules().items() for o in re.findall(r'''['"]ist_nb\.(\w+)['"]''', text)}
    assert found==late

def test_ist_knows_two_loops():
    assert house.imports(modules()['ist'])=={'config', 'layers', 'probe', 'scorers', 'state', 'suppression'}

def test_the_walk_sees():
    "An import at the top, one in a function, and one of a module itself"
    text = 'from .ist import IST\ndef f(): from ist_nb.plot import x\nfrom . import speed'
    assert house.imports(text)=={'ist', 'plot', 'speed'}

def test_size():
    "Who adds lines or names raises the number here, and says why in the commit"
    have = house.totals(house.measure())
    assert have['lines']<=7703 and have['names']<=126, have
    assert have['longest']<=502 and have['widest']<=120, have

def test_no_line_is_too_long():
    wide = {f'{p}:{i}' for folder in ('tests', 'tools', 'benchmarks') for p in (house.root/folder).glob('*.py')
            for i,l in enumerate(p.read_text().splitlines(), 1) if len(l)>120}
    assert not wide, sorted(wide)

def test_no_test_hides_another():
    "Of two tests with one name in a file, only the second runs"
    for p in (house.root/'tests').glob('test_*.py'):
        names = re.findall(r'^def (test_\w+)', p.read_text(), re.M)
        assert len(names)==len(set(names)), f'{p.name}: {sorted(o for o in set(names) if names.count(o)>1)}'

def test_an_output_comes_soon():
    "On the pages of the method a reader sees an output within the first 25 exported lines"
    pages = house.measure()
    assert {k:o['before'] for k,o in pages.items() if re.match(r'0\d_', k) and o['before']>25}=={}
