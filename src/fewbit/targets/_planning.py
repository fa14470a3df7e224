"""What runtimes that read Q/DQ graphs on x86 want of a plan: unsigned activations of at most 8 bits."""

import dataclasses

from fewbit.plan import Row


def unsigned(row: Row, runtime: str) -> Row:
    """Signed activations become unsigned of the same width: as many levels, and the only ones with fast x86 kernels."""
    scheme = row.scheme
    if (
        scheme is None
        or row.kind == "weight"
        or not scheme.spec.integer
        or scheme.dynamic
        or scheme.qmin >= 0
    ):
        return row
    changed = dataclasses.replace(scheme, format=f"u{scheme.format}", narrow=False)
    because = f"{row.because}; unsigned, as the integer kernels of {runtime} on x86 want it"
    return dataclasses.replace(row, scheme=changed, because=because)


def check(row: Row) -> str | None:
    """None where integer kernels can run the row, else why not and what to do."""
    scheme = row.scheme
    if scheme is None:
        return None
    if row.kind != "weight" and (not scheme.spec.integer or scheme.spec.bits > 8):
        return f"{scheme.format} activations have no integer kernel; use 8 bits or fewer, or keep the layer float"
    return None
