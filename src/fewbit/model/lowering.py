"""Lowers a quantized model to its integer program: weights become codes, clamps join producers, floats stay float.

What is lowered as integer was decided when the model was quantized (``QuantizedModel.integer``); here it is only
translated, and every accumulator is proven to fit 32 bits (48 where activations have 16).
"""

import operator as python_operator
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.errors import ModelError, PlanError
from fewbit.model.codings import clamp_codes, coding_of, constant_coding, function_values, quantize_table
from fewbit.model.graph import constant_of, module_of
from fewbit.model.integer_forms import IntegerForm, integer_form, shape
from fewbit.model.integer_weights import integer_weights, shiftable
from fewbit.model.kernels import quantize
from fewbit.model.kernels_16x8 import LARGEST_SUM, wide
from fewbit.model.operators import operator
from fewbit.model.program import Coding, Op, Program, encode_args
from fewbit.model.simulate import DynamicFakeQuantize, FakeQuantize, QuantizedModel
from fewbit.model.sites import WEIGHTED, clamp_bounds, display_name, layer_name, passes_codes, rescale_factor
from fewbit.model.values import config, dtype_name, free_shape, value_type
from fewbit.numerics.scheme import Scheme

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_INT32 = 2**31 - 1
_SYMBOLIC = {getattr(python_operator, n): n for n in ("add", "sub", "mul", "floordiv", "mod", "neg")}


def lower(model: QuantizedModel) -> Program:
    """The integer program of a quantized model. Raises ``PlanError`` where an accumulator could leave its bits."""
    return _Lowering(model).program()


class _Lowering:
    """One walk over the graph. ``names`` maps a node to the value that holds it; ``values`` may be codes or float."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self.gm: GraphModule = model.graph
        self.ops: list[Op] = []
        self.codings: dict[str, Coding] = {}
        self.names: dict[Node, str] = {}
        self.floats: dict[str, str] = {}
        self.done: set[Node] = set()

    def program(self) -> Program:
        nodes = list(self.gm.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        for node in inputs:
            self.names[node] = node.name
        for node in nodes:
            if node not in self.done and node.op in ("call_module", "call_function", "get_attr"):
                self._lower(node)
        output = next(n for n in nodes if n.op == "output")
        leaves: list[Node] = []
        outputs = self._outputs(output.args[0], leaves)
        return Program(
            inputs=[n.name for n in inputs],
            input_shapes=[free_shape(n) for n in inputs],
            input_dtypes=[dtype_name(n) for n in inputs],
            outputs=outputs,
            output_shapes=[free_shape(n) for n in leaves],
            output_dtypes=[dtype_name(n) for n in leaves],
            ops=self.ops,
            codings=self.codings,
            example_shapes=[shape(n) for n in inputs],
        )

    def _outputs(self, structure: Any, leaves: list[Node]) -> Any:
        """The output structure with value names in place of nodes, which are listed in ``leaves``."""
        if isinstance(structure, Node):
            leaves.append(structure)
            return self._float(self.names[structure], structure)
        if isinstance(structure, dict):
            return {k: self._outputs(v, leaves) for k, v in structure.items()}
        if isinstance(structure, list | tuple):
            return [self._outputs(v, leaves) for v in structure]
        if structure is None:
            return None
        raise ModelError(
            f"the model returns a {type(structure).__name__}; expected tensors, in tuples or dicts"
        )

    # ---- one node ---------------------------------------------------------------------------------------------------

    def _lower(self, node: Node) -> None:
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            self._boundary(node, module)
        elif isinstance(module, DynamicFakeQuantize):
            self.names[node] = self.names[_first(node)]
        elif self._reads_dynamic(node):
            self._dynamic(node)
        elif node.name in self.model.integer:
            self._integer(node)
        elif node.op == "get_attr":
            self._emit("constant", "float", node, [], constants={"value": _attribute(self.gm, node)})
        elif self._codes_pass(node):
            self._shares(node)
        else:
            self._float_op(node, module)

    def _emit(
        self, kind: str, domain: str, node: Node, inputs: list[str], *, attrs: dict[str, Any] | None = None,
        constants: dict[str, Tensor] | None = None, note: str = "", name: str | None = None,
        coding: Coding | None = None,
    ) -> str:  # fmt: skip
        output = name or node.name
        op = Op(
            kind,
            domain,
            layer_name(node),
            display_name(node),
            inputs,
            output,
            attrs or {},
            constants or {},
            note,
        )
        self.ops.append(op)
        if coding is not None:
            self.codings[output] = coding
        if name is None:
            self.names[node] = output
        return output

    def _float(self, value: str, node: Node) -> str:
        """The name of a float version of a value: itself, or its codes dequantized (once)."""
        if value not in self.codings:
            return value
        if value not in self.floats:
            self.floats[value] = self._emit("dequantize", "boundary", node, [value], name=f"{value}_float")
        return self.floats[value]

    def _boundary(self, node: Node, module: FakeQuantize) -> None:
        source = _first(node)
        coding = coding_of(module)
        self._emit("quantize", "boundary", node, [self._float(self.names[source], source)], coding=coding)

    def _integer(self, node: Node) -> None:
        form = self._form(node)
        carrier, quantizer = self._output_of(node)
        module = self.gm.get_submodule(str(quantizer.target))
        assert isinstance(module, FakeQuantize)
        coding = coding_of(module)
        attrs = dict(form.attrs)
        if carrier is not node:
            attrs["clamp"] = clamp_codes(clamp_bounds(carrier, self.gm), coding)
        inputs = [self._codes(i, coding) for i in form.inputs]
        constants: dict[str, Tensor] = {}
        if form.kind == "linear":
            attrs["shape"] = list(free_shape(form.inputs[0]))
        if form.kind in WEIGHTED:
            constants = self._weights(node, self.codings[inputs[0]])
            attrs |= {"shifts": True} if shiftable(constants["weight"]) else {}
        elif form.kind == "table":
            attrs["function"] = self._function(node)
            values = function_values(attrs["function"], self.codings[inputs[0]])
            constants = {"table": quantize_table(values, coding)}
        name = self._emit(form.kind, "integer", node, inputs, attrs=attrs, constants=constants, coding=coding)
        for part in (carrier, quantizer):
            self.names[part] = name
            self.done.add(part)

    def _form(self, node: Node) -> IntegerForm:
        op = operator(node, self.gm)
        form = integer_form(node, op, self.gm) if op is not None else "no operator"
        if isinstance(form, str):
            raise PlanError(f"{display_name(node)}: planned as integer, but {form}")
        return form

    def _output_of(self, node: Node) -> tuple[Node, Node]:
        """The node whose output carries the codes (the node or its fused activation), and its quantize step."""
        for carrier in (node, *node.users):
            for user in carrier.users:
                step = module_of(user, self.gm)
                if isinstance(step, FakeQuantize) and (carrier is node or len(node.users) == 1):
                    return carrier, user
        raise PlanError(f"{display_name(node)}: planned as integer, but nothing quantizes its output")

    def _codes(self, node: Node, output: Coding) -> str:
        """The codes of an integer operation's input; a constant gets codes of its own."""
        if node.op == "get_attr":
            return self._constant_codes(node, output)
        name = self.names[node]
        if name not in self.codings:
            raise PlanError(f"{display_name(node)}: an integer operation reads it, but it has no codes")
        return name

    def _constant_codes(self, node: Node, output: Coding) -> str:
        name = f"{node.name}_codes"
        if name not in self.codings:
            value = _attribute(self.gm, node).to(torch.float32)
            scheme = Scheme(output.scheme.format, symmetric=output.scheme.symmetric)
            coding = constant_coding(value, scheme)
            codes = quantize(value, coding).to(coding.scheme.spec.code_dtype)
            self._emit("constant", "integer", node, [], constants={"value": codes}, name=name, coding=coding)
            self.ops[-1].domain = "boundary"
        return name

    def _weights(self, node: Node, x: Coding) -> dict[str, Tensor]:
        """Codes, scales and the bias of a layer (int64 for activations of 16 bits), and the proof that its sums fit."""
        layer = str(node.target)
        q = self.model.qtensors[f"{layer}.weight"]
        constants = integer_weights(layer, q)
        scale = constants["weight_scale"]
        bits, most, integer = (48, LARGEST_SUM, torch.int64) if wide(x) else (32, _INT32, torch.int32)
        widest = max(abs(x.scheme.qmin - x.zero_point), abs(x.scheme.qmax - x.zero_point))
        reach = constants["weight"].to(torch.int64).abs().flatten(1).sum(1) * int(widest)
        bias = getattr(self.gm.get_submodule(layer), "bias", None)
        if bias is not None:
            unit = (torch.tensor(x.scale, dtype=torch.float32) * scale).double()
            codes = torch.round(bias.detach().double() / unit)
            limit = (most - reach).double()
            if bool((codes.abs() > limit).any()):
                worst = int((codes.abs() - limit).argmax())
                raise PlanError(
                    f"{layer}: bias of channel {worst} is {bias[worst].item():.4g}, over {bits} bits at weight scale "
                    f"{scale[worst].item():.3g}: its weights are nearly zero; prune the channel or keep the layer float"
                )
            constants["bias"] = codes.to(integer)
        if int(reach.max()) > most:
            raise PlanError(
                f"{layer}: the sum of products can reach {int(reach.max())}, over {bits} bits: use fewer bits"
            )
        return constants

    def _function(self, node: Node) -> dict[str, Any]:
        args = [encode_args(a, {_first(node): 0}) for a in node.args]
        return {"target": str(node.target), "args": args, "kwargs": dict(node.kwargs)}

    # ---- what is not integer ----------------------------------------------------------------------------------------

    def _codes_pass(self, node: Node) -> bool:
        return passes_codes(node, self.gm) and self.names.get(_first(node)) in self.codings

    def _shares(self, node: Node) -> None:
        source = self.names[_first(node)]
        coding = self.codings[source]
        op = operator(node, self.gm)
        factor = rescale_factor(node, self.gm)
        bounds = clamp_bounds(node, self.gm)
        if factor is not None:
            scaled = Coding(
                coding.scheme, float(np.float32(coding.scale) * np.float32(factor)), coding.zero_point
            )
            self._emit("rescale", "shares", node, [source], coding=scaled)
        elif bounds is not None:
            self._emit(
                "clip", "integer", node, [source], attrs={"clamp": clamp_codes(bounds, coding)}, coding=coding
            )
        elif op is not None and op.name == "dropout":
            self.names[node] = source
        elif op is not None and op.name == "pad":
            pad = [int(p) for p in cast(Sequence[int], node.args[1])]
            pad += [0] * (2 * len(shape(node)) - len(pad))
            self._emit("pad", "integer", node, [source], attrs={"pad": pad}, coding=coding)
        elif node.target is python_operator.getitem:
            self._emit("getitem", "shares", node, [source], attrs={"index": node.args[1]}, coding=coding)
        else:
            self._aten(node, "shares", [source])
            self.codings[node.name] = coding

    def _reads_dynamic(self, node: Node) -> bool:
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            return False
        return source.op == "call_module" and isinstance(
            self.gm.get_submodule(str(source.target)), DynamicFakeQuantize
        )

    def _dynamic(self, node: Node) -> None:
        form = self._form(node)
        constants = integer_weights(str(node.target), self.model.qtensors[f"{node.target}.weight"])
        bias = getattr(self.gm.get_submodule(str(node.target)), "bias", None)
        if bias is not None:
            constants["bias"] = bias.detach().clone()
        source = self._float(self.names[_first(node)], _first(node))
        self._emit(
            f"dynamic_{form.kind}",
            "float",
            node,
            [source],
            attrs=dict(form.attrs) | {"shape": list(free_shape(_first(node)))},
            constants=constants,
        )

    def _float_op(self, node: Node, module: nn.Module | None) -> None:
        if node.target is python_operator.getitem:
            self._emit("getitem", "float", node, [self.names[_first(node)]], attrs={"index": node.args[1]})
        elif node.target in _SYMBOLIC:
            inputs, args = self._arguments(node)
            self._emit(
                "integers", "float", node, inputs, attrs={"target": _SYMBOLIC[node.target], "args": args}
            )
        elif isinstance(module, DROPOUTS):
            self.names[node] = self.names[_first(node)]
        elif module is not None:
            self._module(node, module)
        else:
            self._aten(node, "float", None)

    def _arguments(self, node: Node, shares: list[str] | None = None) -> tuple[list[str], list[Any]]:
        sources = list(node.all_input_nodes)
        names = [
            self._float(self.names[s], s) if i or not shares else shares[0] for i, s in enumerate(sources)
        ]
        return names, [encode_args(a, {s: i for i, s in enumerate(sources)}) for a in node.args]

    def _aten(self, node: Node, domain: str, shares: list[str] | None) -> None:
        target = str(node.target)
        if not target.startswith("aten."):
            raise ModelError(
                f"{layer_name(node)}: operator {target} is no torch (aten) operator and cannot be exported"
            )
        inputs, args = self._arguments(node, shares)
        table = {s: i for i, s in enumerate(node.all_input_nodes)}
        kwargs = {k: encode_args(v, table) for k, v in node.kwargs.items()}
        op = operator(node, self.gm)
        attrs = {"target": target, "args": args, "kwargs": kwargs, "types": [value_type(s) for s in table],
                 "type": value_type(node)}  # fmt: skip
        self._emit(op.name if op else target, domain, node, inputs, attrs=attrs)

    def _module(self, node: Node, module: nn.Module) -> None:
        inputs, args = self._arguments(node)
        constants: dict[str, Tensor] = {}
        schemes, shapes = {}, {}
        for name, tensor in module.state_dict().items():
            key = f"{node.target}.{name}"
            if key in self.model.qtensors:
                q = self.model.qtensors[key]
                constants |= {name: q.codes, f"{name}::scale": q.scale, f"{name}::zero_point": q.zero_point}
                if q.codebook is not None:
                    constants[f"{name}::codebook"] = q.codebook
                schemes[name], shapes[name] = q.scheme.to_json(), list(q.shape)
            else:
                constants[name] = tensor.detach().clone()
        attrs = {
            "type": type(module).__name__,
            "config": config(module),
            "args": args,
            "schemes": schemes,
            "shapes": shapes,
            "shape": list(free_shape(_first(node))),
        }
        self._emit("module", "float", node, inputs, attrs=attrs, constants=constants)


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _attribute(gm: GraphModule, node: Node) -> Tensor:
    value = constant_of(node, gm)
    assert value is not None
    return value.detach()
