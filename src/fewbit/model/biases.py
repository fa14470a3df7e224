"""Biases as the integer program adds them: whole multiples of input scale x weight scale."""

from collections import Counter

import torch
from torch import Tensor

from fewbit.model.lowering import lower
from fewbit.model.simulate import QuantizedModel
from fewbit.model.sites import WEIGHTED


def round_biases(model: QuantizedModel) -> None:
    """Give the simulation the biases that the integer program adds: whole multiples of input scale x weight scale.

    A layer that is called several times keeps its float bias, since each call has an input scale of its own.
    """
    program = lower(model)
    ops = [op for op in program.integer_ops() if op.kind in WEIGHTED and "bias" in op.constants]
    calls = Counter(op.layer for op in ops)
    for op in ops:
        if calls[op.layer] > 1:
            continue
        unit = (
            torch.tensor(program.codings[op.inputs[0]].scale, dtype=torch.float32)
            * op.constants["weight_scale"]
        )
        bias = model.graph.get_submodule(op.layer).bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias.copy_((op.constants["bias"].double() * unit.double()).to(torch.float32))
