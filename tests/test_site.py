"The built site in a real browser, and what the build makes of special cases"
import json,re,subprocess,sys,pytest
from filelock import FileLock
from pathlib import Path
from statistics import mean
import build_docs,check_site

root = Path(__file__).parent.parent
docs = root/'_docs'

made = {'__pycache__', '.ipynb_checkpoints', 'images'}   # notebooks draw their pictures anew at each run
def newest(*folders):
    return max(p.stat().st_mtime for f in folders for p in (root/f).rglob('*') if p.is_file()
               and not made & set(p.parts))

@pytest.fixture(scope='session')
def site():
    "The site; it is built if it is not there, or older than what it is made of"
    done = docs/'build.json'
    with FileLock(root/'.site.lock'):     # one worker builds
        if not done.exists() or done.stat().st_mtime<newest('nbs', 'tools', 'ist_nb'):
            subprocess.run([sys.executable, 'tools/build_docs.py', '--check'], cwd=root, check=True,
                           stdout=subprocess.DEVNULL)
    return docs

@pytest.fixture(scope='module')
def started():
    "A browser, which takes a second to start"
    with check_site.browser() as b: yield b

@pytest.fixture
def there(started, site):
    "The browser, and the address of the site"
    with check_site.served(site) as base: yield started,base
    for o in started.contexts: o.close()

needs_browser = pytest.mark.skipif(not check_site.chromium(), reason='no Chromium or Chrome on the path: apt-get '
                                   'install chromium, or set CHROMIUM')

@needs_browser
@pytest.mark.parametrize('part', [0, *(pytest.param(o, marks=pytest.mark.slow) for o in range(1, 8))])
def test_pages(started, site, part):
    "An eighth of the pages each, and of the terms of the search"
    pages = sorted(check_site.pages_of(site), key=lambda o: (site/o).stat().st_size)[part::8]
    # axe-core takes its time; tools/check_site.py lets it see every page
    small = {o for o in pages if (site/o).stat().st_size<60_000}
    found,answers = check_site.check(site, pages, list(check_site.terms)[part::8], None,
                                     small.__contains__, started)
    assert len(found)==len(pages)>=5 and small
    assert sum(r['pictures'] for r in found.values())>0 and all(r['pairs']>10 for r in found.values())
    problems = list(check_site.report(found, answers))
    assert not problems, '\n'.join(problems)

@needs_browser
def test_the_check_sees(started, tmp_path):
    "Each fault that is looked for, planted in a page, is found"
    assets = tmp_path/'a.css'
    assets.write_text('')
    (tmp_path/'bad.html').write_text('''<!doctype html><html><head><title>x</title>
        <meta name="viewport" content="width=device-width"></head><body data-md-color-scheme="default">
        <form data-md-component="palette"><label onclick="document.body.dataset.mdColorScheme='slate'">x</label></form>
        <article><p style="color:#999;background:#fff">pale words of $\\\\alpha$ and \\\\(\\\\frac12\\\\)</p>
        <img src="none.png"><div style="width:900px">wide</div></article>
        <script>console.error('oh'); fetch('http://127.0.0.1:9/elsewhere').catch(e => 0)</script></body></html>''')
    found,_ = check_site.check(tmp_path, ['bad.html'], [], started=started)
    r = found['bad.html']
    assert all(r[k] for k in 'console outside failed raw no_alt not_loaded wcag light too_wide'.split()), r
    assert len(r['raw'])==2 and r['toggled'] and not r['broken_formulas']

def test_llms_and_cards(site):
    "Every page is in llms.txt and in the sitemap's place, with a card of the size that others ask for"
    from PIL import Image
    txt = (site/'llms.txt').read_text()
    base = re.search(r'\((https?://[^)]*)index\.html\.md\)', txt)[1]
    full = (site/'llms-full.txt').read_text()
    for o in check_site.pages_of(site):
        assert f'({base}{o}.md)' in txt and (site/f'{o}.md').exists(), o
        html = (site/o).read_text()
        card = re.search(r'property="?og:image"? content="?([^"> ]+)', html)[1]
        assert card.startswith(base) and Image.open(site/card.removeprefix(base)).size==(1200, 630), o
        for k in ('og:title', 'og:description', 'og:url', 'twitter:card'): assert k in html, (o, k)
        assert re.search(r'^# .+', full, re.M)
    assert full.count('\n---\n')>=len(check_site.pages_of(site))-1

def test_navigation(site):
    "Home, the tour, tutorials, modules by their numbers, theory, results, reference; and every page has its neighbours"
    html = (site/'layers.html').read_text()
    tabs = [re.sub(r'\s+', ' ', o).strip() for o in re.findall(r'class="?md-tabs__link"?>(.*?)</a>', html, re.S)]
    assert [o for o in tabs if o!='Tour']==['Home', 'Tutorials', 'Modules', 'Theory', 'Results', 'Reference']
    order,seen = ['index.html'],set()
    while order[-1] not in seen:
        seen.add(order[-1])
        m = re.search(r'<link rel="?next"? href="?([^"> ]+)', (site/order[-1]).read_text())
        if m:
            order.append((Path(order[-1]).parent/m[1]).as_posix() if not m[1].startswith('..')
                         else m[1].removeprefix('../'))
    assert set(order)==set(check_site.pages_of(site))
    modules = [o.removesuffix('.html') for o in order if '/' not in o]
    numbered = [p.stem.partition('_')[2] for p in sorted((root/'nbs').glob('[0-9]*.ipynb'))]
    assert [o for o in modules if o in numbered]==numbered

def test_names_inside_links():
    "nbdev links a name that is inside a link already: the link of the author stays"
    one = lambda s: build_docs._nested.sub(r'[\1](', s)
    assert one('of [[`ISTConfig`](config.html#istconfig)](config.html) do')=='of [`ISTConfig`](config.html) do'
    assert one('[`IST`](ist.html#ist) and [x](y)')=='[`IST`](ist.html#ist) and [x](y)'

def test_alt_text():
    "A cell's own words come first, then the last sentence above it, without its marks"
    assert build_docs.alt_text({'fig-alt':'Bars of $x$'}, 'Some text.')=='Bars of x'
    above = 'First.\n\nHere it is. What the [floor](a.html) does to `x`:'
    assert build_docs.alt_text({}, above)=='What the floor does to x'
    assert build_docs.alt_text({}, '')==''

def test_tables_of_numbers():
    "A column of numbers is aligned right unless its author aligned one; a folded output is a folded note"
    table = ('| a | b | c | d |\n|---|---|---|---|\n| x, 2.0 | -0.129 ± 0.004 * | | 3 of 4 |\n'
             '| y | 12% | 1.5x | never |\n')
    want = table.replace('|---|---|---|---|', '|---|---:|---:|---|')
    assert build_docs.aligned(table+'\ntext')==want+'\ntext'
    text = table.replace('3 of 4', '1'*40+' and so on')      # at once, however long the number
    assert build_docs.aligned(text)==want.replace('3 of 4', '1'*40+' and so on')
    assert build_docs.aligned(own := table.replace('---|---|\n', '---:|---|\n'))==own
    cell = dict(cell_type='code', source='#| echo: false\n#| output-fold: All of it', metadata={},
                outputs=[dict(output_type='display_data', data={'text/markdown':table})])
    from fastcore.all import dict2obj
    assert build_docs.cell2md(dict2obj(cell), 'page', None, 0).startswith('??? table "All of it"\n\n    | a | b')

def test_outputs():
    "Long lines of an output are broken, and what says nothing about a function is not said"
    out = lambda text: build_docs.out2md(dict(output_type='stream', text=text), 'a', None, '0', False)
    assert '.wrap' in out('a     b\n'+'x'*120) and '.wrap' not in out('short\n'+'x'*100)
    assert '.wrap' not in out('--model      '+'x'*120)        # rows of columns would fall apart
    md = build_docs.out2md(dict(output_type='display_data',
                                data={'text/markdown':'### f\n\n*Call self as a function.*'}), 'a', None, '0', False)
    assert 'Call self' not in md and '### f' in md

def test_registered_names_have_a_line(site):
    "A sampler is described by what it is registered with"
    api = (site/'api.html.md').read_text()
    rows = re.findall(r'^\| \[`([\w.]+)`\]\([^)]*\)(?: ★)? \| (.*) \|$', api, re.M)
    assert len(rows)>80
    assert 'random sparse tuning' in dict(rows)['uniform_sampler']

@pytest.mark.parametrize('hosted,to', [('False', 'nbs/00_tour.ipynb'), ('True', 'https://a.io/b/tour.html')])
def test_links_of_the_readme_work_where_it_is_read(hosted, to):
    "In the repository, until the site is hosted; what is no page is always in the repository"
    from types import SimpleNamespace as Of
    root = Path(build_docs.__file__).parent.parent
    cfg = Of(config_path=root, nbs_path=root/'nbs', doc_host='https://a.io', doc_baseurl='/b', hosted=hosted,
             home_nb='index.ipynb')
    pages = build_docs.Pages(cfg, [Path('00_tour.ipynb')])
    assert build_docs.relink('[x](00_tour.ipynb#why) [y](../LICENSE)', pages.readme)==f'[x]({to}#why) [y](LICENSE)'
    with pytest.raises(SystemExit, match='nothing at'): pages.readme('gone.ipynb')

def test_every_link_of_the_readme_is_there():
    "Files, and headings in them, as the repository has them"
    slug = lambda s: re.sub(r'[^\w\- ]', '', s.lower()).strip().replace(' ', '-')
    links = [o for o in re.findall(r'\]\(([^)\s]+)\)', (root/'README.md').read_text()) if not re.match(r'\w+:', o)]
    for f,_,anchor in (o.partition('#') for o in links):
        assert (root/f).exists(), f
        if not anchor: continue
        cells = json.loads((root/f).read_text())['cells']
        heads = [slug(h) for c in cells if c['cell_type']=='markdown'
                 for h in re.findall(r'^#+ +(.*)$', ''.join(c['source']), re.M)]
        assert anchor in heads, (f, anchor)
    assert len(links)>20

def test_the_build_says_what_it_built(tmp_path, monkeypatch):
    "How many pages, where from here, and how to look at them"
    monkeypatch.chdir(tmp_path)
    for o in ('index.html', 'results/speed.html', '404.html'):
        (tmp_path/'_docs'/o).parent.mkdir(parents=True, exist_ok=True); (tmp_path/'_docs'/o).touch()
    said = '2 pages in _docs (42 s). To look at them: python -m http.server -d _docs, then http://localhost:8000'
    assert build_docs.built(tmp_path/'_docs', 41.6)==said
    assert build_docs.write_readme(tmp_path/'README.md', 'a').endswith('anew')
    assert (tmp_path/'README.md').read_text()=='a'
    assert build_docs.write_readme(tmp_path/'README.md', 'a').endswith('up to date')

@needs_browser
@pytest.mark.parametrize('width', [360, *(pytest.param(o, marks=pytest.mark.slow) for o in (768, 1280)), 1920])
def test_the_first_screen(there, site, width):
    """What it is, two buttons and both loops, before the first heading; the loops move only for those who allow it,
    and can be stopped"""
    html = (site/'index.html').read_text()
    assert html.count('images/keep.png')==1 and html.index('class="loops"')<html.index('<h2')
    moving = "document.querySelector('.loops').getAnimations({subtree: true}).map(o => o.playState)"
    seen = "[...document.querySelectorAll('.hero .md-button')].map(o => o.getBoundingClientRect().bottom)"
    b,base = there
    for motion in ('reduce', 'no-preference'):
        page = b.new_context(reduced_motion=motion, viewport=dict(width=width, height=900)).new_page()
        page.goto(f'{base}index.html')
        bottoms,states = page.evaluate(seen),page.evaluate(moving)
        assert len(bottoms)==2 and max(bottoms)<800
        assert bool(states)==(motion!='reduce') and set(states)<={'running'}
    page.locator('.loops-box label').click()
    assert set(page.evaluate(moving))=={'paused'}

@needs_browser
def test_pictures_are_no_light_slabs_on_a_dark_page(there):
    "White turns into the page; a map of colours, which the page names, keeps them on a quiet panel"
    how = """[...document.querySelectorAll('article img')].map(o => [o.classList.contains('map'),
        getComputedStyle(o).mixBlendMode, getComputedStyle(o).filter.split('(')[0]])"""
    b,base = there
    page = b.new_context(color_scheme='dark').new_page()
    page.goto(f'{base}plot.html')
    found = {tuple(o) for o in page.evaluate(how)}
    assert found=={(True, 'normal', 'brightness'), (False, 'screen', 'invert')}

tried = 'results/explore.html'

@needs_browser
def test_moving_the_controls(there):
    """Layers, schedule, length and text each change the words and the drawings, with mouse and keyboard; no move leads
    to a run that was not measured, and a dense run to compare with is always named"""
    said,seen = [],dict(console=[], outside=[])
    b,base = there
    page = b.new_context(viewport=dict(width=400, height=800)).new_page()
    page.on('console', lambda m: seen['console'].append(m.text))
    page.on('pageerror', lambda e: seen['console'].append(str(e)))
    page.on('request', lambda r: r.url.startswith(base) or seen['outside'].append(r.url))
    page.goto(base+tried)
    at = page.locator
    def shown(): return [at('.said').inner_text(), *(at(f'.{o}').inner_html() for o in ('grid', 'chart', 'bars'))]
    def changes(move):
        "Everything that a reader sees is another; what a screen reader is told too"
        before,alt = shown(),at('svg.grid').get_attribute('aria-label')
        move()
        said.append(shown()[0])
        assert all(a!=c for a,c in zip(before, shown())) and at('svg.grid').get_attribute('aria-label')!=alt
    changes(lambda: at('#try-schedule').select_option(label='Random layers, new ones at each step'))
    changes(lambda: at('#try-layers').press('ArrowRight'))
    changes(lambda: at('#try-length').press('ArrowRight'))
    changes(lambda: at('#try-text').select_option('2'))
    assert at('#try-layers').get_attribute('aria-valuetext')==at('#try-layers ~ *, label[for=try-layers] output'
                                                                 ).first.inner_text()
    # what is said is what the file has
    at('#try-text').select_option(label='History: the larger model')
    at('#try-schedule').select_option(label='Always the same: the top layers')
    runs = json.loads((root/'benchmarks/results/quality_larger.json').read_text())['runs']
    of = lambda m, lr, k: mean(r[k] for r in runs
                               if (r['task'], r['regime'], r['method'], r['lr'])==('book', 'full', m, lr))
    (time,dense),(peak,most) = ((of('static top', 0.002, k), of('LoRA', 0.001, k)) for k in ('seconds', 'peak'))
    assert (f"takes {time/dense:.2f} of LoRA's time and {peak/most:.2f} of its peak of memory, and its held-out "
            f"loss is {of('static top', 0.002, 'test'):.3f}") in shown()[0]
    for text in range(at('#try-text option').count()):
        at('#try-text').select_option(str(text))
        for o in page.eval_on_selector_all('#try-schedule option', 'l => l.map(o => o.value)'):
            at('#try-schedule').select_option(o)
            said.append(at('.said').inner_text())
            assert not re.search('NaN|undefined|Infinity', at('#try').inner_html())
        for o in ('layers', 'length'):
            for key in ('Home', *['ArrowRight']*6):
                if at(f'#try-{o}').is_enabled(): at(f'#try-{o}').press(key)
                said.append(at('.said').inner_text())
        assert not page.evaluate(check_site._too_wide)
    assert len(set(said))>70 and all('dense' in o for o in said) and sum('not measured' in o for o in said)>5
    assert seen==dict(console=[], outside=[])

@needs_browser
def test_the_controls_can_be_read(there):
    "Contrast and the other criteria of WCAG, light and dark, wide and narrow; without JavaScript the table is left"
    b,base = there
    page = b.new_context(color_scheme='light', reduced_motion='reduce').new_page()
    found = check_site.look(page, base, tried)
    assert not list(check_site.report({tried:found}, {})) and found['pictures']==2
    plain = b.new_context(java_script_enabled=False).new_page()
    plain.goto(base+tried)
    assert plain.locator('#try table.runs').is_visible() and not plain.locator('#try form').is_visible()
    assert plain.locator('#try tbody tr').count()>80

def test_no_scripts_in_the_markdown(site):
    "Programs that read the site get the table, not the script"
    assert 'ResizeObserver' not in (site/'llms-full.txt').read_text()
    assert 'class="runs"' in (site/f'{tried}.md').read_text()

_quarto = '''#!{python}
"As Quarto does: first the project's pre-render command, and nothing more where that fails"
import subprocess,sys,yaml
first = yaml.safe_load(open('_quarto.yml'))['project']['pre-render']
sys.exit(subprocess.run(first.replace('python', sys.executable, 1), shell=True).returncode)
'''

@pytest.mark.slow
def test_nbdev_commands_leave_the_tree_clean(tmp_path):
    "nbdev_prepare works; nbdev_docs and nbdev_preview say what to type instead; nbdev's own settings are up to date"
    import os,shutil
    repo,tools = tmp_path/'repo',tmp_path/'bin'
    (repo/'nbs').mkdir(parents=True); (repo/'tools').mkdir(); tools.mkdir()
    for o in '''.gitignore settings.ini pyproject.toml setup.py README.md tools/no_quarto.py nbs/28_config.ipynb
                nbs/index.ipynb'''.split():
        shutil.copy(root/o, repo/o)
    for o in (root/'nbs').glob('*.*'):
        if o.suffix in ('.yml', '.css') and o.name!='sidebar.yml': shutil.copy(o, repo/'nbs')
    shutil.copytree(root/'ist_nb', repo/'ist_nb', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
    shutil.copytree(root/'benchmarks'/'results', repo/'benchmarks'/'results')       # the home page shows a run
    (tools/'quarto').write_text(_quarto.format(python=sys.executable))
    (tools/'quarto').chmod(0o755)
    env = os.environ | dict(PATH=os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ['PATH']]),
                            PYTHONPATH=str(repo))
    def run(*cmd): return subprocess.run(cmd, cwd=repo, env=env, capture_output=True, text=True)
    def git(*args): return run('git', '-c', 'user.name=a', '-c', 'user.email=a@b.c', *args).stdout
    git('init', '-q'); git('add', '-A'); git('commit', '-qm', 'as it is')
    os.utime(repo/'README.md', (0, 0))      # older than its notebook, as a fresh clone may have it
    for cmd in 'nbdev_prepare nbdev_docs nbdev_preview'.split():
        res = run(cmd)
        said = res.stdout+res.stderr
        assert 'python tools/build_docs.py' in said and 'Traceback' not in said, (cmd, said)
        if cmd=='nbdev_prepare': assert res.returncode==0 and 'Success' in said, said
        assert not git('status', '--short'), (cmd, git('status', '--short'), git('diff'))
