"""NVIDIA ModelOpt's quantization of an ONNX model, run by ONNX Runtime."""

import harness


def quantize(request: harness.Request) -> harness.Answer:
    """int8, min-max ranges, float parts kept in float32, calibrated on the CPU."""
    from modelopt.onnx.quantization import quantize as modelopt_quantize

    file = request.out / "quantized.onnx"
    modelopt_quantize(
        str(request.float_onnx), "int8", request.calibration, "minmax",
        calibration_eps=["cpu"], high_precision_dtype="fp32", log_level="ERROR",
        calibration_shapes="input:" + "x".join(str(n) for n in request.calibration.shape),
        output_path=str(file),
    )  # fmt: skip
    return harness.Answer(file, "onnxruntime", harness.run_onnx(file, request.inputs))


if __name__ == "__main__":
    harness.serve(quantize, ["nvidia-modelopt", "onnxruntime"])
