"""What in a Keras model's configuration cannot be read, all of it at once, before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fewbit.errors import ModelError
from fewbit.model.keras_functions import ACTIVATIONS
from fewbit.model.keras_layers import LAYERS
from fewbit.model.keras_operators import MASKS, OPERATORS

MODELS = frozenset({"Functional", "Model", "Sequential"})
RECURRENT = frozenset({"LSTM", "GRU", "SimpleRNN"})
CODE = frozenset({"Lambda", "__lambda__", "TFOpLambda", "SlicingOpLambda", "__typespec__"})
MAX_LAYERS = 20_000

Config = dict[str, Any]
Registered = Callable[[str], str | None]


def check(config: Config, where: str, registered: Registered, kinds: Callable[[str, str], bool]) -> None:
    """ModelError that lists every layer that cannot be read. ``registered`` says what Keras class a registered class
    of the user's is read as; ``kinds("regularizers", name)`` says whether Keras has such an object of its own.
    """
    found = list(_Walk(registered, kinds).problems(config))
    if found:
        refuse(where, found)


def refuse(where: str, found: list[str]) -> None:
    """ModelError with all that was found."""
    raise ModelError(
        f"{where} has {len(found)} {'layer' if len(found) == 1 else 'layers'} that cannot be read: {'; '.join(found)}. "
        "Expected Keras's own layers and operators: write these with them, or cut the model in front of them. A layer "
        "of your own is read if it is registered (keras.saving.register_keras_serializable) and derived from one of "
        "Keras's layers without a call of its own"
    )


class _Walk:
    def __init__(self, registered: Registered, kinds: Callable[[str, str], bool]) -> None:
        self.registered, self.kinds, self.count = registered, kinds, 0

    def problems(self, layer: Any) -> Iterator[str]:
        """What is wrong with one serialized layer or model, and with all inside it."""
        self.count += 1
        if self.count > MAX_LAYERS:
            raise ModelError(f"the model has more than {MAX_LAYERS} layers: expected fewer")
        if not isinstance(layer, dict) or not isinstance(layer.get("config"), dict):
            yield f"{str(layer)[:40]!r} (no layer: expected an object with 'class_name' and 'config')"
            return
        class_name, config = str(layer.get("class_name")), layer["config"]
        name = str(config.get("name", layer.get("name", "?")))[:100]
        kind = self.kind(layer)
        if kind in MODELS:
            for inner in config.get("layers") or []:
                yield from self.problems(inner)
        elif kind is None:
            yield f"{name!r} ({reason(class_name)})"
        else:
            yield from (f"{name!r} ({class_name}: {why})" for why in self.options(kind, config))
            for key in ("layer", "backward_layer"):
                if isinstance(config.get(key), dict):
                    yield from self.problems(config[key])

    def kind(self, layer: Config) -> str | None:
        """The Keras class that a serialized layer is read as; None if it is not."""
        class_name, module = str(layer.get("class_name")), str(layer.get("module") or "keras.layers")
        if "module" not in layer and class_name in OPERATORS and "trainable" not in layer["config"]:
            return None  # Keras writes operators to .h5 files as if they were layers
        own = self.registered(str(layer.get("registered_name") or class_name))
        if own is not None:
            return own
        if module.startswith(("keras.src.ops", "keras.ops")):
            return class_name if class_name in OPERATORS or class_name in MASKS else None
        if module == "keras" or module.startswith(
            ("keras.", "tf_keras.", "tensorflow.keras.", "tensorflow.python.keras")
        ):
            return (
                class_name
                if class_name in LAYERS or class_name in MODELS or class_name == "InputLayer"
                else None
            )
        return None

    def options(self, kind: str, config: Config) -> Iterator[str]:
        """Settings of a layer that there is no counterpart of."""
        yield from options(kind, config)
        for key in ("activation", "recurrent_activation"):
            yield from self.activation(config.get(key))
        for key, value in config.items():
            for suffix in ("initializer", "regularizer", "constraint"):
                if key.endswith(f"_{suffix}") and isinstance(value, dict):
                    class_name = str(value.get("class_name"))
                    if not self.kinds(f"{suffix}s", class_name) and self.registered(class_name) is None:
                        yield f"{key} {class_name!r} is not one of Keras's: register it, or save the model without it"
        if _holds_code(config):
            yield "holds Python code, which is never run"

    def activation(self, value: Any) -> Iterator[str]:
        if value is None or (isinstance(value, str) and value in ACTIVATIONS):
            return
        if isinstance(value, dict) and isinstance(value.get("config"), dict):
            yield from self.problems(value)
            return
        name = value.get("config") if isinstance(value, dict) else value
        module = value.get("module", "builtins") if isinstance(value, dict) else "builtins"
        if name not in ACTIVATIONS or not str(module).startswith(("builtins", "keras")):
            yield f"activation {name!r} is none of Keras's that have a counterpart"


def reason(class_name: str) -> str:
    """Why a layer of this class cannot be read."""
    if class_name in ("TFOpLambda", "SlicingOpLambda"):
        return f"{class_name}: a TensorFlow operator inside a Keras 2 model, which Keras 3 does not load"
    if class_name in CODE:
        return f"{class_name}: runs Python code from the file, which is never done"
    if class_name == "Masking":
        return "Masking: steps cannot be left out, give sequences of one length"
    if class_name in OPERATORS:
        return f"{class_name}: an operator, which Keras writes to .h5 files but cannot load from them: save as .keras"
    return f"{class_name}: unknown to this reader"


def options(kind: str, config: Config) -> Iterator[str]:
    """Settings of one of Keras's layers that PyTorch has no counterpart of."""
    wanted = {"LSTM": ("tanh", "sigmoid"), "GRU": ("tanh", "sigmoid")}.get(kind)
    given = tuple(_function(config.get(key)) for key in ("activation", "recurrent_activation"))
    if wanted and given != wanted:
        yield f"activation {given[0]} and recurrent_activation {given[1]}, expected {wanted[0]} and {wanted[1]}"
    if kind == "SimpleRNN" and given[0] not in ("tanh", "relu"):
        yield f"activation {given[0]}, expected tanh or relu"
    if kind in RECURRENT and config.get("stateful"):
        yield "stateful=True, expected a layer that starts anew with each batch"
    if config.get("time_major"):
        yield "time_major=True, expected the batch in front"
    if kind == "GRU" and not config.get("reset_after", True):
        yield "reset_after=False, which PyTorch's GRU does not compute"
    if kind == "Bidirectional" and str((config.get("layer") or {}).get("class_name")) not in RECURRENT:
        yield "expected an LSTM, a GRU or a SimpleRNN inside"
    if kind == "MultiHeadAttention":
        axes, shape = config.get("attention_axes"), config.get("output_shape")
        if axes not in (None, [1], (1,)) or config.get("use_gate") or config.get("sliding_window"):
            yield "attention_axes, use_gate and sliding_window, expected none of them"
        if isinstance(shape, list | tuple) and len(shape) > 1:
            yield f"output_shape={shape}, expected one number"
    if kind == "Attention" and config.get("score_mode", "dot") != "dot":
        yield f"score_mode={config['score_mode']!r}, expected 'dot'"
    if kind == "UpSampling2D" and config.get("interpolation", "nearest") not in ("nearest", "bilinear"):
        yield f"interpolation={config['interpolation']!r}, expected 'nearest' or 'bilinear'"
    if kind == "Resizing" and (
        config.get("interpolation", "bilinear") != "bilinear"
        or any(config.get(key) for key in ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio"))
    ):
        yield "expected plain 'bilinear' interpolation"
    if kind == "Softmax" and isinstance(config.get("axis"), list | tuple) and len(config["axis"]) > 1:
        yield f"axis={config['axis']}, expected one axis"
    if kind == "BatchNormalization" and (config.get("renorm") or config.get("virtual_batch_size")):
        yield "renorm or virtual_batch_size, expected plain batch normalization"
    if kind == "InputLayer" and (config.get("sparse") or config.get("ragged")):
        yield "a sparse or ragged input, expected a dense one"
    if kind == "Dot" and config.get("normalize"):
        yield "normalize=True, expected False"
    if config.get("quantization_config") or "Quantized" in str(
        (_dict(config.get("dtype"))).get("class_name")
    ):
        yield "weights that Keras has quantized, expected float32: quantize the float model with fewbit instead"


def _function(value: Any) -> str:
    """The name of a serialized activation."""
    name = value.get("config") if isinstance(value, dict) else value
    return name if isinstance(name, str) else "of the user's own"


def _dict(value: Any) -> Config:
    return value if isinstance(value, dict) else {}


def _holds_code(value: Any) -> bool:
    """Whether serialized code lies anywhere inside."""
    if isinstance(value, dict):
        return str(value.get("class_name")) in CODE or any(_holds_code(v) for v in value.values())
    return isinstance(value, list) and any(_holds_code(v) for v in value)
