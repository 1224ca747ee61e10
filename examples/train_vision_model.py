"""Train a small image model whose answers stand far from the questions, then make it sparse.

Each picture of 512 x 512 holds sixteen coloured handwritten digits in eight pairs of one colour,
among grey digits and strokes. Asked at one digit, the model says which digit the other of its
colour is: 4,096 patches, attention in all directions, no rotary embedding, no text. The digits are
scikit-learn's ``load_digits``; those of the evaluation are never seen in training.

    python examples/train_vision_model.py --minutes 2.5 --out results.jsonl      # one H200
    python examples/train_vision_model.py --tiny                # a CPU; too short to learn much

Expected last lines (accuracy of the answers; numbers vary between machines):

    method            density  accuracy
    dense               1.000   0.9...
    gate                0.100   0.9...
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seer_compile
from seer_compile.gate_store import GateStore
from seer_compile.task_evaluation import TaskEvaluator, TaskRow

PATCH = 8
CELL = 32
"""Pixels of a square that holds at most one digit."""
TILE = 24
PAIRS, GREY_DIGITS, STROKES = 8, 24, 24
HUES = 12
CLASSES = 10
METHODS = ("gate", "oracle", "zero_shot", "mean_pool", "mean_pool_top_p", "sink_local", "random")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training on pictures of one size."""

    share: float
    """Part of the time, in (0, 1]; the shares sum to 1."""
    side: int
    """Pixels."""
    batch: int


PHASES = (
    # Small pictures teach the task quickly; large ones the distances.
    Phase(share=0.25, side=128, batch=128),
    Phase(share=0.3, side=256, batch=64),
    Phase(share=0.45, side=512, batch=32),
)
TINY_PHASES = (Phase(share=1.0, side=256, batch=4),)


class Pictures(NamedTuple):
    """A batch of pictures with the places that are asked for."""

    pixels: Tensor
    """``Float[b 3 side side]``."""
    places: Tensor
    """``Int64[b 16 9]``: the patches of each coloured digit, row by row through the picture."""
    answers: Tensor
    """``Int64[b 16]``: the digit of the same colour."""
    own: Tensor
    """``Int64[b 16]``: the digit at the place itself; training asks for it too."""


class Painter:
    """Draws pictures on one device.

    Args:
        images: ``Float[n 8 8]`` in [0, 1].
        labels: ``Int64[n]``.
        seed: The same seed draws the same pictures on the same device.
        device: Where pictures are drawn.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, seed: int, device: torch.device | str
    ) -> None:
        size = (TILE, TILE)
        tiles = F.interpolate(images[:, None], size=size, mode="bilinear", align_corners=False)
        self.tiles, self.labels = tiles[:, 0].to(device), labels.to(device)
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        hues = torch.arange(HUES) / HUES
        shift = torch.tensor([0.0, 1 / 3, 2 / 3])
        self.colours = (0.5 + 0.5 * torch.cos(2 * math.pi * (hues[:, None] - shift))).to(device)

    def draw(self, batch: int, side: int) -> Pictures:
        """Draw a batch of pictures of ``side`` pixels."""
        number = 2 * PAIRS + min(GREY_DIGITS, (side // CELL) ** 2 - 2 * PAIRS)
        which = self._integers(len(self.tiles), (batch, number))
        rows, columns = self._corners(batch, number, side)
        pixels = self._background(batch, side)
        colours = torch.full((batch, number, 3), 0.6, device=self.device)
        hues = self._orders(batch, HUES)[:, :PAIRS].repeat(1, 2)
        colours[:, : 2 * PAIRS] = self.colours[hues]
        inside = torch.arange(TILE, device=self.device)
        flat = (rows[..., None, None] + inside[:, None]) * side + columns[..., None, None] + inside
        tiles = self.tiles[which][:, None] * colours.mT[..., None, None]
        flat = flat.flatten(1)[:, None].expand(-1, 3, -1)
        under = pixels.flatten(2)
        under.scatter_(2, flat, torch.maximum(tiles.flatten(2), under.gather(2, flat)))
        places = self._patches(rows[:, : 2 * PAIRS], columns[:, : 2 * PAIRS], side)
        own = self.labels[which[:, : 2 * PAIRS]]
        return Pictures(2 * pixels - 1, places, own.roll(PAIRS, 1), own)

    def _background(self, batch: int, side: int) -> Tensor:
        coarse = self._uniform((batch, 1, side // CELL, side // CELL))
        pixels = 0.2 * F.interpolate(coarse, size=(side, side), mode="bilinear")
        pixels = pixels + 0.1 * self._uniform((batch, 1, side, side))
        ends = self._uniform((batch, STROKES, 3, 2)) * (side - 1)
        t = torch.linspace(0, 1, side // 2, device=self.device)[:, None]
        first, middle, last = ends.unbind(2)
        curve = (1 - t) ** 2 * first[:, :, None] + t**2 * last[:, :, None]
        curve = (curve + 2 * t * (1 - t) * middle[:, :, None]).long()
        flat = (curve[..., 0] * side + curve[..., 1]).flatten(1)[:, None]
        pixels.flatten(2).scatter_(2, flat, 0.5)
        return pixels.expand(-1, 3, -1, -1).contiguous()

    def _corners(self, batch: int, number: int, side: int) -> tuple[Tensor, Tensor]:
        cells = self._orders(batch, (side // CELL) ** 2)[:, :number]
        shifts = self._integers(CELL - TILE + 1, (2, batch, number))
        across = side // CELL
        return cells // across * CELL + shifts[0], cells % across * CELL + shifts[1]

    def _patches(self, rows: Tensor, columns: Tensor, side: int) -> Tensor:
        around = torch.arange(-1, 2, device=self.device)
        row = ((rows + TILE // 2) // PATCH)[..., None, None] + around[:, None]
        column = ((columns + TILE // 2) // PATCH)[..., None, None] + around
        return (row * (side // PATCH) + column).flatten(2)

    def _orders(self, batch: int, number: int) -> Tensor:
        return self._uniform((batch, number)).argsort(1)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 handwritten digits, ``Float32[n 8 8]`` in [0, 1], and their values."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images).float() / 16, torch.tensor(found.target).long()


def square_order(across: int, device: torch.device | None = None) -> Tensor:
    """Return ``Int64[across**2]``: patches in Z-order, so that 64 neighbours fill a square.

    Row by row, 64 patches would be a line through the whole picture, and nothing that is near in
    the picture would be near in a block.
    """
    place = torch.arange(across * across, device=device)
    row, column = torch.zeros_like(place), torch.zeros_like(place)
    for bit in range(across.bit_length()):
        column |= (place >> (2 * bit) & 1) << bit
        row |= (place >> (2 * bit + 1) & 1) << bit
    return row * across + column


class Layer(nn.Module):
    """Attention in all directions, then a two-layer network; both read normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``Float[b t width]``."""
        qkv = self.qkv(self.attention_norm(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.network(self.network_norm(tokens))


class VisionModel(nn.Module):
    """A vision transformer behind four convolutions, for pictures of up to ``side`` pixels."""

    def __init__(self, *, side: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        channels = (3, width // 4, width // 2, width)
        stem: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            stem += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.stem = nn.Sequential(*stem, nn.Conv2d(width, width, 3, padding=1))
        across = side // PATCH
        self.rows = nn.Parameter(_waves(across, width // 2))
        self.columns = nn.Parameter(_waves(across, width // 2))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2 * CLASSES)

    def forward(self, pixels: Tensor, places: Tensor) -> dict[str, Tensor]:
        """Return ``logits`` and, for the digit at the place itself, ``own``: ``Float[b 16 10]``."""
        grid = self.stem(pixels)
        across = grid.shape[-1]
        rows = self.rows[:across, None].expand(-1, across, -1)
        columns = self.columns[None, :across].expand(across, -1, -1)
        tokens = (grid.permute(0, 2, 3, 1) + torch.cat([rows, columns], -1)).flatten(1, 2)
        order = square_order(across, tokens.device)
        tokens = tokens[:, order]
        for layer in self.layers:
            tokens = layer(tokens)
        answers = self.head(self.norm(tokens))[:, order.argsort()]
        asked = places.flatten(1)[..., None].expand(-1, -1, 2 * CLASSES)
        logits, own = answers.gather(1, asked).unflatten(1, places.shape[1:]).mean(2).chunk(2, -1)
        return {"logits": logits, "own": own}


def _waves(places: int, channels: int) -> Tensor:
    """Return ``Float32[places channels]``: sines and cosines of many wavelengths, small."""
    frequency = torch.exp(-math.log(100.0) * torch.arange(channels // 2) / (channels // 2))
    angle = torch.arange(places)[:, None] * frequency
    return 0.5 * torch.cat([angle.sin(), angle.cos()], -1)


def accuracy(output: dict[str, Tensor], answers: Tensor) -> float:
    """Return the share of right answers."""
    return (output["logits"].argmax(-1) == answers).float().mean().item()


def train(
    model: VisionModel, painter: Painter, phases: tuple[Phase, ...], minutes: float, rate: float
) -> int:
    """Train for some minutes; return the number of steps."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    begun, step = time.perf_counter(), 0
    shares = [sum(phase.share for phase in phases[:place]) for place in range(len(phases))]
    while (done := (time.perf_counter() - begun) / (60 * minutes)) < 1:
        phase = phases[max(place for place, share in enumerate(shares) if done >= share)]
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = (
            rate * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        )
        picture = painter.draw(phase.batch, phase.side)
        device_type = painter.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
            output = model(picture.pixels, picture.places)
        loss = F.cross_entropy(output["logits"].float().flatten(0, 1), picture.answers.flatten())
        # Reading is learned at once and looking elsewhere later, unless both are asked for.
        reading = F.cross_entropy(output["own"].float().flatten(0, 1), picture.own.flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.5 * reading).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            right = accuracy(output, picture.answers)
            losses = f"loss {loss.item():.3f} reading {reading.item():.3f}"
            print(f"step {step:5d} side {phase.side} {losses} right {right:.3f}")
        step += 1
    return step


def batches(
    painter: Painter, count: int, batch: int, side: int, dtype: torch.dtype
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the model's arguments and the answers."""
    for _ in range(count):
        picture = painter.draw(batch, side)
        yield {"pixels": picture.pixels.to(dtype), "places": picture.places}, picture.answers


def compare(
    model: nn.Module, painters: tuple[Painter, Painter], args: argparse.Namespace
) -> Iterator[TaskRow]:
    """Calibrate gates and yield the accuracy of every method at every density."""
    dtype = next(model.parameters()).dtype
    held_out = list(batches(painters[1], args.batches, args.batch, args.side, dtype))
    evaluator = TaskEvaluator(model, held_out, accuracy)
    yield evaluator.run("dense")
    for name in METHODS[1:]:
        for density in args.densities:
            yield evaluator.run(name, density)
    model = seer_compile.optimize(model, inner="aot_eager")
    training = [
        inputs for inputs, _ in batches(painters[0], args.steps // 4 + 8, 4, args.side, dtype)
    ]
    begun = time.perf_counter()
    config = seer_compile.CalibrationConfig(steps=args.steps)
    report = seer_compile.calibrate(
        model, training, config=config, density=args.densities[-1], progress=False
    )
    print(report, f"\ncalibrated in {time.perf_counter() - begun:.0f} s")
    store = model.get_submodule("seer_gates")
    assert isinstance(store, GateStore)
    for density in args.densities:
        yield evaluator.run("gate", density, store)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; ``--tiny`` makes everything small."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.5, help="of training")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=400, help="of calibration")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--batches", type=int, default=12, help="of the evaluation")
    parser.add_argument("--batch", type=int, default=16, help="pictures each")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small model, picture and evaluation")
    parser.add_argument("--load", type=Path, help="weights of an earlier run; trains nothing")
    parser.add_argument("--save", type=Path, help="where to keep the trained weights")
    parser.add_argument("--commit", default="", help="recorded with each row")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    args = parser.parse_args(argv)
    if args.tiny:
        args.layers, args.width, args.heads, args.side = 2, 64, 2, 256
        args.steps, args.batches, args.batch = min(args.steps, 8), 2, 2
    return args


def main(argv: list[str] | None = None, data: tuple[Tensor, Tensor] | None = None) -> list[TaskRow]:
    """Train, calibrate, compare; return the rows of the table."""
    args = parse(argv)
    images, labels = data or digits()
    held_out = torch.arange(len(images)) % 5 == 4
    painters = (
        Painter(images[~held_out], labels[~held_out], seed=args.seed, device=args.device),
        Painter(images[held_out], labels[held_out], seed=args.seed + 1, device=args.device),
    )
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = VisionModel(
            side=args.side, width=args.width, layers=args.layers, heads=args.heads
        ).to(args.device)
    if args.load:
        model.load_state_dict(torch.load(args.load, weights_only=True))
    else:
        phases = TINY_PHASES if args.tiny else PHASES
        steps = train(model, painters[0], phases, args.minutes, args.rate)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps")
    if args.save:
        torch.save(model.state_dict(), args.save)
    if args.device != "cpu":
        model = model.to(torch.bfloat16)
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else "none"
    about = {"gpu": gpu, "torch": torch.__version__, "commit": args.commit, "model": "pairs"}
    rows = []
    for row in compare(model.eval(), painters, args):
        rows.append(row)
        print(json.dumps(row.to_json()), flush=True)
        if args.out:
            with args.out.open("a") as file:
                record = {"figure": "vision", **row.to_json(), **about, "layers": args.layers}
                file.write(json.dumps(record) + "\n")
    print(f"\n{'method':<16}  density  accuracy")
    for row in rows:
        print(f"{row.method:<16}  {row.density:7.3f}  {row.score:8.4f}")
    return rows


if __name__ == "__main__":
    main()
