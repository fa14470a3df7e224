"""Channels last, by propagation: every value keeps a permutation of its own, and a transpose is written only where one
operation needs another order than its input has.

A value's *order* is the permutation that makes the stored tensor from the program's: ``stored = value.permute(order)``.
Images leave a convolution in the order (0, 2, 3, 1). A ``permute`` of the program is no operation at all, only another
order of the same stored tensor. What an operation needs, and in which order its output comes, is said by one rule an
operation (``rules``); the result is a program over stored tensors, each operation of which is one of the runtime's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewbit.errors import TargetError
from fewbit.model.program import Coding, Op, Program, aten
from fewbit.targets._litert.shapes import Sizes

Order = tuple[int, ...]
NHWC: Order = (0, 2, 3, 1)
NLC: Order = (0, 2, 1)


class FixedBatch(Exception):
    """An operation's result cannot grow with the batch in this runtime: the file is written for one sample."""


class Layout:
    """One walk over a program. Rules read ``stored``/``order``, ask for an order with ``source`` and ``emit``."""

    def __init__(
        self, program: Program, sizes: Sizes, rules: dict[str, Callable[["Layout", Op], None]]
    ) -> None:
        self.program, self.sizes, self.rules = program, sizes, rules
        self.where: dict[str, tuple[str, Order]] = {}
        self.stored: dict[
            str, tuple[int | None, ...]
        ] = {}  # shapes of stored tensors, None: grows with the batch
        self.ops: list[Op] = []
        self.codings: dict[str, Coding] = {}
        self.users: dict[str, list[Op]] = {}
        self.constants: dict[str, Tensor] = {}
        self.rows: dict[
            str, str
        ] = {}  # rows of numbers, and the images one high that they were flattened from
        self._made: dict[tuple[str, Any], str] = {}

    def run(self) -> Program:
        """The program over stored tensors. Raises ``TargetError`` that lists every operation without a rule."""
        for op in self.program.ops:
            for name in op.inputs:
                self.users.setdefault(name, []).append(op)
        for name in self.program.inputs:
            self.where[name] = (name, tuple(range(len(self.sizes.shape[name]))))
            self.stored[name] = self.sizes.signature(name)
        self._check()
        problems: list[str] = []
        for op in self.program.ops:
            if op.output in self.sizes.number:
                continue  # arithmetic on sizes: known by now
            try:
                self.rules[key(op)](self, op)
            except TargetError as error:
                problems.append(str(error))
                self._assume(op)
        if problems:
            raise refusal(problems)
        outputs = _renamed(self.program.outputs, {n: self.source(n) for n in self.program.output_names()})
        result = dataclasses.replace(self.program, ops=self.ops, codings=self.codings, outputs=outputs)
        return _live(result)

    def _assume(self, op: Op) -> None:
        """A value that cannot be written, so that the walk finds whatever else cannot."""
        if op.output in self.sizes.shape:
            self.stored[op.output] = self.sizes.signature(op.output)
            self.where[op.output] = (op.output, tuple(range(self.rank(op.output))))

    def _check(self) -> None:
        missing = [
            op for op in self.program.ops
            if key(op) not in self.rules and op.output not in self.sizes.number
        ]  # fmt: skip
        if missing:
            raise refusal([f"{op.layer or op.node}: {name(op)}" for op in missing])

    # ---- what rules use -------------------------------------------------------------------------------------------

    def order(self, name: str) -> Order:
        """The order in which a value is stored."""
        return self.where[name][1]

    def rank(self, name: str) -> int:
        return len(self.sizes.shape[name])

    def source(self, name: str, order: Order | None = None) -> str:
        """The stored tensor of a value in an order (by default the program's own), transposed if need be."""
        stored, has = self.where[name]
        wanted = tuple(range(len(has))) if order is None else order
        if has == wanted:
            return stored
        axes = [has.index(axis) for axis in wanted]
        shape = self.stored[stored]
        moved = [a for a in axes if shape[a] != 1]
        made = self._made.get((stored, tuple(axes)))
        if made is None:
            turned = tuple(shape[a] for a in axes)
            made = f"{stored}_{''.join(map(str, axes))}"
            if moved == sorted(moved):  # only sizes of 1 move: the numbers stay where they are
                made = self.reshape(stored, turned, name=made)
            else:
                made = self.emit_shares("aten.permute.default", stored, [axes], made, turned)
            self._made[stored, tuple(axes)] = made
        return made

    def reshape(self, stored: str, shape: tuple[int | None, ...], name: str, op: Op | None = None) -> str:
        """A stored tensor seen in another shape."""
        if sum(s is None for s in shape) > 1:
            raise FixedBatch
        sizes = [-1 if s is None else s for s in shape]
        return self.emit_shares("aten.reshape.default", stored, [sizes], name, shape, op)

    def emit_shares(
        self, target: str, stored: str, args: list[Any], name: str, shape: tuple[int | None, ...], op: Op | None = None,
    ) -> str:  # fmt: skip
        """An operation that moves the codes (or floats) of one stored tensor; those of a constant are moved now."""
        if stored in self.constants:
            return self._moved(target, stored, args, name, shape)
        attrs = {"target": target, "args": [{"$": 0}, *args], "kwargs": {}}
        coding = self.codings.get(stored)
        layer, node = (op.layer, op.node) if op else (stored, name)
        new = Op(target, "float" if coding is None else "shares", layer, node, [stored], name, attrs)
        self.ops.append(new)
        self.stored[name] = shape
        if coding is not None:
            self.codings[name] = coding
        return name

    def _moved(
        self, target: str, stored: str, args: list[Any], name: str, shape: tuple[int | None, ...]
    ) -> str:
        value = aten(target)(self.constants[stored], *args).contiguous()
        coding = self.codings.get(stored)
        constant = Op(
            "constant", "float" if coding is None else "boundary", "", name, [], name, {}, {"value": value}
        )
        self.ops.append(constant)
        self.constants[name], self.stored[name] = value, shape
        if coding is not None:
            self.codings[name] = coding
        return name

    def emit(
        self, op: Op, inputs: list[str], order: Order, *, name: str | None = None, coding: Coding | None = None,
        **changes: Any,
    ) -> str:  # fmt: skip
        """``op`` over stored tensors, its output stored in ``order``. ``changes``: other fields of the operation."""
        output = name or op.output
        self.ops.append(dataclasses.replace(op, inputs=inputs, output=output, **changes))
        signature = self.sizes.signature(op.output)
        self.stored[output] = tuple(signature[a] for a in order)
        self.where[op.output] = (output, order)
        coding = coding or self.program.codings.get(op.output)
        if coding is not None:
            self.codings[output] = coding
        return output

    def alias(self, op: Op, stored: str, order: Order) -> None:
        """The value of ``op`` is a stored tensor that is there already."""
        self.where[op.output] = (stored, order)


def key(op: Op) -> str:
    """What a rule is looked up by: the operator's name, ``module.<type>``, or the operation's kind."""
    if op.kind == "module":
        return f"module.{op.attrs['type']}"
    return str(op.attrs["target"]) if str(op.attrs.get("target", "")).startswith("aten.") else op.kind


def name(op: Op) -> str:
    """What an operation is called in a message."""
    return key(op).removeprefix("module.").removeprefix("aten.").rsplit(".", 1)[0]


def refusal(lines: list[str]) -> TargetError:
    """Everything that cannot be written, at once."""
    listed = "\n".join(f"  {line}" for line in lines)
    return TargetError(
        "LiteRT has no operation for these, or fewbit cannot write it yet:\n"
        f"{listed}\nreplace them in the model, or export to another target"
    )


def _renamed(structure: Any, names: dict[str, str]) -> Any:
    if isinstance(structure, str):
        return names[structure]
    if isinstance(structure, dict):
        return {k: _renamed(v, names) for k, v in structure.items()}
    return [_renamed(v, names) for v in structure] if isinstance(structure, list | tuple) else structure


def _live(program: Program) -> Program:
    """Without operations that nothing reads."""
    needed, kept = set(program.output_names()), []
    for op in reversed(program.ops):
        if op.output in needed:
            kept.append(op)
            needed.update(op.inputs)
    codings = {name: c for name, c in program.codings.items() if name in needed}
    return dataclasses.replace(program, ops=kept[::-1], codings=codings)


def constant(op: Op, role: str) -> Tensor:
    """A constant of an operation that must be there."""
    value = op.constants[role]
    assert isinstance(value, Tensor)
    return value
