"The lemmas of nbs/theory/convergence.ipynb as properties, over random weights, importance, losses and sizes"
import math,torch
from types import SimpleNamespace
from hypothesis import given,settings,strategies as st
from ist_nb import ISTConfig
from ist_nb.scorers import centred_likelihood,move_importance,standardize
from ist_nb.theory import *

settings.register_profile('ist', max_examples=60, deadline=None, derandomize=True)
settings.load_profile('ist')

@st.composite
def draws(draw, N=64):
    "Weights of up to `N` layers, over eight powers of e, and a number of layers to draw"
    N = draw(st.integers(1, N))
    logw = draw(st.lists(st.floats(-4, 4), min_size=N, max_size=N))
    return torch.tensor(logw, dtype=torch.float64).exp(),draw(st.integers(1, N))

@given(draws())
def test_lemma2(wn):
    "No layer is drawn less often than Lemma 2 says, and its simple form is weaker"
    w,n = wn
    N,kappa = len(w),(w.min()/w.max()).item()
    pi = inclusion_by_clocks(w, n)
    assert abs(pi.sum()-n)<1e-6*n and pi.max()<=1+1e-8
    assert 0<=inclusion_bound(kappa, n, N, simple=True)<=inclusion_bound(kappa, n, N)+1e-12
    assert inclusion_bound(kappa, n, N)<=pi.min()+1e-8

@given(draws(N=10))
def test_two_ways_to_the_exact_probabilities(wn):
    assert (inclusion_by_clocks(*wn)-inclusion_probabilities(*wn)).abs().max()<1e-8

@given(st.integers(1, 64), st.data())
def test_lemma2_is_sharp(N, data):
    "Equal weights: n/N. One layer low and all others high: an equality"
    n,kappa = data.draw(st.integers(1, N)),data.draw(st.floats(0.02, 1))
    assert math.isclose(inclusion_bound(1., n, N), n/N, abs_tol=1e-12)
    w = torch.ones(N, dtype=torch.float64); w[0] = kappa
    if N>1: assert abs(inclusion_by_clocks(w, n)[0]-inclusion_bound(kappa, n, N))<1e-7

@given(st.floats(0.01, 7), st.lists(st.floats(-1, 1), min_size=1, max_size=200))
def test_lemma3(C, cs):
    I = 0.
    for m,c in enumerate(cs, 1):
        p = 1/(1+math.exp(I))
        I -= C*c*p*(1-p)
        assert abs(I)<=importance_bound(m, C)+1e-9

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

@given(draws(), st.floats(0, 1))
def test_floor(wn, explore):
    w,n = wn
    N,kappa = len(w),(w.min()/w.max()).item()
    pi = explore*n/N + (1-explore)*inclusion_by_clocks(w, n)
    assert pi.min()>=floor_probability(explore, n, N, kappa)-1e-8>=explore*n/N-1e-7

pos = st.floats(0.01, 100)
@given(pos, pos, st.integers(1, 64), st.floats(0, 10), st.integers(1, 10**6), st.data())
def test_corollary1_follows_from_theorem1(delta, L, N, sigma2, T, data):
    n,pi_min = data.draw(st.integers(1, N)),data.draw(st.floats(0.001, 1))
    gamma = step_size(delta, L, n, sigma2, T)
    assert 0<gamma<=1/L
    assert theorem1_bound(delta, L, gamma, T,
                          n*sigma2)/pi_min <= corollary1_bound(delta, L, n, sigma2, T, pi_min)*(1+1e-9)
    # equal layer updates
    assert math.isclose(rst_bound(delta, L, n, N, sigma2, n*T*N), rst_bound(delta, L, N, N, sigma2, n*n*T),
                        rel_tol=1e-9)
    assert math.isclose(adaptive_bound(delta, L, gamma, T, sigma2, 1., 1.), theorem1_bound(delta, L, gamma, T, sigma2),
                        rel_tol=1e-12)

@given(draws(), st.data())
def test_proposition5(wn, data):
    """No selection has a larger guaranteed decrease than the layers of largest gain, and the difference to chance is
    `selection_gain`"""
    w,n = wn
    a = torch.tensor(data.draw(st.lists(st.floats(-10, 10), min_size=len(w), max_size=len(w))), dtype=torch.float64)
    pi = inclusion_by_clocks(w, n)
    assert (pi*a).sum()<=a.topk(n).values.sum()+1e-5
    assert abs(selection_gain(pi, a)-((pi*a).sum()-pi.sum()/len(w)*a.sum()))<1e-6

def test_where_they_do_not_hold():
    import pytest
    with pytest.raises(ValueError, match='outside of'): theorem1_bound(1., 2., 1., 10, 1.)
    with pytest.raises(ValueError, match='outside of'): adaptive_bound(1., 1., 1., 10, 1., 0.5, 2.)
    with pytest.raises(ValueError, match='No bound is known'):
        update_bound(SimpleNamespace(scorer='mine', n_candidates=3, score_lr=1.))

def test_default_guarantee():
    "N = 32, a quarter active, the default floor: the number on the page and in the README"
    r = guarantee(ISTConfig(), 32)
    assert r['n']==8 and math.isclose(r['pi_min'], 0.025) and math.isclose(r['constant'], 10.)
    assert guarantee(ISTConfig.paper(), 32)['constant']==math.inf and guarantee(ISTConfig.rst(), 32)['constant']==1.
