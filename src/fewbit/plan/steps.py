"""Recipes of several steps: what `fewbit.compress` does to a model, in the order in which it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import RecipeError
from fewbit.plan.recipe import presets, read_toml
from fewbit.registry import nearest

ACTIONS = ("prune", "finetune", "quantize")
_KEY = "steps"


@dataclass(frozen=True)
class Step:
    """One call: ``do`` names the function, ``values`` are its keywords.

    Of "prune", ``epochs`` and ``training`` (keywords of ``finetune``) say how the model is trained after each part.
    """

    do: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.do}({', '.join(f'{key}={value!r}' for key, value in self.values.items())})"


@dataclass(frozen=True)
class Steps:
    """A recipe of several steps."""

    name: str
    description: str
    steps: tuple[Step, ...]

    @classmethod
    def load(cls, source: str | Path) -> Steps:
        """A preset by name, or a TOML file by path. RecipeError for what cannot be read or is no list of steps."""
        values, path = read_toml(source, steps_names())
        try:
            return cls.from_dict(path.stem, values)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> Steps:
        """From what a TOML file holds."""
        unknown = [key for key in values if key not in (_KEY, "description")]
        entries = values.get(_KEY)
        if unknown or not isinstance(entries, list) or not entries:
            what = f"unknown key {unknown[0]!r}" if unknown else "no [[steps]]"
            raise RecipeError(
                f"{what}: expected a description and a list of [[steps]], each with do = 'prune' or so"
            )
        steps = []
        for number, entry in enumerate(entries, 1):
            do = entry.get("do") if isinstance(entry, dict) else None
            if do not in ACTIONS:
                raise RecipeError(f"step {number}: do is {do!r:.40}: {nearest(str(do), list(ACTIONS))}")
            steps.append(Step(do, {key: value for key, value in entry.items() if key != "do"}))
        return cls(name, str(values.get("description", "")), tuple(steps))


def steps_names() -> list[str]:
    """Names of the recipes of several steps that ship with fewbit."""
    return sorted(path.stem for path in presets() if "[[steps]]" in path.read_text("utf-8"))
