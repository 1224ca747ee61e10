"""The command ``seer-compile``: explain, calibrate, evaluate, export, demo.

Results go to stdout and, with ``--json FILE``, to a file; progress goes to stderr. A wrong input
ends with exit code 2 and one message, anything unforeseen with a traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from seer_compile.errors import SeerError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_MODEL_HELP = "folder or Hugging Face hub id of a causal language model"
_TOKENS_HELP = "token ids, unsigned 16-bit little-endian"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb."""
    parser = argparse.ArgumentParser(
        prog="seer-compile", description="Learned block-sparse attention for any PyTorch model."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_explain(verbs.add_parser("explain", help="list attention sites: sparse, or dense and why"))
    _add_calibrate(verbs.add_parser("calibrate", help="train gates on token ids and save them"))
    _add_evaluate(verbs.add_parser("evaluate", help="perplexity, retrieval, density and time"))
    _add_export(verbs.add_parser("export", help="write a torch.export program with gates"))
    _add_demo(verbs.add_parser("demo", help="the whole story on the bundled model, on a CPU"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: Words behind the program's name; those of the process when None.

    Returns:
        The exit code: 0, 2 for a wrong input or a request that cannot be met, 130 when interrupted.
    """
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    # Torch is loaded with the verbs, so that --help and a wrong flag answer at once.
    from seer_compile.cli_commands import VERBS
    from seer_compile.console import check_outputs

    try:
        check_outputs(vars(args))
        VERBS[args.verb](args)
    except SeerError as error:
        sys.stderr.write(f"seer-compile {args.verb}: {error}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    return 0


def _seed(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}; expected >= 0")
    return number


def _add_common(parser: argparse.ArgumentParser, *, device: str = "auto") -> None:
    parser.add_argument("--device", default=device, help="auto, cpu, cuda, cuda:1 (%(default)s)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: the checkpoint's own on a GPU, float32 on a CPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=500, help="training steps (%(default)s)")
    parser.add_argument(
        "--calibration-lengths",
        "--calibration-length",
        type=int,
        nargs="+",
        default=[16384],
        metavar="TOKENS",
        help="tokens of a training sequence; several take turns (%(default)s)",
    )
    parser.add_argument("--learning-rate", type=float, help="peak; the default when left out")
    parser.add_argument("--gate-config", default="default", choices=("default", "paper"))
    parser.add_argument("--seed", type=_seed, default=0)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--length", type=int, default=256, help="tokens of the example")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the sites' graph")
    _add_common(parser, device="cpu")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--tokens", required=True, type=Path, help=_TOKENS_HELP)
    parser.add_argument("--out", type=Path, default=Path("gates.safetensors"))
    parser.add_argument("--report", type=Path, metavar="HTML", help="write the report as a page")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--density", type=float, help="kept blocks / visible blocks, in (0, 1]")
    target.add_argument("--mass", type=float, help="attention mass to capture, in (0, 1]")
    parser.add_argument(
        "--curve-lengths",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="measure budgets on sequences of these lengths too, without training on them",
    )
    parser.add_argument("--checkpoint-dir", type=Path, help="save and resume here")
    _add_training(parser)
    _add_common(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--tokens", required=True, type=Path, help=_TOKENS_HELP)
    gates = parser.add_mutually_exclusive_group()
    gates.add_argument("--gates", type=Path, help="gates made by calibrate")
    gates.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="train gates on these token ids first"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], metavar="TOKENS")
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[0.2, 0.1, 0.05], metavar="SHARE"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["dense", "gate", "oracle", "sink_local"],
        metavar="NAME",
        help="dense, gate, paper_gate, oracle, oracle_max, oracle_mean, sink_local, "
        "vertical_slash, quest, xattention, xattention16, mean_pool; "
        "behind all but dense _top_p or _fraction fixes the selector",
    )
    parser.add_argument(
        "--allocation",
        choices=("uniform", "sensitivity", "searched", "equal_budget", "equal_marginal"),
        help="how the gates of the sites share a density (the best that was measured)",
    )
    parser.add_argument("--sequences", type=int, default=8, help="windows per length")
    parser.add_argument(
        "--inner", default="inductor", help="Dynamo backend below the gates (%(default)s)"
    )
    parser.add_argument("--retrieval", type=int, default=16, help="planted keys per window")
    _add_training(parser)
    _add_common(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--gates", required=True, type=Path, help="gates made by calibrate")
    parser.add_argument("--out", type=Path, default=Path("program.pt2"))
    parser.add_argument("--length", type=int, default=512, help="tokens of the example")
    parser.add_argument("--max-length", type=int, help="longest input; the model's own when left")
    _add_common(parser, device="cpu")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="another folder than the bundled model's")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.15])
    parser.add_argument("--steps", type=int, default=40, help="training steps (%(default)s)")
    parser.add_argument("--sequences", type=int, default=3, help="windows to measure on")
    parser.add_argument("--report", type=Path, default=Path("report.html"))
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")


if __name__ == "__main__":
    sys.exit(main())
