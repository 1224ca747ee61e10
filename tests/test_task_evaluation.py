"""Any task: the user's metric, at a density, beside dense and beside selections without a gate."""

import pytest
import torch
from torch import nn

import seer_compile
from seer_compile.errors import ModelStateError, RangeError, SeerInputError
from seer_compile.kernels.counters import active_meters
from seer_compile.task_evaluation import TaskEvaluator

TOKENS, WIDTH, HEADS = 256, 32, 2
SIZE = seer_compile.BlockSize(query=16, key=16)


class Copier(nn.Module):
    """Every token looks for the token with its own code, far away, and returns what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(6.0))

    def forward(self, codes, values):
        def split(x):
            return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        query = split(self.scale * codes)
        found = nn.functional.scaled_dot_product_attention(query, split(codes), split(values))
        return {"found": found.transpose(1, 2).flatten(2)}


def examples(count, first=0):
    """Batches of keyword arguments, and what should be found."""
    found = []
    for seed in range(first, first + count):
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(1, TOKENS // 2, WIDTH, generator=generator)
        codes = 4 * torch.cat([half, half], 1) / half.norm(dim=-1, keepdim=True).repeat(1, 2, 1)
        values = torch.randn(1, TOKENS, WIDTH, generator=generator)
        target = (values + values.roll(TOKENS // 2, 1)) / 2
        found.append(({"codes": codes, "values": values}, target))
    return found


def closeness(output, target):
    return 1 - ((output["found"] - target).norm() / target.norm()).item()


@pytest.fixture(scope="module")
def evaluator():
    return TaskEvaluator(Copier().eval(), examples(2), closeness, block_size=SIZE)


def test_the_metric_sees_output_and_target(evaluator):
    row = evaluator.run("dense")
    (inputs, target), *_ = evaluator.examples
    expected = [closeness(evaluator.model(**x), y) for x, y in evaluator.examples]
    assert row.score == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert row.density == 1
    assert row.asked_density is None
    assert row.examples == 2
    assert target.shape == inputs["values"].shape
    assert row.to_json()["method"] == "dense"


def test_a_perfect_selection_keeps_what_a_local_one_loses(evaluator):
    dense = evaluator.run("dense").score
    oracle, local, chance = (
        evaluator.run(name, 0.3) for name in ("oracle", "sink_local", "random")
    )
    assert oracle.density == pytest.approx(0.3, abs=0.02)
    assert local.density == pytest.approx(0.3, abs=0.04)
    assert oracle.score > local.score + 0.1
    assert oracle.score > chance.score + 0.1
    assert oracle.score > dense - 0.05


def test_gates_answer_sparsely_whatever_the_size():
    model = Copier().eval()
    evaluator = TaskEvaluator(model, examples(2), closeness)
    evaluator.run("dense")
    config = seer_compile.GateConfig(block_size=SIZE)
    seer_compile.optimize(model, config=config, inner="aot_eager")
    with pytest.raises(ModelStateError, match="calibrated gates"):
        evaluator.run("gate", 0.3, model.seer_gates)
    seer_compile.calibrate(
        model,
        [inputs for inputs, _ in examples(6, first=10)],
        config=seer_compile.CalibrationConfig(steps=6, warmup_steps=1, learning_rate=3e-3),
        progress=False,
    )
    row = evaluator.run("gate", 0.4, model.seer_gates)
    assert 0.2 < row.density < 0.6
    assert row.dense_end_to_end_ms > 0
    assert row.dense_calls  # at 256 tokens dense attention is faster, and answers in use
    metered = []
    runner = evaluator._runner
    forward = runner._forward
    runner._forward = lambda call: metered.append(bool(active_meters())) or forward(call)
    full = evaluator.run("gate", 1.0, model.seer_gates)
    # Blocks of both examples are counted, and what is timed is not slowed down by that.
    assert metered[-5:] == [True, True, False, False, False]
    assert full.score == pytest.approx(evaluator.run("dense").score, abs=1e-4)


def test_wrong_requests_are_refused(evaluator):
    with pytest.raises(SeerInputError):
        TaskEvaluator(Copier(), [], closeness)
    with pytest.raises(SeerInputError, match="density"):
        evaluator.run("oracle")
    with pytest.raises(SeerInputError, match="one of"):
        evaluator.run("magic", 0.1)
    with pytest.raises(RangeError):
        evaluator.run("oracle", 1.5)
