"""Coupling through layers with parameters, and through the same operators called as functions."""

import math
from typing import Any

import torch
from torch import fx, nn

from fewbit.model.graph import module_of
from fewbit.pruning.coupling import Coupling, Work, name_of, rule, shape_of
from fewbit.pruning.labels import Axes, Axis

_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


def _parameters(c: Coupling, node: fx.Node, *names: str) -> list[Axes | None]:
    """The axes of a layer's parameters, or of the operands of a function after the first."""
    if node.op != "call_module":
        operands = [node.args[i] if len(node.args) > i else None for i in range(1, len(names) + 1)]
        return [c.axes(each) if isinstance(each, fx.Node) else None for each in operands]
    layer: Any = module_of(node, c.gm)
    held = [isinstance(getattr(layer, name, None), torch.Tensor) for name in names]
    paths = [f"{node.target}.{name}" if has else None for name, has in zip(names, held, strict=True)]
    return [None if path is None else c.parameter(path, 2) for path in paths]


def _product(c: Coupling, node: fx.Node, makes: int) -> tuple[fx.Node, Axes, Axes, Axis]:
    """What a layer multiplies, its axes, those of the weight, and that of the bias (of the weight where it has none).

    ``makes``: the weight's dimension along what the layer gives.
    """
    source: Any = node.args[0]
    weight, bias = _parameters(c, node, "weight", "bias")
    assert weight is not None
    if node.op == "call_module":
        c.slot(f"{node.target}.weight").makes = makes
    return source, c.axes(source), weight, weight[makes] if bias is None else bias[0]


@rule("linear")
def linear(c: Coupling, node: fx.Node) -> Axes:
    source, x, weight, bias = _product(c, node, makes=0)
    c.contract(node, source, len(x) - 1, c.unite(x[-1], weight[1], node))
    c.unite(weight[0], bias, node)
    macs = math.prod(shape_of(node)) * shape_of(source)[-1]
    c.work.append(Work(node, macs, (*x[:-1], weight[0], weight[1])))
    return (*x[:-1], weight[0])


@rule("conv")
def conv(c: Coupling, node: fx.Node) -> Axes:
    source, x, weight, bias = _product(c, node, makes=0)
    c.unite(weight[0], bias, node)
    layer = module_of(node, c.gm)
    groups: Any = layer.groups if isinstance(layer, nn.Module) else node.args[6] if len(node.args) > 6 else 1
    count = shape_of(source)[1]
    inside = _grouped(c, node, x[1], weight[0], groups, weight[1])
    c.contract(node, source, 1, x[1])
    taps = math.prod(_weight_shape(c, node)[2:])
    macs = math.prod(shape_of(node)) * (count // groups) * taps
    c.work.append(Work(node, macs, (x[0], weight[0], inside, *x[2:])))
    if node.op != "call_module" and groups > 1 and groups == count:
        c.size(node, 6, None, x[1])
    return (x[0], weight[0], *(None for _ in shape_of(node)[2:]))


@rule("conv_transpose")
def conv_transpose(c: Coupling, node: fx.Node) -> Axes:
    source, x, weight, bias = _product(c, node, makes=1)
    layer: Any = module_of(node, c.gm)
    c.unite(x[1], weight[0], node)
    out = weight[1] if layer.groups == 1 else c.labels.fresh(layer.out_channels)
    inside = weight[1] if layer.groups == 1 else _grouped(c, node, out, weight[0], layer.groups, weight[1])
    if layer.bias is not None:
        c.unite(out, bias, node)
    c.contract(node, source, 1, x[1])
    macs = math.prod(shape_of(source)) * (layer.out_channels // layer.groups) * math.prod(layer.kernel_size)
    c.work.append(Work(node, macs, (x[0], x[1], inside)))
    return (x[0], out, *(None for _ in shape_of(node)[2:]))


def _grouped(c: Coupling, node: fx.Node, ins: Axis, outs: Axis, groups: int, inside: Axis) -> Axis:
    """Unite the channels around a convolution's groups; gives the axis inside of a group.

    Depthwise (one channel ``inside``): a group leaves with its channel. Otherwise all groups lose the same positions.
    """
    if groups == 1:
        return c.unite(ins, inside, node)
    if inside is None:
        if ins is None or outs is None:
            c.unite(ins, outs, node)
            return None
        each = len(outs) // groups
        for i, label in enumerate(outs):
            c.labels.unite(label, ins[i // each])
        return None
    each = len(inside)
    for i, label in enumerate(ins or ()):
        c.labels.unite(label, inside[i % each])
    if ins is None:
        c.unite(None, inside, node)
    per = len(outs or ()) // groups
    for i, label in enumerate(outs or ()):
        c.labels.unite(label, (outs or ())[i % per])
    return inside


def _weight_shape(c: Coupling, node: fx.Node) -> tuple[int, ...]:
    layer: Any = module_of(node, c.gm)
    return tuple(layer.weight.shape) if layer is not None else shape_of(node.args[1])


@rule("embedding")
def embedding(c: Coupling, node: fx.Node) -> Axes:
    rows, width = c.weight(f"{node.target}.weight", makes=1)
    c.labels.freeze(rows, f"{name_of(node)} looks its rows up by number")
    return (*c.axes(node.args[0]), width)


@rule("batch_norm", "instance_norm")
def per_channel_norm(c: Coupling, node: fx.Node) -> Axes:
    x = c.axes(node.args[0])
    for each in _parameters(c, node, "weight", "bias", "running_mean", "running_var"):
        if each is not None:
            c.unite(x[1], each[0], node)
    _factors(c, node)
    return x


def _factors(c: Coupling, node: fx.Node) -> None:
    layer: Any = module_of(node, c.gm)
    if layer.weight is not None:
        c.slot(f"{node.target}.weight").factors = True


@rule("prelu")
def prelu(c: Coupling, node: fx.Node) -> Axes:
    x = c.axes(node.args[0])
    (slopes,) = _parameters(c, node, "weight")
    if slopes is not None and slopes[0] is not None:
        c.unite(x[1], slopes[0], node)
    return x


@rule("group_norm")
def group_norm(c: Coupling, node: fx.Node) -> Axes:
    """A group of the norm leaves whole: its statistics are its own."""
    x = c.axes(node.args[0])
    layer: Any = module_of(node, c.gm)
    if x[1] is not None:
        each = layer.num_channels // layer.num_groups
        for start in range(0, layer.num_channels, each):
            c.labels.unite_all(x[1][start : start + each])
    for part in _parameters(c, node, "weight", "bias"):
        if part is not None:
            c.unite(x[1], part[0], node)
    _factors(c, node)
    return x


@rule("layer_norm", "rms_norm")
def over_channels(c: Coupling, node: fx.Node) -> Axes:
    x = c.axes(node.args[0])
    layer: Any = module_of(node, c.gm)
    normalized = x[len(x) - len(layer.normalized_shape) :]
    reason = f"{name_of(node)} divides each by the spread of all"
    c.freeze(normalized, reason)
    for name, _ in layer.named_parameters():
        c.freeze(c.parameter(f"{node.target}.{name}"), reason)
    return x


@rule("lstm", "gru", "rnn")
def recurrent(c: Coupling, node: fx.Node) -> Any:
    """A hidden unit leaves with its gates, with the state that it feeds, and with what reads it.

    All levels and directions have one size, so that they lose the same positions.
    """
    layer: Any = module_of(node, c.gm)
    source: Any = node.args[0]
    if layer.proj_size or len(node.all_input_nodes) > 1:
        return c.mixed(node, f"{name_of(node)} has a projection or states from outside")
    gates = next(count for kind, count in _GATES.items() if isinstance(layer, kind))
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    x, steps = c.axes(source), math.prod(shape_of(source)[:-1])
    c.contract(node, source, len(x) - 1, x[-1])
    units = c.labels.fresh(layer.hidden_size)
    outs = None if units is None else units * len(directions)
    for level in range(layer.num_layers):
        below = outs if level else x[-1]
        for end in (f"_l{level}{direction}" for direction in directions):
            ih, hh = (f"{node.target}.weight_{kind}{end}" for kind in ("ih", "hh"))
            c.unite(below, c.weight(ih)[1], node)
            c.unite(units, c.weight(hh)[1], node)
            rows = [ih, hh] + [f"{node.target}.bias_{kind}{end}" for kind in ("ih", "hh") if layer.bias]
            for each in rows:
                c.unite(units and units * gates, c.parameter(each)[0], node)
            c.states += [(hh, units)] + ([(ih, outs)] if level else [])
            inputs = layer.hidden_size * len(directions) if level else layer.input_size
            c.work.append(Work(node, steps * gates * layer.hidden_size * inputs, (units, below)))
            c.work.append(Work(node, steps * gates * layer.hidden_size**2, (units, units)))
    state = (None, x[0], units)
    return [(*x[:-1], outs), [state] * 2 if isinstance(layer, nn.LSTM) else state]
