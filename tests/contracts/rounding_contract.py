"""What every rounding promises. Each function takes a rounding's module and fails if a promise is broken."""

from types import ModuleType

import torch
from torch import Tensor

from fewbit.numerics import QTensor, Scheme, blocks

SCHEMES = [
    Scheme("int8", "channel"),
    Scheme("int4", "channel", narrow=True),
    Scheme("uint4", "channel", symmetric=False),
    Scheme("int3", "group", group_size=9),
    Scheme("int2"),
]


def statistics(inputs: int) -> dict[str, Tensor]:
    """Every statistic that a rounding may ask for, of a layer with that many inputs."""
    x = torch.randn(256, inputs, generator=torch.Generator().manual_seed(5))
    x = x @ torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(6))
    return {"hessian": x.T @ x / len(x)}


def weight() -> Tensor:
    """A convolution's weight [8, 4, 3, 3], its channels of different size."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(8, 4, 3, 3, generator=generator) * torch.logspace(-2, 1, 8).reshape(8, 1, 1, 1)


def extremes(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The range in which nothing saturates."""
    rows = blocks(w, scheme)
    return rows.amin(dim=1), rows.amax(dim=1)


def loss(w: Tensor, q: Tensor, asked: frozenset[str], given: dict[str, Tensor]) -> float:
    """The error that the rounding minimises: of the layer's output with a Hessian, else of the weight."""
    error = (w - q).reshape(len(w), -1).to(torch.float64)
    if "hessian" in asked:
        return float(torch.einsum("oi,ij,oj->", error, given["hessian"].to(torch.float64), error))
    return float(error.square().sum())


def result_fits_the_scheme(module: ModuleType) -> None:
    """Codes within qmin .. qmax, of the weight's shape and the scheme asked for; the weight is left alone."""
    for scheme in SCHEMES:
        w = weight()
        before = w.clone()
        q = module.round(w, scheme, *extremes(w, scheme), statistics(36))
        assert isinstance(q, QTensor)
        assert torch.equal(w, before)
        assert q.scheme == scheme
        assert q.codes.shape == w.shape == q.shape
        assert q.codes.dtype == scheme.spec.code_dtype
        values = scheme.spec.decode(q.codes)
        assert float(values.min()) >= scheme.qmin
        assert float(values.max()) <= scheme.qmax
        assert bool(torch.isfinite(q.dequantize()).all())


def error_is_bounded(module: ModuleType) -> None:
    """No weight moves by more than a step, saturation at the ends aside, unless data asked for it."""
    if module.STATISTICS:
        return
    for scheme in SCHEMES:
        w = weight()
        q = module.round(w, scheme, *extremes(w, scheme), {})
        error = blocks((q.dequantize() - w).abs(), scheme)
        assert bool((error <= q.scale.reshape(-1, 1) * 1.001).all())


def zero_stays_zero(module: ModuleType) -> None:
    """Pruned weights stay pruned, where the rounding decides weight by weight; so do whole channels."""
    for scheme in SCHEMES:
        w = weight()
        w[3] = 0
        w[:, 2] = 0
        values = module.round(w, scheme, *extremes(w, scheme), statistics(36)).dequantize()
        assert bool((values[3] == 0).all())
        if not module.STATISTICS:
            assert bool((values[:, 2] == 0).all())


def no_worse_than_nearest(module: ModuleType) -> None:
    """On the loss that it minimises, the rounding is not worse than rounding to nearest."""
    if getattr(module, "RANDOM", False):
        return  # a rounding that says it is random promises an unbiased result instead
    given = statistics(36)
    for scheme in SCHEMES:
        w = weight()
        lo, hi = extremes(w, scheme)
        ours = loss(w, module.round(w, scheme, lo, hi, given).dequantize(), module.STATISTICS, given)
        nearest = loss(w, QTensor.quantize(w, scheme, lo, hi).dequantize(), module.STATISTICS, given)
        assert ours <= nearest * (1 + 1e-6)


def representable_weights_stay(module: ModuleType) -> None:
    """A weight that is already on the grid is not moved."""
    for scheme in SCHEMES:
        w = weight()
        lo, hi = extremes(w, scheme)
        on_grid = QTensor.quantize(w, scheme, lo, hi)
        again = module.round(on_grid.dequantize(), scheme, lo, hi, statistics(36))
        assert torch.equal(again.codes, on_grid.codes)


CONTRACT = [
    result_fits_the_scheme,
    error_is_bounded,
    zero_stays_zero,
    no_worse_than_nearest,
    representable_weights_stay,
]
