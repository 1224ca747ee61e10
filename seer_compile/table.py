"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns under a header; columns without any content are left out."""
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    used = used or list(range(len(header)))
    lines = [[header[column] for column in used]]
    lines += [[row[column] for column in used] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(used))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
