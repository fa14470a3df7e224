"""Calibration that was interrupted goes on where it stopped: observers' state in one safetensors file, no pickle."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from fewbit.errors import ArtifactError, CalibrationError
from fewbit.numerics.histogram import Histogram
from fewbit.observers import RangeObserver

_KEY = "fewbit.calibration"


class Checkpoint:
    """Where a calibration keeps its state, and whose it is: a model's weights and the observers of a plan."""

    def __init__(self, path: str | Path, gm: GraphModule, observers: dict[str, RangeObserver]) -> None:
        self.path = Path(path)
        self.observers = observers
        self.owner = fingerprint(
            gm, (f"{site} {type(o).__module__} {o.scheme}" for site, o in observers.items())
        )

    def save(self, batches: int, samples: int) -> None:
        """Write the state after that many batches: beside the file first, then in its place."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for site, observer in self.observers.items():
            _collect(observer, site, tensors, numbers)
        header = {"owner": self.owner, "batches": batches, "samples": samples, "numbers": numbers}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, str(temporary), metadata={_KEY: json.dumps(header)})
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{self.path}: the calibration's state cannot be written ({error})"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> tuple[int, int]:
        """Put the observers into the saved state; (batches, samples) done, (0, 0) without a file.

        Raises ``ArtifactError`` for a damaged file and ``CalibrationError`` for one of another model or recipe.
        """
        if not self.path.exists():
            return 0, 0
        try:
            with safe_open(str(self.path), framework="pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if header["owner"] != self.owner:
                raise CalibrationError(
                    f"{self.path}: the state of another model, recipe or target; delete it, or give another file"
                )
            for site, observer in self.observers.items():
                _restore(observer, site, tensors, header["numbers"])
            return int(header["batches"]), int(header["samples"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{self.path}: damaged calibration state ({error}); delete it to start anew"
            ) from error

    def remove(self) -> None:
        """The calibration is done."""
        self.path.unlink(missing_ok=True)


def fingerprint(gm: GraphModule, settings: Iterable[str]) -> str:
    """One text for a model's weights and what else a result depends on."""
    digest = hashlib.sha256()
    for name, tensor in gm.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for setting in settings:
        digest.update(setting.encode())
    return digest.hexdigest()


def _collect(part: object, name: str, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Everything that an observer holds, by path: tensors on one side, numbers on the other."""
    for key, value in vars(part).items():
        path = f"{name}/{key}"
        if isinstance(value, Tensor):
            tensors[path] = value.clone().contiguous()
        elif isinstance(value, Histogram):
            _collect(value, path, tensors, numbers)
        elif value is None or isinstance(value, bool | int | float):
            numbers[path] = value


def _restore(part: object, name: str, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    prefix = f"{name}/"
    for path, value in (*tensors.items(), *numbers.items()):
        key = path.removeprefix(prefix)
        if path.startswith(prefix) and "/" not in key:
            setattr(part, key, value)
    inside = f"{prefix}_histogram/"
    if any(path.startswith(inside) for path in tensors):
        histogram = Histogram.__new__(Histogram)
        _restore(histogram, inside.removesuffix("/"), tensors, numbers)
        part._histogram = histogram  # type: ignore[attr-defined]
