"""Do the tests see a wrong bound? Each bound of the theory is halved, doubled, robbed of each factor and term, given
other constants and a wider range, one change at a time, and a test of tests/test_theory.py must fail. The first that
fails is named."""
import ast,copy,os,sys,time
from collections import Counter
from contextlib import redirect_stdout,suppress
from pathlib import Path
import ist_nb.theory,torch
from hypothesis import Phase,given,settings
from hypothesis.strategies import floats
from benchmarks import record
from benchmarks.record import root

exact = {'inclusion_by_clocks'}   # no bound: a sum, tested against another way to the same numbers

def functions(tree): return [o for o in tree.body if isinstance(o, ast.FunctionDef)]

def places(f):
    "Every node of a function's body with its parent and where it hangs; not its docstring, and no text of an error"
    def walk(node):
        for name,value in ast.iter_fields(node):
            if isinstance(node, ast.Raise): return
            for i,child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST): continue
                yield node,name,(i if isinstance(value, list) else None),child
                yield from walk(child)
    for node in f.body:
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield None,None,None,node
            yield from walk(node)

def times(node, k): return ast.BinOp(node, ast.Mult(), ast.Constant(k))

def changes(node):
    "What may stand in the place of a node: what it is called, and the new node"
    if isinstance(node, ast.BinOp):
        word = {ast.Mult:'factor', ast.Div:'factor', ast.Add:'term', ast.Sub:'term', ast.Pow:'power'}.get(type(node.op))
        if word: yield f'without the {word} {ast.unparse(node.right)}',node.left
        if isinstance(node.op, (ast.Mult, ast.Add)): yield f'without the {word} {ast.unparse(node.left)}',node.right
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        for k in (node.value*2 or 1, node.value/2 or -1): yield f'{k} for {node.value}',ast.Constant(k)
    if isinstance(node, ast.Compare) and isinstance(node.ops[-1], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        right = node.comparators[-1]
        for k in (1.25, 0.8) if ast.unparse(right)!='0' else ():     # times 0 is 0
            yield f'range times {k}',ast.Compare(node.left, node.ops, [*node.comparators[:-1], times(right, k)])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args and node.func.attr in (
            'sqrt', 'log1p', 'expm1', 'exp'): yield f'without {node.func.attr}',node.args[0]

def mutants(source, texts=True):
    "The name of a function, what was changed, and the new text of the function, unless no `texts` are wanted"
    for f in functions(ast.parse(source)):
        if f.name in exact: continue
        for at,(_,_,_,node) in enumerate(places(f)):
            found = list(changes(node))
            if isinstance(node, ast.Return) and not ast.unparse(node.value).startswith('dict('):
                found += [(f'result times {k}', ast.Return(times(node.value, k))) for k in (0.5, 2)]
            for what,new in found:
                said = f'{what}, in {ast.unparse(node)[:80]}'
                if not texts:
                    yield f.name,said,None
                    continue
                g = copy.deepcopy(f)
                parent,name,j,_ = next(o for k,o in enumerate(places(g)) if k==at)
                if parent is None: g.body[f.body.index(node)] = new
                elif j is None: setattr(parent, name, new)
                else: getattr(parent, name)[j] = new
                yield f.name,said,ast.unparse(ast.fix_missing_locations(g))

def tests_of(name, source, text):
    "The tests of `text` that use a function, or one that calls it; all of them for ''"
    calls = {f.name:{o.id for o in ast.walk(f) if isinstance(o, ast.Name)} for f in functions(ast.parse(source))}
    users = {name}
    for _ in calls: users |= {k for k,v in calls.items() if v&users}
    found = [f for f in functions(ast.parse(text)) if f.name.startswith('test_')
             and (not name or users&{o.id for o in ast.walk(f) if isinstance(o, ast.Name)})]
    slow = lambda f: any('given' in ast.unparse(o) for o in f.decorator_list)
    return [f.name for f in sorted(found, key=slow)]

def cases(test):
    "The arguments of each call of a test: one call without any, or those of its table"
    for mark in getattr(test, 'pytestmark', []):
        names,rows = mark.args
        names = [o.strip() for o in names.split(',')]
        return [dict(zip(names, o if len(names)>1 else [o])) for o in rows]
    return [{}]

def first_failure(text, tests, names):
    "The first test in `names` that fails when `text` is run in the module, in a child of this process; '' if none does"
    read,write = os.pipe()
    if (pid := os.fork())==0:
        now,module = 'import',ist_nb.theory
        try:
            exec(compile(text, module.__file__, 'exec'), module.__dict__)
            there = {}
            exec(compile(tests, 'test_theory', 'exec'), there)
            with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere):
                for now in names:
                    for kwargs in cases(there[now]): there[now](**kwargs)
            now = ''
        except BaseException: pass
        os.write(write, now.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: found = f.read()
    os.waitpid(pid, 0)
    return found

def main(
    only:str='', # Functions, separated by commas; the others stay in the file as they are
    out:Path='bounds', # Where the outcomes go
):
    torch.set_num_threads(1)
    source,tests = ((root/o).read_text() for o in ('ist_nb/theory.py', 'tests/test_theory.py'))
    # a failure is enough: no search for the simplest
    tests = tests.replace('deadline=None', 'deadline=None, phases=[__import__("hypothesis").Phase.generate]')
    rows = []
    @settings(phases=[Phase.generate])
    @given(floats(0, 1))
    def fails(x): assert x<0.5      # what hypothesis imports for a failure is then there before the forks
    with suppress(AssertionError): fails()
    needed = {o:None for name in only.split(',') for o in tests_of(name, source, tests)}
    if why := first_failure(source, tests, needed): sys.exit(f'{why} fails without a change')
    if only and (record.results/'bounds.json').exists():
        rows = [o for o in record.read('bounds')['rows'] if o['function'] not in only.split(',')]
    for name,what,text in mutants(source):
        if only and name not in only.split(','): continue
        start = time.perf_counter()
        by = first_failure(text, tests, tests_of(name, source, tests))
        outcome = 'killed' if by else 'survived'
        rows.append(dict(function=name, change=what, outcome=outcome, by=by or None))
        print(f'{outcome:8} {time.perf_counter()-start:5.1f} s  {name}: {what} -- {by}', flush=True)
    counts = dict(Counter(r['outcome'] for r in rows))
    head = record.about('whether the tests see a wrong bound', 'hypothesis', threads=1)
    record.save(out, head, counts=counts, rows=rows)
    print(counts)
    if counts.get('survived'): sys.exit(1)
