"""What is inside an exported file, layer by layer."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show_file(description: dict[str, Any]) -> None:
    """Print the operations of a file: how each computes, in which formats, in which kernels."""
    facts = description["facts"]
    title = f"{description['path']}: {description['bytes']:,} bytes, recipe {facts.get('recipe', '?')}"
    table = Table(title=title)
    for column in ("layer", "operation", "weights", "output", "computes"):
        table.add_column(column)
    for row in description["operations"]:
        table.add_row(row["layer"], row["kind"], row["weights"], row["output"], row["computes"])
    Console().print(table)
