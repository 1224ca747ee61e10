"""Small models: a plain decoder of ours, and Hugging Face architectures with random weights."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 96


class Attention(nn.Module):
    def __init__(self, width, heads, is_causal=True):
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(mixed.transpose(1, 2).reshape(b, t, -1))


class Decoder(nn.Module):
    """Token ids ``Int[b t]`` to logits ``Float[b t vocabulary]``; sites ``layers.N``."""

    def __init__(self, layers=2, width=32, heads=4):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(x)


class Triangle(nn.Module):
    """Attention written out, its causal mask a buffer (nanoGPT)."""

    def __init__(self, width=32, heads=4, most=512):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.register_buffer("bias", torch.tril(torch.ones(most, most)).view(1, 1, most, most))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.shape[-1] ** 0.5)
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(b, t, -1)


def decoder(seed=0, **sizes) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**sizes).eval()


def token_ids(length, batch=1, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = _SIZES | _SPECIAL | {"num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 4096}
_GEMMA = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 150,
    "max_target_positions": 512,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": 70}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _DECODER | _GEMMA | {"sliding_window": 70},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2 | _SPECIAL),
    "bert": ("BertModel", "BertConfig", _SIZES),
    "vit": (
        "ViTModel",
        "ViTConfig",
        _VIT | {"num_attention_heads": 4, "image_size": 48, "patch_size": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _WHISPER | _SPECIAL | {"vocab_size": VOCABULARY},
    ),
}


@functools.cache
def _library():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def architecture(name, attention="sdpa") -> nn.Module:
    """Build one of ``ARCHITECTURES`` with random weights, in evaluation mode."""
    model_class, config_class, arguments = ARCHITECTURES[name]
    library = _library()
    torch.manual_seed(0)
    config = getattr(library, config_class)(**arguments)
    config._attn_implementation = attention
    return getattr(library, model_class)(config).eval()


def inputs_of(name, length=130, seed=0) -> dict[str, Tensor]:
    """Keyword arguments of one forward."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(1, 3, 48, 48, generator=generator)}
    decoder_ids = {"decoder_input_ids": token_ids(length // 2, seed=seed + 1)}
    if name == "whisper":
        return {"input_features": torch.randn(1, 8, 300, generator=generator)} | decoder_ids
    inputs = {"input_ids": token_ids(length, seed=seed)}
    return inputs | decoder_ids if name == "t5" else inputs


def main_output(output) -> Tensor:
    """The tensor that a forward is about."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits
