"""Rounding of weights: one algorithm a file, with `STATISTICS` and `round(weight, scheme, lo, hi, ...)`.

A file that takes other formats than all that are not learned also has `accepts(format)`, and one whose codes are only
where block reconstruction begins has `RECONSTRUCTION`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbit.errors import CalibrationError, FormatError
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.registry import Registry

registry = Registry("fewbit.rounding", "rounding")


@dataclass(frozen=True)
class Reconstruction:
    """What goes on after `round`: blocks of the network learn to give the float blocks' outputs.

    `drop`: at random, half of the activations are left float in each step, and half of each block's inputs.
    """

    drop: bool


def rounding_names() -> list[str]:
    """Names of all rounding algorithms."""
    return registry.names()


def required_statistics(name: str) -> frozenset[str]:
    """What calibration must collect for this rounding. Raises RecipeError for an unknown name."""
    return registry.module(name).STATISTICS


def reconstruction(name: str) -> Reconstruction | None:
    """How blocks go on to learn after this rounding; None where its codes are final."""
    found: Reconstruction | None = getattr(registry.module(name), "RECONSTRUCTION", None)
    return found


def can_round(name: str, spec: Format) -> bool:
    """Whether this rounding makes codes of that format: what its `accepts(spec)` says, else of all but learned ones."""
    accepts = getattr(registry.module(name), "accepts", None)
    return accepts(spec) if accepts is not None else not spec.learned


def round_weight(
    name: str,
    weight: Tensor,
    scheme: Scheme,
    lo: Tensor,
    hi: Tensor,
    statistics: Mapping[str, Any] | None = None,
) -> QTensor:
    """Rounds a weight with the named algorithm.

    Args:
        name: a rounding's name.
        weight: float tensor that the scheme fits.
        scheme: how to quantize it.
        lo, hi: float [C], the range of each block.
        statistics: what `required_statistics` asks for, by name.

    Raises:
        RecipeError: unknown rounding.
        CalibrationError: a statistic is missing.
        FormatError: the rounding cannot make codes of this format.
    """
    module = registry.module(name)
    if not can_round(name, scheme.spec):
        raise FormatError(
            f"rounding {name!r} makes no codes of {scheme.format}: "
            f"use rounding={scheme.spec.rounding!r}, or another format"
        )
    given = dict(statistics or {})
    missing = sorted(module.STATISTICS - given.keys())
    if missing:
        raise CalibrationError(f"rounding {name!r} needs {', '.join(missing)}: give calibration data")
    return module.round(weight, scheme, lo, hi, given)
