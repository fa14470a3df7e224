"""What is inside a runtime's file, layer by layer."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show_file(description: dict[str, Any]) -> None:
    """Print the operations of a file: how each computes, in which formats, in which kernels."""
    facts = description["facts"]
    origin = f"recipe {facts['recipe']}" if "recipe" in facts else "not written by fewbit"
    title = f"{description['path']}: {description['bytes']:,} bytes, {origin}"
    console = Console()
    if not description["operations"]:
        console.print(title, highlight=False)
        console.print("fewbit cannot read its operations: they are not all of the kinds that it writes")
        return
    table = Table(title=title)
    for column in ("layer", "operation", "weights", "output", "computes"):
        table.add_column(column)
    for row in description["operations"]:
        table.add_row(row["layer"], row["kind"], row["weights"], row["output"], row["computes"])
    console.print(table)
