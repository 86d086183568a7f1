"Hostile input for all that reads a file or a dictionary: only an `ISTError` may come out, soon and in little memory"
import copy,gzip,json,resource,signal,tempfile,time,warnings
from contextlib import contextmanager
from pathlib import Path
from hypothesis import HealthCheck,Phase,given,seed,settings,strategies as st
import torch
from torch import nn
from ist_nb.config import ISTConfig,ISTError
from ist_nb.data import _Part,read_rows
from ist_nb.ist import IST

limit_s,limit_bytes = 10,500*2**20   # for one input; for all of them together

# values
ints = st.integers()|st.sampled_from([0, 1, -1, 2**31, 2**53, 2**53+1, 2**63, -2**63, 10**30, 10**400])
strange = st.sampled_from(['nan', '1e999', '../../etc/passwd', '__class__', '\ud800', '\x00'])
scalars = st.none()|st.booleans()|ints|st.floats()|st.text(max_size=20)|strange
def nested(o): return st.lists(o, max_size=6)|st.dictionaries(st.text(max_size=12), o, max_size=6)
anything = st.recursive(scalars, nested, max_leaves=24)
objects = st.sampled_from([object(), 1j, frozenset(), print, Exception, IST, range(3)])
unhashed = st.builds(lambda: {1:2})|st.builds(lambda: {(1,):2})|st.builds(set)
python = anything|st.binary(max_size=8)|st.tuples(scalars, scalars)|objects|unhashed

def paths(v, at=()):
    "Where there is something in a nested value"
    yield at
    for k,o in (v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ()):
        yield from paths(o, (*at, k))

@st.composite
def changed(draw, base):
    "A valid value with one to three changes: a part replaced, removed, repeated or renamed"
    v = copy.deepcopy(draw(st.sampled_from(base)))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(list(paths(v))))
        if not where: return draw(python)
        *up,k = where
        o = v
        for p in up: o = o[p]
        how = draw(st.sampled_from('replace replace replace remove repeat rename grow'.split()))
        if how=='replace': o[k] = draw(python)
        elif how=='remove': del o[k]
        elif how=='repeat' and isinstance(o, list): o.insert(k, copy.deepcopy(o[k]))
        elif how=='rename' and isinstance(o, dict): o[draw(st.text(max_size=8))] = o.pop(k)
        elif how=='grow' and isinstance(o[k], list): o[k] = o[k]*draw(st.integers(0, 300))
        else: o[k] = draw(scalars)
    return v

@st.composite
def mangled(draw, base):
    "The bytes of a valid file with a few changes"
    b = bytearray(draw(st.sampled_from(base)))
    for _ in range(draw(st.integers(1, 4))):
        i,j = sorted(draw(st.tuples(st.integers(0, len(b)), st.integers(0, len(b)))))
        how = draw(st.integers(0, 4))
        if how==0: del b[i:j]
        elif how==1: b[i:i] = draw(st.binary(max_size=8))
        elif how==2: b[i:i] = b[i:j]
        elif how==3:
            b[i:i] = draw(st.sampled_from([b'"', b'{', b'}', b'[', b']', b',', b':', b'\\', b'\\ud800', b'\n', b'\r',
                                           b'\x00', b'\xff', b'\xef\xbb\xbf', b'NaN', b'1e999', b'9'*5000, b'['*3000,
                                           b'null']))
        elif i<len(b): b[i] = draw(st.integers(0, 255))
    return bytes(b)

# targets: each takes a case, and raises nothing but ISTError
class Tiny(nn.Module):
    "Four blocks, adapted: the smallest model that IST takes"
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict(dict(lin=nn.Linear(2, 2))) for _ in range(4)])
    def forward(self, x):
        for o in self.blocks: x = o['lin'](x)
        return x

def make_ists(probe=[dict(x=0)], loss_fn=lambda model, batch: None, **settings):
    from peft import LoraConfig,get_peft_model
    model = lambda: get_peft_model(Tiny(), LoraConfig(r=1, target_modules=['lin']))
    scorers = ('suppression', 'fisher')
    return [IST(model(), ISTConfig(scorer=o, **settings), probe=probe, loss_fn=loss_fn) for o in scorers]

def states():
    "The states of two runs, one with a history, one with gradients that are not scored yet"
    batch = dict(x=torch.ones(2, 2))
    loss = lambda model, batch: (model(**batch)**2).mean()
    res = []
    for ist in make_ists(score_interval=3, probe=[batch], loss_fn=loss):
        opt = torch.optim.SGD(ist.model.parameters(), lr=0.1)
        for _ in range(8):
            with ist.step(): loss(ist.model, batch).backward(); opt.step(); opt.zero_grad()
        res.append(json.loads(json.dumps(ist.state_dict())))
    return res

def load_state(ists):
    def target(case):
        for ist in ists:
            before = ist.state_dict()
            try: ist.load_state_dict(case)
            except ISTError:
                assert ist.state_dict()==before, 'a refused state has changed something'
                raise
            json.dumps(ist.state_dict())   # what was taken must work
            ist.draw()
    return target

def load_config(case): ISTConfig.from_dict(case)

def read_file(folder, name):
    def target(case):
        path = folder/name
        path.write_bytes(case)
        n = 0
        for row in _Part(name, read_rows(path)).convert(): n += 1
        if not n: raise ISTError('no rows')
    return target

rows = [dict(instruction='Add', input='1+1', output='2'), dict(instruction='ä\n"', input='', output='\U0001f600')]
chats = [dict(messages=[dict(role='user', content='Hi'), dict(role='assistant', content='Hello')])]
def js(o): return json.dumps(o, ensure_ascii=False).encode()
files = {'.json':[js(rows), js(chats), js([dict(text='a')])],
         '.jsonl':[b'\n'.join(map(js, rows)), b'\n'.join(map(js, chats*2))],
         '.txt':['One.\r\nTwo.\n\n Drei ä.\n'.encode()], '.csv':[b'prompt,completion\na,b\n"c\nd","e""f"\n']}

def parquet():
    import io,pyarrow as pa,pyarrow.parquet as pq
    f = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), f)
    return f.getvalue()

def file_cases(ext):
    if ext=='.parquet': return mangled([parquet()])
    words = st.text(max_size=200).map(lambda o: o.encode('utf-8', 'surrogatepass'))
    base = mangled(files[ext])|st.binary(max_size=200)|words
    values = changed([rows, chats])|anything
    def dumped(v):
        try: return js(v)
        except (TypeError, ValueError): return b''
    if ext=='.json': return base|values.map(dumped)
    if ext=='.jsonl': return base|st.lists(values, max_size=4).map(lambda o: b'\n'.join(map(dumped, o)))
    return base

def targets(folder):
    "Name -> (share of the cases, strategy, target)"
    configs = [ISTConfig().__dict__, ISTConfig(n_active=dict(encoder=1, decoder=0.5)).__dict__, {}]
    res = dict(state=(0.3, changed(states())|python, load_state(make_ists())),
               config=(0.2, changed(configs)|python, load_config))
    shares = {'.json':0.14, '.jsonl':0.14, '.txt':0.06, '.csv':0.08, '.parquet':0.02}
    res |= {k[1:]:(s, file_cases(k), read_file(folder, 'f'+k)) for k,s in shares.items()}
    texts = st.sampled_from(['.json', '.jsonl', '.txt']).flatmap(file_cases)
    packed = texts.map(lambda o: gzip.compress(o, 1, mtime=0))
    return res | dict(gz=(0.06, packed|packed.flatmap(lambda o: mangled([o])), read_file(folder, 'f.jsonl.gz')))

@contextmanager
def no_hang(seconds):
    def stop(*_): raise TimeoutError(f'one input took more than {seconds} s')
    was = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, was)

def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

def fuzz(
    n, # How many inputs in all
    seed_=0, # Of their choice
): # By target: how many were tried, accepted and refused; whatever else comes out of a target is raised, with the input
    warnings.simplefilter('ignore')
    counts,before,start = {},memory(),time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name,(share,cases,target) in targets(Path(folder)).items():
            found = counts[name] = dict(tried=0, accepted=0, refused=0)
            @seed(seed_)
            @settings(max_examples=max(1, round(n*share)), database=None, deadline=None,
                      phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
            @given(cases)
            def one(case):
                found['tried'] += 1
                with no_hang(limit_s):
                    try: target(case)
                    except ISTError: found['refused'] += 1
                    else: found['accepted'] += 1
            one()
    grew = memory()-before
    assert grew<limit_bytes, f'memory grew by {grew/2**20:.0f} MiB'
    return dict(inputs=sum(o['tried'] for o in counts.values()), targets=counts, crashes=0, hangs=0,
                peak_growth_bytes=grew, seconds=round(time.perf_counter()-start, 1))
