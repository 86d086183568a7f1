"""Write constraints.txt: every package of the development environment with its version, for Python 3.10 to 3.13 on any
system.
`python tools/lock.py` writes the newest versions that fit settings.ini; `pip install -c constraints.txt -e '.[dev]'`
installs them.
torch is left out, with what only its CUDA builds need: it is chosen by the machine, and .ci/run says which one is
tested"""
import re,shutil,subprocess,sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
of_torch = re.compile(r'(torch|triton|nvidia-.*|cuda-.*)==')
head = '# Made by tools/lock.py: the development environment, version by version. torch is not in it; see there.\n'

def lock():
    uv = shutil.which('uv') or sys.exit('tools/lock.py needs uv: pip install uv')
    cmd = [uv, 'pip', 'compile', '-q', 'setup.py', '--extra', 'dev', '--universal', '--python-version', '3.10',
           '--no-annotate', '--no-header', '--no-emit-index-url', '--no-emit-find-links']
    lines = subprocess.run(cmd, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    pins = [o for o in lines if re.match(r'[a-z0-9.-]+==', o) and not of_torch.match(o)]
    assert len(pins)>50, lines
    (root/'constraints.txt').write_text(head+'\n'.join(pins)+'\n')
    return pins

if __name__=='__main__': print(f'constraints.txt: {len(lock())} versions')
