"""ExecuTorch's XNNPACK recipe (int8, static, per channel), run by its own runtime at batch size 1."""

from pathlib import Path
from typing import Any

import harness
import numpy as np


def lower(module: Any, calibration: np.ndarray, kind: str, file: Path) -> Path:
    """Exports through the XNNPACK recipe named `kind` ("FP32", "PT2E_INT8_STATIC_PER_CHANNEL", ...)."""
    import torch
    from executorch.backends.xnnpack.recipes import XNNPackRecipeType
    from executorch.export import ExportRecipe, export

    examples = [(torch.from_numpy(x),) for x in harness.batches(calibration, 1)]
    session = export(module, examples, ExportRecipe.get_recipe(XNNPackRecipeType[kind]))
    session.save_to_pte(str(file))
    return file


def run(file: Path, inputs: np.ndarray) -> np.ndarray:
    """Outputs of a .pte file with a batch of one."""
    import torch
    from executorch.extension.pybindings import portable_lib

    module: Any = portable_lib._load_for_executorch(str(file))
    images = harness.batches(inputs, 1)
    return np.concatenate([module.forward([torch.from_numpy(x)])[0].numpy().copy() for x in images])


def quantize(request: harness.Request) -> harness.Answer:
    """Also writes float.pte, the same recipe in float."""
    lower(request.module(), request.calibration[:1], "FP32", request.out / "float.pte")
    file = request.out / "quantized.pte"
    lower(request.module(), request.calibration, "PT2E_INT8_STATIC_PER_CHANNEL", file)
    return harness.Answer(file, "executorch", run(file, request.inputs))


if __name__ == "__main__":
    harness.serve(quantize, ["executorch", "torch"])
