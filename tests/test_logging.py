"What a run tells TensorBoard and its kin, and what it leaves alone"
import time
import pytest,torch
from datasets import Dataset
from peft import LoraConfig,get_peft_model
from transformers import LlamaConfig,LlamaForCausalLM,Trainer,TrainerCallback,TrainingArguments
from transformers.trainer_callback import CallbackHandler,PrinterCallback,ProgressCallback
from ist_nb.callback import ISTCallback,_log_names,_prints
from ist_nb.config import ISTConfig
from ist_nb.plot import Live

def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                         num_attention_heads=2, num_key_value_heads=2)
    lora = LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM')
    return get_peft_model(LlamaForCausalLM(config), lora)

data = Dataset.from_list([dict(input_ids=o, labels=o)
                          for o in ((torch.arange(12)+torch.arange(48)[:, None]*7)%32).tolist()])
few = ISTConfig(score_interval=3, score_batch_size=4)

class Reporter(TrainerCallback):
    def __init__(self): self.got = []
    def on_log(self, args, state, control, logs=None, **kwargs): self.got.append(logs | dict(step=state.global_step))
class Behind(Reporter): pass
class Drops(TrainerCallback):
    "Takes a number out of the logs, as PrinterCallback does with total_flos, and returns a control of its own"
    def on_log(self, args, state, control, logs=None, **kwargs): logs.pop('learning_rate', None); return control

def make(folder, *callbacks, steps=12, **kw):
    args = TrainingArguments(str(folder),
                             **(dict(max_steps=steps, per_device_train_batch_size=4, report_to='none', logging_steps=3,
                                     save_strategy='no', use_cpu=True, disable_tqdm=True) | kw))
    return Trainer(model(), args, train_dataset=data, eval_dataset=data.select(range(8)), callbacks=list(callbacks))

def ours(logs): return {k:v for k,v in logs.items() if k.startswith('ist/')}

@pytest.fixture
def watched(tmp_path):
    "A run, and at each step the active layers and what was counted"
    class Watch(TrainerCallback):
        def __init__(self): self.seen = []
        def on_step_end(self, args, state, control, **kwargs): self.seen.append(cb.ist.active.tolist())
    cb,watch,front,behind = ISTCallback(few),Watch(),Reporter(),Behind()
    t = make(tmp_path, front, cb, watch, behind, eval_strategy='steps', eval_steps=6)
    t.train()
    return t,cb,watch.seen,front.got,behind.got

def test_numbers(watched):
    t,cb,active,front,behind = watched
    assert front==behind
    train = [o for o in front if 'loss' in o]
    assert [o['step'] for o in train]==[3, 6, 9, 12]
    for k,o in enumerate(train):
        mine,steps = ours(o),active[3*k:3*k+3]
        assert len(mine)==2*4+3
        assert mine['ist/active_fraction']==pytest.approx(sum(len(a)/4 for a in steps)/3)
        assert mine['ist/depth']==pytest.approx(sum((4-min(a))/4 for a in steps)/3)
        counted = [sum(i in a for a in active[:3*k+3]) for i in range(4)]
        assert [mine[f'ist/times_active/layer_0{i}'] for i in range(4)]==counted
        # the update of a step comes before it
        scored = [h['importance'] for h in cb.ist.history if h['step']<o['step']]
        assert [mine[f'ist/importance/layer_0{i}'] for i in range(4)]==pytest.approx(scored[-1] if scored else [0.]*4)
        # what TensorBoard and MLflow accept
        assert all(isinstance(v, (int, float)) for v in mine.values())
    assert not any(ours(o) for o in front if 'loss' not in o)
    assert any('eval_loss' in o for o in front)
    assert any('train_loss' in o for o in front)

def test_history_stays(watched):
    t,*_ = watched
    assert t.state.log_history and not any(ours(o) for o in t.state.log_history)

def test_terminal_stays(tmp_path, capsys):
    cb,front = ISTCallback(few),Reporter()
    make(tmp_path, front, cb).train()
    assert len(ours(front.got[0]))==11
    out = capsys.readouterr().out
    assert "'loss'" in out and 'ist/' not in out

@pytest.mark.parametrize('late', [False, True])
def test_order_does_not_matter(tmp_path, late):
    "In front, at the end, and added behind the printer once the Trainer is there"
    first,cb,last = Reporter(),ISTCallback(few),Behind()
    t = make(tmp_path, first, *([] if late else [cb, Drops(), last]))
    if late: t.add_callback(cb); t.add_callback(last)
    before = list(t.callback_handler.callbacks)
    t.train()
    assert [ours(o) for o in first.got]==[ours(o) for o in last.got] and len(ours(first.got[0]))==11
    assert ('learning_rate' in last.got[0])==late     # what one callback takes out is gone for those behind it, as ever
    assert t.callback_handler.callbacks==before

def test_quiet(tmp_path):
    front = Reporter()
    make(tmp_path, front, ISTCallback(few, log=False)).train()
    assert front.got and not any(ours(o) for o in front.got)

def test_no_importance(tmp_path):
    front = Reporter()
    make(tmp_path, front, ISTCallback(ISTConfig.rst(n_active=2))).train()
    assert set(ours(front.got[0]))=={'ist/active_fraction', 'ist/depth',
                                     *(f'ist/times_active/layer_0{i}' for i in range(4))}
    assert front.got[0]['ist/active_fraction']==0.5

def test_without_ist_nothing_changes(tmp_path):
    "The handler is transformers' own for runs without IST: each callback once, with the very same dictionary"
    class Same(Reporter):
        def on_log(self, args, state, control, logs=None, **kwargs):
            self.got.append(id(logs)); assert kwargs['model'] is not None
    ISTCallback(few)      # the first of a process wraps the handler, for all runs after it
    a,b = Same(),type('Other', (Same,), {})()
    make(tmp_path, a, b, steps=3).train()
    assert a.got==b.got and len(a.got)==2
    assert CallbackHandler.on_log.__wrapped__.__module__=='transformers.trainer_callback'

def test_training_is_the_same(tmp_path):
    def weights(log):
        t = make(tmp_path, ISTCallback(few, log=log)); t.train()
        return [p.detach().clone() for p in t.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a,b in zip(weights(True), weights(False)))

def test_resumed(tmp_path):
    cb = ISTCallback(few, log=False, live=False)
    make(tmp_path, cb, steps=4, save_strategy='steps', save_steps=2).train()
    front = Reporter()
    t = make(tmp_path, front, ISTCallback(few), steps=8)
    t.train(resume_from_checkpoint=str(tmp_path/'checkpoint-4'))
    # steps 1 to 6, one layer each
    assert sum(ours(front.got[-2])[f'ist/times_active/layer_0{i}'] for i in range(4))==6
    t = make(tmp_path, front, ISTCallback(few, log=False), steps=8, restore_callback_states_from_checkpoint=True)
    t.train(resume_from_checkpoint=str(tmp_path/'checkpoint-4'))
    new = next(o for o in t.callback_handler.callbacks if isinstance(o, ISTCallback))
    assert new.log is False and new.live is False

def test_names_sort():
    for labels in (list(range(101)), [f'decoder.{i}' for i in range(12)]):
        names = _log_names(labels)
        assert sorted(names)==names and len({len(o) for o in names})==1
    assert _log_names([7])==['layer_07']

def test_printers_are_known():
    from transformers.utils.notebook import NotebookProgressCallback
    from trl import RichProgressCallback
    class Mine(ProgressCallback): pass
    assert all(_prints(object.__new__(o)) for o in (PrinterCallback, ProgressCallback, NotebookProgressCallback,
                                                    RichProgressCallback, Mine))
    assert not _prints(Reporter())

def test_trl(tmp_path):
    "SFTTrainer puts numbers of its own into the logs"
    from tokenizers import Tokenizer,models,pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig,SFTTrainer
    words = models.WordLevel({str(i):i for i in range(32)}, unk_token='0')
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token='1', pad_token='1', unk_token='0')
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rows = Dataset.from_list([dict(text=' '.join(map(str, o['input_ids']))) for o in data])
    first,last = Reporter(),Behind()
    args = SFTConfig(str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to='none', logging_steps=2,
                     save_strategy='no', use_cpu=True, gradient_checkpointing=False, bf16=False, disable_tqdm=True)
    t = SFTTrainer(model(), args, train_dataset=rows, processing_class=tok, callbacks=[first, ISTCallback(few), last])
    t.train()
    train = [o for o in first.got if 'loss' in o]
    assert first.got==last.got and len(train)==3 and all(len(ours(o))==11 and 'mean_token_accuracy' in o for o in train)

def test_tensorboard(tmp_path):
    "The real writer, which stands in front of our callback, and its file read back"
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cb = ISTCallback(few)
    t = make(tmp_path/'run', cb, report_to='tensorboard')
    t.train()
    logs = [p.parent for p in tmp_path.rglob('events.out.tfevents*')]
    events = EventAccumulator(str(logs[0])); events.Reload()
    tags = [o for o in events.Tags()['scalars'] if 'ist/' in o]
    each = [f'{k}/layer_0{i}' for k in ('importance', 'times_active') for i in range(4)]
    assert sorted(tags)==sorted(f'train/ist/{o}' for o in ['active_fraction', 'depth', 'score_seconds', *each])
    last = [events.Scalars(f'train/ist/importance/layer_0{i}')[-1] for i in range(4)]
    assert [o.value for o in last]==pytest.approx(cb.ist.importance.tolist(), abs=1e-6) and {o.step for o in last}=={12}
    assert [o.value for o in events.Scalars('train/ist/active_fraction')]==[0.25]*4

# --- shown while it trains
def test_live_by_default_only_in_a_notebook(tmp_path, monkeypatch, capsys):
    cb = ISTCallback(few); make(tmp_path, cb, steps=3).train()
    assert cb.show is None
    monkeypatch.setattr(Live, 'in_notebook', staticmethod(lambda: True))
    off = ISTCallback(few, live=False); make(tmp_path, off, steps=3).train()
    assert off.show is None
    shown = []
    monkeypatch.setattr(Live, '_picture', lambda self, state: shown.append(state['t']))
    on = ISTCallback(few); make(tmp_path, on, steps=3).train()
    assert shown[0]==1 and shown[-1]==3

def test_live_in_a_terminal(tmp_path, capsys):
    make(tmp_path, ISTCallback(few, live=True), steps=6).train()
    lines = [o for o in capsys.readouterr().out.splitlines() if o.startswith('step ')]
    # the first, and the last whatever the clock says
    assert len(lines)==2 and lines[0].split()[1]=='1' and lines[-1].split()[1]=='6'

def test_live_only_on_the_main_process(tmp_path):
    from types import SimpleNamespace
    cb = ISTCallback(few, live=True)
    cb._begin_show(SimpleNamespace(is_world_process_zero=False)); assert cb.show is None
    cb._begin_show(SimpleNamespace(is_world_process_zero=True)); assert cb.show is not None

def test_live_keeps_to_its_share(monkeypatch):
    "However slow the drawing: by a clock that only moves when somebody works"
    clock = [100.]
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    live = Live(notebook=True, share=0.02, every=0.)
    def draw(state): clock[0] += 0.3
    live._picture = draw
    start = clock[0]
    for t in range(20_000):
        clock[0] += 0.005
        live.update(lambda: dict(t=t))
    spent = clock[0]-start
    assert live.seconds==pytest.approx(0.3*round(live.seconds/0.3))
    assert 5<=live.seconds/0.3
    assert live.seconds<=0.02*spent+0.3

def test_showing_changes_nothing(tmp_path, monkeypatch):
    import IPython.display as D
    monkeypatch.setattr(Live, 'in_notebook', staticmethod(lambda: True))
    shown = []
    monkeypatch.setattr(D, 'display', lambda o, display_id: shown.append(o)
                        or type('Handle', (), dict(update=lambda self, o: shown.append(o)))())
    def weights(live):
        t = make(tmp_path, ISTCallback(few, live=live), steps=6); t.train()
        return [p.detach().clone() for p in t.model.parameters() if p.requires_grad],torch.get_rng_state()
    (a,rng_a),(b,rng_b) = weights(True),weights(False)
    assert shown and all(torch.equal(x, y) for x,y in zip(a, b)) and torch.equal(rng_a, rng_b)

def test_a_picture_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    import warnings
    def broken(self, state): raise OSError('no fonts')
    monkeypatch.setattr(Live, '_line', broken)
    cb = ISTCallback(few, live=True)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        assert make(tmp_path, cb, steps=4).train().global_step==4
    assert sum('OSError: no fonts' in str(o.message) for o in w)==1

in_kernel = """
import sys; sys.path.insert(0, {tests!r})
from test_logging import *
t = make({folder!r}, ISTCallback(few), steps=12)
import ist_nb.plot; ist_nb.plot.Live.__init__.__defaults__ = (1000., 0., None)   # so that a short run is shown often
t.train()
"""

@pytest.mark.slow
def test_in_a_real_notebook(tmp_path):
    "A kernel of Jupyter gets one picture, which is replaced while the run goes on"
    from pathlib import Path
    from jupyter_client.manager import start_new_kernel
    manager,client = start_new_kernel(kernel_name='python3')
    messages = []
    try:
        reply = client.execute_interactive(in_kernel.format(tests=str(Path(__file__).parent), folder=str(tmp_path)),
                                           output_hook=messages.append, timeout=300)
        assert reply['content']['status']=='ok', reply['content']
    finally: client.stop_channels(); manager.shutdown_kernel(now=True)
    pictures = [m for m in messages if 'image/png' in m['content'].get('data', {})]
    kinds,ids = [m['msg_type'] for m in pictures],{m['content']['transient']['display_id'] for m in pictures}
    assert kinds[0]=='display_data' and len(kinds)>2 and set(kinds[1:])=={'update_display_data'} and len(ids)==1
