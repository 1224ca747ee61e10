"""Graphs on their way through the rewriting passes."""

from __future__ import annotations

import torch

from seer_compile.config import GateConfig, TopP
from seer_compile.gate_store import GateStore
from seer_compile.kernels.gated_attention import MODE_SPARSE
from seer_compile.passes import pipeline
from seer_compile.passes.constant_tensors import module_constants
from seer_compile.passes.find_sites import find_sites
from seer_compile.passes.gate_source import StoreGates
from seer_compile.passes.pipeline import Mode, PipelineOptions
from seer_compile.passes.plan import plan
from seer_compile.passes.prove_masks import prove_masks
from seer_compile.passes.site_names import SiteNames

OPS = torch.ops.seer_compile


def new_store(mass=1.0, **config):
    """A store whose untrained gates answer; with mass 1 they keep every visible block."""
    store = GateStore(GateConfig(selector=TopP(mass=mass), **config))
    store.set_mode(True, untrained=True)
    return store


def answer_sparsely(store):
    """Make every gate answer sparsely at any size, past the never-slower rule."""
    for _, gate in store.items():
        gate.mode.fill_(MODE_SPARSE)


def sites_of(captured, root=None):
    return find_sites(captured.graph_module, SiteNames(root))


def plan_of(captured, *, gates=None, exclude=(), root=None):
    sites = sites_of(captured, root)
    constants = module_constants(captured.graph_module, captured.inputs, root)
    proofs = prove_masks(captured.graph_module, sites, constants)
    return plan(sites, proofs, gates=gates, exclude=exclude)


def source(store, **options):
    return StoreGates(store, **options)


def rewrite(captured, store=None, *, mode=Mode.SPARSE, handler=None, **options):
    """Run the whole pipeline on a graph that is normal already."""
    return pipeline.run(
        captured.graph_module,
        names=SiteNames(None),
        mode=mode,
        gates=store if mode is Mode.SPARSE else None,
        handler=handler,
        options=PipelineOptions(**options),
    )


def assert_equal_within_rounding(actual, exact, eager):
    """Both results come from float32: each may be as far from float64 as the other."""
    worst = (eager.double() - exact).abs().max().item()
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert (actual.double() - exact).abs().max().item() <= 2 * worst + floor
