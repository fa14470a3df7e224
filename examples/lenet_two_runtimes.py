"""A LeNet for CIFAR-10 from PyTorch, static int8, for ONNX Runtime and for LiteRT: do both predict the same?"""

from collections.abc import Sequence

import torch
from pictures import arguments, load
from torch import Tensor, nn

import fewbit
from fewbit.deploy import runner
from fewbit.targets import litert


def lenet() -> nn.Sequential:
    """Convolutions 3-6-16, linear layers 400-120-84-10; pictures float32 (n, 3, 32, 32)."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    model = lenet()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    options = arguments(__doc__ or "", argv)
    torch.manual_seed(0)
    (x, y), (test_x, test_y) = (
        (torch.from_numpy(i).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(n))
        for i, n in load("cifar10", options.data)
    )
    limit = 1000 if options.quick else len(x)
    model = trained(x[:limit], y[:limit], epochs=1 if options.quick else 4)
    test_x, test_y = test_x[:limit], test_y[:limit]

    quantized = fewbit.quantize(model, x[:512])
    fleet = fewbit.export(
        quantized, options.output / "lenet", targets=["onnx", "litert"], test=(test_x, test_y)
    )
    print(fleet)

    paths = {name: fleet[name].path for name in ("onnx", "litert")}
    runs = {
        "ONNX Runtime": runner(paths["onnx"]),
        "LiteRT, its fast kernels": runner(paths["litert"]),
        "LiteRT, its reference kernels": lambda x: litert.open_exact(paths["litert"])(x)[0],
    }
    answers = {name: run(test_x) for name, run in runs.items()}
    first, differing = answers["ONNX Runtime"], {}
    for name, answer in list(answers.items())[1:]:
        other = (answer.argmax(1) != first.argmax(1)).nonzero().flatten().tolist()
        differing[name] = len(other)
        print(f"{name}: {len(other)} of {len(first)} predictions differ from ONNX Runtime's, "
              f"{int((answer != first).sum())} of {first.numel()} outputs")  # fmt: skip
        for i in other[:5]:
            scores = [f"{o[i].argmax().item()} ({o[i].max():.3f})" for o in (first, answer)]
            print(f"  picture {i}, a {test_y[i]}: {scores[0]} and {scores[1]}")
    return differing


if __name__ == "__main__":
    main()
