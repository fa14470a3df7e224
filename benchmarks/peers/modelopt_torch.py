"""NVIDIA ModelOpt's quantization of a torch module, exported by torch.onnx, run by ONNX Runtime."""

from typing import Any

import harness


def quantize(request: harness.Request) -> harness.Answer:
    """INT8_DEFAULT_CFG; the exporter is the scripting one, which ModelOpt's symbolic functions are for."""
    import modelopt.torch.quantization as mtq
    import torch

    torch.backends.mha.set_fastpath_enabled(False)  # has no ONNX form, and its weights would not be quantized

    def feed(module: Any) -> None:
        harness.run_module(module, request.calibration)

    module = mtq.quantize(request.module(), mtq.INT8_DEFAULT_CFG, feed)
    simulated = harness.run_module(module, request.inputs)
    file = request.out / "quantized.onnx"
    with torch.no_grad():
        torch.onnx.export(
            module, (torch.from_numpy(request.calibration[:2]),), str(file), dynamo=False, opset_version=20,
            input_names=["input"], dynamic_axes={"input": {0: "batch"}},
        )  # fmt: skip
    return harness.Answer(file, "onnxruntime", harness.run_onnx(file, request.inputs), simulated)


if __name__ == "__main__":
    harness.serve(quantize, ["nvidia-modelopt", "torch", "onnxruntime"])
