"How large the house is: lines, public names, longest line, words and code before the first output, for each page"
import argparse,ast,json,re,subprocess
from pathlib import Path

root = Path(__file__).resolve().parent.parent
columns = dict(lines='lines of the module', names='public names', widest='longest line', words='words of prose',
               before='exported lines before the first output')

def files(commit=None):
    "A function from a path to its text, and all paths; of a commit, or of the checkout"
    git = lambda *a: subprocess.run(['git', *a], cwd=root, check=True, capture_output=True, text=True).stdout
    paths = git('ls-tree', '-r', '--name-only', commit).split('\n') if commit else \
        [p.relative_to(root).as_posix() for o in ('nbs', 'ist_nb') for p in (root/o).rglob('*') if p.is_file()]
    return (lambda p: git('show', f'{commit}:{p}')) if commit else (lambda p: (root/p).read_text()), paths

def module_of(text):
    "Lines, public names and the longest line of a module; `__all__` is nbdev's"
    body = re.sub(r'^__all__ = \[.*?\]\n', '', text, flags=re.S|re.M)
    trees = [o for o in ast.parse(text).body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0])=='__all__']
    names = ast.literal_eval(trees[0].value) if trees else []
    return dict(lines=len(text.splitlines()), names=len(names), widest=max(map(len, body.splitlines()), default=0))

def page_of(text):
    "The module that a notebook exports to, its words, and the exported lines before its first output"
    cells = json.loads(text)['cells']
    sources = [''.join(c['source']) for c in cells]
    exports = re.search(r'#\| default_exp (\w+)', '\n'.join(sources))
    first = next((i for i,c in enumerate(cells) if c.get('outputs')), len(cells))
    before = sum(len(s.splitlines()) for s in sources[:first] if re.match(r'#\| export', s))
    return exports and exports[1], dict(words=sum(len(s.split()) for s,c in zip(sources, cells)
                                                  if c['cell_type']=='markdown'), before=before)

def measure(commit=None):
    "Page -> its numbers"
    read,paths = files(commit)
    res = {}
    for p in sorted(o for o in paths if re.fullmatch(r'nbs/.*\.ipynb', o) and 'checkpoints' not in o):
        module,found = page_of(read(p))
        if module: found = module_of(read(f'ist_nb/{module}.py')) | found
        res[p[4:-6]] = found
    return res

def totals(pages):
    "The sums, and the largest module and line"
    col = lambda k: [o[k] for o in pages.values() if k in o]
    return dict(lines=sum(col('lines')), names=sum(col('names')), longest=max(col('lines')), widest=max(col('widest')),
                words=sum(col('words')))

def table(pages):
    head = '| page | '+' | '.join(columns.values())+' |\n|---|'+'---:|'*len(columns)+'\n'
    return head+''.join(f'| {k} | '+' | '.join(str(o.get(c, '')) for c in columns)+' |\n' for k,o in pages.items())

def imports(text):
    "The modules of the package that a module imports, at the top or in a function"
    nodes = [o for o in ast.walk(ast.parse(text)) if isinstance(o, ast.ImportFrom)]
    ours = [o for o in nodes if o.level==1 or (o.module or '').split('.')[0]=='ist_nb']
    names = [(o.module or '').removeprefix('ist_nb').strip('.') for o in ours]
    return {n for o,name in zip(ours, names) for n in ([name] if name else [a.name for a in o.names])}

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--commit', help='measure this commit in place of the checkout')
    pages = measure(p.parse_args().commit)
    print(table(pages))
    print(', '.join(f'{k} {v:,}' for k,v in totals(pages).items()))

if __name__=='__main__': main()
