"""Plain tables of text, which print the same in a terminal, a file and a note."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first and last ones to the left, the others to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join(_line(row, widths).rstrip() for row in table)


def _line(row: list[str], widths: list[int]) -> str:
    last = len(row) - 1
    cells = [
        c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells)
