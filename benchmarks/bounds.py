"""Do the tests see a wrong bound? Each bound of the theory is halved, doubled, robbed of each factor and term, given
other constants and a wider range, one change at a time, and a test of tests/test_theory.py must fail. The first that
fails is named. A change that changes nothing that can be seen is listed in `same`, with the reason."""
import ast,copy,os,re,sys,tempfile,time
from collections import Counter
from pathlib import Path
import ist_nb.theory,pytest,torch    # before the forks
from benchmarks import record
from benchmarks.record import root

# changes that leave a bound what it is: the function, the new text, why
same = {}

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
        if isinstance(node.op, ast.Sub): yield 'plus for minus',ast.BinOp(node.left, ast.Add(), node.right)
        if isinstance(node.op, ast.Add): yield 'minus for plus',ast.BinOp(node.left, ast.Sub(), node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        for k in (node.value*2 or 1, node.value/2 or -1): yield f'{k} for {node.value}',ast.Constant(k)
    if isinstance(node, ast.Compare):      # wider, narrower
        right = node.comparators[-1]
        for k in (1.25, 0.8):
            yield f'range times {k}',ast.Compare(node.left, node.ops, [*node.comparators[:-1], times(right, k)])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args and node.func.attr in (
            'sqrt', 'log1p', 'expm1', 'exp'): yield f'without {node.func.attr}',node.args[0]

def mutants(source):
    "Function, what was changed, and the whole new text of the module"
    tree = ast.parse(source)
    for n,f in enumerate(functions(tree)):
        for at,(parent,field,i,node) in enumerate(places(f)):
            found = list(changes(node))
            if isinstance(node, ast.Return) and not ast.unparse(node.value).startswith('dict('):
                found += [(f'result times {k}', ast.Return(times(node.value, k))) for k in (0.5, 2, 0.98, 1.02)]
            for what,new in found:
                other = copy.deepcopy(tree)
                g = functions(other)[n]
                p,name,j,_ = next(o for k,o in enumerate(places(g)) if k==at)
                if p is None: g.body[next(k for k,o in enumerate(f.body) if o is node)] = new
                elif j is None: setattr(p, name, new)
                else: getattr(p, name)[j] = new
                text = ast.unparse(ast.fix_missing_locations(other))
                yield f.name,f'{what}, in {ast.unparse(node)[:80]}',text

def tests_of(name, source, text):
    "The tests of `text` that use a function, or one that calls it; all of them for ''"
    calls = {f.name:{o.id for o in ast.walk(f) if isinstance(o, ast.Name)} for f in functions(ast.parse(source))}
    users = {name}
    for _ in calls: users |= {k for k,v in calls.items() if v&users}
    return [f.name for f in functions(ast.parse(text)) if f.name.startswith('test_')
            and (not name or users&{o.id for o in ast.walk(f) if isinstance(o, ast.Name)})]

def first_failure(text, path, tests):
    "The first of the `tests` that fails with this text as the module, in a child of this process; '' if none does"
    log = path.with_suffix('.log')
    if (pid := os.fork())==0:
        for k in (1, 2): os.dup2(os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC), k)
        module,status = ist_nb.theory,3
        try:
            exec(compile(text, module.__file__, 'exec'), module.__dict__)
            status = pytest.main(['-n0', '-x', '-q', '-p', 'no:cacheprovider', *(f'{path}::{o}' for o in tests)])
        finally: os._exit(int(status))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = re.search(r'^(?:FAILED|ERROR) .*?::(\w+)', log.read_text(), re.M)
    return found[1] if found else f'pytest ended with {status}' if status else ''

def main(
    only:str='', # Functions, separated by commas; all if empty
    out:Path='bounds', # Where the outcomes go
):
    torch.set_num_threads(1)
    os.chdir(root)
    source,tests = ((root/o).read_text() for o in ('ist_nb/theory.py', 'tests/test_theory.py'))
    path,rows = Path(tempfile.mkdtemp())/'test_theory.py',[]
    # a failure is enough: no search for the simplest
    once = 'deadline=None, phases=[__import__("hypothesis").Phase.generate]'
    path.write_text(tests.replace('deadline=None', once))
    if why := first_failure(source, path, tests_of('', source, tests)): sys.exit(f'{why} fails without a change')
    for name,what,text in mutants(source):
        if only and name not in only.split(','): continue
        start,reason = time.perf_counter(),same.get((name, what))
        by = '' if reason else first_failure(text, path, tests_of(name, source, tests))
        outcome = 'same' if reason else 'killed' if by else 'survived'
        rows.append(dict(function=name, change=what, outcome=outcome, by=reason or by or None))
        print(f'{outcome:8} {time.perf_counter()-start:5.1f} s  {name}: {what} -- {reason or by}', flush=True)
    counts = dict(Counter(r['outcome'] for r in rows))
    head = record.about('whether the tests see a wrong bound', 'pytest hypothesis', threads=1)
    record.save(out, head, counts=counts, rows=rows)
    print(counts)
    if counts.get('survived'): sys.exit(1)
