"""Writes a network as a float ONNX file with a free batch dimension: what every ONNX peer starts from."""

from pathlib import Path

import models
import numpy as np
import torch


def export(module: torch.nn.Module, example: np.ndarray, path: Path, opset: int = 21) -> Path:
    """Exports by torch.onnx.export (dynamo), checks the file against the module, returns its path.

    `example` is float32 [2 or more, ...]; its first dimension becomes free. ValueError where they differ.
    """
    import onnxruntime

    path.parent.mkdir(parents=True, exist_ok=True)
    x = torch.from_numpy(example)
    batch = torch.export.Dim("batch", min=1, max=65536)
    torch.onnx.export(
        module, (x,), str(path), dynamo=True, dynamic_shapes=({0: batch},), input_names=["input"],
        output_names=["output"], opset_version=opset, external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        wanted = module(x).numpy()
    found = session.run(None, {"input": example})[0]
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if error > 1e-4:
        raise ValueError(
            f"{path}: the exported file differs from the network by {error:.1e} of its largest output"
        )
    return path


def cached(name: str, example: np.ndarray, folder: Path) -> tuple[Path, Path]:
    """The float ONNX file of a named network and its weights as safetensors, in `folder`; written once."""
    from safetensors.torch import save_model

    file, weights = folder / "float.onnx", folder / "weights.safetensors"
    if not file.exists() or not weights.exists():
        module = models.build(name)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(module, str(weights))
        export(module, example[:2], file)
    return file, weights
