"""ai-edge-quantizer's full int8 quantization of a float .tflite file, run by LiteRT."""

from pathlib import Path
from typing import Any

import harness
import numpy as np

KEY = "serving_default"


def signed_up(file: Path, out: Path) -> Path:
    """A copy of the file with the signature that the quantizer calibrates through, where it has none."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model: Any = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    if not model.signatureDefs:
        graph, signature = model.subgraphs[0], schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = KEY, 0
        signature.inputs = [_named(schema, graph, index) for index in graph.inputs]
        signature.outputs = [_named(schema, graph, index) for index in graph.outputs]
        model.signatureDefs = [signature]
    packer = flatbuffers.Builder(1 << 16)
    packer.Finish(model.Pack(packer), b"TFL3")
    out.write_bytes(bytes(packer.Output()))
    return out


def _named(schema: Any, graph: Any, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = graph.tensors[index].name, index
    return entry


def interpreter(file: Path) -> Any:
    """The file in LiteRT with its own choice of kernels, on one thread."""
    from ai_edge_litert.interpreter import Interpreter

    opened = Interpreter(model_path=str(file), num_threads=1)
    opened.allocate_tensors()
    return opened


def run(file: Path, inputs: np.ndarray) -> np.ndarray:
    """Float outputs of a file that takes one float or int8 input at a time."""
    opened = interpreter(file)
    (taken,), (given,) = opened.get_input_details(), opened.get_output_details()
    results = []
    for x in inputs:
        opened.set_tensor(taken["index"], _codes(x[None], taken))
        opened.invoke()
        results.append(_numbers(opened.get_tensor(given["index"]), given))
    return np.concatenate(results)


def _codes(x: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    if detail["dtype"] == np.float32:
        return x
    scale, zero_point = detail["quantization"]
    limits = np.iinfo(detail["dtype"])
    codes: np.ndarray = np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max)
    return codes.astype(detail["dtype"])


def _numbers(value: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    if detail["dtype"] == np.float32:
        return value.copy()
    scale, zero_point = detail["quantization"]
    return ((value.astype(np.float32) - zero_point) * scale).astype(np.float32)


def quantize(request: harness.Request) -> harness.Answer:
    """int8 weights by channel and int8 activations, min-max; `--float` is a .tflite file here.

    Option "octav": the quantizer's clipping algorithm instead of min-max.
    """
    from ai_edge_quantizer import quantizer, recipe

    floating, file = (
        signed_up(request.float_onnx, request.out / "float.tflite"),
        request.out / "quantized.tflite",
    )
    (taken,) = interpreter(floating).get_input_details()
    chosen = recipe.static_wi8_ai8()
    if "octav" in request.options:
        chosen = recipe.static_wi8_ai8(recipe.AlgorithmName.OCTAV)
    made = quantizer.Quantizer(floating, chosen)
    samples = [{taken["name"]: x[None]} for x in request.calibration]
    ranges = made.calibrate({KEY: samples}, num_threads=1)
    file.unlink(missing_ok=True)
    made.quantize(ranges).export_model(file)
    return harness.Answer(file, "litert", run(file, request.inputs))


if __name__ == "__main__":
    harness.serve(quantize, ["ai-edge-quantizer", "ai-edge-litert"])
