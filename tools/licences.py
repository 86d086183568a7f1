"""The licences of everything that comes with `pip install ist_nb`, from the packages' own metadata.
`python tools/licences.py` lists them and fails at one that is not in `allowed`; .ci/run does so in the environment of a
user"""
import re,sys
from importlib.metadata import PackageNotFoundError,distribution,requires
from packaging.requirements import Requirement

# SPDX names of licences under which a program may be used beside code under the Apache licence 2.0, by anyone
# MPL-2.0 asks for the source of its own files alone, and we change none of them
allowed = set('Apache-2.0 MIT MIT-0 MIT-CMU BSD-2-Clause BSD-3-Clause 0BSD ISC PSF-2.0 Python-2.0 HPND Zlib '
      'Unlicense CC0-1.0 BSL-1.0 CNRI-Python MPL-2.0 Apache-2.0-WITH-LLVM-exception'.split())
# the words that packages without an SPDX expression write
words = [(r'\bapache\b.*2|^apache( software)?( license)?$|apache-2', 'Apache-2.0'),
         (r'3-clause|bsd-3|new bsd|modified bsd|^bsd( license)?$', 'BSD-3-Clause'),
         (r'2-clause|bsd-2|simplified bsd', 'BSD-2-Clause'),
         (r'^mit\b|mit license', 'MIT'), (r'mpl.?2|mozilla public license 2', 'MPL-2.0'),
         (r'python software foundation|^psf', 'PSF-2.0'), (r'^isc\b', 'ISC'), (r'hpnd|historical permission', 'HPND'),
         (r'unlicense', 'Unlicense'), (r'^zlib', 'Zlib')]
# packages whose metadata do not say; looked up in the licence files that they install
known = {'matplotlib':'PSF-2.0'}   # its own licence, of the kind of the PSF's

def name(o): return re.sub(r'[-_.]+', '-', o).lower()

def closure(root='ist_nb'):
    "Every package that `root` needs here, without extras that nobody asked for"
    todo,found = [(root, frozenset())],set()
    while todo:
        who,extras = todo.pop()
        for line in requires(who) or []:
            r = Requirement(line)
            if r.marker and not any(r.marker.evaluate(dict(extra=e)) for e in extras or {''}): continue
            key = name(r.name),frozenset(r.extras)
            if key in found: continue
            try: distribution(r.name)
            except PackageNotFoundError: continue   # not for this system
            found.add(key); todo.append((r.name, key[1]))
    return sorted({o for o,_ in found})

def licence(package):
    "What a package says, as SPDX names where it can be told; None if it does not say"
    if package in known: return [known[package]]
    meta = distribution(package).metadata
    # each of these may be a choice
    if said := meta.get('License-Expression'):
        return [o.strip('() ') for o in said.replace(' WITH ', '-WITH-').split(' AND ')]
    said = [o.split(' :: ')[-1] for o in meta.get_all('Classifier') or []
            if o.startswith('License :: OSI Approved :: ')] or [(meta.get('License') or '').strip().split('\n')[0]]
    found = [next((spdx for pattern,spdx in words if re.search(pattern, o, re.I)), o) for o in said if o]
    return found or None

def bad(licences):
    return licences is None or any(not allowed & {p.strip('() ') for p in o.split(' OR ')} for o in licences)

if __name__=='__main__':
    rows = [(o, licence(o)) for o in closure(*sys.argv[1:])]
    for o,l in rows: print(f"{o:28}{', '.join(l) if l else 'unknown'}{'   <- not allowed' if bad(l) else ''}")
    wrong = [o for o,l in rows if bad(l)]
    if len(rows)<10: sys.exit(f'only {len(rows)} packages found: is ist_nb installed here?')
    if wrong:
        sys.exit(f"{', '.join(wrong)}: a licence that tools/licences.py does not allow, or none. Look at it; then "
      f"add it to `allowed` or `known`, or leave the package out.")
    print(f'{len(rows)} packages, all of them under licences that are allowed')
