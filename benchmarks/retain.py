"""What does fine-tuning make a pretrained model forget, and what keeps it? Adapters are trained on a task in many ways;
some are then scaled, faded or healed. Each is judged by its loss on documents of the task that trained and chose
nothing, and by its divergence from the model before, on text that the model wrote itself. `--model` takes any causal
language model of the hub, or a folder. DATA holds `domains`, `commonsense`, `math`, `textbooks` and
`textbooks_research`; or give tasks of your own as `--files name=FILE;name=FILE`, in any format of `ist_finetune`."""
import gzip,json,random,re,sys,tempfile,time,traceback
from statistics import mean
from pathlib import Path
import torch, torch.multiprocessing as mp
from peft import LoraConfig,get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM,AutoTokenizer
from ist_nb import IST,ISTConfig,find_layers
from ist_nb.keep import Keep,_divergence,_gated,_set_gates,fade,own_text
from ist_nb.suppression import _adapters_off
from benchmarks import frontier,record

length,rows_a_step = 256,16
freezing = dict(sampler='top', schedule='shrink', n_active=0.4)
# ---------------------------------------------------------------------------------------------------------- the data
def lines(path):
    with (gzip.open if path.suffix=='.gz' else open)(path, 'rt') as f: return [json.loads(o) for o in f]

def shuffled(o, seed=0):
    o = list(o)
    random.Random(seed).shuffle(o)
    return o

class Rows:
    "Token ids, which of them have a label, and the document of each row, padded to equal length"
    def __init__(self, pairs): # pairs: token ids, number of those that are given, document
        pairs = [o for o in pairs if len(o[0])<=length]
        n,w = len(pairs),max(len(o[0]) for o in pairs)
        self.ids,self.labels = torch.zeros(n, w, dtype=torch.long),torch.full((n, w), -100)
        self.mask,self.doc = torch.zeros(n, w, dtype=torch.long),torch.tensor([d for *_,d in pairs])
        for i,(x,given,_) in enumerate(pairs):
            x = torch.tensor(x)
            self.ids[i,:len(x)],self.mask[i,:len(x)] = x,1
            self.labels[i,max(1, given):len(x)] = x[max(1, given):]
    def batch(self, ix, device): # only as wide as it must be
        w = -(-int(self.mask[ix].sum(1).max())//16)*16
        return {k:v[ix][:, :w].to(device) for k,v in (('input_ids', self.ids), ('labels', self.labels),
                                                     ('attention_mask', self.mask))}
    def batches(self, device, k=32): return [self.batch(ix, device) for ix in torch.arange(len(self.ids)).split(k)]
    def first(self, k):
        for o in ('ids', 'labels', 'mask', 'doc'): setattr(self, o, getattr(self, o)[:k])
    def __len__(self): return len(self.ids)

class Reader:
    "Turns documents, chats and questions into rows"
    def __init__(self, tok):
        self.tok = tok
        self.bos = tok('a')['input_ids'][:1] if tok.bos_token_id==tok('a')['input_ids'][0] else []
    def ids(self, s): return self.tok(s, add_special_tokens=False, verbose=False)['input_ids']
    def text(self, docs, most=None): # full rows of one document each, at most so many of each
        out,w = [],length-len(self.bos)
        for d,s in enumerate(docs):
            x = self.ids(s)
            cut = [(self.bos+x[i:i+w], len(self.bos), d) for i in range(0, len(x)-w+1, w)]
            out += cut if most is None else random.Random(d).sample(cut, min(most, len(cut)))
        return out
    def pair(self, prompt, answer, d=0):
        x = self.bos+self.ids(prompt)
        return x+self.ids(answer)+[self.tok.eos_token_id],len(x),d
    def chat(self, question, answer, d=0):
        if not self.tok.chat_template: return self.pair(f'Problem: {question}\nSolution: ', answer, d)
        turn = [dict(role='user', content=question)]
        x = self.ids(self.tok.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        return x+self.ids(answer)+[self.tok.eos_token_id],len(x),d

def split(make, docs, sizes=(48, 96, 96)):
    "Documents that train, that choose gates, that tune settings, and that judge"
    docs = shuffled(docs)
    n = len(docs)
    a,b,c = n*2//3,n*3//4,n*7//8
    parts = make(docs[:a], None),*(shuffled(make(o, 3))[:k] for o,k in zip((docs[a:b], docs[b:c], docs[c:]), sizes))
    return dict(zip(('train', 'pick', 'choose', 'test'), map(Rows, parts)))

def cloze(row): # of the LLM-Adapters form: question, options, which is right
    m = re.search(r'question: (.*?)\n\n((?:Answer|Solution)1:.*?)\n\nAnswer format', row['instruction'], re.S)
    options = [o.strip() for o in re.split(r'(?:Answer|Solution)\d: ?', m[2])[1:]]
    return m[1].strip(),options,int(re.search(r'\d', row['answer'])[0])-1

def read_tasks(tok, data):
    "The five tasks, and what else is looked at: books of other kinds, and questions"
    r,tasks = Reader(tok),{}
    for name in ('german', 'python'):
        docs = [o['text'] for o in lines(data/f'domains/{name}.jsonl.gz')]
        tasks[name] = split(r.text, docs)
    many = tasks['german']['train']
    few = [(many.ids[i].tolist(), 1, 0) for i in shuffled(range(len(many)), 5)[:64]]
    tasks['few'] = dict(tasks['german'], train=Rows(few[:48]), pick=Rows(few[48:]), all=Rows(few))
    def sets(names, part):
        return [cloze(o) for s in names for o in json.loads((data/f'commonsense/{s}/{part}.json').read_text())]
    def ask(q, o, d=0): return r.pair(f'Question: {q}\nAnswer:', ' '+o, d)
    arc = 'ARC-Easy', 'ARC-Challenge'
    train = [ask(q, o[y], i) for i,(q,o,y) in enumerate(shuffled(sets((*arc, 'openbookqa'), 'train')))]
    test = [ask(q, o[y], i%64) for i,(q,o,y) in enumerate(shuffled(sets(arc, 'test')))]
    parts = dict(train=train[768:], pick=train[:768], choose=test[:768], test=test[768:1792])
    tasks['cloze'] = {k:Rows(o) for k,o in parts.items()}
    sums = json.loads((data/'math/gsm8k/test.json').read_text())
    sums = [(o['instruction'], o['output'].strip().removeprefix('A: ')) for o in sums]
    tasks['chat'] = split(lambda docs, k: [r.chat(*o, d=i) for i,o in enumerate(docs)], sums, (64, 150, 160))
    def book(path): return Rows(shuffled(r.text([o['text'] for o in lines(data/f'{path}.jsonl.gz')][::6], 2))[:24])
    books = {b.split('/')[1]:book(b) for b in ('textbooks_research/psychology', 'textbooks/introduction-business',
                                               'textbooks_research/us-history')}
    def item(q, options, y): return [ask(q, o)[:2] for o in options],y,list(map(len, options))
    questions = {s:[item(*o) for o in shuffled(sets([s], 'test'))[-400:]] for s in ('ARC-Easy', 'openbookqa', 'piqa')}
    return dict(tasks=tasks, books=books, questions=questions)

def read_files(tok, files):
    "Tasks of your own"
    from ist_nb.data import load_data    # which needs `datasets`
    r,tasks = Reader(tok),{}
    def make(docs, k):
        if 'text' in docs[0]: return r.text([o['text'] for o in docs], k)
        return [r.pair(o['prompt'], o['completion'], d) if 'prompt' in o else
                r.chat(o['messages'][0]['content'], o['messages'][-1]['content'], d) for d,o in enumerate(docs)]
    for name,path in files.items(): tasks[name] = split(make, list(load_data(path, test_fraction=0.01).train))
    return dict(tasks=tasks, books={}, questions={})
# ---------------------------------------------------------------------------------------------------------- judging
def row_losses(model, b):
    logits,y = model(input_ids=b['input_ids'], attention_mask=b['attention_mask']).logits[:, :-1],b['labels'][:, 1:]
    counts = y!=-100
    losses = torch.zeros(counts.shape, device=y.device)
    losses[counts] = F.cross_entropy(logits[counts].float(), y[counts], reduction='none')
    return losses.sum(1),counts.sum(1)

def at_once(model, most): # rows of a batch whose logits fit
    return max(1, min(most, most*2**24//(length*model.config.vocab_size)))

def mean_loss(model, rows, device, each=False):
    total,n = (torch.cat(o) for o in zip(*(row_losses(model, b) for b in rows.batches(device, at_once(model, 32)))))
    loss = (total.sum()/n.sum()).item()
    return (loss, total) if each else loss

def per_document(rows, total):
    "The mean loss of each document, and how many tokens it has"
    docs,at = rows.doc.unique(return_inverse=True)
    add = lambda o: torch.zeros(len(docs), dtype=torch.float).index_add(0, at, o.float().cpu())
    n = add((rows.labels[:, 1:]!=-100).sum(1))
    return [round(o, 4) for o in (add(total)/n).tolist()],n.long().tolist()

def row_divergences(model, kept, device):
    "KL from the model before, in nats a token, of each row"
    rows,res = max(1, min(16, 2**27//(length*model.config.vocab_size))),[]
    for ix in torch.arange(len(kept['input_ids'])).split(rows):
        ids,counts = kept['input_ids'][ix].to(device),(kept['labels'][ix][:, 1:]!=-100).to(device)
        def log_p(): return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        with _adapters_off(model): base = log_p()
        kl = F.kl_div(log_p(), base, log_target=True, reduction='none').sum(-1)
        res += ((kl*counts).sum(1)/counts.sum(1)).tolist()
    return res

def accuracy(model, items, device):
    flat = [(ids, k, 0) for options,*_ in items for ids,k in options]
    scores = torch.cat([-row_losses(model, b)[0] for b in Rows(flat).batches(device, at_once(model, 128))]).tolist()
    right = i = 0
    for options,y,chars in items:
        s = [v/c for v,c in zip(scores[i:], chars)]
        i += len(options)
        right += s.index(max(s))==y
    return right/len(items)

closely = 'before', 'trained', 'scaled', 'faded', 'trained on'    # also by other text, the first two by questions
@torch.no_grad()
def measure(model, found, task, kept, judge, device, brief=False, **about):
    "One point: loss on the task, divergence on the model's own text, and more unless `brief`"
    model.eval()
    rows = found['tasks'][task][judge]
    loss,each = mean_loss(model, rows, device, each=True)
    kl = row_divergences(model, kept, device)
    other = 'python' if task!='python' else 'german'
    res = about | dict(task=loss, kl=mean(kl), kl_empty=mean(kl[::2]), kl_chat=mean(kl[1::2]))
    if about['name'] in closely and not brief:
        res |= {k:mean_loss(model, o, device) for k,o in found['books'].items()}
        if other in found['tasks']: res['other'] = mean_loss(model, found['tasks'][other]['choose'], device)
        if judge=='test': res |= dict(documents=per_document(rows, each)[0], kl_rows=[round(o, 5) for o in kl])
        if about['name'] in closely[:2]:
            res |= {f'acc {k}':accuracy(model, o, device) for k,o in found['questions'].items()}
    return res
# --------------------------------------------------------------------------------------------------------- one run
def run(job, base, found, own, judge, device):
    "Train an adapter as `job` says, and judge it, and what can be made of it afterwards"
    start,task = time.time(),job['task']
    torch.manual_seed(job['seed'])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.config.use_cache = False
    r = job.get('r', 16)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2*r, target_modules='all-linear', task_type='CAUSAL_LM',
                                             use_rslora=job.get('rslora', False))).to(device)
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.float()
    layers,amp = find_layers(model),torch.autocast(device.split(':')[0], torch.bfloat16)
    points,d = [],found['tasks'][task]
    def note(name, **kw):
        rows = found,task,own[judge],judge
        with amp: points.append(measure(model, *rows, device, brief='brief' in job, name=name, **kw))
    if job.get('base'):
        with model.disable_adapter(): note('before')
    took = descend(job, model, layers, d, own, job['steps'], amp, device, note)
    note('trained')
    after(job, model, d, own, note, amp, device)
    if job.get('base') and judge=='test': job['doc_tokens'] = per_document(d['test'], torch.zeros(len(d['test'])))[1]
    return job | dict(points=points, train_seconds=took, seconds=time.time()-start)

def descend(job, model, layers, d, own, steps, amp, device, note=None):
    "Train; the seconds that it took, without those of `note`"
    N,lr,seed = len(layers),job['lr'],job['seed']
    rates = [lr*job.get('falling', 1)**(N-1-i) for i in range(N)]
    groups = [dict(params=o.params, lr=v) for o,v in zip(layers, rates)]
    opt = torch.optim.AdamW(groups, weight_decay=job.get('decay', 0.))
    warm = max(1, min(20, steps//5))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min((t+1)/warm, max(0., (steps-t)/(steps-warm))))
    config = ISTConfig(**job.get('ist', dict(sampler='uniform', n_active=1.)), seed=seed)
    ist = IST(model, config, n_steps=steps, parts=None if config.fast else [])
    if job.get('keep'): ist.add(Keep(own['pick'], job['keep'], job.get('every', 4)))
    train = d['all'] if 'all' in d and not job.get('apart') else d['train']     # `apart`: some rows choose gates
    def order(n): # of rows, epoch after epoch
        g = torch.Generator().manual_seed(seed)
        while True: yield from torch.randperm(n, generator=g).tolist()
    def clock():
        if device!='cpu': torch.cuda.synchronize()
        return time.perf_counter()
    rows,took,begun = order(len(train)),0.,clock()
    if share := job.get('replay', 0): again = order(len(own['pick']['input_ids']))
    for t in range(steps):
        b = train.batch(torch.tensor([next(rows) for _ in range(rows_a_step)]), device)
        model.train()
        with amp, ist.step():
            F.cross_entropy(*labelled(model, b)).backward()
            if share and t%4==0: # as often, and as many rows, as `Keep` sees
                b = {k:v[[next(again) for _ in range(8)]].to(device) for k,v in own['pick'].items()}
                (share*4*F.cross_entropy(*labelled(model, b))).backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.)
            opt.step(); schedule.step(); opt.zero_grad()
        if note and t+1 in {round(steps*o) for o in job.get('stops', ())}:
            took += clock()-begun
            note('stopped early', at=(t+1)/steps)
            begun = clock()
    took += clock()-begun
    ist.close()
    return took

def labelled(model, b):
    counts = b['labels'][:, 1:]!=-100
    logits = model(input_ids=b['input_ids'], attention_mask=b.get('attention_mask')).logits[:, :-1]
    return logits[counts].float(),b['labels'][:, 1:][counts]

def after(job, model, d, own, note, amp, device):
    "What can be done with a trained adapter: scale it, by one number or by depth, fade it, or train on with `Keep`"
    gated,post = _gated(model),job.get('post', '')
    depth = torch.tensor([int(re.search(r'\.(\d+)\.', k)[1]) for k in gated], dtype=torch.float)
    x,full = depth/depth.max(),torch.ones(len(gated))
    def at(gates, name, **kw): _set_gates(gated, gates); note(name, **kw); _set_gates(gated, full)
    chosen = d['pick'].batches(device, 8 if d['pick'].mask.float().mean()>0.5 else 64)
    if 's' in post:
        for v in (0.9, 0.8, 0.7, 0.55, 0.4): at(full*v, 'scaled', v=v)
    if 'l' in post:
        for v in (0.7, 0.4, 0.): at(v+(1-v)*x, 'line, top kept', v=v); at(1-(1-v)*x, 'line, bottom kept', v=v)
        for a in (1., 0.7, 0.4):
            for b in (1., 0.7, 0.4):
                if a!=b: at(torch.where(x<0.5, a, b), 'two numbers', v=[a, b])
    if 'g' in post:
        for price in job.get('prices', (8., 4., 2., 1.)):
            with amp: gates = fade(model, chosen, own['pick'], price, steps=job.get('fade_steps', 48))
            gates = torch.tensor(list(gates.values()))
            note('faded', price=price, gates=[round(o, 3) for o in gates.tolist()])
            _set_gates(gated, full)
            g = torch.Generator().manual_seed(job['seed'])
            each = torch.stack([gates[depth==i].mean() for i in depth.unique()])     # a gate for each layer
            at(each[depth.long()], 'faded, one gate a layer', price=price)
            at(each[torch.randperm(len(each), generator=g)][depth.long()], 'the same, layers shuffled', price=price)
            at(gates[torch.randperm(len(gates), generator=g)], 'faded, modules shuffled', price=price)
    if 'h' in post: # the adapter is trained on, with the loss and the rows of `fade`; the last use of this model
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        for price in job.get('prices', (1., 0.)):
            for p,o in zip(trained, before): p.data.copy_(o)
            opt = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.)
            for s in range(job.get('fade_steps', 64)):
                ix = torch.randperm(len(own['pick']['input_ids']), generator=torch.Generator().manual_seed(s))[:8]
                with amp:
                    for part in ix.split(4):
                        found,n = _divergence(model, {k:v[part].to(device) for k,v in own['pick'].items()})
                        (found/n*len(part)/len(ix)).backward()
                    if price: (price*F.cross_entropy(*labelled(model, chosen[s%len(chosen)]))).backward()
                opt.step(); opt.zero_grad()
                if s+1 in (16, 64): note('trained on', price=price, at=s+1)
# --------------------------------------------------------------------------------------------------------- the plans
standard = dict(german=250, python=250, cloze=250, chat=140, few=100)
# of data, or of another domain; without `on`, a job is for all tasks but the one with few data
few,both,domain,other = (dict(on=o) for o in ('few', 'few, many', 'domain', 'other'))
early,keep = dict(stops=[0.35, 0.6]),dict(lr=2e-3, post='s')
short = [ # where data are few, all is best after few steps
    dict(name='shorter', lr=2e-3, part=0.35, post='sl', **few),
    dict(name='shorter', lr=2e-3, part=0.35, post='sgh', apart=1, **few),
    dict(name='keep 3', keep=3., part=0.35, **keep, **few), dict(name='keep 10', keep=10., part=0.35, **keep, **few)]
plans = dict(
    smoke=[dict(name='keep', lr=1e-3, part=0.02, keep=1., post='slgh', prices=[2.], fade_steps=2, **both)],
    choose=[
        dict(name='LoRA', lr=2e-3, post='slgh', **early), dict(name='LoRA', lr=1e-3, post='slgh', **early),
        dict(name='LoRA', lr=2e-3, post='sl', **few, **early), dict(name='LoRA', lr=2e-3, post='sgh', apart=1, **few),
        dict(name='keep 1', keep=1., lr=2e-3, post='sg'), dict(name='keep 3', keep=3., lr=2e-3, post='sg'),
        dict(name='keep 1', keep=1., **keep, **few), dict(name='keep 3', keep=3., **keep, **few),
        *short, dict(name='keep 1', keep=1., part=0.35, **keep, **few),
        dict(name='keep 0.3', keep=0.3, **keep), dict(name='keep 10', keep=10., **keep, **both),
        dict(name='keep 1, each step', keep=1., every=1, **keep),
        dict(name='keep 1, each 16', keep=1., every=16, **keep),
        dict(name='freezing, keep 1', keep=1., ist=freezing, **keep),
        dict(name='replay', lr=2e-3, replay=0.1, post='s', **both),
        dict(name='freezing', lr=1e-3, ist=freezing, post='s'),
        dict(name='shorter', lr=2e-3, part=0.35, post='s'), dict(name='rank 4', lr=2e-3, r=4, post='s'),
        dict(name='rates falling', lr=2e-3, falling=0.9, post='s'), dict(name='LoRA', lr=5e-4, post='s', **early),
        dict(name='rsLoRA', lr=5e-4, rslora=True, post='s'), dict(name='weight decay', lr=2e-3, decay=0.1, post='s'),
        # on a domain the highest rate was best
        dict(name='LoRA', lr=4e-3, post='slgh', **domain, **early),
        dict(name='LoRA', lr=4e-3, post='s', **other, **early),
        *(dict(name=f'keep {o:g}', keep=o, lr=4e-3, post='s', **domain) for o in (1., 3., 10.)),
        dict(name='replay', lr=4e-3, replay=0.1, post='s', **domain),
        dict(name='LoRA', lr=8e-3, post='s', **domain, **early)],
    lengths=[ # what is learnt in how many steps: seed 0 chooses the rate of each length, other seeds judge
        *(dict(name='LoRA', lr=v, part=o, brief=1) for o in (0.2, 0.35, 0.6, 1.) for v in (1e-3, 2e-3, 4e-3)),
        *(dict(name='recommended', lr=v, part=o, brief=1, ist=freezing) for o in (0.6, 1., 1.6)
          for v in (1e-3, 2e-3, 4e-3))],
    eight=[dict(name='LoRA', lr=2e-3, brief=1), # what products in 8 bits cost, seed by seed
           dict(name='LoRA, 8 bits', lr=2e-3, brief=1, ist=dict(sampler='uniform', n_active=1., fast='compile,fp8'))])
found_out = 'points', 'doc_tokens', 'train_seconds', 'seconds', 'call'     # of a run, beside what the job says
def same(job): return json.dumps({k:job[k] for k in sorted(job) if k not in (*found_out, 'base', 'post')})   # training

def jobs(plan, tasks, seeds, name='', families=tuple(frontier.families), seen=(), calls=None):
    """What is run, all of one seed and then of the next; to judge, the longest first. The first of each task also looks
    at the model before, except for those in `seen`"""
    res,seen = [],set(seen)
    runs = frontier.choosing(name, calls) if plan=='judge' else None
    found = {t:chosen_jobs(name, t, families, runs) if plan=='judge' else wanted(plan, t) for t in tasks}
    for seed in seeds:
        for i in range(max(map(len, found.values()))):
            for t in tasks:
                if i>=len(found[t]): continue
                res.append(dict(task=t, seed=seed) | found[t][i])
                if t not in seen: res[-1]['base'] = 1; seen.add(t)
    return sorted(res, key=heavy, reverse=True) if plan=='judge' else res

def wanted(plan, task):
    "The jobs of a plan that are for a task"
    res = []
    for o in plans[plan]:
        job = {k:v for k,v in o.items() if k not in ('part', 'on')} | dict(
            steps=round(standard.get(task, 250)*o.get('part', 1)))
        kinds = ['few'] if task=='few' else ['many', 'domain' if task in ('german', 'python') else 'other']
        if any(k in o.get('on', 'many') for k in kinds): res.append(job)
    return res

def chosen_jobs(name, task, families, runs, give_up=(0.05, 0.1)):
    "What stands for one of the families, by the runs of `choose`, at a level; no more is done after training"
    runs = [r for r in runs or () if r['task']==task]
    if not any('base' in r for r in runs): sys.exit(f'Nothing is chosen for {task} and {name}: first `--plan choose`.')
    post = {'LoRA, scaled':'s', 'LoRA, by depth':'l', 'LoRA, trained on':'h', 'LoRA, faded':'g', 'a gate a layer':'g',
            'gates shuffled':'g', 'LoRA':'', 'Keep, faded':None}
    res = {}
    for family in families:
        if (letter := post.get(family, 's')) is None: continue
        for k in filter(None, (frontier.chosen(runs, family, task, o) for o in give_up)):
            res.setdefault(k, set()).update(letter)
    left = *found_out,'seed','base','task'
    by = {frontier.setting(r):{k:v for k,v in r.items() if k not in left} for r in runs}
    jobs = [by[k] | dict(post=''.join(o for o in 'slgh' if o in v)) for k,v in res.items()]
    return sorted(jobs, key=heavy, reverse=True)

def best_rate(runs, job):
    "The rate at which seed 0 has learnt most in as many steps; None before it has run"
    same = [r for r in runs if r['seed']==0 and all(r[k]==job[k] for k in ('task', 'name', 'steps'))]
    return min(same, key=frontier.final)['lr'] if same else None

def heavy(job): return bool(set('gh') & set(job.get('post', '')))     # takes the most time

def judged_on(plan, seed): return 'test' if plan=='judge' or plan in ('lengths', 'eight') and seed else 'choose'

def work(queue, done, cached, base, plan, gpu):
    torch.set_num_threads(1)
    device = 'cpu' if gpu is None else f'cuda:{gpu}'
    found,own = torch.load(cached, weights_only=False)
    while (job := queue.get()) is not None:
        try: done.put(run(job, base, found, own, judged_on(plan, job['seed']), device))
        except Exception: done.put(dict(job=job, error=traceback.format_exc()[-1500:]))
        if gpu is not None: torch.cuda.empty_cache()    # other processes share the card

def prepare(model, data, files, seed=0, rows=176, most=None):
    "Tokenise the tasks, and let the model write: rows that hold or fade, that tune, and that judge"
    tok = AutoTokenizer.from_pretrained(model)
    found = read_files(tok, files) if files else read_tasks(tok, data)
    if most: # rows of each kind
        for o in (*(o for t in found['tasks'].values() for o in t.values()), *found['books'].values()): o.first(most)
        found['questions'] = {k:o[:most] for k,o in found['questions'].items()}
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
    text = own_text(base, tok, rows, length, seed)
    h = rows//2
    mixed = torch.stack([torch.arange(h), torch.arange(h, rows)], 1).flatten()     # an empty page, a chat, and so on
    ends = 0,rows*2//11//2*2,rows*5//11//2*2,rows
    names = 'pick', 'choose', 'test'
    own = {k:{n:v.cpu()[mixed[a:b]] for n,v in text.items()} for k,a,b in zip(names, ends, ends[1:])}
    return found,own

def main(
    data:Path='',         # Folder with `domains`, `commonsense`, `math`, `textbooks` and `textbooks_research`
    model:str="HuggingFaceTB/SmolLM2-135M-Instruct", # A causal language model of the hub, or its folder
    files:str='',         # Tasks of your own in place of DATA: name=FILE, separated by semicolons
    plan:str='choose',    # choose: many settings; judge: the chosen, on fresh documents; lengths: how much is learnt
                          # in how many steps; eight: products in 8 bits or not; smoke: a few steps
    tasks:str='german chat cloze python few', # Which tasks
    seeds:str='0',        # Seeds
    choices:str='',       # To judge: the model whose runs of `choose` say how, such as SmolLM2-135M-Instruct; this
                          # one by default. A second model is then judged with settings not tuned on it
    families:str='',      # To judge: these alone of the families of `frontier`, separated by semicolons
    workers:int=1,        # Processes side by side, spread over the GPUs
    seconds:float=1e9,    # Begin no run after so many seconds
    out:Path=None,        # Where the numbers go; what is there is kept and not run again
):
    mp.set_start_method('spawn')
    start,n_gpus = time.time(),torch.cuda.device_count()
    files = dict(o.split('=', 1) for o in files.split(';') if o)
    if not files and not data: sys.exit('Give DATA, or --files name=FILE.')
    name = model.rstrip('/').split('/')[-1]
    out = out or record.results/f'retain_{plan}_{name}.json'
    earlier = json.loads(out.read_text()) if out.exists() else dict(runs=[], calls=[])
    runs,calls = earlier['runs'],earlier['calls']
    known,seen = {},{r['task'] for r in runs if 'base' in r}
    for r in runs: known.setdefault(same(r), set()).update(r.get('post', ''))
    only = [o.strip() for o in families.split(';') if o.strip()] or list(frontier.families)
    if wrong := [o for o in only if o not in frontier.families]:
        sys.exit(f'No family is called {wrong[0]!r}: {list(frontier.families)}')
    todo = jobs(plan, list(files) or tasks.split(), list(map(int, seeds.split())), choices or name, only,
                seen, earlier.get('choice_calls') if choices else None)
    todo = [o for o in todo if same(o) not in known or not known[same(o)].issuperset(o.get('post', ''))]
    if plan=='lengths': todo = [o for o in todo if not o['seed'] or o['lr']==best_rate(runs, o)]
    cached = Path(tempfile.mkdtemp())/'data.pt'
    torch.save(prepare(model, Path(data), files, **(dict(rows=22, most=4) if plan=='smoke' else {})), cached)
    print(f'{len(todo)} runs, data ready after {time.time()-start:.0f} s', flush=True)
    queue,done,flying,longest = mp.Queue(),mp.Queue(),0,{False:60., True:120.}
    args = queue,done,cached,model,plan
    pool = [mp.Process(target=work, args=(*args, i%n_gpus if n_gpus else None), daemon=True) for i in range(workers)]
    for o in pool: o.start()
    head = record.about('Loss on a task and divergence from the model before, of adapters trained, scaled and faded in '
                        'many ways', gpu=n_gpus>0, DATA=str(data), MODEL=model)
    calls.append({k:head[k] for k in ('command', 'date', 'hardware', 'versions')})
    head = {k:earlier.get(k, v) for k,v in head.items()} | dict(model=name, calls=calls)
    if choices: # what is chosen later does not change what was judged
        n = len(record.read(f'retain_choose_{choices}')['calls'])
        head |= dict(choices=choices, choice_calls=earlier.get('choice_calls', n))
    while True:
        left = seconds-(time.time()-start)
        while flying<workers and (o := next((o for o in todo if longest[heavy(o)]<left), None)):
            todo.remove(o)
            queue.put(o)
            flying += 1
        if not flying: break
        r = done.get()
        flying -= 1
        if 'error' in r: print('FAILED', r['job'], r['error'], flush=True); continue
        runs.append(r | dict(call=len(calls)-1))
        longest[heavy(r)] = max(0.9*longest[heavy(r)], r['seconds'])
        record.save(out, head, indent=None, runs=runs)
        o = next(o for o in r['points'] if o['name']=='trained')
        print(f"[{time.time()-start:.0f}] {r['name']} {r['task']} lr {r['lr']:g} seed {r['seed']}: "
              f"task {o['task']:.3f}, divergence {o['kl']:.3f} ({r['train_seconds']:.0f} of {r['seconds']:.0f} s)",
              flush=True)
    for _ in pool: queue.put(None)
    print(f'{len(runs)} runs in {out}, {len(todo)} left', flush=True)
