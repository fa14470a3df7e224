"""The reader on every layer and operator: same outputs, another batch size, the user's names, canonical
operators.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Apply, Attention, CrossAttention, Net, Recurrent
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fewbit.model.graph import refresh
from fewbit.model.operators import operator
from fewbit.model.readers.torch import read

aten = torch.ops.aten


def randomise(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters that make a dropped or swapped one visible."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data = noise + 0.5 if "var" in name else tensor.data + 0.2 * noise
    return module


def check(module: nn.Module, *example: Tensor, more: int = 3) -> Any:
    """Read, compare with the module in eval mode on the example and on a batch larger by `more`."""
    torch.manual_seed(0)
    randomise(module)
    gm = read(module.eval(), example)
    inputs = [example]
    if isinstance(next(iter(gm.meta["dynamic"].values()))[0], str):
        inputs.append(tuple(torch.cat([t, *(t[:1].flip(-1),) * more]) for t in example))
    for batch in inputs:
        with torch.no_grad():
            expected, actual = module(*batch), gm(*batch)
        for e, a in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * float(e.abs().max()) if e.numel() else 0)
    return gm


def kinds(gm: Any) -> list[str]:
    """Class names of the layers and names of the operators, in order."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            found.append(type(gm.get_submodule(node.target)).__name__)
        elif node.op == "call_function":
            found.append(
                str(node.target).removeprefix("aten.").replace("<built-in function getitem>", "getitem")
            )
    return found


X1, X2, X3 = torch.randn(1, 4, 9), torch.randn(1, 4, 8, 6), torch.randn(2, 4, 5, 6, 7)
LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), X1),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), bias=False), X2),
    "conv3d": (nn.Conv3d(4, 2, 3, padding=1), X3),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), X2),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), X2),
    "conv_same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), X2),
    "conv_valid": (nn.Conv2d(4, 6, 3, padding="valid"), X2),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), X1),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), X2),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 2, 2, dilation=2, bias=False), X3),
    "linear": (nn.Linear(6, 5), X2),
    "linear_no_bias": (nn.Linear(6, 5, bias=False), torch.randn(1, 6)),
    "batch_norm1d": (nn.BatchNorm1d(4, eps=1e-2, momentum=0.3), X1),
    "batch_norm2d": (nn.BatchNorm2d(4, affine=False), X2),
    "batch_norm3d": (nn.BatchNorm3d(4, momentum=None), X3),
    "batch_norm_untracked": (nn.BatchNorm2d(4, track_running_stats=False), X2),
    "instance_norm": (nn.InstanceNorm2d(4, affine=True), X2),
    "instance_norm_tracked": (nn.InstanceNorm1d(4, track_running_stats=True), X1),
    "group_norm": (nn.GroupNorm(2, 4), X2),
    "layer_norm": (nn.LayerNorm((8, 6), eps=1e-3), X2),
    "layer_norm_no_bias": (nn.LayerNorm(6, bias=False), X2),
    "rms_norm": (nn.RMSNorm(6, eps=1e-3), X2),
    "prelu": (nn.PReLU(4), X2),
    "dropout": (nn.Dropout(0.3), X2),
    "dropout2d": (nn.Dropout2d(0.3), X2),
    "alpha_dropout": (nn.AlphaDropout(0.3), X2),
}
CLASSES = {"dropout2d": "Dropout2d", "conv_same": "Conv2d", "linear_no_bias": "Linear"}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_stays_the_layer(name: str) -> None:
    layer, x = LAYERS[name]
    gm = check(Net(layer), x)
    assert kinds(gm) == [type(layer).__name__]
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["body.0"]
    read_layer = gm.get_submodule("body.0")
    assert repr(read_layer) == repr(layer).replace("padding=same", "padding=(2, 2)").replace(
        ", padding=valid", ""
    )
    assert set(gm.state_dict()) == set(Net(layer).state_dict())
    for key, value in Net(layer).state_dict().items():
        assert torch.equal(gm.state_dict()[key], value), key
        assert gm.state_dict()[key].data_ptr() != value.data_ptr() or not value.numel()


def test_uneven_same_padding_becomes_a_pad() -> None:
    gm = check(Net(nn.Conv2d(4, 6, (4, 3), padding="same")), X2)
    assert kinds(gm) == ["pad.default", "Conv2d"]


def test_circular_padding_becomes_a_pad() -> None:
    gm = check(Net(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), X2)
    assert kinds(gm) == ["pad.default", "Conv2d"]


FUNCTIONS: dict[str, tuple[Any, list[str]]] = {
    "relu": (F.relu, ["relu.default"]),
    "relu_module": (nn.ReLU(inplace=True), ["relu.default"]),
    "relu6": (nn.ReLU6(), ["relu6.default"]),
    "hardtanh": (nn.Hardtanh(-2, 1.5), ["hardtanh.default"]),
    "hardtanh_as_relu6": (nn.Hardtanh(0, 6, inplace=True), ["relu6.default"]),
    "clamp": (lambda x: x.clamp(-1, 2), ["hardtanh.default"]),
    "clamp_to_unit": (lambda x: x.clamp(0, 1), ["hardtanh.default"]),
    "clamp_low": (lambda x: x.clamp(min=0), ["relu.default"]),
    "clamp_min": (lambda x: torch.clamp_min(x, 0.25), ["clamp.default"]),
    "clamp_max": (lambda x: torch.clamp_max(x, 0.25), ["clamp.default"]),
    "threshold": (nn.Threshold(0, 0), ["relu.default"]),
    "hardswish": (nn.Hardswish(inplace=True), ["hardswish.default"]),
    "hardsigmoid": (F.hardsigmoid, ["hardsigmoid.default"]),
    "silu": (nn.SiLU(inplace=True), ["silu.default"]),
    "gelu": (nn.GELU(), ["gelu.default"]),
    "gelu_tanh": (nn.GELU("tanh"), ["gelu.default"]),
    "elu": (nn.ELU(0.7, inplace=True), ["elu.default"]),
    "mish": (nn.Mish(), ["mish.default"]),
    "softplus": (nn.Softplus(2.0), ["softplus.default"]),
    "sigmoid": (torch.sigmoid, ["sigmoid.default"]),
    "tanh": (lambda x: x.clone().tanh_(), ["tanh.default"]),
    "leaky_relu": (nn.LeakyReLU(0.2, inplace=True), ["leaky_relu.default"]),
    "softmax": (nn.Softmax(1), ["softmax.int"]),
    "softmax_float32": (lambda x: F.softmax(x, -1, dtype=torch.float32), ["softmax.int"]),
    "log_softmax": (nn.LogSoftmax(-1), ["log_softmax.int"]),
    "add_number": (lambda x: 2 + x, ["add.Tensor"]),
    "add_tensor_number": (lambda x: torch.tensor(2.0) + x, ["add.Tensor"]),
    "sub_number": (lambda x: x - 0.5, ["sub.Tensor"]),
    "number_minus": (lambda x: 1 - x, ["mul.Tensor", "add.Tensor"]),
    "mul_number": (lambda x: 0.5 * x, ["mul.Tensor"]),
    "div_number": (lambda x: x / 3, ["div.Tensor"]),
    "broadcast": (lambda x: x * x.mean((2, 3), keepdim=True), ["mean.dim", "mul.Tensor"]),
    "add_alpha": (lambda x: torch.add(x, x, alpha=3), ["add.Tensor"]),
    "cat": (lambda x: torch.cat([x, x * 2], 1), ["mul.Tensor", "cat.default"]),
    "stack": (lambda x: torch.stack([x, x], 1), ["unsqueeze.default"] * 2 + ["cat.default"]),
    "hstack": (lambda x: torch.hstack([x, x]), ["cat.default"]),
    "chunk": (lambda x: x.chunk(2, 1)[1], ["split_with_sizes.default", "getitem"]),
    "split": (lambda x: x.split([1, 3], 1), ["split_with_sizes.default", "getitem", "getitem"]),
    "tensor_split": (lambda x: x.tensor_split(3, 1)[0], ["split_with_sizes.default", "getitem"]),
    "unbind": (lambda x: x.unbind(1)[2], ["select.int"]),
    "slice": (lambda x: x[:, 1:3, ::2], ["slice.Tensor"] * 2),
    "slice_all": (lambda x: x[:, :] * 1.5, ["mul.Tensor"]),
    "select": (lambda x: x[:, -1], ["select.int"]),
    "narrow": (lambda x: x.narrow(2, 1, 3), ["slice.Tensor"]),
    "index": (lambda x: x[:, torch.tensor([2, 0])], ["index.Tensor"]),
    "mean": (lambda x: x.mean(1), ["mean.dim"]),
    "max_pool": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), ["max_pool2d.default"]),
    "avg_pool": (nn.AvgPool2d(2, count_include_pad=False), ["avg_pool2d.default"]),
    "adaptive_avg_pool": (nn.AdaptiveAvgPool2d((2, 3)), ["adaptive_avg_pool2d.default"]),
    "global_avg_pool": (nn.AdaptiveAvgPool2d(1), ["adaptive_avg_pool2d.default"]),
    "adaptive_max_pool": (nn.AdaptiveMaxPool2d(2), ["adaptive_max_pool2d.default", "getitem"]),
    "flatten": (nn.Flatten(), ["flatten.using_ints"]),
    "view": (lambda x: x.view(x.size(0), 2, -1), ["reshape.default"]),
    "reshape": (lambda x: x.reshape(-1, 6), ["reshape.default"]),
    "unflatten": (nn.Unflatten(1, (2, 2)), ["reshape.default"]),
    "view_of_same_shape": (lambda x: x.view(x.shape) + 1, ["add.Tensor"]),
    "unsqueeze": (lambda x: x.unsqueeze(1).squeeze(1), ["unsqueeze.default", "squeeze.dims"]),
    "squeeze_nothing": (lambda x: x.squeeze(2) + 1, ["add.Tensor"]),
    "transpose": (lambda x: x.transpose(1, 2), ["transpose.int"]),
    "swapaxes": (lambda x: x.swapaxes(1, 2), ["transpose.int"]),
    "mT": (lambda x: x.mT, ["transpose.int"]),
    "permute": (lambda x: x.permute(0, 3, 1, 2), ["permute.default"]),
    "movedim": (lambda x: x.movedim(1, -1), ["permute.default"]),
    "pad": (lambda x: F.pad(x, (1, 2), value=0.5), ["pad.default"]),
    "zero_pad": (nn.ZeroPad2d(1), ["pad.default"]),
    "reflection_pad": (nn.ReflectionPad2d(2), ["pad.default"]),
    "nearest": (nn.Upsample(scale_factor=2), ["upsample_nearest2d.vec"]),
    "bilinear": (lambda x: F.interpolate(x, size=(5, 7), mode="bilinear"), ["upsample_bilinear2d.vec"]),
    "matmul": (lambda x: x @ x.mT, ["transpose.int", "matmul.default"]),
    "bmm": (lambda x: torch.bmm(x[:, 0], x[:, 1].mT),
            ["select.int"] * 2 + ["transpose.int", "matmul.default"]),
    "baddbmm": (lambda x: torch.baddbmm(x[:, 2, :, :1], x[:, 0], x[:, 1].mT), None),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x), ["einsum.default"]),
    "sdpa": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
             ["scaled_dot_product_attention.default"]),
    "pow": (lambda x: x**2, ["pow.Tensor_Scalar"]),
    "where": (lambda x: torch.where(x > 0, x, -x), None),
    "masked_fill": (lambda x: x.masked_fill(torch.ones(8, 6).triu().bool(), -1.0), ["masked_fill.Scalar"]),
    "pixel_shuffle": (nn.PixelShuffle(2), ["pixel_shuffle.default"]),
    "channel_shuffle": (nn.ChannelShuffle(2), None),
    "cast": (lambda x: x.to(torch.float64).float() + 1, ["to.dtype", "to.dtype", "add.Tensor"]),
    "no_ops": (lambda x: x.contiguous().clone().detach().to("cpu").float() + 1, ["add.Tensor"]),
    "no_grad": (lambda x: _without_gradient(x), ["mul.Tensor", "add.Tensor"]),
}  # fmt: skip


def _without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    return y + x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_takes_its_canonical_form(name: str) -> None:
    function, expected = FUNCTIONS[name]
    gm = check(Apply(function, width=4), X2)
    found = kinds(gm)
    assert found[0] == "Conv2d"
    assert expected is None or found[1:] == expected
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_module") and isinstance(node.meta["val"], Tensor):
            assert len(node.meta["shape"]) == node.meta["val"].dim()
            assert node.meta["dtype"] == node.meta["val"].dtype


def test_dropout_that_never_stops_stays_an_operator() -> None:
    gm = read(Apply(lambda x: F.dropout(x, 0.5, training=True)).eval(), X2)
    assert kinds(gm) == ["dropout.default"]
    assert 0 < int((gm.eval()(torch.ones(1, 4, 8, 6)) == 0).sum()) < 192


COMMON = [name for name, (_, form) in FUNCTIONS.items() if form is not None]


@pytest.mark.parametrize("name", COMMON)
def test_operator_table_knows_it(name: str) -> None:
    gm = read(Apply(FUNCTIONS[name][0], width=4), X2)
    unknown = [n for n in gm.graph.nodes if n.op.startswith("call_") and operator(n, gm) is None]
    assert not unknown


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("given", [False, True])
def test_recurrent_layers(kind: Any, batch_first: bool, given: bool) -> None:
    layer = kind(5, 3, num_layers=2, bidirectional=True, batch_first=batch_first, dropout=0.2)
    gm = check(Recurrent(layer, given), torch.randn(1 if batch_first else 4, 4 if batch_first else 1, 5))
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    assert node.target == "rnn"
    assert repr(gm.rnn) == repr(layer)
    assert len(node.args) == (2 if given else 1)
    assert {n.target.__name__ for n in node.users} == {"getitem"}


def test_recurrent_variants() -> None:
    check(Recurrent(nn.LSTM(5, 4, proj_size=2, batch_first=True)), torch.randn(2, 7, 5))
    check(Recurrent(nn.GRU(5, 4, bias=False, batch_first=True)), torch.randn(2, 7, 5))
    check(Recurrent(nn.RNN(5, 4, nonlinearity="relu", batch_first=True)), torch.randn(2, 7, 5))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(need_weights: bool, batch_first: bool) -> None:
    gm = check(Attention(need_weights, batch_first), torch.randn(3, 5, 8), more=2 if batch_first else 1)
    layers = [n.target for n in gm.graph.nodes if n.op == "call_module"]
    assert layers == ["attn.in_proj", "attn.out_proj"]
    assert all(type(gm.get_submodule(name)) is nn.Linear for name in layers)


def test_cross_attention_splits_the_projection() -> None:
    gm = check(CrossAttention(), torch.randn(2, 5, 8), torch.randn(2, 7, 8))
    layers = [n.target for n in gm.graph.nodes if n.op == "call_module"]
    assert layers == ["attn.in_proj", "attn.in_proj_1", "attn.out_proj"]
    assert [gm.get_submodule(name).out_features for name in layers] == [8, 16, 8]


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    layer.requires_grad_(False)  # without gradients torch would take its fused fast path
    gm = check(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(1, 5, 8))
    names = [n.target for n in gm.graph.nodes if n.op == "call_module" and "layers.1" in n.target]
    assert {"layers.1.self_attn.in_proj", "layers.1.linear1", "layers.1.norm2"} <= set(names)


def test_shapes_follow_the_example() -> None:
    gm = check(Apply(nn.AvgPool2d(2), width=4), X2)
    pooled = next(n for n in gm.graph.nodes if "pool" in n.name)
    assert pooled.meta["shape"] == (1, 4, 4, 3)
    refresh(gm, (torch.randn(7, 4, 8, 6),))
    assert pooled.meta["shape"] == (7, 4, 4, 3)
