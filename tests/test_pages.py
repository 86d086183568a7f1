"""What protects the reader of a page: code that can be copied, one meaning for each symbol, docstrings, correct
spelling, no dead code"""
import ast,builtins,json,re,subprocess,symtable,sys,pytest
from importlib import import_module
from pathlib import Path

root = Path(__file__).parent.parent
nbs = {p.relative_to(root/'nbs').with_suffix('').as_posix():json.loads(p.read_text())['cells']
       for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts}
def src(c): return ''.join(c['source'])
def kind(cells, t): return [src(c) for c in cells if c['cell_type']==t]
def page(f): return pytest.mark.parametrize('name', [o for o in nbs if f(nbs[o])])
def module(cells):
    return next((m[1] for s in kind(cells, 'code') if (m := re.search(r'^#\| *default_exp (\S+)', s, re.M))), None)
def directive(s, what): return re.search(rf'^#\| *(?:{what})\b', s, re.M)
magics = re.compile(r'^\s*[%!].*$', re.M)

def test_title():
    "The first cell of a page is its title and one line about it: the site, its cards and llms.txt show both"
    bad = [name for name,cells in nbs.items() if not re.match(r'# .+\n\n> .+$', kind(cells, 'markdown')[0])]
    assert not bad, f'{bad}: the first cell must be "# title", an empty line and "> one line"'

def undefined(code):
    "Names that `code` uses and neither defines nor imports"
    known,used = {'__file__', *dir(builtins)},set()
    for m in re.findall(r'^from (\S+) import \*', code, re.M):
        mod = import_module(m)
        known |= set(getattr(mod, '__all__', None) or [o for o in vars(mod) if o[0]!='_'])
    def walk(table):
        for o in table.get_symbols():
            if table.get_type()=='module':
                if o.is_assigned() or o.is_imported(): known.add(o.get_name())
                if o.is_referenced(): used.add(o.get_name())
            elif o.is_global() and o.is_referenced(): used.add(o.get_name())
        for child in table.get_children(): walk(child)
    walk(symtable.symtable(code, 'page', 'exec'))
    return sorted(used-known)

def test_undefined():
    assert undefined('import a\ndef f(x): return a+x+y\nf(z)')==['y', 'z']
    assert not undefined('b = [c for c in range(3)]')

@pytest.mark.parametrize('name', [o for o in nbs if kind(nbs[o], 'code')])
def test_code_can_be_copied(name):
    """What readers see of a page defines or imports each name that it uses: nothing comes from a hidden cell.
    On the page of a module, its own code counts as seen, and fastcore's tests are known from every other page"""
    seen = [s for s in kind(nbs[name], 'code') if not directive(s, 'hide|echo: *false|include: *false|default_exp')
            and 'show_doc(' not in s]
    if module(nbs[name]): seen.append('from fastcore.test import *')
    lacks = undefined(magics.sub('pass', '\n'.join(seen)))
    assert not lacks, f'{name}: a visible cell uses {", ".join(lacks)}, which only a hidden cell defines'

greek = re.compile(r'\\(' + '|'.join('alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu '
                                     'xi pi rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi '
                                     'Psi Omega ell'.split()) + r')(?![A-Za-z])')

def test_symbols():
    "Every Greek letter in a formula is in the table of symbols, and links to the page that introduces it, which has it"
    table = '\n'.join(kind(nbs['reference/notation'], 'markdown'))
    known = set(greek.findall(table))
    bad = [f'{name}: \\{o} is not on the page of symbols (nbs/reference/notation.ipynb)' for name,cells in nbs.items()
           for o in sorted(set(greek.findall('\n'.join(map(src, cells))))-known)]
    rows = [r.strip('| ').split(' | ') for r in table.splitlines() if r.startswith('| $')]
    assert len(rows)>25
    for r in rows:
        pages = re.findall(r'\(\.\./([\w/]+)\.ipynb\)', r[-1])
        assert pages, r
        for p in pages:
            text = '\n'.join(map(src, nbs[p]))
            used = greek.findall(r[0])
            if used and not set(used)&set(greek.findall(text)):
                bad.append(f'the page of symbols says that {r[0]} is introduced on {p}, which does not have it')
    assert not bad, '\n'.join(bad)

@page(module)
def test_docstrings(name):
    "Each public function and class says what it is; a registered one may leave that to its registry"
    from build_docs import docstrings
    path = root/'ist_nb'/f'{module(nbs[name])}.py'
    public = ast.literal_eval(re.search(r'^__all__ = (\[.*?\])', path.read_text(), re.M|re.S)[1])
    lacks = [o for o,said in docstrings(path).items() if o in public and not said]
    assert not lacks, f'{name}: no docstring for {", ".join(lacks)}'

@page(lambda cells: any(s.startswith('#| hide\n# In Colab') for s in kind(cells, 'code')))
def test_colab(name):
    "A tutorial that opens in Colab fetches the repository from the address in settings.ini"
    import build_docs
    from nbdev.config import get_config
    cell = next(s for s in kind(nbs[name], 'code') if s.startswith('#| hide\n# In Colab'))
    url = re.findall(r'git clone -q --depth 1 (\S+) ist_nb-src', cell)
    assert url==[get_config(path=root).git_url], 'run tools/build_docs.py, which writes the address into the tutorials'
    assert build_docs.colab_cell(cell, 'https://example.org/other')!=cell

def test_every_tutorial_opens_in_colab():
    assert not [o for o in nbs if o.startswith('tutorials/')
                and not any('# In Colab' in s for s in kind(nbs[o], 'code'))]

def run_colab(folder, path, installed):
    "What the first cell of a tutorial does in `folder`: the commands it runs, with stand-ins for git and pip"
    cell = next(s for s in kind(nbs['tutorials/quickstart'], 'code') if '# In Colab' in s)
    path.mkdir()
    for o in ('git', 'pip'):
        (path/o).write_text(f'#!/bin/sh\necho {o} "$@" >> {path}/log\n[ {o} = pip ] || mkdir -p '
                            f'ist_nb-src/nbs/tutorials\n')
        (path/o).chmod(0o755)
    hide = '' if installed else 'import importlib.util; importlib.util.find_spec = lambda name: None\n'
    code = (f'import os\nos.environ["PATH"] = {str(path)!r}+":"+os.environ["PATH"]\n{hide}{cell}\n'
            f'open({str(path/"cwd")!r}, "w").write(os.getcwd())')
    subprocess.run([sys.executable, '-c', code], cwd=folder, check=True)
    return (path/'log').read_text() if (path/'log').exists() else '',(path/'cwd').read_text()

def test_colab_cell_runs(tmp_path):
    """In a checkout and with the package installed the cell does nothing; elsewhere it fetches the repository and goes
    to the tutorials"""
    assert run_colab(root/'nbs'/'tutorials', tmp_path/'a', False)[0]==''
    (tmp_path/'empty').mkdir()
    assert run_colab(tmp_path/'empty', tmp_path/'b', True)[0]==''
    log,cwd = run_colab(tmp_path/'empty', tmp_path/'c', False)
    assert log.startswith('git clone')
    assert 'pip install -q ./ist_nb-src' in log
    assert cwd.endswith('ist_nb-src/nbs/tutorials')

def test_newcomer():
    """What was timed is what the home page and the quickstart tell a newcomer to run today, and it gave a layer's
    importance, probability and count"""
    from benchmarks import newcomer
    from nbdev.config import get_config
    res = json.loads((root/'benchmarks'/'results'/'newcomer.json').read_text())
    todo,again = newcomer.commands(),'run python -m benchmarks newcomer'
    ran = [o['command'] for o in res['stages']]
    assert [o for o in ran if not o.startswith("pip install 'torch")]==[*todo, 'python why.py'], again
    assert todo[0]==f'git clone {get_config(path=root).git_url}'
    assert todo[-2:]==['ist_finetune', 'ist_finetune --method ist']
    assert all(f'```sh\n{o}' in (root/'README.md').read_text() for o in todo[:1])
    found,said = res['explanation'],'\n'.join(res['said'])
    assert f"Layer {found['layer']} was trained in {found['trained']} of {found['steps']} steps" in said
    assert f"{found['importance']:+.2f}" in said
    assert f"probability {found['probability']:.2f}" in said
    assert 0<found['by_chance']<1
    assert abs(sum(o['seconds'] for o in res['stages'])-res['seconds'])<1
    # the way is there: from the home page to the lines to copy, from those to how to read a run
    assert '](tutorials/quickstart.ipynb#ask-your-own-run)' in newcomer.text('nbs/index.ipynb')
    assert '## Ask your own run' in newcomer.text('nbs/tutorials/quickstart.ipynb')

# --- spelling: British, as most pages have it
def prose():
    "The words of a page and of the comments in its code, by place; no code, no links, no formulas"
    cut = re.compile(r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)]*\)|https?://\S+|<[^>]+>', re.S)
    for name,cells in nbs.items():
        for i,c in enumerate(cells):
            s = src(c) if c['cell_type']=='markdown' else '\n'.join(re.findall(r'(?:^|\s)# (.*)$', src(c), re.M))
            yield f'nbs/{name}.ipynb, cell {i}',cut.sub(' ', s)
    for f in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'): yield f,cut.sub(' ', (root/f).read_text())

# torch's word, the name of a group of tasks, words that British has in another sense, and what the list has wrong
american = set('optimizer optimizers math program programs disk dialog analog check meter meters license practice '
               'story draft tire curb catalog biased'.split())

def test_formulas_in_lists():
    "A display formula right under the line of a list item is shown as raw TeX"
    raw = re.compile(r'^ {0,3}(?:\d+\.|[-*]) .*\n\$\$', re.M)
    assert raw.search('1. With this rate,\n$$x$$')
    wrong = {f'{name}, cell {i}' for name,cells in nbs.items() for i,c in enumerate(cells)
             if c['cell_type']=='markdown' and raw.search(src(c))}
    assert not wrong, f'put the formula into the line, or an empty line before it: {wrong}'

def test_british():
    import codespell_lib
    pairs = (Path(codespell_lib.__file__).parent/'data'/'dictionary_en-GB_to_en-US.txt').read_text().split('\n')
    british = {us:gb for gb,_,us in (o.strip().partition('->') for o in pairs if '->' in o) if us not in american
               and ',' not in us}
    assert british['color']=='colour' and len(british)>400
    bad = [f'{where}: {w} (here: {british[w.lower()]})' for where,s in prose() for w in re.findall(r'[A-Za-z]+', s)
           if w.lower() in british and not w.isupper()]
    assert not bad, '\n'.join(bad)

def test_spelling():
    "No common misspelling, in prose and in code"
    files = [str(p) for d in ('nbs', 'tools', 'tests', 'benchmarks', 'ist_nb') for p in sorted((root/d).rglob('*'))
             if p.suffix in ('.py', '.md') and 'assets' not in p.parts]
    text = '\n'.join(f'{where}: {o}' for where,s in prose() for o in s.split('\n') if o.strip())
    ignore = 'ist,ists,te,docments'
    for args,given in ((['-'], text), (files, None)):
        res = subprocess.run([sys.executable, '-m', 'codespell_lib', '-L', ignore, *args], input=given,
                             capture_output=True, text=True)
        assert not res.stdout and res.returncode==0, res.stdout or res.stderr

def test_dead_code(tmp_path):
    """Every function, class, method, import and variable of the package and its tools is used: in it, on a page, or in
    a test"""
    pages = tmp_path/'pages.py'
    code = [magics.sub('pass', s) for cells in nbs.values() for s in kind(cells, 'code')
            if not directive(s, 'export|exports|exporti')]
    pages.write_text('\n'.join(s for s in code if _parses(s)))
    res = subprocess.run([sys.executable, '-m', 'vulture', '--min-confidence', '60', '--ignore-names',
                          ','.join(called_by_others), 'ist_nb', 'tools', 'benchmarks', 'tests', str(pages)], cwd=root,
                          capture_output=True, text=True)
    found = [o for o in res.stdout.splitlines() if not o.startswith((str(pages), 'tests/'))]
    assert res.returncode in (0, 3), res.stderr
    assert not found, '\n'.join(found)

# what nothing of ours calls by its name: it is called, or read, by torch, transformers, PEFT, mkdocs, nbdev and reprlib
called_by_others = '''active counted on_* __* begin cell base_procs log_message control types merge packing
    packing_strategy decoder pre_tokenizer generation_config create_causal_mask _cell_idx Any Union TaskType
    exclude_modules modules_to_save layers_to_transform layers_pattern other_param_names merged_adapters tuner_layer_cls
    target_module_mapping _create_and_replace current_key _get_train_sampler use_recursive_dict_tags_for_guards
    rotate_checkpoints create_model_card maxdict maxlist maxother maxstring should_training_stop print_verbose _n_gpu
    _inner_training_loop _run_epoch optimize_ddp'''.split()

def _parses(s):
    try: ast.parse(s); return True
    except SyntaxError: return False
