"Pretrain pico, the small language model inside the package, from OpenStax textbooks"
import json,math,platform,random,sys,time
from pathlib import Path
import torch,torch.nn.functional as F,tokenizers,transformers
from fastcore.script import call_parse
from tokenizers import Tokenizer,decoders,models,pre_tokenizers,trainers
from transformers import GenerationConfig,LlamaConfig,LlamaForCausalLM,PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama
from make_physics import held_out,read_book

assets = Path(__file__).parent.parent/'ist_nb/assets'
eot,pad = '<|endoftext|>','<|pad|>'
special = [eot, pad, '<|system|>', '<|user|>', '<|assistant|>']
chat = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
        "{% if m['role']=='assistant' %}{% generation %}{{ m['content'] + '<|endoftext|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")

def split_books(books, every=40):
    """Texts for training, one module in `every` of the same books for validation, the book held out whole, and its
    shipped test rows"""
    books = {p.name.split('.')[0]:read_book(p) for p in sorted(books.glob('*.jsonl.gz'))}
    physics = [r['text'] for r in books.pop(held_out)]
    texts = sorted({r['text'] for rows in books.values() for r in rows})
    random.Random(42).shuffle(texts)
    n = len(texts)//every
    with (assets/'physics/test.jsonl').open(encoding='utf-8') as f: test = [json.loads(l)['text'] for l in f]
    return dict(train=texts[n:], valid=texts[:n], physics=physics, physics_test=test)

def make_tokenizer(texts, vocab):
    "A byte-level BPE tokenizer of `vocab` tokens trained on `texts`"
    t = Tokenizer(models.BPE())
    t.pre_tokenizer,t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False),decoders.ByteLevel()
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    res = PreTrainedTokenizerFast(tokenizer_object=t, bos_token=eot, eos_token=eot, pad_token=pad, model_max_length=512,
                                  additional_special_tokens=special[2:], clean_up_tokenization_spaces=False)
    res.chat_template = chat
    return res

def make_model(tok, layers, hidden, heads, mlp):
    "A Llama with random weights, two query heads to a key-value head and tied embeddings"
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads//2, max_position_embeddings=512, tie_word_embeddings=True, use_cache=False,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))

def stream(tok, texts):
    "Tokens of `texts`, each text after a <|endoftext|>"
    return torch.tensor([i for t in tok(texts, verbose=False)['input_ids'] for i in [tok.bos_token_id]+t]) # [tokens]

def windows(ids, n=512, offset=0):
    "Every `n` tokens of `ids` with the one before them, so that each is predicted once"
    return ids[offset:].unfold(0, n+1, n) # [windows, n+1]

def dropout(model, p):
    "Drop a share `p` of what each layer's attention and MLP add to the residual stream: Llama has no such option"
    for l in model.model.layers:
        for o in (l.self_attn.o_proj, l.mlp.down_proj):
            o.register_forward_hook(lambda m,i,o: F.dropout(o, p, m.training))

def loss_fn(model, x):
    "Mean cross-entropy of the windows `x` [B, T+1], in nats per token"
    return F.cross_entropy(model(x[:,:-1]).logits.float().flatten(0,1), x[:,1:].flatten())

@torch.no_grad()
def evaluate(model, ids, bs=32):
    "Mean loss of `model` on the tokens `ids`, in nats per token"
    model.eval()
    return sum(loss_fn(model, x).item()*len(x) for x in windows(ids).split(bs))/len(windows(ids))

class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn='match_rms_adamw'`, one batched Newton-Schulz iteration for all matrices of
    a shape"""
    def __init__(self, ps, lr, weight_decay, momentum=0.95):
        super().__init__(ps, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            shapes = {}
            for p in g['params']: shapes.setdefault(p.shape, []).append(p)
            for sh,ps in shapes.items():
                gr = [p.grad for p in ps]
                ms = [self.state[p].setdefault('m', torch.zeros_like(p)) for p in ps]
                torch._foreach_lerp_(ms, gr, 1-g['momentum'])
                x = torch.stack(torch._foreach_lerp(gr, ms, g['momentum'])).bfloat16()
                if sh[0]>sh[1]: x = x.mT
                x = x/(x.norm(dim=(1,2), keepdim=True)+1e-7)
                for _ in range(5):
                    a = x@x.mT
                    x = 3.4445*x + (-4.7750*a + 2.0315*a@a)@x
                if sh[0]>sh[1]: x = x.mT
                torch._foreach_mul_(ps, 1-g['lr']*g['weight_decay'])
                torch._foreach_add_(ps, list(x.float().unbind()), alpha=-g['lr']*0.2*max(sh)**0.5)

def optimizers(model, opt, lr, wd):
    "AdamW for all, or for what is no matrix of a layer if `opt` is muon; decay of matrices alone"
    mats = [p for n,p in model.named_parameters() if p.ndim==2 and 'layers' in n]
    emb,vecs = [model.model.embed_tokens.weight],[p for p in model.parameters() if p.ndim==1]
    adam = [dict(params=emb+(mats if opt=='adamw' else []), weight_decay=wd), dict(params=vecs, weight_decay=0.)]
    opts = [torch.optim.AdamW(adam, lr=lr, betas=(0.9,0.98), fused=True)]
    return opts + ([Muon(mats, lr=lr, weight_decay=wd)] if opt=='muon' else [])

def train(model, ids, valid, opt, epochs, lr, wd, bs, drop, mode, seed, max_steps, warmup=0.05, T=512):
    """Train `model` on the stream `ids`, cut at another place in each epoch; the rate rises, then falls as a half
    cosine to 0"""
    dropout(model, drop)
    dev = ids.device
    step_fn = torch.compile(loss_fn, mode=mode) if mode!='none' else loss_fn
    opts = optimizers(model, opt, lr, wd)
    per = (len(ids)-1-T)//T//bs
    steps = max_steps or per*epochs
    sched = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i+1)/(warmup*steps), (1+math.cos(math.pi*i/steps))/2))
             for o in opts]
    model.train()
    log,rnd = [],torch.Generator().manual_seed(seed)
    for i in range(steps):
        if i%per==0:
            ws = windows(ids, T, torch.randint(T, (1,), generator=rnd).item())
            order = torch.randperm(len(ws), generator=rnd).to(dev)
        x = ws[order[i%per*bs:(i%per+1)*bs]]
        with torch.autocast(dev.type, torch.bfloat16): loss = step_fn(model, x)
        loss.backward()
        for o,s in zip(opts, sched): o.step(); s.step(); o.zero_grad()
        if i%(steps//8+1)==0 or i==steps-1:
            log.append((i, round(loss.item(), 4), round(evaluate(model, valid), 4)))
            model.train()
            print(*log[-1], flush=True)
    return log

@call_parse
def main(
    books:Path,                             # Folder of the textbooks: one `*.jsonl.gz` a book
    out:Path=assets/'pico',           # Folder to write the model to
    results:Path=assets.parent.parent/'benchmarks/results/pico.json', # File to write the losses to
    vocab:int=4096,       # Tokens
    layers:int=16,        # Layers
    hidden:int=128,       # Width of the residual stream
    heads:int=4,          # Query heads
    mlp:int=384,          # Width of the MLP
    epochs:int=25,        # Passes through the text
    opt:str='muon',       # adamw, or muon for the layers' matrices
    lr:float=3e-3,        # Peak learning rate
    wd:float=0.5,         # Weight decay
    drop:float=0.1,       # Dropout on the residual branches
    bs:int=32,            # Windows of 512 tokens in a step
    mode:str='reduce-overhead', # Mode of `torch.compile`, or none
    max_steps:int=0,      # Steps, if not the whole epochs
    seed:int=42,          # Seed
):
    start = time.perf_counter()
    dev = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision('high')
    # the attention is causal without one, and the kernels without one are faster
    modeling_llama.create_causal_mask = lambda *a,**k: None
    texts = split_books(books)
    tok = make_tokenizer(texts['train'], vocab)
    ids = {k:stream(tok, v).to(dev) for k,v in texts.items()}
    model = make_model(tok, layers, hidden, heads, mlp).to(dev)
    print({k:len(v) for k,v in ids.items()}, f'{model.num_parameters():,} parameters', flush=True)
    log = train(model, ids['train'], ids['valid'], opt, epochs, lr, wd, bs, drop, mode, seed, max_steps)
    model.half().float() # losses of what is saved
    res = {}
    for k in ('valid','physics','physics_test'):
        nats,n = evaluate(model, ids[k]),sum(len(t.encode()) for t in texts[k])
        res[k] = dict(nats_per_token=round(nats, 4), bits_per_byte=round(nats*len(ids[k])/n/math.log(2), 4),
                      tokens=len(ids[k]), bytes=n)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
                                               pad_token_id=tok.pad_token_id)
    model.half().save_pretrained(out)
    model.config.dtype = torch.float32 # so that it loads as float32, in which any processor trains it
    model.config.save_pretrained(out)
    tok.save_pretrained(out)
    cfg = dict(vocab=vocab, layers=layers, hidden=hidden, heads=heads, mlp=mlp, epochs=epochs, opt=opt, lr=lr, wd=wd,
               drop=drop, bs=bs, seed=seed)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(dict(
        parameters=model.num_parameters(), train=dict(tokens=len(ids['train'])), **res, config=cfg, log=log,
        seconds=round(time.perf_counter()-start),
        command=' '.join(['python']+sys.argv), hardware=torch.cuda.get_device_name() if dev.type=='cuda' else 'CPU',
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                      tokenizers=tokenizers.__version__)),
        indent=1)+'\n')
    print(json.dumps(res))
