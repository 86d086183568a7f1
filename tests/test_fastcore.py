"The development environment holds fastcore 1, which nbdev 2 needs; a user gets fastcore 2. The library runs on both"
import importlib.util,os,re,shutil,subprocess,sys,pytest
from pathlib import Path

smoke = '''
import sys,pkgutil,importlib,fastcore,ist_nb
assert fastcore.__version__.startswith('2.'), fastcore.__version__
mods = sorted(m.name for m in pkgutil.walk_packages(ist_nb.__path__, 'ist_nb.'))
for m in mods: importlib.import_module(m)
for o in ist_nb.__all__: getattr(ist_nb, o)
print('imported', len(mods))
from ist_nb.finetune import main
sys.argv = ['ist_finetune', '--help']
try: main()
except SystemExit as e: sys.exit(e.code)
'''
no_index = re.compile(r'connection|timed? ?out|name resolution|network|proxy|unreachable|dns error|No matching '
                      r'distribution|could not find a version|error sending request', re.I)

def install(req, to):
    "Install `req` alone into the folder `to`, with pip where this environment has it, else uv"
    pip = [sys.executable, '-m', 'pip'] if importlib.util.find_spec('pip') else [shutil.which('uv') or 'uv', 'pip']
    return subprocess.run([*pip, 'install', '-q', '--no-deps', '--target', str(to), req], capture_output=True,
                          text=True)

@pytest.mark.slow   # `.ci/run` installs the wheel with fastcore 2 and fine-tunes with it
def test_fastcore2(tmp_path):
    res = install('fastcore>=2,<3', tmp_path/'fc')
    if res.returncode and no_index.search(res.stderr):
        pytest.skip(f'no package index to take fastcore 2 from: {res.stderr.strip().splitlines()[-1]}')
    assert not res.returncode, res.stderr
    root = Path(__file__).parent.parent
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path/'fc'), str(root)])}
    res = subprocess.run([sys.executable, '-c', smoke], cwd=tmp_path, env=env, capture_output=True, text=True,
                         timeout=300)
    assert not res.returncode, res.stderr[-3000:]
    assert '--output_dir' in res.stdout, res.stdout[-2000:]
