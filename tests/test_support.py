"""The rules that judge everything else catch what they are there to catch."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from support.assertions import (
    assert_bitwise_equal,
    assert_ignores,
    assert_no_worse_than_eager,
    assert_ops,
    assert_unchanged,
)
from support.inputs import (
    attention_inputs,
    documents,
    key_padding,
    normal,
    random_selection,
    selection_from_map,
    with_layout,
)
from support.state import assert_global_state_unchanged, describe_changes, global_state


def product(dtype):
    left, right = (
        normal(2, 4, 33, 16, dtype=dtype, seed=1),
        normal(2, 4, 16, 8, dtype=dtype, seed=2),
    )
    return left @ right, left.double() @ right.double()


def scale_by_one_percent(result):
    return result * 1.01


def spoil_one_element(result):
    result[0, 1, 3, 5] += 0.05
    return result


def swap_heads(result):
    return result.flip(1)


def drop_last_row(result):
    result[:, :, -1] = 0
    return result


def write_nan(result):
    result[1, 2, 3, 4] = float("nan")
    return result


def lose_precision(result):
    return (result.to(torch.bfloat16) + 0.004).to(result.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "spoil",
    [
        scale_by_one_percent,
        spoil_one_element,
        swap_heads,
        drop_last_row,
        write_nan,
        lose_precision,
    ],
)
def test_numeric_rule_rejects_wrong_results(spoil, dtype):
    eager, gold = product(dtype)
    with pytest.raises(AssertionError):
        assert_no_worse_than_eager(spoil(eager.clone()), eager, gold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numeric_rule_accepts_another_order_of_summation(dtype):
    eager, gold = product(dtype)
    rounded_once = gold.to(dtype)
    assert_no_worse_than_eager(rounded_once, eager, gold)
    assert_no_worse_than_eager(eager, eager, gold)


def test_numeric_rule_sees_an_error_in_one_quiet_head():
    eager, gold = product(torch.float32)
    quiet = torch.tensor([1.0, 1.0, 1.0, 1e-6]).reshape(1, 4, 1, 1)
    eager, gold = eager * quiet, gold * quiet.double()
    wrong = eager.clone()
    wrong[:, 3] *= 1.05
    with pytest.raises(AssertionError, match="head 3"):
        assert_no_worse_than_eager(wrong, eager, gold)


def test_numeric_rule_compares_infinities_exactly():
    gold = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    good = gold.float()
    assert_no_worse_than_eager(good, good, gold)
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse_than_eager(torch.tensor([1.0, -1e30]), good, gold)


def test_bitwise_rule_treats_nan_as_equal_to_nan():
    values = torch.tensor([1.0, float("nan")])
    assert_bitwise_equal(values, values.clone())
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_bitwise_equal(values, torch.tensor([1.0, 2.0]))


def test_poison_rule_catches_a_masked_sum_that_multiplies():
    values, keep = normal(2, 8), torch.arange(8).expand(2, 8) < 5
    inputs = {"values": values, "keep": keep}
    assert_ignores(lambda values, keep: values.where(keep, 0.0).sum(1), inputs, {"values": ~keep})
    with pytest.raises(AssertionError):
        assert_ignores(lambda values, keep: (values * keep).sum(1), inputs, {"values": ~keep})


def test_poison_rule_refuses_to_prove_nothing():
    with pytest.raises(AssertionError, match="prove nothing"):
        assert_ignores(
            lambda values: values, {"values": normal(4)}, {"values": torch.zeros(4).bool()}
        )


def test_graph_rules_see_an_added_call_and_a_changed_tag():
    graph_module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(AssertionError), assert_unchanged(graph_module):
        next(iter(graph_module.graph.nodes)).meta["seen"] = True
    with pytest.raises(AssertionError), assert_unchanged(graph_module):
        graph_module.graph.call_function(torch.relu, (next(iter(graph_module.graph.nodes)),))
    with pytest.raises(AssertionError):
        assert_ops(graph_module, {torch.relu: 0})


def test_state_guard_sees_settings_and_variables():
    before = global_state()
    torch.set_default_dtype(torch.float64)
    os.environ["SEER_TEST_VARIABLE"] = "1"
    changes = describe_changes(before, global_state())
    torch.set_default_dtype(torch.float32)
    del os.environ["SEER_TEST_VARIABLE"]
    assert set(changes) == {"default dtype", "$SEER_TEST_VARIABLE"}
    with pytest.raises(AssertionError, match="generator"), assert_global_state_unchanged():
        torch.rand(1)


def test_uninitialised_memory_is_poisoned_inside_the_package_only():
    allocate = "import torch\nresult = (torch.empty(4), torch.ones(2).new_empty(3))"
    inside, outside = {"__name__": "seer_compile.kernels.any"}, {"__name__": "elsewhere"}
    exec(allocate, inside)
    exec(allocate, outside)
    assert all(tensor.isnan().all() for tensor in inside["result"])
    assert not all(tensor.isnan().all() for tensor in outside["result"])


def test_poisoned_allocation_compiles_in_one_graph():
    compiled = torch.compile(
        lambda x: torch.empty(3).fill_(1.0) + x, backend="aot_eager", fullgraph=True
    )
    assert compiled(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("layout", ["tokens_first", "sliced", "expanded_batch"])
def test_layouts_change_strides_and_keep_values(layout):
    plain = attention_inputs(batch=1, heads=2, q_len=5, head_dim=4, seed=3)
    other = attention_inputs(batch=1, heads=2, q_len=5, head_dim=4, seed=3, layout=layout)
    assert torch.equal(plain.query, other.query)
    two = with_layout(normal(2, 2, 5, 4), layout)
    assert two.stride() != torch.empty(2, 2, 5, 4).stride()


def test_inputs_repeat_and_differ_by_seed():
    first, again = attention_inputs(seed=1), attention_inputs(seed=1)
    other = attention_inputs(seed=2)
    assert torch.equal(first.key, again.key)
    assert not torch.equal(first.key, other.key)
    assert not torch.equal(first.key, first.value)


def test_selection_of_a_map_is_ascending_and_marks_the_rest_invalid():
    keep = torch.tensor([[[[True, False, True, True], [False, False, False, False]]]])
    indices, counts = selection_from_map(keep)
    assert counts.tolist() == [[[3, 0]]]
    assert indices[0, 0, 0, :3].tolist() == [0, 2, 3]
    assert indices[0, 0, 1].tolist() == [2**31 - 1] * 4


def test_random_selection_keeps_visible_blocks_only_and_at_least_some():
    visible = torch.ones(5, 5).tril().bool()
    indices, counts = random_selection(2, 3, 5, 5, density=0.1, visible=visible, min_per_row=1)
    assert (counts >= 1).all()
    for row in range(5):
        kept = indices[:, :, row]
        assert (kept[kept < 5] <= row).all()


def test_padding_and_documents_are_what_they_say():
    assert key_padding([2, 4], 4).tolist() == [[False, False, True, True], [True] * 4]
    assert key_padding([1], 3, side="right").tolist() == [[True, False, False]]
    assert documents([2, 3], 5).tolist() == [0, 0, 1, 2, 2]
