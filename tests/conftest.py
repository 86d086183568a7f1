"What every test may count on: no network, no windows, one thread a worker"
import gc,os,pytest
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

@pytest.fixture(autouse=True)
def no_page(request, monkeypatch):
    "Drawing the page of a run takes a second, in some 150 runs; the tests of the page and the notebooks draw it"
    import sys
    if 'ist_nb.finetune' not in sys.modules or request.module.__name__ in ('test_report', 'test_nbs'): return
    def write_report(folder):
        page = Path(folder)/'report.html'
        page.write_text('<!doctype html>')
        return page
    monkeypatch.setattr('ist_nb.run_folder.write_report', write_report)
