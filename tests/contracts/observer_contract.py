"""What every observer promises. Each function takes an observer's module and fails if a promise is broken."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics import Scheme, blocks, fake_quantize, qparams

SCHEMES = [
    Scheme("int8"),
    Scheme("uint8", symmetric=False),
    Scheme("uint8"),
    Scheme("int4", "channel", axis=1, narrow=True),
    Scheme("int4", "channel", axis=1, symmetric=False),
    Scheme("int12", symmetric=False),
    Scheme("int5", "group", group_size=64),
]


def batches(count: int = 5, size: int = 8) -> list[Tensor]:
    """Activations [size, 4, 8, 8]: skewed, heavy-tailed, channels of different ranges, one of zeros."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(count):
        x = torch.randn(size, 4, 8, 8, generator=generator)
        x = x + 0.3 * x.pow(3) + torch.tensor([0.0, 1.0, -2.0, 0.0]).reshape(1, 4, 1, 1)
        x = x * torch.tensor([1.0, 30.0, 0.01, 0.0]).reshape(1, 4, 1, 1) * (1 + i)
        x[:, 1].relu_()
        found.append(x)
    return found


def observe(module: ModuleType, scheme: Scheme, data: list[Tensor]):
    """A fresh observer that has seen the data."""
    observer = module.Observer(scheme)
    for x in data:
        observer.update(x)
    return observer


def bounds_are_sound(module: ModuleType) -> None:
    """float32 [C]; zero included; nothing beyond what was seen; a non-saturating observer clips nothing."""
    for scheme in SCHEMES:
        data = batches()
        lo, hi = observe(module, scheme, data).bounds()
        rows = [blocks(x, scheme) for x in data]
        least = torch.stack([r.amin(dim=1) for r in rows]).amin(dim=0)
        most = torch.stack([r.amax(dim=1) for r in rows]).amax(dim=0)
        assert lo.shape == hi.shape == least.shape
        assert lo.dtype == hi.dtype == torch.float32
        assert bool((lo <= 0).all())
        assert bool((hi >= 0).all())
        assert bool((lo >= least.clamp(max=0)).all())
        assert bool((hi <= most.clamp(min=0)).all())
        assert bool((hi - lo > 0)[most > least].all())
        if not module.Observer.SATURATES:
            assert torch.equal(lo, least.clamp(max=0))
            assert torch.equal(hi, most.clamp(min=0))


def extremes_are_true(module: ModuleType) -> None:
    """`observed` gives the true minimum and maximum of each block."""
    scheme = Scheme("int8", "channel", axis=1)
    data = batches()
    least, most = observe(module, scheme, data).observed()
    rows = torch.cat([blocks(x, scheme) for x in data], dim=1)
    assert torch.equal(least, rows.amin(dim=1))
    assert torch.equal(most, rows.amax(dim=1))


def merging_is_one_pass(module: ModuleType) -> None:
    """Two observers merged give the bounds of one that saw all: exactly, but for float64 rounding."""
    for scheme in SCHEMES:
        data = batches()
        whole = observe(module, scheme, data).bounds()
        for split in (0, 2):
            first, second = observe(module, scheme, data[:split]), observe(module, scheme, data[split:])
            first.merge(second)
            for one, other in zip(first.bounds(), whole, strict=True):
                assert torch.allclose(one, other, rtol=1e-6, atol=0)


def order_does_not_matter_where_promised(module: ModuleType) -> None:
    """The same numbers in another order, and in other batches, give the same bounds, bit for bit."""
    if not module.Observer.ORDER_INDEPENDENT:
        return
    for scheme in SCHEMES:
        data = batches()
        whole = observe(module, scheme, data).bounds()
        assert all(map(torch.equal, observe(module, scheme, data[::-1]).bounds(), whole))
        if scheme.granularity != "group":
            assert all(map(torch.equal, observe(module, scheme, [torch.cat(data)]).bounds(), whole))
            single = [x[i : i + 1] for x in data for i in range(len(x))]
            assert all(map(torch.equal, observe(module, scheme, single).bounds(), whole))


def inference_mode_leaves_no_trace(module: ModuleType) -> None:
    """What was observed in inference mode can be merged and added to outside of it, gradients on."""
    scheme, data = SCHEMES[0], batches(3)
    with torch.inference_mode():
        first, second = observe(module, scheme, data[:1]), observe(module, scheme, data[1:2])
    first.merge(second)
    first.update(data[2].requires_grad_())
    expected = observe(module, scheme, batches(3)).bounds()
    for one, other in zip(first.bounds(), expected, strict=True):
        assert not one.requires_grad
        assert torch.allclose(one, other, rtol=1e-6, atol=0)


def memory_is_bounded(module: ModuleType) -> None:
    """What an observer keeps does not grow with what it has seen."""

    def kept(observer) -> int:
        total, todo, seen = 0, [vars(observer)], set()
        while todo:
            item = todo.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                total += item.untyped_storage().nbytes()
            elif isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, (list, tuple, set)):
                total += 8 * len(item)
                todo += item
            elif hasattr(item, "__dict__"):
                todo.append(vars(item))
        return total

    for scheme in (Scheme("int8"), Scheme("int8", "channel", axis=1)):
        few = kept(observe(module, scheme, batches(1)))
        many = kept(observe(module, scheme, batches(20, size=16)))
        assert many <= few
        assert many <= 2**20


def nothing_seen_is_an_error(module: ModuleType) -> None:
    """Bounds of nothing are refused; a tensor without numbers is nothing."""
    observer = module.Observer(Scheme("int8"))
    observer.update(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="nothing was observed: run calibration data"):
        observer.bounds()


def bad_numbers_are_named(module: ModuleType) -> None:
    """NaN and infinities are refused with their index, and leave the observer as it was."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        observer = observe(module, Scheme("int8", "channel", axis=1), batches(1))
        before = observer.bounds()
        x = batches(1)[0]
        x[2, 1, 3, 0] = bad
        with pytest.raises(
            CalibrationError, match=r"found -?(nan|inf) at index \(2, 1, 3, 0\) of a tensor of"
        ):
            observer.update(x)
        assert all(map(torch.equal, observer.bounds(), before))


def changing_channels_are_refused(module: ModuleType) -> None:
    """The number of blocks may not change from batch to batch."""
    observer = observe(module, Scheme("int8", "channel", axis=1), batches(1))
    with pytest.raises(CalibrationError, match="found 3 blocks after 4: "):
        observer.update(torch.zeros(8, 3, 8, 8))


def constants_and_zeros_work(module: ModuleType) -> None:
    """A constant tensor, however large or small, is coded within a hundredth; so is one of zeros."""
    for scheme in (Scheme("int8"), Scheme("uint8", symmetric=False)):
        for value in (0.0, 5.0, -1e-30, 1e38, 1e-42):
            x = torch.full((4, 4), value)
            lo, hi = observe(module, scheme, [x, x]).bounds()
            assert torch.minimum(x.min(), torch.tensor(0.0)) <= lo.item() <= 0
            assert torch.maximum(x.max(), torch.tensor(0.0)) >= hi.item() >= 0
            scale, zero_point = qparams(lo, hi, scheme)
            error = (fake_quantize(x, scale, zero_point, scheme) - x).abs().max()
            assert error <= max(0.01 * abs(value), 2.0**-126)


def outliers_are_not_everything(module: ModuleType) -> None:
    """A saturating observer does not let one outlier in a hundred thousand set the range of 4 bits.

    At 100 standard deviations, the squared error of clipping it is a tenth of that of not clipping it.
    """
    if not module.Observer.SATURATES:
        return
    generator = torch.Generator().manual_seed(8)
    data = [torch.randn(20_000, generator=generator) for _ in range(5)]
    data[2][7] = 100.0
    _, hi = observe(module, Scheme("int4"), data).bounds()
    assert hi.item() < 90


def half_precision_is_observed(module: ModuleType) -> None:
    """bfloat16 and float16 tensors give the bounds of the same numbers in float32; strides do not matter."""
    for scheme in (Scheme("int8"), Scheme("int8", "channel", axis=1, symmetric=False)):
        data = [x.clamp(-100, 100) for x in batches(2)]
        for dtype in (torch.bfloat16, torch.float16):
            halves = [x.to(dtype) for x in data]
            exact = observe(module, scheme, [x.to(torch.float32) for x in halves]).bounds()
            assert all(map(torch.equal, observe(module, scheme, halves).bounds(), exact))
        strided = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in data]
        exact = observe(module, scheme, data).bounds()
        assert all(map(torch.equal, observe(module, scheme, strided).bounds(), exact))


CONTRACT = [
    bounds_are_sound,
    extremes_are_true,
    merging_is_one_pass,
    order_does_not_matter_where_promised,
    inference_mode_leaves_no_trace,
    memory_is_bounded,
    nothing_seen_is_an_error,
    bad_numbers_are_named,
    changing_channels_are_refused,
    constants_and_zeros_work,
    outliers_are_not_everything,
    half_precision_is_observed,
]
