"""Tiny random models of many families, with weights large enough that a mistake is worth nats."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
VOCABULARY = 211

_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_SLIDING = ["sliding_attention", "full_attention"]
_EXPERTS = dict(num_experts_per_tok=2, output_router_logits=True)

# Model type and what its tiny configuration sets beside the common part; a window of 8 is crossed by every pair.
SETTINGS: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "mistral": dict(sliding_window=8),
    "ministral": dict(sliding_window=8, head_dim=8),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=8, layer_types=_SLIDING, query_pre_attn_scalar=8),
    "gemma3_text": dict(head_dim=8, sliding_window=8, layer_types=_SLIDING, query_pre_attn_scalar=8),
    "phi": {},
    "phi3": dict(sliding_window=8),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gpt_neox": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": dict(num_local_experts=4, sliding_window=8, **_EXPERTS),
    "qwen2_moe": dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **_EXPERTS),
    "qwen3_moe": dict(num_experts=4, moe_intermediate_size=16, head_dim=8, **_EXPERTS),
    "olmoe": dict(num_experts=4, **_EXPERTS),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "granite": {},
    "cohere": {},
    "cohere2": dict(sliding_window=8, layer_types=_SLIDING),
    "glm4": dict(head_dim=8),
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": dict(sliding_window=8, layer_types=_SLIDING),
    "stablelm": {},
    "starcoder2": dict(sliding_window=8),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "llama4_text": dict(
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        head_dim=8,
        intermediate_size_mlp=48,
        output_router_logits=False,
    ),
    "gpt_oss": dict(num_local_experts=4, sliding_window=8, layer_types=_SLIDING, head_dim=8, **_EXPERTS),
    "deepseek_v3": dict(
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "gpt_neo": dict(num_layers=2, num_heads=4, window_size=8, attention_types=[[["global", "local"], 1]]),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=4),
    "codegen": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=4, n_ctx=512),
    "gpt_bigcode": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "falcon": dict(new_decoder_architecture=False, multi_query=True, parallel_attn=True, alibi=False),
    "falcon_alibi": dict(model_type="falcon", multi_query=True, parallel_attn=True, alibi=True),
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=512),
    "mamba": dict(state_size=4, intermediate_size=64),
    "mamba2": dict(state_size=4, head_dim=8, num_heads=8, n_groups=1, chunk_size=8),
    "jamba": dict(
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "bamba": dict(
        attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8
    ),
    "falcon_h1": dict(
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_ssm=64,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
        head_dim=8,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_next": dict(
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], attention_window_size=64, lru_width=32, head_dim=8),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid"],
        hybrid_layer_ids=[1],
        mamba_d_state=8,
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=8,
        num_mem_blocks=1,
    ),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=16,
    ),
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=8,
        head_dim=8,
    ),
    "rwkv": dict(attention_hidden_size=32),
    "xlstm": dict(num_heads=4, embedding_dim=32, num_blocks=2),
    "minimax": dict(
        layer_types=["linear_attention", "full_attention"], num_local_experts=2, num_experts_per_tok=1, head_dim=8, block_size=8
    ),
}


def tiny_config(name: str, **changes):
    """The configuration of a tiny model of a family."""
    settings = {**SETTINGS[name], **changes}
    kind = settings.pop("model_type", name)
    return CONFIG_MAPPING[kind](**{**_COMMON, **settings})


def tiny_model(name: str = "llama", seed: int = 0, scale: float = 0.3, attention: str | None = None, **changes):
    """A tiny random model in evaluation mode with TRL's fused head, its matrices drawn with a standard deviation
    of `scale` (norms and biases as the family makes them)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(name, **changes), **({} if attention is None else {"attn_implementation": attention})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model.eval()
