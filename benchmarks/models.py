"""Which layers IST finds in 36 architectures, and whether it trains, freezes and suppresses them.
Each is built from a tiny configuration with random weights, and has LoRA on its linear layers."""
import warnings
from pathlib import Path
import torch,transformers
from peft import LoraConfig,get_peft_model
from transformers import AutoConfig
from ist_nb import IST,ISTConfig,ISTError,find_layers
from ist_nb.suppression import suppress
from benchmarks import record
from benchmarks.small import lm_batch,trainable

N,V,D = 3,64,16   # layers of a stack, size of the vocabulary, width
gen = lambda: torch.Generator().manual_seed(0)
ids = torch.randint(5, V, (2, 8), generator=gen())
pixels = torch.randn(2, 3, 16, 16, generator=gen())
text = lm_batch(ids)
classes = torch.tensor([0, 1])
llama = dict(vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2,
             num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
bert = dict(vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2,
            max_position_embeddings=32)
vit = dict(hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2, image_size=16, patch_size=8,
           num_labels=2)

# of each the class, the configuration and a batch; where they are not the rule, LoRA's targets and the names of stacks
shape,ids_of = dict(vocab_size=V, d_model=D),dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
gpt = dict(n_embd=D, n_layer=N, n_head=2, n_positions=32)
sides = dict(layers=N, ffn_dim=32, attention_heads=2)
both = {f'{o}_{k}':v for o in ('encoder', 'decoder') for k,v in sides.items()}
def lm(**kwargs): return dict(auto='AutoModelForCausalLM', batch=text, config=llama | kwargs)
def masked(**kwargs): return dict(auto='AutoModelForMaskedLM', batch=text, config=bert | kwargs)
def two(auto, *stacks, batch=text, **kwargs): return dict(auto=auto, stacks=list(stacks), batch=batch) | kwargs
def images():
    return dict(auto='AutoModelForImageClassification', batch=dict(pixel_values=pixels, labels=classes), config=vit)
def speech(frames, rows): return torch.randn(2, *([8] if rows else []), frames, generator=gen())
seen = torch.cat([torch.full((2, 4), V-1), ids.clamp_max(V-2)], 1)   # four tokens that stand for a picture, then text
models = {o:lm() for o in 'llama qwen2 qwen3 mistral gemma2 gemma3_text phi phi3 olmo2 granite stablelm'.split()} | {
    'mixtral': lm(num_local_experts=2), 'qwen3_moe': lm(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    'deepseek_v3': lm(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
                      q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
                      first_k_dense_replace=1, n_shared_experts=1),
    'gpt2': lm(**gpt), 'gpt_neox': lm(), 'gptj': lm(**gpt, rotary_dim=4), 'bloom': lm(n_layer=N, n_head=2),
    'opt': lm(ffn_dim=32, word_embed_proj_dim=D, max_position_embeddings=32),
    'falcon': lm() | dict(config={k:v for k,v in llama.items() if k!='head_dim'}), 'gpt_bigcode': lm(**gpt),
    'mamba': lm(state_size=4) | dict(targets=['in_proj', 'x_proj']),
    'mamba2': lm(state_size=4, num_heads=4, head_dim=8, n_groups=1, expand=2) | dict(targets=['in_proj']),
    'bert': masked(), 'roberta': masked(), 'deberta-v2': masked(),
    'modernbert': masked(**ids_of, cls_token_id=1, sep_token_id=2),
    'distilbert': masked() | dict(config=dict(vocab_size=V, dim=D, hidden_dim=32, n_layers=N, n_heads=2,
                                              max_position_embeddings=32)),
    't5': two('AutoModelForSeq2SeqLM', 'encoder', 'decoder',
              config=shape | dict(d_kv=8, d_ff=32, num_layers=N, num_heads=2, decoder_start_token_id=0)),
    'bart': two('AutoModelForSeq2SeqLM', 'encoder', 'decoder', config=shape | both | dict(max_position_embeddings=32)),
    'vit': images(), 'dinov2': images(),
    'clip': two('AutoModel', 'text_model', 'vision_model',
                batch=dict(input_ids=ids, pixel_values=pixels, return_loss=True),
                config=dict(text_config=bert, vision_config={k:v for k,v in vit.items() if k!='num_labels'},
                            projection_dim=8)),
    'whisper': two('AutoModelForSpeechSeq2Seq', 'encoder', 'decoder',
                   batch=dict(input_features=speech(20, True), labels=ids),
                   config=shape | both | ids_of | dict(num_mel_bins=8, max_source_positions=10, max_target_positions=32,
                       decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)),
    'wav2vec2': dict(auto='AutoModelForAudioClassification', targets=['q_proj', 'v_proj'],
                     batch=dict(input_values=speech(400, False), labels=classes),
                     config=dict(hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2,
                                 conv_dim=(8,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1,
                                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8,
                                 num_labels=2, mask_time_prob=0.)),
    'llava': two('AutoModelForImageTextToText', 'vision_tower', 'language_model', targets=['q_proj', 'v_proj'],
                 batch=dict(input_ids=seen, pixel_values=pixels, labels=seen.masked_fill(seen==V-1, -100)),
                 config=dict(text_config=llama | dict(model_type='llama'), image_token_index=V-1,
                             vision_config=vit | dict(model_type='clip_vision_model', projection_dim=8),
                             vision_feature_layer=-1)),
}

def make(name):
    spec = models[name]
    torch.manual_seed(0)
    model = getattr(transformers, spec['auto']).from_config(AutoConfig.for_model(name, **spec['config']))
    if hasattr(model.config, 'use_cache'): model.config.use_cache = False
    return get_peft_model(model, LoraConfig(r=2, target_modules=spec.get('targets', 'all-linear'),
                                            init_lora_weights=False))

def check(name):
    "What was found on the architecture `name`; raises `AssertionError`"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        spec,model = models[name],make(name)
        batch,stacks = spec['batch'],spec.get('stacks')
        if stacks:   # ambiguous: the error names the candidates, and each of them is accepted
            try: assert not find_layers(model), 'several stacks, and no question asked'
            except ISTError as e: said = str(e)
            assert all(repr(o) in said for o in stacks), said
            assert all(len(find_layers(model, o))==N for o in stacks)
            assert [o.label for o in find_layers(model, stacks)]==[f'{s}.{i}' for s in stacks for i in range(N)]
        n_active = {o:1 for o in stacks} if stacks else 1
        ist = IST(model, ISTConfig(n_active=n_active, score_interval=2), probe=[batch])
        assert len(ist.layers)==N*len(stacks or [1]), f'{len(ist.layers)} layers'
        opt = torch.optim.AdamW(trainable(model), lr=0.01)
        model.eval()
        for _ in range(6):
            before = [[p.detach().clone() for p in o.params] for o in ist.layers]
            with ist.step():
                loss = model(**batch).loss
                loss.backward()
                opt.step()
                opt.zero_grad()
            changed = [any(not torch.equal(a, p) for a,p in zip(b, o.params)) for b,o in zip(before, ist.layers)]
            moved = [i for i,o in enumerate(changed) if o]
            assert moved==ist.active.tolist(), f'active {ist.active.tolist()}, moved {moved}'
        if stacks: assert all(sum(ist.layers[i].stack==s for i in ist.active.tolist())==1 for s in ist.layers.stacks)
        assert torch.isfinite(loss) and ist.importance.abs().max()>0
        with torch.no_grad():
            every = range(len(ist.layers))
            a = model(**batch).loss
            with suppress(ist.layers, every, 0.): off = model(**batch).loss
            with model.disable_adapter(): base = model(**batch).loss
            assert torch.equal(model(**batch).loss, a) and abs(a-off)>1e-7, f'suppression: {a}, {off}'
            if not ist.layers.outside: assert abs(off-base)<1e-5*abs(base), f'{off} is not {base}'
        return dict(model=name, cls=type(model.base_model.model).__name__,
                    stacks=[o.removeprefix('base_model.model.') for o in ist.layers.stacks], layers=len(ist.layers),
                    outside=len(ist.layers.outside))

def main(
    out:Path='models', # Where the table goes
):
    record.save(out, record.about('layers that IST finds in each architecture'), rows=[check(o) for o in models])
