"`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME` runs one, and `--help` explains it"
import ast,re,sys
from importlib import import_module
from pathlib import Path
from fastcore.script import anno_parser

def benchmarks():
    "Name -> first sentence of the docstring of every module with a `main`; nothing is imported, so this is instant"
    trees = {p.stem:ast.parse(p.read_text()) for p in sorted(Path(__file__).parent.glob('*.py')) if p.stem[0]!='_'}
    about = {k:' '.join(ast.get_docstring(t).split()) for k,t in trees.items()
             if any(isinstance(o, ast.FunctionDef) and o.name=='main' for o in t.body)}
    return {k:re.split(r'(?<=[.?]) ', v)[0] for k,v in about.items()}

def main(argv):
    known,name = benchmarks(),argv[0] if argv else ''
    if name not in known:
        print('python -m benchmarks NAME [--help] [options]\n', *(f'{k:14} {v}' for k,v in known.items()), sep='\n')
        sys.exit(f'\nThere is no benchmark {name!r}.' if name and name not in ('-h', '--help') else 0)
    module = import_module(f'benchmarks.{name}')
    parser = anno_parser(module.main, prog=f'python -m benchmarks {name}')
    parser.description = ' '.join(module.__doc__.split())
    args = vars(parser.parse_args(argv[1:]))
    module.main(**{k:v for k,v in args.items() if k not in ('pdb', 'xtra')})

if __name__=='__main__': main(sys.argv[1:])
