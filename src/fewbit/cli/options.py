"""What the commands share: their options, how a model is named on a command line, how an answer is printed."""

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.errors import ModelError

MODEL = Annotated[
    str,
    typer.Argument(
        help="A .keras, .h5, .onnx or .fewbit file, `module:factory` that gives an nn.Module, or a saved folder."
    ),
]
RUNNABLE = Annotated[
    str,
    typer.Argument(
        help="A file of any runtime, a .keras, .h5 or .fewbit file, a saved folder, or `module:factory`."
    ),
]
WEIGHTS = Annotated[Path | None, typer.Option(help="safetensors file with the factory's weights.")]
SHAPE = Annotated[
    str, typer.Option(help="Shape of one input batch, such as 8,3,32,32; files mostly state their own.")
]
IO = Annotated[
    str, typer.Option("--io", help="What the file takes and gives: float32, or int8 or uint8 (litert).")
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
VERIFY = Annotated[bool, typer.Option(help="Run the file and compare it with the reference.")]


def show(data: Any, text: str, as_json: bool) -> None:
    """Print the answer of a command."""
    print(json.dumps(data, indent=2) if as_json else text)


def model_of(name: str, weights: Path | None = None) -> Any:
    """The model of a `module:factory` (the current folder can be imported from), a model file, or a saved folder."""
    module_name, _, factory_name = name.partition(":")
    if not factory_name:
        from fewbit.storage import load

        return load(name)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{name}: cannot be imported ({error}); expected module:factory") from error
    model = factory()
    if weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(weights))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{weights}: does not fit {name} ({error})") from error
    return model


def runnable(name: str, weights: Path | None = None) -> Any:
    """Something to call: for a runtime's file the function that runs it there, else the module."""
    if is_artifact(name):
        from fewbit.deploy import runner

        return runner(Path(name))
    return model_of(name, weights)


def is_artifact(name: str) -> bool:
    """Whether a name is that of a runtime's file, by its suffix."""
    if ":" in name:
        return False
    from fewbit.targets import get_target, registry

    return Path(name).suffix in {get_target(target).SUFFIX for target in registry.names()}


def example_of(shape: str, model: Any = None) -> Any:
    """A seeded random float input of that shape; for an empty text what the model was read with, or None."""
    if not shape:
        return getattr(model, "example", None) or getattr(model, "meta", {}).get("example")
    import torch

    try:
        sizes = [int(s) for s in shape.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{shape!r} is no shape; expected numbers with commas, such as 1,3,32,32"
        ) from None
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def names_of(text: str) -> list[str]:
    """The names in a text with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_of(text: str) -> list[float]:
    """The numbers in a text with commas between."""
    try:
        return [float(each) for each in names_of(text)]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers with commas, such as 0.25,0.5") from None


def overrides(settings: list[str]) -> dict[str, Any]:
    """`key=value` pairs; values are TOML where they can be (true, 32), else text."""
    import tomllib

    found: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise typer.BadParameter(f"--set {setting!r}: expected key=value, such as weights=int4")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found
