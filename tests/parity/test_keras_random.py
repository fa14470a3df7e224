"""Random Keras models are read, and equal to Keras on inputs that the reader did not see."""

import os

import pytest
import torch
from torch.utils._pytree import tree_leaves

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras")

from random_keras import draw

from fewbit.model.keras_model import outputs_of
from fewbit.model.readers.keras import read_model
from fewbit.model.torch_proof import difference


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", range(20))
def test_a_random_model_is_equal_to_keras(seed: int) -> None:
    drawn = draw(seed)
    gm = read_model(drawn.model)
    inputs = drawn.inputs(3)
    with torch.no_grad():
        results = tree_leaves(gm(*inputs))
    expected = outputs_of(drawn.model, inputs)
    worst = [difference(e, a) for e, a in zip(expected, results, strict=True)]
    assert max(worst) <= 1e-5, drawn.parts
