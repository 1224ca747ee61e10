"""PyTorch's own layers and helpers around attention, each captured by Dynamo and understood.

``check_all`` compares every proved site with the masks and the output of the real run.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seer_compile.types import SkipCode
from support.graphs import NEG, B, D, H, T, causal, draw, encoder_layer, qkv
from support.mask_oracle import check_all, inspect
from support.rewriting import answer_sparsely, new_store, rewrite

W = H * D
square = nn.Transformer.generate_square_subsequent_mask
CASES = {}


def case(*verdicts, **options):
    """Register a function of ``Float[b t w]`` by what becomes of its sites, in order."""

    def register(function):
        CASES[function.__name__] = (function, list(verdicts), options)
        return function

    return register


class Around(nn.Module):
    """Calls a function with a layer."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x):
        return self.function(self.layer, x)


def multi_head(**options):
    return nn.MultiheadAttention(W, H, **{"batch_first": True, **options})


def attend(layer, x, **options):
    return layer(x, x, x, need_weights=False, **options)[0]


@case("full", layer=multi_head(batch_first=False))
def tokens_before_the_batch(layer, x):
    return attend(layer, x.transpose(0, 1))


@case("full", layer=multi_head(add_zero_attn=True))
def key_of_zeros_appended(layer, x):
    return attend(layer, x)


@case("causal", layer=multi_head(add_bias_kv=True))
def learned_key_appended_behind_a_causal_mask(layer, x):
    return attend(layer, x, attn_mask=square(T), is_causal=True)


@case("causal + key padding", layer=multi_head())
def mask_and_padding(layer, x):
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    return attend(layer, x, attn_mask=hidden, key_padding_mask=x[..., 0] > 1)


@case("full", layer=multi_head(kdim=8, vdim=12))
def keys_and_values_of_other_widths(layer, x):
    return layer(x, x[:, :7, :8], x[:, :7, :12], need_weights=False)[0]


@case("full", layer=multi_head())
def no_batch(layer, x):
    return attend(layer, x[0])


@case(SkipCode.DROPOUT, layer=multi_head(dropout=0.1), train=True)
def dropout_in_training(layer, x):
    return attend(layer, x)


@case("full", layer=multi_head(), train=True)
def training_without_dropout(layer, x):
    return attend(layer, x)


@case(SkipCode.WEIGHTS_ESCAPE, layer=multi_head())
def weights_returned(layer, x):
    return layer(x, x, x)


@case("causal", "full", layer=nn.TransformerDecoderLayer(W, H, 64, 0.0, batch_first=True))
def decoder_layer(layer, x):
    return layer(x, x[:, :9], tgt_mask=square(T), tgt_is_causal=True)


@case("full", "causal", "full", layer=nn.Transformer(W, H, 1, 1, 64, 0.0, batch_first=True))
def encoder_and_decoder(layer, x):
    return layer(x, x, tgt_mask=square(T), tgt_is_causal=True)


@case("causal", layer=encoder_layer(norm_first=True, activation="gelu"))
def encoder_layer_with_a_mask_made_inside(layer, x):
    return layer(x, src_mask=square(T), is_causal=True)


@case("full", layer=encoder_layer(), train=True)
def encoder_layer_in_training(layer, x):
    return layer(x)


def heads_of(x):
    return (x[..., :W].unflatten(-1, (H, D)).transpose(1, 2) for _ in range(3))


@case("causal")
def chosen_implementation(layer, x):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*heads_of(x), is_causal=True)


@case("causal", layer=nn.Linear(W, 3 * W))
def projections_packed_and_unbound(layer, x):
    q, k, v = layer(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case("full", layer=nn.Linear(W, 3 * W))
def projections_packed_and_split_without_transposing(layer, x):
    q, k, v = (part.unflatten(-1, (H, D)) for part in layer(x).chunk(3, -1))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


@case("causal")
def latent_heads_wider_than_their_values(layer, x):
    q, k, v = heads_of(x)
    rotary = k[:, :1, :, :4].expand(B, H, T, 4)
    q, k = torch.cat([q, q[..., :4]], -1), torch.cat([k, rotary], -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case("causal")
def learned_sink_beside_the_keys(layer, x):
    q, k, v = heads_of(x)
    logits = (q @ k.mT * 0.3).masked_fill(~causal(q, k), NEG)
    joined = torch.cat([logits, torch.ones(1, H, 1, 1).expand(B, -1, T, -1)], -1)
    joined = joined - joined.max(-1, keepdim=True).values
    return F.softmax(joined, -1)[..., :-1] @ v


@case("causal")
def logits_capped_softly(layer, x):
    q, k, v = heads_of(x)
    logits = ((q @ k.mT) / 50.0).tanh() * 50.0
    return logits.masked_fill(~causal(q, k), NEG).softmax(-1) @ v


@pytest.mark.parametrize("name", CASES)
def test_layer_is_understood(name):
    function, verdicts, options = CASES[name]
    model = Around(options.get("layer"), function).train(options.get("train", False))
    inspected = inspect(model, draw(B, T, W))
    assert inspected.verdicts == verdicts
    assert check_all(inspected) == sum(isinstance(verdict, str) for verdict in verdicts)


@pytest.mark.parametrize(
    ("aligned", "visibility"),
    [("causal_upper_left", "causal"), ("causal_lower_right", "causal(offset=7)")],
)
def test_bias_object_of_torch_is_the_mask_that_it_stands_for(aligned, visibility):
    from torch.nn.attention import bias

    def attend_under(q, k, v):
        mask = getattr(bias, aligned)(9, 16)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    inspected = inspect(attend_under, *qkv(tokens=9, keys=16))
    assert inspected.verdicts == [visibility]
    assert check_all(inspected) == 1


def test_scale_that_changes_with_the_tokens_is_not_made_constant():
    def scaled(q, k, v):
        return (q @ k.mT * k.shape[-2] ** -0.5).softmax(-1) @ v

    assert inspect(scaled, *qkv(), dynamic=True).verdicts == [SkipCode.SCALE]
    torch._dynamo.reset()
    assert inspect(scaled, *qkv(), dynamic=False).verdicts == ["full"]


def test_flex_attention_stays_as_it_is_beside_a_site_that_is_replaced():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")

    def both(q, k, v):
        inner = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return flex_attention(q, k, inner, block_mask=mask)

    q, k, v = qkv(tokens=128, dim=16)
    inspected = inspect(both, q, k, v)
    assert inspected.verdicts == ["causal", SkipCode.FLEX]
    result = rewrite(inspected.captured, store := new_store())
    answer_sparsely(store)
    assert result.rewritten == ("<root>",)
    expected = F.scaled_dot_product_attention(
        q, k, F.scaled_dot_product_attention(q, k, v, is_causal=True), is_causal=True
    )
    torch.testing.assert_close(result.graph_module(*inspected.captured.inputs)[0], expected)
