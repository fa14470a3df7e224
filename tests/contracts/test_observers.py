"""Every observer keeps the contract of observers."""

import pytest
import torch
from observer_contract import CONTRACT

from fewbit.errors import CalibrationError, RecipeError
from fewbit.numerics import Scheme
from fewbit.numerics.ranges import clipped_fraction
from fewbit.observers import make_observer, observer_names, registry


@pytest.mark.parametrize("name", observer_names())
@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(promise, name):
    promise(registry.module(name))


def test_the_five_estimators_are_there():
    assert set(observer_names()) >= {"minmax", "moving_average", "percentile", "mse", "entropy"}


def test_only_like_observers_merge():
    with pytest.raises(CalibrationError, match="same kind and scheme"):
        make_observer("minmax", Scheme("int8")).merge(make_observer("minmax", Scheme("int4")))
    with pytest.raises(CalibrationError, match="same kind and scheme"):
        make_observer("mse", Scheme("int8")).merge(make_observer("percentile", Scheme("int8")))


def test_unknown_observers_are_named():
    with pytest.raises(RecipeError) as error:
        make_observer("minmx", Scheme("int8"))
    assert str(error.value).startswith(
        "unknown observer 'minmx': did you mean 'minmax'? available: entropy, "
    )


def test_clipped_fraction_counts_what_lies_outside():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-5.0, 0.0, 0.0, 5.0]])
    lo, hi = torch.tensor([0.0, -5.0]), torch.tensor([1.5, 4.0])
    assert clipped_fraction(x, lo, hi, Scheme("int8", "channel")).tolist() == [0.5, 0.25]
    assert clipped_fraction(x, lo[:1], hi[:1], Scheme("int8")).tolist() == [0.5]
