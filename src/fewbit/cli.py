"""The command line: demo, inspect, quantize, evaluate, measure, verify, formats."""

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.errors import FewbitError, ModelError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Makes trained networks small and fast, and proves that what was evaluated is what runs.",
)

MODEL = Annotated[
    str,
    typer.Argument(
        help="A .keras, .h5 or .onnx file, `module:factory` that gives an nn.Module, or a saved folder."
    ),
]
WEIGHTS = Annotated[Path | None, typer.Option(help="safetensors file with the factory's weights.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def main() -> None:
    """The `fewbit` program: errors are one line and exit code 1, an interrupt is 130, wrong usage is 2."""
    try:
        app()
    except FewbitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the files.")] = Path(
        "build/demo"
    ),
    as_json: JSON = False,
) -> None:
    """Quantize a small network for digits, export it, run the file, and compare.

    Example: `fewbit demo -o /tmp/demo`
    """
    from fewbit.demo.run import run

    result = run(output)
    if as_json:
        _print_json(result.to_json())
        return
    from fewbit.demo.table import show

    show(result)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="An .onnx file of fewbit's, a saved folder, or `module:factory`.")
    ],
    recipe: Annotated[str, typer.Option(help="Which recipe to plan with, for a `module:factory`.")] = "int8",
    weights: WEIGHTS = None,
    shape: Annotated[str, typer.Option(help="Shape of one input batch, such as 8,3,32,32.")] = "",
    as_json: JSON = False,
) -> None:
    """Show the plan, tensor by tensor: format, constraint, and why.

    Examples: `fewbit inspect model.int8.onnx`, `fewbit inspect fewbit.demo:DigitsNet --shape 8,1,8,8`
    """
    if model.endswith(".onnx"):
        from fewbit.deploy import describe

        description = describe(model)
        if as_json:
            _print_json(description)
            return
        from fewbit.report.files import show_file

        show_file(description)
        return
    found = _plan_of(model, recipe, weights, shape)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found)


@app.command()
def quantize(
    model: MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="An .onnx file, or a folder to save to.")],
    calibration: Annotated[Path | None, typer.Option(help=".npy or .npz with typical inputs.")] = None,
    recipe: Annotated[str, typer.Option(help="A preset's name or a TOML file.")] = "int8",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value of the recipe: `weights=int4`.")
    ] = None,
    target: Annotated[str, typer.Option(help="The runtime: onnx or tensorrt.")] = "onnx",
    weights: WEIGHTS = None,
    shape: Annotated[str, typer.Option(help="Shape of an example, where there is no calibration.")] = "",
    verify: Annotated[bool, typer.Option(help="Run the file and compare it with the reference.")] = True,
    as_json: JSON = False,
) -> None:
    """Quantize a model and write it for a runtime, verified.

    Example: `fewbit quantize net:build --weights net.safetensors --calibration images.npy -o net.int8.onnx`
    """
    from fewbit.deploy import export
    from fewbit.pipeline import quantize as run
    from fewbit.storage import save

    quantized = run(
        _model(model, weights),
        None if calibration is None else str(calibration),
        example=_example(shape),
        recipe=recipe,
        target=target,
        **_overrides(settings or []),
    )
    if output.suffix != ".onnx":
        save(quantized, output)
        _show({"path": str(output), "recipe": quantized.plan.recipe}, f"{output}: saved", as_json)
        return
    artifact = export(quantized, output, verify=verify)
    _show(artifact.to_json(), str(artifact), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="An .onnx file, a saved folder, or `module:factory`.")],
    data: Annotated[Path, typer.Option(help=".npz with inputs and labels.")],
    metrics: Annotated[str, typer.Option(help="Names with commas between.")] = "accuracy",
    baseline: Annotated[str | None, typer.Option(help="A model to agree with.")] = None,
    weights: WEIGHTS = None,
    as_json: JSON = False,
) -> None:
    """Accuracy and other metrics on labelled data, and agreement with another model.

    Example: `fewbit evaluate model.int8.onnx --data test.npz --metrics accuracy,f1 --baseline model.onnx`
    """
    from fewbit.evaluation.metrics import evaluate as run

    other = None if baseline is None else _runnable(baseline, weights)
    report = run(_runnable(model, weights), str(data), metrics.split(","), other)
    _show(report.to_json(), str(report), as_json)


@app.command()
def measure(
    model: MODEL,
    shape: Annotated[str, typer.Option(help="Shape of the inputs to run with, such as 1,3,32,32.")],
    artifact: Annotated[list[Path] | None, typer.Option(help="An .onnx file to time beside it.")] = None,
    weights: WEIGHTS = None,
    as_json: JSON = False,
) -> None:
    """Size, operations, latency, memory and energy.

    Example: `fewbit measure net:build --shape 1,3,32,32 --artifact net.int8.onnx`
    """
    from fewbit.deploy import runner
    from fewbit.evaluation.measure import Artifact
    from fewbit.evaluation.measure import measure as run

    files = {path.name: Artifact(path, runner(path)) for path in artifact or []}
    example = _example(shape)
    assert example is not None
    found = run(_model(model, weights), example, artifacts=files)
    _show(found.to_json(), str(found), as_json)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A file that fewbit exported.")], as_json: JSON = False
) -> None:
    """Run an exported file in its own runtime again and compare it with its integer program.

    Example: `fewbit verify model.int8.onnx`
    """
    from fewbit.deploy import verify as run

    result = run(file)
    _show(result.to_json(), str(result), as_json)


@app.command()
def formats(as_json: JSON = False) -> None:
    """The number formats and their ranges."""
    from fewbit.numerics.format import format_names, get_format

    rows = [{"name": f.name, "bits": f.bits, "lowest": f.qmin, "highest": f.qmax}
            for f in map(get_format, format_names())]  # fmt: skip
    text = "\n".join(f"{r['name']:<8} {r['bits']:>2} bits  {r['lowest']:g} to {r['highest']:g}" for r in rows)
    _show(rows, text, as_json)


# ---- what the commands share ----------------------------------------------------------------------------------------


def _show(data: Any, text: str, as_json: bool) -> None:
    if as_json:
        _print_json(data)
    else:
        print(text)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _model(name: str, weights: Path | None = None) -> Any:
    """The model of a `module:factory` (the current folder can be imported from), or of a saved folder."""
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


def _runnable(name: str, weights: Path | None) -> Any:
    """Something to call: a session's function for an .onnx file, else the module."""
    if name.endswith(".onnx"):
        from fewbit.deploy import runner

        return runner(Path(name))
    return _model(name, weights)


def _example(shape: str) -> Any:
    """A seeded random float input of that shape; None for an empty text."""
    if not shape:
        return None
    import torch

    try:
        sizes = [int(s) for s in shape.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{shape!r} is no shape; expected numbers with commas, such as 1,3,32,32"
        ) from None
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def _overrides(settings: list[str]) -> dict[str, Any]:
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


def _plan_of(model: str, recipe: str, weights: Path | None, shape: str) -> Any:
    from fewbit.model.simulate import QuantizedModel
    from fewbit.pipeline import plan

    found = _model(model, weights)
    if isinstance(found, QuantizedModel):
        return found.plan
    example = _example(shape)
    if example is None:
        raise ModelError(f"{model}: give the shape of an input to plan with, such as --shape 8,3,32,32")
    return plan(found, example, recipe=recipe)
