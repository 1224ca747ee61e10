"""Decoders of Hugging Face with experts, latent attention, or layers that are no attention."""

from __future__ import annotations

from typing import Any

from zoo.architecture import Architecture, Situation
from zoo.hugging_face import DECODER, ONE_LAYER, Builder
from zoo.text_situations import CAUSAL, RECURRENT

_EXPERTS = (
    DECODER | ONE_LAYER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
)
_MIXTRAL = DECODER | ONE_LAYER | {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = DECODER | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
_LLAMA4 = _MIXTRAL | {
    "num_hidden_layers": 2,
    "head_dim": 16,
    "intermediate_size_mlp": 48,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 48,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
}
_JAMBA = DECODER | {
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
_QWEN3_NEXT = _EXPERTS | {
    "num_hidden_layers": 2,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
}
_GRANITE = _MIXTRAL | {
    "num_hidden_layers": 2,
    "layer_types": ["mamba", "attention"],
    "shared_intermediate_size": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 32,
}
_LFM2 = DECODER | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}

_TABLE: dict[str, tuple[str, str, dict[str, Any], tuple[Situation, ...], int]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _MIXTRAL, CAUSAL, 1),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _EXPERTS | {"head_dim": 16}, CAUSAL, 1),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK, CAUSAL, 2),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", _LLAMA4, CAUSAL, 2),
    "jamba": ("JambaForCausalLM", "JambaConfig", _JAMBA, RECURRENT, 1),
    "qwen3-next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", _QWEN3_NEXT, RECURRENT, 1),
    "granite-moe-hybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        _GRANITE,
        RECURRENT,
        1,
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", _LFM2, RECURRENT, 1),
}
ARCHITECTURES = tuple(
    Architecture(
        name=name,
        family="mixture or hybrid",
        build=Builder(model_class, config_class, arguments),
        situations=situations,
        sites=sites,
    )
    for name, (model_class, config_class, arguments, situations, sites) in _TABLE.items()
)
