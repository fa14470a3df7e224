"""Targets: the runtimes that a quantized model can be written for. One folder or file each; its name is its key.

A target module has ``adapt(row)`` (the scheme as the runtime wants it), ``check(row)`` (None, or why the runtime cannot
run it), ``write(model, path)``, ``run(path, inputs)`` and ``REQUANTIZATION`` (the rule its integer kernels follow).
"""

from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from fewbit.errors import PlanError, TargetError
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Plan, Row
from fewbit.registry import Registry


class Target(Protocol):
    """What a target module offers."""

    REQUANTIZATION: str

    def adapt(self, row: Row) -> Row: ...
    def check(self, row: Row) -> str | None: ...
    def portable_bounds(
        self, weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]: ...
    def write(self, model: Any, path: Path) -> None: ...
    def run(self, path: Path, inputs: tuple[Tensor, ...]) -> Any: ...


registry = Registry("fewbit.targets", "target", TargetError)


def get_target(name: str) -> Target:
    """The target of that name. Raises ``TargetError`` with the nearest match."""
    return cast(Target, registry.module(name))


def adapt_and_check(plan: Plan, target: Target, name: str) -> Plan:
    """The plan as the target wants it. Raises ``PlanError`` that lists every layer the target cannot run, and why."""
    rows = tuple(target.adapt(row) for row in plan.rows)
    refusals = [f"  {row.site}: {reason}" for row in rows if (reason := target.check(row)) is not None]
    if refusals:
        raise PlanError(f"target {name!r} cannot run this plan:\n" + "\n".join(refusals))
    return Plan(rows, plan.recipe)
