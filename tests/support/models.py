"""Small models: a plain decoder of ours, and Hugging Face architectures of the zoo."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ARCHITECTURES
from zoo.text_situations import VOCABULARY, token_ids


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


CHANGES = {
    "llama": {"num_hidden_layers": 2},
    "qwen3": {"num_hidden_layers": 2},
    "mistral": {"num_hidden_layers": 2},
    "gemma3": {},
    "gpt2": {"n_layer": 2},
    "bert": {},
    "vit": {},
    "t5": {},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
}
"""The architectures of the zoo that many tests use, and what is other than there."""
LONGEST = 4096
_LENGTHS = {"gpt2": "n_positions", "llama": "max_position_embeddings"}
_LENGTHS |= dict.fromkeys(("qwen3", "mistral", "gemma3", "bert"), "max_position_embeddings")


def architecture(name, attention="sdpa") -> nn.Module:
    """Build one of ``CHANGES`` with random weights, in evaluation mode, for long inputs."""
    lengths = {_LENGTHS[name]: LONGEST} if name in _LENGTHS else {}
    return ARCHITECTURES[name].build(attention, **CHANGES[name], **lengths)


def breaks_its_graph(model) -> bool:
    """Whether Dynamo cuts the forward of a Hugging Face model that makes its own cache.

    An encoder-decoder copies its configuration for it, with ``copy.deepcopy``, which Dynamo of
    torch 2.11 does not follow: encoder and decoder are graphs of their own there.
    """
    if not model.config.is_encoder_decoder:
        return False

    def copies(x):
        model.config.get_text_config(decoder=True)
        return x + 1

    try:
        torch.compile(copies, backend="eager", fullgraph=True)(torch.zeros(1))
    except torch._dynamo.exc.Unsupported:
        return True
    return False


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


@contextlib.contextmanager
def excused_where_inductor_cannot_decode():
    """Skip where Inductor fails on a decoding step, if it fails on that of the plain model too.

    On the CPU, Inductor of torch 2.11 writes C++ with an undeclared name for a decoder that makes
    its masks itself, as with transformers 5.17.
    """
    try:
        yield
    except torch._inductor.exc.InductorError:
        torch._dynamo.reset()
        plain = architecture("llama")
        plain.compile(backend="inductor")
        try:
            plain.generate(input_ids=token_ids(100), max_new_tokens=4, do_sample=False)
        except torch._inductor.exc.InductorError:
            import pytest

            pytest.skip("Inductor of this torch cannot compile a decoding step of the plain model")
        raise
