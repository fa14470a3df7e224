"""From recipe and sites to a plan: defaults, rules, sharing, biases, what is float, and what is refused."""

import dataclasses

import pytest

from fewbit.errors import FormatError, PlanError, RecipeError
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Plan, Recipe, Row, Rule, Site, resolve

SITES = [
    Site("x", "x", "input", "activation", (1, 3, 8, 8)),
    Site("layer1.conv.weight", "layer1.conv", "conv", "weight", (16, 3, 3, 3)),
    Site("layer1.conv.bias", "layer1.conv", "conv", "bias", (16,), "derived from x and layer1.conv.weight"),
    Site("layer1.conv.output", "layer1.conv", "conv", "activation", (1, 16, 8, 8)),
    Site("pool.output", "pool", "max_pool", "activation", (1, 16, 4, 4), "shared with layer1.conv.output"),
    Site("flat.output", "flat", "reshape", "activation", (1, 256), "shared with pool.output"),
    Site("gate.output", "gate", "sigmoid", "activation", (1, 256), "fixed by table"),
    Site(
        "norm.output",
        "norm",
        "layer_norm",
        "activation",
        (1, 256),
        integer_capable=False,
        reason="no integer form",
    ),
    Site("up.weight", "up", "conv_transpose", "weight", (16, 8, 2, 2), axis=1),
    Site("head.weight", "head", "linear", "weight", (10, 256)),
    Site("head.output", "head", "linear", "output", (1, 10)),
]


def plan(*rules: Rule, check: object = None, **values: object) -> Plan:
    recipe = Recipe(name="r", rules=rules, **values)  # type: ignore[arg-type]
    return resolve(recipe, SITES, check)  # type: ignore[arg-type]


def schemes(resolved: Plan) -> dict[str, Scheme | None]:
    return {row.site: row.scheme for row in resolved.rows}


def test_defaults() -> None:
    resolved = plan()
    affine = Scheme("int8", symmetric=False)
    weight = Scheme("int8", "channel", narrow=True)
    assert schemes(resolved) == {
        "x": affine,
        "layer1.conv.weight": weight,
        "layer1.conv.bias": None,
        "layer1.conv.output": affine,
        "pool.output": affine,
        "flat.output": affine,
        "gate.output": affine,
        "norm.output": None,
        "up.weight": dataclasses.replace(weight, axis=1),
        "head.weight": weight,
        "head.output": affine,
    }
    assert resolved.row("x").observer == "minmax" and resolved.row("x").rounding is None
    assert resolved.row("head.weight").rounding == "nearest"
    assert resolved.row("gate.output").observer is None, "a fixed range is not observed"
    assert resolved.row("norm.output").because == "float: no integer form"
    assert resolved.row("layer1.conv.bias").because == "int32, derived from x and layer1.conv.weight"
    assert resolved.row("head.weight").because == "default of recipe r"
    assert resolved.needs_calibration


def test_later_rule_wins_field_by_field() -> None:
    resolved = plan(
        Rule("layer1.*", weights="int4", weight_observer="mse"),
        Rule("*", op="linear", weights="int6"),
        Rule("layer1.conv", weights="uint8", weight_symmetric=False),
    )
    row = resolved.row("layer1.conv.weight")
    assert row.scheme == Scheme("uint8", "channel", symmetric=False) and row.observer == "mse"
    assert row.because == (
        "rule 1: 'layer1.*' weights=int4 weight_observer=mse; "
        "rule 3: 'layer1.conv' weights=uint8 weight_symmetric=false"
    )
    assert resolved.row("head.weight").because == "rule 2: '*' op=linear weights=int6"
    assert resolved.row("up.weight").because == "default of recipe r"


def test_rule_about_weights_leaves_activations_alone() -> None:
    assert plan(Rule("layer1.*", weights="int4")).row("layer1.conv.output").because == "default of recipe r"


def test_sharing_follows_the_chain() -> None:
    resolved = plan(Rule("layer1.conv", activations="int4", observer="mse"))
    for site in ("layer1.conv.output", "pool.output", "flat.output"):
        assert resolved.row(site).scheme == Scheme("int4", symmetric=False)
        assert resolved.row(site).observer == "mse"
    assert resolved.row("flat.output").because == (
        "shared with pool.output: rule 1: 'layer1.conv' activations=int4 observer=mse"
    )


def test_tied_weights_are_one_row_twice() -> None:
    tied = [
        Site("a.weight", "a", "linear", "weight", (8, 8)),
        Site("b.weight", "b", "linear", "weight", (8, 8), "shared with a.weight"),
    ]
    rules = (Rule("a", weights="int4", rounding="adaround", weight_observer="mse"),)
    first, second = resolve(Recipe(rules=rules), tied).rows
    assert second.scheme == first.scheme == Scheme("int4", "channel", narrow=True)
    assert (second.observer, second.rounding) == (first.observer, first.rounding) == ("mse", "adaround")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"weights": "float"}, "float: 'layer1.conv.weight' is float"),
        ({"activations": "float"}, "float: 'x' is float"),
        ({"activations": "dynamic"}, "float: 'x' is dynamic"),
    ],
)
def test_bias_is_float_where_its_layer_is(values: dict[str, str], why: str) -> None:
    row = plan(**values).row("layer1.conv.bias")
    assert (row.because, row.constraint) == (why, "free")


def test_dynamic_and_weight_only_need_no_data() -> None:
    dynamic = plan(activations="dynamic")
    assert dynamic.row("x").scheme == Scheme("int8", symmetric=False, dynamic=True)
    assert dynamic.row("head.output").scheme is None
    weight_only = plan(activations="float")
    assert all(row.scheme is None for row in weight_only.activations())
    assert not dynamic.needs_calibration and not weight_only.needs_calibration


def test_outputs_can_be_float_or_finer() -> None:
    assert plan(outputs="float").row("head.output").scheme is None
    assert plan(outputs="int16").row("head.output").scheme == Scheme("int16", symmetric=False)
    assert plan(outputs="float").row("x").scheme is not None


def test_outputs_keep_8_bits_unless_fewer_are_asked_for() -> None:
    few = plan(activations="uint1")
    assert few.row("layer1.conv.output").scheme == Scheme("uint1", symmetric=False)
    assert few.row("head.output").scheme == Scheme("uint8", symmetric=False)
    assert "uint8: a network's outputs keep 8 bits" in few.row("head.output").because
    assert "8 bits" not in plan().row("head.output").because
    for row in (
        plan(activations="uint1", outputs="int4").row("head.output"),
        plan(Rule("head", activations="int4"), activations="uint1").row("head.output"),
    ):
        assert row.scheme == Scheme("int4", symmetric=False) and "keep" not in row.because
    assert plan(activations="float8_e4m3").row("head.output").scheme == Scheme("float8_e4m3")


def test_symmetric_weights_are_narrow_only_where_codes_are_signed() -> None:
    assert plan(weights="int4").row("head.weight").scheme == Scheme("int4", "channel", narrow=True)
    assert plan(weights="uint4").row("head.weight").scheme == Scheme("uint4", "channel")
    affine = plan(weight_symmetric=False).row("head.weight").scheme
    assert affine == Scheme("int8", "channel", symmetric=False)


def test_groups() -> None:
    grouped = plan(
        Rule("layer1.*", granularity="channel"),
        Rule("up", group_size=8),
        granularity="group",
        group_size=32,
    )
    assert grouped.row("head.weight").scheme == Scheme("int8", "group", group_size=32, narrow=True)
    assert grouped.row("up.weight").scheme == Scheme("int8", "group", 1, 8, narrow=True)
    assert grouped.row("layer1.conv.weight").scheme == Scheme("int8", "channel", narrow=True)
    with pytest.raises(PlanError, match=r"layer 'layer1\.conv'.*32 does not divide the 27"):
        plan(granularity="group", group_size=32)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("layr1.conv", weights="int4"), "weights=int4 matches no layer; nearest layer names: layer1"),
        (Rule("layer1.*", op="linear", weights="int4"), "'layer1.*' matches layers, but only of op conv"),
        (Rule("pool", weights="int4"), "weights does not apply to the activation it matches"),
        (Rule("pool", activations="int4"), "'pool.output' is not free to choose (shared with layer1."),
        (Rule("norm", activations="int4"), "'norm.output' is not free to choose (no integer form)"),
    ],
)  # fmt: skip
def test_rule_without_effect(rule: Rule, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        plan(rule)
    assert str(error.value).startswith("recipe 'r', rule 1: ") and expected in str(error.value)


def test_asking_for_float_where_it_is_float_is_fine() -> None:
    assert plan(Rule("norm", activations="float")).row("norm.output").scheme is None


def test_unknown_format() -> None:
    with pytest.raises(FormatError, match="unknown format 'itn8'"):
        plan(weights="itn8")


def test_target_refuses_by_layer_all_at_once() -> None:
    def check(row: Row) -> str | None:
        assert row.scheme is not None, "rows in float are not asked about"
        return f"{row.scheme.format} weights have no kernel" if row.kind == "weight" else None

    with pytest.raises(PlanError) as error:
        plan(check=check, weights="int3")
    assert str(error.value) == (
        "recipe 'r': the target cannot run 3 of 11 rows:\n"
        "  layer1.conv (weight 'layer1.conv.weight'): int3 weights have no kernel\n"
        "  up (weight 'up.weight'): int3 weights have no kernel\n"
        "  head (weight 'head.weight'): int3 weights have no kernel\n"
        'change the recipe, or add a rule that gives these layers another format or "float"'
    )


def test_sites_that_contradict_themselves() -> None:
    lost = Site("a", "a", "pool", "activation", (1,), "shared with b")
    with pytest.raises(PlanError, match="'a' is shared with 'b', which is not in the model"):
        resolve(Recipe(), [lost])
    circle = [lost, Site("b", "b", "pool", "activation", (1,), "shared with a")]
    with pytest.raises(PlanError, match="'a' is shared in a circle: a -> b -> a"):
        resolve(Recipe(), circle)
    twice = Site("a", "a", "conv", "activation", (1,))
    with pytest.raises(PlanError, match="two rows for site 'a'"):
        resolve(Recipe(), [twice, twice])
    bias = Site("a.bias", "a", "conv", "bias", (1,), "derived from x and a.weight")
    with pytest.raises(PlanError, match=r"'a\.bias' is derived from 'x', which is not in the model"):
        resolve(Recipe(), [bias])
    with pytest.raises(PlanError, match="no tensor that could be quantized"):
        resolve(Recipe(), [])
