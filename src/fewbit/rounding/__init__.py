"""Rounding of weights: one algorithm a file, with `STATISTICS` and `round(weight, scheme, lo, hi, ...)`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewbit.errors import CalibrationError, FormatError
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.registry import Registry

registry = Registry("fewbit.rounding", "rounding")


def rounding_names() -> list[str]:
    """Names of all rounding algorithms."""
    return registry.names()


def required_statistics(name: str) -> frozenset[str]:
    """What calibration must collect for this rounding. Raises RecipeError for an unknown name."""
    return registry.module(name).STATISTICS


def makes_codebooks(name: str) -> bool:
    """Whether this rounding is for formats that are learned from each tensor, and for no others (``LEARNED``)."""
    return getattr(registry.module(name), "LEARNED", False)


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
    if scheme.spec.learned != makes_codebooks(name):
        can = "learned formats only, such as codebook4" if makes_codebooks(name) else "fixed formats only"
        raise FormatError(
            f"rounding {name!r} makes codes of {can}, found {scheme.format}: "
            f"use rounding={scheme.spec.rounding!r} or another format"
        )
    given = dict(statistics or {})
    missing = sorted(module.STATISTICS - given.keys())
    if missing:
        raise CalibrationError(f"rounding {name!r} needs {', '.join(missing)}: give calibration data")
    return module.round(weight, scheme, lo, hi, given)
