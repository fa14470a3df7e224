"""Prints rows of measurements and bars with rich."""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def _number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else f"{value * scale:,.{digits}f}"

    return show


def _latency(threads: int) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        timed, own = row.get(f"latency_t{threads}"), row.get(f"own_float_t{threads}")
        if timed is None:
            return ""
        spread = (timed["high_ms"] - timed["low_ms"]) / 2
        digits = 1 if timed["median_ms"] >= 10 else 3
        shown = f"{timed['median_ms']:.{digits}f} ±{spread:.{digits}f}"
        if own:
            return f"{shown} (x{timed['median_ms'] / own['median_ms']:.2f} its own float)"
        return f"{shown} (x{timed['ratio']:.2f})"

    return show


COLUMNS: dict[str, Callable[[Row], str]] = {
    "route": lambda row: str(row["name"]),
    "accuracy\n%": _number("accuracy", 2),
    "reference\nkernels %": _number("exact_accuracy", 2),
    "agrees\n%": _number("agreement", 2),
    "SQNR to\nfloat dB": _number("float_sqnr_db", 1),
    "simulated vs\ndeployed dB": lambda row: (
        "exact" if row.get("simulation_exact") else _number("simulation_sqnr_db", 1)(row)
    ),
    "kB": _number("bytes", 1, 1e-3),
    "ms, 1 thread\n(x float)": _latency(1),
    "ms, 4 threads\n(x float)": _latency(4),
    "in integer\nkernels": lambda row: str(row.get("coverage", "")),
    "s to\nmake": _number("seconds", 1),
}


def show(title: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Prints the rows, one column for each name of COLUMNS; columns that no row fills are left out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    used = [c for c in columns if any("error" not in row and COLUMNS[c](row) for row in rows)]
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in used:
        table.add_column(
            column, justify="left" if column in ("route", "in integer\nkernels") else "right", no_wrap=True
        )
    for row in rows:
        if "error" not in row:
            style = "bold" if str(row["name"]).startswith("fewbit") else None
            table.add_row(*(COLUMNS[c](row) for c in used), style=style)
    console = Console(width=max(200, Console().width), highlight=False)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"  {row['name']}: failed: {row['error']}", markup=False)


def bar(text: str, met: bool | None, found: str) -> dict[str, Any]:
    """Prints one bar with what was found (`met` None: it cannot be judged here); returns it for the JSON."""
    from rich.console import Console

    word = {True: "[green]met[/]", False: "[red]MISSED[/]", None: "[yellow]not judged[/]"}[met]
    Console(width=150, highlight=False).print(f"{word}  {text}: {found}")
    return {"bar": text, "met": met, "found": found}
