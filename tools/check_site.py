"Opens every page of the built site in a real browser, and counts what a reader would stumble over"
import json,os,platform,re,shutil,sys,threading,time
from contextlib import contextmanager,nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler,ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode
from fastcore.script import call_parse

root = Path(__file__).resolve().parent.parent
names = 'chromium chromium-browser google-chrome google-chrome-stable chrome'.split()
# a term that a reader may look for, and the page that must be among the first three answers
terms = {'suppression factor':'suppression.html', 'find_layers':'layers.html', 'ISTCallback':'callback.html',
         'exploration floor':'samplers.html', 'inclusion probabilities':'samplers.html',
         'activation_budget':'memory.html', 'convergence':'theory/convergence.html', 'DoRA':'suppression.html',
         'folded adapters':'speed.html', 'ist_finetune':'finetune.html'}
wide,narrow = dict(width=1280, height=900),dict(width=360, height=740)

def chromium():
    "Path of an installed Chromium or Chrome, or None; the variable CHROMIUM decides if it is set"
    return next((p for p in map(shutil.which, [os.environ.get('CHROMIUM') or '', *names]) if p), None)

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextmanager
def served(site):
    "Serve the folder `site` on this machine, at the address that is given"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/'
    finally: server.shutdown()

@contextmanager
def browser():
    "A headless Chromium"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=['--no-sandbox', '--disable-gpu'])
        try: yield b
        finally: b.close()

# What is seen of a page: text outside of code and of formulas, pictures, and what is wider than the window
_look = """() => {
  const main = document.querySelector('article'), out = {}
  const copy = main.cloneNode(true)
  copy.querySelectorAll('pre, code, script, style, .katex-mathml').forEach(o => o.remove())
  out.raw = (copy.textContent.match(
    /\\\\[([]|\\$[^ $][^$\\n]*\\$|\\\\(?:frac|sum|sigma|text|mathbb|le|ge|pi|beta|eta|cdot)\\b/g) || []).slice(0, 5)
  out.formulas = document.querySelectorAll('.katex').length
  out.broken_formulas = document.querySelectorAll('.katex-error').length
  const pics = [...document.querySelectorAll('article img, article svg[role=img]')]
  out.pictures = pics.length
  out.no_alt = pics.filter(o => !(o.getAttribute('alt') || o.ariaLabel || '').trim()).map(o => o.getAttribute('src'))
  out.not_loaded = [...document.querySelectorAll('img')].filter(o => o.loading != 'lazy' && !o.naturalWidth)
    .map(o => o.getAttribute('src'))
  out.unlabelled = [...document.querySelectorAll('article input:not([type=checkbox])')].length
  return out
}"""
_too_wide = """() => {
  const w = document.documentElement.clientWidth
  if (document.documentElement.scrollWidth <= w) return []
  const wide = [...document.querySelectorAll('article *')].filter(o => o.getBoundingClientRect().right > w + 1)
  return [document.documentElement.scrollWidth + ' px', ...wide.slice(0, 3).map(o => o.tagName + '.' + o.className)]
}"""
# The contrast of text with what is behind it (WCAG 1.4.3), once for each pair of colours and size: thousands of
# elements, a dozen pairs
_contrast = """() => {
  const rgba = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m }
  const over = ([r, g, b, a], [R, G, B]) => [r*a + R*(1-a), g*a + G*(1-a), b*a + B*(1-a), 1]
  const lum = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .04045 ? v/12.92 : ((v+.055)/1.055)**2.4 })
    return .2126*r + .7152*g + .0722*b }
  const known = new Map()
  const behind = e => {
    if (!e) return [255, 255, 255, 1]
    if (!known.has(e)) { const c = rgba(getComputedStyle(e).backgroundColor)
      known.set(e, c[3] == 1 ? c : over(c, behind(e.parentElement))) }
    return known.get(e)
  }
  const fade = e => { let o = 1; for (; e; e = e.parentElement) o *= getComputedStyle(e).opacity; return o }
  const seen = new Map(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement
    if (!walk.currentNode.data.trim() || e.closest('.katex-mathml, script, style, [hidden], .md-skip')
      || !e.checkVisibility({visibilityProperty: true})) continue
    const s = getComputedStyle(e), key = [s.color, s.fontSize, s.fontWeight, behind(e).join()].join('|')
    if (seen.has(key)) continue
    const bg = behind(e), c = rgba(s.color), o = fade(e)
    if (!o) continue
    const fg = over([c[0], c[1], c[2], c[3]*o], bg), [a, b] = [lum(fg), lum(bg)].sort((x, y) => y - x)
    const size = parseFloat(s.fontSize), large = size >= 24 || size >= 18.66 && s.fontWeight >= 700
    seen.set(key, {ratio: (a+.05)/(b+.05), least: large ? 3 : 4.5,
      where: e.tagName + '.' + e.className + ' ' + walk.currentNode.data.trim().slice(0, 30),
      fg: s.color, bg: bg.map(Math.round).join()})
  }
  const all = [...seen.values()]
  return {pairs: all.length, least: Math.min(...all.map(o => o.ratio)),
    low: all.filter(o => o.ratio < o.least).map(o => [o.ratio.toFixed(2), o.where, o.fg, o.bg].join(' '))}
}"""
# All other criteria of WCAG 2.1 A and AA that a program can judge, outside of code and of formulas
_axe = """() => axe.run({exclude: [['.katex'], ['pre > code']]}, {rules: {'color-contrast': {enabled: false}},
  runOnly: {type: 'tag', values: TAGS}, resultTypes: ['violations']}).then(r =>
  r.violations.map(v => ({id: v.id, n: v.nodes.length,
    where: v.nodes.slice(0, 3).map(o => o.target.join(' ') + ': ' + (o.any[0] || {message: ''}).message)})))"""

def axe(page, tags):
    "What axe-core finds against the success criteria `tags`"
    return page.evaluate(_axe.replace('TAGS', json.dumps(tags)))

def scheme(page): return page.evaluate("document.body.getAttribute('data-md-color-scheme')")

def toggle(page):
    "Press the button for the other theme; the scheme before and after"
    before = scheme(page)
    page.locator('form[data-md-component=palette] label:visible').click()
    return before,scheme(page)

def look(page, base, name, shots=None, full=True):
    "All that is checked of one page, as a dictionary of findings"
    seen = dict(console=[], outside=[], failed=[])
    def console(m):
        if m.type in ('error', 'warning'): seen['console'].append(m.text)
    def request(r):
        if not r.url.startswith((base, 'data:', 'blob:')): seen['outside'].append(r.url)
    def response(r):
        if r.status>=400: seen['failed'].append(r.url.removeprefix(base))
    listeners = dict(console=console, request=request, response=response,
                     pageerror=lambda e: seen['console'].append(str(e)))
    for k,f in listeners.items(): page.on(k, f)
    page.set_viewport_size(wide)
    page.goto(base+name, wait_until='load')
    page.wait_for_timeout(150)      # a request that a script makes
    res = page.evaluate(_look)
    if scheme(page)!='default': toggle(page)
    if full: page.add_script_tag(content=_axe_source())
    res['wcag'] = axe(page, ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']) if full else []
    low = lambda: page.evaluate(_contrast)
    light = low()
    if shots: page.screenshot(path=shots/f'{_flat(name)}-light.png', full_page=True)
    res['toggled'] = toggle(page)==('default', 'slate')
    page.add_style_tag(content='* { transition: none !important }')
    dark = low()
    res |= dict(light=light['low'], dark=dark['low'], pairs=light['pairs']+dark['pairs'],
                least=min(light['least'], dark['least']))
    if shots: page.screenshot(path=shots/f'{_flat(name)}-dark.png', full_page=True)
    page.set_viewport_size(narrow)
    res['too_wide'] = page.evaluate(_too_wide)
    if shots:
        page.screenshot(path=shots/f'{_flat(name)}-phone-dark.png', full_page=True)
    for k,f in listeners.items(): page.remove_listener(k, f)
    return res | seen

def _flat(name): return name.removesuffix('.html').replace('/', '-')
def _axe_source():
    from axe_playwright_python.base import AXE_SCRIPT   # axe-core, as that package brings it
    return AXE_SCRIPT

def find(page, base, term):
    "Pages that the site's search answers with, the best first"
    from playwright.sync_api import TimeoutError as PlaywrightTimeout
    page.set_viewport_size(wide)
    page.goto(f'{base}index.html?{urlencode(dict(q=term))}')
    try: page.wait_for_selector('.md-search-result__item > a', state='attached', timeout=20_000)
    except PlaywrightTimeout: return []
    found = page.eval_on_selector_all('.md-search-result__item > a', 'l => l.map(o => o.href)')
    return list(dict.fromkeys(re.split('[?#]', o)[0].removeprefix(base) for o in found))

def pages_of(site):
    return sorted(p.relative_to(site).as_posix() for p in Path(site).rglob('*.html') if p.name!='404.html')

problems = 'console outside failed raw broken_formulas no_alt not_loaded wcag light dark too_wide'.split()

def check(site, names, search=terms, shots=None, full=lambda name: True, started=None):
    """Findings by page, of the pages `names`, and the answers of the search by term; `full`: which pages axe-core looks
    at; `started`: a browser to use"""
    with served(site) as base, nullcontext(started) if started else browser() as b:
        page = b.new_context(color_scheme='light', reduced_motion='reduce').new_page()
        return {o:look(page, base, o, shots, full(o)) for o in names}, {t:find(page, base, t)[:3] for t in search}

def counts(pages, found):
    "What there is, and how much of it is wrong"
    n = lambda k: sum(len(r[k]) if isinstance(r[k], list) else r[k] for r in pages.values())
    return dict(pages=len(pages), pictures=n('pictures'), formulas=n('formulas'), console_errors=n('console'),
                outside_requests=n('outside'), failed_requests=n('failed'),
                raw_tex=n('raw')+n('broken_formulas'), pictures_without_alt=n('no_alt'),
                pictures_not_loaded=n('not_loaded'),
                theme_toggles=sum(r['toggled'] for r in pages.values()),
                wider_than_360_px=sum(bool(r['too_wide']) for r in pages.values()),
                pairs_of_colours=n('pairs'), pairs_below_aa=n('light')+n('dark'),
                least_contrast=round(min(r['least'] for r in pages.values()), 2),
                other_wcag_aa_violations=sum(o['n'] for r in pages.values() for o in r['wcag']),
                search_terms=len(found), search_terms_found=sum(terms[t] in o for t,o in found.items()))

def report(pages, found):
    "Lines that name each problem"
    for name,r in pages.items():
        for k in problems:
            if r[k]: yield f'{name}: {k}: {json.dumps(r[k])[:600]}'
        if not r['toggled']: yield f'{name}: the theme does not toggle'
    for t,o in found.items():
        if terms[t] not in o: yield f'search for {t!r}: {terms[t]} is not among {o}'

def write(res, seconds, site):
    "Keep the counts, with what made them"
    from importlib.metadata import version
    built = site/'build.json'
    packages = 'mkdocs-material playwright axe-playwright-python nbdev'.split()
    out = dict(command='python tools/check_site.py', hardware=f'{os.cpu_count()} CPU cores, {platform.machine()}',
               versions={o:version(o) for o in packages}, counts=res, seconds=round(seconds, 1), search=dict(terms))
    if built.exists(): out |= json.loads(built.read_text())
    (root/'benchmarks'/'results'/'site.json').write_text(json.dumps(out, indent=1)+'\n')

@call_parse
def main(
    site:str='_docs',   # The built site
    only:str=None,      # Only pages whose address has this in it; nothing is written then
    shots:str=None,     # Folder for pictures of every page, wide and narrow, light and dark
):
    if not chromium():
        sys.exit(f'No Chromium: none of {", ".join(names)} is on the path. Install one (apt-get install chromium), '
                 'or set CHROMIUM.')
    start = time.perf_counter()
    if shots: Path(shots).mkdir(parents=True, exist_ok=True)
    pages,found = check(site, [o for o in pages_of(site) if (only or '') in o], [] if only else terms,
                        shots and Path(shots))
    lines,seconds = list(report(pages, found)),time.perf_counter()-start
    print(*lines, sep='\n')
    res = counts(pages, found)
    print(json.dumps(res, indent=1), f'{seconds:.0f} s')
    if only is None and not shots: write(res, seconds, Path(site))
    sys.exit(bool(lines))
