"""The quantized model in PyTorch: the float graph with quantize-dequantize steps where the plan has codes."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.model.integer_weights import integer_scale
from fewbit.model.sites import QUANTIZERS
from fewbit.model.sums import CodeStep, Weights, attach_sums
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.plan.plan import Plan


class FakeQuantize(CodeStep):
    """Rounds a tensor to the values that codes can stand for: float32 in, float32 out, any shape."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(scheme)
        self.register_buffer("scale", scale.detach().clone().to(torch.float32).reshape(1))
        self.register_buffer("zero_point", zero_point.detach().clone().to(torch.int32).reshape(1))

    def coding(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(x)

    def extra_repr(self) -> str:
        return (
            f"{self.scheme.format}, scale={self.scale.item():.6g}, zero_point={int(self.zero_point.item())}"
        )


class DynamicFakeQuantize(nn.Module):
    """The same with the range of each tensor that comes: uint8, affine, per tensor (ONNX DynamicQuantizeLinear)."""

    def forward(self, x: Tensor) -> Tensor:
        lo, hi = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (hi - lo) / 255
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = torch.round(-lo / scale).clamp(0, 255)
        return (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale


class QTensors(nn.Module):
    """The weights' codes by ``<layer>.<parameter>``, as buffers, so that they are saved and moved with the model."""

    def __init__(self, tensors: dict[str, QTensor]) -> None:
        super().__init__()
        self._meta = {name: (q.scheme, q.shape) for name, q in tensors.items()}
        for name, q in tensors.items():
            for part in ("codes", "scale", "zero_point", "codebook"):
                self.register_buffer(f"{_key(name)}:{part}", getattr(q, part))

    def __getitem__(self, name: str) -> QTensor:
        scheme, shape = self._meta[name]
        codes, scale, zero_point, codebook = (
            self._buffers[f"{_key(name)}:{part}"] for part in ("codes", "scale", "zero_point", "codebook")
        )
        assert codes is not None and scale is not None and zero_point is not None
        return QTensor(codes, scale, zero_point, scheme, shape, codebook)

    def __contains__(self, name: object) -> bool:
        return name in self._meta

    def names(self) -> list[str]:
        return list(self._meta)


@dataclass
class CodedWeights:
    """One of them, with the scales that an integer kernel takes."""

    tensors: QTensors
    name: str

    def weight_scale(self) -> Tensor:
        return integer_scale(self.tensors[self.name])


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name must not hold a dot


class QuantizedModel(nn.Module):
    """A model that answers as the deployed one will: call it like the float one.

    ``graph`` is the float graph with ``FakeQuantize`` steps; its weights hold exactly what the codes in ``qtensors``
    stand for. ``plan`` says what every tensor got and why; ``integer`` names the graph's nodes that compute on codes;
    ``example`` is the input it was read with; ``facts`` what calibration found (ranges, warnings).
    """

    def __init__(
        self,
        graph: GraphModule,
        plan: Plan,
        qtensors: dict[str, QTensor],
        integer: frozenset[str],
        example: tuple[Tensor, ...],
        target: str = "onnx",
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = graph  # not "graph": torch.export's own modules have an attribute of that name
        self.plan = plan
        self.qtensors = QTensors(qtensors)
        self.integer = integer
        self.example = example
        self.target = target
        self.facts = facts or {}
        self._attach_sums()

    def _attach_sums(self) -> None:
        found: dict[torch.fx.Node, Weights] = {}
        for node in self.network.graph.nodes:
            name = f"{node.target}.weight"
            if node.name in self.integer and name in self.qtensors:
                found[node] = CodedWeights(self.qtensors, name)
        attach_sums(self.network, found)

    @property
    def graph(self) -> GraphModule:
        """The float graph with its quantize steps."""
        return self.network

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*inputs)

    def quantizer(self, node: str) -> FakeQuantize | None:
        """The quantize-dequantize step after a node, if it has one."""
        module = getattr(getattr(self.graph, QUANTIZERS, None), node, None)
        return module if isinstance(module, FakeQuantize) else None


def without_quantizers(model: QuantizedModel) -> QuantizedModel:
    """The same network with the same (dequantized) weights, all in float: what its speed is compared with."""
    gm = copy.deepcopy(model.graph)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(f"{QUANTIZERS}."):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.recompile()
    return QuantizedModel(gm, Plan(()), {}, frozenset(), model.example, model.target)


def insert_quantizer(gm: GraphModule, node: torch.fx.Node, quantizer: nn.Module) -> torch.fx.Node:
    """Put a step after ``node``: all its readers see the quantized value. Returns the new node."""
    target = f"{QUANTIZERS}.{node.name}"
    gm.add_submodule(target, quantizer)
    with gm.graph.inserting_after(node):
        new = gm.graph.call_module(target, (node,))
    new.name = f"{node.name}_quantized"
    new.meta = copy.copy(node.meta)
    for user in list(node.users):
        if user is not new:
            user.replace_input_with(node, new)
    return new


def insert_dynamic(gm: GraphModule, node: torch.fx.Node) -> torch.fx.Node:
    """Put a dynamic step before a convolution or linear layer, seen by that layer alone."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    target = f"{QUANTIZERS}.{node.name}_input"
    gm.add_submodule(target, DynamicFakeQuantize())
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(target, (source,))
    new.meta = copy.copy(source.meta)
    node.replace_input_with(source, new)
    return new
