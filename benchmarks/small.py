"Models, data and statistics that several benchmarks share"
import json,statistics
import torch
from peft import LoraConfig,get_peft_model
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM,AutoTokenizer,LlamaConfig,LlamaForCausalLM
from ist_nb.finetune import assets

pico_path = str(assets/'pico')

def pico(r=8, alpha=16, dropout=0., seed=0, path=pico_path, dtype=torch.float32, adapter=None):
    "The language model that comes with the package, with LoRA on all linear layers (or another `adapter`)"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.config.use_cache = False
    adapter = adapter or LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules='all-linear',
                                    task_type='CAUSAL_LM')
    return get_peft_model(model, adapter)

def physics(split, length): # [rows, length]
    "The physics text that comes with the package ('train' or 'test') as rows of `length` tokens"
    tok = AutoTokenizer.from_pretrained(pico_path)
    lines = (assets/'physics'/f'{split}.jsonl').read_text().splitlines()
    ids = torch.tensor(tok(' '.join(json.loads(o)['text'] for o in lines), verbose=False)['input_ids'])
    return ids[:len(ids)//length*length].view(-1, length)

def lm_batch(ids): return dict(input_ids=ids, labels=ids)

def llama_config(layers=4, vocab=64, hidden=16, **kwargs):
    shape = dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=2*hidden, num_hidden_layers=layers,
                 num_attention_heads=2, num_key_value_heads=2, use_cache=False)
    return LlamaConfig(**(shape | kwargs))

def tiny_llama(layers=4, seed=0, **kwargs):
    "A Llama of random weights that trains in milliseconds"
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(layers, **kwargs))

def tiny_lora(layers=4, r=4, targets=('q_proj', 'v_proj', 'up_proj'), dropout=0., **kwargs):
    "`tiny_llama` with LoRA"
    lora = LoraConfig(r=r, target_modules=list(targets), lora_dropout=dropout, task_type='CAUSAL_LM')
    return get_peft_model(tiny_llama(layers, **kwargs), lora)

def trainable(model): return [p for p in model.parameters() if p.requires_grad]

def same(a, b):
    "Whether two lists of tensors are equal, bit for bit"
    return len(a)==len(b) and all(torch.equal(x, y) for x,y in zip(a, b))

def rank_correlation(a, b):
    "Spearman's"
    return float(spearmanr(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)).statistic)

def spread(values):
    "Median, least and most of what was measured; None where nothing was"
    values = [v for v in values if v is not None]
    return dict(median=statistics.median(values), min=min(values), max=max(values)) if values else None
