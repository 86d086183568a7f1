"What every test may count on: no network, no windows, one thread a worker"
import os,pytest
try: import setuptools   # before anything imports distutils: PEFT's BOFT looks for a compiler when it is made, and setuptools insists on having come first
except ImportError: pass
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')   # workers already fill the cores

root = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='session')
def shared():
    "The folder of data too large for the repository, where it lies beside this checkout"
    d = root.parent/'shared'
    if not d.is_dir(): pytest.skip('shared data not beside this checkout')
    return d
