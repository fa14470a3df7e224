"""GPTQ of one linear layer by a peer's own code, in symmetric int4: weights and tokens in, rounded weights out."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BITS = 4


def llmcompressor(weight: Tensor, tokens: Tensor, group: int | None) -> Tensor:
    """Its modifier's own functions, with activation order and static groups, ranges by its default observer."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=BITS,
        symmetric=True,
        strategy="group" if group else "channel",
        group_size=group,
        actorder="weight",
    )
    rows = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale, zero = calculate_qparams(rows.amin(2), rows.amax(2), args)
    hessian = tokens.T @ tokens * (2 / len(tokens))
    found = quantize_weight(
        weight.clone().unsqueeze(0), hessian.unsqueeze(0), scale.unsqueeze(0), zero.unsqueeze(0), None, args
    )
    return found[0][0]


def neural_compressor(weight: Tensor, tokens: Tensor, group: int | None) -> Tensor:
    """Its GPTQ class, with activation order and static groups."""
    from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    gptq = GPTQ(layer, weight)
    options = {
        "bits": BITS,
        "sym": True,
        "perchannel": True,
        "mse": False,
        "dtype": "int",
        "group_size": group or -1,
    }
    gptq.quantizer.configure({**options, "double_quant_sym": True, "use_double_quant": False})
    gptq.add_batch(tokens, None)
    return gptq.fasterquant(
        weight.clone(), groupsize=group or -1, act_order=True, static_groups=group is not None
    )[-1]


def brevitas(weight: Tensor, tokens: Tensor, group: int | None) -> Tensor:
    """Its gptq_mode around a quantized linear layer, with activation order."""
    import brevitas.nn as qnn
    from brevitas.graph.gptq import gptq_mode
    from brevitas.quant import Int8WeightPerChannelFloat

    if group:
        raise NotImplementedError("its groups are of another kind: measured per channel only")
    layer = qnn.QuantLinear(
        weight.shape[1], weight.shape[0], bias=False,
        weight_quant=Int8WeightPerChannelFloat.let(bit_width=BITS),
    )  # fmt: skip
    layer.weight.data = weight.clone()
    model = nn.Sequential(layer).eval()
    with torch.no_grad(), gptq_mode(model, act_order=True, use_quant_activations=False) as gptq:
        for _ in range(gptq.num_layers):
            gptq.model(tokens)
            gptq.update()
    return layer.quant_weight().value.detach()


def nncf(weight: Tensor, tokens: Tensor, group: int | None) -> Tensor:
    """nncf.compress_weights(gptq=True) of an OpenVINO model with one product; its weights are read back."""
    import nncf as package
    import openvino as ov
    from openvino import opset13 as op

    x = op.parameter([1, -1, weight.shape[1]], np.float32, name="x")
    product = op.matmul(x, op.constant(weight.numpy().copy()), False, True)
    model = ov.Model([op.result(product)], [x])
    packed = package.compress_weights(
        model, mode=package.CompressWeightsMode.INT4_SYM, ratio=1.0, group_size=group or -1, all_layers=True,
        gptq=True, dataset=package.Dataset([tokens.numpy()[None]]),
    )  # fmt: skip
    identity = np.eye(weight.shape[1], dtype=np.float32)[None]
    options = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    rows = ov.compile_model(packed, "CPU", options)(identity)[0][0]
    return torch.from_numpy(rows.T.copy())


def fewbit(weight: Tensor, tokens: Tensor, group: int | None, observer: str = "mse") -> Tensor:
    """Ours, as the others: second moments, ranges (of least squared error), rounding."""
    from fewbit.numerics import Scheme
    from fewbit.observers import make_observer
    from fewbit.rounding import round_weight

    scheme = Scheme("int4", "group" if group else "channel", group_size=group)
    hessian = tokens.T @ tokens / len(tokens)
    importance = {"importance": hessian.diagonal().expand(weight.shape)} if observer == "importance" else {}
    lo, hi = make_observer(observer, scheme).bounds_of(weight, importance)
    return round_weight("gptq", weight, scheme, lo, hi, {"hessian": hessian}).dequantize()


def fewbit_minmax(weight: Tensor, tokens: Tensor, group: int | None) -> Tensor:
    """Ours, with the weights' extremes as ranges."""
    return fewbit(weight, tokens, group, "minmax")


def fewbit_importance(weight: Tensor, tokens: Tensor, group: int | None) -> Tensor:
    """Ours, with ranges weighted by the second moments of the inputs."""
    return fewbit(weight, tokens, group, "importance")


PEERS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "fewbit": (fewbit, "fewbit"),
    "fewbit, minmax": (fewbit_minmax, "fewbit"),
    "fewbit, importance": (fewbit_importance, "fewbit"),
    "llm-compressor": (llmcompressor, "llmcompressor"),
    "neural-compressor": (neural_compressor, "neural-compressor-pt"),
    "brevitas": (brevitas, "brevitas"),
    "nncf": (nncf, "nncf"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--weight", required=True, type=Path, help="float32 .npy [outputs, inputs]")
    parser.add_argument("--tokens", required=True, type=Path, help="float32 .npy [tokens, inputs]")
    parser.add_argument(
        "--group", type=int, help="inputs that share a scale; without it, a scale per channel"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True, type=Path, help=".npy for the rounded weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weight, tokens = (
        torch.from_numpy(np.load(path, allow_pickle=False)) for path in (args.weight, args.tokens)
    )
    run, package = PEERS[args.peer]
    # A small layer first: imports and what a library does once are not counted.
    run(weight[:256, :256].contiguous(), tokens[:512, :256].contiguous(), args.group)
    started, cpu = time.perf_counter(), time.process_time()
    rounded = run(weight, tokens, args.group)
    result: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "version": version(package),
    }
    np.save(args.out, rounded.detach().to(torch.float32).numpy())
    print(json.dumps(result), file=sys.stdout)


if __name__ == "__main__":
    main()
