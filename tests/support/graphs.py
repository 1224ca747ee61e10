"""Attention in every spelling, as small functions and modules, and graphs made of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from seer_compile.passes.capture import CapturedGraph

B, H, G, T, D = 2, 4, 2, 16, 8
NEG = float("-inf")


def trace(function, *inputs, dynamic=False):
    """Trace a function of tensors to ATen pre-dispatch calls, without Dynamo."""
    mode = "symbolic" if dynamic else "fake"
    graph_module = make_fx(function, pre_dispatch=True, tracing_mode=mode)(*inputs)
    return CapturedGraph(graph_module, tuple(inputs))


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(tokens=T, keys=None, *, heads=H, kv_heads=None, dim=D, dtype=torch.float32):
    """Query, key and value in b h t d."""
    keys, kv_heads = keys or tokens, kv_heads or heads
    shapes = ((B, heads, tokens, dim), (B, kv_heads, keys, dim), (B, kv_heads, keys, dim))
    return tuple(draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))


def causal(q, k):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def repeat_kv(x, n):
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, n, t, d).reshape(b, g * n, t, d)


# --- causal attention of b h t d, spelled in every way ---------------------------------------


def sdpa_flag(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_bool(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q, k))


def sdpa_float(q, k, v):
    mask = torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q, k), NEG)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)


def sdpa_three_dims(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def matmul_scale_after(q, k, v):
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill(~causal(q, k), NEG).softmax(-1) @ v


def matmul_scale_before(q, k, v):
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    return scores.masked_fill(~causal(q, k), NEG).softmax(-1) @ v


def matmul_constant_tensor_scale(q, k, v):
    scores = q @ k.mT / torch.sqrt(torch.tensor(float(q.shape[-1])))
    return torch.where(causal(q, k), scores, torch.tensor(-1e9)).softmax(-1) @ v


def matmul_half_softmax_in_float(q, k, v):
    scores = q @ k.mT * 0.25 + torch.full((q.shape[-2], k.shape[-2]), NEG).triu(1)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def matmul_scaled_mask(q, k, v):
    scores = (q @ k.mT + torch.where(causal(q, k), 0.0, -1e9)) * 0.25
    return scores.softmax(-1) @ v


def matmul_subtracts_maximum(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal(q, k), -1e5)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def matmul_floor(q, k, v):
    lowest = torch.finfo(q.dtype).min
    scores = q @ k.mT + torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q, k), lowest)
    return torch.max(scores, torch.tensor(lowest)).softmax(-1) @ v


def matmul_dropout_in_evaluation(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(q, k), NEG).softmax(-1)
    return F.dropout(weights, 0.5, training=False) @ v


def matmul_transposed(q, k, v):
    scores = (k @ q.mT).masked_fill(~causal(q, k).mT, NEG)
    return (v.mT @ scores.softmax(-2)).mT


def bmm_three_dims(q, k, v):
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q * 0.25, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) + torch.full((T, T), NEG).triu(1)
    return torch.bmm(scores.softmax(-1), v)


def bmm_mask_in_four_dims(q, k, v):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, h, t, t)
    scores = scores.masked_fill(~causal(q, k), torch.finfo(scores.dtype).min).view(b * h, t, t)
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


def fairseq_heads_in_batch(q, k, v):
    b, h, t, d = q.shape
    rows = (x.permute(2, 0, 1, 3).reshape(t, b, h * d) for x in (q, k, v))
    q, k, v = (x.contiguous().view(t, b * h, d).transpose(0, 1) for x in rows)
    scores = torch.bmm(q, k.transpose(1, 2)) + torch.full((t, t), NEG).triu(1).unsqueeze(0)
    out = torch.bmm(F.softmax(scores.float(), -1).type_as(scores), v)
    return out.transpose(0, 1).contiguous().view(t, b, h * d)


def baddbmm_mask(q, k, v):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    mask = torch.full((t, t), NEG).triu(1).expand(b * h, t, t)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v)


def baddbmm_without_input(q, k, v):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(1), q, k.transpose(1, 2), beta=0.0, alpha=0.25)
    return torch.bmm(scores.masked_fill(~causal(q, k), -65504.0).softmax(-1), v)


def einsum_bhtd(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / 3.0
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(~causal(q, k), NEG).softmax(-1), v)


def einsum_bthd(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), NEG)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def einsum_ellipsis(q, k, v):
    scores = torch.einsum("...id,...jd->...ij", q, k)
    return torch.einsum("...ij,...jd->...id", torch.where(causal(q, k), scores, NEG).softmax(-1), v)


def einsum_values_first(q, k, v):
    weights = torch.einsum("bkhd,bqhd->bhqk", k.transpose(1, 2), q.transpose(1, 2))
    weights = weights.masked_fill(~causal(q, k), NEG).softmax(-1)
    return torch.einsum("bhkd,bhqk->bqhd", v, weights)


def five_dims_windows(q, k, v):
    q, k, v = (x.reshape(B, 2, H // 2, T, D) for x in (q, k, v))
    return (q @ k.mT).masked_fill(~causal(q, k), NEG).softmax(-1) @ v


CAUSAL_SPELLINGS = {
    function.__name__: function
    for function in (
        sdpa_flag,
        sdpa_bool,
        sdpa_float,
        sdpa_three_dims,
        matmul_scale_after,
        matmul_scale_before,
        matmul_constant_tensor_scale,
        matmul_half_softmax_in_float,
        matmul_scaled_mask,
        matmul_subtracts_maximum,
        matmul_floor,
        matmul_dropout_in_evaluation,
        matmul_transposed,
        bmm_three_dims,
        bmm_mask_in_four_dims,
        fairseq_heads_in_batch,
        baddbmm_mask,
        baddbmm_without_input,
        einsum_bhtd,
        einsum_bthd,
        einsum_ellipsis,
        einsum_values_first,
        five_dims_windows,
    )
}


# --- grouped heads: q of H heads, k and v of G -----------------------------------------------


def grouped_flag(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def grouped_repeat_kv(q, k, v):
    return sdpa_bool(q, repeat_kv(k, H // G), repeat_kv(v, H // G))


def grouped_repeat_interleave(q, k, v):
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    return matmul_scale_after(q, k, v)


def grouped_repeat_kv_before_transpose(q, k, v):
    def repeated(x):
        x = x.transpose(1, 2)[:, :, :, None].expand(B, T, G, H // G, D)
        return x.reshape(B, T, H, D).transpose(1, 2)

    return sdpa_flag(q, repeated(k), repeated(v))


def grouped_five_dims(q, k, v):
    q = q.reshape(B, G, H // G, T, D)
    scores = (q @ k[:, :, None].mT).masked_fill(~causal(q, k), NEG)
    return scores.softmax(-1) @ v[:, :, None]


def grouped_einsum(q, k, v):
    q = q.transpose(1, 2).reshape(B, T, G, H // G, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.einsum("bqgrd,bkgd->bgrqk", q, k)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), NEG)
    return torch.einsum("bgrqk,bkgd->bqgrd", scores.softmax(-1), v).reshape(B, T, H * D)


GROUPED_SPELLINGS = {
    function.__name__: function
    for function in (
        grouped_flag,
        grouped_repeat_kv,
        grouped_repeat_interleave,
        grouped_repeat_kv_before_transpose,
        grouped_five_dims,
        grouped_einsum,
    )
}


# --- modules ---------------------------------------------------------------------------------


class NanoAttention(nn.Module):
    """Causal attention in the manner of nanoGPT: a triangle in a buffer, or the fused call."""

    def __init__(self, *, width=32, heads=4, longest=64, fused=False):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        triangle = torch.tril(torch.ones(longest, longest))
        self.register_buffer("bias", triangle.view(1, 1, longest, longest))

    def forward(self, x):
        b, t, c = x.size()
        shape = (b, t, self.heads, c // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).split(c, dim=2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.drop(F.softmax(scores, dim=-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


class TwoLayers(nn.Module):
    """Two attention layers with residuals."""

    def __init__(self, first, second):
        super().__init__()
        self.layers = nn.ModuleList([first, second])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` over one input."""

    def __init__(self, *, need_weights=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x, key_padding_mask=None):
        return self.attention(
            x, x, x, key_padding_mask=key_padding_mask, need_weights=self.need_weights
        )[0]


def encoder_layer(**kwargs):
    options = {"dropout": 0.0, "batch_first": True, **kwargs}
    return nn.TransformerEncoderLayer(32, 4, 64, **options)


_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SHORT = {"max_position_embeddings": 256}
_GROUPED = {**_COMMON, **_SHORT, "num_key_value_heads": 2}
HF_MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 2}),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **_GROUPED,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "original_max_position_embeddings": 256,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, "head_dim": 8, "sliding_window": 8},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gptneox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_COMMON, **_SHORT}),
    "bert": ("BertModel", "BertConfig", {**_COMMON, **_SHORT}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}


def hf_model(name, attention="sdpa"):
    """A small Hugging Face model with random weights, in evaluation."""
    import transformers

    model_class, config_class, options = HF_MODELS[name]
    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = attention
    return getattr(transformers, model_class)(config).eval()


def hf_inputs(name, *, tokens=T, **kwargs):
    """Inputs of one of these models."""
    ids = torch.randint(5, 60, (B, tokens), generator=torch.Generator().manual_seed(1))
    if name == "vit":
        return {"pixel_values": draw(B, 3, 16, 16), **kwargs}
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :8], **kwargs}
    if name == "whisper":
        return {"input_features": draw(B, 8, 32), "decoder_input_ids": ids[:, :8], **kwargs}
    return {"input_ids": ids, **kwargs}


def left_padding(tokens=T, hidden=3):
    """A mask that hides the first tokens of the first item."""
    mask = torch.ones(B, tokens, dtype=torch.long)
    mask[0, :hidden] = 0
    return mask
