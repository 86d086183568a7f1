"Read the textbooks, and choose from the one that pico never saw the rows that ship as the demo's data"
import gzip,json,random,re
from collections import Counter
from pathlib import Path
from fastcore.script import call_parse

held_out = 'physics'   # pico is pretrained on every book but this one

def clean(s):
    "`s` less control characters; some are punctuation that was decoded as Latin-1 instead of Windows-1252"
    s = re.sub('[\x80-\x9f]', lambda m: m[0].encode('latin-1').decode('cp1252', 'ignore'), s)
    return re.sub('[\x00-\x09\x0b-\x1f\x7f\xad]', '', s)

def read_book(path):
    "Modules of a book as dicts of `title` and `text`, less prefaces and the lines that stand in five modules or more"
    rows = [{k:clean(r[k]) for k in ('title','text')} for r in map(json.loads, gzip.open(path, 'rt', encoding='utf-8'))]
    seen = Counter(l for r in rows for l in set(r['text'].split('\n')))
    for r in rows: r['text'] = '\n'.join(l for l in r['text'].split('\n') if l.strip() and seen[l]<5)
    return [r for r in rows if r['text'] and r['title']!='Preface']

def choose(rows, sizes, lo=2_000, hi=16_000):
    "Whole modules of `lo` to `hi` bytes in a fixed random order, dealt into lists of about `sizes` bytes"
    rows = [r for r in rows if lo <= len(r['text'].encode()) <= hi]
    random.Random(42).shuffle(rows)
    res = []
    for size in sizes:
        part = []
        while sum(len(r['text'].encode()) for r in part) < size: part.append(rows.pop())
        res.append(part)
    return res

def write_jsonl(path, rows):
    path.write_text(''.join(json.dumps(r, ensure_ascii=False)+'\n' for r in rows), encoding='utf-8')

@call_parse
def main(
    books:Path,                               # Folder of the textbooks: one `*.jsonl.gz` a book
    out:Path=Path('ist_nb/assets/physics'),   # Folder to write `train.jsonl` and `test.jsonl` to
):
    out.mkdir(parents=True, exist_ok=True)
    test,train = choose(read_book(books/f'{held_out}.jsonl.gz'), (70_000,350_000))
    for name,rows in dict(train=train, test=test).items(): write_jsonl(out/f'{name}.jsonl', rows)
