"""Random ONNX models: read, equal to ONNX Runtime on other inputs, with the free sizes that the file declares."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_made import answers, saved
from random_onnx import draw

from fewbit.model.readers.onnx import read_file


@pytest.mark.parametrize("seed", range(20))
def test_a_random_model_answers_as_onnx_runtime(seed: int, tmp_path: Path) -> None:
    drawn = draw(seed)
    path = saved(drawn.model, tmp_path)
    gm = read_file(path)
    count = drawn.batch or 5
    inputs = drawn.inputs(count, variant=1)
    with torch.no_grad():
        actual = gm(*inputs).numpy()
    expected = answers(path, inputs)[0]
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max(), drawn.parts
    assert drawn.batch is not None or isinstance(gm.meta["dynamic"]["x"][0], str)
