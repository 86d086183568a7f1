"What every test may count on: no network, no windows, one thread a worker"
import gc,json,os,shutil,pytest
# before anything imports distutils: PEFT's BOFT looks for a compiler when it is made, and setuptools insists on having
# come first
try: import setuptools
except ImportError: pass
from hashlib import blake2b
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
# workers already fill the cores
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')

def pytest_runtest_setup():
    "The libraries make half a million objects that live as long as the worker; a Trainer's `gc.collect()` skips them"
    gc.collect(); gc.freeze()

# a folder with commonsense/, math/, domains/ and textbooks/, which are too large for the repository
real = os.environ.get('IST_NB_DATA')

@pytest.fixture(scope='session')
def real_data():
    "The folder named by IST_NB_DATA; nothing is looked for anywhere else"
    if not real: pytest.skip('IST_NB_DATA names no folder with the real data')
    return Path(real)

texts = {}
@pytest.fixture
def text_once(monkeypatch):
    """A model writes its own text once a worker, which is half of a short run's time. tests/test_keep.py shows that the
    text depends on nothing but this key, and that writing it moves no random number"""
    import ist_nb.keep,torch
    real = ist_nb.keep.own_text
    def own_text(model, tokenizer, *args, **kwargs):
        key = blake2b(repr((args, kwargs, tokenizer.chat_template, model.config.to_dict())).encode())
        for n,p in model.named_parameters():
            if 'lora_' not in n: key.update(p.detach().flatten().view(torch.uint8).numpy())
        key = key.digest()
        if key not in texts: texts[key] = real(model, tokenizer, *args, **kwargs)
        return {k:v.clone() for k,v in texts[key].items()}
    monkeypatch.setattr(ist_nb.keep, 'own_text', own_text)

@pytest.fixture(scope='session')
def four_layers(tmp_path_factory):
    """Four of pico's sixteen layers, in a folder: what a run costs here is by the layer, and most of what the
    command line does is not"""
    from ist_nb.model import assets
    from safetensors.torch import load_file,save_file
    d = tmp_path_factory.mktemp('assets')/'pico'
    shutil.copytree(assets/'pico', d)
    (d/'config.json').write_text(json.dumps(json.loads((d/'config.json').read_text()) | dict(num_hidden_layers=4)))
    place,held = {'0':'0', '3':'1', '7':'2', '12':'3'},{}     # those that do best without the others
    for k,v in load_file(d/'model.safetensors').items():
        parts = k.split('.')
        if 'layers' in parts:
            if parts[2] not in place: continue
            parts[2] = place[parts[2]]
        held['.'.join(parts)] = v
    save_file(held, d/'model.safetensors', metadata=dict(format='pt'))
    return d

def shorten(monkeypatch, pico):
    from ist_nb import fading,finetune,model
    for o in (fading, finetune, model): monkeypatch.setattr(o, 'assets', pico.parent)

@pytest.fixture(scope='module')
def short_pico(four_layers):
    "'pico' is `four_layers` for the commands; tests/test_pico.py, the notebooks and .ci/run have the whole of it"
    with pytest.MonkeyPatch.context() as m: yield shorten(m, four_layers)

@pytest.fixture
def may_shorten(four_layers, monkeypatch):
    "A function that does so for one test"
    return lambda: shorten(monkeypatch, four_layers)

@pytest.fixture(autouse=True)
def no_page(request, monkeypatch):
    """Drawing the page of a run and its picture takes a second, in some 150 runs; the tests of pictures and of the page
    and the notebooks draw them"""
    import sys
    draw = 'test_logging', 'test_nbs', 'test_plot', 'test_report'
    if 'ist_nb.finetune' not in sys.modules or request.module.__name__ in draw: return
    from ist_nb import plot
    def write_report(folder):
        page = Path(folder)/'report.html'
        page.write_text('<!doctype html>')
        return page
    def save_picture(fig, path, alt=''): Path(path).write_text(''); return path
    monkeypatch.setattr('ist_nb.run_folder.write_report', write_report)
    monkeypatch.setattr(plot, 'plot_importance', lambda *args: None)
    monkeypatch.setattr(plot, 'save_picture', save_picture)
