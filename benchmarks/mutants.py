"""Do the tests see a fault? Each mutant is one small fault in the core, put into a copy of the package; a test must fail.
`python benchmarks/mutants.py` writes results/mutants.json; `--only speed,memory` tries these modules alone and keeps the rest of the file.
The package and the notebook of a mutant's module are changed alike, since a notebook runs its own code"""
import json,multiprocessing,os,platform,shlex,shutil,signal,sys,tempfile,time
from collections import Counter,namedtuple
from functools import cache
from importlib import import_module
from pathlib import Path
from fastcore.script import call_parse

root = Path(__file__).resolve().parent.parent
out = root/'benchmarks'/'results'/'mutants.json'
Mutant = namedtuple('Mutant', 'module about old new checks')

# what each module's faults are looked for with, after a mutant's own checks: notebooks by name, or arguments for pytest
full = dict(
    config=['15_config', 'tests/test_ist.py'],
    layers=['01_layers', 'tests/test_ist.py', 'tests/test_probes.py', 'tests/test_peft.py'],
    suppression=['02_suppression', 'tests/test_probes.py', 'tests/test_speed.py'],
    scorers=['03_scorers', 'tests/test_probes.py', 'tests/test_ist.py'],
    samplers=['04_samplers', 'tests/test_speed.py', 'tests/test_ist.py'],
    ist=['tests/test_steps.py', '05_ist', 'tests/test_ist.py', 'tests/test_probes.py'],
    callback=['06_callback', 'tests/test_logging.py', 'tests/test_ist.py'],
    speed=['08_speed', 'tests/test_speed.py'],
    memory=['07_memory', 'tests/test_memory.py'],
    evaluate=['13_evaluate', 'tests/test_evaluate.py'],
    finetune=['12_finetune', 'tests/test_finetune.py'])

speed_k,memory_k,probes_k = ('tests/test_speed.py -k ', 'tests/test_memory.py -k ', 'tests/test_probes.py -k ')
folds,beside,hooked,paper = speed_k+'peft_computes',speed_k+'pass_by',memory_k+'"hooks or records or writes or second_backward"',probes_k+'released'
recorded,exact,kept = probes_k+'recorded',probes_k+'tracked_gradients',memory_k+'"budget_is_kept or under_ist"'

mutants = [Mutant(*o) for o in (
    # -- config
    ('config', 'a fraction of the layers is rounded, not cut', 'return max(1, int(n*n_layers))', 'return max(1, round(n*n_layers))', ['15_config']),
    ('config', 'a schedule that shrinks too fast', '**(N/n-1)))', '**(N/n)))', ['15_config']),
    ('config', 'MB are MiB', '1024 if found[3] else 1000', '1024', ['15_config']),
    ('config', 'the released algorithm explores', "dict(scorer='paper', explore=0.)", "dict(scorer='paper')", ['15_config']),
    ('config', 'suppression that changes nothing is allowed', 'lambda v: _is_real(v) and 0<=v<1)', 'lambda v: _is_real(v) and 0<=v<=1)', ['15_config']),
    ('config', 'one candidate is allowed', 'lambda v: _is_int(v) and v>=2)', 'lambda v: _is_int(v) and v>=1)', ['15_config']),
    ('config', 'True is a number', 'return isinstance(v, int) and not isinstance(v, bool)', 'return isinstance(v, int)', ['15_config']),
    # -- layers
    ('layers', 'a frozen layer keeps its gradient', 'p.grad,p.frozen_by_ist = None,True', 'p.frozen_by_ist = True', ['01_layers']),
    ('layers', 'what a method has frozen itself is thawed', 'if not p.requires_grad: continue', 'if False: continue', ['01_layers', 'tests/test_peft.py -k adamss']),
    ('layers', 'shared parameters stay stand-ins after a step', 'for held,key in self.shared: held[key] = _real(held[key])', 'pass', ['01_layers']),
    ('layers', 'layer 10 comes before layer 2', '(stacks.index(o[0]), o[1])', '(stacks.index(o[0]), str(o[1]))', ['tests/test_core.py']),
    ('layers', 'an adapter within an adapter counts twice', " and not any(name.startswith(o+'.') for o in found)", '', ['tests/test_core.py']),
    ('layers', 'set_adapter thaws frozen layers', "_switches = 'set_adapter','enable_adapters'", "_switches = 'enable_adapters',", ['01_layers']),
    # -- suppression
    ('suppression', 'DoRA is suppressed by its scaling', ' and not any(a in module.lora_variant for a in module.active_adapters)', '', ['02_suppression']),
    ('suppression', 'experts of a mixture are suppressed by their scaling', ' and not isinstance(module, (MultiheadAttention, ParamWrapper))', '', ['02_suppression', 'tests/test_peft.py -k experts']),
    ('suppression', 'the scaling is not put back', 'return lambda: module.scaling.update(kept)', 'return lambda: None', ['02_suppression']),
    ('suppression', 'the factor is that of the base output', 'torch.lerp(y_base.to(y.dtype), y, factor', 'torch.lerp(y, y_base.to(y.dtype), factor', ['02_suppression']),
    ('suppression', 'a decision is always that of the adapter', 'return y if factor>=0.5 else y_base', 'return y', ['02_suppression']),
    ('suppression', "form='scaling' is ignored", "fast = scaling_is_exact(o) or form=='scaling' and isinstance(o, LoraLayer)", 'fast = scaling_is_exact(o)', [paper]),
    ('suppression', 'compiled code runs past new hooks', 'with uncompiled() if hooks else nullcontext(): yield', 'with nullcontext(): yield', [speed_k+'suppression_by_hooks']),
    ('suppression', 'an adapter that was made active since is damped', "if getattr(module, 'disable_adapters', False) or list(getattr(module, 'active_adapters', [])) != active: return y", "if getattr(module, 'disable_adapters', False): return y", ['02_suppression']),
    ('suppression', 'a merged adapter is suppressed without effect', "if getattr(module, 'merged', False):", 'if False:', ['02_suppression']),
    # -- scorers
    ('scorers', 'the update lacks 1-p', 'return importance - lr * gain * p*(1-p)', 'return importance - lr * gain * p', ['03_scorers']),
    ('scorers', 'released rewards are not centred', 'return rewards-rewards.mean()', 'return rewards', ['03_scorers']),
    ('scorers', 'rewards are twice as large', 'reward_spread = 0.05 ', 'reward_spread = 0.1 ', ['03_scorers']),
    ('scorers', 'the spread of K-1', 'r/r.std(correction=0)*spread', 'r/r.std()*spread', ['03_scorers']),
    ('scorers', 'a lower loss is a lower reward', 'r = losses.mean()-losses', 'r = losses-losses.mean()', ['03_scorers']),
    ('scorers', 'candidates are drawn by sigma(I)', 'sample_layers(torch.sigmoid(-importance), n, generator)', 'sample_layers(torch.sigmoid(importance), n, generator)', ['03_scorers']),
    ('scorers', 'layers are drawn with replacement', 'replacement=False', 'replacement=True', ['03_scorers']),
    ('scorers', 'a weight that underflows is no layer', 'torch.multinomial(weights.clamp_min(tiny), n', 'torch.multinomial(weights, n', ['03_scorers', '04_samplers']),
    ('scorers', 'score_lr is ignored', 'rewards(losses), config.score_lr),record', 'rewards(losses), 10.),record', ['03_scorers']),
    ('scorers', 'n_candidates is ignored', 'draw_candidates(importance, n, config.n_candidates, generator)', 'draw_candidates(importance, n, 3, generator)', ['03_scorers']),
    ('scorers', 'n_suppressed is ignored', "n = layer_count(config.n_suppressed, len(importance), 'n_suppressed')", 'n = max(1, len(importance)//2)', ['03_scorers']),
    ('scorers', 'suppression_factor is ignored', 'suppress(self.layers, which, self.factor, self.form)', 'suppress(self.layers, which, 0.25, self.form)', ['03_scorers']),
    ('scorers', 'the paper is suppressed by the definition', "exp(-loss), centred', form='scaling')", "exp(-loss), centred')", [paper]),
    ('scorers', 'the gate stands at 1', "def gate_scorer(importance, probe, config, generator):\n    loss,gradient = probe.gates((1+probe.factor)/2)", "def gate_scorer(importance, probe, config, generator):\n    loss,gradient = probe.gates(1.)", ['03_scorers']),
    ('scorers', 'a probe leaves gradients', 'with frozen(self.model), ExitStack() as stack:', 'with ExitStack() as stack:', [probes_k+'no_trace']),
    ('scorers', 'importance follows twice as fast', 'ema_weight = 0.1   # weight', 'ema_weight = 0.2   # weight', [recorded]),
    ('scorers', 'importance goes the other way', 'standardize(-scores[known], 1.).to(z)', 'standardize(scores[known], 1.).to(z)', [recorded]),
    ('scorers', 'old gradients do not fade', '.clamp_min(self.ema_weight)', '', [recorded]),
    ('scorers', 'the variance lacks n/(n-1)', '(self.var*n/(n-1))[many]', 'self.var[many]', [recorded]),
    ('scorers', 'fisher has no variance', 'if many.any(): z[many] +=', 'if False: z[many] +=', [recorded]),
    ('scorers', 'the tracker has the wrong sign', '(-s-self.mean)[seen]', '(s-self.mean)[seen]', [exact]),
    ('scorers', 'the neutral value is taken for 0', '[p-z if z else p for p,z in zip(params, neutral)]', 'params', [exact]),
    ('scorers', 'scaled gradients are taken as they are', 'return res if scale is None else res/scale.to(res)', 'return res', [probes_k+'unscaled']),
    ('scorers', 'gate+fisher gives both the same weight', '+0.5*z, weight=0.4)', '+z, weight=0.4)', ['03_scorers']),
    ('scorers', 'a step that failed is scored', '    if not count: return\n', '', [probes_k+'watches_only']),
    # -- samplers
    ('samplers', 'unimportant layers are drawn', 'torch.sigmoid(importance)   # [N]', 'torch.sigmoid(-importance)   # [N]', ['04_samplers']),
    ('samplers', 'nothing is explored', 'explore = config.explore>0 and', 'explore = False and', ['04_samplers']),
    ('samplers', 'explore is ignored', 'generator=generator)<config.explore', 'generator=generator)<0.1', ['04_samplers']),
    ('samplers', 'the layer where the pass stops is not trained', 'on[:a],on[a] = False,True', 'on[:a] = False', [speed_k+'depth_sampler']),
    ('samplers', 'no step trains all layers', 'if u[N]<dense: return torch.arange(N)', 'if False: return torch.arange(N)', [speed_k+'depth_sampler']),
    ('samplers', 'the pass stops at unimportant layers', 'log_w = logsigmoid(importance.double())                        # [N]', 'log_w = logsigmoid(-importance.double())                        # [N]', [speed_k+'depth_sampler']),
    ('samplers', 'the lowest layers are the highest', 'return torch.arange(len(importance)-n, len(importance))', 'return torch.arange(n)', ['04_samplers']),
    # -- ist
    ('ist', 'the seed draws nothing', 'return generator_for(self.config.seed, purpose, self.t)', 'return generator_for(purpose, self.t)', ["tests/test_steps.py -k 'seed or seeds'"]),
    ('ist', 'every step draws the same', 'return generator_for(self.config.seed, purpose, self.t)', 'return generator_for(self.config.seed, purpose)', ['05_ist']),
    ('ist', 'layers and candidates are drawn from the same numbers', 'return generator_for(self.config.seed, purpose, self.t)', 'return generator_for(self.config.seed, self.t)', ["tests/test_steps.py -k 'seed or seeds'"]),
    ('ist', 'every epoch of probes has the same order', "generator_for(self.seed, 'probe', epoch)", "generator_for(self.seed, 'probe')", ["tests/test_steps.py -k 'seed or seeds'"]),
    ('ist', 'steps are not counted', 'self.times_active[self.active] += 1', 'pass', ['05_ist']),
    ('ist', 'scored before the first step', 'if self.scores and self.t>0 and due:', 'if self.scores and due:', ['05_ist']),
    ('ist', "Python's and numpy's random numbers are used up", 'random.setstate(state[0]); np.random.set_state(state[1])', 'pass', ['tests/test_core.py']),
    ('ist', 'the model stays in evaluation mode', 'for m,training in modes: m.training = training', 'pass', ['05_ist']),
    ('ist', 'the older half of the history is lost', 'history = history[:half:2]+history[half:]', 'history = history[half:]', ['05_ist']),
    ('ist', "a scorer's form is ignored", "getattr(self.scorer, 'form', 'response')", "'response'", [paper]),
    ('ist', 'layers are drawn without looking at importance', 'self.sampler(self.importance[pos], n,', 'self.sampler(torch.zeros(N), n,', ['05_ist']),
    ('ist', 'layers stay frozen after a step', '    self.layers.thaw()\n    self.in_step = False', '    self.in_step = False', ['05_ist']),
    ('ist', 'score_interval is ignored', 'due = self.t%self.config.score_interval==0', 'due = self.t%10==0', ['05_ist']),
    ('ist', 'score_batch_size is ignored', 'ProbeBatches(probe, self.config.score_batch_size,', 'ProbeBatches(probe, 4,', ['05_ist']),
    # -- callback
    ('callback', 'the probe given is not used', 'probe = train_dataloader if self.probe is None else self.probe', 'probe = train_dataloader', ['tests/test_core.py']),
    ('callback', 'log=False logs', 'if not self.log or self.ist is None', 'if self.ist is None', ['tests/test_logging.py -k quiet']),
    ('callback', 'the host runs ahead unasked', 'if self.config.fast: run_ahead(', 'if True: run_ahead(', ['06_callback']),
    ('callback', 'a probe takes the labels out of its batch', 'trainer.compute_loss(model, copy(batch))', 'trainer.compute_loss(model, batch)', ['tests/test_core.py']),
    ('callback', 'a schedule for another length', 'n_steps=state.max_steps', 'n_steps=2*state.max_steps', ['06_callback', 'tests/test_ist.py -k recommended']),
    # -- speed
    ('speed', "folding drops the base layer's bias", 'return y if base.bias is None else y+base.bias.to(x.dtype)', 'return y', [folds]),
    ('speed', "folding drops the adapter's bias", 'return y if bias is None else y + s*bias.to(y.dtype)', 'return y', [folds]),
    ('speed', "the adapter's bias is not scaled", 'y + s*bias.to(y.dtype)', 'y + bias.to(y.dtype)', [folds]),
    ('speed', 'folding drops the magnitude', 'if magnitude is None: return W', 'if True: return W', [folds]),
    ('speed', 'folding pays too early', 'return tokens*(n_in+2*n_out) >', 'return tokens*(2*n_in+2*n_out) >', ['08_speed']),
    ('speed', 'hooks on parts of a layer are passed by', 'if _hooked(A) or _hooked(B) or _hooked(self.base_layer): return None', 'pass', [beside]),
    ('speed', 'a magnitude that trains alone has no gradient', ',self._magnitude(name)\n', ',None\n', [beside]),
    ('speed', 'a base weight that trains has no gradient', 'return not packed and not base.weight.requires_grad', 'return not packed', [beside]),
    ('speed', "somebody's own layer is folded", "plain = cls is LoraLinear or", "plain = issubclass(cls, LoraLinear) or", [beside]),
    ('speed', 'a variant that came later is folded', ' or type(self.lora_variant[name]) is not DoraLinearVariant', '', [speed_k+'after_folding']),
    ('speed', 'a gate has no gradient', 'return None if isinstance(self.scaling[name], torch.Tensor) else name', 'return name', ['08_speed']),
    ('speed', 'the gradient of the compiled product lacks the scaling', 'A, B, ctx.scaling, magnitude),None', 'A, B, 1., magnitude),None', [speed_k+'compiled_folded']),
    ('speed', 'compiled DoRA scales the bias', 'if drops else y if base.bias is None else y-base.bias', 'if drops else y', [speed_k+'compiled_folded']),
    ('speed', 'every backward pass goes to the embedding', 'for m,k in hooks: del m._forward_hooks[k]', 'pass', ['08_speed']),
    ('speed', 'a pickle needs this package', '(type(self).__mro__[2], object, None)', '(type(self), object, None)', [speed_k+'pickled']),
    # -- memory
    ('memory', 'the head takes no memory', 'return max(peak, below+head)', 'return peak', ['07_memory']),
    ('memory', 'the work in a block takes no memory', 'if below+w>budget: continue', 'if False: continue', ['07_memory']),
    ('memory', 'hooks see a block measured', '_working_only(vars(m)[k]) if measuring and k in _kinds else copy(vars(m)[k])', 'copy(vars(m)[k])', [hooked]),
    ('memory', 'hooks on all modules see a block measured', 'for o,_ in self.others: o.clear()', 'pass', [hooked]),
    ('memory', "a parameter's hook sees a block measured", 'for p,_ in self.params: p._backward_hooks = None', 'pass', [hooked]),
    ('memory', 'a second forward writes to buffers', 'v.clone() if self.writes and v is not None else v', 'v', [hooked]),
    ('memory', 'blocks that write to buffers are not known', 'if shield.wrote: self.writes.add(i)', 'pass', [hooked]),
    ('memory', 'a second forward has the hooks of another time', 'm.__dict__ = vars(m) | found | dict(', 'm.__dict__ = vars(m) | dict(', [hooked]),
    ('memory', 'hooks on a block are called twice', 'if self._compiled(i): return again', 'if True: return again', [hooked]),
    ('memory', 'measuring loses gradients', 'for p,g in zip(layer.params, grads): p.grad = g', 'pass', [memory_k+'larger_batch_within']),
    ('memory', 'measuring draws random numbers', '    with fork_rng(self.device):\n', '    with nullcontext():\n', [kept]),
    ('memory', 'a cache is written twice', 'for c in self.was[1]: c.use_cache = False', 'pass', [memory_k+'left_as_it_was']),
    ('memory', "'reset' forgets nothing", "if not hasattr(p, 'device_mesh'): state.pop(p, None)", "if not hasattr(p, 'device_mesh'): pass", ['07_memory']),
    ('memory', 'resting moments take the place of a checkpoint', 'if state.get(k) is v: state[k] = self.back(v, home)', 'state[k] = self.back(v, home)', [memory_k+'resumes']),
    ('memory', 'completing a state makes a step', "for g in opt.param_groups: g['lr'] = g['lr']*0", 'pass', ['07_memory']),
    # -- what a run says
    ('evaluate', 'a likelihood is not divided by its length', 'key=lambda j: ll[j]/len(text[names[j]])', 'key=lambda j: ll[j]', [speed_k.replace('speed', 'evaluate')+'likelihood']),
    ('evaluate', 'the first letter in place of the last', 'found = next((o[-1:] for o in', 'found = next((o[:1] for o in', ['tests/test_evaluate.py -k extract', '13_evaluate']),
    ('evaluate', 'the first number in place of the last', 'return found[0] if names else float(found[-1])', 'return found[0] if names else float(found[0])', ['tests/test_evaluate.py -k extract', '13_evaluate']),
    ('evaluate', 'every batch has the same weight', 'if k: total,n = total+k*float(model_loss(model, to_device(batch, device))),n+k', 'if k: total,n = total+float(model_loss(model, to_device(batch, device))),n+1', ['13_evaluate']),
    ('finetune', 'loss_after is that of training rows', 'after = held_out_loss(trainer.model, batches)', 'after = held_out_loss(trainer.model, trainer.get_train_dataloader())', ['tests/test_finetune.py']),
)]

def code(module): return (root/'ist_nb'/f'{module}.py').read_text()

def wrong(m):
    "What is wrong with a mutant: its text is not there once; None if nothing is"
    n = code(m.module).count(m.old)
    if n!=1: return f'{m.module}: {m.about}: the text {m.old!r} is there {n} times'
    try: compile(code(m.module).replace(m.old, m.new), m.module, 'exec')
    except SyntaxError as e: return f'{m.module}: {m.about}: {e}'

def notebook_of(module):
    "The notebook that a module comes from"
    return root/'ist_nb'/code(module).split('File to edit: ')[1].split('.ipynb')[0]

def mutated(m, at):
    "A tree that looks like this one, with the mutant in it; None: without one"
    for p in root.iterdir():
        if p.name not in ('ist_nb', 'nbs', '.git'): (at/p.name).symlink_to(p)
    shutil.copytree(root/'nbs', at/'nbs', ignore=shutil.ignore_patterns('.*', '_*docs', '_proc'))
    (at/'ist_nb').mkdir()
    for p in (root/'ist_nb').iterdir():
        if p.is_dir(): (at/'ist_nb'/p.name).symlink_to(p)
        elif p.suffix=='.py': shutil.copy2(p, at/'ist_nb')
    if m is None: return
    (at/'ist_nb'/f'{m.module}.py').write_text(code(m.module).replace(m.old, m.new))
    path = at/notebook_of(m.module).resolve().relative_to(root).with_suffix('.ipynb')
    nb,there = json.loads(path.read_text()),0
    for c in nb['cells']:
        source = ''.join(c['source'])
        if c['cell_type']!='code' or not source.startswith('#| export') or m.old not in source: continue
        c['source'],there = source.replace(m.old, m.new).splitlines(True),there+1
    assert there==1, f'{path.name} has {m.old!r} in {there} cells'
    path.write_text(json.dumps(nb))

def arguments(check):
    return shlex.split(check) if check.startswith('tests/') else ['tests/test_nbs.py', '-k', f'test_notebook and {check}']

def run_check(at, check, log):
    "In a process of its own: exits with 0 where the check passes, with 1 where a test fails"
    os.setsid()     # a test that sends a signal to its group reaches nobody else
    fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    os.dup2(fd, 1); os.dup2(fd, 2)
    os.chdir(at)
    sys.path[:] = [str(at), *(o for o in sys.path if o and Path(o).resolve() not in (root, root/'benchmarks'))]
    os.environ['PYTHONPATH'] = str(at)
    import pytest
    status = int(pytest.main(['-n0', '-x', '-q', '-p', 'no:cacheprovider', *arguments(check)]))
    import ist_nb
    os._exit(status if Path(ist_nb.__file__).is_relative_to(at) else 9)

def outcome(m, check, seconds):
    "'passed', 'failed' or 'too long'; raises where nothing was tried"
    with tempfile.TemporaryDirectory() as d:
        at = Path(d)/'tree'
        at.mkdir()
        mutated(m, at)
        p = multiprocessing.get_context('fork').Process(target=run_check, args=(at, check, Path(d)/'log'))
        p.start(); p.join(seconds)
        if p.is_alive(): os.killpg(p.pid, signal.SIGKILL); p.join(); return 'too long'
        if p.exitcode not in (0, 1, 2): raise SystemExit(f'{check}, {m and m.about}: pytest ended with {p.exitcode}\n'+(Path(d)/'log').read_text()[-3000:])
        return 'failed' if p.exitcode else 'passed'

@cache
def sound(check, seconds):
    "A check that fails without a mutant says nothing"
    if (what := outcome(None, check, seconds))!='passed': raise SystemExit(f'{check} without a mutant: {what}')

def judged(m, seconds):
    "Whether a test sees a mutant, and which"
    start,tried = time.perf_counter(),0
    for check in dict.fromkeys([*m.checks, *full[m.module]]):
        sound(check, seconds)
        what = outcome(m, check, seconds)
        tried += 1
        if what!='passed': break
    return dict(module=m.module, about=m.about, old=m.old, new=m.new, outcome='survived' if what=='passed' else 'killed', by=None if what=='passed' else check+(' (too long)' if what=='too long' else ''),
                checks=tried, seconds=round(time.perf_counter()-start, 1))

def versions():
    from importlib.metadata import version
    return {o:version(o) for o in ('torch', 'transformers', 'peft', 'pytest')} | dict(python=platform.python_version())

@call_parse
def main(
    only:str='', # Modules, separated by commas
    seconds:int=600, # Most for one check
):
    if bad := [o for o in map(wrong, mutants) if o]: raise SystemExit('\n'.join(bad))
    chosen = [m for m in mutants if not only or m.module in only.split(',')]
    for o in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'matplotlib'): import_module(o)   # once, before the forks; nothing of ours
    assert not any(o=='ist_nb' or o.startswith('ist_nb.') for o in sys.modules)
    rows = []
    for m in chosen:
        rows.append(r := judged(m, seconds))
        print(f"{r['outcome']:8} {r['seconds']:6.1f} s  {m.module}: {m.about}{'' if r['by'] is None else ' -- '+r['by']}", flush=True)
    old = json.loads(out.read_text())['rows'] if only and out.exists() else []
    rows = [o for o in old if o['module'] not in only.split(',')]+rows
    out.write_text(json.dumps(dict(command='python benchmarks/mutants.py', versions=versions(), hardware=f'{platform.machine()} CPU, one thread',
                                   counts=dict(Counter(r['outcome'] for r in rows)), rows=rows), indent=1)+'\n')
    print(Counter(r['outcome'] for r in rows))
