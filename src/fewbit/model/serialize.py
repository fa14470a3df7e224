"""A graph in standard form, or a quantized model, as JSON and tensors: names and numbers only, so reading runs no code.

Reading trusts nothing: names become Python source when torch compiles a graph, so they must be plain identifiers;
operators and layers come from closed lists; layers are built without memory and then given the file's own tensors.
"""

import inspect
import keyword
import operator as python_operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fewbit.errors import ArtifactError, ModelError
from fewbit.model import reference
from fewbit.model.arguments import DTYPES, decode, encode
from fewbit.model.packed import LARGEST_NUMBER, dense_bytes, pack_weight, read_quantizer, unpack_weight
from fewbit.model.program import aten
from fewbit.model.simulate import DynamicFakeQuantize, FakeQuantize, QuantizedModel
from fewbit.model.symbols import Sizes, decode_value, encode_value
from fewbit.model.values import config
from fewbit.model.zeros import SPARSE
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.plan.plan import Plan

LAYERS = frozenset(
    [*reference.MODULES, *["Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]]
)
_NAMES = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_PYTHON = {f"operator.{name}": getattr(python_operator, name) for name in (*_NAMES, *_COMPARISONS)}
_PYTHON_NAME = {function: name for name, function in _PYTHON.items()}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,999}")
_PATH = re.compile(
    r"[\w\-]+( *[\w\-:+/@]+)*(\.[\w\-]+( *[\w\-:+/@]+)*)*"
)  # no quotes, no backslashes, no line ends
_MOST_LAYERS = 4096  # of a recurrent network, which is built one by one


class GraphWriter:
    """Collects ``tensors`` (by a name of the file) while it turns a graph into JSON. Tied tensors are kept once.

    ``dense``: of those that are entropy-coded, the bytes that they would take without.
    """

    def __init__(self, qtensors: Mapping[str, QTensor], pack: Callable[..., Any] = pack_weight) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.dense: dict[str, int] = {}
        self._qtensors, self._pack = qtensors, pack
        self._parts: dict[int, dict[str, str]] = {}
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # ids are only unique among what lives

    def graph(self, gm: GraphModule) -> dict[str, Any]:
        """The graph's nodes and layers. Raises ``ModelError`` for what has no place in a file."""
        nodes = list(gm.graph.nodes)
        index = {node: i for i, node in enumerate(nodes)}
        layers = {
            str(n.target): self._layer(str(n.target), gm.get_submodule(str(n.target)))
            for n in nodes
            if n.op == "call_module"
        }
        constants = {
            str(n.target): self._tensor(str(n.target), _attribute(gm, str(n.target)))
            for n in nodes
            if n.op == "get_attr"
        }
        notes = [str(note) for note in gm.meta.get("notes", [])]
        dynamic = {str(k): list(v) for k, v in gm.meta.get("dynamic", {}).items()}
        return {
            "nodes": [self._node(n, index) for n in nodes],
            "layers": layers,
            "constants": constants,
            "training": gm.training,
            "notes": notes,
            "dynamic": dynamic,
            "sparse": list(gm.meta.get(SPARSE, ())),
        }

    def _node(self, node: Node, index: Mapping[Node, int]) -> dict[str, Any]:
        try:
            target = _target_name(node)
            args = [encode(a, index) for a in node.args]
            kwargs = {str(k): encode(v, index) for k, v in node.kwargs.items()}
            return {
                "op": node.op,
                "name": node.name,
                "target": target,
                "args": args,
                "kwargs": kwargs,
            } | _meta(node)
        except TypeError as error:
            raise ModelError(
                f"{node.name}: cannot be saved: {error}; only layers and torch operators can be, so replace it "
                "by these in the model"
            ) from error

    def _layer(self, name: str, module: nn.Module) -> dict[str, Any]:
        if not _PATH.fullmatch(name):
            raise ModelError(
                f"layer {name!r} cannot be saved: use letters, digits, spaces and _-:+/@ in layer names"
            )
        if isinstance(module, DynamicFakeQuantize):
            return {"type": "DynamicFakeQuantize"}
        state = {
            key: self._weight(f"{name}.{key}", value)
            for key, value in module.state_dict(keep_vars=True).items()
        }
        if isinstance(module, FakeQuantize):
            return {"type": "FakeQuantize", "scheme": module.scheme.to_json(), "state": state}
        kind = type(module).__name__
        if kind not in LAYERS or type(module) is not getattr(nn, kind):
            raise ModelError(f"layer {name!r} cannot be saved: {kind} is no standard layer")
        return {"type": kind, "config": config(module), "state": state}

    def _weight(self, name: str, value: Tensor) -> dict[str, Any]:
        if name not in self._qtensors:
            return self._tensor(name, value)
        q = self._qtensors[name]
        if not torch.equal(q.dequantize(), value.detach()):
            raise ModelError(
                f"{name}: its values are no longer what its codes stand for; quantize the model again"
            )
        if id(q.codes) not in self._parts:
            self._kept.append(q.codes)
            parts = self._pack(q)
            self._parts[id(q.codes)] = {part: f"{name}:{part}" for part in parts}
            self.tensors |= {f"{name}:{part}": _stored(tensor) for part, tensor in parts.items()}
            if "entropy_codes" in parts:
                self.dense[f"{name}:entropy_codes"] = dense_bytes(q)
        return {"scheme": q.scheme.to_json(), "shape": list(q.shape), "parts": self._parts[id(q.codes)]}

    def _tensor(self, name: str, value: Tensor) -> dict[str, Any]:
        if id(value) not in self._names:
            self._names[id(value)] = name
            self._kept.append(value)
            self.tensors[name] = _stored(value)
        return {"tensor": self._names[id(value)], "parameter": isinstance(value, nn.Parameter)}


class GraphReader:
    """Rebuilds graphs from JSON and tensors. Raises ``ArtifactError`` where an entry is refused, by its name."""

    def __init__(self, tensors: Mapping[str, Tensor], unpack: Callable[..., QTensor] = unpack_weight) -> None:
        self._tensors, self._unpack = tensors, unpack
        self._shared: dict[str, Tensor] = {}
        self._coded: dict[str, QTensor] = {}
        self.qtensors: dict[str, QTensor] = {}

    def graph(self, data: Mapping[str, Any]) -> GraphModule:
        """The graph with its layers, weights and what the nodes knew about sizes."""
        root: dict[str, Any] = {name: self._layer(name, d) for name, d in data["layers"].items()}
        root |= {name: self._tensor(d) for name, d in data["constants"].items()}
        sizes = Sizes()
        graph = Graph()
        nodes: list[Node] = []
        names: set[str] = set()
        for entry in data["nodes"]:
            nodes.append(self._node(entry, graph, nodes, names, root, sizes))
        if sum(n.op == "output" for n in nodes) != 1 or nodes[-1].op != "output":
            raise ArtifactError("the graph has no output at its end")
        gm = GraphModule(root, graph)
        gm.train(bool(data["training"]))
        gm.meta["notes"] = [str(note) for note in data["notes"]]
        gm.meta["dynamic"] = {str(k): tuple(v) for k, v in data["dynamic"].items()}
        gm.meta[SPARSE] = tuple(str(name) for name in data.get("sparse", ()))  # older files have none
        return gm

    def _node(
        self, entry: Mapping[str, Any], graph: Graph, nodes: list[Node], names: set[str], root: Mapping[str, Any],
        sizes: Sizes,
    ) -> Node:  # fmt: skip
        op, name, target = entry["op"], _identifier(entry["name"]), entry["target"]
        if name in names:
            raise ArtifactError(f"two nodes have the name {name!r}")
        names.add(name)
        if op == "call_function":
            target = _PYTHON[target] if target in _PYTHON else aten(str(target))
        elif op in ("placeholder", "output"):
            target = _identifier(target)
        elif op == "call_module" and isinstance(root.get(target), nn.Module):
            pass
        elif op != "get_attr" or not isinstance(root.get(target), Tensor):
            raise ArtifactError(f"node {name!r}: no {op!r:.40} of {target!r:.80} is in this file")
        args = tuple(decode(a, nodes) for a in entry["args"])
        kwargs = {_identifier(k): decode(v, nodes) for k, v in entry["kwargs"].items()}
        if (op == "output" and len(args) != 1) or (op == "placeholder" and args):
            raise ArtifactError(f"node {name!r}: {len(args)} arguments are not what an {op} has")
        node = graph.create_node(op, target, args, kwargs, name=name)
        node.name = name
        node.meta["layer"] = str(entry.get("layer", ""))
        if "shape" in entry:
            node.meta["shape"] = tuple(sizes.number(s) for s in entry["shape"])
        if "dtype" in entry:
            node.meta["dtype"] = DTYPES[entry["dtype"]]
        if "val" in entry:
            node.meta["val"] = decode_value(entry["val"], sizes, DTYPES)
        return node

    def _layer(self, name: str, data: Mapping[str, Any]) -> nn.Module:
        if not _PATH.fullmatch(name) or len(name) > 1000:
            raise ArtifactError(f"{name!r:.80} is no name of a layer")
        kind = data["type"]
        if kind == "DynamicFakeQuantize":
            return DynamicFakeQuantize()
        state = {str(key): self._weight(f"{name}.{key}", d) for key, d in data["state"].items()}
        if kind == "FakeQuantize":
            return read_quantizer(name, data, state)
        if kind not in LAYERS:
            raise ArtifactError(f"layer {name!r}: {kind!r:.40} is no standard layer")
        with torch.device("meta"):  # sizes in a file are claims: no memory before the tensors prove them
            module: nn.Module = getattr(nn, kind)(**_arguments(name, kind, data["config"]))
        wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        if wanted != {key: tuple(value.shape) for key, value in state.items()}:
            raise ArtifactError(f"layer {name!r}: its tensors do not have the shapes of its {kind}")
        for key, value in state.items():
            if key in module._parameters:
                assert isinstance(value, nn.Parameter)
                module._parameters[key] = value
            else:
                module._buffers[key] = value
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, w) for w in module._flat_weights_names]
        return module

    def _weight(self, site: str, data: Mapping[str, Any]) -> Tensor:
        if "scheme" not in data:
            return self._tensor(data)
        keys = data["parts"] if "parts" in data else _first_version(data)
        key = str(sorted(keys.items()))
        scheme, shape = Scheme.from_json(data["scheme"]), tuple(data["shape"])
        q = self._coded.get(key)
        if q is None or (q.scheme, q.shape) != (scheme, shape):
            parts = {str(part): self._tensors[name] for part, name in keys.items()}
            q = self._coded[key] = self._unpack(site, parts, scheme, shape)
            self._shared[key] = nn.Parameter(q.dequantize(), requires_grad=False)
        self.qtensors[site] = q
        return self._shared[key]

    def _tensor(self, data: Mapping[str, Any]) -> Tensor:
        key = data["tensor"]
        if key not in self._shared:
            value = self._tensors[key]
            self._shared[key] = nn.Parameter(value) if data["parameter"] is True else value
        return self._shared[key]


# ---- parts -----------------------------------------------------------------------------------------------------------


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target in _PYTHON_NAME:
        return _PYTHON_NAME[node.target]
    name = str(node.target)
    if not isinstance(node.target, torch._ops.OpOverload) or aten_or_none(name) is not node.target:
        raise TypeError(f"{name} is no functional torch (aten) operator")
    return name


def aten_or_none(name: str) -> Any:
    """The operator of that name, None where ``program.aten`` refuses it."""
    try:
        return aten(name)
    except ArtifactError:
        return None


def _meta(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": str(node.meta.get("layer") or "")}
    if "shape" in node.meta:
        found["shape"] = [int(s) for s in node.meta["shape"]]
    if "dtype" in node.meta:
        found["dtype"] = str(node.meta["dtype"]).removeprefix("torch.")
    if "val" in node.meta:
        found["val"] = encode_value(node.meta["val"])
    return found


def _attribute(gm: GraphModule, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    value: Tensor = getattr(gm.get_submodule(owner), name)
    return value


def _stored(tensor: Tensor) -> Tensor:
    """A copy of its own: what a file of tensors can hold."""
    return tensor.detach().cpu().contiguous().clone()


def _first_version(data: Mapping[str, Any]) -> dict[str, str]:
    """Where files of version 1 have the parts of a quantized weight."""
    return {"codes": data["tensor"], "scale": data["scale"], "zero_point": data["zero_point"]}


def _identifier(name: object) -> str:
    if (
        not isinstance(name, str)
        or not _IDENTIFIER.fullmatch(name)
        or keyword.iskeyword(name)
        or name == "self"
    ):
        raise ArtifactError(f"{name!r:.80} is no name of a node")
    return name


def _arguments(name: str, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's constructor arguments, checked before anything is built from them."""
    allowed = set(inspect.signature(getattr(nn, kind).__init__).parameters) - {"self", "device", "dtype"}
    if kind in ("LSTM", "GRU", "RNN"):
        allowed = {"input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
                   "proj_size", "nonlinearity"}  # fmt: skip
    for key, value in given.items():
        numbers = value if isinstance(value, list) else [value]
        limit = _MOST_LAYERS if key == "num_layers" else LARGEST_NUMBER
        sound = len(numbers) <= 16 and all(
            isinstance(v, str | bool | None) or (isinstance(v, int | float) and abs(v) <= limit)
            for v in numbers
        )
        if key not in allowed or not sound:
            raise ArtifactError(
                f"layer {name!r}: {kind} with {key!r:.40} = {value!r:.40} is no standard layer"
            )
    return dict(given)


# ---- quantized models ------------------------------------------------------------------------------------------------


def describe(
    model: QuantizedModel | GraphModule, pack: Callable[..., Any] = pack_weight
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, int]]:
    """A model as JSON and tensors, and the bytes that those which are entropy-coded would take without.

    ``pack`` makes tensors of a quantized weight. Raises ``ModelError`` that names what cannot be saved.
    """
    if not isinstance(model, QuantizedModel):
        writer = GraphWriter({})
        return {"graph": writer.graph(model)}, writer.tensors, {}
    coded = {name: model.qtensors[name] for name in model.qtensors.names()}
    writer = GraphWriter(coded, pack)
    data = {
        "graph": writer.graph(model.graph),
        "plan": model.plan.to_json(),
        "integer": sorted(model.integer),
        "target": model.target,
        "training": model.training,
        "example": len(model.example),
    }
    for i, x in enumerate(_few(model)):
        writer.tensors[f"example:{i}"] = _stored(x)
    return data, writer.tensors, writer.dense


def rebuild(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], unpack: Callable[..., QTensor] = unpack_weight
) -> QuantizedModel | GraphModule:
    """The inverse of ``describe``, ``unpack`` of its ``pack``. Raises ``ArtifactError``, or what Python raises."""
    reader = GraphReader(tensors, unpack)
    gm = reader.graph(data["graph"])
    if "plan" not in data:
        return gm
    names = {node.name for node in gm.graph.nodes}
    integer = frozenset(data["integer"])
    if not integer <= names:
        raise ArtifactError(f"integer nodes {sorted(map(str, integer - names))[:3]} are not in the graph")
    if type(data["example"]) is not int or data["example"] > len(names):
        raise ArtifactError("the number of example inputs is not that of the graph")
    example = tuple(tensors[f"example:{i}"] for i in range(data["example"]))
    plan = Plan.from_json(data["plan"])
    model = QuantizedModel(gm, plan, reader.qtensors, integer, example, str(data["target"]))
    mode = bool(data["graph"]["training"])
    model.training = bool(data["training"])
    model.graph.train(mode)
    return model


_SAMPLES = 16


def _few(model: QuantizedModel) -> list[Tensor]:
    """The example inputs, cut to a few samples where their first size, and no other, is the free batch size."""
    values = [n.meta.get("val") for n in model.graph.graph.nodes if n.op == "placeholder"]
    shapes = [[str(s) for s in v.shape] if isinstance(v, Tensor) else [] for v in values]
    first = {s[0] if s and not s[0].isdigit() else None for s in shapes}
    cut = len(first) == 1 and None not in first and all(s[0] not in s[1:] for s in shapes)
    return [x[:_SAMPLES] if cut else x for x in model.example]


__all__ = ["GraphReader", "GraphWriter", "describe", "rebuild"]
