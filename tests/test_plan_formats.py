"""What a plan makes of formats that have opinions: blocks, tables, their own range estimator and rounding."""

import pytest
import torch
from torch import nn

import fewbit
from fewbit.errors import PlanError
from fewbit.numerics import Scheme, format_names, get_format
from fewbit.plan import Plan, Recipe, Rule, Site, resolve

SITES = [
    Site("x", "x", "input", "activation", (1, 32, 8, 8)),
    Site("conv.weight", "conv", "conv", "weight", (16, 32, 3, 3)),
    Site("conv.output", "conv", "conv", "activation", (1, 16, 8, 8)),
    Site("up.weight", "up", "conv_transpose", "weight", (16, 8, 2, 2), axis=1),
    Site("head.weight", "head", "linear", "weight", (10, 72)),
]


def plan(*rules: Rule, **values: object) -> Plan:
    return resolve(Recipe(name="r", activations="float", rules=rules, **values), SITES)  # type: ignore[arg-type]


def test_learned_formats_are_rounded_by_what_fits_them() -> None:
    row = plan(weights="codebook3", weight_observer="percentile").row("conv.weight")
    assert (row.scheme, row.observer, row.rounding) == (Scheme("codebook3", "channel"), "minmax", "kmeans")
    assert row.because.endswith("; codebook3 is rounded by kmeans")
    row = plan(weights="codebook3_shared", rounding="lloyd_max").row("conv.weight")
    assert (row.rounding, "rounded" in row.because) == ("lloyd_max", False)


def test_formats_name_their_range_estimator_where_the_recipe_has_none_of_its_own() -> None:
    row = plan(weights="binary").row("conv.weight")
    assert (row.observer, row.rounding) == ("xnor", "nearest")
    assert row.because.endswith("; binary takes its scales from xnor")
    assert plan(weights="ternary").row("head.weight").observer == "twn"
    assert plan(weights="ternary", weight_observer="mse").row("head.weight").observer == "mse"
    assert plan(weights="nf4").row("head.weight").observer == "minmax"


@pytest.mark.parametrize("name", [n for n in format_names() if get_format(n).block])
def test_blocks_become_groups(name: str) -> None:
    size = get_format(name).block
    row = plan(Rule("head", weights="int8"), weights=name).row("conv.weight")
    assert row.scheme == Scheme(name, "group", group_size=size)
    assert plan(Rule("head", weights="int8"), weights=name).row("up.weight").scheme == Scheme(
        name, "group", 1, size
    )
    with pytest.raises(
        PlanError, match=f"layer 'head': group_size {size} does not divide the 72 numbers per channel"
    ):
        plan(weights=name)
    with pytest.raises(
        PlanError, match=f"layer 'conv': group_size is 8, but {name} has one scale for every {size}"
    ):
        plan(weights=name, granularity="group", group_size=8)


def test_tables_larger_than_a_channel_are_refused_by_layer_name() -> None:
    with pytest.raises(
        PlanError, match="layer 'head': codebook7 has tables of 128 values, and here 72 numbers"
    ):
        plan(Rule("head", weights="codebook7"))
    with pytest.raises(
        PlanError, match="layer 'conv': codebook4 has tables of 16 values, and here 9 numbers share"
    ):
        plan(weights="codebook4", granularity="group", group_size=9)
    assert plan(Rule("head", weights="codebook7_shared")).row("head.weight").rounding == "kmeans"


def test_channels_smaller_than_a_table_share_one_unless_a_rule_asks_otherwise() -> None:
    row = plan(Rule("conv", weights="int8"), weights="codebook7").row("head.weight")
    assert row.scheme == Scheme("codebook7_shared", axis=0, granularity="channel")
    assert "codebook7_shared: the layer's channels are smaller than a table of codebook7" in row.because
    ruled = plan(Rule("head", rounding="lloyd_max"), weights="codebook7").row("head.weight")
    assert (ruled.scheme, ruled.rounding) == (row.scheme, "lloyd_max")
    with pytest.raises(PlanError, match="'head': codebook7 has tables of 128 values"):
        plan(Rule("head", granularity="channel"), weights="codebook7")
    assert plan(weights="codebook6").row("head.weight").scheme == Scheme(
        "codebook6", axis=0, granularity="channel"
    )


@pytest.mark.parametrize(
    ("name", "why"), [("mxfp4", "shares scales among blocks"), ("codebook4", "is fitted to")]
)
def test_activations_of_one_fixed_scale_cannot_be_in_blocks_or_learned(name: str, why: str) -> None:
    with pytest.raises(PlanError, match=f"layer 'x': {name} {why}"):
        resolve(Recipe(name="r", activations=name), SITES)


def test_one_bit_integers_have_a_plan() -> None:
    assert plan(weights="int1").row("conv.weight").scheme == Scheme("int1", "channel")
    assert plan(weights="int2").row("conv.weight").scheme == Scheme("int2", "channel", narrow=True)


FORMATS = ["codebook4", "codebook2_shared", "mxfp4", "nvfp4", "nf4", "binary", "binary_sign", "ternary",
           "ternary_fixed", "pow2_4", "apot_4", "exp_3", "float8_e4m3", "int1", "uint1", "float16"]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_any_format_are_simulated(name: str) -> None:
    """Through the whole of ``quantize``: the layer computes with what the codes stand for."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 8)).eval()
    x = torch.randn(5, 64)
    quantized = fewbit.quantize(layer, weights=name, activations="float", example=x, progress=False)
    weight = quantized.qtensors["0.weight"]
    assert weight.scheme.format == name
    expected = torch.nn.functional.linear(x, weight.dequantize(), layer[0].bias)
    assert torch.allclose(quantized(x), expected, atol=1e-5)
    assert weight.codes.unique().numel() <= 2**weight.scheme.spec.bits


@pytest.mark.parametrize(("name", "share"), [("codebook2", 0.7), ("codebook3_shared", 0.97)])
def test_tables_weighted_by_inputs_lower_the_error_of_the_output(name: str, share: float) -> None:
    """Inputs of very different size: k-means weighted by their second moments, collected in calibration."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(96, 16)).eval()
    x = torch.randn(512, 96) * torch.logspace(-2, 1, 96)[torch.randperm(96)]

    def output_error(rounding: str) -> float:
        quantized = fewbit.quantize(
            layer, x[:256], weights=name, activations="float", rounding=rounding, progress=False
        )
        assert quantized.plan.row("0.weight").rounding == rounding
        return float((quantized(x[256:]) - layer(x[256:])).detach().square().mean())

    assert output_error("weighted_kmeans") < share * output_error("kmeans")
