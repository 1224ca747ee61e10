"""How the pipeline runs: which passes are left out, and around which of them graphs are written."""

from __future__ import annotations

from dataclasses import dataclass

from seer_compile.errors import RangeError, SeerInputError

PASSES = (
    "inline_bodies",
    "normalise",
    "find_sites",
    "prove_masks",
    "plan",
    "insert_gates",
    "replace_attention",
    "lower",
    "handle_sites",
    "remove_dead",
    "verify",
    "outline_bodies",
)
OPTIONAL_PASSES = ("insert_gates", "replace_attention", "lower", "remove_dead", "verify")


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How the pipeline runs; what it does is the mode's business."""

    disabled: tuple[str, ...] = ()
    """Names of passes to leave out, of :data:`OPTIONAL_PASSES`. Without ``lower`` the graph shows
    the gate's nodes; without ``insert_gates`` or ``replace_attention`` every site stays dense."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of site names that stay dense."""
    suffix: str = ""
    """Appended to the site names under which calls are counted, to tell models apart."""
    dump: tuple[str, ...] = ()
    """Names of passes around which the graph is written, as Python text, before and after."""
    dump_directory: str | None = None

    def __post_init__(self) -> None:
        for argument, allowed in (("disabled", OPTIONAL_PASSES), ("dump", PASSES)):
            unknown = set(getattr(self, argument)) - set(allowed)
            if unknown:
                raise RangeError(argument=argument, got=sorted(unknown), expected=f"of {allowed}")
        if self.dump and self.dump_directory is None:
            raise SeerInputError(argument="dump_directory", got=None, expected="a directory")
