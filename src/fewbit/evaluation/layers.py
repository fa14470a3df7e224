"""Error of a quantized graph layer by layer, beside the float graph, in one streaming pass."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fewbit.errors import ModelError
from fewbit.evaluation.agreement import SignalToNoise, finite
from fewbit.evaluation.forward import eval_mode


@dataclass(frozen=True)
class LayerError:
    """How far one node's output is from the float one's, with all error that earlier layers have brought.

    `layer` is the user's module name, or the node's name for a function; `node` the float graph's node.
    `sqnr_db` is the signal-to-quantization-noise ratio in dB (inf: no difference).
    """

    layer: str
    node: str
    sqnr_db: float
    max_abs: float
    mean_abs: float


@dataclass(frozen=True)
class LayerErrors:
    """Errors of all compared nodes, in the graph's order."""

    layers: tuple[LayerError, ...]

    def worst(self, count: int = 5) -> tuple[LayerError, ...]:
        """The `count` nodes with the lowest SQNR, worst first."""
        return tuple(sorted(self.layers, key=lambda each: each.sqnr_db)[:count])

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON values; an infinite SQNR is None."""
        return [vars(each) | {"sqnr_db": finite(each.sqnr_db)} for each in self.layers]

    def __str__(self) -> str:
        width = max(len(each.layer) for each in self.layers)
        rows = (
            f"{each.layer:<{width}}  {each.sqnr_db:7.1f} dB   largest difference {each.max_abs:.3g}"
            for each in self.layers
        )
        return "\n".join(rows)


def layer_errors(
    float_graph: fx.GraphModule,
    quantized_graph: fx.GraphModule,
    batches: Iterable[tuple[tuple[Tensor, ...], Tensor | None]],
    names: Mapping[str, str] | None = None,
) -> LayerErrors:
    """Compare the values of nodes in two graphs that run side by side on the same batches.

    Both graphs must be of one kind, that is the float graph as it was after all passes: a folded
    convolution also holds the batch norm, and has no counterpart before folding. A node of the float
    graph is compared with the one that `names` gives for it; without `names` with `<name>_quantized`, or
    else the node of the same name. Only outputs that are floating tensors count. The graphs advance node
    by node together, and values die after their last use: the memory is that of both models' forward
    passes on one batch, whatever the number of layers and batches.

    batches: items (inputs, target) as `fewbit.data.as_batches` gives them; targets are not used.
    Raises ModelError where no nodes correspond, a name is unknown, or shapes differ.
    """
    pairs = _pairs(float_graph, quantized_graph, names)
    meters = {node.name: SignalToNoise() for node in pairs}
    with eval_mode(float_graph), eval_mode(quantized_graph), torch.inference_mode():
        for inputs, _ in batches:
            left = _Stepper(float_graph, inputs, set(pairs))
            right = _Stepper(quantized_graph, inputs, set(pairs.values()))
            for node, twin in pairs.items():
                _compare(node, left.value(node), right.value(twin), meters)
    measured = [
        LayerError(_layer(node), node.name, meter.sqnr_db, meter.largest, meter.mean_abs)
        for node in pairs
        if (meter := meters[node.name]).count
    ]
    if not measured:
        raise ModelError(
            "no layer was compared: the two graphs have no floating tensors in common, or no data came"
        )
    return LayerErrors(tuple(measured))


def _pairs(
    float_graph: fx.GraphModule, quantized_graph: fx.GraphModule, names: Mapping[str, str] | None
) -> dict[fx.Node, fx.Node]:
    """Nodes to compare, in the float graph's order."""
    found = {node.name: node for node in quantized_graph.graph.nodes}
    nodes = [
        node for node in float_graph.graph.nodes if node.op in ("call_module", "call_function", "call_method")
    ]
    if names is None:
        candidates = [(node, found.get(f"{node.name}_quantized") or found.get(node.name)) for node in nodes]
        pairs = {node: twin for node, twin in candidates if twin is not None}
    else:
        known = {node.name: node for node in nodes}
        for left, right in names.items():
            if left not in known or right not in found:
                missing, graph = (left, "float") if left not in known else (right, "quantized")
                raise ModelError(f"the {graph} graph has no node {missing!r} to compare")
        if len(set(names.values())) < len(names):
            raise ModelError("`names` maps two nodes to the same node of the quantized graph")
        pairs = {node: found[names[node.name]] for node in nodes if node.name in names}
    if not pairs:
        raise ModelError("the float and the quantized graph have no node name in common: pass names")
    return pairs


def _compare(node: fx.Node, left: Any, right: Any, meters: dict[str, SignalToNoise]) -> None:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or not left.is_floating_point():
        return
    if left.shape != right.shape:
        raise ModelError(
            f"layer {_layer(node)!r} gives shape {tuple(right.shape)} in the quantized graph and "
            f"{tuple(left.shape)} in the float graph: compare graphs of one model"
        )
    meters[node.name].update(left, right)


def _layer(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


class _Stepper(fx.Interpreter):
    """Runs a graph up to a wanted node at a time, keeping only what is still needed."""

    def __init__(self, gm: fx.GraphModule, inputs: tuple[Tensor, ...], wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.args_iter = iter(inputs)
        self._wanted = wanted
        self._ready: dict[fx.Node, Any] = {}
        self._ahead: Iterator[fx.Node] = iter(gm.graph.nodes)

    def value(self, node: fx.Node) -> Any:
        """The node's value, once; those asked for in another order than the graph's are kept until then."""
        while node not in self._ready:
            self._step(next(self._ahead))
        return self._ready.pop(node)

    def _step(self, node: fx.Node) -> None:
        try:
            self.env[node] = self.run_node(node)
        except Exception as error:
            raise ModelError(f"layer {_layer(node)!r} failed: {str(error).splitlines()[0]}") from error
        if node in self._wanted:
            # A copy: an in-place reader further on must not change what is compared.
            result = self.env[node]
            self._ready[node] = result.clone() if isinstance(result, Tensor) else result
        for dead in self.user_to_last_uses.get(node, []):
            del self.env[dead]
