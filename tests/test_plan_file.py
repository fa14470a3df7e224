"""Plans as files: a round trip, damage and hostility refused with PlanError, and nothing half-written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import PlanError
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Plan, Row

ROWS = (
    Row("a.weight", "a", "conv", "weight", (4, 8), Scheme("int4", "group", group_size=4), "mse", "nearest"),
    Row("a.output", "a", "conv", "activation", (1, 4), Scheme("int8", symmetric=False), "minmax"),
    Row("b.output", "b", "pool", "activation", (1, 4), Scheme("int8", symmetric=False), "minmax", None,
        "shared with a.output", "shared with a.output: default"),
    Row("c.output", "c", "where", "output", (), None, because="float: where has no integer form"),
)  # fmt: skip
PLAN = Plan(ROWS, "int8")

TEXT = st.text(max_size=12)
SCHEMES = st.one_of(
    st.none(),
    st.builds(
        Scheme, st.sampled_from(["int8", "uint4", "int16"]), symmetric=st.booleans(), dynamic=st.booleans()
    ),
    st.builds(Scheme, st.just("int3"), st.just("channel"), st.integers(0, 1), narrow=st.booleans()),
)
PLANS = st.builds(
    Plan,
    st.lists(
        st.builds(
            Row,
            site=TEXT,
            layer=TEXT,
            op=TEXT,
            kind=st.sampled_from(["weight", "activation", "bias", "output", "gradient"]),
            shape=st.tuples(st.integers(0, 99), st.integers(0, 99)),
            scheme=SCHEMES,
            observer=st.none() | TEXT,
            rounding=st.none() | TEXT,
            because=TEXT,
        ),
        unique_by=lambda row: row.site,
        max_size=5,
    ).map(tuple),
    TEXT,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def changed(**values: Any) -> dict[str, Any]:
    """The plan as JSON with some keys of its first row replaced."""
    data = PLAN.to_json()
    data["rows"][0] |= values
    return data


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@given(PLANS)
def test_round_trip_through_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(st.sampled_from(sorted(ROWS[0].to_json())), JSON)
def test_any_value_in_a_row_is_read_or_refused(key: str, value: Any) -> None:
    data = changed(**{key: value})
    try:
        plan = Plan.from_json(data)
    except PlanError:
        return
    assert plan.to_json() == data


@given(JSON)
def test_any_json_is_refused(value: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(value)
    with pytest.raises(PlanError):
        Plan.from_json({"fewbit_plan": 1, "recipe": "", "rows": [value]})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], "not a plan: a JSON object with the keys fewbit_plan, recipe and rows was expected"),
        (PLAN.to_json() | {"fewbit_plan": 2}, "the plan has version 2, this fewbit reads version 1"),
        (PLAN.to_json() | {"fewbit_plan": True}, "the plan has version True"),
        (PLAN.to_json() | {"extra": 1}, "a plan has the keys fewbit_plan, recipe and rows"),
        (PLAN.to_json() | {"rows": {}}, "plan: rows is {}, expected a list of rows"),
        (PLAN.to_json() | {"recipe": None}, "plan: recipe is None, expected a string"),
        (PLAN.to_json() | {"rows": [{"site": "a"}]}, "a plan row has the keys"),
        (PLAN.to_json() | {"rows": [3]}, "found int"),
        (changed(kind="wait"), "plan row 'a.weight': kind is 'wait', expected one of weight, activation"),
        (changed(shape=[4, -8]), "plan row 'a.weight': shape is [4, -8], expected a list of sizes"),
        (changed(shape=[True]), "shape is [True]"),
        (changed(observer=3), "observer is 3, expected a string or null"),
        (changed(scheme="int8"), "scheme is 'int8', expected an object or null"),
        (changed(scheme={"format": "int99"}), "plan row 'a.weight': its scheme is not valid"),
        (changed(scheme={"format": "int8", "narow": True}), "unknown key 'narow'"),
        (changed(shape=[4, 6]), "group_size 4 does not divide the 6"),
        (changed(site="a.output"), "two rows for site 'a.output'"),
        (changed(constraint="shared with z"), "'a.weight' is shared with 'z', which is not in the plan"),
        (
            changed(constraint="shared with a.output"),
            "'a.weight' is shared with 'a.output' but has another scheme",
        ),
    ],
)
def test_what_is_wrong_is_named(data: Any, expected: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.from_json(data)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "not valid JSON"),
        (b'{"fewbit_plan": 1, "rows": [', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"9" * 10_000, "not valid JSON"),
        (b"{}", "not a plan"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, raw: bytes, expected: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(raw)
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    assert str(error.value).startswith(f"{path}: ") and expected in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError):
            Plan.load(path)


def test_missing_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="could not be read"):
        Plan.load(tmp_path / "none.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(PlanError, match="larger than 64 MiB"):
        Plan.load(huge)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: the plan could not be written \(No such file"):
        PLAN.save(tmp_path / "none" / "plan.json")


@pytest.mark.parametrize("stops", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: BaseException
) -> None:
    path = tmp_path / "plan.json"
    Plan((), "old").save(path)

    def fail(descriptor: int) -> None:
        raise stops

    monkeypatch.setattr(os, "fsync", fail)
    expected: type[BaseException] = PlanError if isinstance(stops, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(stops, OSError) else None):
        PLAN.save(path)
    assert Plan.load(path).recipe == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_dynamic_range_needs_no_data_whatever_observer_its_row_names() -> None:
    row = Row("a", "a", "conv", "activation", (1,), Scheme("int8", dynamic=True), "minmax")
    assert not Plan((row,)).needs_calibration
    assert Plan((ROWS[1],)).needs_calibration and not Plan(ROWS[:1]).needs_calibration


def test_look_ups() -> None:
    assert PLAN.row("b.output").shared_with == "a.output"
    assert [row.site for row in PLAN.weights()] == ["a.weight"]
    assert [row.site for row in PLAN.activations()] == ["a.output", "b.output", "c.output"]
    with pytest.raises(PlanError, match=r"the plan has no site 'a\.wieght'; nearest: a\.weight"):
        PLAN.row("a.wieght")
