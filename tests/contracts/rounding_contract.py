"""What every rounding promises. Each function takes a rounding's module and fails if a promise is broken."""

from dataclasses import replace
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
    Scheme("ternary", "channel"),
    Scheme("nf4", "group", group_size=12),
    Scheme("pow2_4", "channel"),
    Scheme("float8_e4m3", "channel"),
    Scheme("codebook3", "channel"),
    Scheme("codebook2_shared", "channel"),
]


def schemes(module: ModuleType) -> list[Scheme]:
    """Those whose format the rounding accepts."""
    accepts = getattr(module, "accepts", lambda spec: not spec.learned)
    return [scheme for scheme in SCHEMES if accepts(scheme.spec)]


def statistics(inputs: int) -> dict[str, Tensor]:
    """Every statistic that a rounding may ask for, of the layer that has `weight()`, with that many inputs."""
    x = torch.randn(256, inputs, generator=torch.Generator().manual_seed(5))
    x = x @ torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(6))
    hessian = x.T @ x / len(x)
    return {"hessian": hessian, "importance": hessian.diagonal().expand(8, -1).reshape(8, 4, 3, 3)}


def weight() -> Tensor:
    """A convolution's weight [8, 4, 3, 3], its channels of different size."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(8, 4, 3, 3, generator=generator) * torch.logspace(-2, 1, 8).reshape(8, 1, 1, 1)


def on_grid(w: Tensor, scheme: Scheme) -> QTensor:
    """A weight that the scheme's format represents exactly, but for a learned one's table."""
    if scheme.spec.learned:
        scheme = replace(scheme, format=f"int{scheme.spec.bits}")
    return QTensor.quantize(w, scheme, *extremes(w, scheme))


def extremes(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The range in which nothing saturates."""
    rows = blocks(w, scheme)
    return rows.amin(dim=1), rows.amax(dim=1)


def step(q: QTensor) -> Tensor:
    """The largest distance of two neighbouring values of each block: [C, 1]."""
    values = q.scheme.spec.decode(q.scheme.spec.codes())
    used = values[(values >= q.scheme.qmin) & (values <= q.scheme.qmax)]
    return q.scale.reshape(-1, 1) * used.diff().max()


def loss(w: Tensor, q: Tensor, module: ModuleType, given: dict[str, Tensor]) -> float:
    """The error that the rounding minimises: of the layer's output with a Hessian, else of the weight.

    That is its square, or what the module's own `loss` makes of it.
    """
    error = (w - q).reshape(len(w), -1).to(torch.float64)
    if hasattr(module, "loss"):
        return float(module.loss(error).sum())
    if "hessian" in module.STATISTICS:
        return float(torch.einsum("oi,ij,oj->", error, given["hessian"].to(torch.float64), error))
    return float(error.square().sum())


def result_fits_the_scheme(module: ModuleType) -> None:
    """Codes within qmin .. qmax, of the weight's shape and the scheme asked for; the weight is left alone."""
    for scheme in schemes(module):
        w = weight()
        before = w.clone()
        q = module.round(w, scheme, *extremes(w, scheme), statistics(36))
        assert isinstance(q, QTensor)
        assert torch.equal(w, before)
        assert q.scheme == scheme
        assert q.codes.shape == w.shape == q.shape
        assert q.codes.dtype == scheme.spec.code_dtype
        assert bool(torch.isfinite(q.dequantize()).all())
        values = scheme.spec.decode(q.codes) if q.codebook is None else q.codebook
        assert float(values.min()) >= scheme.qmin
        assert float(values.max()) <= scheme.qmax
        if q.codebook is not None:
            assert bool((q.codebook.diff(dim=1) >= 0).all())
            assert torch.equal(q.codebook, q.codebook.half().float())
            assert bool((q.codebook == 0).any(dim=1).all())


def error_is_bounded(module: ModuleType) -> None:
    """No weight moves by more than a step, saturation at the ends aside, unless data asked for it."""
    if module.STATISTICS:
        return
    for scheme in schemes(module):
        w = weight()
        q = module.round(w, scheme, *extremes(w, scheme), {})
        error = blocks((q.dequantize() - w).abs(), scheme)
        fits_scales = getattr(module, "FITS_SCALES", False) or module.__name__.endswith(".twn")
        if q.codebook is None and not fits_scales:  # then numbers may lie beyond what was the range
            assert bool((error <= step(q) * 1.001).all())
        if q.codebook is not None:
            values = q.scale.reshape(-1, 1) * q.codebook
            nearest = (blocks(w, scheme).unsqueeze(2) - values.unsqueeze(1)).abs().amin(dim=2)
            assert torch.allclose(error, nearest, rtol=1e-4, atol=1e-7)


def zero_stays_zero(module: ModuleType) -> None:
    """Pruned weights stay pruned, also where the weights make up for each other's errors."""
    for scheme in schemes(module):
        w = weight()
        w[3] = 0
        w[:, 2] = 0
        w[0, 0, :, 1] = 0
        values = module.round(w, scheme, *extremes(w, scheme), statistics(36)).dequantize()
        assert not bool(values[w == 0].any())


def no_worse_than_nearest(module: ModuleType) -> None:
    """On the loss that it minimises, the rounding is not worse than rounding to nearest."""
    if getattr(module, "RANDOM", False):
        return  # a rounding that says it is random promises an unbiased result instead
    given = statistics(36)
    for scheme in schemes(module):
        w = weight()
        if scheme.spec.learned:
            continue  # no grid to compare with
        lo, hi = extremes(w, scheme)
        ours = loss(w, module.round(w, scheme, lo, hi, given).dequantize(), module, given)
        nearest = loss(w, QTensor.quantize(w, scheme, lo, hi).dequantize(), module, given)
        assert ours <= nearest * (1 + 1e-6)


def representable_weights_stay(module: ModuleType) -> None:
    """A weight that is already on the grid is not moved."""
    if getattr(module, "BY_DENSITY", False):
        return  # values are designed for a density, wherever the weights lie
    for scheme in schemes(module):
        first = on_grid(weight(), scheme)
        values = first.dequantize()
        again = module.round(values, scheme, *extremes(weight(), scheme), statistics(36))
        assert torch.allclose(again.dequantize(), values, rtol=5e-4, atol=0)
        if first.scheme == scheme:
            assert torch.equal(again.codes, first.codes)


def random_roundings_are_unbiased(module: ModuleType) -> None:
    """The mean over many seeds is the weight, within what so many draws allow; no draw is further than a step."""
    if not getattr(module, "RANDOM", False):
        return
    draws = 200
    for scheme in schemes(module):
        w = weight()
        lo, hi = extremes(w, scheme)
        found = [module.round(w, scheme, lo, hi, {"seed": seed}).dequantize() for seed in range(draws)]
        rows = blocks(w, scheme)
        mean, spread = (blocks(x, scheme) for x in (torch.stack(found).mean(0), torch.stack(found).std(0)))
        gap = step(QTensor.quantize(w, scheme, lo, hi))
        off = (mean - rows).abs()
        if not scheme.symmetric:  # the rounded zero point moves an end of the range by up to half a step
            inside = (rows - lo.clamp(max=0).unsqueeze(1) > gap) & (hi.clamp(min=0).unsqueeze(1) - rows > gap)
            off = off * inside
        assert bool((off <= 5 * spread / draws**0.5 + 0.02 * gap).all())
        assert bool((spread <= 0.51 * gap).all())


def results_are_reproducible(module: ModuleType) -> None:
    """The same weight gets the same codes again, whatever torch's own random state is."""
    for scheme in schemes(module)[:2]:
        w = weight()
        torch.manual_seed(1)
        first = module.round(w, scheme, *extremes(w, scheme), statistics(36))
        torch.manual_seed(2)
        again = module.round(w.clone(), scheme, *extremes(w, scheme), statistics(36))
        assert torch.equal(first.codes, again.codes)


CONTRACT = [
    result_fits_the_scheme,
    error_is_bounded,
    zero_stays_zero,
    no_worse_than_nearest,
    representable_weights_stay,
    random_roundings_are_unbiased,
    results_are_reproducible,
]
