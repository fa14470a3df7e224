"""Plain tables of text, which print the same in a terminal, a file and a note."""

from collections.abc import Sequence

from fewbit.evaluation.agreement import Agreement


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first and last ones to the left, the others to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join(_line(row, widths).rstrip() for row in table)


def brief(agreement: Agreement) -> str:
    """Such as ``same class 99.00 %, SQNR 37.2 dB``, or ``identical``."""
    if agreement.identical:
        return "identical"
    same = "" if agreement.top1 is None else f"same class {100 * agreement.top1:.2f} %, "
    return f"{same}SQNR {agreement.sqnr_db:.1f} dB"


def _line(row: list[str], widths: list[int]) -> str:
    last = len(row) - 1
    cells = [
        c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells)
