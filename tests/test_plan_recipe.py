"""Recipes: defaults, replacements, TOML files, and the message for each mistake."""

from pathlib import Path

import pytest

from fewbit.errors import RecipeError
from fewbit.plan import Recipe, Rule

OBSERVERS, ROUNDINGS = ["minmax", "mse", "percentile"], ["nearest"]


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def message(error: pytest.ExceptionInfo[RecipeError]) -> str:
    return str(error.value)


def test_replacing_names_what_was_replaced() -> None:
    recipe = Recipe.from_kwargs(weights="int4", equalize=True, rules=[{"match": "fc", "weights": "int8"}])
    assert recipe.name == "int8 with weights=int4, equalize=true, 1 rule"
    assert recipe.rules == (Rule("fc", weights="int8"),)
    assert recipe.replace(name="w4").name == "w4"
    assert Recipe.from_kwargs() == Recipe()


def test_toml_file_with_rules(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'weights = "int4"\ngranularity = "group"\ngroup_size = 32\n'
        '[[rules]]\nmatch = "layer1.*"\nop = "conv"\nweights = "int8"\ngranularity = "channel"\n'
        '[[rules]]\nmatch = "fc"\nactivations = "float"\n',
    )
    recipe = Recipe.load(path)
    assert (recipe.name, recipe.group_size) == ("mine", 32)
    assert [str(rule) for rule in recipe.rules] == [
        "'layer1.*' op=conv weights=int8 granularity=channel",
        "'fc' activations=float",
    ]
    assert Recipe.load(str(path)) == recipe


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"weigths": "int8"}, "recipe 'int8': unknown key 'weigths': did you mean 'weights'?"),
        (
            {"rules": [{"math": "fc"}]},
            "recipe 'int8 with 1 rule', rule 1: unknown key 'math': did you mean 'match'?",
        ),
        ({"weights": 8}, "recipe 'int8 with weights=8': weights is 8, expected a string"),
        ({"equalize": 1}, "recipe 'int8 with equalize=1': equalize is 1, expected true or false"),
        ({"granularity": "chanel"}, "unknown granularity 'chanel': did you mean 'channel'?"),
        ({"granularity": "group"}, "granularity is 'group' but group_size is missing: set for example 32"),
        ({"granularity": "group", "group_size": 0}, "group_size is 0, expected at least 1"),
        ({"granularity": "group", "group_size": True}, "group_size is True, expected a whole number"),
        ({"group_size": 32}, "group_size is 32 but granularity is not 'group': set both or neither"),
        ({"rules": "fc"}, "rules is 'fc', expected a list of rules"),
        ({"rules": ["fc"]}, "rule 1 is 'fc', expected a table such as {match = \"layer1.*\"}"),
        ({"rules": [{"match": "fc"}]}, "rule 1: rule for 'fc': it changes nothing: give it a key such as"),
        ({"rules": [{"match": 3, "weights": "int4"}]}, "rule for 3: match is 3, expected a string"),
    ],
)
def test_mistake_in_python(values: dict[str, object], expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_kwargs(**values)
    assert expected in message(error)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"weights": "itn8"}, "recipe 'r': weights: unknown format 'itn8': did you mean 'int8'?"),
        (
            {"weights": "int88"},
            "recipe 'r': weights: format 'int88' has 88 bits: integer formats have 1 to 16 bits",
        ),
        ({"activations": "dynamik"}, "; also allowed: 'float' or 'dynamic'"),
        ({"activations": "dynamik"}, "recipe 'r': activations: unknown format 'dynamik'"),
        ({"observer": "minmx"}, "recipe 'r': observer: unknown observer 'minmx': did you mean 'minmax'?"),
        (
            {"weight_observer": "x"},
            "weight_observer: unknown observer 'x': available: minmax, mse, percentile",
        ),
        (
            {"rounding": "neerest"},
            "recipe 'r': rounding: unknown rounding 'neerest': did you mean 'nearest'?",
        ),
        ({"rules": [{"observer": "msee"}]}, "recipe 'r', rule 1: observer: unknown observer 'msee'"),
        ({"weights": "dynamic"}, "recipe 'r': weights: unknown format 'dynamic'"),
    ],
)
def test_unknown_names(values: dict[str, object], expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_kwargs(name="r", **values).validate(OBSERVERS, ROUNDINGS)
    assert expected in message(error)


def test_known_names_pass() -> None:
    for values in (
        {},
        {"activations": "dynamic"},
        {"activations": "float", "outputs": "float"},
        {"weights": "float"},
    ):
        Recipe.from_kwargs(**values).validate(OBSERVERS, ROUNDINGS)
    Recipe.from_kwargs(weights="uint5", outputs="int16").validate(OBSERVERS, ROUNDINGS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('weight = "int8"', "unknown key 'weight': did you mean 'weights'?"),
        ('weights = "int8', "not valid TOML"),
        ("weights = [[[", "not valid TOML"),
        ("weights = 1", "weights is 1, expected a string"),
        ("a = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        Recipe.load(path)
    assert message(error).startswith(f"{path}: ") and expected in message(error)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\x00")
    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.load(path)
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        Recipe.load(path)


def test_missing_file_and_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: the recipe could not be read \(No such file"):
        Recipe.load(tmp_path / "none.toml")
    with pytest.raises(RecipeError) as error:
        Recipe.load("int8-dynamc")
    assert message(error).startswith("unknown recipe 'int8-dynamc': did you mean 'int8-dynamic'? available: ")


def test_mode_of_a_layer() -> None:
    recipe = Recipe(
        rules=(
            Rule("fc", weights="float"),
            Rule("enc.*", op="linear", activations="dynamic"),
            Rule("enc.last", activations="float"),
        )
    )
    layers = [
        ("conv", "conv"),
        ("fc", "linear"),
        ("enc.1", "linear"),
        ("enc.1", "conv"),
        ("enc.last", "linear"),
    ]
    assert [recipe.mode(*layer) for layer in layers] == [
        "static",
        "float",
        "dynamic",
        "static",
        "weight-only",
    ]
    assert Recipe(weights="float").mode("conv", "conv") == "float"
