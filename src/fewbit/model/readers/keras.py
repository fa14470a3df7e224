"""Reads Keras models, from .keras and .h5 files or live, into the standard form, and proves them against Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fewbit.errors import ModelError
from fewbit.model import keras_example
from fewbit.model.keras_loading import keras_package, load, untouched
from fewbit.model.keras_model import build, check, outputs_of
from fewbit.model.readers.torch import read
from fewbit.model.torch_export import as_example
from fewbit.model.torch_proof import TOLERANCE, difference

SUFFIXES = (".keras", ".h5")


def read_file(path: Path, *, example: Any = None) -> fx.GraphModule:
    """The standard form of a ``.keras`` or ``.h5`` file of Keras 2 or 3; ``example`` as for ``read_model``.

    Nothing that the file says is run: lambdas and classes that nobody registered are refused before Keras sees them.
    Raises ModelError for layers that cannot be read, all of them at once, and ArtifactError for a damaged file.
    """
    path = Path(path)
    notes: list[str] = []
    model, version = load(path, notes)
    gm = read_model(model, example)
    gm.meta["notes"] = [*notes, *gm.meta["notes"]]
    if version.startswith("2") and any(
        "hardsigmoid" in str(n.target) or "hardswish" in str(n.target) for n in gm.graph.nodes
    ):
        gm.meta["notes"].append(
            "Keras 3 computes hard_sigmoid by another slope than Keras 2, which wrote the file"
        )
    gm.meta["source"] = f"Keras {version} file {path.name}"
    return gm


def is_keras_model(model: object) -> bool:
    """Whether an object is a Keras model; Keras is not imported to find out."""
    names = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(model).__mro__}
    return ("keras", "Model") in names or ("tf_keras", "Model") in names


def read_model(model: Any, example: Any = None) -> fx.GraphModule:
    """The standard form of a live ``keras.Model``, which is left as it is.

    ``example``: a tensor, or a tuple of them in the order of ``model.inputs``, by default random numbers of the shapes
    that the model declares. The graph takes what the model takes, channels last if those are; ``gm.meta["example"]`` is
    the example, ``gm.meta["source"]`` says where the graph comes from. Several outputs are a tuple, in the order of
    ``model.outputs``. Raises ModelError where the graph would not compute what Keras does.
    """
    keras = keras_package("reading Keras models")
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"the model is a {type(model).__module__} {type(model).__name__}: expected one of Keras 3"
        )
    check(model, f"the Keras model {model.name!r}")
    inputs = keras_example.draw(model) if example is None else as_example(example)
    _check_example(model, inputs)
    notes: list[str] = []
    with untouched():
        gm = read(build(model, inputs, notes), inputs, dynamic_shapes=_dynamic(model))
        _prove(gm, model, inputs)
    gm.meta["notes"] = [*notes, *gm.meta["notes"], *_fixed(model, gm)]
    gm.meta["example"] = inputs
    gm.meta["source"] = f"Keras {keras.__version__} model {model.name}"
    return gm


def _check_example(model: Any, example: tuple[Tensor, ...]) -> None:
    shapes = [tuple(t.shape) for t in model.inputs]
    given = [tuple(t.shape) for t in example]
    fits = len(shapes) == len(given) and all(
        len(s) == len(g) and all(a in (None, b) for a, b in zip(s, g, strict=True))
        for s, g in zip(shapes, given, strict=True)
    )
    if not fits:
        raise ModelError(
            f"the example has the shapes {given}: expected {shapes}, one tensor for each of the model's inputs"
        )


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


def _fixed(model: Any, gm: fx.GraphModule) -> list[str]:
    """What Keras leaves open and the graph does not: recurrent layers and pictures are read for one size."""
    return [
        f"axis {d} of input {name!r} is fixed at {size}: give an example of the size that you need"
        for (name, sizes), t in zip(gm.meta["dynamic"].items(), model.inputs, strict=True)
        for d, (size, declared) in enumerate(zip(sizes, t.shape, strict=True))
        if declared is None and isinstance(size, int)
    ]


def _prove(gm: fx.GraphModule, model: Any, example: tuple[Tensor, ...]) -> None:
    """ModelError unless the graph computes what Keras does on the example, within 1e-5 of the largest output."""
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
