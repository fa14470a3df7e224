"""How far two models' outputs agree on the same inputs."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ModelError


@dataclass(frozen=True)
class Agreement:
    """Outputs of a model beside those of its baseline.

    `top1` is the fraction of predictions with the same class (None for outputs without classes), `sqnr_db`
    the power of the baseline's output over that of the difference, in dB: inf where nothing differs, -inf
    where the baseline is zero.
    """

    top1: float | None
    max_abs: float
    mean_abs: float
    sqnr_db: float

    @property
    def identical(self) -> bool:
        """Whether no output differed."""
        return self.max_abs == 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite `sqnr_db` is None, as JSON has no infinity."""
        return asdict(self) | {"sqnr_db": finite(self.sqnr_db), "identical": self.identical}

    def __str__(self) -> str:
        same = "" if self.top1 is None else f"same class {100 * self.top1:.2f} %, "
        differences = f"largest difference {self.max_abs:.3g}, mean {self.mean_abs:.3g}"
        return f"{same}SQNR {self.sqnr_db:.1f} dB, {differences}"


class SignalToNoise:
    """Powers of a signal and of its difference to a copy, summed over batches in float64."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.absolute = 0.0
        self.largest = 0.0
        self.count = 0

    def update(self, signal: Tensor, copy: Tensor) -> None:
        """Add one batch: two tensors of one shape, any real dtype."""
        signal, copy = signal.detach().double(), copy.detach().double()
        # Equal infinities (masked scores) do not differ, but their difference is nan.
        difference = torch.where(signal == copy, torch.zeros_like(signal), signal - copy)
        kept = signal[torch.isfinite(signal)]
        self.signal += float(kept.square().sum())
        self.noise += float(difference.square().sum())
        self.absolute += float(difference.abs().sum())
        self.largest = max(self.largest, float(difference.abs().max()) if difference.numel() else 0.0)
        self.count += difference.numel()

    @property
    def mean_abs(self) -> float:
        return self.absolute / self.count if self.count else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB; inf where nothing differs."""
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0 or math.isinf(self.noise):
            return -math.inf
        return 10.0 * (math.log10(self.signal) - math.log10(self.noise))


class AgreementMeter:
    """Agreement of two models, batch by batch."""

    def __init__(self) -> None:
        self._values = SignalToNoise()
        self._same = 0
        self._predictions = 0

    def update(self, baseline: Tensor, output: Tensor, class_axis: int | None) -> None:
        """Add one batch of outputs of one shape; raises ModelError where the shapes differ."""
        if baseline.shape != output.shape:
            raise ModelError(
                f"the model's output has shape {tuple(output.shape)}, but its baseline's "
                f"{tuple(baseline.shape)}: they must be comparable"
            )
        self._values.update(baseline, output)
        if class_axis is not None:
            same = baseline.argmax(class_axis) == output.argmax(class_axis)
            self._same += int(same.sum())
            self._predictions += same.numel()

    def compute(self) -> Agreement:
        top1 = self._same / self._predictions if self._predictions else None
        values = self._values
        return Agreement(top1, values.largest, values.mean_abs, values.sqnr_db)


def brief(agreement: Agreement) -> str:
    """Such as ``same class 99.00 %, SQNR 37.2 dB``, or ``identical``."""
    if agreement.identical:
        return "identical"
    same = "" if agreement.top1 is None else f"same class {100 * agreement.top1:.2f} %, "
    return f"{same}SQNR {agreement.sqnr_db:.1f} dB"


def finite(value: float) -> float | None:
    """The value, or None where JSON could not hold it."""
    return value if math.isfinite(value) else None
