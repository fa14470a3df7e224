"""One process that times training steps in turn: float, fewbit, torchao's PT2E QAT and Brevitas, on one network.

Runs in the peers' environment with fewbit's sources beside it, so that all share one PyTorch; prints one line of JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from models import build, weights_file
from torch import Tensor, nn


def fewbit_model(net: nn.Module, x: Tensor, few: bool) -> nn.Module:
    import fewbit

    recipe = {"weights": "int4", "activations": "uint4", "ends": "int8"} if few else {}
    return fewbit.quantize(net, x, trainable=True, progress=False, **recipe)


def torchao_model(net: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(net.train(), (x,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    move_exported_model_to_train(prepared)
    return prepared


def brevitas_model(net: nn.Module, x: Tensor) -> nn.Module:
    from brevitas.fx.brevitas_tracer import symbolic_trace
    from brevitas.graph.quantize import layerwise_quantize

    model = layerwise_quantize(symbolic_trace(net.eval()))
    with torch.no_grad():
        model(x)
    return model.train()


MAKERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "float": lambda net, x: net.train(),
    "fewbit W8A8": lambda net, x: fewbit_model(net, x, False),
    "fewbit W4A4": lambda net, x: fewbit_model(net, x, True),
    "torchao PT2E QAT": torchao_model,
    "Brevitas": brevitas_model,
}


def stepper(model: nn.Module, x: Tensor, labels: Tensor, bfloat16: bool) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch, 3, args.size, args.size)
    labels = torch.randint(10, (args.batch,))
    steps: dict[str, Callable[[], None]] = {}
    failed: dict[str, str] = {}
    for name, make in MAKERS.items():
        try:
            steps[name] = stepper(
                make(build(args.network, weights_file(args.network)), x), x, labels, args.bfloat16
            )
            for _ in range(3):
                steps[name]()
        except Exception as error:  # a peer that fails is a row that says so
            steps.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    result: dict[str, Any] = {"times": times, "failed": failed}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
