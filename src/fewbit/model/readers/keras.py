"""Reads Keras models, from .keras and .h5 files or live, into the standard form, and proves them against Keras."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fewbit.errors import ModelError
from fewbit.extras import require
from fewbit.model import keras_example
from fewbit.model.keras_model import build, outputs_of
from fewbit.model.readers.torch import read
from fewbit.model.torch_export import as_example
from fewbit.model.torch_proof import TOLERANCE, difference

SUFFIXES = (".keras", ".h5")


def read_file(path: Path, *, example: Any = None) -> fx.GraphModule:
    """The standard form of a ``.keras`` or ``.h5`` file of Keras 2 or 3."""
    keras = _keras("reading Keras files")
    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    gm = read_model(model, example)
    gm.meta["source"] = f"Keras file {path.name}"
    return gm


def is_keras_model(model: object) -> bool:
    """Whether an object is a Keras model; Keras is not imported to find out."""
    names = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(model).__mro__}
    return ("keras", "Model") in names or ("tf_keras", "Model") in names


def read_model(model: Any, example: Any = None) -> fx.GraphModule:
    """The standard form of a live ``keras.Model``, which is left as it is. ``example``: one input or a tuple."""
    keras = _keras("reading Keras models")
    inputs = keras_example.draw(model) if example is None else as_example(example)
    notes: list[str] = []
    twin = build(model, inputs, notes)
    gm = read(twin, inputs, dynamic_shapes=_dynamic(model))
    _prove(gm, model, inputs)
    gm.meta["notes"] = [*notes, *gm.meta["notes"]]
    gm.meta["example"] = inputs
    gm.meta["source"] = f"Keras {keras.__version__} model {model.name}"
    return gm


def _keras(purpose: str) -> Any:
    """Keras, on PyTorch unless it is there already on something else."""
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    return require("keras", "keras", purpose)


def _dynamic(model: Any) -> tuple[dict[int, Any], ...]:
    """What Keras leaves open: the batch, and the lengths of sequences; sizes of pictures are fixed."""
    return tuple(
        {
            d: torch.export.Dim.AUTO
            for d, size in enumerate(t.shape)
            if size is None and (d == 0 or len(t.shape) < 4)
        }
        for t in model.inputs
    )


def _prove(gm: fx.GraphModule, model: Any, example: tuple[Tensor, ...]) -> None:
    """ModelError unless the graph computes what Keras does on the example, within 1e-5 of the largest output."""
    from torch.utils._pytree import tree_leaves

    expected = outputs_of(model, example)
    with torch.no_grad():
        actual = tree_leaves(gm(*example))
    worst = max(difference(e, a) for e, a in zip(expected, actual, strict=True))
    if worst > TOLERANCE:
        raise ModelError(
            f"the graph of the Keras model {model.name!r} differs from Keras on the example by {worst:.1e} (relative; "
            f"expected at most {TOLERANCE:.0e}): give an example that is typical of the model's inputs, and report "
            "the model if it still differs"
        )
