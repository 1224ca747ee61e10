"""Encoders of Hugging Face for text and for proteins."""

from __future__ import annotations

from typing import Any

from zoo.architecture import Architecture
from zoo.hugging_face import SIZES, SPECIAL, Builder
from zoo.text_situations import ENCODER

_DISTIL = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
_MODERN = (
    SIZES
    | SPECIAL
    | {
        "local_attention": 70,
        "layer_types": ["full_attention", "sliding_attention"],
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
)
_DEBERTA = (
    SIZES
    | SPECIAL
    | {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": 64,
    }
)
_ESM = SIZES | SPECIAL | {"position_embedding_type": "rotary", "mask_token_id": 3}
_BOTH = ("sdpa", "eager")

_TABLE: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], dict[str, int]]] = {
    "bert": ("BertModel", "BertConfig", SIZES | SPECIAL, _BOTH, {}),
    "roberta": ("RobertaModel", "RobertaConfig", SIZES | SPECIAL, _BOTH, {}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTIL | SPECIAL, _BOTH, {}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", _MODERN, _BOTH, {}),
    "electra": (
        "ElectraModel",
        "ElectraConfig",
        SIZES | SPECIAL | {"embedding_size": 32},
        _BOTH,
        {},
    ),
    "esm": ("EsmModel", "EsmConfig", _ESM, _BOTH, {}),
    "deberta-v2": ("DebertaV2Model", "DebertaV2Config", _DEBERTA, ("eager",), {"float bias": 2}),
}
"""DeBERTa adds products of queries with relative positions to the logits."""

ARCHITECTURES = tuple(
    Architecture(
        name=name,
        family="encoder",
        build=Builder(model_class, config_class, arguments),
        situations=ENCODER,
        sites=2,
        spellings=spellings,
        barred=barred,
    )
    for name, (model_class, config_class, arguments, spellings, barred) in _TABLE.items()
)
