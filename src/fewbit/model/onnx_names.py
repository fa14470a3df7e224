"""Names of layers, as a user knows them, from the names of ONNX nodes and weights."""

from __future__ import annotations

import keyword
import re

_WEIGHT = re.compile(r"^(.+)(?:[./](?:weight|kernel|W)|_weight)(?::0)?$")
_BIAS = re.compile(r"^(.+)(?:[./]bias|_bias)(?::0)?$")
_MADE_UP = re.compile(r"^(onnx::|const_fold|_v_|val_|\d+$)|/ReadVariableOp")


def layer_name(node: str, op: str, weight: str = "", bias: str = "") -> str:
    """A dotted name for a layer: what its weight is called before ".weight", else its node's scope."""
    for name, pattern in ((weight, _WEIGHT), (bias, _BIAS)):
        found = pattern.match(name)
        if found and not _MADE_UP.search(name):
            return dotted(found.group(1))
    return scope(node, op, drop=bool(weight)) or dotted(weight) or op.lower()


def scope(node: str, op: str, drop: bool = False) -> str:
    """The scope of a node: "/layer1/layer1.0/relu/Relu" is "layer1.0.relu"; with `drop`, without the operator.

    Exporters end a node's name in its operator. It stays where nothing else tells the node from its module.
    """
    parts: list[str] = []
    for part in filter(None, re.sub(r"^node_(?=.)", "", node).split("/")):
        if parts and part.startswith(parts[-1] + "."):
            parts.pop()  # a child that repeats its parent's name
        parts.append(part)
    if parts and re.sub(r"_\d+$", "", parts[-1]).lower() == op.lower():
        parent = re.sub(r"_?\d+$", "", parts[-2].rpartition(".")[2]).lower() if len(parts) > 1 else ""
        if len(parts) > 1 and (drop or (parent and parent in op.lower())):
            parts.pop()
        else:
            parts[-1] = parts[-1].lower()
    return dotted(".".join(parts))


def dotted(name: str) -> str:
    """A name that modules can have: components of letters, digits and underscores, separated by dots."""
    parts = [re.sub(r"\W+", "_", part, flags=re.ASCII).strip("_") for part in re.split(r"[./]", name)]
    return ".".join(part[:100] for part in parts if part)


def identifier(name: str) -> str:
    """A name that an argument of a Python function can have."""
    made = re.sub(r"\W", "_", name, flags=re.ASCII)[:100]
    if not made or made[0].isdigit():
        made = f"input_{made}" if made else "input"
    return made + "_" * (keyword.iskeyword(made) or made == "self")
