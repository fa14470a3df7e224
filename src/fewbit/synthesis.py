"""Synthetic calibration inputs, learned from a model's batch-norm statistics: for when there is no data at all.

Statistics as in Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework" (arXiv 2001.00281); a class with a
soft label for each input as in Zhong et al., "IntraQ" (arXiv 2111.09136).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from fewbit.checkpoint import fingerprint
from fewbit.errors import ArtifactError, CalibrationError, DataError, ModelError
from fewbit.model.readers import as_module
from fewbit.model.readers.torch import read
from fewbit.model.simulate import QuantizedModel
from fewbit.progress import shown
from fewbit.training.model import TrainableModel

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CLASS_WEIGHT = 0.01  # more makes confident pictures whose statistics are wrong, and then the ranges are too
RATE = 0.2  # Adam's step, in units of the inputs' own spread
LEAST_CONFIDENCE = 0.8  # labels are soft, so that some inputs are easy and some are not
_KEY = "fewbit.synthesis"


@dataclass(frozen=True)
class _Settings:
    """What the result depends on besides the model."""

    samples: int
    seed: int
    steps: int
    batch_size: int
    class_conditional: bool
    shape: tuple[int, ...]


def synthesize(
    model: Any,
    example: Tensor | tuple[Tensor, ...] | None = None,
    *,
    samples: int = 1024,
    seed: int = 0,
    steps: int = 60,
    batch_size: int = 64,
    class_conditional: bool = True,
    device: str | torch.device = "cpu",
    resume: str | Path | None = None,
    progress: bool = True,
) -> Tensor:
    """Inputs on which ``model``'s batch norms see what they saw in training: float32 [samples, ...] on the CPU.

    ``model``: what ``fewbit.quantize`` takes, with its batch norms and one float input; left as it is. ``example``: an
    input, of which only the shape counts; by default what the model was read with. Each batch of ``batch_size`` is
    learned on its own in ``steps`` steps; memory is that of training the inputs of one batch. ``class_conditional``:
    where the model gives one number a class, every input also gets a class to look like, all equally often.
    ``resume``: a file that keeps the batches that are done; the same call goes on from there, with the same result.

    Raises ``ModelError`` where there is no batch norm to learn from, ``DataError`` without a usable example or
    samples, ``CalibrationError`` where learning diverges.
    """
    gm, shape = _graph(model, example)
    settings = _Settings(samples, seed, steps, batch_size, class_conditional, shape)
    _check(settings)
    gm.to(device)
    target = _Target(gm, class_conditional, device)
    kept = _Kept(resume, fingerprint(gm, [json.dumps(asdict(settings))]))
    done = kept.load()
    sizes = [min(batch_size, samples - start) for start in range(0, samples, batch_size)]
    todo = list(enumerate(sizes))[len(done) :]
    ticks = iter(shown(range(len(todo) * steps), len(todo) * steps, "learning inputs", progress))
    start = _location(target, shape, device)
    for index, size in todo:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        done.append(
            _learn(target, (size, *shape), start, generator, itertools.islice(ticks, steps), settings)
        )
        kept.save(done)
    next(ticks, None)  # lets the bar close
    kept.remove()
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return torch.cat(done)[order]


def statistics_error(model: Any, inputs: Tensor) -> float:
    """How far the statistics of ``inputs`` at the batch norms are from those of training, relative; 0.0 is equal.

    The root mean square, over channels and batch norms, of the errors of mean and standard deviation, each in units
    of the training data's standard deviation. Real inputs of the training data's kind have about 0.15.
    """
    gm, _ = _graph(model, inputs[:4])
    with torch.no_grad():
        return math.sqrt(float(_Target(gm, False, "cpu").run(inputs)[0]))


class _Target:
    """What inputs should do in the model: the statistics of its batch norms, and a class for each of them."""

    def __init__(self, gm: GraphModule, class_conditional: bool, device: str | torch.device) -> None:
        self.gm, self.device = gm, device
        self.class_conditional = class_conditional
        self._seen: list[Tensor] = []
        for norm in _norms(gm):
            norm.register_forward_pre_hook(self._watch)

    def _watch(self, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
        # Two sums of what is about zero: as exact as Welford's recurrence, and eight times as fast on a CPU.
        apart = inputs[0] - norm.running_mean.reshape([-1] + [1] * (inputs[0].dim() - 2))
        shift = apart.mean(axes)
        var = (apart.square().mean(axes) - shift.square()).clamp_min(0.0)
        spread = (norm.running_var + norm.eps).sqrt()
        # The derivative of a root at zero is infinite, and a constant channel has no variance at first.
        std = (var + norm.eps).sqrt()
        off = (shift / spread).square() + ((std - spread) / spread).square()
        self._seen.append(off.mean())

    def run(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """The error of the statistics, and the model's output."""
        self._seen.clear()
        output = self.gm(inputs)
        return torch.stack(self._seen).mean(), output

    def labels(self, output: Any, generator: torch.Generator) -> Tensor | None:
        """Soft labels for a batch with that output, classes in turn: float32 [n, classes]; None without classes."""
        if not self.class_conditional or not isinstance(output, Tensor) or output.dim() != 2:
            return None
        count, classes = output.shape
        if classes < 2:
            return None
        first = int(torch.randint(classes, (1,), generator=generator))
        chosen = F.one_hot((torch.arange(count) + first) % classes, classes).float()
        sure = LEAST_CONFIDENCE + (1 - LEAST_CONFIDENCE) * torch.rand(count, 1, generator=generator)
        return (chosen * sure + (1 - chosen) * (1 - sure) / (classes - 1)).to(self.device)


def _learn(
    target: _Target,
    shape: tuple[int, ...],
    start: tuple[float, float],
    generator: torch.Generator,
    ticks: Iterator[Any],
    settings: _Settings,
) -> Tensor:
    """One batch. A picture is a sum of layers from coarse to fine, which learns shapes sooner than pixels do."""
    device = target.device
    axes = _spatial(shape)
    offset, scale = start
    base = _noise(shape, axes, generator).to(device)
    layers = [torch.zeros(s, device=device, requires_grad=True) for s in _sizes(shape, axes)]
    optimizer = torch.optim.Adam(layers, betas=(0.9, 0.99))
    goal: Tensor | None = None
    for step, _ in enumerate(ticks):
        warm = min(1.0, (step + 1) / (0.1 * settings.steps))
        optimizer.param_groups[0]["lr"] = (
            RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / settings.steps)))
        )
        picture = offset + scale * _compose(base, layers, axes)
        loss, output = target.run(_moved(picture, axes, generator))
        if step == 0:
            goal = target.labels(output, generator)
        if goal is not None:
            loss = loss + CLASS_WEIGHT * F.kl_div(_log_probabilities(output), goal, reduction="batchmean")
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(
                f"learning synthetic inputs diverged at step {step}: the model gives {float(loss.detach())} on "
                "inputs of about the right statistics; look for extreme weights or batch norm statistics"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (offset + scale * _compose(base, layers, axes)).cpu().contiguous()


def _location(target: _Target, shape: tuple[int, ...], device: str | torch.device) -> tuple[float, float]:
    """Offset and scale of noise that suits the model best: some take numbers around 0, some 0..1, some 0..255."""
    generator = torch.Generator().manual_seed(0)
    noise = _noise((16, *shape), _spatial((16, *shape)), generator).to(device)
    best, offset, chosen = math.inf, 0.0, 1.0
    with torch.no_grad():
        for ratio, exponent in itertools.product((0.0, 1.0, 2.0, -1.0, -2.0), range(-6, 9)):
            scale = 2.0**exponent
            loss = float(target.run(ratio * scale + scale * noise)[0])
            # Convolutions hardly see a constant: an offset must be clearly better to be believed.
            if loss < (best if ratio * chosen == offset else 0.8 * best):
                best, offset, chosen = loss, ratio * scale, scale
    return offset, chosen


def _log_probabilities(output: Tensor) -> Tensor:
    """Of logits, of logarithms of probabilities (which stay as they are) or of probabilities, whichever they are."""
    values = output.detach()
    if bool((values >= 0).all()) and bool((values.sum(1) - 1).abs().max() < 1e-3):
        output = output.clamp_min(1e-12).log()
    return F.log_softmax(output, 1)


def _spatial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes along which neighbours are alike: all but the batch and the channels, which come first or last."""
    rank = len(shape)
    if rank < 3:
        return ()
    channels = rank - 1 if shape[-1] < shape[1] else 1
    return tuple(axis for axis in range(1, rank) if axis != channels)


def _sizes(shape: tuple[int, ...], axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the layers, from fine to coarse: each half as large as the one before, down to about 4 pixels."""
    largest = max((shape[axis] for axis in axes), default=1)
    factors = [2**k for k in range(16) if k == 0 or largest >= 4 * 2**k]
    return [tuple(-(-n // f) if a in axes else n for a, n in enumerate(shape)) for f in factors]


def _noise(shape: tuple[int, ...], axes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random pictures with more of the coarse than of the fine, as photographs have; standard deviation 1."""
    parts = [
        torch.randn(size, generator=generator) * 2.0**n for n, size in enumerate(_sizes(shape, axes)[:3])
    ]
    noise = _compose(torch.zeros(shape), parts, axes)
    return noise / noise.std().clamp_min(1e-6) if noise.numel() > 1 else noise


def _compose(base: Tensor, layers: list[Tensor], axes: tuple[int, ...]) -> Tensor:
    for layer in layers:
        base = base + _stretched(layer, base.shape, axes)
    return base


def _stretched(layer: Tensor, shape: torch.Size, axes: tuple[int, ...]) -> Tensor:
    """A layer at full size, linear between its points."""
    if layer.shape == shape:
        return layer
    front = [axis for axis in range(layer.dim()) if axis not in axes]
    order = [*front, *axes]
    moved = layer.permute(order)
    inner = moved.reshape(moved.shape[0], -1, *moved.shape[len(front) :])
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(axes)]
    full = F.interpolate(inner, [shape[axis] for axis in axes], mode=mode, align_corners=False)
    back = [order.index(axis) for axis in range(layer.dim())]
    return full.reshape(*[shape[axis] for axis in order]).permute(back)


def _moved(picture: Tensor, axes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Shifted by up to a sixteenth around the edge and mirrored at random, so that no pixel is learned alone."""
    for axis in axes:
        most = picture.shape[axis] // 16
        shift = int(torch.randint(-most, most + 1, (1,), generator=generator))
        picture = picture.roll(shift, axis) if shift else picture
    if len(axes) > 1 and int(torch.randint(2, (1,), generator=generator)):
        picture = picture.flip(axes[-1])
    return picture


def _graph(model: Any, example: Tensor | tuple[Tensor, ...] | None) -> tuple[GraphModule, tuple[int, ...]]:
    """The model as a graph with its batch norms, in eval mode, weights fixed; and the shape of one input."""
    if isinstance(model, QuantizedModel | TrainableModel):
        raise ModelError("the model is quantized already; learn inputs from the float model it came from")
    inputs = (example,) if isinstance(example, Tensor) else example
    module = as_module(model, inputs)
    inputs = inputs or getattr(module, "meta", {}).get("example")
    if not inputs:
        raise DataError("synthetic inputs need the shape of an input: give example=torch.zeros(1, 3, 32, 32)")
    if len(inputs) != 1 or not inputs[0].is_floating_point() or inputs[0].dim() < 2:
        found = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in inputs)
        raise ModelError(
            f"synthetic inputs can be learned for models with one float input of a batch; this one takes {found}: "
            "give calibration data"
        )
    gm = copy.deepcopy(module) if isinstance(module, GraphModule) else read(module, (inputs[0][:4],))
    gm.eval().requires_grad_(False)
    if not _norms(gm):
        raise ModelError("the model has no batch norm statistics to learn inputs from: give calibration data")
    return gm, tuple(inputs[0].shape[1:])


def _norms(gm: GraphModule) -> list[Any]:
    """Batch norms with statistics of training, each once."""
    return [m for m in gm.modules() if isinstance(m, BATCH_NORM) and m.running_mean is not None]


def _check(settings: _Settings) -> None:
    for name in ("samples", "steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise DataError(f"{name} is {getattr(settings, name)}, expected at least 1")
    if settings.batch_size < 8 <= settings.samples:
        raise DataError(
            f"batch_size is {settings.batch_size}: statistics of fewer than 8 inputs at a time are all alike; "
            "64 is usual"
        )


class _Kept:
    """The batches that are done, in a file that an interrupted call goes on from."""

    def __init__(self, path: str | Path | None, owner: str) -> None:
        self.path, self.owner = None if path is None else Path(path), owner

    def load(self) -> list[Tensor]:
        """Raises ``ArtifactError`` for a damaged file and ``CalibrationError`` for one of another call."""
        if self.path is None or not self.path.exists():
            return []
        try:
            with safe_open(str(self.path), framework="pt") as file:
                owner = (file.metadata() or {})[_KEY]
                batches = [file.get_tensor(f"{n}") for n in range(len(file.keys()))]
        except (SafetensorError, OSError, KeyError) as error:
            raise ArtifactError(
                f"{self.path}: damaged synthetic inputs ({error}); delete it to start anew"
            ) from error
        if owner != self.owner:
            raise CalibrationError(
                f"{self.path}: inputs of another model or other settings; delete it, or give another file"
            )
        return batches

    def save(self, batches: list[Tensor]) -> None:
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            save_file({f"{n}": b for n, b in enumerate(batches)}, str(temporary), metadata={_KEY: self.owner})
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.path}: the inputs cannot be written ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
