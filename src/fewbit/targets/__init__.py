"""Targets: the runtimes that a quantized model can be written for. One folder or file each; its name is its key.

A target module has ``adapt(row)`` (the scheme as the runtime wants it), ``check(row)`` (None, or why the runtime
cannot run it), ``portable_bounds`` (weights' ranges that no CPU saturates), ``write``, ``run``, and for the export gate
``describe`` (the program a file carries), ``probe`` (the codes computed inside it) and ``coverage`` (its kernels).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from fewbit.errors import PlanError, TargetError
from fewbit.model.program import Program
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Plan, Row
from fewbit.registry import Registry


class Target(Protocol):
    """What a target module offers. ``codes`` names, by program value, the tensors of the file that hold its codes."""

    REQUANTIZATION: str  # the rule that its integer kernels follow
    TOLERANCE: int  # by how many units its codes may differ from the reference

    def adapt(self, row: Row) -> Row: ...
    def check(self, row: Row) -> str | None: ...
    def portable_bounds(
        self, weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]: ...
    def write(self, program: Program, path: Path, metadata: dict[str, str]) -> None: ...
    def run(self, path: Path, inputs: tuple[Tensor, ...]) -> Any: ...
    def describe(self, path: Path) -> Any: ...
    def probe(self, path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> Any: ...
    def coverage(self, path: Path, program: Program, codes: dict[str, str]) -> list[Any]: ...


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
        (row, target.check(row) or (_no_kernel(row) if row.layer in integer else None)) for row in rows
    ]
    refusals = [f"  {row.site}: {reason}" for row, reason in reasons if reason is not None]
    if refusals:
        raise PlanError(f"target {name!r} cannot run this plan:\n" + "\n".join(refusals))
    return Plan(rows, plan.recipe)


def _no_kernel(row: Row) -> str | None:
    """Why a weight fits no integer kernel of any target: those multiply symmetric codes of at most 8 bits."""
    scheme = row.scheme
    if row.kind != "weight" or scheme is None:
        return None
    problem = None
    if not scheme.spec.integer or scheme.spec.bits > 8:
        problem = f"{scheme.format} weights have no integer kernel; use int8 or fewer bits"
    elif not scheme.symmetric:
        problem = "weights with zero points have no integer kernel; use weight_symmetric=True"
    elif scheme.granularity == "group":
        problem = "weights in groups have no integer kernel; use granularity='channel'"
    return problem and f"{problem}, or keep the activations float (activations='float')"
