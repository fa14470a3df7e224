"""Commands that measure before deciding: sensitivity."""

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import JSON, MODEL, WEIGHTS, model_of, names_of, show


def sensitivity(
    model: MODEL,
    calibration: Annotated[Path, typer.Option(help=".npy or .npz with typical inputs.")],
    candidates: Annotated[str, typer.Option(help="Formats with commas between.")] = "int8,int4,int2",
    metrics: Annotated[str, typer.Option(help="Names with commas between.")] = "sqnr,kl,hessian,fisher",
    plot: Annotated[Path | None, typer.Option(help="An .svg file to draw the first metric in.")] = None,
    weights: WEIGHTS = None,
    seed: Annotated[int, typer.Option(help="Of the random vectors behind hessian and fisher.")] = 0,
    as_json: JSON = False,
) -> None:
    """Measure how much harm each layer's weights do in each format, one layer at a time.

    Example: `fewbit sensitivity net.onnx --calibration images.npy --candidates int8,int4 --plot harm.svg`
    """
    from fewbit.search.sensitivity import sensitivity as run

    result = run(
        model_of(model, weights), str(calibration), names_of(candidates), metrics=names_of(metrics), seed=seed
    )
    if plot is not None:
        result.plot(plot)
    show(result.to_json(), str(result), as_json)
