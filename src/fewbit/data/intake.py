"""From one raw batch of a data source to checked tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import DataError

Batch = tuple[tuple[Tensor, ...], Tensor | None]

INPUT_KEYS = ("x", "images", "image", "inputs", "input", "data", "features")
TARGET_KEYS = ("y", "labels", "label", "targets", "target")


@dataclass(frozen=True)
class InputSpec:
    """What a model expects of one input: name, shape (None = any size; dimension 0 the batch) and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Intake:
    """How one source's raw items become checked tensors; see `as_batches` for what the fields mean."""

    what: str
    labels: bool | None
    specs: tuple[InputSpec, ...]
    n_inputs: int | None
    names: tuple[str, ...]
    dtype: torch.dtype

    def role(self, i: int) -> str:
        return f"input {self.names[i]!r}" if i < len(self.names) else f"input {i}"

    def split(self, item: Any, where: str) -> tuple[tuple[Any, ...], Any]:
        """Inputs and target of one raw batch, or of a whole data set in columns; raises DataError."""
        target = None
        if isinstance(item, Mapping):
            inputs, target = self._split_mapping(item, where)
        elif isinstance(item, (tuple, list)):
            inputs, rest = self._split_sequence(list(item), where)
            if len(rest) > 1:
                raise DataError(
                    f"{where} holds {len(inputs) + len(rest)} elements, "
                    f"expected {len(inputs)} input(s) and at most one label array"
                )
            target = rest[0] if rest else None
        else:
            inputs = (item,)
        if self.n_inputs is not None and len(inputs) != self.n_inputs:
            raise DataError(f"{where} holds {len(inputs)} input(s), but the model takes {self.n_inputs}")
        if self.labels and target is None:
            keys = f" (its keys are {', '.join(map(str, item))})" if isinstance(item, Mapping) else ""
            raise DataError(
                f"{where} has no labels{keys}: give (x, y), or name the labels one of "
                f"{', '.join(TARGET_KEYS)}"
            )
        return inputs, None if self.labels is False else target

    def _split_sequence(self, items: list[Any], where: str) -> tuple[tuple[Any, ...], list[Any]]:
        if not items:
            raise DataError(f"{where} is empty")
        first = items[0]
        if isinstance(first, Mapping):
            return self._split_mapping(first, where)[0], items[1:]
        if isinstance(first, (tuple, list)) and any(isinstance(x, (Tensor, np.ndarray)) for x in first):
            return tuple(first), items[1:]
        if self.n_inputs is None and len(items) > 2:
            raise DataError(
                f"{where} holds {len(items)} elements, and which of them are inputs is unknown: pass n_inputs"
            )
        count = self.n_inputs or 1
        return tuple(items[:count]), items[count:]

    def _split_mapping(self, item: Mapping[str, Any], where: str) -> tuple[tuple[Any, ...], Any]:
        if not item:
            raise DataError(f"{where} is empty")
        target = next((item[key] for key in TARGET_KEYS if key in item and key not in self.names), None)
        if self.names and all(name in item for name in self.names):
            return tuple(item[name] for name in self.names), target
        count = self.n_inputs or 1
        known = next((item[key] for key in INPUT_KEYS if key in item), None)
        if count == 1 and known is not None:
            return (known,), target
        others = [item[key] for key in item if key not in TARGET_KEYS]
        if len(others) < count:
            wanted = ", ".join(self.names) if self.names else f"{count} input array(s)"
            raise DataError(f"{where} has the keys {', '.join(map(str, item))}, expected {wanted}")
        return tuple(others[:count]), target

    def array(self, value: Any, role: str) -> Any:
        """`value` as a dense, real tensor or array, not copied; raises DataError."""
        kind = type(value).__name__
        if isinstance(value, (list, tuple, int, float, np.generic)):
            try:
                value = np.asarray(value)
            except (ValueError, TypeError):
                raise DataError(
                    f"{self.what} data: {role} is a {kind} of mixed content: give an array"
                ) from None
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_complex():
                raise DataError(
                    f"{self.what} data: {role} is a {_short(value.layout)} {_short(value.dtype)} tensor, "
                    "expected a dense tensor of real numbers"
                )
            return value.detach()
        if not isinstance(value, np.ndarray):
            raise DataError(f"{self.what} data: {role} is a {kind}, expected a tensor or an array")
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise DataError(
                f"{self.what} data: {role} has dtype {value.dtype}, expected real numbers of at most 64 bits"
            )
        return value

    def batch(self, inputs: tuple[Any, ...], target: Any, index: int) -> Batch:
        """Checked tensors in memory of their own: a model that works in place cannot harm the user's data."""
        tensors = tuple(self._input(raw, i, index) for i, raw in enumerate(inputs))
        first = tuple(tensors[0].shape)
        if tensors[0].numel() == 0:
            raise DataError(f"{self.what} data: batch {index} is empty, its shape is {first}")
        if target is None:
            return tensors, None
        goal = _own_tensor(self.array(target, "the label array"))
        self._check_finite(goal, "the label array", index)
        goal = goal.to(self.dtype) if goal.is_floating_point() else goal
        if goal.shape[:1] != tensors[0].shape[:1]:
            raise DataError(
                f"{self.what} data: batch {index} has labels of shape {tuple(goal.shape)} "
                f"for inputs of shape {first}: expected one label for each sample"
            )
        return tensors, goal

    def _input(self, raw: Any, i: int, index: int) -> Tensor:
        role = self.role(i)
        x = _own_tensor(self.array(raw, role))
        where = f"{self.what} data: {role} (batch {index})"
        dtype = self.dtype if x.is_floating_point() else x.dtype
        if self.specs:
            dtype = self.specs[i].dtype
            _check_shape(x, self.specs[i].shape, where)
            if dtype.is_floating_point and not x.is_floating_point():
                raise DataError(
                    f"{where} holds {_short(x.dtype)}, but the model expects {_short(dtype)}: "
                    "convert and scale it as in training, for example x.float() / 255"
                )
            if x.is_floating_point() and not dtype.is_floating_point:
                raise DataError(
                    f"{where} holds {_short(x.dtype)}, but the model expects integers ({_short(dtype)}): "
                    "give indices, for example x.long()"
                )
        self._check_finite(x, role, index)
        return _convert(x, dtype, where)

    def _check_finite(self, x: Tensor, role: str, index: int) -> None:
        if not x.is_floating_point():
            return
        bad = ~torch.isfinite(x)
        if bad.any():
            at = _first(bad)
            raise DataError(
                f"{self.what} data: {role} holds {x[at].item()} at index {at} of batch {index}: "
                "remove or repair that sample"
            )


def _convert(x: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    if x.dtype == dtype:
        return x
    converted = x.to(dtype)
    # A narrower type may not hold the value: float64 1e300 becomes inf, int64 token 300 becomes uint8 44.
    lost = ~torch.isfinite(converted) if dtype.is_floating_point else converted.to(x.dtype) != x
    if lost.any():
        at = _first(lost)
        raise DataError(f"{where} holds {x[at].item()} at index {at}, which {_short(dtype)} cannot hold")
    return converted


def _check_shape(x: Tensor, shape: tuple[int | None, ...], where: str) -> None:
    sizes = tuple(x.shape)
    if len(sizes) == len(shape) and all(
        want in (None, have) for have, want in zip(sizes[1:], shape[1:], strict=True)
    ):
        return
    wanted = ", ".join(["N", *("any" if size is None else str(size) for size in shape[1:])])
    hint = ""
    if len(sizes) == len(shape) - 1:
        hint = ": if these are single samples, add a batch dimension or use a DataLoader"
    raise DataError(f"{where} has shape {sizes}, but the model expects ({wanted}){hint}")


def _own_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.clone()
    # Native byte order and a copy: torch takes no other order, no negative strides, no read-only memory maps.
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(each) for each in mask.nonzero()[0])


def _short(name: object) -> str:
    return str(name).removeprefix("torch.")
