"""Multiply-accumulates and bit operations by layer, counted from a graph in standard form."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fewbit.errors import ModelError
from fewbit.model.operators import operator

aten = torch.ops.aten
Bits = Mapping[str, tuple[int, int]]

_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerCost:
    """One layer: its multiply-accumulates for one sample (biases not counted) and its number of parameters.

    A layer that is called twice is there twice. Shared parameters count where they are first used.
    """

    layer: str
    op: str
    macs: int
    params: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self).copy()


@dataclass(frozen=True)
class LayerBops:
    """Bit operations of one layer: MACs x weight bits x activation bits (32 = float)."""

    layer: str
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        return self.macs * self.weight_bits * self.activation_bits

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"bops": self.bops}


def macs(gm: fx.GraphModule) -> list[LayerCost]:
    """Costs of all layers that multiply or hold parameters, in the graph's order, for one sample.

    Counted from `node.meta["shape"]` (sizes on the example): convolutions, linear layers, LSTM/GRU/RNN,
    matrix products, einsum, scaled-dot-product attention. Elementwise work is not counted. Raises
    ModelError where a shape is missing.
    """
    batch = _batch(gm)
    costs: list[LayerCost] = []
    seen: set[int] = set()
    for node in gm.graph.nodes:
        found = _node_cost(node, gm)
        if found is None:
            continue
        op, count, parameters = found
        fresh = sum(each.numel() for each in parameters if id(each) not in seen)
        seen.update(map(id, parameters))
        layer = str(node.target) if node.op in ("call_module", "get_attr") else node.name
        costs.append(LayerCost(layer, op, -(-count // batch), fresh))
    return costs


def _batch(gm: fx.GraphModule) -> int:
    """Samples in the example: dimension 0 of the first input, or 1 where a recurrent layer has time first."""
    first = next((node for node in gm.graph.nodes if node.op == "placeholder"), None)
    shape = _shape(first) if first is not None else ()
    recurrent = [module for module in gm.modules() if isinstance(module, nn.RNNBase)]
    time_first = len(shape) > 1 and any(not module.batch_first for module in recurrent)
    return shape[1 if time_first else 0] if shape else 1


def bops(costs: Iterable[LayerCost], bits: Bits) -> list[LayerBops]:
    """Bit operations of the layers that multiply.

    bits: layer -> (weight bits, activation bits), for example from `bits_of`; a layer that it lacks is
    float, 32 x 32.
    """
    return [LayerBops(each.layer, each.macs, *bits.get(each.layer, (32, 32))) for each in costs if each.macs]


def bits_of(model: Any) -> dict[str, tuple[int, int]]:
    """Weight and input bits by layer of a quantized model, from its graph, `qtensors` and `integer` nodes.

    For a product of two activations the second operand's bits stand for the weight's. What runs in float
    has 32. An empty dictionary for a model that is not quantized.
    """
    gm = getattr(model, "graph", None)
    qtensors = getattr(model, "qtensors", None)
    if not isinstance(gm, fx.GraphModule) or qtensors is None:
        return {}
    weights: dict[str, int] = {}
    for name in qtensors.names():
        weights.setdefault(name.rpartition(".")[0], qtensors[name].scheme.spec.bits)
    bits = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "call_function") or _quantizer(node, gm) is not None:
            continue
        layer = str(node.target) if node.op == "call_module" else node.name
        operands = [each for each in node.args if isinstance(each, fx.Node)]
        codes = [_operand_bits(each, gm, node.name in model.integer) for each in operands[:2]]
        weight = weights.get(layer, codes[1] if len(codes) > 1 else 32)
        if codes:
            bits[layer] = (weight, codes[0])
    return bits


def activation_bits(model: Any) -> dict[str, int]:
    """Bits of each node's output in a quantized model's integer form, by node name; floats are left out.

    A node in front of a quantize-dequantize step, or fused with the activation in front of one, gives
    codes; so does one that only rearranges codes. An empty dictionary for a model that is not quantized.
    """
    gm = getattr(model, "graph", None)
    if not isinstance(gm, fx.GraphModule) or getattr(model, "qtensors", None) is None:
        return {}
    bits: dict[str, int] = {}
    for node in gm.graph.nodes:
        found = _quantizer(node, gm)
        ahead = node
        while found is None and len(ahead.users) == 1 and (ahead is node or _is_clamp(ahead, gm)):
            ahead = next(iter(ahead.users))
            found = _quantizer(ahead, gm)
        known = operator(node, gm)
        if found is None and known is not None and known.role == "shares":
            found = bits.get(node.all_input_nodes[0].name) if node.all_input_nodes else None
        if found is not None:
            bits[node.name] = found
    return bits


def _is_clamp(node: fx.Node, gm: fx.GraphModule) -> bool:
    known = operator(node, gm)
    return known is not None and known.role == "activation"


def _quantizer(node: fx.Node, gm: fx.GraphModule) -> int | None:
    """Bits that a quantize-dequantize step rounds to, None for other nodes."""
    if node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    if type(module).__name__ == "DynamicFakeQuantize":
        return 8
    if type(module).__name__ != "FakeQuantize":
        return None
    scheme: Any = module.scheme
    return int(scheme.spec.bits)


def _operand_bits(node: fx.Node, gm: fx.GraphModule, integer: bool) -> int:
    """Bits of an operand; on the way to an integer node's codes, reshapes and the like are walked past."""
    while True:
        bits = _quantizer(node, gm)
        sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
        if bits is not None or not integer or not sources:
            return bits or 32
        node = sources[0]


def _node_cost(node: fx.Node, gm: fx.GraphModule) -> tuple[str, int, list[nn.Parameter]] | None:
    """Operator name, multiply-accumulates of the whole batch, and parameters."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        params = list(module.parameters())
        count = _module_macs(node, module)
        if count is None:
            return (type(module).__name__.lower(), 0, params) if params else None
        name = "conv" if isinstance(module, _CONVS) else type(module).__name__.lower()
        return "conv_transpose" if isinstance(module, _TRANSPOSED) else name, count, params
    if node.op == "get_attr":
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return ("parameter", 0, [value]) if isinstance(value, nn.Parameter) else None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        name, count_of = _FUNCTIONS[node.target]
        return name, count_of(node), []
    return None


def _module_macs(node: fx.Node, module: nn.Module) -> int | None:
    if isinstance(module, _CONVS):
        return _size(node) * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, _TRANSPOSED):
        return _size(node.args[0]) * module.out_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return _size(node) * module.in_features
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        return math.prod(_shape(node.args[0])[:-1]) * _recurrent_step(module)
    return None


def _recurrent_step(module: nn.LSTM | nn.GRU | nn.RNN) -> int:
    """Multiply-accumulates of one time step of one sample, through all layers and directions."""
    gates = next(count for kind, count in _GATES.items() if isinstance(module, kind))
    directions = 2 if module.bidirectional else 1
    hidden, state = module.hidden_size, module.proj_size or module.hidden_size
    total = 0
    for layer in range(module.num_layers):
        inputs = module.input_size if layer == 0 else state * directions
        projection = hidden * state if module.proj_size else 0
        total += directions * (gates * hidden * (inputs + state) + projection)
    return total


def _shape(node: Any) -> tuple[int, ...]:
    shape = node.meta.get("shape") if isinstance(node, fx.Node) else None
    if shape is None:
        raise ModelError(
            f"node {getattr(node, 'name', node)!r} has no shape: count a graph that fewbit has read"
        )
    return tuple(shape)


def _size(node: Any) -> int:
    return math.prod(_shape(node))


def _matmul(left: int) -> Callable[[fx.Node], int]:
    """Output size times the inner dimension, which ends the left operand."""
    return lambda node: _size(node) * _shape(node.args[left])[-1]


def _attention(node: fx.Node) -> int:
    """Scores q k' and their product with v, masked or not."""
    query, key, value = (_shape(each) for each in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node) -> int:
    """All index combinations, once for each operand after the first: a contraction in one step."""
    operands: Any = node.args[1]
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        shape = _shape(operand)
        # Greek names for what "..." covers, counted from the right as broadcasting does.
        hidden = "".join(chr(0x3B1 + i) for i in reversed(range(len(shape) - len(term) + 3)))
        for index, size in zip(term.replace("...", hidden), shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    return math.prod(sizes.values()) * (len(operands) - 1)


def _functional_conv(node: fx.Node) -> int:
    transposed = len(node.args) > 6 and node.args[6] is True  # aten.convolution's flag
    source = node.args[0] if transposed else node
    return _size(source) * math.prod(_shape(node.args[1])[1:])


_FUNCTIONS: dict[Any, tuple[str, Callable[[fx.Node], int]]] = {
    aten.matmul.default: ("matmul", _matmul(0)),
    aten.mm.default: ("matmul", _matmul(0)),
    aten.bmm.default: ("matmul", _matmul(0)),
    aten.addmm.default: ("matmul", _matmul(1)),
    aten.baddbmm.default: ("matmul", _matmul(1)),
    aten.linear.default: ("linear", _matmul(0)),
    aten.einsum.default: ("einsum", _einsum),
    aten.scaled_dot_product_attention.default: ("sdpa", _attention),
    aten.convolution.default: ("conv", _functional_conv),
    aten.conv1d.default: ("conv", _functional_conv),
    aten.conv2d.default: ("conv", _functional_conv),
    aten.conv3d.default: ("conv", _functional_conv),
}
