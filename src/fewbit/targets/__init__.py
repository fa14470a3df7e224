"""Targets: the runtimes that a quantized model can be written for. One folder or file each; its name is its key.

A target plans (``adapt``, ``check``, ``portable_bounds``), writes (``prepare``, ``write``), runs (``open``) and, for
the export gate, shows what its runtime does inside a file (``describe``, ``probe``, ``coverage``).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from fewbit.errors import PlanError, TargetError
from fewbit.model.program import Program
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Plan, Row
from fewbit.registry import Registry

Runner = Callable[..., list[Tensor]]
"""A file opened in its runtime: input tensors in, output tensors out (float32 where the file computes codes)."""


@dataclass(frozen=True)
class Kernel:
    """One operation of the program and whether the runtime computes it on integers; ``planned``: whether it should."""

    layer: str
    kind: str
    integer: bool
    cause: str = ""
    planned: bool = True


@dataclass
class Described:
    """What a file carries: its program where it has one, and under which names its runtime computes which codes."""

    program: Program | None
    codes: dict[str, str] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)


class Target(Protocol):
    """What a target module offers."""

    SUFFIX: str  # of its files, such as ".onnx"
    REQUANTIZATION: str  # the rule that its integer kernels follow
    TOLERANCE: int  # by how many units its codes may differ from the reference
    # TABLES, where it is True: float layers' weights may be codes of any format, looked up in a table.

    def runtime(self) -> str:
        """Its runtime's name and version. Raises ``MissingExtraError`` where that is not installed."""

    def adapt(self, row: Row) -> Row:
        """The row as the runtime wants it."""

    def check(self, row: Row) -> str | None:
        """None where the runtime can run the row, else why not and what to do."""

    def portable_bounds(
        self, weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Weights' ranges that no CPU of this runtime saturates."""

    def prepare(self, program: Program) -> Program:
        """The program as this runtime executes it: its codes, its shared scales, its layout."""

    def write(self, program: Program, path: Path, metadata: dict[str, str]) -> None:
        """Write a prepared program to ``path``, in a folder of its own: more files may lie beside it."""

    def open(self, path: Path) -> Runner:
        """The file ready to run, on one thread. Raises ``ArtifactError`` where the runtime refuses it."""

    def open_exact(self, path: Path) -> Runner:
        """The same by the kernels that the reference reproduces, where ``open`` uses other, faster ones.

        Such a target also has ``fast_codes(program, seen)``: codes by the faster kernels, one operation at a time, on
        the codes that ``probe`` saw.
        """

    def describe(self, path: Path) -> Described:
        """What the file carries. Raises ``ArtifactError`` for a damaged file."""

    def probe(self, path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> dict[str, Tensor]:
        """Codes (int32) computed inside, by the program's value names; none where the runtime does not show them."""

    def coverage(self, path: Path, program: Program, codes: dict[str, str]) -> list[Kernel]:
        """Each operation that could be integer, as the runtime's own optimized graph has it."""


registry = Registry("fewbit.targets", "target", TargetError)


def get_target(name: str) -> Target:
    """The target of that name. Raises ``TargetError`` with the nearest match."""
    return cast(Target, registry.module(name))


def adapt_and_check(plan: Plan, target: Target, name: str, integer: Collection[str] = ()) -> Plan:
    """The plan as the target wants it; ``integer`` names the layers that are to run in integer kernels.

    Raises ``PlanError`` that lists every layer the target cannot run, why, and what to do.
    """
    rows = tuple(target.adapt(row) for row in plan.rows)
    reasons = [
        (
            row,
            target.check(row) or (_no_kernel(row) if row.layer in integer else _no_table(row, target, name)),
        )
        for row in rows
    ]
    refusals = [f"  {row.site}: {reason}" for row, reason in reasons if reason is not None]
    if refusals:
        raise PlanError(f"target {name!r} cannot run this plan:\n" + "\n".join(refusals))
    return Plan(rows, plan.recipe)


def has_table(scheme: Scheme) -> bool:
    """Whether codes are indices of values or bit patterns, not numbers themselves."""
    return not scheme.spec.integer and not scheme.spec.code_dtype.is_floating_point


def refuse_tables(program: Program, target: Target, name: str) -> None:
    """Raise ``TargetError`` for float layers whose weights the target cannot store as they are, by name."""
    layers = [
        f"{op.layer}.{key}: {_unstorable(scheme, name)}"
        for op in program.ops
        for key, stored in op.attrs.get("schemes", {}).items()
        if has_table(scheme := Scheme.from_json(stored)) and not getattr(target, "TABLES", False)
    ]
    if layers:
        raise TargetError("; ".join(layers))


def _unstorable(scheme: Scheme, name: str) -> str:
    codes = ", or integer activations" if scheme.spec.unit is not None and not scheme.spec.block else ""
    return (
        f"target {name!r} has no way to store {scheme.format} weights of a layer that computes in float; "
        f"use int8, int4 or float16 weights{codes}, or target='onnx'"
    )


def _no_table(row: Row, target: Target, name: str) -> str | None:
    """Why the weights of a float layer cannot be stored as they are, where they cannot."""
    if row.kind != "weight" or row.scheme is None or not has_table(row.scheme):
        return None
    return None if getattr(target, "TABLES", False) else _unstorable(row.scheme, name)


def _no_kernel(row: Row) -> str | None:
    """Why a weight fits no integer kernel of any target: those multiply codes of 8 bits without zero points.

    Codes of up to 6 bits are stored with their zero point subtracted, which still fits, and two add up to at most 128.
    """
    scheme = row.scheme
    if row.kind != "weight" or scheme is None:
        return None
    problem = None
    if scheme.spec.unit is None:
        problem = f"{scheme.format} weights have no integer kernel; use int8 or fewer bits"
    elif not scheme.symmetric and scheme.spec.bits > 6:
        problem = "weights of over 6 bits with zero points have no integer kernel; use weight_symmetric=True"
    elif scheme.granularity == "group":
        problem = "weights in groups have no integer kernel; use granularity='channel'"
    return problem and f"{problem}, or keep the activations float (activations='float')"
