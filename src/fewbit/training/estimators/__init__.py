"""How gradients pass through rounding, and what else learns: one estimator a file, with `Weights` or `Activations`."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from fewbit.errors import RecipeError
from fewbit.numerics.format import SMALLEST_SCALE, Format
from fewbit.numerics.fused_step import fused_step
from fewbit.numerics.qtensor import QTensor, fake_quantize
from fewbit.numerics.scheme import Scheme, blocks, unblocks
from fewbit.registry import Registry
from fewbit.training.oscillation import Oscillation

registry = Registry("fewbit.training.estimators", "estimator")


class Limit(Protocol):
    """The smallest scales that a kernel takes, from rows [C, n] and their scales [C, 1]: [C, 1]."""

    def __call__(self, rows: Tensor, scale: Tensor) -> Tensor: ...


class WeightEstimator(nn.Module, ABC):
    """From a latent float weight to the values of its format, with gradients for the weight and for what else learns.

    A plug-in's `Weights` fills in `parts`. `forward` and `hard` give the same values.

    Args:
        weight: float32, the latent weight that training begins with.
        q: codes and scales that rounding found for it.

    Attributes:
        progress: how far training has come, 0 to 1, for estimators that change on the way.
        limit: gives the smallest scales [C, 1] of rows that a kernel can take; None where all are fine.
        oscillation: stops codes that go back and forth; None where nothing does.
    """

    zero_point: Tensor
    lo: Tensor
    hi: Tensor

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        super().__init__()
        self.scheme: Scheme = q.scheme
        self.shape = tuple(q.shape)
        self.progress = 0.0
        self.limit: Limit | None = None
        self.oscillation: Oscillation | None = None
        self.register_buffer("zero_point", q.zero_point.detach().clone())
        zero_point = q.zero_point.detach().reshape(-1, 1)
        self.register_buffer("lo", self.scheme.qmin - zero_point, persistent=False)
        self.register_buffer("hi", self.scheme.qmax - zero_point, persistent=False)

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        """Whether it makes values of that format; by default of all that have a scale and are not learned."""
        return spec.scaled and not spec.learned

    @abstractmethod
    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values before scaling, less the zero point [C, n], and scales [C, 1]; their product is the quantized weight.

        ``rows``: float32 [C, n], the latent weight, one row for each scale. Differentiable.
        """

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight: float32, in the weight's shape."""
        values, scale = self._parts(weight)
        return unblocks(values * scale, weight.shape, self.scheme)

    @torch.no_grad()
    def hard(self, weight: Tensor) -> QTensor:
        """The same as codes."""
        values, scale = self._parts(weight)
        spec = self.scheme.spec
        codes = values + self.zero_point.reshape(-1, 1) if spec.integer else values
        codes = unblocks(spec.encode(codes), weight.shape, self.scheme)
        scales = scale.reshape(-1).expand(len(self.zero_point)).contiguous()
        return QTensor(codes, scales, self.zero_point.clone(), self.scheme, tuple(weight.shape))

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = self.parts(blocks(weight, self.scheme))
        if self.oscillation is not None:
            values = self.oscillation(values, self.training and torch.is_grad_enabled())
        return values, scale

    def watch(self, weight: Tensor, threshold: float | None) -> None:
        """Begin to watch for codes that oscillate; those that turn round in more than this share of steps freeze."""
        with torch.no_grad():
            values, _ = self.parts(blocks(weight, self.scheme))
        self.oscillation = Oscillation(values, threshold)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value before scaling, less the zero point: [C, 1]."""
        return self.lo, self.hi

    def rounded(self, v: Tensor) -> Tensor:
        """The nearest values of the format within its bounds; straight through where not clipped."""
        lo, hi = self.bounds()
        v = torch.minimum(torch.maximum(v, lo), hi)
        with torch.no_grad():
            nearest = torch.round(v) if self.scheme.spec.integer else self.scheme.spec.nearest(v)
        return v + (nearest - v).detach()

    def limited(self, scale: Tensor, rows: Tensor) -> Tensor:
        """Scales as learned, positive, and no smaller than a kernel can take."""
        scale = scale.abs().clamp(min=SMALLEST_SCALE)
        if self.limit is None:
            return scale
        least = self.limit(rows.detach(), scale.detach())
        return torch.where(scale < least, least, scale)


class ActivationEstimator(nn.Module, ABC):
    """From a float tensor to the values of its format, with gradients for it and for what else learns.

    A plug-in's `Activations` fills in `forward` and `exact`.

    Args:
        scheme: per tensor.
        scale, zero_point: [1], as calibration found them.
    """

    def __init__(self, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.scheme = scheme
        self.progress = 0.0

    @classmethod
    def accepts(cls, scheme: Scheme) -> bool:
        """Whether it serves activations of that scheme; by default integers."""
        return scheme.spec.integer

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor, in x's shape and dtype. Differentiable."""

    @abstractmethod
    def exact(self) -> tuple[Tensor, Tensor]:
        """The scale (float32) and zero point (int32) as they are now: [1] each."""

    def rounded(self, x: Tensor) -> Tensor:
        """The values that `exact` asks for, in x's dtype; straight through where not clipped."""
        scale, zero_point = self.exact()
        zero = zero_point if self.scheme.spec.integer else 0
        lo, hi = (self.scheme.qmin - zero) * scale, (self.scheme.qmax - zero) * scale
        clipped = torch.minimum(torch.maximum(x, lo.to(x.dtype)), hi.to(x.dtype))
        with torch.no_grad():
            value = fake_quantize(x.float(), scale, zero_point, self.scheme).to(x.dtype)
        return clipped + (value - clipped).detach()


class LearnedRange(ActivationEstimator):
    """An estimator with a learned positive scale and a zero point, by the fused step; what it passes on is a plug-in's.

    Class attributes:
        CLIPPED_ONLY: only clipped values say how the scale should change.
        OFFSET: the zero point learns, too.
    """

    CLIPPED_ONLY = False
    OFFSET = False
    zero_point: Tensor
    lo: Tensor
    hi: Tensor

    def __init__(self, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(scheme, scale, zero_point)
        self.scale = nn.Parameter(scale.detach().clone().reshape(1))  # not a scalar: FSDP shards none
        start = zero_point.detach().clone().reshape(1)
        if self.OFFSET:
            self.zero_point = nn.Parameter(start.to(torch.float32))
        else:
            self.register_buffer("zero_point", start)
        self.register_buffer("lo", scheme.qmin - start.to(torch.float32), persistent=False)
        self.register_buffer("hi", scheme.qmax - start.to(torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        lo, hi = self.lo, self.hi
        if self.OFFSET:
            zero_point = self._zero_point()
            lo, hi = self.scheme.qmin - zero_point, self.scheme.qmax - zero_point
        return fused_step(x, self._scale(), lo, hi, self.grad_scale(x), self.CLIPPED_ONLY)

    def grad_scale(self, x: Tensor) -> float:
        """The factor of the scale's gradient; one over the root of a sample's numbers times the largest code (LSQ)."""
        count = x.numel() // max(len(x), 1) if x.dim() else 1
        return float((max(count, 1) * max(self.scheme.qmax, 1.0)) ** -0.5)

    @torch.no_grad()
    def exact(self) -> tuple[Tensor, Tensor]:
        return self._scale().detach(), self._zero_point().detach().to(torch.int32)

    def _scale(self) -> Tensor:
        return self.scale.abs().clamp(min=SMALLEST_SCALE)

    def _zero_point(self) -> Tensor:
        zero_point = self.zero_point.to(torch.float32)
        if not self.OFFSET:
            return zero_point
        whole = torch.round(zero_point).clamp(self.scheme.qmin, self.scheme.qmax)
        return zero_point + (whole - zero_point).detach()


def estimator_names() -> list[str]:
    """Names of all estimators."""
    return registry.names()


def weight_estimator(name: str, weight: Tensor, q: QTensor) -> WeightEstimator:
    """A fresh estimator of a weight. Raises RecipeError for an unknown name, or a format it does not make."""
    found: type[WeightEstimator] | None = getattr(registry.module(name), "Weights", None)
    if found is None or not found.accepts(q.scheme.spec):
        what = "serves activations only" if found is None else f"makes no {q.scheme.format} weights"
        fit = [n for n in estimator_names() if serves_weights(n, q.scheme.spec)]
        raise RecipeError(f"estimator {name!r} {what}; for {q.scheme.format} use one of: {', '.join(fit)}")
    return found(weight, q)


def activation_estimator(name: str, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> ActivationEstimator:
    """A fresh estimator of activations. Raises RecipeError as `weight_estimator` does."""
    found: type[ActivationEstimator] | None = getattr(registry.module(name), "Activations", None)
    if found is None or not found.accepts(scheme):
        what = "serves weights only" if found is None else f"makes no {scheme.format} activations like these"
        fit = [n for n in estimator_names() if serves_activations(n, scheme)]
        raise RecipeError(f"estimator {name!r} {what}; for {scheme.format} use one of: {', '.join(fit)}")
    return found(scheme, scale, zero_point)


def serves_weights(name: str, spec: Format) -> bool:
    """Whether an estimator makes weights of that format."""
    found: type[WeightEstimator] | None = getattr(registry.module(name), "Weights", None)
    return found is not None and found.accepts(spec)


def serves_activations(name: str, scheme: Scheme) -> bool:
    """Whether an estimator makes activations of that scheme."""
    found: type[ActivationEstimator] | None = getattr(registry.module(name), "Activations", None)
    return found is not None and found.accepts(scheme)
