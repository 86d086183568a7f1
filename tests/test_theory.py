"""The theorems of nbs/theory/convergence.ipynb as properties, and each bound at a case of equality: a bound that is
halved, doubled or lacks a factor fails here"""
import json,math,pytest,re,torch
from hypothesis import given,settings,strategies as st
from itertools import combinations
from types import SimpleNamespace
from ist_nb import ISTConfig,ISTError
from ist_nb.scorers import centred_likelihood,ema_update,move_importance,standardize
from ist_nb.config import shrunk
from ist_nb.theory import *
from benchmarks.record import root

settings.register_profile('ist', max_examples=60, deadline=None, derandomize=True)
settings.load_profile('ist')
pos,share = st.floats(0.01, 100),st.floats(0.001, 1)
def near(a, b, tol=1e-9): return math.isclose(a, b, rel_tol=tol, abs_tol=1e-12)

def test_a_statement_has_the_number_of_its_heading():
    kinds,headings,bold = r'(?:Theorem|Proposition|Corollary|Lemma) \d+',[],[]
    for c in json.loads((root/'nbs/theory/convergence.ipynb').read_text())['cells']:
        if c['cell_type']!='markdown': continue
        headings += re.findall(rf'^## ({kinds})', ''.join(c['source']), re.M)
        bold += re.findall(rf'\*\*({kinds})', ''.join(c['source']))
    assert headings==bold and [int(o.split()[1]) for o in headings]==[1]+list(range(1, len(headings)))

# --- Theorem 1 and the two corollaries: the mean square of SGD on L/2 |θ|² is known, and attains the bounds
def exactly(L, gamma, T, V, pi, start, d=1.):
    "The averages of Σπ|∇f|² and ΣπV, and the decrease of the loss, of steps gamma*d"
    c = 1-pi+pi*(1-L*gamma*d)**2
    rest = pi*(gamma*d)**2*V/(1-c)
    square = rest+(start**2-rest)*c**torch.arange(T+1)[:, None]
    return (pi*L**2*square[:-1]).sum().item()/T,(pi*V).sum().item(),0.5*L*(square[0]-square[-1]).sum().item()

@st.composite
def problems(draw):
    "L, rate over 1/L, and for some layers variance, probability and start"
    N = draw(st.integers(1, 5))
    col = lambda s: torch.tensor(draw(st.lists(s, min_size=N, max_size=N)), dtype=torch.float64)
    return draw(st.floats(0.1, 10)),draw(st.floats(0.05, 1.95)),col(st.floats(0, 5)),col(st.floats(0.1, 1)),col(
        st.floats(-2, 2))

@given(problems(), st.integers(1, 50), st.floats(0.2, 5))
def test_sgd_is_the_bound_with_what_was_gained(problem, T, d):
    "With the decrease of the loss in place of Δ, Theorem 1 and Corollary 5 with D = d are equalities"
    L,x,V,pi,start = problem
    measured,noise,fell = exactly(L, x/L, T, V, pi, start)
    assert math.isclose(measured, theorem1_bound(fell, L, x/L, T, noise), rel_tol=1e-7, abs_tol=1e-9)
    measured,noise,fell = exactly(L, x/L/d, T, V, pi, start, d)
    assert math.isclose(measured, adaptive_bound(fell, L, x/L/d, T, noise, d, d), rel_tol=1e-7, abs_tol=1e-9)

@given(pos, pos, st.floats(0.01, 0.99), st.floats(1, 5), st.integers(1, 1000), st.floats(0, 10))
def test_corollary4(delta, L, x, ratio, T, noise):
    "Each of d_min and d_max counts where it is the worse: with D between them, the bound is that of the worse constant"
    d,D = 2.,2.*ratio
    bound = adaptive_bound(delta, L, x*2*d/(L*D*D), T, noise, d, D)
    g = x*2*d/(L*D*D)
    assert near(bound*(2*d-L*g*D*D), 2*delta/(g*T)+L*g*D*D*noise)

@given(pos, pos, st.integers(1, 64), st.floats(0, 10), st.integers(1, 10**6), share)
def test_corollary1_is_the_best_of_theorem1(delta, L, n, V, T, pi_min):
    gamma = step_size(delta, L, n, V, T)
    assert 0<gamma<=1/L*(1+1e-12)
    bound = corollary1_bound(delta, L, n, V, T, pi_min)
    assert near(bound*pi_min, theorem1_bound(delta, L, gamma, T, n*V))
    for o in (0.5, 0.9, 1.1, 1.9):
        if o*gamma<2/L: assert bound*pi_min<=theorem1_bound(delta, L, o*gamma, T, n*V)*(1+1e-9)
    a = 2*L*delta/T
    assert bound*pi_min<=a+math.sqrt(a*n*V)+1e-9

def test_corollary1_attained():
    "Without noise, one step of all layers at rate 1/L; and where only noise is left"
    assert corollary1_bound(0.5, 1., 1, 0., 1, 1.)==1.                 # f = x²/2 at 1: |∇f|² = 1, then 0
    one = torch.ones(1, dtype=torch.float64)
    for n in (1, 4):                                                   # as much noise as n layers, one by one
        gamma = 1e-3
        measured,*_ = exactly(2., gamma, 400_000, n*one, one, one)
        assert 0.98*measured<theorem1_bound(1., 2., gamma, 400_000, n)<1.02*measured

@given(pos, pos, st.integers(1, 64), st.floats(0, 10), st.integers(1, 10**6), st.data())
def test_what_sparse_costs(delta, L, N, V, T, data):
    "RST depends on n through (N/n) L_n/T alone"
    n = data.draw(st.integers(1, N))
    assert near(rst_bound(delta, L, n, N, V, n*T*N), rst_bound(delta, L, N, N, V, n*n*T))       # as many layer updates
    assert near(rst_bound(delta, L*n/N, n, N, V, T), rst_bound(delta, L, N, N, V, T))           # L_n = (n/N) L_N
    assert rst_bound(delta, L, n, N, V, T)>=rst_bound(delta, L, N, N, V, T)*(1-1e-9)
    assert near(rst_bound(delta, L, n, N, V, T)*n/N, corollary1_bound(delta, L, n, V, T, 1.))

@given(st.integers(1, 5), st.integers(0, 1000))
def test_smoothness_of_few_layers(N, seed):
    "(n/N) L_N <= L_n <= L_N for a Hessian without negative eigenvalues"
    M = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    H = M@M.T
    L = [max(torch.linalg.eigvalsh(H[list(S)][:, list(S)])[-1].item() for S in combinations(range(N), n))
         for n in range(1, N+1)]
    assert all(n/N*L[-1]-1e-9<=o<=L[-1]+1e-9 for n,o in enumerate(L, 1))

# --- Lemmas 2 and 3, and the floor
@st.composite
def draws(draw, N=64):
    "Weights of up to `N` layers, over eight powers of e, and a number of layers to draw"
    N = draw(st.integers(1, N))
    logw = draw(st.lists(st.floats(-4, 4), min_size=N, max_size=N))
    return torch.tensor(logw, dtype=torch.float64).exp(),draw(st.integers(1, N))

@given(draws(), st.floats(0, 1))
def test_lemma2_and_the_floor(wn, explore):
    "No layer is drawn less often than Lemma 2 says, its simple form is weaker, and a floor lifts all"
    w,n = wn
    N,kappa = len(w),(w.min()/w.max()).item()
    pi = inclusion_by_clocks(w, n)
    assert abs(pi.sum()-n)<1e-6*n and pi.max()<=1+1e-8
    assert 0<=inclusion_bound(kappa, n, N, simple=True)<=inclusion_bound(kappa, n, N)+1e-12
    assert inclusion_bound(kappa, n, N)<=pi.min()+1e-8
    floor = floor_probability(explore, n, N, kappa)
    assert (explore*n/N+(1-explore)*pi).min()>=floor-1e-8>=explore*n/N-1e-7
    assert near(floor_probability(explore, n, N, 1.), n/N)             # attained where all are alike
    assert near(floor_probability(explore, n, N), explore*n/N if n<N else 1.)

@given(draws(N=10))
def test_two_ways_to_the_exact_probabilities(wn):
    assert (inclusion_by_clocks(*wn)-inclusion_probabilities(*wn)).abs().max()<1e-8

def test_clocks_over_a_wide_range():
    "Weights that differ by a factor of a billion, and a step twice as fine gives the same"
    w = torch.tensor([1e-9, 1., 1., 1.], dtype=torch.float64)
    pi = inclusion_by_clocks(w, 2)
    assert (pi-inclusion_probabilities(w, 2)).abs().max()<1e-12
    assert (inclusion_by_clocks(w, 2, step=0.05)-pi).abs().max()<1e-12

@given(st.integers(1, 64), st.data())
def test_lemma2_is_sharp(N, data):
    "Equal weights: n/N, in both forms. One layer low and all others high: an equality"
    n,kappa = data.draw(st.integers(1, N)),data.draw(st.floats(0.02, 1))
    for simple in (False, True): assert math.isclose(inclusion_bound(1., n, N, simple), n/N, abs_tol=1e-12)
    w = torch.ones(N, dtype=torch.float64); w[0] = kappa
    if N>1: assert abs(inclusion_by_clocks(w, n)[0]-inclusion_bound(kappa, n, N))<1e-7
    assert inclusion_bound(0., n, N)==(n==N)
    assert near(inclusion_bound(kappa, n, N, simple=True), kappa*n/N)

@given(st.floats(0.01, 7), st.lists(st.floats(-1, 1), min_size=1, max_size=200))
def test_lemma3(C, cs):
    I = 0.
    for m,c in enumerate(cs, 1):
        p = 1/(1+math.exp(I))
        I -= C*c*p*(1-p)
        assert abs(I)<=importance_bound(m, C)+1e-9

def test_lemma3_attained():
    "The hardest push, always upwards: no smaller slope would do, by one per cent"
    C,I,m = 0.01,0.,200_000
    assert importance_bound(0, C)==0
    for _ in range(m): I += C/(2+math.exp(I)+math.exp(-I))
    assert 0.99<math.exp(I-importance_bound(m, C))<=1
    assert near(importance_bound(1, 4.), math.log(1+4*(math.e-1)))

@given(st.sampled_from(['paper', 'suppression']), st.integers(2, 6), st.integers(1, 64), st.data())
def test_update_bound(scorer, K, N, data):
    "One importance update moves no layer by more than C p(1-p)"
    config = ISTConfig(scorer=scorer, n_candidates=K)
    losses = torch.tensor(data.draw(st.lists(st.floats(0, 20), min_size=K, max_size=K)), dtype=torch.float64)
    S = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=K, max_size=K)))
    I = torch.tensor(data.draw(st.lists(st.floats(-8, 8), min_size=N, max_size=N)), dtype=torch.float64)
    rewards = (centred_likelihood if scorer=='paper' else standardize)(losses)
    p = torch.sigmoid(-I)
    moved = (move_importance(I, S, rewards, config.score_lr)-I).abs()
    assert (moved<=update_bound(config)*p*(1-p)+1e-9).all()

@pytest.mark.parametrize('K', range(2, 7))
def test_update_bound_attained(K):
    "Half of the candidates have the layer and a perfect loss, the others the worst"
    losses = torch.tensor([0.]*(K//2)+[1e3]*(K-K//2), dtype=torch.float64)
    S,I = (losses==0)[:, None],torch.zeros(1, dtype=torch.float64)
    for scorer,rewards in (('paper', centred_likelihood), ('suppression', standardize)):
        config = ISTConfig(scorer=scorer, n_candidates=K, score_lr=7.)
        moved = move_importance(I, S, rewards(losses), config.score_lr).abs().item()
        assert math.isclose(moved, update_bound(config)/4, rel_tol=1e-6)

@pytest.mark.parametrize('N', [2, 5, 40])
def test_scores_of_gradients_are_bounded(N):
    "A running mean of standardised scores stays within sqrt(N-1), and one outlier comes arbitrarily near"
    g,I = torch.Generator().manual_seed(N),torch.zeros(N, dtype=torch.float64)
    for _ in range(200):
        I = ema_update(I, torch.randn(N, generator=g, dtype=torch.float64).exp()**3)
        assert I.abs().max()<=math.sqrt(N-1)+1e-9
    for _ in range(100): I = ema_update(I, torch.eye(N, dtype=torch.float64)[0])
    assert I[0]>0.99*math.sqrt(N-1)

def test_guarantee():
    "A table of exact values"
    def of(N, m=None, **kw): r = guarantee(ISTConfig(**kw), N, m); return r['n'],r['pi_min'],r['rst'],r['constant']
    assert of(32)==pytest.approx((8, 0.025, 0.25, 10.))                             # the number of the FAQ
    assert of(32, explore=0.)==(8, 0., 0.25, math.inf)
    assert of(32, sampler='uniform')==(8, 0.25, 0.25, 1.)
    assert of(32, sampler='depth', explore=0.2)==pytest.approx((8, 0.05, 0.25, 5.))
    assert of(32, sampler='top')==(8, 0., 0.25, math.inf) and of(4, sampler='top', n_active=1.)==(4, 1., 1., 1.)
    assert of(10, sampler='uniform', schedule='shrink', n_active=0.5)==(1, 0.1, 0.5, 5.)        # the last steps
    e = math.exp
    kappa = 1/(1+4*(e(update_bound(ISTConfig.paper())/4)-1)*5)                       # Lemma 3, five updates
    assert of(2, 5, n_active=1, scorer='paper', explore=0.)==pytest.approx(
        (1, kappa/(kappa+1), 0.5, 0.5*(kappa+1)/kappa))
    for scorer in ('gate', 'fisher', 'gate+fisher'):
        for m in (7, None):
            want = 0.1/5+0.9/(1+4*e(2.))                                             # κ = e^{-sqrt(4)}, one of five
            assert of(5, m, n_active=1, scorer=scorer)[1]==pytest.approx(want)

def test_guarantee_of_several_stacks():
    "The worst stack decides; importance is standardised over all layers together"
    both = guarantee(ISTConfig(n_active=dict(enc=2, dec=0.5)), dict(enc=8, dec=4))
    assert (both['n'], both['pi_min'], both['rst'])==pytest.approx((4, 0.1*2/8, 0.25)) and near(both['constant'], 10.)
    r = guarantee(ISTConfig(n_active=dict(a=1, b=2), scorer='gate', explore=0.), dict(a=2, b=2))
    k = math.exp(-math.sqrt(3))
    assert r['n']==3 and near(r['pi_min'], k/(k+1)) and r['rst']==0.5
    for N in (12, dict(enc=8), dict(enc=8, other=4)):
        with pytest.raises(ISTError, match='does not fit n_active'):
            guarantee(ISTConfig(n_active=dict(enc=2, dec=2)), N)
    with pytest.raises(ISTError, match='does not fit n_active'): guarantee(ISTConfig(), dict(enc=8))

# --- Theorem 4
@given(pos, pos, st.floats(0.001, 0.3), st.integers(1, 1000), st.floats(0, 10), st.floats(0, 0.95), share)
def test_theorem6_is_the_best_of_its_family(delta, L, x, T, noise, mu, pi_min):
    "The bound of the page for many ζ: the function is not above any, and equal to the best"
    gamma,omega = x/L,(x*mu/(1-mu))**2/pi_min
    if x+2*math.sqrt(omega)>=2:
        with pytest.raises(ValueError, match='the theorem needs'): momentum_bound(delta, L, gamma, T, noise, mu, pi_min)
        return
    bound,found = momentum_bound(delta, L, gamma, T, noise, mu, pi_min),[]
    middle,half = (2-x)/2,math.sqrt(max(0., ((2-x)/2)**2-omega))           # where the left side is positive
    for k in range(1, 4000):
        zeta = middle-half+2*half*k/4000
        left = 2-x-zeta-omega/zeta if zeta>0 else 0
        if left>0: found.append((2*delta/(gamma*T)+(x+(1-mu)*omega/zeta)*noise)/left)
    assert bound<=min(found)*(1+1e-9)
    if omega>1e-4 and half>0.05: assert bound>=min(found)*0.99
    assert bound>=theorem1_bound(delta, L, gamma, T, noise)*(1-1e-9)

def test_theorem6_without_momentum():
    assert near(momentum_bound(3., 2., 0.3, 40, 0.7, 0., 0.1), theorem1_bound(3., 2., 0.3, 40, 0.7))
    # by hand: Lγ = 1/2, ω = (1/2)²/(1/4) = 1 > ((2-1/2)/2)²; with π_min = 1, ω = 1/4 and, without noise, ζ = 1/2
    with pytest.raises(ValueError, match='the theorem needs'): momentum_bound(1., 1., 0.5, 1, 0., 0.5, 0.25)
    assert near(momentum_bound(1., 1., 0.5, 1, 0., 0.5, 1.), 4/(1.5-0.5-0.5))
    with pytest.raises(ValueError, match='the theorem needs'): momentum_bound(1., 1., -0.5, 1, 0., 0.5, 1.)
    assert momentum_bound(1., 1., 0.66, 1, 0., 0.5, 1.)>0                      # γ + 2γ < 2 ends at 2/3
    with pytest.raises(ValueError, match='the theorem needs'): momentum_bound(1., 1., 0.67, 1, 0., 0.5, 1.)

def test_line6_attained():
    "A constant gradient without noise: in the long run the momentum is the gradient, and line 6 is an equality"
    g,pi,mu,T = torch.Generator().manual_seed(0),torch.tensor([0.2, 0.6]),0.9,20_000
    m,size,G = torch.zeros(2),0.,torch.tensor([1., 4.])
    for A in torch.rand(T, 2, generator=g)<pi:
        size += (pi*m**2).sum().item()/T
        m = torch.where(A, mu*m+(1-mu)*G.sqrt(), m)
    assert 0.99*(pi*G).sum()<size<=(pi*G).sum()

@given(st.integers(1, 8), st.floats(0, 0.99), st.lists(st.tuples(st.booleans(), st.floats(-1, 1)), max_size=50))
def test_momentum_that_freezes(N, mu, steps):
    "Line 1, through rests of any length: where the layer would coast to moves by the gradient, and only when active"
    x,m,coast = 0.,0.,0.
    for active,grad in steps:
        if active: m = mu*m+(1-mu)*grad; x -= 0.1*m; coast -= 0.1*grad
        assert math.isclose(x-0.1*mu/(1-mu)*m, coast, abs_tol=1e-9)

# --- Theorem 6
@given(pos, pos, pos, st.integers(1, 10**6), st.floats(0.1, 10), st.integers(1, 10**6), st.floats(1e-8, 1),
       st.floats(0.5, 0.999), share)
def test_theorem7_is_what_is_proved(delta, L, gamma, T, R, size, eps, decay, nu):
    "The end of the proof, put together again: lines 5 to 7"
    log = math.log
    per_step = 2*R*gamma+L/2*gamma**2                                       # line 5
    least = gamma/(2*math.sqrt(eps+T*R*R))                                  # line 6, half of it from line 5
    sums = size*log(1+T*R*R/eps)                                            # line 7
    assert near(adagrad_bound(delta, L, gamma, T, R, size, eps), (delta+per_step*sums)/(least*T), 1e-7)
    most = gamma/math.sqrt(1-decay)
    sums = size*log(1+R*R/(1-decay)/eps)+nu*T*size*log(1/decay)
    want = (delta+(2*R*most+L/2*most**2)*sums)/(gamma/(2*math.sqrt(eps+R*R))*T)
    assert near(rmsprop_bound(delta, L, gamma, T, R, size, eps, decay, nu), want, 1e-7)

@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.data(), st.floats(1e-6, 10))
def test_theorem7_line4(values, data, before):
    "E[∇g/√(ε+v)] >= ∇²/(2√(ε+ṽ)) - 2R E[g²/(ε+v)] for any distribution on a few values"
    p = torch.tensor(data.draw(st.lists(st.floats(0.01, 1), min_size=len(values), max_size=len(values))),
                     dtype=torch.float64)
    g,p = torch.tensor(values, dtype=torch.float64),p/p.sum()
    slope,square,v = p@g,p@g**2,before+g**2
    left,right = p@(slope*g/v.sqrt()),slope**2/(2*(before+square).sqrt())-2*g.abs().max()*(p@(g**2/v))
    assert left>=right-1e-12

@given(st.lists(st.floats(0, 1), min_size=1, max_size=100), st.floats(1e-6, 1), st.floats(0.5, 1))
def test_theorem7_line7(squares, eps, decay):
    v,total = 0.,0.
    for a in squares: v = decay*v+a; total += a/(eps+v)
    assert total<=math.log1p(v/eps)-len(squares)*math.log(decay)+1e-9

def test_theorem7_line7_attained():
    "Small gradients, no decay: nearly an equality"
    v,total = 0.,0.
    for _ in range(10_000): v += 1e-4; total += 1e-4/(0.1+v)
    assert 0.999<total/math.log1p(v/0.1)<=1

# --- Propositions 7, 8 and 11
@given(draws(), st.data())
def test_proposition5(wn, data):
    """No selection has a larger guaranteed decrease than the layers of largest gain, and the difference to chance is
    `selection_gain`"""
    w,n = wn
    a = torch.tensor(data.draw(st.lists(st.floats(-10, 10), min_size=len(w), max_size=len(w))), dtype=torch.float64)
    pi = inclusion_by_clocks(w, n)
    assert (pi*a).sum()<=a.topk(n).values.sum()+1e-5
    assert abs(selection_gain(pi, a)-((pi*a).sum()-pi.sum()/len(w)*a.sum()))<1e-6

@given(problems())
def test_gain_is_the_decrease(problem):
    "On L/2 |θ|² what a layer is guaranteed to bring is what it brings"
    L,x,V,pi,start = problem
    *_,fell = exactly(L, x/L, 1, V, pi, start)
    gain = layer_gain((L*start)**2, V, L, x/L)
    assert math.isclose(x/L*(pi*gain).sum().item(), fell, rel_tol=1e-7, abs_tol=1e-9)

@given(st.lists(st.floats(0, 10), min_size=1, max_size=20).filter(lambda o: sum(o)>1e-3), st.data())
def test_ceiling(G, data):
    "Between 1 and N/n, reached by the best layers alone, and both ends are attained"
    N,n = len(G),data.draw(st.integers(1, len(G)))
    G = torch.tensor(G, dtype=torch.float64)
    Q = ceiling(G, n).item()
    assert 1-1e-9<=Q<=N/n+1e-9
    best = torch.zeros_like(G); best[G.topk(n).indices] = 1
    assert near((best*G).sum().item(), Q*n/N*G.sum().item())
    assert near(ceiling(torch.ones(N), n).item(), 1.) and near(ceiling(torch.eye(N)[0], n).item(), N/n, 1e-6)

@given(share, st.floats(0.1, 10))
def test_seconds(nu, back):
    "A sparse step as dear as its share of a dense step breaks even; freezing wins exactly where ν b > 1"
    assert near(break_even(nu, back), (1+back*nu)/(1+back)) and near(break_even(1., back), 1.)
    excess = (1-nu)*(1-back*nu)/(2*nu*(1+back))
    assert math.isclose(freezing_seconds(nu, back), 1+excess, rel_tol=1e-9, abs_tol=1e-9)
    assert freezing_seconds(nu)>=1 and break_even(nu)==(1+nu)/2

def test_mass_of_freezing():
    "The schedule of the package gives layers the mean mass 2ν/(1+ν) under linear decay"
    N,T = 200,2000
    for nu in (0.25, 0.4, 0.6):
        mass = sum((1-t/T)*shrunk(nu*N, N, t, T)/N for t in range(T))/sum(1-t/T for t in range(T))
        assert math.isclose(mass, 2*nu/(1+nu), rel_tol=3e-3)

def test_where_they_do_not_hold():
    "The ends of the ranges themselves are outside"
    for gamma in (0., 1., 1.2):
        with pytest.raises(ValueError, match='outside of'): theorem1_bound(1., 2., gamma, 10, 1.)
    for gamma in (0., 0.25, 0.3):
        with pytest.raises(ValueError, match='outside of'): adaptive_bound(1., 1., gamma, 10, 1., 0.5, 2.)
    assert theorem1_bound(1., 2., 0.99, 10, 1.)>0 and adaptive_bound(1., 1., 0.24, 10, 1., 0.5, 2.)>0
    with pytest.raises(ValueError, match='Lemma 3 covers'): update_bound(ISTConfig(scorer='gate'))
    with pytest.raises(ISTError, match='Nothing is known'): guarantee(SimpleNamespace(sampler='mine', n_active=0.25), 8)

# --- Proposition 9
def test_blind_ceiling():
    "A table of exact values, and the mean time to find a layer that is equally likely at each place of the search"
    exact = {(1, 1):1, (1, 2):4/3, (1, 4):1.6, (2, 4):4/3, (3, 4):16/15, (4, 4):1, (2, 5):25/18, (3, 7):49/36,
             (8, 32):1.6, (4, 16):1.6, (1, 99):1.98}
    for (n,N),want in exact.items(): assert near(blind_ceiling(n, N), want)
    for N in range(1, 30):
        for n in range(1, N+1):
            tau = sum(math.ceil(k/n) for k in range(1, N+1))/N
            assert near(blind_ceiling(n, N)*n*tau, N)
            at_most = 2*N/(N+n)
            assert near(blind_ceiling(n, N), at_most) if N%n==0 else blind_ceiling(n, N)<at_most-1e-6

@given(st.integers(1, 12), st.integers(1, 60), st.data())
def test_no_rule_beats_the_search_on_a_chain(N, T, data):
    "The most links of any rule, found backwards from the last step, are between (T+1-tau)/tau and T/tau"
    n = data.draw(st.integers(1, N))
    tau,links = N/n/blind_ceiling(n, N),[0.]*(N+1)                     # with u layers left that were not tried
    for _ in range(T):
        links = [0.]+[max(j/u*(1+links[N])+(1-j/u)*links[u-j] for j in range(min(n, u)+1)) for u in range(1, N+1)]
    assert (T+1-tau)/tau-1e-9<=links[N]<=T/tau+1e-9

def chain(owners, theta):
    x = theta[owners, torch.arange(len(owners))]
    before = torch.cat([torch.ones_like(x[:1]), x[:-1].clamp(0, 1)])
    return 0.5*((3*before**2-2*before**3)*((1-x)**2-1)).sum()

@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000), st.data())
def test_a_chain_hides_its_next_layer(N, T, seed, data):
    """One entry of the gradient is -1, and the loss with layers turned down, and its gradient in the gates, are the
    same whatever layers come next"""
    g,k = torch.Generator().manual_seed(seed),data.draw(st.integers(0, T-1))
    one,other = torch.randint(N, (2, T), generator=g)
    other[:k] = one[:k]
    theta = torch.zeros(N, T); theta[one[:k], torch.arange(k)] = 1.
    grad, = torch.autograd.grad(chain(one, theta.requires_grad_()), theta)
    want = torch.zeros(N, T); want[one[k], k] = -1.
    assert torch.equal(grad, want) and chain(one, theta)==-k/2
    for gates in (torch.ones(N, 1), torch.rand(N, 1, generator=g), torch.randint(2, (N, 1), generator=g).float()):
        seen = [torch.autograd.functional.vjp(lambda x: chain(o, x*theta.detach()), gates) for o in (one, other)]
        assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])

# --- Proposition 10
def test_regret_bound():
    "A table of exact values, and the end of the proof at its best rate"
    e = math.log(2)
    exact = {(1, 2, 2):(8*e)**.5, (1, 4, 3):(48*e)**.5, (2, 4, 25):20*e**.5, (4, 4, 9):0.}
    for o,want in exact.items(): assert near(regret_bound(*o), want)
    assert near(regret_bound(2, 4, 25, 3.), 60*e**.5) and near(regret_bound(2, 4, 25, 3., whole=True), 30*(2*e)**.5)
    for n,N,T,most in ((1, 7, 50, 2.), (3, 10, 400, 0.1)):
        for whole,k in ((False, N), (True, n)):
            ends = [n/x*math.log(N/n)+x/2*k*T*most**2 for x in (10**(j/1000) for j in range(-3000, 3000))]
            assert near(regret_bound(n, N, T, most, whole), min(ends), 1e-5)

@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 1000), st.data())
def test_the_sampler_of_proposition12(N, T, seed, data):
    "All gains known: on every path the regret is within the bound, line 5 holds, and the update adds up to n"
    n,g = data.draw(st.integers(1, N-1)),torch.Generator().manual_seed(seed)
    kl = lambda p,q: (torch.xlogy(p, p/q)-p+q).sum()
    pi,regret = torch.full((N,), n/N, dtype=torch.float64),torch.zeros(N, dtype=torch.float64)
    for t in range(T):
        a = (pi<=pi.median()).double() if data.draw(st.booleans()) else torch.rand(N, generator=g).double()
        regret += a; regret -= (pi*a).sum()/n
        w,lo,hi = pi*torch.exp(-math.sqrt(2*math.log(N/n)/T)*(1-a)),0.,1e9
        for _ in range(200): mid = (lo+hi)/2; lo,hi = (mid, hi) if (mid*w).clamp_max(1).sum()<n else (lo, mid)
        pi = (hi*w).clamp_max(1)
        other = torch.zeros(N, dtype=torch.float64); other[torch.randperm(N, generator=g)[:n]] = 1.
        assert abs(pi.sum()-n)<1e-9 and kl(other, w)>=kl(other, pi)+kl(pi, w)-1e-9
    assert regret.topk(n).values.sum()<=regret_bound(n, N, T, whole=True)+1e-9

# --- Proposition 12
def hessians(N, seed):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(2, N, N, dtype=torch.float64, generator=g)
    return M@M.mT+0.1*torch.eye(N, dtype=torch.float64),torch.randn(N, dtype=torch.float64, generator=g)

@given(st.integers(1, 8), st.integers(0, 1000))
def test_best_gates(N, seed):
    "Free, on a line, and one number for all: each is where nothing near is better, and the gaps are as proved"
    (H,_),c = hessians(N, seed)
    one = torch.ones(N, 1, dtype=torch.float64)
    line = torch.cat([one, torch.arange(N)[:, None]], 1)[:, :min(N, 2)]
    value = lambda g: (c@(g-1)+0.5*(g-1)@H@(g-1)).item()
    free,most = best_gates(c, H)
    for U in (one, line, torch.eye(N, dtype=torch.float64)):
        gates,gain = best_gates(c, H, U)
        assert math.isclose(value(gates), -gain, rel_tol=1e-6, abs_tol=1e-9) and -1e-9<=gain<=most+1e-9
        assert all(value(gates+s*1e-3*u)>=value(gates)-1e-12 for u in U.T for s in (1, -1))
        assert math.isclose(0.5*(free-gates)@H@(free-gates), most-gain, rel_tol=1e-6, abs_tol=1e-8)

def test_one_number_for_all_is_best():
    "Where the slope is parallel to the row sums, and by hand: H = diag(1, 3), c = (1, 0)"
    (H,_),_ = hessians(5, 0)
    for gates in (best_gates(0.4*H.sum(1), H)[0], best_gates(0.4*H.sum(1), H, torch.ones(5, 1).double())[0]):
        assert (gates-0.6).abs().max()<1e-9
    H,c = torch.diag(torch.tensor([1., 3.])),torch.tensor([1., 0.])
    assert best_gates(c, H)[0].tolist()==[0., 1.] and best_gates(c, H)[1]==0.5
    gates,gain = best_gates(c, H, torch.ones(2, 1))
    assert gates.tolist()==[0.75, 0.75] and gain==0.125

def test_every_planted_change_was_seen():
    "`python -m benchmarks bounds` has planted all that it would plant today, and a test saw each"
    from benchmarks import bounds,record
    rows = record.read('bounds')['rows']
    source = (record.root/'ist_nb'/'theory.py').read_text()
    planted = {(name, what) for name,what,_ in bounds.mutants(source, texts=False)}
    assert {(o['function'], o['change']) for o in rows}==planted, 'run python -m benchmarks bounds'
    assert [o for o in rows if o['outcome']!='killed']==[]

def test_what_is_measured_of_gates():
    "Gradients in the gates and their Hessian are those of finite differences, and the model stays as it is"
    from benchmarks.gates import Measured
    from benchmarks.small import lm_batch,tiny_lora
    model = tiny_lora(3).double()
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    rows = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    before = {n:p.clone() for n,p in model.named_parameters()}
    f = Measured(model, [lm_batch(o) for o in rows[:2].split(1)], [lm_batch(o) for o in rows[2:].split(1)])
    at,h = torch.tensor([1., 0.5, 0.8]),1e-2
    for k in (0, 1):
        slope = [(f(at+h*e)[k][0]-f(at-h*e)[k][0])/(2*h) for e in torch.eye(3)]
        assert slope==pytest.approx(f(at)[k][1].tolist(), rel=2e-2, abs=1e-4)
        H,one = f.hessians()[k],torch.ones(3)
        e = torch.eye(3)
        mixed = (f(one+h*(e[0]+e[1]))[k][0]-f(one+h*e[0])[k][0]-f(one+h*e[1])[k][0]+f(one)[k][0])/h**2
        assert mixed==pytest.approx(H[0, 1].item(), rel=0.1, abs=2e-2) and torch.equal(H, H.T)
    assert f(0*at)[0][0]==pytest.approx(0, abs=1e-6)      # without adapters nothing diverges
    assert all(torch.equal(before[n], p) for n,p in model.named_parameters())
