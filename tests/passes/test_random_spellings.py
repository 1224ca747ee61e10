"""Random compositions of spellings: replaced where they mean attention, and equal in any case."""

from __future__ import annotations

from seer_compile.kernels import counters
from seer_compile.types import BlockSize, SkipCode
from support.attention_programs import Program, Shuffled
from support.graphs import trace
from support.near_misses import assert_same_results
from support.rewriting import answer_sparsely, new_store, rewrite

QUICK, THOROUGH = 40, 1500


def rewritten(program, inputs, *, dynamic=False):
    """Return the pipeline's result for a program, whose sites answer sparsely."""
    store = new_store(block_size=BlockSize(query=16, key=16))
    result = rewrite(trace(program, *inputs, dynamic=dynamic), store)
    answer_sparsely(store)
    counters.reset()
    return result


def check_program(seed, *, dynamic=False):
    program = Program(seed)
    inputs = program.inputs()
    result = rewritten(program, inputs, dynamic=dynamic)
    label = f"{program.form} {program.sizes}"
    (decision,) = result.plan.decisions
    reason = decision.reason.code if decision.reason is not None else None
    expected = program.reasons or {None}
    if dynamic and program.merges_heads_with_sinks:
        expected = expected | {SkipCode.RANK}
    assert reason in expected, f"{decision.reason}, expected {expected}: {label}"
    assert_same_results(result.graph_module, program, inputs)
    if reason is None:
        assert counters.snapshot() == {decision.site.name: {"sparse": 1}}, label


def check_shuffled(seed):
    program = Shuffled(seed)
    try:
        program(*program.inputs())
    except RuntimeError:
        return None
    result = rewritten(program, program.inputs())
    assert_same_results(result.graph_module, program, program.inputs())
    return bool(result.rewritten)


def seeds(request):
    return range(THOROUGH if request.config.getoption("--all-combinations") else QUICK)


def test_random_spelling_is_replaced_and_equal(request):
    for seed in seeds(request):
        check_program(seed)


def test_random_spelling_of_symbolic_sizes_is_replaced_and_equal(request):
    for seed in list(seeds(request))[::20]:
        check_program(seed, dynamic=True)


def test_products_with_their_axes_in_any_order_are_never_taken_for_others(request):
    outcomes = [check_shuffled(seed) for seed in seeds(request)]
    assert sum(outcome is True for outcome in outcomes) > len(outcomes) // 10
    assert sum(outcome is False for outcome in outcomes) > len(outcomes) // 10
