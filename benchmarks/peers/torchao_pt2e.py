"""torchao's PT2E quantization for x86 CPUs, exported by torch.onnx, run by ONNX Runtime."""

import harness
import numpy as np


def quantize(request: harness.Request) -> harness.Answer:
    """The X86InductorQuantizer's default configuration; option "reduce_range" gives its 7-bit activations."""
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = (torch.from_numpy(request.calibration[:2]),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    exported = torch.export.export(request.module(), example, dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer()
    reduced = "reduce_range" in request.options
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=reduced))
    prepared = prepare_pt2e(exported, quantizer)
    harness.run_module(prepared, request.calibration)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    simulated = harness.run_module(converted, request.inputs)
    file = request.out / "quantized.onnx"
    torch.onnx.export(
        converted, example, str(file), dynamo=True, dynamic_shapes=shapes, input_names=["input"],
        opset_version=21, external_data=False, verbose=False,
    )  # fmt: skip
    outputs: np.ndarray = harness.run_onnx(file, request.inputs)
    return harness.Answer(file, "onnxruntime", outputs, simulated)


if __name__ == "__main__":
    harness.serve(quantize, ["torchao", "torch", "onnxruntime"])
