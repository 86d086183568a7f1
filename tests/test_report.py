"The page of a run: every kind of run has one, with only what there is, that loads nothing and believes no text"
import json,re,shutil,pytest
from html.parser import HTMLParser
from ist_nb.config import ISTError
from ist_nb.finetune import main
from ist_nb.run_folder import _run_files,write_report
import check_site

pytestmark = pytest.mark.usefixtures('text_once')
evil = '<script>alert(1)<b title="\'x.jsonl'
quick = ('--max_steps 4 --per_device_train_batch_size 2 --max_length 32 --lora_r 2 --disable_tqdm true '
         '--logging_steps 1 --score_interval 2 --score_batch_size 4 --save_strategy steps --save_steps 2').split()
def without(argv):
    "A dense run refuses settings of IST"
    return [o for i,o in enumerate(argv) if not {o, argv[i-1]} & {'--score_interval', '--score_batch_size'}]
made,seen = {},('', '--method rst')     # seen in a browser, with all layers of pico

@pytest.fixture
def run(tmp_path_factory, monkeypatch, may_shorten):
    "A function from a command line to the folder of its run, which is made once"
    def get(line=''):
        if line in made: return made[line]
        if line not in seen: may_shorten()
        here = tmp_path_factory.mktemp('run')
        monkeypatch.chdir(here)
        for name in (evil, 'mine.jsonl'):
            (here/name).write_text('\n'.join(json.dumps(dict(text=f'{i} is a number. '*9)) for i in range(40)))
        start = quick if '--peft' not in line else ' '.join(quick).replace('--lora_r 2 ', '').split()
        argv = [*start, *line.split(), '--data', evil, '--output_dir', 'the <i>run']
        if any(o in line for o in ('dense', 'rst', 'recommended')): argv = without(argv)
        assert main(argv)==0
        return made.setdefault(line, here/'the <i>run')
    return get

class Page(HTMLParser):
    "What is on a page: tags, links and text; raises if a tag is not closed where it must be"
    void = {'meta', '!doctype'}
    def __init__(self, text):
        super().__init__()
        self.open,self.tags,self.attrs,self.text = [],[],[],''
        self.feed(text); self.close()
        assert not self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.attrs += [(tag, *o) for o in attrs]
        if tag not in self.void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append(tag); self.attrs += [(tag, *o) for o in attrs]
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.text += data

always = ['What it forgot', 'The loss', 'What was trained, step by step']
importance,often = 'Importance, beside chance','How often each layer was trained'
kinds = {'':importance, '--method dense':None, '--method dense --keep 1':None,
         '--keep 1 --general mine.jsonl':importance, '--method rst':often,
         '--method recommended --peft bottleneck':often}

@pytest.mark.parametrize('line', kinds)
def test_every_kind_of_run_has_a_page(run, line):
    "The sections of this kind, and the numbers of results.json"
    folder = run(line)
    text = (folder/'report.html').read_text()
    page,res = Page(text),json.loads((folder/'results.json').read_text())
    heads = re.findall('<h2>(.*?)</h2>', text)
    assert heads==[*always, *([kinds[line]] if kinds[line] else []), 'Settings', 'Use the adapter']
    said = ' '.join(page.text.split())
    numbers = [f"from {res['loss_before']:.4f} to {res['loss_after']:.4f} in 4 steps and {res['seconds']:.0f} s",
               f"{res['forgotten']['divergence']:.3f} nats a token", res['data'],
               f"{res['training_loss'][0][1]:.4f} at step 1, {res['training_loss'][-1][1]:.4f} at step 4"]
    for o in numbers: assert o in said, o
    assert len(res['training_loss'])==4
    assert said.count('with every layer trained')==('dense' in line)
    assert ('--keep 1 holds' in said)==('keep' not in line)==('held by a penalty of weight 1' not in said)
    assert 'learning rate 0.003, 2 rows a step' in said and ('of rank 2' in said)==('bottleneck' not in line)
    assert ('merge_and_unload' in said)==('bottleneck' not in line)
    assert all(f"{k} {json.dumps(v, ensure_ascii=False)}" in said for k,v in res['config']['finetune'].items()
               if v not in (None, False))
    state = folder/'ist_state.json'
    if kinds[line]: rows(text, json.loads(state.read_text()), 'recommended' not in line)

def rows(text, state, luck):
    "The table of layers holds what the state holds"
    table = re.findall(r'<tr>(.*?)</tr>', re.search('The layers in numbers.*?</table>', text, re.S)[0], re.S)
    cells = [re.findall(r'<t[hd][^>]*>([^<]*)', o) for o in table]
    assert ('by chance' in cells[0])==luck
    scored = any(state['importance'])
    assert [o[:2]+o[-1:]*scored for o in cells[1:]]==[
        [str(k), str(n)]+[f'{I:.2f}']*scored
        for k,n,I in zip(state['layers'], state['times_active'], state['importance'])]

def test_nothing_is_loaded_or_believed(run):
    "No script, no address but in names of namespaces; what a user wrote stays text"
    text = (run()/'report.html').read_text()
    page = Page(text)
    assert not {'script', 'link', 'iframe', 'i', 'b', 'a', 'base', 'object'} & set(page.tags)
    for tag,k,v in page.attrs:
        if k in ('src', 'href', 'xlink:href'): assert v.startswith(('#', 'data:image/png;base64,')), (tag, v[:50])
        assert not k.startswith('on')
    assert not re.search(r'url\((?!#)|@import', text) and "default-src 'none'" in text
    assert evil in page.text and page.text.count('<script>alert(1)')==3     # the data, the command and the settings
    assert 'the <i>run: a run of ist_nb' in page.text
    ids = [v for _,k,v in page.attrs if k=='id']
    assert ids and len(ids)==len(set(ids))
    assert page.tags.count('svg')==4==sum(k=='aria-label' and bool(v) for _,k,v in page.attrs)

def test_a_token_is_not_written(tmp_path, run, monkeypatch):
    from ist_nb.finetune import parse
    for o in (['--hub_token', 'hf_secret'], ['--hub_token=hf_secret'], ['--hub-token', 'hf_secret']):
        assert 'secret' not in parse([*o, '--lora_r', '4'])[0].command
    assert parse(['--lora_r', '4', '--data', 'a b'])[0].command=="ist_finetune --lora_r 4 --data 'a b'"

def test_a_stopped_run_and_its_resumption(run, tmp_path, monkeypatch):
    "The newest intact checkpoint says how far it came; resumed, the page is that of a run that was never stopped"
    whole,d = run(),tmp_path/'the <i>run'
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, d); shutil.copy(whole.parent/evil, evil)
    for name in _run_files-{'run.json'}: (d/name).unlink(missing_ok=True)
    shutil.rmtree(d/'checkpoint-4')
    text = write_report(d).read_text()
    Page(text)
    assert re.findall('<h2>(.*?)</h2>', text)==[*always[1:], often, 'Settings']       # nothing was measured yet
    assert 'step 2 of 4.' in text and '--resume' in text and 'Held-out' not in text
    assert main([*quick, '--data', evil, '--output_dir', d.name, '--resume'])==0
    changes = r'<dd>[\d.]+ s, .*|<dd>.* MiB|and \d+ s'      # seconds and bytes
    assert re.sub(changes, '', (d/'report.html').read_text())==re.sub(changes, '', (whole/'report.html').read_text())

def test_only_what_there_is(run, tmp_path):
    "Without general text, without a log, without the command: those parts are left out"
    d = tmp_path/'run'
    shutil.copytree(run(), d)
    res,began = (json.loads((d/o).read_text()) for o in ('results.json', 'run.json'))
    del res['training_loss'],began['command']
    (d/'results.json').write_text(json.dumps(res | dict(forgotten=None)))
    (d/'run.json').write_text(json.dumps(began))
    text = write_report(d).read_text()
    Page(text)
    assert re.findall('<h2>(.*?)</h2>', text)==[always[2], importance, 'Settings', 'Use the adapter']
    for name in ('results.json', 'run.json'):
        (d/name).write_text('[]'); [shutil.rmtree(o) for o in d.glob('checkpoint-*')]
        with pytest.raises(ISTError, match='holds no run of ist_finetune'): write_report(d)

def test_a_page_does_not_fail_a_run(run, tmp_path, monkeypatch, capsys):
    from ist_nb import run_folder
    monkeypatch.setattr(run_folder, '_sections', lambda *args: 1/0)
    (tmp_path/'a.jsonl').write_text('\n'.join(json.dumps(dict(text=f'{i} is a number. '*9)) for i in range(40)))
    with pytest.warns(UserWarning, match='report.html could not be drawn'):
        assert main([*quick, '--data', str(tmp_path/'a.jsonl'), '--output_dir', str(tmp_path/'out')])==0
    assert not (tmp_path/'out'/'report.html').exists() and 'report.html' not in capsys.readouterr().out

@pytest.mark.skipif(not check_site.chromium(), reason='no Chromium')
@pytest.mark.parametrize('line', seen)
def test_in_a_browser(run, line):
    "Light and dark, narrow and wide: nothing asked of a network, no error, no overflow, readable, accessible"
    path = run(line)/'report.html'
    with check_site.browser() as b:
        for scheme in ('light', 'dark'):
            page = b.new_context(color_scheme=scheme, bypass_csp=True).new_page()      # for axe, which is a script
            asked,said = [],[]
            page.on('request', lambda r: asked.append(r.url) if not r.url.startswith('data:') else None)
            page.on('console', lambda m: said.append(m.text)); page.on('pageerror', lambda e: said.append(str(e)))
            page.goto(path.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(o => o.open = true)")
            colours = page.evaluate(check_site._contrast)
            assert not colours['low'] and colours['pairs']>=4, colours
            page.add_script_tag(content=check_site._axe_source())
            assert not check_site.axe(page, ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'])
            for width in (400, 768, 1400):
                page.set_viewport_size(dict(width=width, height=900))
                assert page.evaluate('document.documentElement.scrollWidth')<=width
                letters = "[...document.querySelectorAll('svg text')].map(o => o.getBoundingClientRect().height)"
                assert min(page.evaluate(letters))>8
            back,ink = page.evaluate("""[getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector('svg text')).fill]""")
            assert back!=ink
            assert asked==[path.as_uri()] and not said, (asked, said)
