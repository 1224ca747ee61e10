"""Masks are proved exactly or not at all; every proof is compared with the mask that was computed.

``check_all`` runs the captured graph and compares the boolean matrix of the real mask with that of
the proof, element by element, and the site's output with attention under the proof.
"""

import pytest
import torch
import torch.nn.functional as F

from seer_compile.passes.capture import CapturedGraph, capture_graphs
from seer_compile.passes.find_sites import find_sites
from seer_compile.passes.materialise import materialise
from seer_compile.passes.prove_masks import prove_masks
from seer_compile.passes.site_names import SiteNames
from seer_compile.types import SkipCode
from support.graphs import (
    B,
    NanoAttention,
    T,
    causal,
    draw,
    hf_inputs,
    hf_model,
    left_padding,
    qkv,
    trace,
)
from support.mask_oracle import Inspected, check_all, inspect_graph
from support.mask_programs import MaskProgram


def inspect_program(seed, dynamic):
    program = MaskProgram(seed)
    inputs = program.inputs(dynamic)
    captured = trace(program, *inputs, dynamic=dynamic)
    placeholders = [n for n in captured.graph_module.graph.nodes if n.op == "placeholder"]
    sites = find_sites(captured.graph_module, SiteNames())
    constants = {placeholders[-1]: inputs[-1]}
    return Inspected(captured, sites, prove_masks(captured.graph_module, sites, constants))


def run_programs(seeds, dynamic):
    """Return how many of the programs' masks were proved; each proof is checked."""
    proved = 0
    for seed in seeds:
        inspected = inspect_program(seed, dynamic)
        assert len(inspected.sites) == 1
        try:
            proved += check_all(inspected)
        except AssertionError as cause:
            raise AssertionError(f"program {seed} is proved wrongly") from cause
    return proved


def test_random_masks_are_proved_exactly_or_not_at_all():
    assert run_programs(range(40), dynamic=False) >= 10


def test_random_masks_of_symbolic_size_are_proved_exactly_or_not_at_all():
    assert run_programs(range(6), dynamic=True) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "dynamic", "least"),
    [(range(1000, 1400), False, 150), (range(1000, 1040), True, 10)],
    ids=["static", "dynamic"],
)
def test_many_random_masks_are_proved_exactly_or_not_at_all(seeds, dynamic, least):
    assert run_programs(seeds, dynamic) >= least


def test_oracle_notices_a_wrong_proof():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q, k))

    inspected = inspect_graph(trace(attend, *qkv()))
    (proof,) = inspected.proofs
    object.__setattr__(proof.visibility, "upper", 1)
    with pytest.raises(AssertionError):
        check_all(inspected)


def test_proving_changes_nothing():
    captured = trace(MaskProgram(3), *MaskProgram(3).inputs())
    before = str(captured.graph_module.graph)
    prove_masks(captured.graph_module, find_sites(captured.graph_module, SiteNames()))
    assert str(captured.graph_module.graph) == before


def test_constants_are_needed_for_a_triangle_in_a_buffer():
    model = NanoAttention().eval()
    (captured,) = capture_graphs(model, (draw(B, T, 32),))
    sites = find_sites(captured.graph_module, SiteNames(model))
    (proof,) = prove_masks(captured.graph_module, sites)
    assert proof.reason.code is SkipCode.OPAQUE_MASK


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (torch.ones(32, 32).tril(), "causal"),
        (torch.ones(32, 32).tril(2), "causal(offset=2)"),
        (torch.ones(32, 32).tril().triu(-3), "causal + window(4)"),
        (torch.ones(32, 32, dtype=torch.bool).tril(), "causal"),
        (torch.ones(32, 32), "full"),
        (torch.ones(32, 32).tril().flip(0), SkipCode.OPAQUE_MASK),
        (torch.ones(32, 32).tril() * 2 - torch.eye(32), SkipCode.OPAQUE_MASK),
        (
            torch.ones(32, 32)
            .tril()
            .index_put((torch.tensor(9), torch.tensor(2)), torch.tensor(0.0)),
            SkipCode.OPAQUE_MASK,
        ),
    ],
    ids=["tril", "tril-2", "band", "boolean", "ones", "flipped", "three-values", "one-hole"],
)
def test_buffer_is_proved_by_its_values(value, verdict):
    model = NanoAttention().eval()
    model.bias = value.view(1, 1, 32, 32)
    (captured,) = capture_graphs(model, (draw(B, T, 32),))
    inspected = inspect_graph(captured, model)
    assert inspected.verdicts == [verdict]
    check_all(inspected)


def test_flipped_triangle_in_a_buffer_is_not_taken_for_a_band():
    model = NanoAttention().eval()
    model.bias = torch.ones(64, 64).tril().T.contiguous().view(1, 1, 64, 64)
    (captured,) = capture_graphs(model, (draw(B, T, 32),))
    inspected = inspect_graph(captured, model)
    assert inspected.verdicts == ["keys from 0"]
    assert check_all(inspected) == 1


def test_materialised_padding_is_sliced_expanded_and_boolean():
    def attend(q, k, v, mask):
        mask = mask[:, None, None, 2:] & (torch.arange(T) < 9)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    captured = trace(attend, *qkv(), torch.ones(1, T + 2, dtype=torch.bool))
    inspected = inspect_graph(captured)
    (site,), (proof,) = inspected.sites, inspected.proofs
    visibility = materialise(proof, site, captured.graph_module.graph)
    assert visibility.key_padding.meta["val"].shape == (B, T)
    assert visibility.key_padding.meta["val"].dtype is torch.bool
    captured.graph_module.graph.lint()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_symbolic_bounds_follow_the_sizes(dynamic):
    def bottom_right(q, k, v):
        tokens, keys = q.shape[2], k.shape[2]
        rows = torch.arange(tokens)[:, None] + (keys - tokens)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(keys) <= rows)

    inspected = inspect_graph(trace(bottom_right, *qkv(7, 12), dynamic=dynamic))
    assert inspected.proofs[0].visibility is not None
    assert check_all(inspected) == 1


# --- Hugging Face: caches, padding, packed documents -----------------------------------------


def cached(model, kind, tokens=T):
    """A cache that holds some tokens."""
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=48)
    else:
        cache = DynamicCache(config=model.config)
    if tokens:
        with torch.no_grad():
            model(**hf_inputs("llama", tokens=tokens), past_key_values=cache)
    return cache


def sites_of(model, dynamic, **inputs):
    with torch.no_grad():
        (captured,) = capture_graphs(model, (), inputs, dynamic=dynamic)
    inspected = inspect_graph(captured, model)
    assert check_all(inspected) == len(inspected.sites) == 2
    return inspected


SCENARIOS = {
    "training": (lambda model: {"use_cache": False}, "causal"),
    "padding": (lambda model: {"attention_mask": left_padding()}, "causal + key padding"),
    "chunk": (lambda model: {"past_key_values": cached(model, "dynamic")}, "causal(offset=16)"),
    "padded chunk": (
        lambda model: {
            "past_key_values": cached(model, "dynamic"),
            "attention_mask": left_padding(2 * T),
        },
        "causal(offset=16) + key padding",
    ),
    "static prefill": (
        lambda model: {
            "past_key_values": cached(model, "static", 0),
            "attention_mask": left_padding(),
        },
        "causal + key padding",
    ),
    "static chunk": (lambda model: {"past_key_values": cached(model, "static")}, "causal(offset="),
    "packed": (
        lambda model: {
            "use_cache": False,
            "position_ids": torch.cat([torch.arange(5), torch.arange(T - 5)]).expand(B, -1),
        },
        "causal + same document",
    ),
}


@pytest.mark.parametrize(
    ("attention", "dynamic"),
    [
        ("sdpa", None),
        pytest.param("sdpa", True, marks=pytest.mark.slow),
        pytest.param("eager", None, marks=pytest.mark.slow),
        pytest.param("eager", True, marks=pytest.mark.slow),
    ],
)
def test_masks_of_a_decoder_are_proved_in_every_situation(attention, dynamic):
    model = hf_model("llama", attention)
    for name, (options, expected) in SCENARIOS.items():
        torch._dynamo.reset()
        inspected = sites_of(model, dynamic, **hf_inputs("llama", **options(model)))
        for verdict in inspected.verdicts:
            is_symbolic = dynamic and "offset=16" in expected
            assert is_symbolic or verdict.startswith(expected), f"{name}: {verdict}"


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_windows_of_a_decoder_are_proved_in_every_situation(dynamic):
    model = hf_model("mistral")
    for options, _ in SCENARIOS.values():
        torch._dynamo.reset()
        inspected = sites_of(model, dynamic, **hf_inputs("mistral", **options(model)))
        assert all("window(8)" in verdict for verdict in inspected.verdicts)


def test_counter_of_a_static_cache_is_copied_before_it_counts_on():
    model = hf_model("llama")
    inputs = hf_inputs("llama", past_key_values=cached(model, "static"))
    with torch.no_grad():
        (captured,) = capture_graphs(model, (), inputs)
    inspected = inspect_graph(captured, model)
    graph = captured.graph_module.graph
    before = [node for node in graph.nodes if node.target is torch.ops.aten.clone.default]
    offset = materialise(inspected.proofs[0], inspected.sites[0], graph).offset
    clones = [node for node in graph.nodes if node.target is torch.ops.aten.clone.default]
    assert len(clones) == len(before) + 1
    assert offset in clones
    counted = [node for node in graph.nodes if node.target is torch.ops.aten.add_.Tensor]
    order = list(graph.nodes)
    assert all(order.index(offset) < order.index(node) for node in counted)


def test_captured_graph_is_a_value():
    captured = trace(MaskProgram(0), *MaskProgram(0).inputs())
    assert isinstance(captured, CapturedGraph)
    with pytest.raises(AttributeError):
        captured.inputs = ()
