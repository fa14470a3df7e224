"""Finds which nodes compute on integers and where codes are born: the sites that a plan decides about.

A *heavy* node (convolution, linear layer, matrix product) is worth quantizing its inputs for. A *light* node
(addition, pooling, concatenation, an elementwise function) follows where all its inputs are codes anyway. Nodes that
only move or select numbers share their input's codes. Everything else runs in float between the two.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import getitem

from torch.fx import GraphModule, Node

from fewbit.model.integer_forms import IntegerForm, integer_form, shape
from fewbit.model.operators import operator
from fewbit.plan.plan import Site

WEIGHTED = ("conv", "linear")
QUANTIZERS = "activation_quantizers"  # the submodule of a quantized graph that holds its quantize steps
Mode = Callable[[str, str], str]  # (layer, op) -> "static" | "dynamic" | "weight-only" | "float"
Decoded = Callable[
    [str, str], str | None
]  # (layer, op) -> the weights' format, if only float kernels multiply it


@dataclass
class Placement:
    """What the graph computes how. All keys are nodes of the graph that was given.

    ``forms``: nodes with an integer form that is used. ``carrier``: the node whose output is quantized for a node in
    ``forms``: itself, or the activation fused into it. ``clamps``: those fused activations' ranges.
    ``born``: nodes at whose output codes are born, with the name of the site. ``floats``: why other nodes are float.
    """

    forms: dict[Node, IntegerForm] = field(default_factory=dict)
    carrier: dict[Node, Node] = field(default_factory=dict)
    clamps: dict[Node, tuple[float, float]] = field(default_factory=dict)
    born: dict[Node, str] = field(default_factory=dict)
    coded: set[Node] = field(default_factory=set)
    dynamic: dict[Node, IntegerForm] = field(default_factory=dict)
    floats: dict[Node, str] = field(default_factory=dict)


def display_name(node: Node) -> str:
    """The user's name of a node: the module's dotted path (``@2`` for its second call), or the graph's own name."""
    if node.op == "placeholder":
        return f"input:{node.name}"
    if node.op != "call_module":
        return node.name
    if str(node.target).startswith(f"{QUANTIZERS}."):
        return display_name(node.all_input_nodes[0])
    same = [n for n in node.graph.nodes if n.op == "call_module" and n.target == node.target]
    index = same.index(node)
    return str(node.target) if index == 0 else f"{node.target}@{index + 1}"


def layer_name(node: Node) -> str:
    """The layer that rules match on: a module's path; for a function its caller's path and its own name."""
    if node.op == "call_module" and str(node.target).startswith(f"{QUANTIZERS}."):
        return layer_name(node.all_input_nodes[0])
    if node.op == "call_module":
        return str(node.target)
    owner = str(node.meta.get("layer") or "")
    return (
        f"{owner}.{node.name}" if owner and not node.name.startswith(owner.replace(".", "_")) else node.name
    )


def place(gm: GraphModule, mode: Mode, decoded: Decoded = lambda layer, op: None) -> Placement:
    """Decide which nodes compute on integers, given what the recipe wants of each layer."""
    p = Placement()
    forms = _candidates(gm, mode, decoded, p)
    _fuse_clamps(gm, forms, p)
    for node, form in forms.items():
        if form.heavy:
            p.forms[node] = form
            for source in form.inputs:
                _birth(_root(source, gm), p)
            _birth(p.carrier[node], p)
    changed = True
    while changed:
        changed = _spread(gm, forms, p)
    for node in gm.graph.nodes:
        if node in forms and node not in p.forms:
            p.floats.setdefault(node, "its inputs are not codes")
    return p


def _candidates(gm: GraphModule, mode: Mode, decoded: Decoded, p: Placement) -> dict[Node, IntegerForm]:
    forms: dict[Node, IntegerForm] = {}
    for node in gm.graph.nodes:
        op = operator(node, gm)
        if op is None or op.role == "activation" or passes_codes(node, gm):
            continue
        answer = integer_form(node, op, gm)
        wanted = mode(layer_name(node), op.name)
        if isinstance(answer, str):
            p.floats[node] = answer
        elif (
            wanted in ("static", "dynamic")
            and answer.kind in WEIGHTED
            and (table := decoded(layer_name(node), op.name))
        ):
            p.floats[node] = f"its {table} weights are decoded to float: no integer kernel multiplies them"
        elif wanted == "dynamic" and answer.kind in WEIGHTED:
            p.dynamic[node] = answer
        elif wanted != "static":
            p.floats[node] = f"the recipe says {wanted}"
        else:
            forms[node] = answer
    return forms


def _fuse_clamps(gm: GraphModule, forms: dict[Node, IntegerForm], p: Placement) -> None:
    """A clamp (ReLU, ReLU6, ...) that is the only reader of an integer node becomes part of it."""
    for node, form in forms.items():
        p.carrier[node] = node
        users = list(node.users)
        if form.fixed is not None or form.kind in ("table", "softmax") or len(users) != 1:
            continue
        bounds = clamp_bounds(users[0], gm)
        if bounds is not None:
            p.carrier[node] = users[0]
            p.clamps[node] = bounds


def clamp_bounds(node: Node, gm: GraphModule) -> tuple[float, float] | None:
    """The range that an activation node clamps to, or None where it is no clamp around zero."""
    op = operator(node, gm)
    if op is None or op.role != "activation":
        return None
    if op.name == "relu":
        return 0.0, float("inf")
    if op.name == "relu6":
        return 0.0, 6.0
    lo = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", node.kwargs.get("min", -1.0))
    hi = node.args[2] if len(node.args) > 2 else node.kwargs.get("max_val", node.kwargs.get("max", 1.0))
    lo, hi = (-float("inf") if lo is None else lo), (float("inf") if hi is None else hi)
    if not (isinstance(lo, int | float) and isinstance(hi, int | float) and lo <= 0 <= hi):
        return None
    return float(lo), float(hi)


def rescale_factor(node: Node, gm: GraphModule) -> float | None:
    """The positive number that a node multiplies its input by: its codes stay, only their scale changes."""
    op = operator(node, gm)
    if op is None or op.name not in ("mul", "div") or len(node.args) != 2:
        return None
    factor = node.args[1]
    if (
        not isinstance(node.args[0], Node)
        or isinstance(factor, Node | bool)
        or not isinstance(factor, int | float)
    ):
        return None
    factor = float(factor) if op.name == "mul" else (1.0 / float(factor) if factor else 0.0)
    return factor if 1e-30 < factor < 1e30 else None


def passes_codes(node: Node, gm: GraphModule) -> bool:
    """Whether the node's output can be its first input's codes, rearranged, clamped or with another scale."""
    op = operator(node, gm)
    if op is None or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is getitem:
        return passes_codes(node.args[0], gm)
    if op.name == "pad":
        return pads_with_zero(node)
    return op.role == "shares" or rescale_factor(node, gm) is not None or clamp_bounds(node, gm) is not None


def pads_with_zero(node: Node) -> bool:
    """Whether a padding node fills with zeros, which every coding can represent."""
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return mode == "constant" and not value


def _root(node: Node, gm: GraphModule) -> Node:
    """Where the codes of ``node`` would have to be born: before everything that only passes codes on."""
    while passes_codes(node, gm) and clamp_bounds(node, gm) is None:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _birth(node: Node, p: Placement) -> None:
    if node not in p.born and node not in p.coded and node.op != "get_attr":
        p.born[node] = "input" if node.op == "placeholder" else "output"
    p.coded.add(node)


def _spread(gm: GraphModule, forms: dict[Node, IntegerForm], p: Placement) -> bool:
    """One sweep: codes pass through sharing nodes, and light nodes join where all inputs are codes."""
    changed = False
    for node in gm.graph.nodes:
        if node not in p.coded and passes_codes(node, gm) and node.args[0] in p.coded:
            p.coded.add(node)
            changed = True
        form = forms.get(node)
        if form is not None and node not in p.forms and _all_codes(form, p):
            p.forms[node] = form
            _birth(p.carrier[node], p)
            changed = True
    return changed


def _all_codes(form: IntegerForm, p: Placement) -> bool:
    return all(i in p.coded or i.op == "get_attr" for i in form.inputs)


def find_sites(gm: GraphModule, p: Placement) -> list[Site]:
    """Every tensor of the model that a plan has a row for: weights first of each layer, then what it computes."""
    outputs = _outputs(gm)
    sites: list[Site] = []
    seen: dict[int, str] = {}
    for node in gm.graph.nodes:
        sites += _weight_sites(node, gm, seen)
        if node in p.born:
            sites.append(_born_site(node, gm, p, outputs))
        elif node in p.floats and node.op in ("call_module", "call_function"):
            op = operator(node, gm)
            sites.append(
                Site(f"{display_name(node)}.output", layer_name(node), op.name if op else node.name, "activation",
                     shape(node), integer_capable=False, reason=p.floats[node])
            )  # fmt: skip
    return sites


def _born_site(node: Node, gm: GraphModule, p: Placement, outputs: set[Node]) -> Site:
    owner = next((n for n, carrier in p.carrier.items() if carrier is node and n in p.forms), node)
    op = operator(owner, gm)
    form = p.forms.get(owner)
    constraint = f"fixed by {form.kind}" if form is not None and form.fixed is not None else "free"
    kind = "output" if node in outputs and not any(u.op != "output" for u in node.users) else "activation"
    name = op.name if op is not None else "input"
    site = display_name(owner) if node.op == "placeholder" else f"{display_name(owner)}.output"
    return Site(site, layer_name(owner), name, kind, shape(node), constraint)  # type: ignore[arg-type]


def _weight_sites(node: Node, gm: GraphModule, seen: dict[int, str]) -> list[Site]:
    op = operator(node, gm)
    if node.op != "call_module" or op is None or op.weight_axis is None:
        return []
    module = gm.get_submodule(str(node.target))
    found = []
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        site = f"{node.target}.{name}"
        if seen.get(id(parameter)) == site:
            continue
        constraint = f"shared with {seen[id(parameter)]}" if id(parameter) in seen else "free"
        seen.setdefault(id(parameter), site)
        found.append(
            Site(
                site,
                str(node.target),
                op.name,
                "weight",
                tuple(parameter.shape),
                constraint,
                axis=op.weight_axis,
            )
        )
    return found


def _outputs(gm: GraphModule) -> set[Node]:
    return set(next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes)
