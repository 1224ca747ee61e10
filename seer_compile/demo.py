"""The whole story on a small real model and text that every machine has, on two CPU cores.

Explain, calibrate on the standard library of the running Python, and measure on files of it that
neither the model nor the gates have seen.
"""

from __future__ import annotations

import html
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from seer_compile.api import calibrate, optimize
from seer_compile.budget_curve import check_fraction
from seer_compile.calibration.report import CalibrationReport
from seer_compile.calibration.report_html import render_html
from seer_compile.config import CalibrationConfig
from seer_compile.console import (
    EVALUATION_HEADER,
    Progress,
    check_number,
    evaluation_cells,
    evaluation_text,
    versions,
    versions_line,
    write_json,
    write_out,
)
from seer_compile.corpus import encode_files, standard_library_files
from seer_compile.errors import SeerInputError
from seer_compile.evaluate import EvaluationRow, Evaluator
from seer_compile.evaluation_methods import parse_method
from seer_compile.explaining import explain
from seer_compile.gate_store import GateStore
from seer_compile.model_loading import load_model, load_tokenizer
from seer_compile.token_data import CalibrationWindows, as_batches, planted_windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEYS = 8
_CURVE_WINDOWS = 3
_FORWARD: dict[str, Any] = {"use_cache": False}


def bundled_model() -> Path:
    """Return the folder of the bundled model.

    Raises:
        SeerInputError: The package was installed without the repository around it.
    """
    package = Path(__file__).resolve().parent
    for root in (package.parent, Path.cwd()):
        folder = root / "examples" / "small_lm"
        if (folder / "model.safetensors").is_file():
            return folder
    raise SeerInputError(
        argument="model",
        got=None,
        expected="the bundled model, in examples/small_lm of the repository",
        hint="Run the demo from a checkout of the repository, or give --model FOLDER.",
    )


def run_demo(args: Namespace) -> None:
    """Explain, calibrate, measure, and write ``args.report``."""
    notify = Progress()
    check_number("length", args.length, 2)
    check_number("steps", args.steps, 1)
    for density in args.densities:
        check_fraction("densities", density)
    device = torch.device("cpu")
    folder = str(args.model or bundled_model())
    found = versions(device)
    notify(versions_line(found))
    notify(f"about three minutes on two CPU cores; {folder}, {args.length:,} tokens a sequence")
    model = load_model(folder, device=device)
    tokenizer = load_tokenizer(folder)

    example = torch.zeros(1, min(args.length, 512), dtype=torch.int64)
    write_out(str(explain(model, input_ids=example, **_FORWARD)))
    calibration_tokens, held_out_tokens = _texts(args, tokenizer)
    windows = {
        args.length: planted_windows(
            held_out_tokens,
            tokenizer,
            length=args.length,
            sequences=args.sequences,
            keys=KEYS,
            seed=args.seed,
        )
    }
    evaluator = Evaluator(model, windows, model_arguments=_FORWARD, notify=notify)
    rows = [evaluator.run(parse_method("dense"), args.length, None)]
    report = _calibrate(model, calibration_tokens, tokenizer, args, notify)
    for density in args.densities:
        rows += _compare(evaluator, args.length, density, model)
    text = evaluation_text(rows)
    write_out(text)
    args.report.write_text(_page(report, rows, found), encoding="utf-8")
    notify(f"report written to {args.report}")
    write_json(
        args.json,
        {
            "model": folder,
            "versions": found,
            "seconds": notify.seconds,
            "rows": [row.to_json() for row in rows],
            "calibration": report.summary(),
        },
    )


def _texts(args: Namespace, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return text to calibrate on and text to measure on: files the model was trained on or not."""
    training = encode_files(
        standard_library_files(held_out=False),
        tokenizer,
        max_tokens=(args.steps + 1) * args.length,
    )
    held_out = encode_files(
        standard_library_files(held_out=True),
        tokenizer,
        max_tokens=4 * args.sequences * args.length,
    )
    return training, held_out


def _calibrate(
    model: nn.Module, tokens: np.ndarray, tokenizer: Tokenizer, args: Namespace, notify: Progress
) -> CalibrationReport:
    data = CalibrationWindows(
        tokens=tokens,
        lengths=(args.length,),
        seed=args.seed,
        model_arguments=tuple(_FORWARD.items()),
    )
    config = CalibrationConfig(
        steps=args.steps,
        # So few steps leave no time for a small rate.
        learning_rate=4e-3,
        warmup_steps=3,
        holdout_batches=1,
        seed=args.seed,
    )
    notify(f"calibrating {args.steps} steps")
    # Compiling for speed needs a C++ compiler and half a minute; the demo is about quality.
    optimize(model, inner="aot_eager")
    planted = planted_windows(
        tokens,
        tokenizer,
        length=args.length,
        sequences=_CURVE_WINDOWS,
        keys=KEYS,
        seed=args.seed + 1,
    )
    return calibrate(
        model,
        data,
        config=config,
        density=args.densities[0],
        curve_data=as_batches(planted, _FORWARD),
    )


def _compare(
    evaluator: Evaluator, length: int, density: float, model: nn.Module
) -> list[EvaluationRow]:
    """Measure the gate, and the oracle and the static control at the density that it had."""
    store = model.get_submodule("seer_gates")
    if not isinstance(store, GateStore):
        raise SeerInputError(argument="model", got=type(store).__name__, expected="gates")
    gate = evaluator.run(parse_method("gate"), length, density, store)
    others = [
        evaluator.run(parse_method(name), length, gate.density) for name in ("oracle", "sink_local")
    ]
    return [gate, *others]


def _page(report: CalibrationReport, rows: Sequence[EvaluationRow], found: dict[str, str]) -> str:
    """Return the calibration's page with the comparison in front."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in EVALUATION_HEADER)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in evaluation_cells(row))
        + "</tr>"
        for row in rows
    )
    section = (
        "<h1>Sparse attention on held-out files</h1>"
        f"<p>{html.escape(versions_line(found))}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "<p>Density is kept blocks / visible blocks. Ratio is perplexity / dense perplexity on "
        "ordinary tokens. Retrieval is the share of planted keys whose value is predicted in "
        "full.</p>"
    )
    return render_html(report).replace("<body>", f"<body>{section}", 1)
