"""Gradients, losses and rounding at random, against slow twins that follow the papers' words."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fewbit.numerics import fused_step as fused
from fewbit.numerics.format import get_format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import activation_estimator, weight_estimator
from fewbit.training.gradients import GradientFormat, quantize_gradient, rounded_gradient
from fewbit.training.losses import feature_loss, logits_loss
from fewbit.training.oscillation import Oscillation


def lsq_by_number(x, s, lo, hi):
    """LSQ's equations 2 and 3, number by number: value, its derivative by x, and by the scale."""
    v = x / s
    if v <= lo:
        return lo * s, 0.0, lo
    if v >= hi:
        return hi * s, 0.0, hi
    return round(v) * s, 1.0, round(v) - v


@pytest.mark.parametrize("size", [50, 2**16], ids=["as it is", "compiled"])
@pytest.mark.parametrize("layout", ["flat", "channels last", "strided"])
def test_the_fused_step_is_lsq(size, layout):
    x = torch.randn(size // 2, 2) * 2
    if layout == "channels last":
        x = x.reshape(-1, 2, 5 if size == 50 else 8, 1).contiguous(memory_format=torch.channels_last)
    x = (x.repeat(2, *[1] * (x.dim() - 1))[::2] if layout == "strided" else x).requires_grad_()
    scale = torch.tensor([0.37], requires_grad=True)
    gradient = torch.randn_like(x)
    y = fused.fused_step(x, scale, torch.tensor([-2.0]), torch.tensor([3.0]), grad_scale=0.5)
    y.backward(gradient)
    cut = slice(0, 50)
    pairs = [lsq_by_number(v, scale.item(), -2, 3) for v in x.detach().reshape(-1)[cut].tolist()]
    value, of_x, _ = (torch.tensor(part) for part in zip(*pairs, strict=True))
    assert torch.allclose(y.reshape(-1)[cut], value, atol=1e-6)
    assert torch.allclose(x.grad.reshape(-1)[cut], gradient.reshape(-1)[cut] * of_x)
    slopes = torch.tensor([lsq_by_number(v, scale.item(), -2, 3)[2] for v in x.detach().reshape(-1).tolist()])
    expected = 0.5 * (gradient.reshape(-1).double() * slopes.double()).sum()
    assert scale.grad.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


def test_clipped_values_alone_move_pacts_clip():
    """PACT, section 3: the derivative by the clip is 1 where x >= clip, else 0."""
    step = activation_estimator(
        "pact", Scheme("uint2", symmetric=False), torch.tensor([0.5]), torch.tensor([0])
    )
    x = torch.tensor(
        [[-0.3, 0.2, 0.9, 1.4, 2.0, 7.0]], requires_grad=True
    )  # the clip is 1.5; 1.4 rounds to it
    step(x).backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]]))
    assert step.scale.grad.item() == pytest.approx(16.0 + 32.0)
    assert x.grad.tolist() == [[0.0, 2.0, 4.0, 8.0, 0.0, 0.0]]


def test_the_offset_of_lsq_plus_learns_from_clipped_values():
    """LSQ+, equation 6: the derivative by the offset is 1 where x is clipped; the zero point counts it in -scales."""
    step = activation_estimator(
        "lsq_plus",
        Scheme("uint4", symmetric=False),
        torch.tensor([0.5]),
        torch.tensor([3], dtype=torch.int32),
    )
    x = torch.tensor([-9.0, -1.0, 0.3, 5.0, 9.0]).reshape(1, 5)
    step(x).backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]))
    assert step.zero_point.grad.item() == pytest.approx(-0.5 * (1.0 + 16.0))


def test_observed_ranges_grow_at_once_and_shrink_slowly():
    """An end is the new extreme, or moves by 1 % to that of the batch; then the step quantizes."""
    scheme = Scheme("uint4", symmetric=False)
    step = activation_estimator("observed", scheme, torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32))
    lo, hi = -1.5, 6.0
    for least, most in [(-0.5, 2.0), (-4.0, 5.0), (0.5, 9.0)]:
        x = torch.tensor([least, 1.0, most], requires_grad=True)
        lo = min(least, lo + 0.01 * (min(least, 0.0) - lo))
        hi = max(most, hi + 0.01 * (max(most, 0.0) - hi))
        value = step(x)
        value.sum().backward()
        scale, zero_point = (part.item() for part in step.exact())
        assert scale == pytest.approx((hi - lo) / 15) and zero_point == round(-lo / scale)
        codes = [min(max(round(v / scale) + zero_point, 0), 15) for v in x.tolist()]
        assert value.tolist() == pytest.approx([(code - zero_point) * scale for code in codes])
        inside = [(0 - zero_point) * scale < v < (15 - zero_point) * scale for v in x.tolist()]
        assert x.grad.tolist() == [float(each) for each in inside]
    step.eval()
    x = torch.tensor([100.0], requires_grad=True)
    assert step(x).item() == pytest.approx((15 - zero_point) * scale), "nothing follows in evaluation"


def observe(rank: int, store: str) -> None:
    """What one of two processes does: rank 0 sees 1 and rank 1 sees -3, of a range from -1.5 to 6."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    scheme = Scheme("uint4", symmetric=False)
    step = activation_estimator("observed", scheme, torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32))
    step(torch.tensor([1.0 - 4 * rank]))
    torch.save(step.state_dict(), f"{store}-{rank}")
    dist.destroy_process_group()


def test_observed_ranges_are_those_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(observe, (str(tmp_path / "store"),), nprocs=2)
    for rank in range(2):
        state = torch.load(tmp_path / f"store-{rank}", weights_only=True)
        assert state["range"].tolist() == pytest.approx([-3.0, 6.0 - 0.01 * (6.0 - 1.0)])


def test_the_scale_of_a_weight_has_lsqs_gradient():
    weight = torch.randn(3, 10, requires_grad=True)
    q = QTensor.quantize(weight.detach() * 0.6, Scheme("int3", "channel"))
    estimator = weight_estimator("lsq", weight.detach(), q)
    gradient = torch.randn(3, 10)
    estimator(weight).backward(gradient)
    for row in range(3):
        slopes = [lsq_by_number(v, q.scale[row].item(), -4, 3)[2] for v in weight[row].tolist()]
        expected = (gradient[row] * torch.tensor(slopes)).sum() / math.sqrt(10 * 3)
        assert estimator.scale.grad[row].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_ternary_values_learn_as_in_ttq():
    """TTQ, equations 7 and 8: the gradient of a value is the sum over its weights; of a weight, times its value."""
    weight = torch.tensor([[0.9, -0.8, 0.01, 0.5, -0.02, -0.6]], requires_grad=True)
    table, scheme = torch.tensor([[-0.7, 0.0, 0.7, 0.7]]), Scheme("codebook2")
    codes = torch.tensor([[2, 0, 1, 2, 1, 0]], dtype=torch.uint8)
    q = QTensor(codes, torch.ones(1), torch.zeros(1, dtype=torch.int32), scheme, (1, 6), table)
    estimator = weight_estimator("ttq", weight.detach(), q)
    gradient = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    estimator(weight).backward(gradient)
    negative, positive = estimator.sizes[0].tolist()
    assert (negative, positive) == pytest.approx((0.7, 0.7), abs=1e-3)
    assert estimator.sizes.grad[0].tolist() == pytest.approx([-(2.0 + 32.0), 1.0 + 8.0])
    assert weight.grad[0].tolist() == pytest.approx([0.7, 1.4, 4.0, 5.6, 16.0, 22.4], rel=1e-3)


@pytest.mark.parametrize("form", ["int2", "int4", "int8", "float8_e5m2", "float8_e4m3"])
def test_gradients_rounded_at_random_are_right_in_the_mean(form):
    gradient = torch.randn(6, 40) * torch.logspace(-3, 2, 6).reshape(6, 1)
    form = GradientFormat(form)
    draws = torch.stack([rounded_gradient(gradient, form) for _ in range(4000)])
    step = draws.std(0).clamp(min=1e-9)
    error = (draws.mean(0) - gradient).abs() / (
        step / 4000**0.5 + 1e-6 * gradient.abs().amax(1, keepdim=True)
    )
    assert bool((error < 6).all())
    scale = gradient.abs().amax(1, keepdim=True) / form.spec.qmax
    values = set(form.spec.decode(form.spec.codes()).tolist())
    assert all(min(abs(v - w) for w in values) < 1e-4 * (1 + abs(v)) for v in (draws[0] / scale)[0].tolist())


def test_gradients_are_quantized_on_the_way_back_only():
    x = torch.randn(4, 8, requires_grad=True)
    form = GradientFormat("int4", stochastic=False)
    y = quantize_gradient(x, form)
    assert torch.equal(y, x)
    gradient = torch.randn(4, 8)
    y.backward(gradient)
    scale = gradient.abs().amax(1, keepdim=True) / 7
    assert torch.allclose(x.grad, torch.round(gradient / scale).clamp(-7, 7) * scale)


def test_soft_labels_by_definition():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = F.softmax(t / 3, 0), F.softmax(s / 3, 0)
        expected += sum((p[i] * math.log(p[i] / q[i])).item() for i in range(7)) / 5 * 9
    assert logits_loss("kd")(student, teacher, None, 3.0).item() == pytest.approx(expected, rel=1e-4)
    tokens = logits_loss("kd")(student.reshape(1, 5, 7), teacher.reshape(1, 5, 7), None, 3.0)
    assert tokens.item() == pytest.approx(expected, rel=1e-4)


def test_decoupled_distillation_by_definition():
    """DKD, equations 5 and 7: the pair (right, all others), and the others among themselves."""
    student, teacher, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([2, 0, 5, 1])
    expected = 0.0
    for s, t, y in zip(student / 2, teacher / 2, labels.tolist(), strict=True):
        p, q = F.softmax(t, 0), F.softmax(s, 0)
        pair = p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        others = [i for i in range(6) if i != y]
        a, b = F.softmax(t[others], 0), F.softmax(s[others], 0)
        expected += (pair + 2.0 * (a * (a / b).log()).sum()).item() / 4 * 4
    assert logits_loss("dkd")(student, teacher, labels, 2.0).item() == pytest.approx(expected, rel=1e-4)


def test_attention_maps_by_definition():
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 9, 5, 5)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        a, b = (x.square().mean(0).reshape(-1) for x in (s, t))
        expected += ((a / a.norm() - b / b.norm()) ** 2).sum().item() / 3
    loss = feature_loss("attention", tuple(student.shape), tuple(teacher.shape))
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_oscillating_codes_freeze_at_where_they_mostly_were():
    """Algorithm 1 of Nagel et al., weight by weight in plain numbers."""
    steps = torch.randint(-2, 3, (400, 5)).float()
    steps[:, 0] = 1.0  # never moves
    steps[:, 1] = torch.arange(400) % 2  # always turns round
    module = Oscillation(torch.zeros(1, 5), threshold=0.5)
    last, direction = [0.0] * 5, [0.0] * 5
    share, mean, frozen = [0.0] * 5, [0.0] * 5, [False] * 5
    for values in steps:
        found = module(values.reshape(1, 5), True)
        for i, code in enumerate(values.tolist()):
            change = (code > last[i]) - (code < last[i])
            share[i] += 0.01 * ((change * direction[i] < 0) - share[i])
            direction[i] = change or direction[i]
            if not frozen[i]:
                mean[i] += 0.01 * (code - mean[i])
            last[i] = code
            frozen[i] = frozen[i] or share[i] > 0.5
            assert found[0, i].item() == (round(mean[i]) if frozen[i] else code)
    assert frozen[1] and not frozen[0]


def test_gradient_formats_without_signs_are_refused():
    from fewbit.errors import RecipeError

    assert get_format("uint8").qmin == 0
    with pytest.raises(RecipeError, match=r"gradients='uint8'.*int2 to int8"):
        GradientFormat("uint8")
