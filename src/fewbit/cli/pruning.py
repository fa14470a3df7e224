"""The command that prunes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.options import (
    JSON,
    MODEL,
    SHAPE,
    VERIFY,
    WEIGHTS,
    example_of,
    is_artifact,
    model_of,
    names_of,
    show,
)


def prune(
    model: MODEL,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A runtime's file, or a folder to save to and go on from.")
    ],
    speedup: Annotated[float | None, typer.Option(help="How many times fewer multiply-accumulates.")] = None,
    macs: Annotated[float | None, typer.Option(help="Multiply-accumulates of one sample.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Parameters that are left.")] = None,
    latency: Annotated[
        str | None, typer.Option(help='Such as "3 ms": measured in ONNX Runtime on one thread, at --shape.')
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The share of single weights that become zero.")
    ] = None,
    structure: Annotated[
        str | None, typer.Option(help="channels; unstructured, block or N:M such as 2:4 for single weights.")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="What is needed least; by default l2, or magnitude for weights.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help=".npy or .npz with inputs and labels, to see and to fit on.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="global compares layers, uniform takes the same of each.")
    ] = "global",
    steps: Annotated[int, typer.Option(min=1, help="Reach the budget in so many parts.")] = 1,
    least: Annotated[
        float | None, typer.Option(help="Share of a layer that stays in any case; 0.1, of weights 0.01.")
    ] = None,
    multiple: Annotated[
        int | None,
        typer.Option(help="Channels stay in multiples of it; by default 8 with --latency, else 1."),
    ] = None,
    ignore: Annotated[
        str, typer.Option(help="Layers that stay, with commas between, such as stem,head.*")
    ] = "",
    repair: Annotated[
        bool | None, typer.Option(help="Fit the weights that are left; by default with --data.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help=".npz with inputs and labels: accuracy and latency before and after.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="An .svg file to draw what each layer keeps in.")] = None,
    seed: int = 0,
    weights: WEIGHTS = None,
    shape: SHAPE = "",
    verify: VERIFY = True,
    as_json: JSON = False,
) -> None:
    """Prune channels, hidden units and heads to one budget, or set weights to zero, and write the float model.

    Examples: `fewbit prune net.keras --speedup 2 --data train.npz --criterion taylor -o small/`,
    `fewbit prune net:build --shape 1,3,224,224 --latency "3 ms" -o small.onnx`,
    `fewbit prune net.keras --sparsity 0.8 --data train.npz -o sparse/`
    """
    from fewbit.data import as_batches
    from fewbit.deploy import export
    from fewbit.slimming import prune as run
    from fewbit.storage import check_replaceable, save

    if not is_artifact(str(output)):
        check_replaceable(output)
    whole = model_of(model, weights)
    example = example_of(shape)
    budget: dict[str, Any] = {"speedup": speedup, "macs": macs, "parameters": parameters, "latency": latency,
                              "sparsity": sparsity, "structure": structure}  # fmt: skip
    settings: dict[str, Any] = {"scope": scope, "least": least, "multiple": multiple, "repair": repair}
    small = run(
        whole, example, criterion=criterion, data=None if data is None else str(data), steps=steps,
        ignore=tuple(names_of(ignore)), seed=seed, **budget, **settings,
    )  # fmt: skip
    found = "pruning" if sparsity is None and structure in (None, "channels") else "sparsity"
    report = small.meta[found]
    answer: dict[str, Any] = {"path": str(output), found: report.to_json()}
    lines = [str(report)]
    if is_artifact(str(output)):
        if example is None and data is not None:
            example = as_batches(str(data), what="pruning").peek()[0]
        artifact = export(small, output, example=example, verify=verify)
        answer["artifact"] = artifact.to_json()
        lines.append(str(artifact))
    else:
        save(small, output)
        lines.append(f"{output}: saved")
    if plot is not None:
        report.plot(plot)
    if test is not None:
        from fewbit.comparison import compare

        compared = compare(whole, small, example, test=str(test))
        answer["comparison"] = compared.to_json()
        lines.append(str(compared))
    show(answer, "\n".join(lines), as_json)
