"""A trained network in eval mode gives the bits of the model that it is converted to, whatever it is made of."""

import copy

import pytest
import torch
from random_networks import draw
from torch import nn

import fewbit
from fewbit.errors import ModelError, RecipeError
from fewbit.model.lowering import lower
from fewbit.targets._saturation import can_saturate
from fewbit.training.layers import TrainableLayer


def shaken(q, inputs, steps=3):
    """A few steps of training on nothing in particular, with everything that learns moved away from its start."""
    q.train()
    optimizer = torch.optim.SGD([p for p in q.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        found = q(*inputs)
        first = found if isinstance(found, torch.Tensor) else next(iter(found))
        loss = (first - torch.randn_like(first)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(q.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        for p in q.parameters():
            if p.requires_grad:
                p.mul_(1 + 0.05 * torch.randn_like(p))
    return q.eval()


def same_bits(q, inputs):
    converted = q.convert()
    with torch.no_grad():
        found, expected = q(*inputs), converted(*inputs)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
    return converted


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed):
    drawn = draw(seed)
    data = [drawn.inputs(16, variant) for variant in range(3)]
    q = fewbit.quantize(drawn.module.eval(), data, example=drawn.inputs(4), trainable=True, **drawn.recipe)
    inputs = drawn.inputs(6, 9)
    converted = same_bits(shaken(q, inputs), inputs)
    lower(converted)


def images(n=16, channels=3):
    return torch.randn(n, channels, 8, 8)


class Net(nn.Module):
    """Convolutions, batch norms of every kind of channel, a shortcut, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.up, self.bn3 = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 5)
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.2, 3)
        with torch.no_grad():
            self.bn1.weight[:3] = torch.tensor([0.0, -1e-9, 1e-7])

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.linear(self.bn3(self.up(x)).mean((2, 3)))


WAYS = [
    {"recipe": "int8"},
    {"recipe": "tensorrt", "target": "tensorrt"},
    {"recipe": "int8", "weights": "int2", "activations": "int2", "weight_symmetric": False},
    {"recipe": "int8", "weights": "int3", "activations": "uint3", "outputs": "float"},
    {"recipe": "w4a4"},
    {"recipe": "int8-per-tensor"},
    {"recipe": "int8", "granularity": "tensor"},
    {"recipe": "int8-dynamic"},
    {"recipe": "int8-weight-only", "rules": [{"match": "conv*", "weights": "int4", "group_size": 9}]},
    {"recipe": "int8", "weights": "codebook2_shared", "activations": "float"},
    {"recipe": "int8", "weights": "codebook2", "activations": "float"},
    {"recipe": "int8", "weights": "binary", "activations": "uint1"},
    {"recipe": "int8", "weights": "ternary"},
    {"recipe": "int8", "weights": "apot_4"},
    {"recipe": "float16"},
    {"recipe": "int8", "rules": [{"match": "conv2", "weights": "float", "activations": "float"}]},
    {"recipe": "int8", "smooth_quant": True},
]


@pytest.mark.parametrize(
    "way", WAYS, ids=lambda way: "-".join(str(v) for k, v in way.items() if k != "rules")
)
def test_batch_norms_and_shortcuts(way):
    net = Net().eval()
    before = copy.deepcopy(net.state_dict())
    q = fewbit.quantize(net, images(40), trainable=True, **way)
    same_bits(shaken(q, (images(),)), (images(),))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize("weights", ["int8", "int6"])
def test_training_begins_where_quantization_ended(weights):
    """Batch norms with negative weights, dead channels and all."""
    net, x = Net().eval(), images(40)
    q = fewbit.quantize(net, x, weights=weights, trainable=True)
    quantized = fewbit.quantize(net, x, weights=weights)
    with torch.no_grad():
        found, expected = q.eval()(x), quantized(x)
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()


ESTIMATORS = [
    ("lsq", "lsq_plus", {"weights": "int4", "activations": "uint4"}),
    ("ste", "pact", {"weights": "int4", "activations": "uint4"}),
    ("dorefa", "dorefa", {"weights": "int3", "activations": "uint3"}),
    ("apot", "lsq", {"weights": "apot_4", "activations": "uint4"}),
    ("xnor", "reactnet", {"weights": "binary", "activations": "uint1"}),
    ("irnet", "irnet", {"weights": "binary", "activations": "uint1"}),
    ("reactnet", "lsq", {"weights": "binary", "activations": "uint1"}),
    ("twn", "lsq", {"weights": "ternary", "activations": "int8"}),
    ("ttq", "lsq", {"weights": "codebook2_shared", "activations": "float"}),
    ("codebook", "lsq", {"weights": "codebook3_shared", "activations": "float"}),
]


@pytest.mark.parametrize(
    ("weights", "activations", "formats"), ESTIMATORS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_estimator_in_a_network(weights, activations, formats):
    training = fewbit.Training(weights=weights, activations=activations)
    q = fewbit.quantize(Net().eval(), images(40), trainable=training, ends="int8", **formats)
    same_bits(shaken(q, (images(),)), (images(),))


@pytest.mark.parametrize("gradients", ["int4", "float8_e5m2"])
def test_quantized_gradients_train_and_change_nothing_deployed(gradients):
    torch.manual_seed(1)
    training = fewbit.Training(gradients=gradients)
    q = fewbit.quantize(Net().eval(), images(40), trainable=training)
    same_bits(shaken(q, (images(),)), (images(),))


def test_trained_codes_cannot_saturate_a_cpu_without_vnni():
    """Scales that shrink would let two neighbouring products leave 16 bits; unless the recipe says so, they cannot."""
    for portable in (True, False):
        q = fewbit.quantize(Net().eval(), images(40), portable=portable, trainable=True)
        layer = dict(q.layers())["conv2"]
        with torch.no_grad():
            layer.estimators["weight"].scale.mul_(0.2)
        converted = same_bits(q.eval(), (images(),))
        assert can_saturate(converted.qtensors["conv2.weight"].codes) != portable


def test_frozen_codes_are_deployed_as_frozen():
    q = fewbit.quantize(
        Net().eval(), images(40), weights="int3", trainable=fewbit.Training(freeze=0.02), recipe="int8"
    )
    q.train()
    layer = dict(q.layers())["conv2"]
    with torch.no_grad():
        for step in range(30):  # weights that jump back and forth
            layer.layer.weight.mul_(1.6 if step % 2 else 1 / 1.6)
            with torch.enable_grad():
                q(images())
    estimator = layer.estimators["weight"]
    assert bool(estimator.oscillation.frozen.any())
    codes = estimator.hard(layer.layer.weight).codes
    layer.layer.weight.data.mul_(1.3)
    again = estimator.hard(layer.layer.weight).codes
    frozen = estimator.oscillation.frozen.reshape(codes.shape)
    assert torch.equal(codes[frozen], again[frozen]) and not torch.equal(codes, again)
    same_bits(q.eval(), (images(),))


def test_a_batch_norm_in_training_uses_the_batch_and_no_gap_remains():
    """Statistics are of the quantized layer's own outputs; what is exported has them folded in."""
    net = Net().eval()
    q = fewbit.quantize(
        net, images(40), weights="int2", activations="int8", weight_symmetric=False, trainable=True
    )
    layer = dict(q.layers())["conv1"]
    before = layer.norm.running_mean.clone()
    x = images(64) + 3
    q.train()(x)
    assert not torch.equal(layer.norm.running_mean, before)
    for _ in range(200):
        q(x)
    converted = same_bits(q.eval(), (x,))
    with torch.no_grad():
        y = converted.graph.get_submodule("conv1")(fewbit_step(converted, x))
    means, gain = y.mean((0, 2, 3)), layer.norm.weight.detach().abs()
    assert torch.allclose(means, layer.norm.bias, atol=0.05 * float(gain.max()) + 0.02)


def fewbit_step(model, x):
    """The input as the first layer reads it."""
    step = next(n for n in model.graph.graph.nodes if n.op == "call_module")
    return model.graph.get_submodule(str(step.target))(x)


def test_latent_weights_can_be_quantized_otherwise():
    net = Net().eval()
    q = fewbit.quantize(net, images(40), weights="int4", trainable=True)
    x = images()
    with torch.no_grad():
        assert torch.allclose(q.latent_model()(x), net(x), rtol=1e-3, atol=1e-4)
    shaken(q, (x,))
    latent = q.latent_model()
    lower_bits = fewbit.quantize(latent, images(40), weights="int2", trainable=True)
    same_bits(lower_bits.eval(), (x,))
    layer = dict(q.layers())["conv2"]
    expected = layer.layer.weight.detach()
    assert torch.equal(dict(lower_bits.layers())["conv2"].layer.weight.detach().abs(), expected.abs())


def test_a_network_whose_weights_were_moved_has_no_float_form():
    q = fewbit.quantize(Net().eval(), images(40), equalize=True, trainable=True)
    with pytest.raises(ModelError, match="without equalize, smooth_quant"):
        q.latent_model()


class Tied(nn.Module):
    """One weight in two layers, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(torch.relu(self.c(x)))))))


def test_tied_weights_stay_tied():
    x = torch.randn(20, 6)
    q = fewbit.quantize(Tied().eval(), x, trainable=True)
    converted = same_bits(shaken(q, (x,)), (x,))
    assert torch.equal(converted.qtensors["a.weight"].codes, converted.qtensors["b.weight"].codes)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.memory, self.head = (
            nn.Embedding(30, 8),
            nn.LSTM(8, 12, batch_first=True),
            nn.Linear(12, 30),
        )

    def forward(self, x):
        return self.head(self.memory(self.words(x))[0])


def test_recurrent_layers_and_embeddings_learn_in_codes():
    x = torch.randint(30, (10, 7))
    q = fewbit.quantize(Words().eval(), x, recipe="int8-weight-only", weights="int4", trainable=True)
    layer = dict(q.layers())["memory"]
    assert isinstance(layer, TrainableLayer) and "weight_hh_l0" in layer.estimators
    before = layer.layer.weight_hh_l0.detach().clone()
    same_bits(shaken(q, (x,)), (x,))
    assert not torch.equal(layer.layer.weight_hh_l0.detach(), before)
    q.train()(x).sum().backward()
    assert all(p.grad is not None for p in q.parameters() if p.requires_grad)


def test_estimators_that_serve_nothing_are_refused():
    with pytest.raises(RecipeError, match="'irnet' serves none of the model's weights, which are int8"):
        fewbit.quantize(Net().eval(), images(40), trainable=fewbit.Training(weights="irnet"))


def test_trainable_models_go_where_quantized_ones_go(tmp_path):
    net = Net().eval()
    q = fewbit.quantize(net, images(40), trainable=True)
    artifact = fewbit.export(q, tmp_path / "m.onnx", time=False)
    assert artifact.verification.exact
    again = fewbit.load(fewbit.save(q, tmp_path / "m"))
    x = images()
    with torch.no_grad():
        assert torch.equal(again(x), q.eval()(x))
    with pytest.raises(ModelError, match="quantized already"):
        fewbit.quantize(q, images(40))
