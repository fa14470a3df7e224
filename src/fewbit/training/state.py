"""A training's state after each epoch, in one safetensors file, so that it can go on after an interruption.

Model, optimizer and random generators: what the next epoch depends on. Written beside the file, then in its place.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewbit.errors import ArtifactError, TrainingError

_KEY = "fewbit.training"
VERSION = 1


def save_state(
    path: Path, owner: str, model: dict[str, Tensor], optimizer: dict[str, Any], rest: dict[str, Any]
) -> None:
    """Write all of it. ``rest``: JSON values. Raises ArtifactError where it cannot be written."""
    tensors = {f"model|{name}": value.clone().contiguous() for name, value in model.items()}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer|{parameter}|{key}"] = value.detach().cpu().clone().contiguous()
            else:
                plain.setdefault(parameter, {})[key] = value
    tensors |= {f"random|{name}": value for name, value in _random().items()}
    header = {
        "version": VERSION, "owner": owner, "groups": optimizer["param_groups"], "plain": plain, "rest": rest,
        "python": _python_random(),
    }  # fmt: skip
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, str(temporary), metadata={_KEY: json.dumps(header)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: the training's state cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path, owner: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Model, optimizer and the rest; the random generators are set.

    Raises ArtifactError for a damaged file, TrainingError for one of another training.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        found, version = header["owner"], header["version"]
        model = {name[len("model|") :]: value for name, value in tensors.items() if name.startswith("model|")}
        state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in header["plain"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer|"):
                _, parameter, key = name.split("|", 2)
                state.setdefault(parameter, {})[key] = value
        optimizer = {"state": state, "param_groups": header["groups"]}
        rest = dict(header["rest"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged state ({error}); delete it to start anew") from error
    if version != VERSION or found != owner:
        raise TrainingError(
            f"{path}: the state of another training: another model, recipe, seed or number of epochs; delete it, or "
            "give another folder"
        )
    _restore(tensors, header["python"])
    return model, optimizer, rest


def _random() -> dict[str, Tensor]:
    found = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _python_random() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, next_gauss = random.getstate()
    return {
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        "random": [version, list(numbers), next_gauss],
    }


def _restore(tensors: dict[str, Tensor], python: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["random|torch"])
    if torch.cuda.is_available():
        states = [
            tensors[f"random|cuda{i}"]
            for i in range(torch.cuda.device_count())
            if f"random|cuda{i}" in tensors
        ]
        if len(states) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states)
    kind, keys, position, has_gauss, gauss = python["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, numbers, next_gauss = python["random"]
    random.setstate((version, tuple(numbers), next_gauss))
