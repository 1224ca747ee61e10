"""No public call changes anything that is not the model's, and nothing of the model either."""

from __future__ import annotations

import copy
import inspect
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import seer_compile
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.types import BlockSize
from support.inputs import random_selection
from support.models import decoder, token_ids
from support.state import assert_nothing_global_changes

QUICK = CalibrationConfig(steps=3, warmup_steps=1, holdout_batches=1, checkpoint_every=3)
COMPILING = ("optimize", "_forward", "_backward", "restore")
"""Calls that lead to Inductor; the others do not depend on who compiles."""
DYNAMIC = ({1: torch.export.Dim("t", min=2)},)


def learn(model, tokens):
    model.seer_gates.requires_grad_(True)
    with seer_compile.distillation(model) as sites:
        model(tokens)
    sites.loss().backward()
    model.seer_gates.requires_grad_(False)


def calls_of(model, folder, inner):
    """Public names and a call of each, in an order in which they can be made; and other calls."""
    tokens, data = token_ids(80), [token_ids(128, seed=seed) for seed in range(4)]
    q = torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(0))
    selection, size = random_selection(1, 2, 2, 2, min_per_row=1), BlockSize(query=64, key=64)
    gates = folder / "gates.safetensors"
    api = seer_compile
    return [
        ("explain", lambda: api.explain(model, tokens, draw=folder / "sites.dot")),
        ("optimize", lambda: api.optimize(model, example=tokens, inner=inner)),
        ("distillation", lambda: learn(model, tokens)),
        (
            "calibrate",
            lambda: api.calibrate(
                model,
                data,
                config=QUICK,
                density=0.5,
                progress=False,
                checkpoint_dir=folder / "checkpoints",
            ),
        ),
        ("_forward", lambda: model(tokens)),
        ("_backward", lambda: model(token_ids(130)).sum().backward()),
        ("set_budget", lambda: api.set_budget(model, density=0.7)),
        ("save_gates", lambda: api.save_gates(model, gates)),
        ("load_gates", lambda: api.load_gates(model, gates)),
        ("export", lambda: api.export(model, (tokens,), dynamic_shapes=DYNAMIC)),
        ("seer_report", lambda: str(api.seer_report(model))),
        ("_copy", lambda: copy.deepcopy(model)(tokens)),
        ("restore", lambda: api.restore(model)),
        (
            "block_sparse_attention",
            lambda: api.block_sparse_attention(q, q, q, selection, block_size=size),
        ),
        ("AttnGate", lambda: api.AttnGate(2, 2, 8, config=GateConfig())),
        ("GateStore", lambda: api.GateStore().get_or_create("a", heads=2, kv_heads=2, head_dim=8)),
        ("_bare", lambda: torch.compile(model, backend="seer", options={"inner": inner})(tokens)),
    ]


def test_every_public_function_is_called_below(tmp_path):
    values = {name: getattr(seer_compile, name) for name in seer_compile.__all__}
    wanted = {
        name
        for name, value in values.items()
        if inspect.isfunction(value)
        or (inspect.isclass(value) and issubclass(value, torch.nn.Module))
    }
    called = {name for name, _ in calls_of(decoder(), tmp_path, "eager")}
    assert {name for name in called if not name.startswith("_")} == wanted


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_call_leaves_global_state_and_the_model_alone(tmp_path, inner):
    model = decoder().train()
    # What PyTorch sets up when it compiles for the first time is not ours.
    torch.compile(decoder(), backend=inner)(token_ids(8))
    weights = copy.deepcopy(model.state_dict())
    flags = [module.training for module in decoder().train().modules()]
    for what, call in calls_of(model, tmp_path, inner):
        if inner == "inductor" and what not in COMPILING:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with assert_nothing_global_changes(what):
                call()
        kept = model.state_dict()
        assert list(kept) == list(weights), what
        assert all(torch.equal(weights[key], kept[key]) for key in weights), what
        ours = [m.training for path, m in model.named_modules() if "seer_gates" not in path]
        assert ours == flags, what
        assert all(p.requires_grad for n, p in model.named_parameters() if "seer_gates" not in n)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("python random", random.random),
        ("numpy random", np.random.rand),
        ("torch random", lambda: torch.rand(1)),
        ("warning filters", lambda: warnings.simplefilter("ignore", ResourceWarning)),
        ("scaled_dot_product_attention", None),
    ],
)
def test_the_guard_sees_changes(what, change, monkeypatch):
    if change is None:

        def change():
            monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_: None)

    with (
        pytest.raises(AssertionError, match=what),
        warnings.catch_warnings(),
        assert_nothing_global_changes(),
    ):
        change()
