"""Float operations that LiteRT has no operator for, expanded into those that it has, before layouts are chosen.

Expansion also settles what a file must know beforehand: arithmetic on sizes becomes numbers, and whatever depends on
constants alone becomes a constant.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import TargetError
from fewbit.model.program import Coding, Op, Program, aten, decode_args
from fewbit.model.reference import Reference, module_state
from fewbit.targets._litert.layout import FixedBatch, key, name, refusal
from fewbit.targets._litert.shapes import Sizes

# Operators whose sizes the layout takes from the result, so that one which grows with the batch does no harm.
_SIZED = ("aten.reshape.default", "aten.view.default", "aten.expand.default", "aten.flatten.using_ints")


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the program: its name, and its sizes at batch 1 and type as a tensor without numbers."""

    name: str
    meta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def rank(self) -> int:
        return self.meta.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype


class Call:
    """One operation on its way to others: arguments by name, ``call("mul.Tensor", a, b)`` for each step."""

    def __init__(self, expansion: "Expansion", op: Op) -> None:
        self.expansion, self.op = expansion, op
        inputs = [expansion.given(name) for name in op.inputs]
        self.args: list[Any] = decode_args(op.attrs.get("args", [{"$": 0}]), inputs)
        self.constants = op.constants
        if op.kind == "module":
            self.arguments: dict[str, Any] = dict(op.attrs["config"])
        elif "target" not in op.attrs:
            self.arguments = dict(op.attrs)
        else:
            declared = aten(op.attrs["target"])._schema.arguments
            defaults = {a.name: a.default_value for a in declared}
            named = {k: decode_args(v, inputs) for k, v in op.attrs["kwargs"].items()}
            self.arguments = defaults | dict(zip(defaults, self.args, strict=False)) | named
        self.emitted: list[Op] = []

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        found = self.arguments.get(name)
        return default if found is None else found

    @property
    def x(self) -> Value:
        """The first argument."""
        value = self.args[0]
        assert isinstance(value, Value)
        return value

    @property
    def dtype(self) -> torch.dtype:
        """The type of the result."""
        return self.expansion.meta(self.op.output).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the result at batch 1."""
        return tuple(self.expansion.meta(self.op.output).shape)

    def axes(self, dims: Any, value: Value) -> list[int]:
        """Dimensions counted from the front; all of them for None or none."""
        if dims is None or dims == []:
            return list(range(value.rank))
        return [d % max(value.rank, 1) for d in (dims if isinstance(dims, list) else [dims])]

    def error(self, reason: str) -> TargetError:
        return TargetError(f"{self.op.layer or self.op.node}: {name(self.op)}: {reason}")

    # ---- steps ------------------------------------------------------------------------------------------------------

    def __call__(self, target: str, *args: Any, **kwargs: Any) -> Value:
        """A step by one torch operator; values and numbers among the arguments as torch takes them."""
        inputs: list[Value] = []
        attrs = {
            "target": f"aten.{target}",
            "args": _encoded(list(args), inputs),
            "kwargs": _encoded(kwargs, inputs),
        }
        meta = aten(attrs["target"])(*_metas(list(args)), **_metas(kwargs))
        return self._emit(attrs["target"], [v.name for v in inputs], meta, attrs, {}, self.op.domain)

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> Value:
        """A constant tensor."""
        tensor = torch.as_tensor(value, dtype=dtype).detach().clone().contiguous()
        if tensor.dtype == torch.float64:
            tensor = tensor.to(torch.float32)
        return self._emit("constant", [], tensor, {}, {"value": tensor}, "float")

    def module(
        self, kind: str, x: Value, config: dict[str, Any], parts: dict[str, Tensor], sizes: tuple[int, ...],
        source: str | None = None,
    ) -> Value:  # fmt: skip
        """A standard layer. ``source``: the parameter of the operation that its weight is, with its storage."""
        schemes, shapes = {}, {}
        if source is not None and source in self.op.attrs.get("schemes", {}):
            schemes["weight"] = self.op.attrs["schemes"][source]
            shapes["weight"] = list(parts["weight"].shape)
        attrs = {"type": kind, "config": config, "args": [{"$": 0}], "schemes": schemes, "shapes": shapes,
                 "shape": list(x.shape)}  # fmt: skip
        meta = torch.empty(sizes, device="meta")
        return self._emit("module", [x.name], meta, attrs, parts, "float")

    def again(self, shape: tuple[int, ...] | None = None, **changes: Any) -> Value:
        """The operation itself, with other fields."""
        op = dataclasses.replace(self.op, **changes)
        meta = torch.empty(self.shape if shape is None else shape, dtype=self.dtype, device="meta")
        return self._emit(op.kind, op.inputs, meta, op.attrs, op.constants, op.domain, op.note)

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A value as another type; numbers are left to the operator that takes them."""
        if not isinstance(value, Value):
            return value if dtype.is_floating_point or isinstance(value, bool) else int(value)
        return value if value.dtype == dtype else self("to.dtype", value, dtype)

    def tensor(self, value: Any, dtype: torch.dtype) -> Value:
        """A value or number as a tensor of a type."""
        if isinstance(value, Value):
            return value if value.dtype == dtype else self("to.dtype", value, dtype)
        return self.constant(value, dtype)

    def parameter(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The float32 numbers of a layer's parameter, dequantized where it is stored as codes."""
        value = module_state(self.op)[name].to(torch.float32)
        return value if shape is None else value.reshape(shape)

    def coded(self, name: str, rows: Tensor | None = None) -> dict[str, Tensor]:
        """A stored parameter as the weight of a layer: codes, scales and zero points, rows in an order."""
        parts = {part: self.constants[f"{name}{part}"] for part in ("", "::scale", "::zero_point")}
        if rows is not None:
            count = parts[""].shape[0]
            for part, value in parts.items():
                if part == "" or value.numel() > 1:
                    parts[part] = value.reshape(count, -1)[rows].reshape(value.shape).contiguous()
        return {f"weight{part}": value for part, value in parts.items()}

    def reshape(self, value: Value, sizes: list[int]) -> Value:
        """Another shape; the batch, where it is free, is the first axis before and after."""
        if self.expansion.free_batch and value.rank and sizes and sizes[0] == value.shape[0]:
            sizes = [-1, *sizes[1:]]
        return self("reshape.default", value, sizes)

    def _emit(
        self, kind: str, inputs: list[str], meta: Tensor, attrs: dict[str, Any], constants: dict[str, Tensor],
        domain: str, note: str | None = None,
    ) -> Value:  # fmt: skip
        label = kind.split(".")[1] if kind.startswith("aten.") else kind
        name = self.expansion.unique(f"{self.op.output}_{label}")
        if domain == "shares" and self.op.inputs[0] in self.expansion.codings:
            self.expansion.codings[name] = self.expansion.codings[self.op.inputs[0]]
        op = Op(
            kind, domain, self.op.layer, self.op.node, inputs, name, attrs, constants, note or self.op.note
        )
        self.emitted.append(op)
        self.expansion.metas[name] = meta.to("meta")
        return Value(name, self.expansion.metas[name])


Expand = Callable[[Call], Any]


class Expansion:
    """One walk over a program whose sizes are known."""

    def __init__(
        self, program: Program, sizes: Sizes, free_batch: bool, table: dict[str, Expand], rules: Collection[str],
        otherwise: Expand,
    ) -> None:  # fmt: skip
        self.program, self.sizes, self.free_batch, self.table = program, sizes, free_batch, table
        self.known = {*table, *rules}
        self.otherwise = otherwise  # for operators that nothing is known of
        self.problems: list[str] = []
        self.codings: dict[str, Coding] = dict(program.codings)
        self.ops: list[Op] = []
        self.names = set(program.inputs) | {op.output for op in program.ops}
        self.renamed: dict[str, str] = {}
        self.parts: dict[str, Any] = {}  # results that are lists, as nested lists of values
        self.constants: dict[str, Tensor] = {}
        self.metas: dict[str, Tensor] = {}
        self.sequences: dict[str, tuple[int, list[Value]]] = {}  # the axis of a sequence, and its steps
        self.reference = Reference(program)

    def run(self) -> Program:
        for op in self.program.ops:
            if op.output not in self.sizes.number:
                self._step(self._settled(op))
        if self.problems:
            missing = [o for o in self.ops if key(o) not in self.known]
            raise refusal([*self.problems, *(f"{o.layer or o.node}: {name(o)}" for o in missing)])
        outputs = _renamed(self.program.outputs, self.renamed)
        return dataclasses.replace(self.program, ops=self.ops, codings=self.codings, outputs=outputs)

    def given(self, name: str) -> Any:
        """An operand as a value, or as the list of values that it is."""
        if name in self.parts:
            return self.parts[name]
        return Value(self.renamed.get(name, name), self.meta(name))

    def meta(self, name: str) -> Tensor:
        """Sizes and type of a value."""
        if name not in self.metas:
            dtype = getattr(torch, self.sizes.dtype[name])
            self.metas[name] = torch.empty(self.sizes.shape[name], dtype=dtype, device="meta")
        return self.metas[name]

    def unique(self, name: str) -> str:
        """A name that no value has yet."""
        number, found = 1, name
        while found in self.names:
            number += 1
            found = f"{name}{number}"
        self.names.add(found)
        return found

    def _settled(self, op: Op) -> Op:
        """The operation with numbers in place of sizes, and current names."""
        numbers = {i: self.sizes.number[n] for i, n in enumerate(op.inputs) if n in self.sizes.number}
        if numbers:
            moving = any(op.inputs[i] in self.sizes.moving for i in numbers)
            if moving and op.attrs.get("target") not in _SIZED:
                raise FixedBatch
            kept = [i for i in range(len(op.inputs)) if i not in numbers]
            table = {i: {"$": kept.index(i)} for i in kept} | numbers
            changed = {k: _put(op.attrs[k], table) for k in ("args", "kwargs") if k in op.attrs}
            op = dataclasses.replace(op, inputs=[op.inputs[i] for i in kept], attrs=op.attrs | changed)
        return dataclasses.replace(op, inputs=[self.renamed.get(n, n) for n in op.inputs])

    def _step(self, op: Op) -> None:
        if op.kind == "getitem" and op.inputs[0] in self.parts:
            self._bind(op.output, self.parts[op.inputs[0]][op.attrs["index"]])
        elif op.domain == "float" and self._foldable(op):
            self._fold(op)
        elif op.domain in ("float", "shares") and key(op) in self.table:
            self._expand(op, self.table[key(op)])
        elif op.domain == "float" and key(op).startswith("aten.") and key(op) not in self.known:
            self._expand(op, self.otherwise)
        else:
            self._add(op)

    def _foldable(self, op: Op) -> bool:
        known = all(name in self.constants for name in op.inputs)
        return known and op.kind not in ("constant", "getitem") and not op.attrs.get("schemes")

    def _fold(self, op: Op) -> None:
        value = self.reference.step(op, [self.constants[name] for name in op.inputs])
        if not isinstance(value, Tensor):
            self._add(op)
            return
        if self.sizes.free.get(op.output):
            raise FixedBatch
        constants = {"value": value.contiguous().clone()}
        self._add(dataclasses.replace(op, kind="constant", inputs=[], attrs={}, constants=constants))

    def _expand(self, op: Op, expand: Expand) -> None:
        call = Call(self, op)
        try:
            result = expand(call)
        except TargetError as error:
            self.problems.append(str(error))
            result = None
        if result is None:
            self._add(op)
            return
        made = {o.output for o in call.emitted}
        if isinstance(result, Value) and result.name in made:
            _rename(call.emitted, result.name, op.output)
            self.codings.pop(result.name, None)
        else:
            self._bind(op.output, result)
        for new in call.emitted:
            if new.output == op.output and key(new) == key(op):
                self._add(new)  # the operation itself, in the one form that has an operator
            else:
                self._step(self._settled(new))

    def _bind(self, name: str, result: Any) -> None:
        if isinstance(result, Value):
            self.renamed[name] = result.name
            self.codings.pop(name, None)
        else:
            self.parts[name] = result

    def _add(self, op: Op) -> None:
        self.ops.append(op)
        if op.kind == "constant" and op.output not in self.codings:
            self.constants[op.output] = op.constants["value"]


def _encoded(value: Any, inputs: list[Value]) -> Any:
    """Arguments as a program keeps them; values are collected in ``inputs``."""
    if isinstance(value, Value):
        names = [v.name for v in inputs]
        if value.name not in names:
            inputs.append(value)
        return {"$": names.index(value.name) if value.name in names else len(inputs) - 1}
    if isinstance(value, dict):
        return {k: _encoded(v, inputs) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(v, inputs) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    return value


def _metas(value: Any) -> Any:
    if isinstance(value, Value):
        return value.meta
    if isinstance(value, dict):
        return {k: _metas(v) for k, v in value.items()}
    return [_metas(v) for v in value] if isinstance(value, list | tuple) else value


def _put(value: Any, table: dict[int, Any]) -> Any:
    """Arguments with each reference replaced."""
    if isinstance(value, list):
        return [_put(v, table) for v in value]
    if isinstance(value, dict):
        return table[value["$"]] if "$" in value else {k: _put(v, table) for k, v in value.items()}
    return value


def _rename(ops: list[Op], old: str, new: str) -> None:
    for op in ops:
        op.inputs = [new if n == old else n for n in op.inputs]
        op.output = new if op.output == old else op.output


def _renamed(structure: Any, names: dict[str, str]) -> Any:
    if isinstance(structure, str):
        return names.get(structure, structure)
    if isinstance(structure, dict):
        return {k: _renamed(v, names) for k, v in structure.items()}
    return [_renamed(v, names) for v in structure] if isinstance(structure, list | tuple) else structure
