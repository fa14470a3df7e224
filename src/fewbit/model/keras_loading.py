"""Opens a Keras file safely: looked at first, built without memory second, loaded last."""

from __future__ import annotations

import copy
import math
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbit.errors import ArtifactError, FewbitError, ModelError
from fewbit.extras import require
from fewbit.model import keras_config
from fewbit.model.keras_example import FREE
from fewbit.model.keras_files import Contents, contents
from fewbit.model.keras_model import graph_of, needed, read_as
from fewbit.model.torch_export import first_line

MAX_NUMBERS = 1 << 28  # of one value, for one sample


def keras_package(purpose: str) -> Any:
    """Keras, on PyTorch unless it is there already on something else."""
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = require("keras", "keras", purpose)
    if int(keras.__version__.split(".")[0]) < 3:
        raise ModelError(
            f"{purpose} needs Keras 3, and {keras.__version__} is loaded: pip install 'fewbit[keras]'"
        )
    return keras


def load(path: Path, notes: list[str]) -> tuple[Any, str]:
    """The model of a ``.keras`` or ``.h5`` file, in float32, and which Keras wrote it."""
    keras = keras_package("reading Keras files")
    found = contents(path)
    keras_config.check(found.config, str(path), _registered, _is_own)
    with untouched(), damage(path):
        if keras.config.backend() == "torch":
            _check_sizes(path, _without_memory(keras, found), found)
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    if not isinstance(model, keras.Model):
        raise ModelError(f"{path} holds a {type(model).__name__}: expected a Sequential or Functional model")
    _as_float32(model, notes)
    return model, found.version


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Whatever Keras says of a file that was found readable is the file's fault."""
    try:
        yield
    except FewbitError:
        raise
    except RecursionError as error:
        raise ArtifactError(
            f"{path} nests its configuration too deep: expected what keras.Model.save writes"
        ) from error
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be loaded by Keras ({first_line(error)[:300]}): expected a configuration and weights that "
            "fit each other; save the model again"
        ) from error


@contextmanager
def untouched() -> Iterator[None]:
    """Random states and the numbers in Keras's automatic names are afterwards what they were."""
    from keras.src.backend.common import global_state

    numbers = copy.copy(global_state.get_global_attribute("object_name_uids"))
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        global_state.set_global_attribute("object_name_uids", numbers)


def _registered(name: str) -> str | None:
    """The Keras class that a registered class of the user's is read as."""
    from keras.saving import get_registered_object

    cls = get_registered_object(name)
    return read_as(cls) if isinstance(cls, type) else None


def _is_own(kind: str, name: str) -> bool:
    """Whether Keras has such an initializer, regularizer or constraint of its own."""
    import keras

    return hasattr(getattr(keras, kind), name)


def _without_memory(keras: Any, found: Contents) -> Any:
    """The model of a configuration whose weights have sizes, but no numbers."""
    config = copy.deepcopy(found.config)
    config.pop("compile_config", None)
    with keras.device("meta"):
        if "module" in config:
            return keras.saving.deserialize_keras_object(config, safe_mode=True)
        cls = keras.Sequential if config["class_name"] == "Sequential" else keras.Model
        return cls.from_config(config["config"])


def _check_sizes(path: Path, model: Any, found: Contents) -> None:
    """ArtifactError where the configuration asks for more than the file holds, or than a machine does."""
    wanted = sum(math.prod(weight.shape) for weight in model.weights)
    if wanted > found.numbers:
        raise ArtifactError(
            f"{path} describes a model of {wanted} weights and holds {found.numbers}: expected as many; it is damaged"
        )
    if not hasattr(graph_of(model), "_nodes_by_depth"):
        return
    graph = graph_of(model)
    values = [(t, "input") for t in graph.inputs]
    values += [(t, node.operation.name) for node in needed(graph) for t in node.output_tensors]
    for value, name in values:
        size = math.prod(FREE if s is None else s for s in value.shape[1:])
        if size > MAX_NUMBERS:
            raise ArtifactError(
                f"{path}: {name!r} gives {size} numbers for one sample: expected at most {MAX_NUMBERS}; it is damaged"
            )


def _as_float32(model: Any, notes: list[str]) -> None:
    """A model that was trained in mixed precision computes in float32: its weights are float32 already."""
    mixed = sorted(
        {layer.dtype_policy.name for layer in model._flatten_layers() if layer.compute_dtype != "float32"}
    )
    for layer in model._flatten_layers():
        if layer.compute_dtype != "float32":
            layer.dtype_policy = "float32"
    if mixed:
        notes.append(f"layers of {' and '.join(mixed)} were read in float32")
