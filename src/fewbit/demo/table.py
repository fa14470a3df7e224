"""The demo's table."""

from rich.console import Console
from rich.table import Table

from fewbit.demo.run import METRICS, Demonstration


def show(result: Demonstration) -> None:
    """Print float and int8 side by side."""
    artifact = result.artifact
    check = artifact.verification
    assert check is not None
    table = Table(
        title=f"DigitsNet on {result.quantized.samples} digits that it has not seen, in {check.runtime}"
    )
    for column in ("", "float32", "int8"):
        table.add_column(column, justify="left" if not column else "right")
    for name in METRICS:
        values = (each.metrics[name] for each in (result.floating, result.quantized))
        shown = (f"{100 * v:.2f} %" for v in values if isinstance(v, float))
        table.add_row(name if name == "accuracy" else f"{name} (macro)", *shown)
    table.add_row("file", f"{result.float_size:,} B", f"{artifact.size:,} B")
    times = [artifact.latency[name] for name in ("float", "quantized")]
    table.add_row("latency, one image", *(f"{1000 * t.median_ms:.0f} us" for t in times))
    table.add_row("  quartiles", *(f"{1000 * t.q1_ms:.0f} to {1000 * t.q3_ms:.0f} us" for t in times))
    agreement = result.quantized.agreement
    if agreement is not None and agreement.top1 is not None:
        table.add_row("same class as float", "", f"{100 * agreement.top1:.2f} %")
    console = Console()
    console.print(table)
    console.print(f"coverage:  {check.coverage_text()} ({check.cpu})")
    console.print(f"reference: {result.differing} of {result.outputs} outputs differ over all test digits; "
                  f"{sum(c.differing for c in check.layers)} of {sum(c.total for c in check.layers):,} codes "
                  f"differ in {len(check.layers)} integer layers")  # fmt: skip
    for note in artifact.notes:
        console.print(f"note: {note}")
    console.print(f"file:      {artifact.path}")
