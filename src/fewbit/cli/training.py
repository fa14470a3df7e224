"""The commands that train: finetune, compress."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.options import IO, JSON, MODEL, VERIFY, WEIGHTS, is_artifact, model_of, overrides, show
from fewbit.errors import ModelError


def finetune(
    model: MODEL,
    train: Annotated[Path, typer.Option(help=".npz with inputs and labels.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A runtime's file, or a folder to export from later.")
    ],
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    recipe: Annotated[str, typer.Option(help="A preset's name or a TOML file.")] = "int8",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value of the recipe, as in weights=int4.")
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(help="A model that teaches; `float`: the model before quantization; `none`: labels do."),
    ] = "float",
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default 1e-3, or 1e-2 for sgd.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    augment: Annotated[bool, typer.Option(help="Move and mirror images at random.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Keeps a state after each epoch, and metrics; the same call goes on.")
    ] = None,
    seed: int = 0,
    io: IO = "float32",
    weights: WEIGHTS = None,
    verify: VERIFY = True,
    as_json: JSON = False,
) -> None:
    """Quantize a model, train it in its codes, and write it for a runtime, verified; or save it to a folder.

    Example: `fewbit finetune model.keras --train digits.npz --set weights=int4 --epochs 5 -o model.tflite`
    """
    from fewbit.deploy import export, target_of
    from fewbit.finetuning import finetune as run
    from fewbit.model.simulate import QuantizedModel
    from fewbit.storage import save

    as_file = is_artifact(str(output))
    if not as_file and io != "float32":
        raise typer.BadParameter(f"{output} is a folder: --io is for files")
    found = model_of(model, weights)
    if isinstance(found, QuantizedModel):
        raise ModelError(f"{model}: quantized already; give the float model that it came from")
    teachers: dict[str, Any] = {"float": "float", "none": None}
    taught = teachers[teacher] if teacher in teachers else model_of(teacher)
    trained = run(
        found, str(train), epochs=epochs, recipe=recipe, target=target_of(output) if as_file else "onnx",
        teacher=taught, lr=lr, optimizer=optimizer, batch_size=batch_size,
        augment="images" if augment else None, folder=folder, resume=folder is not None, seed=seed,
        **overrides(settings or []),
    )  # fmt: skip
    last = trained.facts["training"][-1]
    line = ", ".join(f"{key} {value:.4g}" for key, value in last.items())
    if as_file:
        artifact = export(trained, output, verify=verify, io=io)
        show(artifact.to_json() | {"training": trained.facts["training"]}, f"{line}\n{artifact}", as_json)
    else:
        save(trained, output)
        show(
            {"path": str(output), "training": trained.facts["training"]}, f"{line}\n{output}: saved", as_json
        )


def compress(
    model: MODEL,
    train: Annotated[Path, typer.Option(help=".npz with inputs and labels.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A *.fewbit file, a folder, or a runtime's file.")
    ],
    recipe: Annotated[
        str, typer.Option(help="A preset of several steps, or a TOML file.")
    ] = "deep-compression",
    augment: Annotated[bool, typer.Option(help="Move and mirror images at random.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Keeps each step's result; the same call goes on after an interruption."),
    ] = None,
    seed: int = 0,
    weights: WEIGHTS = None,
    verify: VERIFY = True,
    as_json: JSON = False,
) -> None:
    """Make a model small in several steps (prune, train, share weights, quantize), in the order of a recipe.

    Example: `fewbit compress model.keras --train digits.npz --recipe deep-compression -o model.fewbit`
    """
    from fewbit.compression import compress as run
    from fewbit.deploy import export
    from fewbit.evaluation.size import size_by_tensor
    from fewbit.plan import Steps
    from fewbit.storage import check_replaceable, save

    steps = Steps.load(recipe)
    if not is_artifact(str(output)):
        check_replaceable(output)
    small = run(
        model_of(model, weights), str(train), recipe=steps, augment="images" if augment else None, folder=folder,
        resume=folder is not None, seed=seed,
    )  # fmt: skip
    done = [str(step) for step in steps.steps]
    if is_artifact(str(output)):
        artifact = export(small, output, verify=verify)
        show(artifact.to_json() | {"steps": done}, "\n".join([*done, str(artifact)]), as_json)
    else:
        save(small, output)
        sizes = size_by_tensor(output)
        show(
            {"path": str(output), "steps": done, "bytes": sizes.file}, "\n".join([*done, str(sizes)]), as_json
        )
