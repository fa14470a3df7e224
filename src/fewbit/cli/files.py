"""Commands that write runtimes' files, run them and compare them: export, verify, evaluate, benchmark, measure."""

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import (
    IO,
    JSON,
    MODEL,
    RUNNABLE,
    SHAPE,
    VERIFY,
    WEIGHTS,
    example_of,
    model_of,
    names_of,
    runnable,
    show,
)
from fewbit.errors import ModelError

METRICS = Annotated[str, typer.Option(help="Names with commas between.")]


def export(
    model: MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder with --targets, else a file.")],
    targets: Annotated[str, typer.Option(help="Names with commas between, such as onnx,litert.")] = "",
    data: Annotated[
        Path | None, typer.Option(help=".npz with inputs and labels, to be run in every runtime.")
    ] = None,
    io: IO = "float32",
    weights: WEIGHTS = None,
    shape: SHAPE = "",
    verify: VERIFY = True,
    time: Annotated[bool, typer.Option(help="Compare the latency with float.")] = True,
    as_json: JSON = False,
) -> None:
    """Write a saved model (or a float one) for one runtime, or for several: one table says what came of it.

    Examples: `fewbit export saved -o model.tflite`,
    `fewbit export saved --targets onnx,litert -o build/ --data test.npz`
    """
    from fewbit.deploy import export as run

    found = model_of(model, weights)
    example = example_of(shape)
    if not targets:
        if data is not None:
            raise typer.BadParameter("--data goes with --targets; for one file there is fewbit evaluate")
        artifact = run(found, output, example=example, verify=verify, time=time, io=io)
        show(artifact.to_json(), str(artifact), as_json)
        return
    if io != "float32":
        raise typer.BadParameter("--io is for one file, without --targets")
    test = None if data is None else str(data)
    fleet = run(found, output, targets=names_of(targets), test=test, verify=verify, time=time)
    show(fleet.to_json(), str(fleet), as_json)
    if fleet.failed:
        raise typer.Exit(1)


def verify(
    file: Annotated[Path, typer.Argument(help="A file that fewbit exported, or any int8 .tflite.")],
    model: Annotated[
        Path | None, typer.Option(help="The saved model it was exported from, to compare with that instead.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npy or .npz with inputs; by default random ones that cover the range."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Run an exported file in its own runtime again and compare it with its integer program.

    Examples: `fewbit verify model.int8.onnx`, `fewbit verify model.pte --model saved`
    """
    from fewbit.data import as_batches
    from fewbit.deploy import verify as run
    from fewbit.model.simulate import QuantizedModel

    inputs = None if data is None else as_batches(str(data), what="test", batch_size=16).peek()[0]
    quantized = None if model is None else model_of(str(model))
    if quantized is not None and not isinstance(quantized, QuantizedModel):
        raise ModelError(
            f"{model}: a float model; expected the folder of a quantized one, as fewbit.save writes it"
        )
    result = run(file, inputs, model=quantized)
    show(result.to_json(), str(result), as_json)


def evaluate(
    model: RUNNABLE,
    data: Annotated[Path, typer.Option(help=".npz with inputs and labels.")],
    metrics: METRICS = "accuracy",
    baseline: Annotated[str | None, typer.Option(help="A model to agree with.")] = None,
    weights: WEIGHTS = None,
    as_json: JSON = False,
) -> None:
    """Accuracy and other metrics on labelled data, and agreement with another model.

    Example: `fewbit evaluate model.int8.tflite --data test.npz --metrics accuracy,f1 --baseline model.keras`
    """
    from fewbit.evaluation.metrics import evaluate as run

    other = None if baseline is None else runnable(baseline, weights)
    report = run(runnable(model, weights), str(data), names_of(metrics), other)
    show(report.to_json(), str(report), as_json)


def benchmark(
    files: Annotated[
        list[str], typer.Argument(help="Files of any runtime, by anyone; the first is the baseline.")
    ],
    data: Annotated[
        Path, typer.Option(help=".npz with inputs (and labels for metrics), or .npy with inputs.")
    ],
    metrics: METRICS = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples in one timed call.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often each file is timed.")] = 30,
    as_json: JSON = False,
) -> None:
    """Compare files side by side, timed in turn on one thread: size, latency, metrics, agreement with the first.

    Example: `fewbit benchmark model.onnx model.tflite --data test.npz --metrics accuracy`
    """
    from fewbit.versus import benchmark as run

    result = run(files, str(data), metrics=names_of(metrics), batch=batch, rounds=rounds)
    show(result.to_json(), str(result), as_json)


def measure(
    model: MODEL,
    shape: SHAPE = "",
    artifact: Annotated[list[Path] | None, typer.Option(help="A runtime's file to time beside it.")] = None,
    weights: WEIGHTS = None,
    as_json: JSON = False,
) -> None:
    """Size, operations, latency, memory and energy.

    Example: `fewbit measure net:build --shape 1,3,32,32 --artifact net.int8.onnx`
    """
    from fewbit.deploy import runner
    from fewbit.evaluation.measure import Artifact
    from fewbit.evaluation.measure import measure as run

    found = model_of(model, weights)
    example = example_of(shape, found)
    if example is None:
        raise ModelError(f"{model}: give the shape of an input to run with, such as --shape 1,3,32,32")
    files = {path.name: Artifact(path, runner(path)) for path in artifact or []}
    result = run(found, example, artifacts=files)
    show(result.to_json(), str(result), as_json)
