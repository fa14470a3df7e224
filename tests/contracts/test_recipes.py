"""Every shipped recipe loads by its name, says what it is, names only what exists, resolves to a plan."""

import re

import pytest

from fewbit.numerics.scheme import Scheme
from fewbit.observers import __name__ as observers_package
from fewbit.plan import Plan, Recipe, Site, preset_names, resolve
from fewbit.registry import Registry
from fewbit.rounding import __name__ as rounding_package

SITES = [
    Site("x", "x", "input", "activation", (1, 1, 8, 8)),
    Site("conv1.weight", "conv1", "conv", "weight", (16, 1, 3, 3)),
    Site("conv1.output", "conv1", "conv", "activation", (1, 16, 8, 8)),
    Site("fc.weight", "fc", "linear", "weight", (10, 64)),
    Site("fc.output", "fc", "linear", "output", (1, 10)),
]


def test_the_presets_are_there() -> None:
    expected = {"int8", "int8-dynamic", "int8-per-tensor", "int8-weight-only", "int4-weights", "tensorrt"}
    assert expected <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_describes_itself(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert re.fullmatch(r".{20,}\.", recipe.description), "one sentence that says what it is"


@pytest.mark.parametrize("name", preset_names())
def test_preset_names_only_what_exists(name: str) -> None:
    observers = Registry(observers_package, "observer").names()
    roundings = Registry(rounding_package, "rounding").names()
    Recipe.load(name).validate(observers, roundings)


@pytest.mark.parametrize("name", preset_names())
def test_preset_resolves_and_the_plan_survives_json(name: str) -> None:
    plan = resolve(Recipe.load(name), SITES)
    assert [row.site for row in plan.rows] == [site.site for site in SITES]
    assert all(row.because for row in plan.rows)
    assert any(row.scheme for row in plan.weights())
    assert Plan.from_json(plan.to_json()) == plan


def test_int8_is_the_default() -> None:
    preset, default = Recipe.load("int8"), Recipe()
    assert preset.replace(description="") == default


def test_what_each_preset_is_for() -> None:
    plans = {name: resolve(Recipe.load(name), SITES) for name in preset_names()}
    assert plans["int8"].needs_calibration
    assert not plans["int8-dynamic"].needs_calibration
    assert plans["int8-dynamic"].row("conv1.output").scheme == Scheme("int8", symmetric=False, dynamic=True)
    assert not plans["int8-weight-only"].needs_calibration
    assert all(row.scheme is None for row in plans["int8-weight-only"].activations())
    assert all(row.scheme and row.scheme.symmetric for row in plans["tensorrt"].rows)
    assert all(row.scheme and row.scheme.granularity == "tensor" for row in plans["int8-per-tensor"].rows)
    assert all(row.scheme and row.scheme.format == "int4" for row in plans["int4-weights"].weights())
