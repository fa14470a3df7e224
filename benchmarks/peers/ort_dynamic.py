"""onnxruntime.quantization.quantize_dynamic: ranges of activations at run time, no calibration."""

import harness


def quantize(request: harness.Request) -> harness.Answer:
    """Per channel; option "linear" leaves convolutions in float (there is no S8 weight kernel for them)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, file = request.out / "prepared.onnx", request.out / "quantized.onnx"
    quant_pre_process(str(request.float_onnx), str(prepared), skip_symbolic_shape=True)
    if "linear" in request.options:
        operators, weights = ["MatMul", "Gemm"], QuantType.QInt8
    else:
        operators, weights = ["Conv", "MatMul", "Gemm"], QuantType.QUInt8
    # Stored shapes of weights that quantize_dynamic transposes would contradict the new ones: drop them.
    model = onnx.load(str(prepared))
    del model.graph.value_info[:]
    onnx.save(model, str(prepared))
    quantize_dynamic(str(prepared), str(file), operators, per_channel=True, weight_type=weights)
    prepared.unlink()
    return harness.Answer(file, "onnxruntime", harness.run_onnx(file, request.inputs))


if __name__ == "__main__":
    harness.serve(quantize, ["onnxruntime"])
