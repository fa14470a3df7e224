"""The plan as a person reads it and as a file holds it, to the letter."""

import json

import pytest

from fewbit.plan import Plan, Recipe, Rule, Site, resolve

SITES = [
    Site("x", "x", "input", "activation", (1, 1, 8, 8)),
    Site("conv1.weight", "conv1", "conv", "weight", (32, 1, 3, 3)),
    Site("conv1.bias", "conv1", "conv", "bias", (32,), "derived from x and conv1.weight"),
    Site("conv1.output", "conv1", "conv", "activation", (1, 32, 8, 8)),
    Site("pool.output", "pool", "max_pool", "activation", (1, 32, 4, 4), "shared with conv1.output"),
    Site("norm.output", "norm", "layer_norm", "activation", (1, 9), integer_capable=False),
    Site("head.weight", "head", "linear", "weight", (10, 512)),
    Site("head.output", "head", "linear", "output", (1, 10)),
]  # fmt: skip

TABLE = """
site          op          kind        format  granularity     observer  rounding  because
----------------------------------------------------------------------------------------------------------------------------
x             input       activation  int8    tensor, affine  minmax    -         default of recipe golden
conv1.weight  conv        weight      int8    channel         minmax    nearest   default of recipe golden
conv1.bias    conv        bias        int32   -               -         -         int32, derived from x and conv1.weight
conv1.output  conv        activation  uint4   tensor, affine  mse       -         rule 1: 'conv*' activations=uint4 observer=mse
pool.output   max_pool    activation  uint4   tensor, affine  mse       -         shared with conv1.output: rule 1: 'conv*' activations=uint4 observer=mse
norm.output   layer_norm  activation  float   -               -         -         float: layer_norm has no integer form
head.weight   linear      weight      int4    group 64        minmax    nearest   rule 2: 'head' op=linear weights=int4 granularity=group group_size=64
head.output   linear      output      float   -               -         -         float: default of recipe golden
"""  # noqa: E501

ROW = {
    "site": "head.weight",
    "layer": "head",
    "op": "linear",
    "kind": "weight",
    "shape": [10, 512],
    "scheme": {
        "format": "int4",
        "granularity": "group",
        "axis": 0,
        "group_size": 64,
        "symmetric": True,
        "dynamic": False,
        "narrow": True,
    },
    "observer": "minmax",
    "rounding": "nearest",
    "constraint": "free",
    "because": "rule 2: 'head' op=linear weights=int4 granularity=group group_size=64",
}

DIFF = """
~ x: scheme int8 tensor, affine -> int8 tensor, affine, dynamic; observer minmax -> None; because default of recipe golden -> default of recipe dynamic
~ conv1.bias: constraint derived from x and conv1.weight -> free; because int32, derived from x and conv1.weight -> float: 'x' is dynamic
- conv1.output: uint4 tensor, affine
- pool.output: uint4 tensor, affine
~ head.weight: scheme int4 group 64 narrow -> int8 channel narrow; because rule 2: 'head' op=linear weights=int4 granularity=group group_size=64 -> default of recipe dynamic
+ gate.output: float
"""  # noqa: E501


@pytest.fixture
def plan() -> Plan:
    rules = (
        Rule("conv*", activations="uint4", observer="mse"),
        Rule("head", op="linear", weights="int4", granularity="group", group_size=64),
    )
    return resolve(Recipe(name="golden", outputs="float", rules=rules), SITES)


def test_table(plan: Plan) -> None:
    lines, expected = str(plan).splitlines(), TABLE.strip().splitlines()
    assert set(lines[1]) == {"-"}
    assert lines[:1] + lines[2:] == expected[:1] + expected[2:]


def test_json(plan: Plan) -> None:
    data = json.loads(json.dumps(plan.to_json()))
    assert {key: data[key] for key in ("fewbit_plan", "recipe")} == {"fewbit_plan": 1, "recipe": "golden"}
    assert data["rows"][6] == ROW


def test_diff(plan: Plan) -> None:
    sites = [site for site in SITES if site.site not in ("conv1.output", "pool.output")]
    sites.append(Site("gate.output", "gate", "where", "activation", (1,), integer_capable=False))
    other = resolve(Recipe(name="dynamic", activations="dynamic"), sites)
    assert plan.diff(other) == DIFF.strip()
    assert plan.diff(plan) == ""
