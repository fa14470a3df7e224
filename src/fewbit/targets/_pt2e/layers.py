"""The tensors of a program's operations as module buffers, named as in the program: what an archive stores."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewbit.errors import TargetError
from fewbit.model.program import Op, Program
from fewbit.model.reference import MODULES, module_state
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme


class Constants(nn.Module):
    """An operation's constants: int8 weights with zero points, biases in float as the tools want them.

    ``decoded``: the weight as float numbers.
    """

    bias: Tensor | None

    def __init__(self, op: Op, program: Program, decoded: bool = False) -> None:
        super().__init__()
        stored = {role: t for role, t in op.constants.items() if role != "table"}
        if "value" in stored and op.output in program.codings:
            stored["value"] = stored["value"].to(program.codings[op.output].scheme.spec.code_dtype)
        if "weight" in stored and decoded:
            scale = stored.pop("weight_scale").reshape(-1, *[1] * (stored["weight"].dim() - 1))
            stored["weight"] = stored["weight"].to(torch.float32) * scale
        elif "weight" in stored:
            stored["weight"] = stored["weight"].to(torch.int8)
            stored["weight_zero"] = torch.zeros(len(stored["weight_scale"]), dtype=torch.int64)
        if op.domain == "integer" and "bias" in stored:
            unit = bias_unit(op, program)
            stored["bias"] = (stored["bias"].double() * unit.double()).to(torch.float32)
        for role, tensor in stored.items():
            self.register_buffer(role, tensor)
        if "bias" not in stored:
            self.bias = None


def bias_unit(op: Op, program: Program) -> Tensor:
    """What one step of an int32 bias stands for, for each output channel."""
    scale = torch.tensor(program.codings[op.inputs[0]].scale, dtype=torch.float32)
    return scale * op.constants["weight_scale"]


def layer(op: Op, decoded: bool) -> nn.Module:
    """The standard layer that a float operation runs; its weights as codes, unless ``decoded``."""
    kind = op.attrs["type"]
    if kind not in MODULES:
        raise TargetError(f"{op.layer}: {kind!r} is no standard layer; expected one of {', '.join(MODULES)}")
    if op.attrs.get("schemes") and not decoded:
        return CodedLayer(op)
    plain = skeleton(op)
    plain.load_state_dict(module_state(op), assign=True)
    return plain.requires_grad_(False)


def skeleton(op: Op) -> nn.Module:
    """The layer without its tensors: sizes in a file are claims, so they get no memory."""
    with torch.device("meta"):
        empty: nn.Module = getattr(nn, op.attrs["type"])(**op.attrs["config"])
    return empty.eval()


class CodedLayer(nn.Module):
    """A standard layer whose weights are stored as codes and decoded whenever it runs."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self._skeleton = [skeleton(op)]  # in a list: its own weights are no part of this module
        self._schemes = {name: Scheme.from_json(s) for name, s in op.attrs["schemes"].items()}
        self._shapes = {name: tuple(shape) for name, shape in op.attrs["shapes"].items()}
        self._plain = [r for r in op.constants if r.split("::")[0] not in self._schemes]
        for role, tensor in op.constants.items():
            self.register_buffer(role, tensor)

    def forward(self, *inputs: Any) -> Any:
        state: dict[str, Tensor] = {role: getattr(self, role) for role in self._plain}
        for name, scheme in self._schemes.items():
            codes, scale, zero_point = (
                getattr(self, role) for role in (name, f"{name}::scale", f"{name}::zero_point")
            )
            state[name] = QTensor(codes, scale, zero_point, scheme, self._shapes[name]).dequantize()
        return functional_call(self._skeleton[0], state, inputs)
