"""The verbs of the command line, each from parsed arguments to what it writes."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seer_compile.api import calibrate, optimize, restore, save_gates
from seer_compile.budget_curve import check_fraction
from seer_compile.calibration.storage import describe_gates
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.console import (
    Progress,
    check_number,
    evaluation_text,
    versions,
    versions_line,
    write_json,
    write_out,
)
from seer_compile.demo import run_demo
from seer_compile.errors import SeerInputError
from seer_compile.evaluate import EvaluationRow, Evaluator
from seer_compile.evaluation_methods import Method, parse_method
from seer_compile.explaining import explain
from seer_compile.exporting import export
from seer_compile.gate_store import GateStore
from seer_compile.model_loading import (
    choose_device,
    load_model,
    load_tokenizer,
    vocabulary_size,
)
from seer_compile.token_data import (
    CalibrationWindows,
    as_batches,
    planted_windows,
    read_token_file,
)

_FORWARD: dict[str, Any] = {"use_cache": False}
# Windows per length on which budgets are measured.
_CURVE_WINDOWS = 4


def run_explain(args: Namespace) -> None:
    """Print which attention sites of a model can be sparse."""
    check_number("length", args.length, 1)
    device = choose_device(args.device)
    model = load_model(args.model, device=device, dtype=args.dtype)
    explanation = explain(model, draw=args.draw, **_example(model, args.length, device))
    write_out(str(explanation))
    sites = [dataclasses.asdict(summary) for summary in explanation.sites]
    content = {"model": args.model, "versions": versions(device), "sites": sites}
    write_json(args.json, content)


def run_calibrate(args: Namespace) -> None:
    """Train gates, save them, and print the report."""
    notify = Progress()
    device = choose_device(args.device)
    found = versions(device)
    notify(versions_line(found))
    model = load_model(args.model, device=device, dtype=args.dtype)
    data = _calibration_data(args, args.tokens, model)
    config = _training_config(args, args.gate_config)
    notify(_calibration_plan(args, data))
    model = optimize(model, config=_gate_config(args.gate_config))
    report = calibrate(
        model,
        data,
        config=config,
        density=args.density,
        mass=args.mass,
        curve_data=_longer(data, args.curve_lengths),
        checkpoint_dir=args.checkpoint_dir,
    )
    save_gates(model, args.out)
    if args.report:
        report.save_html(args.report)
    write_out(str(report))
    notify(f"gates written to {args.out}")
    write_json(args.json, {"versions": found, "gates": str(args.out), "summary": report.summary()})


def run_evaluate(args: Namespace) -> None:
    """Measure methods side by side."""
    notify = Progress()
    methods = [parse_method(name) for name in dict.fromkeys(args.methods)]
    for density in args.densities:
        check_fraction("densities", density)
    _check_gates_available(methods, args)
    device = choose_device(args.device)
    found = versions(device)
    notify(versions_line(found))
    model = load_model(args.model, device=device, dtype=args.dtype)
    tokens = read_token_file(args.tokens, vocabulary=vocabulary_size(model))
    tokenizer = load_tokenizer(args.model) if args.retrieval else None
    windows = {
        length: planted_windows(
            tokens,
            tokenizer,
            length=length,
            sequences=args.sequences,
            keys=args.retrieval,
            seed=args.seed,
        )
        for length in dict.fromkeys(args.lengths)
    }
    notify(_evaluation_plan(args, methods))
    evaluator = Evaluator(
        model,
        windows,
        allocation=args.allocation,
        model_arguments=_FORWARD,
        notify=notify,
    )
    rows = run_methods(
        evaluator,
        methods,
        args.densities,
        prepare=lambda base: _prepare_gates(args, base, model, notify),
    )
    write_out(evaluation_text(rows))
    write_json(
        args.json,
        {
            "model": args.model,
            "versions": found,
            "dtype": str(next(model.parameters()).dtype),
            "settings": {key: _plain(value) for key, value in vars(args).items()},
            "seconds": notify.seconds,
            "rows": [row.to_json() for row in rows],
        },
    )


def run_export(args: Namespace) -> None:
    """Write a program that answers sparsely in another process."""
    notify = Progress()
    device = choose_device(args.device)
    model = load_model(args.model, device=device, dtype=args.dtype)
    longest = args.max_length
    if longest is None:
        longest = getattr(model.config, "max_position_embeddings", None)
    check_number("max_length", longest, 2)
    check_number("length", args.length, 2, longest)
    example = {**_example(model, args.length, device), **_FORWARD}
    length = torch.export.Dim("tokens", min=2, max=longest)
    shapes = {name: {1: length} if isinstance(example[name], Tensor) else None for name in example}
    notify(f"exporting {args.model} for 2 to {longest or 'any number of'} tokens")
    program = export(model, (), example, dynamic_shapes=shapes, gates=args.gates)
    torch.export.save(program, args.out)
    size = args.out.stat().st_size
    write_out(f"wrote {args.out} ({size / 1e6:.1f} MB)")
    content = {"program": str(args.out), "bytes": size, "versions": versions(device)}
    write_json(args.json, content)


def run_methods(
    evaluator: Evaluator,
    methods: Sequence[Method],
    densities: Sequence[float],
    *,
    prepare: Callable[[str], GateStore],
) -> list[EvaluationRow]:
    """Measure methods at every length and density, in an order that loads gates only once.

    Args:
        evaluator: Holds the model, not optimized yet, and the windows.
        methods: What to measure. Dense is always measured; it is listed only when it is asked for.
        densities: For every method but dense.
        prepare: Called with ``gate`` or ``paper_gate``; makes the model ready to answer with these
            gates and returns them.

    Returns:
        Rows by length, then density, then in the order of ``methods``.
    """
    lengths = list(evaluator.windows)
    found: dict[tuple[int, float | None, str], EvaluationRow] = {}
    for length in lengths:
        found[length, None, "dense"] = evaluator.run(parse_method("dense"), length, None)
    for base in ("baselines", "gate", "paper_gate"):
        chosen = [m for m in methods if _group(m) == base]
        store = prepare(base) if chosen and base != "baselines" else None
        for length in lengths:
            for density in densities:
                for method in chosen:
                    row = evaluator.run(method, length, density, store)
                    found[length, density, method.name] = row
    keys = [
        (length, density, method.name)
        for length in lengths
        for density in (None, *densities)
        for method in methods
    ]
    return [found[key] for key in keys if key in found]


def _group(method: Method) -> str:
    if method.base == "dense":
        return "dense"
    return method.base if method.uses_gates else "baselines"


def _check_gates_available(methods: Sequence[Method], args: Namespace) -> None:
    bases = {method.base for method in methods if method.uses_gates}
    if bases and not (args.gates or args.calibrate):
        raise SeerInputError(
            argument="methods",
            got=sorted(bases),
            expected="gates for these methods",
            hint="Give --gates G or --calibrate FILE.",
        )
    if "paper_gate" in bases and not args.calibrate:
        raise SeerInputError(
            argument="methods",
            got="paper_gate",
            expected="--calibrate FILE, since this method trains gates of its own",
        )
    if args.allocation == "searched" and args.calibrate:
        raise SeerInputError(
            argument="allocation",
            got="searched",
            expected="another one with --calibrate, which makes no search",
            hint="Give --gates of a calibration with search_evaluations.",
        )
    if bases and args.gates:
        describe_gates(args.gates)


def _prepare_gates(
    args: Namespace, base: str, model: nn.Module, notify: Callable[[str], None]
) -> GateStore:
    """Optimize the model in place with loaded or newly trained gates."""
    if hasattr(model, "seer_gates"):
        restore(model)
    if args.gates:
        notify(f"loading {args.gates}")
        optimize(model, gates=args.gates, inner=args.inner)
        return _store(model)
    kind = "paper" if base == "paper_gate" else args.gate_config
    data = _calibration_data(args, args.calibrate, model)
    notify(f"{base}: {_calibration_plan(args, data)}")
    optimize(model, config=_gate_config(kind), inner=args.inner)
    report = calibrate(
        model,
        data,
        config=_training_config(args, kind, holdout_batches=1),
        density=args.densities[0],
        curve_data=_curve_batches(args, data),
    )
    notify(f"calibrated: {report.captured_mass:.3f} of the mass at density {report.density:.3f}")
    return _store(model)


def _store(model: nn.Module) -> GateStore:
    store = model.get_submodule("seer_gates")
    if not isinstance(store, GateStore):
        raise SeerInputError(argument="model", got=type(store).__name__, expected="gates")
    return store


def _calibration_data(args: Namespace, path: Path, model: nn.Module) -> CalibrationWindows:
    return CalibrationWindows(
        tokens=read_token_file(path, vocabulary=vocabulary_size(model)),
        lengths=tuple(args.calibration_lengths),
        seed=args.seed,
        model_arguments=tuple(_FORWARD.items()),
    )


def _longer(data: CalibrationWindows, lengths: Sequence[int]) -> Iterable[dict[str, Any]]:
    """Return a few windows of other lengths from the same text."""
    if not lengths:
        return ()
    return dataclasses.replace(data, lengths=tuple(lengths), count=_CURVE_WINDOWS)


def _curve_batches(args: Namespace, data: CalibrationWindows) -> list[dict[str, Any]]:
    """Return calibration text in the form it is measured in: these lengths, keys planted."""
    tokenizer = load_tokenizer(args.model) if args.retrieval else None
    return [
        batch
        for length in dict.fromkeys(args.lengths)
        for batch in as_batches(
            planted_windows(
                data.tokens,
                tokenizer,
                length=length,
                sequences=_CURVE_WINDOWS,
                keys=args.retrieval,
                # Other keys than those that are asked for.
                seed=args.seed + 1,
            ),
            _FORWARD,
        )
    ]


def _calibration_plan(args: Namespace, data: CalibrationWindows) -> str:
    lengths = " and ".join(f"{length:,}" for length in data.lengths)
    return f"calibrating {args.steps} steps of {lengths} tokens, {len(data)} windows to draw from"


def _evaluation_plan(args: Namespace, methods: Sequence[Method]) -> str:
    sparse = sum(method.base != "dense" for method in methods)
    forwards = len(args.lengths) * args.sequences * (1 + sparse * len(args.densities))
    lengths = ", ".join(f"{length:,}" for length in args.lengths)
    return (
        f"{forwards} forwards: {args.sequences} windows of {lengths} tokens, "
        f"{args.retrieval} planted keys each"
    )


_PAPER_RATE = 1e-3


def _gate_config(kind: str) -> GateConfig:
    return GateConfig.paper() if kind == "paper" else GateConfig()


def _training_config(args: Namespace, kind: str, *, holdout_batches: int = 4) -> CalibrationConfig:
    default, rate = CalibrationConfig(), args.learning_rate
    is_paper = kind == "paper"
    if rate is None:
        rate = _PAPER_RATE if is_paper else default.learning_rate
    return CalibrationConfig(
        steps=args.steps,
        learning_rate=rate,
        seed=args.seed,
        # The published gate learns the max-pooled map, keeps nothing of its start, and every site
        # keeps the same share: with nothing measured of what sites cost, that is how they share a
        # density.
        target="max" if is_paper else default.target,
        start_share=0.0 if is_paper else default.start_share,
        sensitivity_batches=0 if is_paper else default.sensitivity_batches,
        holdout_batches=holdout_batches,
    )


def _example(model: nn.Module, length: int, device: torch.device) -> dict[str, Any]:
    """Return inputs of a text or image model: zeros do, only shapes are read."""
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        return {"input_ids": torch.zeros(1, length, dtype=torch.int64, device=device)}
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and isinstance(size, int):
        channels = getattr(config, "num_channels", 3)
        dtype = next(model.parameters()).dtype
        return {name: torch.zeros(1, channels, size, size, dtype=dtype, device=device)}
    raise SeerInputError(
        argument="model",
        got=f"inputs called {name!r}",
        expected="a model of token ids or of images",
        hint="Call seer_compile.explain(model, ...) with inputs of your own.",
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


VERBS: dict[str, Callable[[Namespace], None]] = {
    "explain": run_explain,
    "calibrate": run_calibrate,
    "evaluate": run_evaluate,
    "export": run_export,
    "demo": run_demo,
}
