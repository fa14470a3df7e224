"""Readers: one source of models a file. Each gives the same graph in the standard form, whatever the source.

A reader of files has ``SUFFIXES`` and ``read_file(path, example=None)``, which leaves the input that its graph was
proven on in ``gm.meta["example"]``.
"""

from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.fx import GraphModule

from fewbit.errors import ArtifactError, ModelError
from fewbit.registry import Registry

registry = Registry("fewbit.model.readers", "reader", ModelError)


def read_path(path: Path, example: Any = None) -> GraphModule:
    """The graph of a model file, by its suffix.

    ``example``: an input, or a tuple of them, by default random numbers of the sizes that the file states. Raises
    ``ArtifactError`` for an unknown suffix or a damaged file, ``ModelError`` for what cannot be read.
    """
    readers = {s: name for name in registry.names() for s in getattr(registry.module(name), "SUFFIXES", ())}
    name = readers.get(path.suffix)
    if name is None:
        raise ArtifactError(
            f"{path}: no reader for {path.suffix or 'files without a suffix'}; expected a folder that fewbit.save "
            f"wrote, or one of {', '.join(sorted(readers))} (an nn.Module is given as it is)"
        )
    return cast(GraphModule, registry.module(name).read_file(path, example=example))


def as_module(model: object, example: Any = None) -> nn.Module:
    """A model in memory as an ``nn.Module``: itself, or the graph of a live Keras model.

    Raises ``ModelError`` for anything else.
    """
    from fewbit.model.readers import keras

    if keras.is_keras_model(model):  # first, because Keras's own classes can be nn.Modules too
        return keras.read_model(model, example)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the model is a {type(model).__name__}: expected a torch.nn.Module or a keras.Model"
        )
    return model
