"Frontiers at equal task loss: cases whose answer is known"
import math
import pytest
from benchmarks import frontier
from benchmarks.frontier import at,chosen,divergences,holm,hull,judged,levels,over_documents,ratio

def run(seed, points, lr=1e-3, task='chat', **kw):
    "Points: name, task loss, divergence"
    made = [dict(name=n, task=x, kl=y) for n,x,y in points]
    return dict(name='LoRA', lr=lr, steps=10, task=task, seed=seed, points=made) | kw

def test_hull_is_lower_and_convex():
    points = [(1, 4), (2, 3.5), (2, 1), (3, 0.9), (4, 0), (4, 2)]
    assert hull(points)==[(1, 4), (2, 1), (4, 0)]      # (3, .9) lies above the line from (2, 1) to (4, 0)
    assert hull(points+[(3, 0.4)])==[(1, 4), (2, 1), (3, 0.4), (4, 0)]
    assert hull([(1, 0), (2, 0)])==[(1, 0)]

def test_divergence_at_a_loss():
    h = [(1, 4), (2, 1), (4, 0)]
    assert [at(h, o) for o in (0.9, 1, 1.5, 2, 3, 4, 9)]==[None, 4, 2.5, 1, 0.5, 0, 0]

def test_level_is_a_share_of_the_gain():
    "The best of the seeds is averaged, and the model before is given once"
    runs = [run(0, [('before', 3., 0), ('trained', 1., 2.)]), run(1, [('trained', 1.4, 2.), ('scaled', 1.2, 1.)])]
    assert levels(runs, 'chat', 0)==pytest.approx(1.1)
    assert levels(runs, 'chat', 0.5)==pytest.approx(2.05)

def test_what_chooses_does_not_judge():
    "The setting that is best for seed 0 stands for its family, though another is better for the seeds that judge"
    choose = [run(0, [('before', 3., 0), ('trained', 1., 2.), ('scaled', 2., 0.5)]),
              run(0, [('trained', 1., 3.), ('scaled', 2., 0.9)], lr=2e-3)]
    judge = [o for s in (1, 2, 3) for o in (run(s, [('before', 3., 0), ('trained', 1., 2.), ('scaled', 2., 0.8)]),
                                            run(s, [('trained', 1., 2.), ('scaled', 2., 0.1)], lr=2e-3))]
    setting,found = judged(choose, judge, 'LoRA, scaled', 'chat', 0.5)
    assert 'lr 0.001' in setting and found=={s:pytest.approx(0.8) for s in (1, 2, 3)}

def test_family_that_does_not_reach_the_loss():
    runs = [run(0, [('before', 3., 0), ('trained', 1., 2.)]),
            run(0, [('trained', 2.5, 1.), ('scaled', 2.7, 0.1)], keep=1.)]
    assert chosen(runs, 'Keep', 'chat', 0.5) is None and judged(runs, runs, 'Keep', 'chat', 0.5)==(None, {})

def test_unfinished_setting_does_not_stand_for_a_family():
    "One seed reaches the loss and the other does not"
    runs = [run(0, [('before', 3., 0), ('trained', 1., 2.)]),
            *(run(s, [('trained', x, 1.), ('scaled', 2.9, 0.1)], keep=1.) for s,x in ((0, 1.), (1, 2.5)))]
    assert chosen(runs, 'Keep', 'chat', 0.5) is None

def test_ratio_is_geometric_and_paired():
    a,b = {1:2., 2:8., 3:4.},{1:1., 2:2., 3:2., 4:9.}
    got,low,high,p = ratio(a, b)      # ratios 2, 4, 2
    assert got==pytest.approx(2**(4/3)) and low<got<high
    assert math.log(high/got)==pytest.approx(4.302653*math.log(2)/3)      # t of 2 degrees, standard error log(2)/3
    assert p==pytest.approx(0.0572, abs=1e-4)
    assert ratio({1:3.}, {1:1.})==(pytest.approx(3), None, None, None) and ratio({}, b) is None

def test_holm():
    assert holm([0.01, 0.04, 0.03])==pytest.approx([0.03, 0.06, 0.06]) and holm([0.9, 0.8])==[1., 1.] and holm([])==[]

def test_documents_drawn_again():
    """Half of the divergence on every row is half, whatever is drawn; rows that differ widen the interval, and harder
    documents move the level with them"""
    def runs(rows, documents=(1., 1., 1.)):
        def point(name, by, off): return dict(name=name, task=2.+off, kl=by*2.5, kl_rows=[by*o for o in rows],
                                              documents=[o+off for o in documents])
        start = point('before', 0., 1.) | dict(name='before')
        plain = dict(name='LoRA', lr=1., steps=1, task='chat', doc_tokens=[5, 1, 1], points=[
            start, point('trained', 1., 0.), point('scaled', 0.3, 0.25)])
        held = plain | dict(name='keep 1', keep=1., points=[point('trained', 0.5, 0.), point('scaled', 0.15, 0.25)])
        return [o | dict(seed=s) for s in (1, 2) for o in (plain, held)]
    def interval(o): return over_documents(o, o, 'Keep', 'LoRA, scaled', 'chat', 0.25, draws=60)
    assert interval(runs((1., 2., 3., 4.)))==pytest.approx((0.5, 0.5))
    assert interval(runs((1., 2., 3., 4.), (0.1, 1., 7.)))==pytest.approx((0.5, 0.5))
    other = runs((1., 2., 3., 4.))
    for p in other[1]['points']: p['kl_rows'] = p['kl_rows'][::-1]     # of both seeds, which share the list
    low,high = interval(other)
    assert low<0.45 and 0.55<high

def test_a_point_that_is_chosen_beforehand():
    "Its scale too; and an adapter that has no scale does not begin at the model before"
    choose = [run(0, [('before', 3., 0), ('trained', 1., 2.)], post='s', base=1)]
    def scaled(*kl): return [dict(name='scaled', task=t, kl=k, v=v) for t,k,v in zip((1.05, 1.3), kl, (0.8, 0.4))]
    choose[0]['points'] += scaled(1., 0.1)
    judge = [run(s, [('before', 3., 0), ('trained', 1., 2.)], post='s') for s in (1, 2)]
    for r in judge: r['points'] += scaled(0.5+r['seed'], 0.1)
    assert frontier.fixed(choose, judge, 'LoRA, scaled', 'chat')=={1:1.5, 2:2.5}     # 0.4 misses the level of 1.1
    assert frontier.judged(choose, judge, 'LoRA', 'chat', 0.05)[1]=={1:2., 2:2.}
    # at the level in between, on a straight line; what is off the hull does not count
    points = [dict(task=1., kl=1., book=5.), dict(task=1.5, kl=0.9, book=99.), dict(task=2., kl=0.2, book=3.)]
    start = dict(task=3., book=2.)
    assert [frontier.level_with(points, o, ['book'], start) for o in (1.5, 2.5, 0.5)]==[[4.], [2.5], None]

def test_committed_runs_can_be_read():
    table = frontier.table_of('SmolLM2-135M-Instruct', have=('german', 'chat'))
    judged = set(frontier.said)-{'Keep, faded'}     # which never stood for anything where it was chosen
    assert all(frontier.said[o] in table for o in judged) and 'on documents that chose nothing' in table
    assert divergences({0:[dict(task=1., kl=2.)]}, 1.5, (2., 0.))=={0:1.}

def test_seed_that_was_not_run_is_not_missed(monkeypatch):
    "A family that ran with fewer seeds than another has a number; one that missed the loss in one of its runs has none"
    base = [('before', 3., 0), ('trained', 1., 2.), ('scaled', 1.1, 1.)]
    held = [run(s, [('trained', 1., 0.4), ('scaled', 1.1, 0.2)], keep=1.) for s in (1, 2, 3)]
    judge = [run(s, base[:2]+[('scaled', 1.1, 1+s/100)]) for s in (1, 2, 3, 4)]+held
    choose = [run(0, base), run(0, [('trained', 1., 0.4), ('scaled', 1.1, 0.2)], keep=1.)]
    monkeypatch.setattr(frontier, 'found', lambda model: (choose, judge))
    monkeypatch.setattr(frontier, 'read', lambda name: dict(model='m', hardware='', versions={}, command=''))
    def row(): return next(o for o in frontier.table_of('m').splitlines() if 'with `Keep`' in o)
    assert '| 0.200 (0.20, 0.19 to 0.20, *) |' in row()
    held[0]['points'][:] = [dict(name='trained', task=2.5, kl=0.1), dict(name='scaled', task=2.6, kl=0.1)]
    assert 'not reached' in row()
    monkeypatch.setattr(frontier, 'found', lambda model: (choose, None))
    assert 'nothing is judged yet' in frontier.table_of('m')

def test_what_stands_for_a_family_is_judged(monkeypatch):
    "Of three rates the two that are best for a family, with all their settings, scaled only where that was chosen"
    from benchmarks import retain
    runs = [run(0, [('before', 3., 0), ('trained', 1., 2.), ('scaled', 1.1, 0.5)], base=1, stops=[0.5], post='slgh'),
            run(0, [('trained', 1., 1.5), ('scaled', 1.1, 0.9)], lr=2e-3, post='s'),
            run(0, [('trained', 1., 9.), ('scaled', 1.1, 9.)], lr=4e-3, post='s'),
            run(0, [('trained', 1., 9.), ('scaled', 1.1, 9.)], name='keep 1', keep=1., post='sg')]
    monkeypatch.setattr(frontier, 'choosing', lambda name, calls: runs)
    jobs = retain.jobs('judge', ['chat'], [1, 2], 'some model')
    first,other = (dict(task='chat', name='LoRA', steps=10, lr=o) for o in (2e-3, 1e-3))
    assert jobs[0]==first | dict(post='', seed=1, base=1) and jobs[3]==first | dict(post='', seed=2)
    assert jobs[1]==other | dict(post='s', stops=[0.5], seed=1) and jobs[2]['post']=='s' and jobs[2]['keep']==1.
    assert len(jobs)==6 and all('points' not in o for o in jobs)
    assert 'base' not in retain.jobs('judge', ['chat'], [1], 'some model', seen=['chat'])[0]     # known already
    for o in runs: o['post'] = 'g'      # gates: of all seeds they run first, because they take longest
    runs[0]['points'].append(dict(name='faded', task=1.2, kl=0.1))
    assert [(retain.heavy(o), o['seed']) for o in retain.jobs('judge', ['chat'], [1, 2], 'some model')]==[
        (True, 1), (True, 2), (False, 1), (False, 1), (False, 2), (False, 2)]
    with pytest.raises(SystemExit, match='Nothing is chosen for german'):
        retain.jobs('judge', ['chat', 'german'], [1], 'some model')

def test_what_a_task_is_tried_with():
    "Higher rates on a domain; where data are few, runs of its own"
    from benchmarks import retain
    rates = {t:{(o['name'], o['lr'], o.get('post')) for o in retain.wanted('choose', t) if o['lr']>2e-3}
             for t in ('german', 'python', 'chat', 'cloze', 'few')}
    assert rates['german']==rates['python']>{('LoRA', 4e-3, 'slgh'), ('LoRA', 8e-3, 's'), ('keep 3', 4e-3, 's')}
    assert rates['chat']==rates['cloze']=={('LoRA', 4e-3, 's')} and not rates['few']

def test_a_run_is_known_by_how_it_was_trained():
    from benchmarks.retain import same
    a = dict(task='chat', name='LoRA', lr=1e-3, steps=10, seed=1, post='s')
    assert same(a)==same(a | dict(post='', base=1, points=[], seconds=1.))!=same(a | dict(seed=2))

def test_the_rate_of_each_length():
    "Seed 0 chooses it, on documents that judge nothing; nothing is chosen for what it has not run"
    from benchmarks import retain
    made = lambda lr, steps, loss, seed=0, name='LoRA': dict(
        task='sun', name=name, lr=lr, steps=steps, seed=seed, points=[dict(name='before', task=0.),
                                                                      dict(name='trained', task=loss)])
    runs = [made(1, 88, 3.), made(2, 88, 2.), made(4, 88, 1., seed=1), made(1, 250, 1.), made(2, 250, 2.),
            made(4, 88, 0., name='recommended')]
    rate = lambda steps, name='LoRA': retain.best_rate(runs, dict(task='sun', name=name, steps=steps))
    assert (rate(88), rate(250), rate(88, 'recommended'), rate(50))==(2, 1, 4, None)
    assert [retain.judged_on('lengths', s) for s in (0, 1)]==['choose', 'test']
    assert {retain.judged_on(p, s) for p in ('choose', 'smoke') for s in (0, 1)}=={'choose'}
    assert retain.judged_on('judge', 0)=='test'

def test_settings_of_another_model(monkeypatch, tmp_path):
    "A model on which nothing was tuned is judged with what was chosen on another, and only the families asked for"
    from benchmarks import record,retain
    choose = [run(0, [('before', 3., 0), ('trained', 1., 2.), ('scaled', 1.1, 0.5)], post='s', base=1),
              run(0, [('trained', 1., 9.), ('scaled', 1.1, 9.)], name='keep 1', keep=1., post='s')]
    judge = [run(1, [('before', 4., 0), ('trained', 2., 1.)])]
    for module in (frontier, record): monkeypatch.setattr(module, 'results', tmp_path)
    record.save(tmp_path/'retain_choose_first.json', {}, runs=choose)
    record.save(tmp_path/'retain_judge_second.json', {}, runs=judge, choices='first')
    read = lambda runs: [[p['task'] for p in r['points']] for r in runs or []]
    assert list(map(read, frontier.found('second')))==[read(choose), read(judge)]
    assert list(map(read, frontier.found('first')))==[read(choose), []]
    # a later call that chooses changes nothing for a model that has been judged
    for o in choose: o['call'] = 0
    later = run(0, [('trained', 0.5, 1.)], lr=1., post='s', call=1)
    record.save(tmp_path/'retain_choose_first.json', {}, runs=[*choose, later])
    record.save(tmp_path/'retain_judge_second.json', {}, runs=judge, choices='first', choice_calls=1)
    assert read(frontier.found('second')[0])==read(choose) and read(frontier.found('first')[0])==read([*choose, later])
    assert retain.jobs('judge', ['chat'], [1], 'first', calls=1)!=retain.jobs('judge', ['chat'], [1], 'first')
    record.save(tmp_path/'retain_choose_first.json', {}, runs=choose)
    assert [o['name'] for o in retain.jobs('judge', ['chat'], [1], 'first', ['Keep'])]==['keep 1']
    assert {o['name'] for o in retain.jobs('judge', ['chat'], [1], 'first')}=={'LoRA', 'keep 1'}
