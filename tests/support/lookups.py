"""Five sites of which one looks single tokens up: what half the sub-blocks are for."""

from __future__ import annotations

import torch

from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.types import BlockSize, SiteInputs, Visibility
from support.inputs import generator

BLOCK, DIM, TOKENS = 16, 32, 2048
GATES = GateConfig(
    query_sub_block=4, key_sub_block=4, gate_dim=32, block_size=BlockSize(query=BLOCK, key=BLOCK)
)
TRAINING = CalibrationConfig(
    steps=2, warmup_steps=1, holdout_batches=1, sensitivity_batches=1, checkpoint_every=1
)
LOOKUP = "layers.2.attn"
NAMES = [f"layers.{place}.attn" for place in range(5)]


class Lookups:
    """Five causal sites, of which one looks up single tokens; the others look for whole blocks."""

    def __init__(self):
        self.forwards = 0

    def __call__(self, batch, handler):
        """Answer the sites by a handler; the output is the sum of theirs."""
        self.forwards += 1
        total = 0.0
        for place in range(5):
            name, seed = f"layers.{place}.attn", int(batch["seed"]) * 5 + place
            total = total + handler(self.site(name, seed, looks_up=name == LOOKUP))
        return total

    def site(self, name, seed, *, looks_up):
        draw = generator(seed)
        run = 1 if looks_up else BLOCK
        codes = torch.nn.functional.normalize(
            torch.randn(TOKENS // run, DIM, generator=draw), dim=1
        )
        key = (9 * codes).repeat_interleave(run, 0)
        own = torch.arange(TOKENS) // run
        sought = (torch.rand(TOKENS // run, generator=draw).repeat_interleave(run) * own).long()
        if looks_up:
            # One query of a block looks something up, the others read what is near.
            sought = torch.where(own % BLOCK == BLOCK // 2, sought, own)
        query = 9 * codes[sought]
        return SiteInputs(
            name=name,
            query=query[None, None],
            key=key[None, None],
            value=torch.randn(1, 1, TOKENS, DIM, generator=draw),
            scale=DIM**-0.5,
            visibility=Visibility(upper=0),
        )


def data(count=4, first=0):
    """Return batches for :class:`Lookups`."""
    return [{"seed": torch.tensor(first + place)} for place in range(count)]
