"What every test may count on: no network, no windows, one thread a worker"
import os,pytest
# before anything imports distutils: PEFT's BOFT looks for a compiler when it is made, and setuptools insists on having
# come first
try: import setuptools
except ImportError: pass
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
# workers already fill the cores
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')

# a folder with commonsense/, math/, domains/ and textbooks/, which are too large for the repository
real = os.environ.get('IST_NB_DATA')

@pytest.fixture(scope='session')
def real_data():
    "The folder named by IST_NB_DATA; nothing is looked for anywhere else"
    if not real: pytest.skip('IST_NB_DATA names no folder with the real data')
    return Path(real)
