"What the package is made of: pinned, licensed, and built again bit for bit"
import configparser,os,re,shlex,shutil,subprocess,sys,pytest
from pathlib import Path
from packaging.requirements import Requirement
import licences,lock

root = Path(__file__).parent.parent
pins = [Requirement(o) for o in (root/'constraints.txt').read_text().splitlines() if not o.startswith('#')]

def test_constraints_fit_the_settings():
    "Each requirement is pinned, to a version that it allows; but torch, which the machine chooses"
    ini = configparser.ConfigParser(delimiters=['=']); ini.read(root/'settings.ini')
    for o in shlex.split(ini['DEFAULT']['requirements'])+shlex.split(ini['DEFAULT']['dev_requirements']):
        r = Requirement(o)
        mine = [p for p in pins if licences.name(p.name)==licences.name(r.name)]
        if r.name=='torch': assert not mine; continue
        assert mine, f'{r.name} is not pinned: run tools/lock.py'
        for p in mine:
            assert r.specifier.contains(next(iter(p.specifier)).version,
                                        prereleases=True), f'{p} does not fit {r}: run tools/lock.py'

def test_constraints_are_versions_alone():
    text = (root/'constraints.txt').read_text()
    assert '://' not in text
    assert '--' not in text
    assert all(len(p.specifier)==1 and next(iter(p.specifier)).operator=='==' for p in pins)
    assert not any(lock.of_torch.match(f'{p.name}==') for p in pins)

@pytest.mark.parametrize('said,is_bad', [({'License-Expression':'MIT'}, False),
                                         ({'License-Expression':'GPL-3.0-only'}, True),
                                         ({'License-Expression':'MIT OR GPL-2.0-only'}, False),
                                         ({'License-Expression':'MIT AND GPL-2.0-only'}, True),
    ({'Classifier':'License :: OSI Approved :: BSD License'}, False),
    ({'Classifier':'License :: OSI Approved :: GNU General Public License v3 (GPLv3)'}, True),
    ({'License':'Apache 2.0'}, False), ({'License':'Proprietary'}, True), ({}, True)], ids=str)
def test_licences(tmp_path, monkeypatch, said, is_bad):
    d = tmp_path/'some_package-1.0.dist-info'; d.mkdir()
    (d/'METADATA').write_text('Metadata-Version: 2.4\nName: some-package\nVersion: 1.0\n'
                              +''.join(f'{k}: {v}\n' for k,v in said.items()))
    monkeypatch.syspath_prepend(tmp_path)
    assert licences.bad(licences.licence('some-package'))==is_bad

def wheel(src, out, epoch):
    "A wheel built from `src`"
    env = {k:v for k,v in os.environ.items() if k!='SOURCE_DATE_EPOCH'}
    if epoch: env['SOURCE_DATE_EPOCH'] = epoch
    out.mkdir()
    r = subprocess.run([sys.executable, '-c', f'from setuptools import build_meta as b; b.build_wheel({str(out)!r})'],
                       cwd=src, env=env, capture_output=True, text=True)
    assert not r.returncode, r.stderr[-2000:]
    return next(out.glob('*.whl')).read_bytes()

def copy(to, age):
    "The sources in another folder, with other dates, listed in another order"
    to.mkdir()
    names = 'settings.ini setup.py pyproject.toml README.md LICENSE MANIFEST.in CHANGELOG.md CITATION.cff ist_nb'
    names = names.split()
    for o in names if age else names[::-1]:
        if (root/o).is_dir(): shutil.copytree(root/o, to/o, ignore=shutil.ignore_patterns('__pycache__'))
        else: shutil.copy(root/o, to/o)
    for p in to.rglob('*'): os.utime(p, (1.7e9+age,)*2)
    return to

def test_wheels_are_reproducible(tmp_path):
    pytest.importorskip('setuptools', minversion='70.1')
    a,b = copy(tmp_path/'a', 0),copy(tmp_path/'another', 1e6)
    first = wheel(a, tmp_path/'1', '1700000000')
    assert first==wheel(b, tmp_path/'2', '1700000000')
    assert first!=wheel(copy(tmp_path/'c', 2e6), tmp_path/'3', None)   # without the fixed date they differ
