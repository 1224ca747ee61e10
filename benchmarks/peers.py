"""How fast is attention to selected blocks beside its peers, on random lists and on a gate's?

    python benchmarks/peers.py --out peers.jsonl
    python benchmarks/peers.py --model DIR --gates G.safetensors --tokens T.u16 --out peers.jsonl

bf16, batch 1, 32 query and 8 key heads of 128, causal, blocks of 64 x 64, one selection per key
head. Random lists keep the same share of every row, the diagonal and the first block among them. A
gate's lists are those of a calibrated model's sites at the same length and density, one selection
of each site in turn: rows and sites differ as they do in use. The tensors are the same for all.

Peers in the same run: the portable kernel, FlexAttention (compiled; full blocks unmasked), dense
attention by flash and by cuDNN, and FlashAttention-4 where it is installed, which needs blocks of
128 x 128 and so gets random lists of its own. Some rows of every sparse answer are compared with
float64, dense answers with each other, before anything is timed. ``ms`` counts calls in a loop,
``device_ms`` replays them in a CUDA graph. TFLOP/s count the kept blocks, or half of the square.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from gated_calls import Operands, Shape, Size, operands
from measuring import (
    BACKENDS,
    Row,
    add_common_options,
    context,
    device_ms,
    eager_ms,
    table,
    write_rows,
)
from op_checks import LIMIT, check_call
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import seer_compile
from seer_compile.gate_store import GateStore
from seer_compile.kernels import by_device, flash_attention_4
from seer_compile.kernels.engines import attention_engine
from seer_compile.model_loading import load_model
from seer_compile.session import run_with_handler
from seer_compile.token_data import read_token_file
from seer_compile.types import SiteInputs, Visibility

SHAPE = Shape(32, 8, 128)
CAUSAL = Visibility(upper=0)


class Lists(NamedTuple):
    """Selected blocks, one selection per key head."""

    origin: str
    """``random``, or ``gate``."""
    indices: Tensor
    """``Int32[1 g m n]``, ascending in the first ``counts`` entries of a row."""
    counts: Tensor
    """``Int32[1 g m]``."""
    block: int
    """Tokens per query block and per key block."""

    @property
    def kept(self) -> int:
        """Blocks of all selections."""
        return int(self.counts.sum(dtype=torch.int64))

    @property
    def density(self) -> float:
        """Kept blocks / causal blocks."""
        rows = self.counts.shape[-1]
        return self.kept / (self.counts.shape[1] * rows * (rows + 1) / 2)


def random_lists(
    length: int, density: float, selections: int, block: int, device: torch.device
) -> Lists:
    """Keep a share of the causal blocks of every row at random."""
    blocks = -(-length // block)
    generator = torch.Generator(device).manual_seed(length)
    scores = torch.rand((1, selections, blocks, blocks), generator=generator, device=device)
    budget = torch.full((selections,), density, dtype=torch.float64, device=device)
    indices, counts = torch.ops.seer_compile.select_blocks.v1(
        scores, budget, "fraction", block, block, length, length, *CAUSAL.as_arguments().values()
    )
    return Lists("random", indices, counts, block)


def lists_of_gates(model: nn.Module, inputs: Mapping[str, Any], selections: int) -> Lists:
    """Return what the gates of an optimized model select in one forward, at their budgets.

    Args:
        model: Answer of ``seer_compile.optimize`` with trained gates.
        inputs: The model's arguments, one sequence.
        selections: How many lists; those of the sites are taken in turn, first those of each
            site's first key head.
    """
    store = model.get_submodule("seer_gates")
    assert isinstance(store, GateStore)
    found: list[tuple[Tensor, Tensor]] = []

    def answer(site: SiteInputs) -> Tensor:
        gate = store.get(site.name)
        assert gate is not None, site.name
        found.append(tuple(gate.select(site)))
        return gate.attend(site)

    run_with_handler(model, (), inputs, answer)
    if not found:
        raise SystemExit("the forward reached no site that can be sparse")
    # Key heads first, then sites: every site has its turn before any has a second one.
    indices, counts = (
        torch.stack(parts, dim=2).flatten(1, 2) for parts in zip(*found, strict=True)
    )
    turns = torch.arange(selections, device=counts.device) % counts.shape[1]
    return Lists("gate", indices[:, turns].contiguous(), counts[:, turns].contiguous(), 64)


def block_mask(lists: Lists, heads: int, length: int) -> BlockMask:
    """Return lists as FlexAttention reads them: the diagonal masked, all other blocks full."""
    blocks = (lists.block, lists.block)
    parts = flash_attention_4.split_lists(lists.indices, lists.counts, heads, blocks, 0)

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return BlockMask.from_kv_blocks(
        *parts, BLOCK_SIZE=blocks, mask_mod=causal, seq_lengths=(length, length)
    )


def flex_call(tensors: Operands, lists: Lists) -> Callable[[], Tensor]:
    """Return the compiled FlexAttention call."""
    mask = block_mask(lists, tensors[0].shape[1], tensors[0].shape[2])
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"BLOCK_M": lists.block, "BLOCK_N": lists.block} if tensors[0].is_cuda else None
    return lambda: compiled(*tensors, block_mask=mask, enable_gqa=True, kernel_options=options)


def engine_call(engine: str, tensors: Operands, lists: Lists) -> Callable[[], Tensor]:
    """Return a call to the kernels of one engine."""
    scale, blocks = tensors[0].shape[3] ** -0.5, (lists.block, lists.block)
    selection = (lists.indices, lists.counts)

    def call() -> Tensor:
        with attention_engine(engine):
            return by_device.block_sparse_attention(
                *tensors, selection, scale, blocks, CAUSAL, None, None
            )[0]

    return call


def sparse_calls(tensors: Operands, lists: Lists) -> dict[str, Callable[[], Tensor]]:
    """Return who attends to these lists."""
    if lists.block == 128:
        name = flash_attention_4.NAME
        return {name: engine_call(name, tensors, lists)}
    calls = {name: engine_call(name, tensors, lists) for name in ("auto", "portable")}
    return {**calls, "flex": flex_call(tensors, lists)}


def sparse_row(
    name: str, call: Callable[[], Tensor], tensors: Operands, lists: Lists, asked: float
) -> Row:
    """Check some rows of an answer, then time it."""
    query, key, value = tensors
    scale, blocks = query.shape[3] ** -0.5, (lists.block, lists.block)
    selection = (lists.indices, lists.counts)
    check_call(call(), query, key, value, selection, scale, blocks, CAUSAL)
    heads_per_list = query.shape[1] / lists.counts.shape[1]
    work = 4 * query.shape[3] * lists.block**2 * heads_per_list * lists.kept
    about = {"what": name, "lists": lists.origin, "block": lists.block, "asked": asked}
    return {**about, "density": round(lists.density, 4), **timed(call, work, query.device.type)}


def timed(call: Callable[[], Tensor], work: float, device: str) -> Row:
    """Return times in milliseconds, and TFLOP/s on the device."""
    row = {"ms": eager_ms(call, device), "device_ms": device_ms(call, device)}
    return {**row, "tflops": work / row["device_ms"] / 1e9}


def dense_rows(tensors: Operands) -> Iterator[Row]:
    """Time the dense kernels, which must give one answer."""
    heads, length, dim = tensors[0].shape[1:]
    answers: dict[str, Tensor] = {}
    for name in ("flash", "cudnn") if tensors[0].is_cuda else ("default",):
        call = functools.partial(BACKENDS[name], *tensors, dim**-0.5)
        answers[name] = call()
        first = next(iter(answers.values())).float()
        difference = float((answers[name].float() - first).norm() / first.norm())
        if not difference <= LIMIT:
            raise SystemExit(f"dense {name} is off by {difference:.3g}")
        yield {"what": name, **timed(call, 2.0 * heads * length**2 * dim, tensors[0].device.type)}


def measure(
    tensors: Operands,
    densities: list[float],
    model: nn.Module | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """Yield a row per peer, origin of lists, and density."""
    length, device = tensors[0].shape[2], tensors[0].device
    selections = tensors[1].shape[1]
    yield from dense_rows(tensors)
    for density in densities:
        choices = [random_lists(length, density, selections, 64, device)]
        if model is not None and inputs is not None:
            seer_compile.set_budget(model, density=density)
            choices.append(lists_of_gates(model, inputs, selections))
        if importlib.util.find_spec("flash_attn") is not None and device.type == "cuda":
            choices.append(random_lists(length, density, selections, 128, device))
        for lists in choices:
            for name, call in sparse_calls(tensors, lists).items():
                yield sparse_row(name, call, tensors, lists, density)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05])
    parser.add_argument("--model", type=Path, help="whose gates choose blocks")
    parser.add_argument("--gates", type=Path, help="calibrated gates of that model")
    parser.add_argument("--tokens", type=Path, help="token ids for that model")
    add_common_options(parser)
    options = parser.parse_args()
    given = [options.model is None, options.gates is None, options.tokens is None]
    if any(given) and not all(given):
        parser.error("--model, --gates and --tokens go together")
    device = torch.device(options.device)
    model = None
    if options.model:
        loaded = load_model(options.model, device=device, dtype="auto")
        model = seer_compile.optimize(loaded, gates=options.gates, inner="aot_eager")
    about = {"figure": "peers", **SHAPE._asdict(), **context(options, "peers.py")}
    for length in options.lengths:
        inputs = None
        if options.tokens:
            ids = torch.from_numpy(read_token_file(options.tokens)[:length].astype("int64"))
            inputs = {"input_ids": ids[None].to(device), "use_cache": False}
        tensors = operands(SHAPE, Size(length, length), device)
        with torch.no_grad():
            rows = measure(tensors, options.densities, model, inputs)
            rows = write_rows(options.out, rows, {**about, "length": length})
        columns = ["what", "lists", "block", "asked", "density", "ms", "device_ms", "tflops"]
        print(f"{length:,} tokens\n{table(rows, columns)}", flush=True)


if __name__ == "__main__":
    main()
