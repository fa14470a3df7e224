"""Commands that measure before deciding: sensitivity."""

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import JSON, MODEL, WEIGHTS, model_of, names_of, numbers_of, show


def sensitivity(
    model: MODEL,
    calibration: Annotated[
        Path, typer.Option(help=".npy or .npz with typical inputs; labels are used with --ratios.")
    ],
    candidates: Annotated[str, typer.Option(help="Formats with commas between.")] = "int8,int4,int2",
    metrics: Annotated[
        str, typer.Option(help="Names with commas between; by default all that the data allow.")
    ] = "",
    ratios: Annotated[
        str, typer.Option(help="Shares of channels to prune instead of formats, such as 0.25,0.5.")
    ] = "",
    criterion: Annotated[str, typer.Option(help="Which channels leave, with --ratios.")] = "l2",
    plot: Annotated[Path | None, typer.Option(help="An .svg file to draw the first metric in.")] = None,
    weights: WEIGHTS = None,
    seed: Annotated[int, typer.Option(help="Of the random vectors behind hessian and fisher.")] = 0,
    as_json: JSON = False,
) -> None:
    """Measure how much harm each layer's weights do in each format, or without a share of its channels.

    Examples: `fewbit sensitivity net.onnx --calibration images.npy --candidates int8,int4 --plot harm.svg`,
    `fewbit sensitivity net.onnx --calibration test.npz --ratios 0.25,0.5`
    """
    from fewbit.search.sensitivity import sensitivity as run

    result = run(
        model_of(model, weights), str(calibration), names_of(candidates), metrics=names_of(metrics) or None,
        ratios=numbers_of(ratios), criterion=criterion, seed=seed,
    )  # fmt: skip
    if plot is not None:
        result.plot(plot)
    show(result.to_json(), str(result), as_json)
