"""AIMET's quantization simulation of an ONNX model, exported as Q/DQ, run by ONNX Runtime."""

import harness
import numpy as np


def quantize(request: harness.Request) -> harness.Answer:
    """Min-max, AIMET's default configuration, integer constants; the simulation is its own session.

    Option "int4": 4-bit weights.
    """
    import aimet_onnx
    import onnx

    sim = aimet_onnx.QuantizationSimModel(
        onnx.load(str(request.float_onnx)),
        param_type="int4" if "int4" in request.options else "int8",
        activation_type="int8",
        quant_scheme="min_max",
    )
    sim.compute_encodings([{"input": batch} for batch in harness.batches(request.calibration, 1)])
    simulated = np.concatenate(
        [sim.session.run(None, {"input": b})[0] for b in harness.batches(request.inputs)]
    )
    file = request.out / "quantized.onnx"
    onnx.save(sim.to_onnx_qdq(export_int32_bias=True, prequantize_constants=True), str(file))
    return harness.Answer(file, "onnxruntime", harness.run_onnx(file, request.inputs), simulated)


if __name__ == "__main__":
    harness.serve(quantize, ["aimet-onnx", "onnxruntime"])
