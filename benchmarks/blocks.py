"""What compiles a LoRA step best? Blocks one by one, with and without the loss, as CUDA graphs, or the whole model; and
what a change of the trained layers costs, for which a graph may be recorded anew. A loop without a Trainer, at the true
shapes with random weights."""
import gc,time,traceback
from statistics import median
import torch
from peft import get_peft_model
from ist_nb import find_layers
from ist_nb.speed import _cheap,compile_blocks,compile_loss,fold,functorch
from benchmarks import record
from benchmarks.peers import lora,random_model,shapes

cuda = torch.cuda.is_available()
wait = torch.cuda.synchronize if cuda else lambda: None
graphs = dict(mode='reduce-overhead')
variants = {   # how blocks are compiled (None: not), the loss too, the model as a whole
    'not compiled':(None, False, False), 'blocks, more kept':({}, False, False), 'blocks':({}, False, False),
    'blocks, loss':({}, True, False), 'blocks as graphs, loss':(graphs, True, False), 'whole':(None, False, True)}
more = 'blocks, more kept'     # as torch decides by itself what is kept and what is computed again

def make(shape, how, loss, whole, again):
    torch._dynamo.reset()
    gc.collect()
    if cuda: torch.cuda.empty_cache()
    device = 'cuda' if cuda else 'cpu'
    model = get_peft_model(random_model(dict(shape=shape, device=device), device), lora()).train()
    model.config.use_cache = False
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.float()
    layers = find_layers(model)
    fold(model)
    if loss: compile_loss(model)
    if whole: model.compile()
    if how is not None: compile_blocks(model, layers, **how)
    for o in _cheap: setattr(functorch, f'ban_recompute_{o}', not again)
    return model,layers

def measure(shape, rows, length, how, loss, whole, steps, again=True):
    """Milliseconds a step in a row, and of the host alone, with all layers, the upper half, both in turns, and with one
    layer less at each step"""
    model,layers = make(shape, how, loss, whole, again)
    ids = torch.randint(5, shapes[shape][0], (rows, length), device=next(model.parameters()).device)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=cuda)
    def step(first):
        if how==graphs: torch.compiler.cudagraph_mark_step_begin()
        layers.switch(range(first, len(layers)))
        with torch.autocast('cuda' if cuda else 'cpu', torch.bfloat16): loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()
    half,res = len(layers)//2,{}
    turns = dict(all=[0], half=[half], turns=[half-half//2, half, 0], freezing=list(range(len(layers))))
    for name,firsts in turns.items():
        if whole and name!='all': continue     # compiled anew for each selection
        warm = time.perf_counter()
        for i in range(3*len(firsts)+3): step(firsts[i%len(firsts)])
        wait()
        warm = time.perf_counter()-warm
        if cuda: torch.cuda.reset_peak_memory_stats()
        host,start = [],time.perf_counter()
        for i in range(steps): loss = step(firsts[i%len(firsts)])
        wait()
        row = (time.perf_counter()-start)/steps
        for i in range(steps):
            wait()
            t = time.perf_counter()
            step(firsts[i%len(firsts)])
            host.append(time.perf_counter()-t)
        res[name] = dict(seconds=row, host=median(host), warm=warm, loss=loss.item(),
                         peak=torch.cuda.max_memory_allocated() if cuda else None,
                         reserved=torch.cuda.max_memory_reserved() if cuda else None)
    return res

def main(
    shape:str='1b',      # A shape of `peers`
    rows:str='16x256',   # Rows x tokens in a batch
    steps:int=30,        # Steps that are timed
    only:str='',         # Variants, separated by semicolons; all if empty
    out:str='blocks',    # Where the numbers go
):
    batch,length = map(int, rows.split('x'))
    found,failed = {},{}
    for name in only.split(';') if only else variants:
        try: found[name] = measure(shape, batch, length, *variants[name], steps, name!=more)
        except Exception as e:
            failed[name] = f'{type(e).__name__}: {" ".join(str(e).split())}'[:300]
            traceback.print_exc(limit=3)
        else: print(name, *(f"{k}: {1e3*o['seconds']:.1f} ms, host {1e3*o['host']:.1f}, "
                            f"{(o['reserved'] or 0)/2**30:.1f} GiB" for k,o in found[name].items()), sep=' | ')
        record.save(out, record.about('a LoRA step, its blocks compiled in several ways', gpu=cuda), shape=shape,
                    batch=batch, length=length, steps=steps, variants=found, failed=failed)
