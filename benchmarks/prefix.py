"What a frozen prefix costs: steps of pico that train the layers from k up, from the text and from the states below"
import statistics,time
from pathlib import Path
import torch
from benchmarks import record
from benchmarks.small import lm_batch,physics,pico

def main(
    reps:int=9, # Steps of each kind; they take turns
    out:Path='prefix', # Where the numbers go
):
    torch.set_num_threads(1)
    model = pico()
    stack,batch = model.get_base_model().model,lm_batch(physics('train', 64)[:8])
    blocks = stack.layers
    N,head = len(blocks),model.get_output_embeddings().weight.numel()
    block = sum(o.weight.numel() for n,o in blocks[0].named_modules() if n.endswith('base_layer'))
    with torch.no_grad(): states = model(**batch, output_hidden_states=True).hidden_states   # states[k] enters layer k
    def step(k, stored=False): # processor seconds and loss
        for i,o in enumerate(blocks):
            for name,p in o.named_parameters(): p.requires_grad_('lora' in name and i>=k)
        stack.layers = blocks[k:] if stored else blocks
        inputs = dict(inputs_embeds=states[k], labels=batch['labels']) if stored else batch
        start = time.process_time()
        loss = model(**inputs).loss
        loss.backward()
        took = time.process_time()-start
        model.zero_grad()
        stack.layers = blocks
        return took,loss.item()
    step(0)                                              # the first step is slower
    shares = {k:[] for k in (4, 8, 12, 15)}
    for _ in range(reps):
        whole = step(0)[0]
        for k,found in shares.items():
            (a,loss),(b,same) = step(k),step(k, stored=True)
            assert loss==same, 'stored states change the loss'
            found.append((a/whole, b/whole))
    rows = [dict(first=k, text=statistics.median(a for a,_ in o), stored=statistics.median(b for _,b in o),
                 paper=k*block/(N*block+head)/2) for k,o in shares.items()]
    print(record.save(out, record.about('seconds of a step of pico, over those of a step that trains all layers',
                                        threads=1), layers=N, reps=reps, rows=rows))
