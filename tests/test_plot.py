"Pictures that everybody can read, that say what the numbers say, and files that do not change by themselves"
import json,os,re
from itertools import combinations
from pathlib import Path
import matplotlib,numpy as np,pytest
matplotlib.use('agg')
import matplotlib.pyplot as plt
from ist_nb import plot as P
from ist_nb.config import ISTError

root = Path(__file__).parent.parent
runs = json.loads((root/'benchmarks'/'results'/'pictures.json').read_text())
state = runs['portrait']['state']

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

# --- how colours look: linear light, colour blindness (Machado, Oliveira and Fernandes 2009, severity 1), CIE Lab and
# CIEDE2000
blind = dict(protanopia=[[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                         [-0.003882, -0.048116, 1.051998]],
             deuteranopia=[[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                           [-0.011820, 0.042940, 0.968881]],
             tritanopia=[[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                         [0.004733, 0.691367, 0.303900]], none=np.eye(3))

def light(rgb): rgb = np.asarray(rgb); return np.where(rgb<=0.04045, rgb/12.92, ((rgb+0.055)/1.055)**2.4)
def luminance(c): return light(matplotlib.colors.to_rgb(c))@[0.2126729, 0.7151522, 0.0721750]
def lab(l):
    xyz = np.clip(l, 0, 1)@np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                                     [0.0193339, 0.1191920, 0.9503041]]).T/[0.95047, 1, 1.08883]
    f = np.where(xyz>216/24389, np.cbrt(xyz), (24389/27*xyz+16)/116)
    return np.stack([116*f[..., 1]-16, 500*(f[..., 0]-f[..., 1]), 200*(f[..., 1]-f[..., 2])], -1)

def ciede2000(x, y):
    (L1,a1,b1),(L2,a2,b2) = x,y
    C = (np.hypot(a1, b1)+np.hypot(a2, b2))/2; G = (1-np.sqrt(C**7/(C**7+25**7)))/2
    a1,a2 = a1*(1+G),a2*(1+G); C1,C2 = np.hypot(a1, b1),np.hypot(a2, b2)
    h1,h2 = np.degrees(np.arctan2(b1, a1))%360,np.degrees(np.arctan2(b2, a2))%360
    d = h2-h1; d = 0 if C1*C2==0 else d-360 if d>180 else d+360 if d<-180 else d
    H = h1+h2 if C1*C2==0 else (h1+h2)/2 if abs(h1-h2)<=180 else (h1+h2+360)/2 if h1+h2<360 else (h1+h2-360)/2
    dL,dC,dH,L,C = L2-L1,C2-C1,2*np.sqrt(C1*C2)*np.sin(np.radians(d/2)),(L1+L2)/2,(C1+C2)/2
    cos = lambda degrees: np.cos(np.radians(degrees))
    T = 1-0.17*cos(H-30)+0.24*cos(2*H)+0.32*cos(3*H+6)-0.20*cos(4*H-63)
    SL,SC,SH = 1+0.015*(L-50)**2/np.sqrt(20+(L-50)**2),1+0.045*C,1+0.015*C*T
    R = -2*np.sqrt(C**7/(C**7+25**7))*np.sin(np.radians(60*np.exp(-((H-275)/25)**2)))
    return float(np.sqrt((dL/SL)**2+(dC/SC)**2+(dH/SH)**2+R*dC/SC*dH/SH))

def test_the_ruler():
    "Pairs from the table of Sharma, Wu and Dalal (2005)"
    for x,y,want in (((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
                     ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000), ((50, 2.5, 0), (73, 25, -18), 27.1492),
                     ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
                     ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082)):
        assert ciede2000(x, y)==pytest.approx(want, abs=1e-4)

@pytest.mark.parametrize('sight', blind)
def test_palette_is_far_apart_for(sight):
    seen = {k:lab(np.array(blind[sight])@light(matplotlib.colors.to_rgb(c))) for k,c in P.palette.items()}
    far = {(a, b):ciede2000(seen[a], seen[b]) for a,b in combinations(seen, 2)}
    assert min(far.values())>=20, min(far, key=far.get)      # 1 is just noticeable, 10 is seen at a glance

def test_palette_in_grey():
    L = np.sort([lab(np.full(3, luminance(c)))[0] for c in P.palette.values()])
    assert np.diff(L).min()>=15
    # WCAG's contrast for graphics, on white
    assert all(1.05/(luminance(P.palette[k])+0.05)>=3 for k in ('blue', 'red', 'teal', 'black'))

def test_heat_map_in_grey():
    "Lightness goes one way, for every kind of sight"
    rgb = light(plt.get_cmap(P._heat)(np.linspace(0, 1, 64))[:, :3])
    for m in blind.values():
        L = lab(rgb@np.array(m).T)[:, 0]
        assert (np.diff(L)>0).all() or (np.diff(L)<0).all()

# --- files
curves = {}
for r in runs['curves']: curves.setdefault(r['method'], []).append((r['seconds'], r['losses']))
pictures = dict(importance=lambda **kw: P.plot_importance(state, 'a run', **kw),
                times=lambda **kw: P.plot_times_active(state, **kw),
    losses=lambda **kw: P.plot_losses(curves, **kw))

@pytest.mark.parametrize('name', pictures)
def test_vector_files(name, tmp_path):
    "Text is text, there is no date, and a picture made again is the same bytes"
    fig = pictures[name]()
    a = P.save_picture(fig, tmp_path/'a.svg').read_text()
    b = P.save_picture(pictures[name](), tmp_path/'b.svg').read_text()
    assert a==b and len(a)<160_000
    words = ' '.join(re.sub(r'<[^>]+>', '', o) for o in re.findall(r'<text.*?</text>', a, re.S)).split()
    assert set(fig.get_suptitle().split('\n')[0].split()[:3])<=set(words)
    assert not re.search(r'<dc:date>|20\d\d-\d\d-\d\d', a)
    assert '<title>' in a or '<dc:title>' in a

def test_pdf_and_png_are_the_same_bytes(tmp_path):
    for kind in ('pdf', 'png'):
        a,b = (P.save_picture(pictures['losses'](), tmp_path/f'{o}.{kind}').read_bytes() for o in 'ab')
        assert a==b and b'CreationDate' not in a
    with pytest.raises(ISTError, match=r'\.svg or \.pdf'): P.save_picture(plt.figure(), tmp_path/'x.jpg')

@pytest.mark.parametrize('width', [3.4, 7.])
@pytest.mark.parametrize('name', pictures)
def test_nothing_is_cut_off(name, width):
    """Every word lies within the picture, in a column of a paper as across a page; titles name axes with units where
    there are any"""
    fig = pictures[name](width=width)
    fig.canvas.draw()
    box = fig.bbox
    axes = [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
    # beyond the limits
    not_drawn = {l for axis in axes for o in axis.get_major_ticks() for l in (o.label1, o.label2)
                 if not np.prod(np.array(axis.get_view_interval())-o.get_loc())<=0}
    for t in fig.findobj(matplotlib.text.Text):
        if not t.get_text().strip() or not t.get_visible() or t in not_drawn: continue
        e = t.get_window_extent()
        assert box.x0-2<=e.x0 and e.x1<=box.x1+2 and box.y0-2<=e.y0 and e.y1<=box.y1+2, t.get_text()
    assert fig.get_suptitle() and all(ax.get_xlabel() or ax.get_ylabel() for ax in fig.axes if ax.axison)

def test_style_is_left_behind():
    before = dict(matplotlib.rcParams); pictures['times']()
    assert dict(matplotlib.rcParams)==before

def test_style_puts_back_its_own_settings_only():
    "What Jupyter's backend sets while it loads inside of a picture stays"
    was = matplotlib.is_interactive()
    try:
        with P.style(): matplotlib.interactive(not was)
        assert matplotlib.is_interactive() is not was
    finally: matplotlib.interactive(was)

def test_two_pictures_in_a_real_kernel(tmp_path):
    "In Jupyter without %matplotlib: ours is shown, and so is the user's own after it"
    from jupyter_client.manager import start_new_kernel
    env = {k:v for k,v in os.environ.items() if k!='MPLBACKEND'} | dict(IPYTHONDIR=str(tmp_path))
    env['PYTHONPATH'] = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
    manager,client = start_new_kernel(env=env)
    def shown(code):
        got = []
        reply = client.execute_interactive(code, timeout=60,
                                           output_hook=lambda m: got.append(m['content'].get('data', {}))
                                           if m['msg_type']=='display_data' else None)
        assert reply['content']['status']=='ok', reply['content']
        return sum('image/png' in o for o in got)
    try:
        assert shown(f"from ist_nb.plot import plot_times_active\nplot_times_active(dict(layers=[0, 1], "
                     f"times_active=[3, 4], t=7));")==1
        assert shown('import matplotlib.pyplot as plt\nplt.plot([1, 2]);')==1
        assert shown('plt.plot([2, 1]);')==1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

strange = r'$5 \frac{ ^_ $', r'\alpha \$ $$', '\ud800\n$'

@pytest.mark.parametrize('text', strange)
def test_what_a_user_wrote_is_no_formula(text, tmp_path):
    "Titles, labels of layers and names of methods are drawn as they stand"
    layers = [f'{text}{i}' for i in range(4)]
    s = made([1., 2., 0., 0.5]) | dict(layers=layers)
    figs = [P.plot_importance(s, text), P.plot_times_active(s, text), P.plot_importance(s | dict(history=[]), text),
            P.plot_losses({o:[([0., 1., 2.], [3., 2., 1.])] for o in (text, text+'2')})]
    for fig in figs[2:]: fig.canvas.draw()
    for i,fig in enumerate(figs[:2]): P.save_picture(fig, tmp_path/f'{i}.svg')
    svg = ' '.join(re.findall(r'<text[^>]*>([^<]*)</text>', (tmp_path/'0.svg').read_text()))
    if text==strange[0]: assert text in svg and f'{text}3' in svg
    assert '\\$' not in re.search(r'<dc:title>([^<]*)', (tmp_path/'1.svg').read_text())[1].replace(r'\alpha \$', '')

def test_a_picture_fails_no_run(tmp_path):
    "Whatever goes wrong is a warning, and no figure stays open"
    def broken():
        plt.figure()
        raise RuntimeError('no such font')
    with pytest.warns(UserWarning, match=r'a\.png could not be drawn \(RuntimeError: no such font\)'):
        assert P._try_picture(broken, tmp_path/'a.png') is None
    with pytest.warns(UserWarning, match='could not be drawn'):
        assert P._try_picture(pictures['times'], tmp_path/'nowhere'/'a.png') is None
    assert P._try_picture(lambda: P.plot_times_active(state, '漢'), tmp_path/'a.png').read_bytes()[:4]==b'\x89PNG'
    assert not plt.get_fignums()

# --- what the titles say
def made(importance, times=None, t=100, **kw):
    N = len(importance)
    return dict(layers=list(range(N)), importance=importance, times_active=times or [t//4]*N, t=t,
                history=[dict(step=10, importance=importance, times_active=[2]*N)]) | kw

def test_titles_follow_the_numbers():
    def title(fig): return fig.get_suptitle().replace('\n', ' ')
    def times(*counts): return title(P.plot_times_active(made([0.]*4, list(counts), 2000)))
    assert title(P.plot_importance(made([-2., 0., 0., 3., 3.1])))=='No layer stands out from chance'
    assert times(100, 900, 500, 500)=='Trained more often than by chance: layer 1; less often: layer 0'
    assert times(500, 510, 490, 500)=='No layer stands out from chance'
    frozen = made([0.]*4, [1, 4, 9, 20], 20, config=dict(sampler='top'), history=[])
    assert title(P.plot_times_active(frozen))=='Lower layers are frozen: layer 3 in 20 of 20 steps, layer 0 in 1'
    # nothing was scored: no empty half, and no word of chance
    alone = P.plot_importance(frozen, 'a run')
    assert len(alone.axes)==1
    assert alone.axes[0].get_title('left')=='a run'
    assert 'chance' not in alone.axes[0].get_legend_handles_labels()[1][0]
    assert 'importance' not in P.layer_table(frozen) and P.layer_table(frozen).splitlines()[-2].split()[:2]==['3', '20']

def test_uniform_sampling_stays_within_the_band():
    "Of runs of RST, 95 in 100 have all layers inside; a little more, as the counts of the layers are not independent"
    rng,inside = np.random.default_rng(0),0
    low,high = P._chance_band(300, 0.25, 16)
    for _ in range(300):
        n = np.argsort(rng.random((300, 16)), axis=1)[:, :4]
        count = np.bincount(n.ravel(), minlength=16)
        inside += ((low<=count) & (count<=high)).all()
    assert 0.93*300<=inside<300

def drawn(sampler, importance, t=300, n=4, **kw):
    "The state of a run of `t` steps in which `sampler` met this importance at every step"
    import torch
    from ist_nb.config import ISTConfig,samplers
    cfg,g = ISTConfig(sampler=sampler, n_active=n, **kw),torch.Generator().manual_seed(0)
    I,count = torch.tensor(importance),torch.zeros(len(importance), dtype=torch.long)
    for _ in range(t): count[samplers[sampler](I, n, cfg, g)] += 1
    return made(importance, count.tolist(), t, config=dict(sampler=sampler, n_active=n, explore=cfg.explore,
                                                           depth=cfg.depth))

@pytest.mark.parametrize('sampler', ['uniform', 'importance', 'depth'])
def test_what_stands_out_from_chance(sampler):
    "Equal importance, or importance that no draw follows, is chance; a planted layer is named"
    equal = drawn(sampler, [0.]*16)
    said = [P._finding(equal), P._live_line(equal | dict(importance=range(16))), P.layer_table(equal),
            P.plot_importance(equal).get_suptitle(), P.plot_times_active(equal).get_suptitle()]
    assert all('no layer stands out from chance' in o.lower() for o in said), said
    assert P._finding(equal | dict(importance=[5.]+[-5.]*15))==P._finding(equal)
    planted = drawn('importance', [0.]*5+[4.]+[0.]*10)
    found = P._finding(planted)
    assert found.startswith('Trained more often than by chance: layer 5'), (found, planted['times_active'])
    assert P.layer_table(planted).endswith(found)

def test_stacks_with_budgets_of_their_own():
    s = made([0.]*4, [50, 50, 100, 100], 100) | dict(layers=['encoder.0', 'encoder.1', 'decoder.0', 'decoder.1'],
                                                     config=dict(n_active=dict(encoder=0.5, decoder=1.0)))
    assert P._by_chance(s)[:, 0].tolist()==[50, 50, 100, 100] and P._by_chance(s)[2].tolist()==[100, 100, 100]
    assert P._by_chance(s | dict(config=dict(n_active=0.5)))[:, 0].tolist()==[75]*4

# --- odd states
@pytest.mark.parametrize('s', [made([0.]*3) | dict(history=[]), made([1.]), made([0.]*80),
                               made([0.5]*2) | dict(t=0, times_active=[0, 0], history=[])],
                               ids=['nothing scored', 'one layer', 'many layers', 'no step'])
def test_states_at_the_edge(s):
    for f in (P.plot_importance, P.plot_times_active): f(s).canvas.draw()
    for f in (P.layer_table, P._live_line): assert f(s)
    assert len(P.layer_table(s).splitlines())==2+len(s['layers'])

# --- live pictures
def test_live_picture_is_replaced_in_place(monkeypatch):
    import IPython.display as D
    class Handle:
        got = []
        def update(self, o): self.got.append(o)
    first = []
    monkeypatch.setattr(D, 'display', lambda o, display_id: first.append((o, display_id)) or Handle())
    live = P.Live(notebook=True, every=0., share=0.5)
    for t in (1, 2, 2): live.due = 0; live.update(state | dict(t=t))
    assert len(first)==1 and first[0][1] is True and len(Handle.got)==1
    assert Handle.got[0].data[:4]==b'\x89PNG' and 'step 2' in Handle.got[0].alt and len(Handle.got[0].data)<60_000
    assert not plt.get_fignums() and live.seconds>0

def test_ipython_in_a_terminal_is_no_notebook():
    assert not P.Live.in_notebook()
