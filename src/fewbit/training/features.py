"""What layers inside a network compute, by the user's names, beside its output."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.errors import ModelError
from fewbit.model.sites import QUANTIZERS, layer_name
from fewbit.registry import nearest


class Tapped(nn.Module):
    """A network that gives its output and the features of named layers: (output, [Tensor, ...]).

    A name is a layer's or a block's dotted path in the user's model; a block's features are what it gives. In a
    quantized network they are quantized. Raises ModelError for names that the model has not.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._found: dict[str, Any] = {}
        self.names = list(names)
        graph = model if isinstance(model, GraphModule) else getattr(model, "network", None)
        self._twin = [_twin(graph, names) if isinstance(graph, GraphModule) and names else None]
        if self._twin[0] is None:
            modules = dict(model.named_modules())
            for name in names:
                if name not in modules:
                    raise _unknown(name, [n for n in modules if n])
                modules[name].register_forward_hook(self._keep(name))

    def forward(self, *inputs: Any) -> tuple[Any, list[Tensor]]:
        twin = self._twin[0]
        if twin is not None:
            output, features = twin(*inputs)
            return output, list(features)
        output = self.model(*inputs)
        features = [self._found.pop(name) for name in self.names]
        return output, features

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._found[name] = output

        return hook


def _twin(graph: GraphModule, names: Sequence[str]) -> GraphModule:
    """The same network, sharing all its layers, that also returns the features."""
    nodes = [_node(graph, name) for name in names]
    copies: dict[Node, Node] = {}
    new = type(graph.graph)()
    output = new.graph_copy(graph.graph, copies)
    new.output((output, tuple(copies[node] for node in nodes)))
    return GraphModule(graph, new)


def _node(graph: GraphModule, name: str) -> Node:
    """The last node that belongs to a layer or block, and the quantize step behind it."""
    found = None
    for node in graph.graph.nodes:
        owner = str(node.target) if node.op == "call_module" else str(node.meta.get("layer") or node.name)
        if node.op not in ("call_module", "call_function") or owner.startswith(f"{QUANTIZERS}."):
            continue
        if owner == name or owner.startswith(f"{name}.") or node.name == name:
            found = node
    if found is None:
        known = [layer_name(n) for n in graph.graph.nodes if n.op in ("call_module", "call_function")]
        raise _unknown(name, list(dict.fromkeys(known)))
    step = f"{QUANTIZERS}.{found.name}"
    return next((user for user in found.users if user.op == "call_module" and user.target == step), found)


def _unknown(name: str, known: list[str]) -> ModelError:
    return ModelError(f"features: the model has no layer {name!r}: {nearest(name, known[:50])}")
