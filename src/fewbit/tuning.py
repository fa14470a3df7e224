"""Short fine-tuning after calibration: the quantized network learns the outputs of the float one, without labels.

Distillation from the unquantized network as in Hinton et al. (arXiv 1503.02531) and Mishra & Marr, "Apprentice"
(arXiv 1711.05852), on the outputs' squared error; weights and scales as in LSQ (arXiv 1902.08153).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fewbit.calibrate import shown
from fewbit.errors import CalibrationError
from fewbit.model.blocks import Block, as_module
from fewbit.model.learned import LearnedBlock
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.tuned_codebook import TunedCodebook
from fewbit.numerics.tuned_weight import TunedWeight
from fewbit.progress_file import Progress
from fewbit.reconstruct import Task, current, decibels, falling, learnable, run, store

_BATCH = 64
_WEIGHT_RATE = 5e-3  # Adam's, in steps of the codes
_BIAS_RATE, _SCALE_RATE = 1e-3, 1e-3
_SHIFT = 8  # images are moved by up to a size's eighth
_PART = "finetune"  # its name among the finished parts of a job
_COLOURS = 4  # channels that a tensor of images has at most


def finetune(
    task: Task,
    samples: tuple[Tensor, ...],
    epochs: int,
    progress: bool = False,
    kept: Progress | None = None,
) -> list[str]:
    """Train the whole network for some epochs; what it learned stays if its outputs on the samples became better.

    Batches of images [n, c, h, w] are mirrored and moved at random: the float network says what is right for them, too.
    ``kept`` gets the state after each epoch, and epochs that it has are not learned again.

    Returns:
        a sentence: the outputs' signal-to-noise ratio before and after.

    Raises:
        CalibrationError: the network's outputs became numbers that are not finite.
    """
    rows = learnable(task)
    if not rows:
        return ["nothing was fine-tuned: no weights have codes of few bits"]
    block = _whole(task.gm)
    teacher = as_module(_whole(task.float_gm), task.float_gm)
    weights = {
        path: (task.float_gm.get_submodule(path).get_parameter("weight"), task.qtensors[row.site])
        for path, row in rows.items()
    }
    learned = LearnedBlock(block, task.gm, weights, _tuned, task.fixed)
    before = _remaining(as_module(block, task.gm), teacher, samples)
    old = {f"{path}:{kind}": current(task, rows, path, kind) for path, kind, _ in learned.learned()}
    generator = torch.Generator().manual_seed(task.seed)
    order = [torch.randperm(len(samples[0]), generator=generator) for _ in range(epochs)]
    batches = [epoch.split(_BATCH) for epoch in order]
    optimizer, rates = _optimizer(learned)
    kept = kept or Progress()
    first = _restored(kept.parts[_PART], optimizer, generator) if _PART in kept.parts else 0
    for epoch in shown(range(first, epochs), epochs - first, "fine-tuning", progress):
        for i, chosen in enumerate(batches[epoch]):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * falling((epoch + i / len(batches[epoch])) / epochs)
            given = _varied(tuple(x[chosen] for x in samples), generator)
            with torch.no_grad():
                expected = teacher(*given)
            loss = noise(learned.module(*given), expected)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        kept.keep(_PART, _state(optimizer, generator, epoch + 1))
    store(task, rows, {f"{path}:{kind}": value.clone() for path, kind, value in learned.learned()})
    after = _remaining(as_module(block, task.gm), teacher, samples)
    if not math.isfinite(after):
        store(task, rows, old)
        raise CalibrationError("fine-tuning gives numbers that are not finite; use finetune=0")
    if after >= before:
        store(task, rows, old)
        return ["fine-tuning found nothing better than what rounding had given"]
    return [f"fine-tuned for {epochs} epochs: outputs {decibels(before):.1f} -> {decibels(after):.1f} dB"]


def noise(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """The power of the outputs' error, as a share of the power of the outputs around their mean: a scalar."""
    terms = [
        (f - e).square().mean() / (e - e.mean()).square().mean().clamp(min=1e-12)
        for f, e in zip(found, expected, strict=True)
        if e.is_floating_point()
    ]
    return torch.stack(terms).mean()


def _whole(gm: GraphModule) -> Block:
    """All of a graph as one block."""
    inside = tuple(n for n in gm.graph.nodes if n.op not in ("placeholder", "output"))
    inputs = tuple(n for n in gm.graph.nodes if n.op == "placeholder")
    return Block(inside, inputs, tuple(next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes))


def _remaining(student: GraphModule, teacher: GraphModule, samples: tuple[Tensor, ...]) -> float:
    """``noise`` on all samples, as they are."""
    return float(noise(run(student, list(samples)), run(teacher, list(samples))))


def _tuned(weight: Tensor, q: QTensor) -> TunedWeight | TunedCodebook:
    return TunedWeight(weight, q) if q.codebook is None else TunedCodebook(weight, q)


def _optimizer(learned: LearnedBlock[TunedWeight | TunedCodebook]) -> tuple[torch.optim.Adam, list[float]]:
    weights = learned.weights()
    groups = [
        {"params": [weight.v for weight in weights], "lr": _WEIGHT_RATE},
        {"params": [weight.change for weight in weights] + learned.scales(), "lr": _SCALE_RATE},
        {"params": learned.biases(), "lr": _BIAS_RATE},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    return optimizer, [float(group["lr"]) for group in optimizer.param_groups]


def _state(optimizer: torch.optim.Adam, generator: torch.Generator, epochs: int) -> dict[str, Tensor]:
    """All that the next epoch depends on."""
    state = {"epochs": torch.tensor(epochs), "generator": generator.get_state()}
    for i, parameter in enumerate(_parameters(optimizer)):
        values = {"value": parameter.detach(), **optimizer.state[parameter]}
        state |= {f"{i}:{name}": value.clone().contiguous() for name, value in values.items()}
    return state


def _restored(state: dict[str, Tensor], optimizer: torch.optim.Adam, generator: torch.Generator) -> int:
    """Put a state back where ``_state`` found it; how many epochs are over."""
    generator.set_state(state["generator"])
    for i, parameter in enumerate(_parameters(optimizer)):
        values = {name.partition(":")[2]: value for name, value in state.items() if name.startswith(f"{i}:")}
        with torch.no_grad():
            parameter.copy_(values.pop("value"))
        optimizer.state[parameter] = values
    return int(state["epochs"])


def _parameters(optimizer: torch.optim.Adam) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _varied(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """The inputs; images mirrored with probability one half and moved by some pixels, edges filled by reflection."""
    return tuple(_moved(x, generator) if _is_image(x) else x for x in inputs)


def _is_image(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_floating_point() and x.shape[1] <= _COLOURS and min(x.shape[2:]) >= _SHIFT


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    reach = min(x.shape[2:]) // _SHIFT
    rows, columns = torch.randint(2 * reach + 1, (2, len(x)), generator=generator)
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    wide = torch.nn.functional.pad(x, (reach, reach, reach, reach), mode="reflect")
    height, width = x.shape[2:]
    windows = [
        image[:, i : i + height, j : j + width]
        for image, i, j in zip(wide, rows.tolist(), columns.tolist(), strict=True)
    ]
    moved = torch.stack(windows)
    return torch.where(mirrored.reshape(-1, 1, 1, 1), moved.flip(3), moved)
