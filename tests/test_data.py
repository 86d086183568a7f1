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
    pq.write_table(pa.table(rows) if isinstance(rows, dict) else pa.Table.from_pylist(rows), f)
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
    'missing file':     ({'train.jsonl':good}, 'tain.jsonl',
                         ["'tain.jsonl'", "did you mean 'train.jsonl'?", '.parquet']),
    'missing folder':   ({}, 'nowhere/train.jsonl', ['nowhere/train.jsonl', "nor a folder", 'Give the path']),
    'hub id offline':   ({}, 'somebody/something', ["'somebody/something'", 'no file or folder', 'hub', 'Give a file']),
    'no source':        ({}, None, ['None', 'path of a file or folder']),
    'empty source':     ({}, '', ["''", 'path of a file or folder']),
    'empty file':       ({'a.jsonl':''}, 'a.jsonl', ['a.jsonl is empty', 'write the rows']),
    'blank file':       ({'a.jsonl':'\n\n'}, 'a.jsonl', ['a.jsonl holds no usable rows', 'none at all', 'instruction']),
    'empty list':       ({'a.json':'[]'}, 'a.json', ['no usable rows', 'give rows']),
    'empty folder':     ({'d/.hidden':''}, 'd', ['folder d holds no data files', '.jsonl']),
    'folder of others': ({'d/model.pkl':'x'}, 'd', ['no data files', 'model.pkl', 'allowed endings']),
    'mixed endings':    ({'d/a.jsonl':good, 'd/b.csv':'text\nOne'}, 'd',
                         ['mixes formats', 'a.jsonl', 'b.csv', 'name the file']),
    'mixed columns':    ({'d/a.jsonl':good, 'd/b.jsonl':js(rows[0])}, 'd',
                         ['b.jsonl, line 1', 'prompt-completion', 'text', 'keep one format']),
    'ending':           ({'a.xlsx':'x'}, 'a.xlsx', ["'.xlsx'", '.csv', 'Convert']),
    'pickle':           ({'a.pkl':'x'}, 'a.pkl', ["'.pkl'", '.jsonl', 'Convert']),
    'broken jsonl':     ({'a.jsonl':good+'\n\n{"text": "x"'}, 'a.jsonl',
                         ['a.jsonl, line 4', 'broken JSON', 'correct that line']),
    'broken json':      ({'a.json':'[{"text": "x"},\n{"text" "y"}]'}, 'a.json',
                         ['a.json, line 2', 'broken JSON', 'column 9']),
    'json, then lines': ({'a.json':good+'\n{"te'}, 'a.json', ['a.json, line 3', 'broken JSON']),
    'json wrapper':     ({'a.json':'{"data": [{"text": "x"}]}'}, 'a.json', ["columns 'data'", 'accepted sets']),
    'json number':      ({'a.json':'3'}, 'a.json', ['a.json, line 1 is 3 (int)', 'named columns']),
    'rows of strings':  ({'a.json':'["x", "y"]'}, 'a.json', ['a.json, row 1', '"x" (str)', 'named columns']),
    'nested too deep':  ({'a.jsonl':'['*100_000}, 'a.jsonl', ['a.jsonl', 'nested too deep', 'plain object']),
    'parquet cut':      ({'a.parquet':parquet(rows)[:-20]}, 'a.parquet',
                         ['a.parquet is damaged or cut short', 'copy it again']),
    'not parquet':      ({'a.parquet':'text'}, 'a.parquet', ['damaged', 'copy it again']),
    'gzip cut':         ({'a.jsonl.gz':gzip.compress(js(*rows).encode())[:-30]}, 'a.jsonl.gz',
                         ['damaged or cut short', 'copy it again']),
    'not gzip':         ({'a.jsonl.gz':good}, 'a.jsonl.gz', ['damaged', 'copy it again']),
    'not utf-8':        ({'a.jsonl':b'{"text": "One"}\n{"text": "Stra\xdfe"}'}, 'a.jsonl',
                         ['line 2', '0xdf', 'offset 30', 'save the file as UTF-8']),
    'utf-16':           ({'a.csv':'text\nOne'.encode('utf-16')}, 'a.csv', ['line 1', 'offset 0', 'UTF-8']),
    'surrogate':        ({'a.jsonl':'{"text": "\\ud800"}'}, 'a.jsonl', ['line 1', 'surrogate', 'write that row again']),
    'csv ragged':       ({'a.csv':'prompt,completion\n"a\nb",c\nd,e,f\n'}, 'a.csv',
                         ['line 4', '3 fields under 2 names', 'quotes']),
    'csv short':        ({'a.csv':'prompt,completion\na\n'}, 'a.csv', ['line 2', '1 fields under 2 names']),
    'csv quotes':       ({'a.csv':'prompt,completion\na,b\n"c,d\n'}, 'a.csv',
                         ['line 3', 'broken CSV', 'check its quotes']),
    'csv no header':    ({'a.csv':'What is it?,A force\nAnd that?,A mass'}, 'a.csv',
                         ["'What is it?'", 'question', 'its first line']),
    'csv semicolons':   ({'a.csv':'prompt;completion\na;b'}, 'a.csv', ["';'", 'commas']),
    'csv column twice': ({'a.csv':'text,text\na,b'}, 'a.csv', ["'text' is there twice", 'rename']),
    'csv header only':  ({'a.csv':'text\n'}, 'a.csv', ['no usable rows']),
    'columns':          ({'a.jsonl':js(dict(instructions='a', output='b'))}, 'a.jsonl',
                         ["'instructions', 'output'", 'accepted sets', "did you mean 'instruction'", 'Rename']),
    'column case':      ({'a.jsonl':js(dict(Text='a'))}, 'a.jsonl', ["'Text'", "did you mean 'text'"]),
    'two answers':      ({'a.jsonl':js(dict(question='a', answer='b', response='c'))}, 'a.jsonl',
                         ["'answer' and 'response'", 'keep one']),
    'column missing':   ({'a.jsonl':js(rows[0], dict(prompt='a'))}, 'a.jsonl',
                         ['line 2', "columns 'prompt'", 'Rename']),
    'number':           ({'a.json':json.dumps([rows[0], dict(prompt='1+2=', completion=3)])}, 'a.json',
                         ['row 2', "'completion'", '3 (int)', 'as a string']),
    'list':             ({'a.jsonl':js(dict(text=['a', 'b']))}, 'a.jsonl',
                         ['line 1', "'text'", '(list)', 'as a string']),
    'parquet number':   ({'a.parquet':parquet([dict(question='a', answer=1.5)])}, 'a.parquet',
                         ['row 1', "'answer'", '1.5 (float)']),
    'parquet not utf-8': ({'a.parquet':parquet([dict(text='a', ä='b')]).replace('ä'.encode(), b'\x80\x80')},
                          'a.parquet', ['a.parquet', 'damaged', 'make or copy it again']),
    'all empty':        ({'a.jsonl':js(dict(text=''), dict(text=None))}, 'a.jsonl',
                         ['2 with an empty text', 'give rows']),
    'one row':          ({'a.jsonl':js(dict(text='a'))}, 'a.jsonl', ['1 usable row', 'at least 2', 'Add rows']),
    'one paragraph':    ({'a.txt':'One.\nTwo.'}, 'a.txt', ['1 usable row', 'blank lines']),
    'role':             ({'a.jsonl':chat(dict(role='bot', content='a'))}, 'a.jsonl',
                         ['line 1, message 2', "'bot'", 'assistant', 'Rename']),
    'role is a list':   ({'a.jsonl':chat(dict(role=['user'], content='a'))}, 'a.jsonl',
                         ['message 2', "['user']", 'allowed are system']),
    'no content':       ({'a.jsonl':chat(dict(role='assistant'))}, 'a.jsonl',
                         ['line 1, message 2', 'no content', 'give it a text']),
    'content of parts': ({'a.jsonl':chat(dict(role='assistant', content=[dict(type='text')]))}, 'a.jsonl',
                         ["'content'", '(list)', 'as a string']),
    'chat is a text':   ({'a.jsonl':js(dict(messages='Hi'))}, 'a.jsonl', ['line 1', 'holds a str', 'list of']),
    'digits':           ({'a.json':'[{"text": '+'9'*5000+'}]'}, 'a.json', ['a.json, line 1', '4300 digits']),
    'digits in a line': ({'a.jsonl':'{"text": "a"}\n{"text": '+'9'*5000+'}'}, 'a.jsonl', ['line 2', '4300 digits']),
    'nested text':      ({'a.jsonl':'{"text": '+'['*400+']'*400+'}'}, 'a.jsonl', ['line 1', "'text'", '(list)']),
    'many columns':     ({'a.jsonl':js({f'c{i}':1 for i in range(1000)})}, 'a.jsonl',
                         ["'c0'", 'and 980 more', 'accepted sets']),
    'bomb':             ({'a.jsonl.gz':gzip.compress(b' '*2**27)}, 'a.jsonl.gz',
                         ['a.jsonl.gz', '200 times its size', 'make it again']),
    'key twice':        ({'a.jsonl':'{"text": "a"}\n{"text": "a", "text": "b"}'}, 'a.jsonl',
                         ['a.jsonl, line 2', "key 'text' is there twice", 'rename']),
    'key twice in a list': ({'a.json':'[{"text": "a"},\n {"text": "a", "text": "b"}]'}, 'a.json',
                            ['a.json, line 2', "key 'text' is there twice", 'rename']),
    'row of nothing':   ({'a.json':'[{}, {}]'}, 'a.json', ['row 1', 'no columns at all', 'give one of']),
    'json after the list': ({'a.json':'[{"text": "a"}] x'}, 'a.json', ['a.json, line 1', 'Extra data at column 17']),
    'json without comma': ({'a.json':'[{"text": "a"}\n{"text": "b"}]'}, 'a.json',
                           ['a.json, line 2', "Expecting ',' delimiter at column 1"]),
    'json cut':         ({'a.json':'[{"text": "a"},'}, 'a.json', ['a.json, line 1', 'Expecting value']),
    'tool calls':       ({'a.jsonl':chat(dict(role='assistant', content='', tool_calls=[dict(type='function')]))},
                         'a.jsonl', ['line 1, message 2', "'tool_calls'", 'leave the chat out']),
    'call beside a text': ({'a.jsonl':chat(dict(role='assistant', content='Wait.', function_call=dict(name='f')))},
                           'a.jsonl', ['message 2', "'function_call'", 'Write the call into the content']),
    'call without content': ({'a.jsonl':chat(dict(role='assistant', content=None, tool_calls=[1]))}, 'a.jsonl',
                             ["'tool_calls'"]),
    'weight 0':         ({'a.jsonl':chat(dict(role='assistant', content='a', weight=0))}, 'a.jsonl',
                         ['message 2', 'weight=0', 'counts alike', 'leave the message out']),
    'not to be trained on': ({'a.jsonl':chat(dict(role='assistant', content='a', train=False))}, 'a.jsonl',
                             ['train=false', 'Leave the key out']),
    'role of a tool':   ({'a.jsonl':chat(dict(role='tool', content='3'))}, 'a.jsonl', ["'tool'", 'leave the chat out']),
    'long text':        ({'a.jsonl':js(dict(text=' '*4_194_305))}, 'a.jsonl',
                         ['line 1', '4,194,305 characters', 'split it into several rows']),
    'long paragraph':   ({'a.txt':'One.\n\n'+'a b\n'*1_100_000}, 'a.txt',
                         ['line 3', 'a paragraph of more than', 'blank lines']),
    'path too long':    ({'a.jsonl':good}, 'x'*5000, ['no file or folder', 'Give the path']),
    'deep path too long': ({'a.jsonl':good}, 'x/'*5000+'a.jsonl', ['no file or folder', 'Give the path']),
    'bomb of one line': ({'a.jsonl.gz':gzip.compress(b'{"text": "'+b'a'*2**27+b'"}')}, 'a.jsonl.gz',
                         ['200 times its size', 'make it again']),
    'bomb of lines':    ({'a.jsonl.gz':gzip.compress(b'\n'*2**25)}, 'a.jsonl.gz', ['200 times its size']),
    'bomb of rows':     ({'a.json.gz':gzip.compress(b'['+(b'{"text": "'+b'a'*500+b'"},')*2**15)}, 'a.json.gz',
                         ['200 times its size']),
    'parquet of many rows': ({'a.parquet':parquet(dict(text=['a']*1_000_000))}, 'a.parquet',
                             ['1,000,000 rows', '200 times its size']),
    'parquet of long rows': ({'a.parquet':parquet(dict(text=['a'*70_000_000]))}, 'a.parquet',
                             ['rows of more than 64 MiB', 'split the texts']),
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
    with pytest.raises(ISTError, match=f'{next(iter(kw))}={next(iter(kw.values()))} .*; give'):
        load_data('a.jsonl', **kw)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may read everything')
def test_bad_permission(here):
    put(here, {'a.jsonl':good})
    (here/'a.jsonl').chmod(0)
    with pytest.raises(ISTError, match='may not be read by this user; change its permissions'): load_data('a.jsonl')

def test_kinds_differ(here):
    put(here, {'a.jsonl':good, 'b.jsonl':js(*rows)})
    with pytest.raises(ISTError, match='a.jsonl holds text rows but b.jsonl holds .* rows'):
        load_data('a.jsonl', test='b.jsonl')

def test_prompts_of_the_rows_held_out_are_written_alike(here):
    "A prompt of one's own is taken as it is, and other columns go through the template: the two do not go together"
    mine,ours,alpaca = [[{k:f'{k} {i}' for k in o} for i in range(4)] for o in (
        ('prompt', 'completion'), ('question', 'answer'), ('instruction', 'output'))]
    put(here, {'mine.jsonl':js(*mine), 'ours.jsonl':js(*ours), 'alpaca.jsonl':js(*alpaca)})
    for a,b in (('mine', 'ours'), ('alpaca', 'mine')):
        with pytest.raises(ISTError, match='give both in one form'): load_data(f'{a}.jsonl', test=f'{b}.jsonl')
    for o in load_data('alpaca.jsonl', test='ours.jsonl').test: assert '### Instruction:' in o['prompt']

@pytest.mark.parametrize('name,body', {'a.json':json.dumps(rows, indent=2), 'lines.json':js(*rows), 'a.jsonl':js(*rows),
                                       'a.jsonl.gz':gzip.compress(js(*rows).encode()),
    'pretty.json':json.dumps(rows, indent=8), 'gz.json.gz':gzip.compress(json.dumps(rows).encode()),
    'one.json':json.dumps(rows, ensure_ascii=False), 'a.csv':as_csv(rows), 'bom.csv':'\ufeff'+as_csv(rows),
    'a.parquet':parquet(rows)}.items(), ids=lambda o: o if isinstance(o,str) and len(o)<12 else '')
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
        put(here,
            {'a.jsonl':js(*[{c:chat if kind=='messages' else f'{c} {i}' for c in cols}|dict(id=i) for i in range(3)])})
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
    import ist_nb.files
    monkeypatch.setattr(ist_nb.files, '_longest_line', 2**20)
    put(here, {'a.jsonl':js(*rows)+'\n'+js(dict(prompt='a'*2**21, completion='b'))})
    with pytest.raises(ISTError, match='line 13: longer than 1 MiB; write one row in a line'): load_data('a.jsonl')

def test_deep_values_in_messages(here):
    "What cannot be written is not shown"
    from ist_nb.data import _Part as Part
    deep = []
    for _ in range(10_000): deep = [deep]
    for row in (dict(text=deep), dict(text=10**5000), deep, dict(messages=[deep])):
        with pytest.raises(ISTError): list(Part('a', [('row 1', row)]).convert())

# --- everything in a file is in the dataset or in the report

def chats(n, **keys):
    return js(*[dict(messages=[dict(role='user', content=f'Hi {i}'),
                               dict(role='assistant', content=f'Hello {i}', **keys)]) for i in range(n)])

@pytest.mark.parametrize('key', ['name', 'reasoning', 'reasoning_content', 'thinking', 'id', 'weight', '', 'naïve\n',
                                 '\ud800'])
def test_keys_of_messages_are_named(here, key):
    "With how many messages had them; a key that holds nothing is none"
    put(here, {'a.jsonl':chats(3, **{key:1, 'tool_calls':[], 'audio':None, 'refusal':''})+'\n'+chats(2)})
    report = load_data('a.jsonl').report
    assert f'Keys of messages not used: {key if key and key.isprintable() else repr(key)} (3).' in report
    assert 'tool_calls' not in report and 'audio' not in report and report.isprintable()

def test_keys_of_test_messages_are_named(here):
    put(here, {'train.jsonl':chats(3), 'test.jsonl':chats(2, name='Ann')})
    assert 'Keys of messages of test.jsonl not used: name (2).' in load_data('train.jsonl', test='test.jsonl').report

def test_message_with_both_spellings(here):
    "Of files that were joined, each message has all keys, and those of the other spelling are null"
    joined = [{'role':'user', 'from':None, 'content':'Hi', 'value':None},
              {'role':None, 'from':'gpt', 'content':None, 'value':'Hello'}]
    put(here, {'a.jsonl':js(*[dict(messages=joined)]*2)})
    data = load_data('a.jsonl')
    assert data.train[0]['messages']==[dict(role='user', content='Hi'), dict(role='assistant', content='Hello')]
    assert 'Keys' not in data.report

def test_an_empty_turn_is_not_trained_on(here):
    put(here,
        {'a.jsonl':chats(2)+'\n'
         +js(dict(messages=[dict(role='assistant', content='Hi'), dict(role='user', content='?'),
                            dict(role='assistant', content=' ')]))})
    data = load_data('a.jsonl')
    assert len(data.train)+len(data.test)==2 and 'Dropped for an empty text: 1 of a.jsonl.' in data.report

def test_columns_are_counted(here):
    put(here, {'a.jsonl':js(dict(text='One', id=1), dict(text='Two', id=2, note='x'), dict(text='Three', id=3))})
    assert 'Columns not used: id, note (in 1 of 3 rows).' in load_data('a.jsonl').report
    put(here, {'b.jsonl':js(dict(text='Four', id=1, mark=2))})
    assert 'Columns of b.jsonl not used: mark.' in load_data('a.jsonl', test='b.jsonl').report

def test_columns_without_a_name(here):
    "A comma at the end of each line is no column; numbers of rows, as pandas writes them, are one"
    put(here, {'a.csv':'prompt,completion,\nWhat?,That,\nWho?,She,\n',
               'b.csv':',prompt,completion\n0,What?,That\n1,Who?,She\n',
               'c.csv':'prompt,completion,,\nWhat?,That,,\nWho?,She,x,\n'})
    assert 'not used' not in load_data('a.csv').report
    assert load_data('b.csv').report.endswith('Columns not used: column 1 (without a name).')
    assert load_data('c.csv').report.endswith('Columns not used: column 3 (without a name) (in 1 of 2 rows).')
    want = [dict(prompt='What?', completion='That'), dict(prompt='Who?', completion='She')]
    assert load_data('a.csv', test='a.csv').train.to_list()==want

def test_files_and_splits_are_named(here):
    put(here, {'d/train.jsonl':good, 'd/test.jsonl':good, 'd/validation.jsonl':good, 'd/notes.txt':'x',
               'd/model.pkl':'x', 'd/.hidden':'x'})
    (here/'d'/'more').mkdir()
    report = load_data('d').report
    assert 'Files not used: model.pkl, more, notes.txt.' in report and 'Splits not used: validation.' in report
    put(here, {'e/test.jsonl':good, 'e/train.jsonl':good})
    assert 'Splits not used: test, validation, train of e.' in load_data('d', test='e').report

def test_every_row_is_accounted_for(here):
    put(here,
        {'a.jsonl':js(*[dict(prompt=f'{i}', completion='' if i%3==0 else 'x', **({'id':i} if i%2 else {}))
                        for i in range(30)])})
    data = load_data('a.jsonl')
    assert len(data.train)+len(data.test)==20
    assert 'Dropped for an empty text: 10 of a.jsonl.' in data.report
    assert 'id (in 15 of 30 rows)' in data.report

# --- bounded in memory

@pytest.mark.parametrize('name', ['a.jsonl', 'lines.json', 'list.json', 'pretty.json', 'a.csv'])
def test_a_file_is_not_held_as_a_whole(here, name):
    "Reading 25 MB takes less than 8, also of a list in a single line"
    import tracemalloc
    rows = [dict(text='a'*2500)]*10_000
    write = {'a.csv':as_csv, 'list.json':json.dumps, 'pretty.json':lambda rows: json.dumps(rows, indent=1)}
    put(here, {name:write.get(name, lambda rows: js(*rows))(rows)})
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(here/name))==10_000
        assert tracemalloc.get_traced_memory()[1]<8_000_000
    finally: tracemalloc.stop()

@pytest.mark.parametrize('size', [1, 2, 3, 7, 50])
@pytest.mark.parametrize('indent', [None, 1])
def test_a_list_in_pieces(here, size, indent):
    "Wherever the pieces of a list end, its rows are the same, and so are the places of errors"
    from ist_nb.files import _read_list
    rows = [dict(text='a, ]["'), {}, 12, [1, [2]], 'é', None, 1.5e3]
    def read(text):
        return [o for _,o in _read_list(iter([text[i:i+size] for i in range(1, len(text), size)]), text[0], 1)]
    text = json.dumps(rows, indent=indent)
    assert read(text+' \n')==rows and read('[ ]')==[]
    for wrong in (text[:-1], text+'x', text.replace('12,', '12'), text.replace('null', 'nul'), text[:-1]+',]', '[,1]'):
        with pytest.raises(json.JSONDecodeError) as want: json.loads(wrong)
        with pytest.raises(ISTError) as got: read(wrong)
        if wrong[-2:]!=',]':
            where = want.value
            assert f', line {where.lineno}: broken JSON ({where.msg} at column {where.colno})' in str(got.value)

def test_a_row_of_a_list_is_bounded(here, monkeypatch):
    "A bracket that is never closed does not fill the memory"
    import ist_nb.files
    monkeypatch.setattr(ist_nb.files, '_longest_line', 2**20)
    put(here, {'a.json':'[{"text": "'+'a'*2**23})
    with pytest.raises(ISTError, match='line 1: broken JSON'): list(read_rows(here/'a.json'))

def test_places_of_errors(here):
    put(here, {'n.json':'[1234, 56]', 'b.json':'[{"text": "x"},\n{"text" "y"}]', 'u.txt':'ä\nß'.encode()+b'\xff',
               'cut.txt':'aß'.encode()[:-1]})
    assert [o for _,o in read_rows(here/'n.json')]==[1234, 56]
    for name,says in {'b.json':'b.json, line 2: broken JSON .* at column 9', 'u.txt':'line 2: byte 0xff at offset 5',
                      'cut.txt':'byte 0xc3 at offset 1'}.items():
        with pytest.raises(ISTError, match=says): list(read_rows(here/name))
