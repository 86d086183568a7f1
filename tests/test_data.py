"Bad inputs of `load_data`, each with the parts its message must have: what was given, what is allowed, what to do"
import gzip,json,os,pytest
from ist_nb.config import ISTError
from ist_nb.data import formats,load_data,read_rows

rows = [dict(prompt=f'Question {i}, with a "quote"\nand a line: ', completion=f'Antwort {i} äß') for i in range(12)]

def js(*rows): return '\n'.join(map(json.dumps, rows))
def chat(*msgs): return js(*[dict(messages=[dict(role='user', content='Hi'), m]) for m in msgs])
def parquet(rows):
    import io,pyarrow as pa,pyarrow.parquet as pq
    f = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), f)
    return f.getvalue()
def as_csv(rows):
    import csv,io
    f = io.StringIO()
    w = csv.DictWriter(f, rows[0], lineterminator='\n')
    w.writeheader(); w.writerows(rows)
    return f.getvalue()

def put(d, files):
    for name,body in files.items():
        p = d/name
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(body if isinstance(body, bytes) else body.encode())

good = js(dict(text='One'), dict(text='Two'))
# id: files to write, what is given as the source, fragments of the message
bad = {
    'missing file':     ({'train.jsonl':good}, 'tain.jsonl', ["'tain.jsonl'", "did you mean 'train.jsonl'?", '.parquet']),
    'missing folder':   ({}, 'nowhere/train.jsonl', ['nowhere/train.jsonl', "nor a folder", 'Give the path']),
    'hub id offline':   ({}, 'somebody/something', ["'somebody/something'", 'no file or folder', 'hub', 'Give a file']),
    'no source':        ({}, None, ['None', 'path of a file or folder']),
    'empty source':     ({}, '', ["''", 'path of a file or folder']),
    'empty file':       ({'a.jsonl':''}, 'a.jsonl', ['a.jsonl is empty', 'write the rows']),
    'blank file':       ({'a.jsonl':'\n\n'}, 'a.jsonl', ['a.jsonl holds no usable rows', 'none at all', 'instruction']),
    'empty list':       ({'a.json':'[]'}, 'a.json', ['no usable rows', 'give rows']),
    'empty folder':     ({'d/.hidden':''}, 'd', ['folder d holds no data files', '.jsonl']),
    'folder of others': ({'d/model.pkl':'x'}, 'd', ['no data files', 'model.pkl', 'allowed endings']),
    'mixed endings':    ({'d/a.jsonl':good, 'd/b.csv':'text\nOne'}, 'd', ['mixes formats', 'a.jsonl', 'b.csv', 'name the file']),
    'mixed columns':    ({'d/a.jsonl':good, 'd/b.jsonl':js(rows[0])}, 'd', ['b.jsonl, line 1', 'prompt-completion', 'text', 'keep one format']),
    'ending':           ({'a.xlsx':'x'}, 'a.xlsx', ["'.xlsx'", '.csv', 'Convert']),
    'pickle':           ({'a.pkl':'x'}, 'a.pkl', ["'.pkl'", '.jsonl', 'Convert']),
    'broken jsonl':     ({'a.jsonl':good+'\n\n{"text": "x"'}, 'a.jsonl', ['a.jsonl, line 4', 'broken JSON', 'mend']),
    'broken json':      ({'a.json':'[{"text": "x"},\n{"text" "y"}]'}, 'a.json', ['a.json, line 2', 'broken JSON', 'column 9']),
    'json, then lines': ({'a.json':good+'\n{"te'}, 'a.json', ['a.json, line 3', 'broken JSON']),
    'json wrapper':     ({'a.json':'{"data": [{"text": "x"}]}'}, 'a.json', ["key 'data'", 'save that list']),
    'json number':      ({'a.json':'3'}, 'a.json', ['one int', 'list of objects']),
    'rows of strings':  ({'a.json':'["x", "y"]'}, 'a.json', ['a.json, row 1', '"x" (str)', 'named columns']),
    'nested too deep':  ({'a.jsonl':'['*100_000}, 'a.jsonl', ['a.jsonl', 'nested too deep', 'plain object']),
    'parquet cut':      ({'a.parquet':parquet(rows)[:-20]}, 'a.parquet', ['a.parquet is damaged or cut short', 'copy it again']),
    'not parquet':      ({'a.parquet':'text'}, 'a.parquet', ['damaged', 'copy it again']),
    'gzip cut':         ({'a.jsonl.gz':gzip.compress(js(*rows).encode())[:-30]}, 'a.jsonl.gz', ['damaged or cut short', 'copy it again']),
    'not gzip':         ({'a.jsonl.gz':good}, 'a.jsonl.gz', ['damaged', 'copy it again']),
    'not utf-8':        ({'a.jsonl':b'{"text": "One"}\n{"text": "Stra\xdfe"}'}, 'a.jsonl', ['line 2', '0xdf', 'offset 30', 'save the file as UTF-8']),
    'utf-16':           ({'a.csv':'text\nOne'.encode('utf-16')}, 'a.csv', ['line 1', 'offset 0', 'UTF-8']),
    'surrogate':        ({'a.jsonl':'{"text": "\\ud800"}'}, 'a.jsonl', ['line 1', 'surrogate', 'write that row again']),
    'csv ragged':       ({'a.csv':'prompt,completion\n"a\nb",c\nd,e,f\n'}, 'a.csv', ['line 4', '3 fields under 2 names', 'quotes']),
    'csv short':        ({'a.csv':'prompt,completion\na\n'}, 'a.csv', ['line 2', '1 fields under 2 names']),
    'csv quotes':       ({'a.csv':'prompt,completion\na,b\n"c,d\n'}, 'a.csv', ['line 3', 'broken CSV', 'check its quotes']),
    'csv no header':    ({'a.csv':'What is it?,A force\nAnd that?,A mass'}, 'a.csv', ["'What is it?'", 'question', 'its first line']),
    'csv semicolons':   ({'a.csv':'prompt;completion\na;b'}, 'a.csv', ["';'", 'commas']),
    'csv column twice': ({'a.csv':'text,text\na,b'}, 'a.csv', ["'text' is there twice", 'rename']),
    'csv header only':  ({'a.csv':'text\n'}, 'a.csv', ['no usable rows']),
    'columns':          ({'a.jsonl':js(dict(instructions='a', output='b'))}, 'a.jsonl', ["'instructions', 'output'", 'accepted sets', "did you mean 'instruction'", 'Rename']),
    'column case':      ({'a.jsonl':js(dict(Text='a'))}, 'a.jsonl', ["'Text'", "did you mean 'text'"]),
    'two answers':      ({'a.jsonl':js(dict(question='a', answer='b', response='c'))}, 'a.jsonl', ["'answer' and 'response'", 'keep one']),
    'column missing':   ({'a.jsonl':js(rows[0], dict(prompt='a'))}, 'a.jsonl', ['line 2', "columns 'prompt'", 'Rename']),
    'number':           ({'a.json':json.dumps([rows[0], dict(prompt='1+2=', completion=3)])}, 'a.json', ['row 2', "'completion'", '3 (int)', 'as a string']),
    'list':             ({'a.jsonl':js(dict(text=['a', 'b']))}, 'a.jsonl', ['line 1', "'text'", '(list)', 'as a string']),
    'parquet number':   ({'a.parquet':parquet([dict(question='a', answer=1.5)])}, 'a.parquet', ['row 1', "'answer'", '1.5 (float)']),
    'parquet not utf-8': ({'a.parquet':parquet([dict(text='a', ä='b')]).replace('ä'.encode(), b'\x80\x80')}, 'a.parquet', ['a.parquet', 'damaged', 'make or copy it again']),
    'all empty':        ({'a.jsonl':js(dict(text=''), dict(text=None))}, 'a.jsonl', ['2 with an empty text', 'give rows']),
    'one row':          ({'a.jsonl':js(dict(text='a'))}, 'a.jsonl', ['1 usable row', 'at least 2', 'Add rows']),
    'one paragraph':    ({'a.txt':'One.\nTwo.'}, 'a.txt', ['1 usable row', 'blank lines']),
    'role':             ({'a.jsonl':chat(dict(role='bot', content='a'))}, 'a.jsonl', ['line 1, message 2', "'bot'", 'assistant', 'Rename']),
    'role is a list':   ({'a.jsonl':chat(dict(role=['user'], content='a'))}, 'a.jsonl', ['message 2', "['user']", 'allowed are system']),
    'no content':       ({'a.jsonl':chat(dict(role='assistant'))}, 'a.jsonl', ['line 1, message 2', 'no content', 'give it a text']),
    'content of parts': ({'a.jsonl':chat(dict(role='assistant', content=[dict(type='text')]))}, 'a.jsonl', ["'content'", '(list)', 'as a string']),
    'chat is a text':   ({'a.jsonl':js(dict(messages='Hi'))}, 'a.jsonl', ['line 1', 'holds a str', 'list of']),
    'digits':           ({'a.json':'[{"text": '+'9'*5000+'}]'}, 'a.json', ['4,300 digits', 'as a text']),
    'digits in a line': ({'a.jsonl':'{"text": "a"}\n{"text": '+'9'*5000+'}'}, 'a.jsonl', ['line 2', '4,300 digits', 'as a text']),
    'nested text':      ({'a.jsonl':'{"text": '+'['*400+']'*400+'}'}, 'a.jsonl', ['line 1', "'text'", '(list)']),
    'many columns':     ({'a.jsonl':js({f'c{i}':1 for i in range(1000)})}, 'a.jsonl', ["'c0'", 'and 980 more', 'accepted sets']),
    'bomb':             ({'a.jsonl.gz':gzip.compress(b' '*2**27)}, 'a.jsonl.gz', ['a.jsonl.gz', '200 times its size', 'make it again']),
    'no such split':    ({'d/test.jsonl':good}, 'd', ["no split 'train'", 'Allowed: test']),
}

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working directory, with no road to the hub"
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize('files,source,parts', bad.values(), ids=bad.keys())
def test_bad(here, files, source, parts):
    put(here, files)
    with pytest.raises(ISTError) as e: load_data(source)
    for o in parts: assert o in str(e.value)
    assert str(here) not in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('kw', [dict(test_fraction=0), dict(test_fraction=1), dict(max_rows=1)], ids=str)
def test_bad_dial(here, kw):
    put(here, {'a.jsonl':good})
    with pytest.raises(ISTError, match=f'{next(iter(kw))}={next(iter(kw.values()))} .*; give'): load_data('a.jsonl', **kw)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may read everything')
def test_bad_permission(here):
    put(here, {'a.jsonl':good})
    (here/'a.jsonl').chmod(0)
    with pytest.raises(ISTError, match='may not be read by this user; change its permissions'): load_data('a.jsonl')

def test_kinds_differ(here):
    put(here, {'a.jsonl':good, 'b.jsonl':js(*rows)})
    with pytest.raises(ISTError, match='a.jsonl holds text rows but b.jsonl holds prompt-completion rows'): load_data('a.jsonl', test='b.jsonl')

@pytest.mark.parametrize('name,body', {'a.json':json.dumps(rows, indent=2), 'lines.json':js(*rows), 'a.jsonl':js(*rows), 'a.jsonl.gz':gzip.compress(js(*rows).encode()),
    'a.csv':as_csv(rows), 'bom.csv':'\ufeff'+as_csv(rows), 'a.parquet':parquet(rows)}.items(), ids=lambda o: o if isinstance(o,str) and len(o)<12 else '')
def test_round_trip(here, name, body):
    "The same rows come out of every kind of file, in their order"
    put(here, {name:body})
    assert [o for _,o in read_rows(here/name)]==rows
    data = load_data(name, test=name)
    assert data.train.to_list()==rows and data.kind=='prompt-completion'

def test_txt(here):
    put(here, {'a.txt':'One.\r\nTwo.\r\n\r\n \r\nThree.'})
    assert load_data('a.txt', test='a.txt').train['text'][:]==['One.\nTwo.', 'Three.']

@pytest.mark.parametrize('n,fraction,want', [(2,.1,1), (2,.9,1), (12,.1,1), (12,.25,3), (12,.99,11), (1000,.1,100)])
def test_held_out(here, n, fraction, want):
    "Exact, disjoint, complete, in order, and a matter of the seed alone"
    put(here, {'a.jsonl':js(*[dict(text=f'{i:04}') for i in range(n)])})
    a,b,c = [load_data('a.jsonl', test_fraction=fraction, seed=s) for s in (0,0,1)]
    tr,te = a.train['text'][:],a.test['text'][:]
    assert len(te)==want and sorted(tr+te)==[f'{i:04}' for i in range(n)]
    assert tr==sorted(tr) and te==sorted(te)
    assert te==b.test['text'][:] and (n<1000 or te!=c.test['text'][:])

def test_only_its_columns(here):
    "Whatever the columns given, those of the kind come out, and the rest is named"
    want = {'text':['text'], 'prompt-completion':['prompt','completion'], 'messages':['messages']}
    chat = [dict(role='user', content='Hi'), dict(role='assistant', content='Hello', weight=1)]
    for name,(kind,spec) in formats.items():
        cols = [o.strip('[]').split('|')[0] for o in spec.split()]
        put(here, {'a.jsonl':js(*[{c:chat if kind=='messages' else f'{c} {i}' for c in cols}|dict(id=i) for i in range(3)])})
        data = load_data('a.jsonl')
        assert data.train.column_names==want[kind] and 'Columns not used: id.' in data.report and name in data.report

def test_global_random_state(here):
    import random,numpy as np
    put(here, {'a.jsonl':js(*rows)})
    before = random.getstate(),np.random.get_state()[1].tolist()
    load_data('a.jsonl', max_rows=6)
    assert (random.getstate(),np.random.get_state()[1].tolist())==before

def test_wide_header(here):
    "A first line of 100,000 names is read in no time"
    import time
    put(here, {'a.csv':','.join(f'c{i}' for i in range(100_000))+'\n'+','.join('1' for i in range(100_000))})
    start = time.process_time()
    with pytest.raises(ISTError) as e: load_data('a.csv')
    assert time.process_time()-start<3 and len(str(e.value))<2000

def test_longest_line(here, monkeypatch):
    import ist_nb.data
    monkeypatch.setattr(ist_nb.data, 'longest_line', 2**20)
    put(here, {'a.jsonl':js(*rows)+'\n'+js(dict(prompt='a'*2**21, completion='b'))})
    with pytest.raises(ISTError, match='line 13: longer than 1 MiB; write one row in a line'): load_data('a.jsonl')

def test_deep_values_in_messages(here):
    "What cannot be written is not shown"
    from ist_nb.data import Part
    deep = []
    for _ in range(10_000): deep = [deep]
    for row in (dict(text=deep), dict(text=10**5000), deep, dict(messages=[deep])):
        with pytest.raises(ISTError): list(Part('a', [('row 1', row)]).convert())
