"""IST on many architectures, from random weights of tiny configurations; LoRA on the linear layers of each.
`python benchmarks/models_matrix.py` writes results/models_matrix.json, from which the page nbs/results/models.ipynb is made"""
import json,sys,warnings
from pathlib import Path
import torch,transformers
from transformers import AutoConfig
from peft import LoraConfig,get_peft_model
from ist_nb import IST,ISTConfig,ISTError,find_layers
from ist_nb.suppression import suppress

N,V,D = 3,64,16   # layers of a stack, size of the vocabulary, width
gen = lambda: torch.Generator().manual_seed(0)
ids = torch.randint(5, V, (2, 8), generator=gen())
pixels = torch.randn(2, 3, 16, 16, generator=gen())
text = dict(input_ids=ids, labels=ids)
classes = torch.tensor([0, 1])
llama = dict(vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
bert = dict(vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2, max_position_embeddings=32)
vit = dict(hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2, image_size=16, patch_size=8, num_labels=2)

# of each: the class, the settings, a batch, and where they are not the rule LoRA's targets and the stacks to choose from
def lm(**kwargs): return dict(auto='AutoModelForCausalLM', batch=text, config=llama | kwargs)
models = {
    'llama': lm(), 'qwen2': lm(), 'qwen3': lm(), 'mistral': lm(), 'gemma2': lm(), 'gemma3_text': lm(), 'phi': lm(), 'phi3': lm(), 'olmo2': lm(), 'granite': lm(), 'stablelm': lm(),
    'mixtral': lm(num_local_experts=2), 'qwen3_moe': lm(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    'deepseek_v3': lm(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_shared_experts=1),
    'gpt2': lm(n_embd=D, n_layer=N, n_head=2, n_positions=32), 'gpt_neox': lm(), 'gptj': lm(n_embd=D, n_layer=N, n_head=2, rotary_dim=4, n_positions=32),
    'bloom': lm(n_layer=N, n_head=2), 'opt': lm(ffn_dim=32, word_embed_proj_dim=D, max_position_embeddings=32), 'falcon': lm() | dict(config={k:v for k,v in llama.items() if k!='head_dim'}), 'gpt_bigcode': lm(n_embd=D, n_layer=N, n_head=2, n_positions=32),
    'mamba': lm(state_size=4) | dict(targets=['in_proj', 'x_proj']), 'mamba2': lm(state_size=4, num_heads=4, head_dim=8, n_groups=1, expand=2) | dict(targets=['in_proj']),
    'bert': dict(auto='AutoModelForMaskedLM', batch=text, config=bert), 'roberta': dict(auto='AutoModelForMaskedLM', batch=text, config=bert),
    'deberta-v2': dict(auto='AutoModelForMaskedLM', batch=text, config=bert), 'modernbert': dict(auto='AutoModelForMaskedLM', batch=text, config=bert | dict(pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)),
    'distilbert': dict(auto='AutoModelForMaskedLM', batch=text, config=dict(vocab_size=V, dim=D, hidden_dim=32, n_layers=N, n_heads=2, max_position_embeddings=32)),
    't5': dict(auto='AutoModelForSeq2SeqLM', batch=text, stacks=['encoder', 'decoder'], config=dict(vocab_size=V, d_model=D, d_kv=8, d_ff=32, num_layers=N, num_heads=2, decoder_start_token_id=0)),
    'bart': dict(auto='AutoModelForSeq2SeqLM', batch=text, stacks=['encoder', 'decoder'], config=dict(vocab_size=V, d_model=D, encoder_layers=N, decoder_layers=N, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32)),
    'vit': dict(auto='AutoModelForImageClassification', batch=dict(pixel_values=pixels, labels=classes), config=vit),
    'dinov2': dict(auto='AutoModelForImageClassification', batch=dict(pixel_values=pixels, labels=classes), config=vit),
    'clip': dict(auto='AutoModel', stacks=['text_model', 'vision_model'], batch=dict(input_ids=ids, pixel_values=pixels, return_loss=True),
                 config=dict(text_config=bert, vision_config={k:v for k,v in vit.items() if k!='num_labels'}, projection_dim=8)),
    'whisper': dict(auto='AutoModelForSpeechSeq2Seq', stacks=['encoder', 'decoder'], batch=dict(input_features=torch.randn(2, 8, 20, generator=gen()), labels=ids),
                    config=dict(vocab_size=V, num_mel_bins=8, d_model=D, encoder_layers=N, decoder_layers=N, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=10, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)),
    'wav2vec2': dict(auto='AutoModelForAudioClassification', batch=dict(input_values=torch.randn(2, 400, generator=gen()), labels=classes),
                     config=dict(hidden_size=D, intermediate_size=32, num_hidden_layers=N, num_attention_heads=2, conv_dim=(8,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=2, mask_time_prob=0.), targets=['q_proj', 'v_proj']),
    'llava': dict(auto='AutoModelForImageTextToText', stacks=['vision_tower', 'language_model'],
                  batch=dict(input_ids=torch.cat([torch.full((2, 4), V-1), ids.clamp_max(V-2)], 1), pixel_values=pixels, labels=torch.cat([torch.full((2, 4), -100), ids.clamp_max(V-2)], 1)),
                  config=dict(text_config=llama | dict(model_type='llama'), vision_config=vit | dict(model_type='clip_vision_model', projection_dim=8), image_token_index=V-1, vision_feature_layer=-1), targets=['q_proj', 'v_proj']),
}

def make(name):
    spec = models[name]
    torch.manual_seed(0)
    model = getattr(transformers, spec['auto']).from_config(AutoConfig.for_model(name, **spec['config']))
    if hasattr(model.config, 'use_cache'): model.config.use_cache = False
    return get_peft_model(model, LoraConfig(r=2, target_modules=spec.get('targets', 'all-linear'), init_lora_weights=False))

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
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.eval()
        for _ in range(6):
            before = [[p.detach().clone() for p in o.params] for o in ist.layers]
            with ist.step(): loss = model(**batch).loss; loss.backward(); opt.step(); opt.zero_grad()
            moved = [i for i,o in enumerate(ist.layers) if any(not torch.equal(a, p) for a,p in zip(before[i], o.params))]
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
        return dict(model=name, cls=type(model.base_model.model).__name__, stacks=[o.removeprefix('base_model.model.') for o in ist.layers.stacks], layers=len(ist.layers), outside=len(ist.layers.outside))

def main():
    import platform
    from importlib.metadata import version
    rows = [check(o) for o in models]
    res = dict(command='python benchmarks/models_matrix.py', versions={o:version(o) for o in ('torch', 'transformers', 'peft')}, python=platform.python_version(), hardware='CPU', rows=rows)
    (Path(__file__).parent/'results'/'models_matrix.json').write_text(json.dumps(res, indent=1)+'\n')

if __name__=='__main__': sys.exit(main())
