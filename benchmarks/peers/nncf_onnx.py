"""NNCF's post-training quantization of an ONNX model, run by ONNX Runtime."""

import harness


def quantize(request: harness.Request) -> harness.Answer:
    """nncf.quantize with its defaults (fast bias correction on); option "transformer" sets the model type."""
    import float_onnx
    import nncf
    import onnx

    data = nncf.Dataset(harness.batches(request.calibration, 1), lambda x: {"input": x})
    kind = nncf.ModelType.TRANSFORMER if "transformer" in request.options else None
    # At opset 21 NNCF 3.4 writes QuantizeLinear nodes whose output type contradicts their zero point.
    source = float_onnx.export(
        request.module(), request.calibration[:2], request.out / "float18.onnx", opset=18
    )
    model = onnx.load(str(source))
    quantized = nncf.quantize(model, data, subset_size=len(request.calibration), model_type=kind)
    file = request.out / "quantized.onnx"
    onnx.save(quantized, str(file))
    return harness.Answer(file, "onnxruntime", harness.run_onnx(file, request.inputs))


if __name__ == "__main__":
    harness.serve(quantize, ["nncf", "onnxruntime"])
