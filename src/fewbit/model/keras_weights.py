"""The numbers of a Keras layer as PyTorch tensors: float32 copies, frozen where Keras has them frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def tensor(variable: Any) -> Tensor:
    """A copy of a Keras variable's value (or of any array), on the CPU, floating ones in float32."""
    value = getattr(variable, "value", variable)
    if not isinstance(value, Tensor):
        from keras import ops

        value = torch.from_numpy(np.asarray(ops.convert_to_numpy(value)))
    value = value.detach().cpu().clone()
    return value.float() if value.is_floating_point() else value


def parameters(module: nn.Module, layer: Any, **values: Any) -> nn.Module:
    """``module`` with these parameters; None stands for one that the layer does not have."""
    for name, value in values.items():
        if value is not None:
            value = value if isinstance(value, Tensor) else tensor(value)
            setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=bool(layer.trainable)))
    return module
