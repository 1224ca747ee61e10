"""Every combination of the arguments of ``F.scaled_dot_product_attention``, by its outcome.

A call that PyTorch accepts is either replaced, with equal numbers while the sparse operator keeps
every block, or left as it is for a reason that applies. A call that PyTorch refuses is refused
after the passes too. The default run takes a seeded sample; ``--all-combinations`` takes them all,
and ``-rP`` shows how many had which outcome.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import Counter

import pytest
import torch

from seer_compile.errors import PassError
from seer_compile.kernels import counters
from seer_compile.types import BlockSize, SkipCode
from support.assertions import assert_bitwise_equal
from support.graphs import trace
from support.rewriting import answer_sparsely, new_store, rewrite
from support.sdpa_combinations import (
    MASKS,
    OTHER_LENGTHS,
    Combination,
    call,
    combinations,
    exact,
    sample,
    tensors_of,
)

BATCH_OF_CALLS = 24


def expected_reasons(one: Combination) -> set[SkipCode]:
    """Every reason that applies; none for a call that must be replaced."""
    mask = MASKS[one.mask]
    is_grouped = one.heads.startswith("grouped")
    # In three dimensions a batch of 1 is nothing but fewer heads.
    keys_and_values_differ = one.broadcast == "value_batch" and (one.rank > 3 or is_grouped)
    shares_keys = one.broadcast == "key_batch" and one.rank > 3
    shares_queries = one.broadcast == "query_batch" and one.rank > 3
    reasons = {
        SkipCode.DROPOUT: one.dropout > 0,
        SkipCode.DTYPE: one.dtype == "float64",
        SkipCode.DECODE: one.lengths == "decode",
        SkipCode.HEADS: shares_queries,
        SkipCode.RANK: keys_and_values_differ or shares_keys,
    }
    found = {reason for reason, applies in reasons.items() if applies}
    return found | ({mask.reason} if mask is not None and mask.reason is not None else set())


def run_together(batch, *, dynamic):
    """Trace many calls into one graph, rewrite it, and judge each call; return the outcomes."""
    tensors = [tensors_of(one) for one in batch]
    ends = list(itertools.accumulate(len(own) for own in tensors))
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def calls(*flat):
        return tuple(call(one, *flat[span]) for one, span in zip(batch, spans, strict=True))

    flat = [tensor for own in tensors for tensor in own]
    captured = trace(calls, *flat, dynamic=dynamic)
    store = new_store(block_size=BlockSize(query=16, key=16))
    result = rewrite(captured, store)
    answer_sparsely(store)
    assert len(result.plan.decisions) == len(batch)
    for one, decision in zip(batch, result.plan.decisions, strict=True):
        expected = expected_reasons(one)
        got = decision.reason.code if decision.reason is not None else None
        if dynamic and one.rank == 3 and one.heads.startswith("grouped"):
            # Whether merged sizes stay symbolic depends on the other calls of the graph.
            expected |= {got} & {SkipCode.HEADS}
        assert got in (expected or {None}), f"{one.name}: {decision.reason}, expected {expected}"
    judge(batch, result, tensors)
    if dynamic:
        judge(batch, result, [tensors_of(one, OTHER_LENGTHS[one.lengths]) for one in batch])
    return [
        f"dense: {decision.reason.code.name}" if decision.reason else "replaced"
        for decision in result.plan.decisions
    ]


def judge(batch, result, tensors):
    flat = [tensor for own in tensors for tensor in own]
    counters.reset()
    torch.manual_seed(1)
    actual = result.graph_module(*flat)
    answered = counters.snapshot()
    torch.manual_seed(1)
    eager = [call(one, *own) for one, own in zip(batch, tensors, strict=True)]
    rows = zip(batch, result.plan.decisions, tensors, actual, eager, strict=True)
    for one, decision, own, ours, plain in rows:
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype), one.name
        if not decision.is_sparse:
            assert_bitwise_equal(ours, plain, name=one.name)
            continue
        assert answered[decision.site.name] == {"sparse": 1}, one.name
        gold = exact(one, *own)
        mask = MASKS[one.mask]
        results = (ours, plain, gold)
        if mask is not None and mask.is_finite:
            # Its first item may read nothing: PyTorch averages, the operator answers 0.
            results = tuple(x.flatten(0, -4)[1:] for x in results)
        assert_equal_within_rounding(*results, one.name)


def assert_equal_within_rounding(ours, plain, gold, name):
    """Both round in one dtype: each may be as far from float64 as the other."""
    if gold.numel() == 0:
        return
    worst, error = ((x.double() - gold).abs().max().item() for x in (plain, ours))
    floor = 4 * torch.finfo(ours.dtype).eps * gold.abs().max().item()
    assert error <= 2 * worst + floor, f"{name}: error {error:.3g}, PyTorch's own {worst:.3g}"


def is_refused(one) -> bool:
    try:
        call(one, *tensors_of(one))
    except (RuntimeError, IndexError):
        return True
    return False


def check_refusal(one):
    """What PyTorch refuses is refused: by the tracing, or by the rewritten graph."""
    tensors = tensors_of(one)
    try:
        captured = trace(lambda *own: call(one, *own), *tensors)
    except (RuntimeError, IndexError, ValueError):
        return "refused by the tracing"
    try:
        graph_module = rewrite(captured, store := new_store()).graph_module
        answer_sparsely(store)
    except PassError:
        return "refused by a pass"
    with pytest.raises((RuntimeError, IndexError)):
        graph_module(*tensors)
    return "refused by the graph"


def run_all(chosen, *, each_dynamic):
    """Judge all calls, one of ``each_dynamic`` with symbolic sizes; return the outcomes."""
    outcomes: Counter[str] = Counter()
    accepted = []
    for one in chosen:
        if is_refused(one):
            outcomes[check_refusal(one)] += 1
        else:
            accepted.append(one)
    by_sizes = {True: accepted[::each_dynamic], False: accepted}
    del by_sizes[False][::each_dynamic]
    for dynamic, own in by_sizes.items():
        for start in range(0, len(own), BATCH_OF_CALLS):
            outcomes.update(run_together(own[start : start + BATCH_OF_CALLS], dynamic=dynamic))
    assert outcomes.total() == len(chosen)
    return outcomes


def test_every_call_is_replaced_and_equal_or_left_for_a_reason(request, caplog):
    # Each shape that does not fit is logged with its stack.
    caplog.set_level(logging.CRITICAL, logger="torch._subclasses.fake_tensor")
    everything = request.config.getoption("--all-combinations")
    chosen = combinations() if everything else sample(240)
    outcomes = run_all(chosen, each_dynamic=12)
    rows = [f"{count:6d} {outcome}" for outcome, count in outcomes.most_common()]
    rows.insert(0, f"{len(chosen)} of {len(combinations())} combinations")
    sys.stdout.write("\n".join(rows) + "\n")
    assert outcomes["replaced"] > len(chosen) // 20


def test_there_are_thousands_of_distinct_combinations():
    everything = combinations()
    assert len(set(everything)) == len(everything) >= 2160
