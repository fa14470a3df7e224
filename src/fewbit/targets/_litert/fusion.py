"""Steps that join others: a batch norm becomes part of the layer in front of it, a clamp part of its operator."""

import dataclasses

import torch

from fewbit.model.program import Op, Program
from fewbit.targets._litert.floats_products import batch_norm_scale
from fewbit.targets._litert.layout import key

_LAYERS = {"module.Conv1d": 0, "module.Conv2d": 0, "module.Linear": 0}
_LAYERS |= {"module.ConvTranspose1d": 1, "module.ConvTranspose2d": 1}
_FUSING = {"module.Conv2d", "module.Linear", "dynamic_conv", "dynamic_linear", "aten.avg_pool2d.default"}
_FUSING |= {f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div")}
_CLAMPS = {"aten.relu.default": "RELU", "aten.relu6.default": "RELU6"}


def norms_joined(program: Program) -> Program:
    """Batch norms behind a layer of float weights, which nothing else reads, are computed into its weights."""
    users = _users(program)
    made = {op.output: op for op in program.ops}
    ops: dict[str, Op] = {}
    for op in program.ops:
        before = made.get(op.inputs[0]) if op.inputs else None
        if before is not None and _joins(op, before, users, program):
            ops.pop(before.output)
            op = made[op.output] = _joined(before, op)
        ops[op.output] = op
    return dataclasses.replace(program, ops=list(ops.values()))


def _joins(op: Op, before: Op, users: dict[str, int], program: Program) -> bool:
    norm = op.kind == "module" and op.attrs["type"].startswith("BatchNorm") and "running_mean" in op.constants
    layer = key(before) in _LAYERS and not before.attrs["schemes"] and len(before.attrs["shape"]) > 1
    if not norm or not layer or users[before.output] != 1 or before.output in program.output_names():
        return False
    if before.attrs["type"] == "Linear" and len(before.attrs["shape"]) != 2:
        return False  # its features are last, a batch norm's channels are not
    return before.attrs["config"].get("groups", 1) == 1 or _LAYERS[key(before)] == 0


def _joined(layer: Op, norm: Op) -> Op:
    factor, term = batch_norm_scale(norm.constants, norm.attrs["config"]["eps"])
    weight = layer.constants["weight"]
    shape = [1] * weight.dim()
    shape[_LAYERS[key(layer)]] = -1
    bias = layer.constants.get("bias", torch.zeros_like(factor))
    constants = {
        "weight": (weight.double() * factor.double().reshape(shape)).float(),
        "bias": (bias.double() * factor.double() + term.double()).float(),
    }
    attrs = layer.attrs | {"config": layer.attrs["config"] | {"bias": True}}
    return dataclasses.replace(layer, output=norm.output, attrs=attrs, constants=constants)


def fused_clamps(program: Program, dtypes: dict[str, str]) -> dict[str, tuple[str, str]]:
    """For each float value that only a ReLU reads: the activation's name, and the value that comes out of it."""
    users, made = _users(program), {op.output: op for op in program.ops}
    outputs, found = program.output_names(), {}
    for op in program.ops:
        source = made.get(op.inputs[0]) if op.inputs else None
        if source is None or op.domain != "float" or key(op) not in _CLAMPS or key(source) not in _FUSING:
            continue
        single = users[source.output] == 1 and source.output not in outputs
        if source.domain == "float" and single and dtypes[source.output] == "float32":
            found[source.output] = (_CLAMPS[key(op)], op.output)
    return found


def _users(program: Program) -> dict[str, int]:
    count: dict[str, int] = {}
    for op in program.ops:
        for name in op.inputs:
            count[name] = count.get(name, 0) + 1
    return count
