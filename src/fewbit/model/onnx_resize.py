"""Resize and Upsample: torch's own interpolation where it takes the same places, else places picked and mixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.model import onnx_sizes
from fewbit.model.onnx_build import LARGEST, Sizes, Value
from fewbit.model.onnx_call import Call

Rule = Callable[[Call], Any]
_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True)
class Places:
    """How a place of the result is found in the source: ONNX's coordinate_transformation_mode and nearest_mode."""

    mode: str
    coordinates: str
    rounding: str

    def source(self, size: int, out: int, scale: float) -> np.ndarray:
        """The place in an axis of `size` that each place of `out` shows, in float32 as runtimes compute it."""
        one = np.float32
        at = np.arange(out, dtype=np.float32)
        if self.coordinates == "align_corners":
            return at * one(size - 1) / one(out - 1) if out > 1 else at
        if self.coordinates == "asymmetric":
            return at / one(scale)
        if self.coordinates == "pytorch_half_pixel" and out == 1:
            return at
        middle = one(0)
        if self.coordinates == "half_pixel_symmetric":
            middle = one(size / 2) * (one(1) - one(out) / (one(scale) * one(size)))
        return middle + (at + one(0.5)) / one(scale) - one(0.5)

    def nearest(self, size: int, out: int, scale: float) -> np.ndarray:
        """The index of the source for each place of the result."""
        x = self.source(size, out, scale)
        simple = np.floor if scale >= 1 else np.ceil
        rounded = {
            "floor": np.floor(x),
            "ceil": np.ceil(x),
            "simple": simple(x),
            "round_prefer_ceil": np.floor(x + np.float32(0.5)),
        }.get(self.rounding, np.ceil(x - np.float32(0.5)))
        return rounded.clip(0, size - 1).astype(np.int64)


def _upsample(c: Call) -> Any:
    scales = Sizes(onnx_sizes.sizes(c.attr("scales", []))) if c.version < 9 else c.sizes(1)
    return _resized(c, Places(str(c.attr("mode", "nearest")), "asymmetric", "simple"), scales, None)


def _resize(c: Call) -> Any:
    mode = str(c.attr("mode", "nearest"))
    if c.version < 11:
        return _resized(c, Places(mode, "asymmetric", "simple"), c.sizes(1), None)
    coordinates = str(c.attr("coordinate_transformation_mode", "half_pixel"))
    if coordinates not in (
        "half_pixel",
        "pytorch_half_pixel",
        "align_corners",
        "asymmetric",
        "half_pixel_symmetric",
    ):
        raise c.error(f"coordinate_transformation_mode {coordinates!r}: expected one without a region")
    if c.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise c.error("keep_aspect_ratio_policy: expected stretch")
    places = Places(mode, coordinates, str(c.attr("nearest_mode", "round_prefer_floor")))
    empty = c.known(2) if c.has(2) else None
    scaled = c.has(2) and not (empty is not None and empty.size == 0)
    return _resized(c, places, c.sizes(2) if scaled else None, None if scaled else c.sizes(3))


def _resized(c: Call, places: Places, scales: Any, sizes: Any) -> Any:
    rank = c.rank(0)
    given = _given(scales if scales is not None else sizes)
    axes = [c.axis(int(a), rank) for a in c.attr("axes") or range(rank)]
    if len(given) != len(axes):
        raise c.error(f"{len(given)} scales or sizes for {len(axes)} axes")
    factors, wanted = [1.0] * rank, list(c.shape(0))
    for axis, value in zip(axes, given, strict=True):
        size = c.shape(0)[axis]
        factors[axis] = float(value) if scales is not None else value / size
        wanted[axis] = math.floor(size * value) if scales is not None else int(value)
    if any(not 0 < f < 1e4 for f in factors):
        raise c.error(f"scales {factors}: expected positive ones")
    if math.prod(wanted) > LARGEST:
        raise c.error(f"a tensor of shape {wanted} on the example, more than fewbit reads a model with")
    if c.attr("antialias", 0) and any(f < 1 for f in factors):
        raise c.error("antialias while scaling down: expected none")
    method = _method(c, places, factors, wanted)
    if method == "table":
        return c.apply(_by_tables, c[0], places=places, factors=factors, wanted=wanted)
    settings: dict[str, Any] = {"mode": method.removesuffix("+corners")}
    if method not in ("nearest", "nearest-exact"):
        settings["align_corners"] = method.endswith("+corners")
    if scales is None:
        return c.apply(_to_size, c[0], sizes, skip=0 if len(axes) < rank else 2, **settings)
    return c.apply(F.interpolate, c[0], scale_factor=tuple(factors[2:]), **settings)


def _given(values: Any) -> list[Any]:
    return onnx_sizes.listed(values.example if isinstance(values, Value) else values.values)


def _to_size(x: Tensor, sizes: Any, *, skip: int, **settings: Any) -> Tensor:
    return F.interpolate(x, size=onnx_sizes.listed(sizes)[skip:], **settings)


def _method(c: Call, places: Places, factors: list[float], wanted: list[int]) -> str:
    """The mode of torch's interpolation that does the same on this example, "table" where none does."""
    shape, rank = c.shape(0), c.rank(0)
    inner = rank in _LINEAR and factors[:2] == [1.0, 1.0] and c.example_is_float(0)
    pairs = list(zip(shape, wanted, factors, strict=True))[2:]
    if places.mode == "cubic":
        fits = rank == 4 and inner and not c.attr("exclude_outside", 0)
        fits = fits and abs(float(c.attr("cubic_coeff_a", -0.75)) + 0.75) < 1e-6
        if not fits or places.coordinates not in ("half_pixel", "align_corners"):
            raise c.error(f"cubic interpolation with {places.coordinates}: expected torch's kind")
        return "bicubic" + "+corners" * (places.coordinates == "align_corners")
    if places.mode == "nearest":
        for name, other in (("nearest", Places("nearest", "asymmetric", "floor")),
                            ("nearest-exact", Places("nearest", "half_pixel", "round_prefer_ceil"))):  # fmt: skip
            if inner and all(np.array_equal(places.nearest(*p), other.nearest(*p)) for p in pairs):
                return name
        return "table"
    if places.mode != "linear":
        raise c.error(f"mode {places.mode!r}: expected nearest, linear or cubic")
    for suffix, coordinates in (("", "half_pixel"), ("+corners", "align_corners")):
        other = Places("linear", coordinates, "")
        same = all(np.array_equal(places.source(*p), other.source(*p)) for p in pairs)
        if inner and same:
            return _LINEAR[rank] + suffix
    return "table"


def _by_tables(x: Tensor, *, places: Places, factors: list[float], wanted: list[int]) -> Tensor:
    """Axis by axis: the places that ONNX says, or the mean of both neighbours weighted by their nearness."""
    for axis, (out, scale) in enumerate(zip(wanted, factors, strict=True)):
        size = int(x.shape[axis]) if scale != 1.0 else 0
        if not size or (size == out and scale == 1.0):
            continue
        if places.mode == "nearest":
            x = torch.index_select(x, axis, torch.tensor(places.nearest(size, out, scale).tolist()))
            continue
        found = places.source(size, out, scale).clip(0, size - 1)
        low = np.floor(found).astype(np.int64)
        column = torch.tensor((found - low).tolist()).reshape(-1, *[1] * (x.dim() - axis - 1))
        lower = torch.index_select(x, axis, torch.tensor(low.tolist()))
        upper = torch.index_select(x, axis, torch.tensor((low + 1).clip(0, size - 1).tolist()))
        x = lower + (upper - lower) * column
    return x


RULES: dict[str, Rule] = {"Resize": _resize, "Upsample": _upsample}
