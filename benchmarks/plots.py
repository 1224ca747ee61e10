"""Draw the measured figures: time against length and density, quality against density.

    python benchmarks/plots.py [--results benchmarks/results] [--out docs/images]

Every point is a line of the results; each picture says of which commits. Of a figure that was
measured more than once the last line counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
Line = dict[str, Any]

DENSE = {"flash_ms": "dense, SDPA flash", "cudnn_ms": "dense, SDPA cuDNN"}
SHARINGS = {"selection": "one selection per key head", "gate": "one gate per key head"}
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
METHODS = {
    "gate": "gate",
    "oracle": "oracle",
    "xattention": "XAttention",
    "sink_local": "sink+local",
}


def read(path: Path) -> list[Line]:
    """Return the lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(lines: Iterable[Line], *names: str) -> list[Line]:
    """Return the last line of every combination of some fields."""
    return list({tuple(line.get(name) for name in names): line for line in lines}.values())


def commits(lines: Sequence[Line]) -> str:
    """Return which commits lines are of, in their order."""
    return ", ".join(dict.fromkeys(line["commit"] for line in lines))


def points(lines: Iterable[Line], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return two columns, ascending in the first."""
    pairs = sorted((line[x], line[y]) for line in lines if y in line)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def time_by_length(axis: Any, results: Path) -> None:
    """Draw the whole operator beside dense attention."""
    lines = [
        {"sharing": "selection", **line}
        for line in read(results / "op_speed.jsonl")
        if line["figure"] == "operator main"
    ]
    lines = latest(lines, "sharing", "length", "asked")
    for name, label in DENSE.items():
        axis.plot(*points(latest(lines, "length"), "length", name), "o-", label=label)
    for (sharing, label), colour in zip(SHARINGS.items(), ("C2", "C3"), strict=True):
        for density in (0.1, 0.05):
            chosen = [x for x in lines if x["sharing"] == sharing and x["asked"] == density]
            style = "s--" if density == 0.1 else "s:"
            columns = points(chosen, "length", "device_ms")
            axis.plot(*columns, style, color=colour, label=f"{label}, {density:.0%} kept")
    axis.set(
        title=f"Gate, selection and attention of a call\n({commits(lines)})",
        xlabel="tokens", ylabel="ms on the device", xscale="log", yscale="log",
    )  # fmt: skip


def time_by_density(axis: Any, results: Path) -> None:
    """Draw block-sparse attention alone, with random lists, beside dense attention."""
    lines = read(results / "engines.jsonl")
    last = lines[-1]["commit"]
    lines = [line for line in lines if line["commit"] == last]
    for line in lines:
        if line["kind"] == "peers" and line["length"] == 32768:
            label = f"dense, {line['what']}"
            axis.axhline(line["ms"], linestyle="-", color="0.4", linewidth=1)
            axis.annotate(label, (0.5, line["ms"]), va="bottom", ha="right", fontsize=8)
    timed = [
        {**line, "engine": "portable" if line["tiling"] is None else "hopper"}
        for line in lines
        if line["kind"] == "time"
        and line["shape"] == {"length": 32768}
        and line["sharing"] == "per group"
        and not line["rules"]
    ]
    for engine in ("portable", "hopper"):
        best: dict[float, Line] = {}
        for line in (line for line in timed if line["engine"] == engine):
            known = best.setdefault(line["density"], line)
            best[line["density"]] = min(known, line, key=lambda each: each["ms"])
        axis.plot(*points(best.values(), "density", "ms"), "s--", label=f"{engine} engine")
    axis.set(
        title=f"Attention to the kept blocks, 32,768 tokens\n({last})",
        xlabel="kept blocks / visible blocks", ylabel="ms", xscale="log", yscale="log",
    )  # fmt: skip


def quality_by_density(axis: Any, results: Path) -> None:
    """Draw perplexity relative to dense attention, on the text that every method was judged on."""
    lines = [
        line
        for line in read(results / "quality.jsonl")
        if line["length"] == 32768
        and line["density"]
        and line.get("text", "evaluation.u16") == "evaluation.u16"
    ]
    shown = []
    for method, label in METHODS.items():
        chosen = [line for line in lines if line["method"] == method]
        chosen = [line for line in chosen if line["commit"] == chosen[-1]["commit"]]
        shown += chosen
        axis.plot(*points(chosen, "density", "ratio"), "o-", label=label)
    axis.axhline(1.0, color="0.4", linewidth=1)
    axis.set(
        title=f"27M-parameter Llama, 32,768 tokens\n({commits(shown)})",
        xlabel="kept blocks / visible blocks", ylabel="perplexity / dense perplexity",
        xscale="log",
    )  # fmt: skip


PICTURES: dict[str, Callable[[Any, Path], None]] = {
    "time_by_length": time_by_length,
    "time_by_density": time_by_density,
    "quality_by_density": quality_by_density,
}


def label_ticks(axis: Any) -> None:
    """Label logarithmic axes with plain numbers."""
    lengths = {line for each in axis.lines for line in each.get_xdata() if line > 1}
    if lengths:
        axis.set_xticks(sorted(lengths), [f"{length:,.0f}" for length in sorted(lengths)])
    else:
        axis.set_xticks(DENSITIES, [f"{density:.0%}" for density in DENSITIES])
    axis.minorticks_off()
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_formatter("{x:g}")


def draw(name: str, results: Path, out: Path) -> Path:
    """Draw one picture; return its path."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    PICTURES[name](axis, results)
    label_ticks(axis)
    axis.grid(visible=True, which="major", linewidth=0.4)
    axis.legend(fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    options = parser.parse_args()
    for name in PICTURES:
        print(draw(name, options.results, options.out))


if __name__ == "__main__":
    main()
