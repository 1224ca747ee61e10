"""Every malformed call is a typed error that names the argument; its repaired twin works."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from seer_compile.errors import (
    DeviceError,
    DtypeError,
    HeadConfigError,
    RangeError,
    SeerError,
    SeerInputError,
    SelectionError,
    ShapeError,
)
from seer_compile.kernels import ops
from seer_compile.types import BlockSelection, BlockSize, Visibility
from support.inputs import attention_inputs, key_padding, normal, random_selection
from support.kernel_cases import full_selection

BLOCKS = BlockSize(query=32, key=16)


def well_formed(name: str) -> dict[str, Any]:  # noqa: PLR0911
    """Return the arguments of a call that works, by name."""
    query, key, value, scale = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=80, head_dim=16)
    visibility = Visibility(upper=0, key_padding=key_padding([80, 30], 80))
    operands = {"query": query, "key": key, "scale": scale, "visibility": visibility}
    if name == "pool_blocks":
        return {"tokens": query, "size": 8, "kinds": ("mean",), "padding": visibility.key_padding}
    if name == "block_scores":
        return {
            "query_features": normal(2, 4, 20, 6),
            "key_features": normal(2, 4, 10, 6, seed=1),
            "scale": 0.5,
            "query_sub_block": 4,
            "key_sub_block": 8,
            "block_size": BLOCKS,
            "q_len": 80,
            "k_len": 80,
            "groups": 2,
            "visibility": visibility,
        }
    if name == "select_blocks":
        return {
            "scores": normal(2, 4, 3, 5).abs(),
            "budget": torch.full((4,), 0.5),
            "selector": "top_p",
            "block_size": BLOCKS,
            "q_len": 80,
            "k_len": 80,
            "visibility": visibility,
        }
    if name == "attention_mass":
        return {**operands, "query_unit": 8, "key_unit": 16}
    if name == "dense_attention":
        return {**operands, "value": value}
    if name == "block_sparse_attention":
        selection = random_selection(2, 4, 3, 5, density=0.6, min_per_row=2)
        return {**operands, "value": value, "selection": selection, "block_size": BLOCKS}
    return {
        **operands,
        "value": value,
        "query_weight": normal(4, 32, 6, seed=1),
        "key_weight": normal(4, 16, 6, seed=2),
        "budget": torch.full((4, 2), 0.5),
        "mode": torch.tensor(2, dtype=torch.int8),
        "query_pools": ("mean", "max"),
        "key_pools": ("min",),
        "query_sub_block": 4,
        "key_sub_block": 8,
        "block_size": BLOCKS,
        "sharing": "none",
        "selector": "top_p",
        "budget_lengths": [64, 256],
    }


def changed(argument: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """Return an edit of one argument."""

    def edit(arguments: dict[str, Any]) -> None:
        arguments[argument] = change(arguments[argument])

    return edit


def readable(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Return an edit of fields of the visibility."""

    def edit(arguments: dict[str, Any]) -> None:
        arguments["visibility"] = dataclasses.replace(arguments["visibility"], **fields)

    return edit


def selected(indices: Any = None, counts: Any = None) -> Callable[[dict[str, Any]], None]:
    """Return an edit of the selection."""

    def edit(arguments: dict[str, Any]) -> None:
        selection = arguments["selection"]
        arguments["selection"] = BlockSelection(
            indices(selection.indices) if indices else selection.indices,
            counts(selection.counts) if counts else selection.counts,
        )

    return edit


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


DOCUMENTS = torch.zeros(2, 80, dtype=torch.int64)
NOT_TENSORS = {"none": None, "list": [1.0], "text": "x", "number": 3}

ANY_VISIBILITY = [
    ("visibility is a dict", changed("visibility", constant({"upper": 0})), DtypeError),
    ("upper is a float", readable(upper=0.0), DtypeError),
    ("upper is a bool", readable(upper=True), DtypeError),
    ("lower is a tensor", readable(lower=torch.tensor(0)), DtypeError),
    ("offset is a float tensor", readable(offset=torch.tensor(1.0)), DtypeError),
    ("offset is an int", readable(offset=1), DtypeError),
    ("offset has an axis", readable(offset=torch.tensor([1])), ShapeError),
    ("key_padding is int", readable(key_padding=torch.ones(2, 80).int()), DtypeError),
    ("key_padding is short", readable(key_padding=torch.ones(2, 79).bool()), ShapeError),
    ("key_padding is of one item", readable(key_padding=torch.ones(1, 80).bool()), ShapeError),
    ("key_padding is flat", readable(key_padding=torch.ones(80).bool()), ShapeError),
    ("key_padding is on meta", readable(key_padding=meta(torch.ones(2, 80).bool())), DeviceError),
    ("key_padding is a list", readable(key_padding=[True]), DtypeError),
    ("query_documents alone", readable(query_documents=DOCUMENTS), ShapeError),
    ("key_documents alone", readable(key_documents=DOCUMENTS), ShapeError),
    (
        "query_documents is float",
        readable(query_documents=DOCUMENTS.float(), key_documents=DOCUMENTS),
        DtypeError,
    ),
    (
        "key_documents is short",
        readable(query_documents=DOCUMENTS, key_documents=DOCUMENTS[:, :9]),
        ShapeError,
    ),
]

ANY_OPERANDS = [
    ("query of rank 3", changed("query", lambda t: t[0]), ShapeError),
    ("query is integer", changed("query", lambda t: t.int()), DtypeError),
    ("query is float64", changed("query", lambda t: t.double()), DtypeError),
    ("query is complex", changed("query", lambda t: t.to(torch.complex64)), DtypeError),
    ("key of another dtype", changed("key", lambda t: t.half()), DtypeError),
    ("key of rank 5", changed("key", lambda t: t[None]), ShapeError),
    ("key of another batch", changed("key", lambda t: t[:1]), ShapeError),
    ("key of another head dim", changed("key", lambda t: t[..., :8]), ShapeError),
    (
        "key heads do not divide",
        changed("key", lambda t: t.repeat(1, 2, 1, 1)[:, :3]),
        HeadConfigError,
    ),
    ("key without heads", changed("key", lambda t: t[:, :0]), HeadConfigError),
    ("key on meta", changed("key", meta), DeviceError),
    ("scale is NaN", changed("scale", constant(math.nan)), RangeError),
    ("scale is infinite", changed("scale", constant(math.inf)), RangeError),
    ("scale is text", changed("scale", constant("1")), DtypeError),
    ("scale is a bool", changed("scale", constant(True)), DtypeError),
    ("scale is a tensor", changed("scale", constant(torch.tensor(1.0))), DtypeError),
    *[
        (f"query is {label}", changed("query", constant(value)), DtypeError)
        for label, value in NOT_TENSORS.items()
    ],
]

ANY_VALUE = [
    ("value is none", changed("value", constant(None)), DtypeError),
    ("value of another dtype", changed("value", lambda t: t.bfloat16()), DtypeError),
    ("value of other tokens", changed("value", lambda t: t[:, :, :79]), ShapeError),
    ("value of other heads", changed("value", lambda t: t[:, :1]), ShapeError),
    ("value of another batch", changed("value", lambda t: t[:1]), ShapeError),
    ("value on meta", changed("value", meta), DeviceError),
    ("value dim 0", changed("value", lambda t: t[..., :0]), ShapeError),
    ("value dim 257", changed("value", lambda t: t.new_zeros(2, 2, 80, 257)), ShapeError),
]

ANY_BLOCKS = [
    ("block_size is an int", changed("block_size", constant(64)), DtypeError),
    ("block_size is a tuple", changed("block_size", constant((64, 64))), DtypeError),
]

ANY_LENGTHS = [
    ("q_len is negative", changed("q_len", constant(-1)), RangeError),
    ("q_len is a float", changed("q_len", constant(80.0)), DtypeError),
    ("k_len is a bool", changed("k_len", constant(True)), DtypeError),
    ("k_len is none", changed("k_len", constant(None)), DtypeError),
]

CASES: dict[str, list[tuple[str, Callable[[dict[str, Any]], None], type[SeerError]]]] = {
    "pool_blocks": [
        ("tokens is a list", changed("tokens", constant([1.0])), DtypeError),
        ("tokens is integer", changed("tokens", lambda t: t.long()), DtypeError),
        ("tokens of rank 3", changed("tokens", lambda t: t[0]), ShapeError),
        ("size is zero", changed("size", constant(0)), RangeError),
        ("size is negative", changed("size", constant(-8)), RangeError),
        ("size is a float", changed("size", constant(8.0)), DtypeError),
        ("size is none", changed("size", constant(None)), DtypeError),
        ("kinds is text", changed("kinds", constant("mean")), DtypeError),
        ("kinds is empty", changed("kinds", constant(())), RangeError),
        ("kinds is unknown", changed("kinds", constant(("median",))), RangeError),
        ("kinds repeats", changed("kinds", constant(("max", "max"))), RangeError),
        ("kinds is a number", changed("kinds", constant(3)), DtypeError),
        ("padding is float", changed("padding", lambda t: t.float()), DtypeError),
        ("padding is short", changed("padding", lambda t: t[:, :7]), ShapeError),
        ("padding of rank 1", changed("padding", lambda t: t[0]), ShapeError),
        ("padding is a list", changed("padding", constant([True])), DtypeError),
        ("padding is on meta", changed("padding", meta), DeviceError),
    ],
    "block_scores": [
        *ANY_VISIBILITY,
        *ANY_BLOCKS,
        *ANY_LENGTHS,
        ("query_features is none", changed("query_features", constant(None)), DtypeError),
        ("query_features is flat", changed("query_features", lambda t: t[0]), ShapeError),
        ("query_features is int", changed("query_features", lambda t: t.int()), DtypeError),
        ("query_features is long", changed("query_features", lambda t: t[:, :, :9]), ShapeError),
        ("key_features is short", changed("key_features", lambda t: t[:, :, :9]), ShapeError),
        ("key_features is narrow", changed("key_features", lambda t: t[..., :5]), ShapeError),
        ("key_features of half", changed("key_features", lambda t: t.half()), DtypeError),
        ("key_features of heads", changed("key_features", lambda t: t[:, :2]), ShapeError),
        ("key_features on meta", changed("key_features", meta), DeviceError),
        ("query_sub_block is zero", changed("query_sub_block", constant(0)), RangeError),
        ("query_sub_block does not divide", changed("query_sub_block", constant(5)), RangeError),
        ("key_sub_block is zero", changed("key_sub_block", constant(0)), RangeError),
        ("key_sub_block does not divide", changed("key_sub_block", constant(12)), RangeError),
        ("key_sub_block is a float", changed("key_sub_block", constant(8.0)), DtypeError),
        ("groups is zero", changed("groups", constant(0)), RangeError),
        ("groups does not divide", changed("groups", constant(3)), HeadConfigError),
        ("scale is NaN", changed("scale", constant(math.nan)), RangeError),
    ],
    "select_blocks": [
        *ANY_VISIBILITY,
        *ANY_BLOCKS,
        *ANY_LENGTHS,
        ("scores is none", changed("scores", constant(None)), DtypeError),
        ("scores is float64", changed("scores", lambda t: t.double()), DtypeError),
        ("scores is half", changed("scores", lambda t: t.half()), DtypeError),
        ("scores of rank 3", changed("scores", lambda t: t[0]), ShapeError),
        ("scores has few rows", changed("scores", lambda t: t[:, :, :2]), ShapeError),
        ("scores has few columns", changed("scores", lambda t: t[..., :4]), ShapeError),
        ("budget is a number", changed("budget", constant(0.5)), DtypeError),
        ("budget is half", changed("budget", lambda t: t.half()), DtypeError),
        ("budget of other heads", changed("budget", lambda t: t[:3]), ShapeError),
        ("budget has two axes", changed("budget", lambda t: t[None]), ShapeError),
        ("budget is on meta", changed("budget", meta), DeviceError),
        ("selector is unknown", changed("selector", constant("best")), RangeError),
        ("selector is none", changed("selector", constant(None)), DtypeError),
    ],
    "attention_mass": [
        *ANY_OPERANDS,
        *ANY_VISIBILITY,
        ("query_unit is zero", changed("query_unit", constant(0)), RangeError),
        ("query_unit is none", changed("query_unit", constant(None)), DtypeError),
        ("key_unit is negative", changed("key_unit", constant(-4)), RangeError),
        ("key_unit is a float", changed("key_unit", constant(4.0)), DtypeError),
    ],
    "dense_attention": [*ANY_OPERANDS, *ANY_VALUE, *ANY_VISIBILITY],
    "block_sparse_attention": [
        *ANY_OPERANDS,
        *ANY_VALUE,
        *ANY_VISIBILITY,
        *ANY_BLOCKS,
        ("selection is none", changed("selection", constant(None)), DtypeError),
        ("selection is a tensor", changed("selection", lambda s: s.indices), DtypeError),
        ("selection of three", changed("selection", lambda s: (*s, s.counts)), DtypeError),
        ("indices is a list", selected(indices=lambda t: t.tolist()), DtypeError),
        ("indices is int64", selected(indices=lambda t: t.long()), DtypeError),
        ("indices of rank 3", selected(indices=lambda t: t[0]), ShapeError),
        (
            "indices has few rows",
            selected(lambda t: t[:, :, :2], lambda t: t[:, :, :2]),
            ShapeError,
        ),
        ("indices of one item", selected(lambda t: t[:1], lambda t: t[:1]), ShapeError),
        ("indices of 3 heads", selected(lambda t: t[:, :3], lambda t: t[:, :3]), HeadConfigError),
        ("indices on meta", selected(indices=meta), DeviceError),
        ("indices too large", selected(indices=lambda t: t.where(t < 4, 5)), SelectionError),
        ("indices negative", selected(indices=lambda t: t.clamp(max=4) - 5), SelectionError),
        ("indices repeated", selected(indices=torch.zeros_like), SelectionError),
        ("counts is float", selected(counts=lambda t: t.float()), DtypeError),
        ("counts of other heads", selected(counts=lambda t: t[:, :2]), ShapeError),
        ("counts above capacity", selected(counts=lambda t: t + 5), SelectionError),
        ("counts negative", selected(counts=lambda t: t - 9), SelectionError),
    ],
    "gated_attention": [
        *ANY_OPERANDS,
        *ANY_VALUE,
        *ANY_VISIBILITY,
        *ANY_BLOCKS,
        ("query_weight is none", changed("query_weight", constant(None)), DtypeError),
        ("query_weight is half", changed("query_weight", lambda t: t.half()), DtypeError),
        ("query_weight of heads", changed("query_weight", lambda t: t[:2]), ShapeError),
        ("query_weight of pools", changed("query_weight", lambda t: t[:, :16]), ShapeError),
        ("key_weight of kv heads", changed("key_weight", lambda t: t[:2]), ShapeError),
        ("key_weight of gate dim", changed("key_weight", lambda t: t[..., :5]), ShapeError),
        ("key_weight on meta", changed("key_weight", meta), DeviceError),
        ("budget is flat", changed("budget", lambda t: t[:, 0]), ShapeError),
        ("budget of lengths", changed("budget", lambda t: t[:, :1]), ShapeError),
        ("budget of key heads", changed("budget", lambda t: t[:2]), ShapeError),
        ("mode is an int", changed("mode", constant(2)), DtypeError),
        ("mode is int64", changed("mode", lambda t: t.long()), DtypeError),
        ("mode has an axis", changed("mode", lambda t: t[None]), ShapeError),
        (
            "mode is unknown",
            changed("mode", constant(torch.tensor(7, dtype=torch.int8))),
            RangeError,
        ),
        ("query_pools is text", changed("query_pools", constant("mean")), DtypeError),
        ("key_pools is unknown", changed("key_pools", constant(("sum",))), RangeError),
        ("query_sub_block does not divide", changed("query_sub_block", constant(5)), RangeError),
        ("key_sub_block is none", changed("key_sub_block", constant(None)), DtypeError),
        ("sharing is a flag", changed("sharing", constant(True)), DtypeError),
        ("sharing is unknown", changed("sharing", constant("heads")), RangeError),
        ("sharing needs a budget", changed("sharing", constant("selection")), ShapeError),
        ("key_weight is of a shared gate", changed("key_weight", lambda t: t[:2]), ShapeError),
        ("selector is unknown", changed("selector", constant("")), RangeError),
        ("budget_lengths descend", changed("budget_lengths", constant([256, 64])), RangeError),
        ("budget_lengths repeat", changed("budget_lengths", constant([64, 64])), RangeError),
        ("budget_lengths has zero", changed("budget_lengths", constant([0, 64])), RangeError),
        ("budget_lengths is floats", changed("budget_lengths", constant([1.0, 2.0])), DtypeError),
        ("site is none", changed("site", constant(None)), DtypeError),
    ],
}
FLAT = [
    pytest.param(name, *case, id=f"{name}: {case[0]}")
    for name, cases in CASES.items()
    for case in cases
]


def call(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(ops, name)(**arguments)


@pytest.mark.parametrize(("name", "what", "edit", "error"), FLAT)
def test_malformed_call_raises_a_typed_error_that_names_the_argument(name, what, edit, error):
    arguments = {"site": "site"} if name == "gated_attention" else {}
    arguments.update(well_formed(name))
    call(name, arguments)
    edit(arguments)
    with pytest.raises(error) as caught:
        call(name, arguments)
    message = caught.value
    assert isinstance(message, SeerInputError)
    assert message.argument
    assert message.expected
    assert f"{message.argument}=" in str(message)
    named = what.split()[0].removeprefix("query_").removeprefix("key_")
    assert named.split("_")[0] in message.argument or named in str(message)


def test_at_least_sixty_cases_stand_for_every_kind_of_call():
    assert len(FLAT) >= 180
    assert min(len(cases) for cases in CASES.values()) >= 15


@pytest.mark.parametrize(
    "name", ["block_sparse_attention", "gated_attention", "attention_mass", "pool_blocks"]
)
def test_operators_check_what_graphs_hand_them(name):
    query, key, value, scale = attention_inputs(heads=4, kv_heads=2, q_len=64, head_dim=16)
    wrong = key[..., :8]
    operator = getattr(torch.ops.seer_compile, name).v1
    selection = full_selection(1, 1, 1, 1)
    gate = well_formed("gated_attention")
    calls = {
        "block_sparse_attention": (query, wrong, value, *selection, scale, 64, 64),
        "attention_mass": (query, wrong, scale, 8, 8, "mean", "sum"),
        "pool_blocks": (query[0], 8, "mean"),
        "gated_attention": (
            query,
            wrong,
            value,
            gate["query_weight"],
            gate["key_weight"],
            gate["budget"],
            gate["mode"],
            scale,
            "mean,max",
            "min",
            4,
            8,
            32,
            16,
            "none",
            "top_p",
            [64, 256],
            "site",
        ),
    }
    with pytest.raises(ShapeError):
        operator(*calls[name])


@pytest.mark.slow
def test_errors_survive_optimised_python():
    program = (
        "import torch\n"
        "from seer_compile.kernels import ops\n"
        "try:\n"
        "    ops.pool_blocks(torch.zeros(1, 1, 8, 4), size=0)\n"
        "except ValueError as error:\n"
        "    assert_text = str(error)\n"
        "    raise SystemExit(0 if 'size=0' in assert_text else 3)\n"
        "raise SystemExit(4)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", program], check=False, timeout=120)
    assert done.returncode == 0
