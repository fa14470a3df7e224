"""Commands on models: demo, inspect, quantize, formats."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.options import (
    IO,
    JSON,
    MODEL,
    SHAPE,
    VERIFY,
    WEIGHTS,
    example_of,
    is_artifact,
    model_of,
    overrides,
    show,
)
from fewbit.errors import ArtifactError, ModelError


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
        show(result.to_json(), "", as_json)
        return
    from fewbit.demo.table import show as show_table

    show_table(result)


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A runtime's file (any int8 .tflite too), a model file, a saved folder, or `module:factory`."
        ),
    ],
    recipe: Annotated[str, typer.Option(help="Which recipe to plan with, for a float model.")] = "int8",
    target: Annotated[str, typer.Option(help="Which runtime to plan for.")] = "onnx",
    weights: WEIGHTS = None,
    shape: SHAPE = "",
    as_json: JSON = False,
) -> None:
    """Show the plan of a model, tensor by tensor: format, constraint, and why; or the operations in a file.

    Of a .fewbit file it also shows where each byte goes. Examples: `fewbit inspect model.int8.tflite`,
    `fewbit inspect net.keras`, `fewbit inspect net:build --shape 8,1,8,8`
    """
    description = _description(model)
    if Path(model).suffix == ".fewbit" and Path(model).is_file():
        _inspect_single_file(model, as_json)
    elif description is None:
        plan = _plan_of(model, recipe, target, weights, shape)
        saved = _saved_size(model)
        show(plan.to_json() | ({"size": saved.to_json()} if saved else {}),
             str(plan) + (f"\n{str(saved).splitlines()[-1]}" if saved else ""), as_json)  # fmt: skip
    elif as_json:
        show(description, "", as_json)
    else:
        from fewbit.report.files import show_file

        show_file(description)


def _inspect_single_file(name: str, as_json: bool) -> None:
    """Where each byte of a .fewbit file goes, and the plan of a quantized model."""
    from fewbit.evaluation.size import size_by_tensor

    plan = getattr(model_of(name), "plan", None)
    sizes = size_by_tensor(name)
    data = {} if plan is None else plan.to_json()
    show(data | {"size": sizes.to_json()}, str(sizes) if plan is None else f"{plan}\n{sizes}", as_json)


def _description(name: str) -> dict[str, Any] | None:
    """What is inside a runtime's file; None for what is a model to be planned."""
    if not is_artifact(name):
        return None
    from fewbit.deploy import describe

    try:
        return describe(name)
    except ArtifactError as error:
        if Path(name).suffix != ".onnx" or not Path(name).is_file():
            raise
        # Most ONNX files are float models that fewbit did not write: those are planned.
        print(f"note: {error}; read as a model instead", file=sys.stderr)
        return None


def _saved_size(name: str) -> Any:
    """Bytes of a folder that fewbit saved, by tensor; None for anything else."""
    from fewbit.evaluation.size import size_by_tensor

    return size_by_tensor(name) if Path(name).is_dir() else None


def _plan_of(name: str, recipe: str, target: str, weights: Path | None, shape: str) -> Any:
    from fewbit.model.simulate import QuantizedModel
    from fewbit.pipeline import plan

    model = model_of(name, weights)
    if isinstance(model, QuantizedModel):
        return model.plan
    example = example_of(shape, model)
    if example is None:
        raise ModelError(f"{name}: give the shape of an input to plan with, such as --shape 8,3,32,32")
    return plan(model, example, recipe=recipe, target=target)


def quantize(
    model: MODEL,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A runtime's file, a .fewbit file, or a folder.")
    ],
    calibration: Annotated[Path | None, typer.Option(help=".npy or .npz with typical inputs.")] = None,
    recipe: Annotated[str, typer.Option(help="A preset's name or a TOML file.")] = "int8",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value of the recipe: `weights=int4`.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The runtime; by default the one that the output's suffix is of.")
    ] = None,
    io: IO = "float32",
    weights: WEIGHTS = None,
    shape: SHAPE = "",
    verify: VERIFY = True,
    as_json: JSON = False,
) -> None:
    """Quantize a model and write it for a runtime, verified; or save it (.fewbit file, folder), to export it later.

    Examples: `fewbit quantize model.keras --calibration images.npy --io int8 -o model.tflite`,
    `fewbit quantize net:build --weights net.safetensors --calibration images.npy -o net.int8.onnx`
    """
    from fewbit.deploy import export, target_of
    from fewbit.pipeline import quantize as run
    from fewbit.storage import save

    as_file = is_artifact(str(output))
    if not as_file and io != "float32":
        raise typer.BadParameter(f"{output} is a saved model: --io is for files of runtimes")
    quantized = run(
        model_of(model, weights),
        None if calibration is None else str(calibration),
        example=example_of(shape),
        recipe=recipe,
        target=target or (target_of(output) if as_file else "onnx"),
        **overrides(settings or []),
    )
    if as_file:
        artifact = export(quantized, output, verify=verify, io=io)
        show(artifact.to_json(), str(artifact), as_json)
    else:
        save(quantized, output)
        show({"path": str(output), "recipe": quantized.plan.recipe}, f"{output}: saved", as_json)


def formats(as_json: JSON = False) -> None:
    """The number formats: bits, levels, and their errors on Gaussian and Laplace weights."""
    from dataclasses import asdict

    from fewbit.catalogue import formats as every_format

    table = every_format()
    show([asdict(row) for row in table], str(table), as_json)
