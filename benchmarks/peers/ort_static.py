"""onnxruntime's quantize_static in its best setting: Q/DQ, per channel, U8 activations, S8 weights."""

from collections.abc import Iterator
from typing import Any

import harness
import numpy as np


def quantize(request: harness.Request) -> harness.Answer:
    """Options: reduce_range (7-bit weights), u8u8 (unsigned weights), s8s8 (the package's default types)."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, images: np.ndarray) -> None:
            self.batches: Iterator[np.ndarray] = iter(harness.batches(images, 32))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch}

    prepared, file = request.out / "prepared.onnx", request.out / "quantized.onnx"
    quant_pre_process(str(request.float_onnx), str(prepared), skip_symbolic_shape=True)
    weights = QuantType.QUInt8 if "u8u8" in request.options else QuantType.QInt8
    activations = QuantType.QInt8 if "s8s8" in request.options else QuantType.QUInt8
    quantize_static(
        str(prepared), str(file), Reader(request.calibration), quant_format=QuantFormat.QDQ, per_channel=True,
        reduce_range="reduce_range" in request.options, activation_type=activations, weight_type=weights,
        calibrate_method=CalibrationMethod.MinMax,
    )  # fmt: skip
    prepared.unlink()
    return harness.Answer(file, "onnxruntime", harness.run_onnx(file, request.inputs))


if __name__ == "__main__":
    harness.serve(quantize, ["onnxruntime"])
