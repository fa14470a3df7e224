"""The integer program: the lowered model as plain data, a list of operations over coded or float values.

A program holds nothing but names, numbers and tensors, so that a file can carry it and an executor on any machine
can repeat it. ``reference`` executes it; every target writes it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ArtifactError
from fewbit.numerics.scheme import Scheme

VERSION = 1

# How an operation computes. "integer": codes in, codes out, exact. "shares": codes rearranged, scale unchanged.
# "boundary": between float and codes. "float": in float32, whatever the weights' storage.
DOMAINS = ("integer", "shares", "boundary", "float")


@dataclass(frozen=True)
class Coding:
    """How the codes of one value are read: ``x = (q - zero_point) * scale`` (per tensor)."""

    scheme: Scheme
    scale: float
    zero_point: int

    def to_json(self) -> dict[str, Any]:
        return {"scheme": self.scheme.to_json(), "scale": self.scale, "zero_point": self.zero_point}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Coding":
        return Coding(Scheme.from_json(data["scheme"]), float(data["scale"]), int(data["zero_point"]))


@dataclass
class Op:
    """One operation. ``inputs`` and ``output`` name values; ``constants`` are owned tensors by role.

    ``layer`` is the user's name for it, ``node`` the graph node it came from, ``note`` why it is not integer.
    """

    kind: str
    domain: str
    layer: str
    node: str
    inputs: list[str]
    output: str
    attrs: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""


@dataclass
class Program:
    """Operations in execution order. ``codings`` says which values are codes; all others are float (or integers)."""

    inputs: list[str]
    input_shapes: list[tuple[int | None, ...]]
    input_dtypes: list[str]
    outputs: Any
    output_shapes: list[tuple[int | None, ...]]
    output_dtypes: list[str]
    ops: list[Op]
    codings: dict[str, Coding]
    example_shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the inputs, every size a number
    io: str = "float32"  # or "int8", "uint8": what a file hands over where the first and last steps are codes

    def output_names(self) -> list[str]:
        """The output values, flattened in order."""
        return list(_leaves(self.outputs))

    def integer_ops(self) -> list[Op]:
        return [op for op in self.ops if op.domain == "integer"]

    def complete(self) -> bool:
        """Whether every operation has its constants (one read back from a file may lack those of float layers)."""
        return all(op.constants for op in self.ops if op.kind == "module")

    def tensors(self) -> dict[str, Tensor]:
        """Every constant under a unique name ``<output value>.<role>``."""
        return {f"{op.output}.{role}": t for op in self.ops for role, t in op.constants.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, which ``tensors()`` gives."""
        return {
            "version": VERSION,
            "inputs": self.inputs,
            "input_shapes": [list(s) for s in self.input_shapes],
            "input_dtypes": self.input_dtypes,
            "outputs": self.outputs,
            "output_shapes": [list(s) for s in self.output_shapes],
            "output_dtypes": self.output_dtypes,
            "example_shapes": [list(s) for s in self.example_shapes],
            "codings": {name: c.to_json() for name, c in self.codings.items()},
            "ops": [
                {
                    "kind": op.kind,
                    "domain": op.domain,
                    "layer": op.layer,
                    "node": op.node,
                    "inputs": op.inputs,
                    "output": op.output,
                    "attrs": op.attrs,
                    "constants": sorted(op.constants),
                    "note": op.note,
                }
                for op in self.ops
            ],
        }

    @staticmethod
    def from_json(data: dict[str, Any], tensors: dict[str, Tensor]) -> "Program":
        """The inverse of ``to_json``; raises ``ArtifactError`` for anything that is not a program."""
        try:
            if data["version"] != VERSION:
                raise ArtifactError(
                    f"program: version {data['version']} found, {VERSION} expected; export it again"
                )
            ops = [
                Op(
                    kind=str(d["kind"]),
                    domain=str(d["domain"]),
                    layer=str(d["layer"]),
                    node=str(d["node"]),
                    inputs=[str(i) for i in d["inputs"]],
                    output=str(d["output"]),
                    attrs=dict(d["attrs"]),
                    constants={role: tensors[f"{d['output']}.{role}"] for role in d["constants"]},
                    note=str(d["note"]),
                )
                for d in data["ops"]
            ]
            program = Program(
                inputs=[str(i) for i in data["inputs"]],
                input_shapes=[tuple(s) for s in data["input_shapes"]],
                input_dtypes=[str(d) for d in data["input_dtypes"]],
                outputs=data["outputs"],
                output_shapes=[tuple(s) for s in data["output_shapes"]],
                output_dtypes=[str(d) for d in data["output_dtypes"]],
                ops=ops,
                codings={str(k): Coding.from_json(v) for k, v in data["codings"].items()},
                example_shapes=[tuple(int(n) for n in s) for s in data.get("example_shapes", [])],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"program: damaged description ({type(error).__name__}: {error})") from error
        _check_order(program)
        return program


def _check_order(program: Program) -> None:
    known = set(program.inputs)
    for op in program.ops:
        missing = [name for name in op.inputs if name not in known]
        if missing or op.domain not in DOMAINS:
            raise ArtifactError(
                f"program: operation {op.output!r} uses {missing or op.domain!r}, which is not defined"
            )
        known.add(op.output)
    missing = [name for name in program.output_names() if name not in known]
    if missing:
        raise ArtifactError(f"program: outputs {missing} are not computed by any operation")


def _leaves(structure: Any) -> Iterator[str]:
    if isinstance(structure, str):
        yield structure
    elif isinstance(structure, dict):
        for value in structure.values():
            yield from _leaves(value)
    elif isinstance(structure, list | tuple):
        for value in structure:
            yield from _leaves(value)


# ---- arguments of a torch operator as JSON -------------------------------------------------------------------------

_DTYPES = {
    str(d): d for d in (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8)
}


def encode_args(value: Any, reference: dict[Any, int]) -> Any:
    """Arguments of an operator as JSON; a graph node becomes ``{"$": index into the operation's inputs}``."""
    if isinstance(value, torch.fx.Node):
        return {"$": reference[value]}
    if isinstance(value, list | tuple):
        return [encode_args(v, reference) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.memory_format | torch.layout | torch.device):
        return None
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": "inf" if value > 0 else "-inf"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def decode_args(value: Any, inputs: list[Any]) -> Any:
    """The inverse of ``encode_args`` with the operation's input values put in."""
    if isinstance(value, list):
        return [decode_args(v, inputs) for v in value]
    if isinstance(value, dict):
        if "$" in value:
            return inputs[value["$"]]
        return _DTYPES[value["dtype"]] if "dtype" in value else float(value["float"])
    return value


_ATEN = re.compile(r"aten\.([a-z0-9_]+)\.([A-Za-z0-9_]+)")
_REFUSED = {"from_file", "set_", "resize_", "_async_error"}


def aten(name: str) -> Any:
    """The operator ``aten.<name>.<overload>``; refuses what is no functional tensor operator (``ArtifactError``)."""
    match = _ATEN.fullmatch(name)
    packet = getattr(torch.ops.aten, match[1], None) if match and match[1] not in _REFUSED else None
    overload = getattr(packet, match[2], None) if match and packet is not None else None
    if not isinstance(overload, torch._ops.OpOverload) or overload._schema.is_mutable:
        raise ArtifactError(f"program: {name!r} is not a functional torch operator")
    return overload
