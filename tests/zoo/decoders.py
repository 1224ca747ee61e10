"""Dense decoders of Hugging Face: rotary, learned, ALiBi positions; windows, sinks, soft caps."""

from __future__ import annotations

from typing import Any

from zoo.architecture import Architecture, Situation
from zoo.hugging_face import DECODER, ONE_LAYER, SIZES, SPECIAL, Builder
from zoo.text_situations import CAUSAL, CHUNK, PADDINGS, PLAIN

WINDOW = {"sliding_window": 70}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
_ALIKE = DECODER | ONE_LAYER
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 512} | SPECIAL

_QWEN_LIKE = _ALIKE | {"head_dim": 16}
_GEMMA2 = DECODER | ALTERNATING | {"query_pre_attn_scalar": 16}
_FALCON = SPECIAL | ONE_LAYER | {"max_position_embeddings": 512}
_FALCON |= {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
_OPT = _FALCON | {"ffn_dim": 48, "word_embed_proj_dim": 32}
_MPT = {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 512}

_TABLE = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _ALIKE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _ALIKE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _QWEN_LIKE),
    "mistral": ("MistralForCausalLM", "MistralConfig", _ALIKE | WINDOW),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | ALTERNATING),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | SPECIAL | ONE_LAYER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _ALIKE | WINDOW),
    "cohere": ("CohereForCausalLM", "CohereConfig", _ALIKE | {"use_qk_norm": True}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _ALIKE),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _ALIKE | {"qk_layernorm": True}),
    "glm": ("GlmForCausalLM", "GlmConfig", _QWEN_LIKE),
    "falcon": ("FalconForCausalLM", "FalconConfig", _FALCON),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
}
_POSITIONLESS = (PLAIN, *PADDINGS, CHUNK)
"""ALiBi models take no positions to pack by, and size their bias by the tokens seen so far, which
a StaticCache keeps in a tensor."""

_SINGULAR = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA2, ("eager",)),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER | ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ("eager",),
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}, ("eager",)),
    "bloom": ("BloomForCausalLM", "BloomConfig", _GPT2, ("eager",), _POSITIONLESS, 1),
    "mpt": ("MptForCausalLM", "MptConfig", _MPT | SPECIAL, ("eager",), _POSITIONLESS, 1),
}
"""Those with one spelling, or with sites that cannot be sparse: ALiBi is a bias on the logits."""


def _decoder(
    name: str,
    model_class: str,
    config_class: str,
    arguments: dict[str, Any],
    spellings: tuple[str, ...] = ("sdpa", "eager"),
    situations: tuple[Situation, ...] = CAUSAL,
    biased: int = 0,
) -> Architecture:
    return Architecture(
        name=name,
        family="decoder",
        build=Builder(model_class, config_class, arguments),
        situations=situations,
        sites=len(arguments.get("layer_types", "1")),
        spellings=spellings,
        barred={"float bias": biased} if biased else {},
    )


ARCHITECTURES = tuple(_decoder(name, *row) for name, row in (_TABLE | _SINGULAR).items())
