"""The reader on whole models: names, ties, modes, inputs and outputs, in-place writes, refusals."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import networks as nets
import pytest
import torch
import torch.nn.functional as F
from test_torch_reader_layers import check, kinds, randomise
from torch import Tensor, nn

import fewbit.model.readers.torch as reader
from fewbit.errors import ModelError
from fewbit.model.readers.torch import read
from fewbit.model.torch_convert import Tables
from fewbit.model.torch_layers import LAYERS
from fewbit.model.torch_rewrite import DROPPED, REWRITES

aten = torch.ops.aten
IMAGE = torch.randn(1, 3, 8, 8)


def layers(gm: Any) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]


def test_residual_network_keeps_names_and_order() -> None:
    gm = check(nets.ResNet(), IMAGE)
    block = ["conv1", "bn1", "conv2", "bn2"]
    expected = ["conv1", "bn1", *(f"layer1.{i}.{n}" for i in (0, 1) for n in block), "dropout", "fc"]
    assert layers(gm) == expected
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    assert names == [
        "relu", "layer1_0_relu", "layer1_0_add", "layer1_0_relu_1", "layer1_1_relu", "layer1_1_add",
        "layer1_1_relu_1", "avg_pool2d", "reshape",
    ]  # fmt: skip
    by_name = {n.name: n for n in gm.graph.nodes}
    assert by_name["layer1_0_add"].meta["layer"] == "layer1.0"
    assert by_name["layer1_0_relu"].meta["layer"] == "layer1.0.relu"
    assert by_name["layer1_0_conv1"].meta["layer"] == "layer1.0.conv1"
    assert by_name["reshape"].args[1] == [-1, 8]
    assert gm.meta["dynamic"]["x"][1:] == (3, 8, 8)
    assert gm.meta["notes"] == []
    assert set(gm.state_dict()) == set(nets.ResNet().state_dict())


def test_every_free_dimension_is_free() -> None:
    gm = read(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGE)
    assert [type(s) for s in gm.meta["dynamic"]["input_1"]] == [str, int, str, str]
    assert gm(torch.randn(5, 3, 11, 9)).shape == (5, 4)


def test_sequence_length_is_free_in_attention() -> None:
    model = nets.Attention().eval()
    gm = read(model, torch.randn(2, 5, 8))
    x = torch.randn(3, 9, 8)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_size_that_decides_what_is_computed_is_fixed() -> None:
    gm = read(nets.Apply(lambda x: x * 2 if x.shape[1] % 2 == 0 else x), torch.randn(3, 4, 5))
    batch, even, last = gm.meta["dynamic"]["x"]
    assert isinstance(batch, str) and even == 4 and isinstance(last, str)


def test_dynamic_shapes_are_passed_through() -> None:
    gm = read(nn.Linear(3, 2), torch.randn(4, 3), dynamic_shapes=({},))
    assert gm.meta["dynamic"] == {"input_1": (4, 3)}


def test_reader_leaves_the_module_as_it_was() -> None:
    model = randomise(nets.Frozen()).train()
    model.frozen.eval()
    before = copy.deepcopy(model.state_dict())
    gm = read(model, IMAGE)
    assert model.training and not model.frozen.training and model.live.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert gm.training and not gm.frozen.training and gm.live.training
    with torch.no_grad():
        gm.conv.weight.zero_()
        gm.live.running_mean.fill_(3.0)
    assert torch.equal(model.conv.weight, before["conv.weight"])
    assert torch.equal(model.live.running_mean, before["live.running_mean"])


def test_batch_norm_learns_and_dropout_drops_in_train_mode() -> None:
    model = randomise(nets.ResNet()).train()
    gm = read(model, IMAGE)
    x = torch.randn(6, 3, 8, 8)
    before = gm.bn1.running_mean.clone()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(gm(x), expected)
    assert not torch.equal(gm.bn1.running_mean, before)
    torch.testing.assert_close(gm.bn1.running_mean, model.bn1.running_mean)
    assert int(gm.bn1.num_batches_tracked) == 1
    gm.eval()
    torch.testing.assert_close(gm(x), model.eval()(x))


def test_gradients_are_those_of_the_module() -> None:
    model = randomise(nets.ResNet()).eval()
    gm = read(model, IMAGE)
    x = torch.randn(4, 3, 8, 8)
    for module in (model, gm):
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gm.get_parameter(name).grad, parameter.grad)


def test_copy_state_dict_and_mode_of_the_graph() -> None:
    gm = read(nets.ResNet().eval(), IMAGE)
    twin = copy.deepcopy(gm)
    other = randomise(nets.ResNet())
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(twin(IMAGE), other.eval()(IMAGE))
    assert not torch.equal(twin(IMAGE), gm(IMAGE))
    assert [n.meta.get("shape") for n in twin.graph.nodes] == [n.meta.get("shape") for n in gm.graph.nodes]


def test_module_used_twice_is_one_layer() -> None:
    gm = check(nets.Twice(), torch.randn(2, 4, 6, 6))
    assert layers(gm) == ["conv", "bn", "conv", "bn"]
    assert len(list(gm.parameters())) == 4


def test_tied_weights_stay_tied() -> None:
    gm = check(nets.Tied(), torch.randint(0, 11, (1, 7)), more=2)
    assert layers(gm) == ["embed", "norm", "head"]
    assert gm.embed.weight is gm.head.weight
    assert gm.embed.padding_idx == 0


def test_weights_tied_by_hand_stay_tied() -> None:
    gm = check(nets.TiedByHand(), torch.randint(0, 11, (1, 7)), more=2)
    assert kinds(gm) == ["Embedding", "tanh.default", "Linear"]
    assert gm.get_submodule(layers(gm)[1]).weight is gm.embed.weight


def test_parameters_outside_layers() -> None:
    gm = check(nets.Loose(), torch.randn(1, 3, 5, 5))
    assert kinds(gm) == ["Conv2d", "mean.dim", "Linear", "Linear", "mul.Tensor", "add.Tensor"]
    assert layers(gm) == ["kernel", "w", "v"]
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr"] == ["gamma", "shift"]
    assert gm.w.weight.shape == (5, 6)
    assert isinstance(gm.gamma, nn.Parameter) and not isinstance(gm.shift, nn.Parameter)


def test_views_of_parameters_and_constants_are_folded() -> None:
    gm = check(nets.Gamma(), torch.randn(1, 4, 5, 6))
    assert kinds(gm) == ["mul.Tensor", "mul.Tensor", "add.Tensor"]
    assert gm.gamma.shape == (4, 1, 1) and isinstance(gm.gamma, nn.Parameter)
    assert gm.table.shape == (5, 6) and isinstance(gm.table, nn.Parameter)
    assert sum(1 for _ in gm.buffers()) == 1


def test_class_token() -> None:
    gm = check(nets.Token(), torch.randn(1, 5, 8))
    assert gm.token.shape == (1, 1, 8)
    assert "block.self_attn.in_proj" in layers(gm)


def test_parametrised_weight_is_frozen_into_the_layer() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))))
    gm = check(model, torch.randn(2, 4))
    assert layers(gm) == ["fc"]
    torch.testing.assert_close(gm.fc.weight, model.fc.weight)


def test_inputs_and_outputs_keep_their_structure() -> None:
    gm = check(nets.ManyOutputs(), torch.randn(1, 4), torch.randn(1, 5))
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["image", "meta"]
    result = gm(torch.randn(2, 4), torch.randn(2, 5))
    assert list(result) == ["sum", "parts"]
    assert type(result["parts"]) is tuple and type(result["parts"][1]) is list


def test_in_place_writes_show_in_every_view() -> None:
    x = torch.randn(2, 4, 3)
    model = nets.InPlace()
    gm = read(model, x)
    for actual, expected in zip(gm(x), model(x), strict=True):
        torch.testing.assert_close(actual, expected)
    names = [n.target._schema.name for n in gm.graph.nodes if hasattr(n.target, "_schema")]
    assert len(names) > 10 and not [name for name in names if name.endswith("_")]


def test_write_in_place_and_full_slices_cost_nothing() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y[:, :] += 1
        y[:, 1:2] -= 1
        return y

    names = ["mul.Tensor", "add.Tensor", "slice.Tensor", "sub.Tensor", "slice_scatter.default"]
    assert kinds(read(nets.Apply(function), torch.randn(2, 3))) == names


def test_input_is_not_written() -> None:
    x = torch.zeros(2, 3)
    gm = read(nets.Apply(lambda t: t.add_(1)), x)
    assert torch.equal(gm(x), torch.ones(2, 3)) and torch.equal(x, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_become_float32(dtype: torch.dtype) -> None:
    model = nets.ResNet().to(dtype)
    gm = read(model, IMAGE.to(dtype))
    assert {p.dtype for p in gm.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert gm.meta["notes"] == [f"{str(dtype)[6:]} parameters were converted to float32 before reading"]


def test_fixed_batch_is_said() -> None:
    gm = read(nets.Apply(lambda t: t.reshape(2, 2) + 1), torch.randn(1, 4))
    assert gm.meta["dynamic"] == {"x": (1, 4)}
    assert gm.meta["notes"] == ["the batch size is fixed at 1: the model does not allow another"]
    gm = read(nets.Apply(lambda t: t.unbind(0)), torch.randn(3, 4))
    assert gm.meta["notes"] == ["the batch size is fixed at 3: the model does not allow another"]


def test_lost_dropout_of_attention_is_said() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.25, batch_first=True)
    gm = read(model, torch.randn(2, 5, 8))
    assert gm.meta["notes"] == [
        "self_attn: dropout of attention weights (p=0.25) acts in training only and was not kept"
    ]
    assert [gm.get_submodule(n).p for n in layers(gm) if "dropout" in n] == [0.25] * 3


def test_buffer_written_in_forward_is_said() -> None:
    model = nets.Counting()
    gm = read(model, torch.randn(2, 3))
    assert gm.meta["notes"] == ["forward writes to 'calls': the graph uses its value from when it was read"]
    assert torch.equal(gm(torch.zeros(1, 3)), torch.ones(1, 3)) and int(model.calls) == 0


def message(model: Any, example: Any) -> str:
    with pytest.raises(ModelError) as caught:
        read(model, example)
    return str(caught.value)


def test_error_not_a_module() -> None:
    expected = "the model is a function: expected a torch.nn.Module; for a file, load it first"
    assert message(F.relu, IMAGE) == expected
    assert message([1], IMAGE).startswith("the model is a list: expected a torch.nn.Module")


def test_error_example() -> None:
    assert message(nn.ReLU(), ()) == (
        "the example is empty: expected one tensor for each input of the model's forward"
    )
    assert message(nn.ReLU(), (IMAGE, 3)) == (
        "example input 1 is an int: expected a torch.Tensor; wrap the model if its forward takes "
        "other arguments"
    )


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("-inf"), "-inf")])
def test_error_weights_not_finite(value: float, shown: str) -> None:
    model = nets.ResNet()
    model.layer1[1].conv2.weight.data[2, 1, 0, 1] = value
    assert message(model, IMAGE) == (
        f"layer1.1.conv2.weight holds {shown} at [2, 1, 0, 1]: expected finite numbers; repair or retrain "
        "that layer first"
    )
    model = nets.ResNet()
    model.bn1.running_var[3] = value
    assert message(model, IMAGE).startswith(f"bn1.running_var holds {shown} at [3]: expected finite numbers")


def test_infinite_masks_are_allowed() -> None:
    model = nn.Softmax(-1)
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    assert read(model, torch.randn(2, 2))
    assert read(nets.Apply(lambda x: (x + torch.tensor([0.0, float("-inf")])).softmax(-1)), torch.randn(2, 2))


def test_error_control_flow_on_values() -> None:
    assert re.fullmatch(
        r"Branches branches or takes a size from the values of a tensor at networks.py, line \d+: "
        r"expected control "
        "flow that depends on shapes only; use torch.where, or quantize the parts around it",
        message(nets.Branches(), torch.randn(2, 3)),
    )


def test_error_wrong_example() -> None:
    assert message(nn.Linear(4, 2), torch.randn(2, 3)) == (
        "Linear does not run on the example of shape [2, 3] (mat1 and mat2 shapes cannot be "
        "multiplied (2x3 and 4x2)): "
        "expected what its forward takes; give one tensor for each input, with the batch first"
    )
    assert "missing 1 required positional argument: 'memory'" in message(
        nets.CrossAttention(), torch.randn(2, 3)
    )


def test_error_names_what_cannot_be_exported() -> None:
    def to_numpy(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)

    assert message(nets.Apply(to_numpy), torch.randn(2, 3)).startswith(
        f"Apply cannot be exported at {Path(__file__).name}, line {to_numpy.__code__.co_firstlineno + 1} ("
    )


def test_error_names_the_first_layer_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = LAYERS[aten.batch_norm.default]
    wrong = {**LAYERS, aten.batch_norm.default: lambda c, node, a: rule(c, node, {**a, "eps": 0.5})}
    monkeypatch.setattr(reader, "TABLES", Tables(wrong, REWRITES, DROPPED))
    assert re.fullmatch(
        r"the graph of ResNet differs from the module on the example by \d.\de-\d\d \(relative; "
        r"expected at most "
        r"1e-05\), first at layer 'bn1'",
        message(randomise(nets.ResNet()), IMAGE),
    )


def test_error_names_an_operator_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**REWRITES, aten.relu.default: lambda c, node, a: c.get(node.args[0])}
    monkeypatch.setattr(reader, "TABLES", Tables(LAYERS, wrong, DROPPED))
    assert message(nets.Apply(F.relu), IMAGE).endswith(
        "first at an operator between layers (no layer's own output differs)"
    )


def test_error_another_batch_size_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    # a graph that holds the example's batch size as a number runs on the example and nowhere else
    monkeypatch.setitem(
        REWRITES,
        aten.view.default,
        lambda c, node, a: c.emit(aten.reshape.default, (c.arg(a["self"]), [2, 6]), node),
    )
    assert message(nets.Apply(lambda x: x.view(x.size(0), -1)), torch.randn(2, 2, 3)) == (
        "the graph of Apply does not run on a batch of 3 (shape '[2, 6]' is invalid for input of "
        "size 18): expected the "
        "module's own outputs; fix the sizes that the model depends on with dynamic_shapes"
    )


def test_error_model_that_cannot_be_copied() -> None:
    model = nn.Linear(3, 2)
    model.cache = model.weight * 2
    assert message(model, torch.randn(2, 3)) == (
        "Linear cannot be copied (Only Tensors created explicitly by the user (graph leaves) support "
        "the deepcopy protocol at "
        "the moment): fewbit reads a copy, so that your model stays as it is; remove old-style "
        "weight_norm or tensors that "
        "carry a gradient history first"
    )


def test_error_write_through_a_view_without_inverse() -> None:
    text = message(nets.Apply(lambda x: (x * 1).expand(2, 2, 3).diagonal().add_(1)), torch.randn(2, 2, 3))
    assert "in place through aten.diagonal.default: expected a slice, select, reshape or transpose" in text
