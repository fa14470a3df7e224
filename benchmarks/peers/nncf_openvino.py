"""NNCF's post-training quantization of an OpenVINO model, run by OpenVINO on the CPU."""

import os

import harness
import numpy as np


def run(file: str, inputs: np.ndarray) -> np.ndarray:
    """Outputs of an OpenVINO file, float parts in float32."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", "2")),
    }
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return np.concatenate([compiled([b])[0] for b in harness.batches(inputs)])


def quantize(request: harness.Request) -> harness.Answer:
    """nncf.quantize with its defaults; also writes float.xml, the float model as OpenVINO has it.

    Option "transformer" sets the model type.
    """
    import nncf
    import openvino

    model = openvino.convert_model(str(request.float_onnx))
    openvino.save_model(model, str(request.out / "float.xml"), compress_to_fp16=False)
    data = nncf.Dataset(harness.batches(request.calibration, 1))
    kind = nncf.ModelType.TRANSFORMER if "transformer" in request.options else None
    quantized = nncf.quantize(model, data, subset_size=len(request.calibration), model_type=kind)
    file = request.out / "quantized.xml"
    openvino.save_model(quantized, str(file), compress_to_fp16=False)
    return harness.Answer(file, "openvino", run(str(file), request.inputs))


if __name__ == "__main__":
    harness.serve(quantize, ["nncf", "openvino"])
