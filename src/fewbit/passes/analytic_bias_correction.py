"""Analytic bias correction: batch norms tell each layer's mean input, and so by how much rounding shifts its output.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2.1 and appendix C
(arXiv 1906.04721).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.passes._expectation import expected_inputs
from fewbit.passes._layers import TRANSPOSED, Weighted, by_output, channels_out, weighted

PRESERVES = (
    "The mean of each corrected layer's output, per channel, where the inputs of all layers are as the batch norms "
    "in front of them say, and independent and Gaussian before a ReLU."
)
TOLERANCE = None  # it moves the outputs on purpose


def apply(gm: fx.GraphModule, *, reference: fx.GraphModule, layers: Sequence[str]) -> list[str]:
    """Takes E[W_q x] - E[W x] = (W_q - W) E[x] from the biases of `layers` in the quantized graph, without any data.

    E[x] follows from the batch norms that were folded into the layers in front, through ReLUs (the mean of a clipped
    Gaussian), additions, pooling and reshapes. A layer whose mean input cannot be told stays, and a note says so.
    Corrected is what rounding the weights did; activations' rounding is taken to have no mean. At padded edges
    zeros count as if they were the mean.

    Args:
        gm: the quantized graph, changed in place.
        reference: the same graph before rounding; only read.
        layers: names of convolution and linear layers.

    Raises:
        ModelError: a name is not a convolution or linear layer of both graphs.
    """
    expected = expected_inputs(reference)
    notes = []
    for name in layers:
        before, after = _layer(reference, name), _layer(gm, name)
        if name not in expected:
            notes.append(f"{name}: not corrected: no batch norm tells the mean of its input")
            continue
        shift = _response(after, expected[name]) - _response(before, expected[name])
        # From the float bias, so that correcting twice is correcting once.
        bias = -shift if before.bias is None else before.bias.detach().double() - shift
        trained = (after.weight if after.bias is None else after.bias).requires_grad
        after.bias = nn.Parameter(bias.to(after.weight.dtype), requires_grad=trained)
        notes.append(f"{name}: mean shifted back by up to {float(shift.abs().max()):.3g}")
    return notes


def _response(layer: Weighted, mean: Tensor) -> Tensor:
    """What a layer's weights make of an input that is its mean everywhere, float64 [outputs]."""
    weight = by_output(layer, layer.weight.detach().double()).reshape(channels_out(layer), -1)
    groups: Any = 1 if isinstance(layer, nn.Linear) else layer.groups
    inputs = len(mean) // groups
    taps = weight.reshape(groups, -1, inputs, weight.shape[1] // inputs).sum(-1)
    answer = (taps * mean.reshape(groups, 1, inputs)).sum(-1).flatten()
    # A transposed convolution spreads its taps over stride x stride outputs.
    return answer / math.prod(layer.stride) if isinstance(layer, TRANSPOSED) else answer


def _layer(gm: fx.GraphModule, name: str) -> Weighted:
    known = {str(n.target): layer for n in gm.graph.nodes if (layer := weighted(n, gm)) is not None}
    if name not in known:
        raise ModelError(
            f"bias correction: {name!r} is not a convolution or linear layer of both graphs; they have "
            f"{', '.join(known) or 'none'}"
        )
    return known[name]
