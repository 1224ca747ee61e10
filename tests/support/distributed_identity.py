"""One of two processes: a model under a data-parallel wrapper keeps its sites' names.

    python distributed_identity.py RANK PORT

Prints, as JSON, per kind of wrapper and order the names, the paths of the calls and a checksum of
what training left.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn

import seer_compile
from support.models import decoder, token_ids
from support.rewriting import answer_sparsely

SIZE = 2


def wrap(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    store = model._modules.get("seer_gates")
    ignored = set(store.parameters()) if store is not None else set()
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model, ignored_params=ignored)


def run(kind: str, order: str, rank: int) -> dict[str, object]:
    model = decoder().train()
    if order == "wrap first":
        model = wrap(model, kind)
    seer_compile.optimize(model, zero_shot=True, inner="aot_eager")
    whole = model if order == "wrap first" else wrap(model, kind)
    optimizer = torch.optim.SGD(
        [p for n, p in whole.named_parameters() if "seer_gates" not in n], lr=0.1
    )
    whole(token_ids(80, seed=rank)).square().mean().backward()
    optimizer.zero_grad()
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=0.3)
    for step in range(2):
        whole(token_ids(200, seed=10 * step + rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = whole.get_parameter(
        ("module." if kind == "ddp" else "") + "layers.0.qkv.weight"
    ).detach()
    full = getattr(weight, "full_tensor", lambda: weight)()
    report = seer_compile.seer_report(whole)
    return {
        "names": model.seer_gates.names(),
        "calls": report.calls,
        "errors": report.errors,
        "weights": full.double().sum().item(),
    }


def main() -> None:
    rank, port = int(sys.argv[1]), sys.argv[2]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    try:
        results = {
            f"{kind} {order}": run(kind, order, rank)
            for kind in ("ddp", "fsdp")
            for order in ("optimize first", "wrap first")
        }
        print(json.dumps(results))  # noqa: T201
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
