"""Single weights pruned from the outside: structures, schedules, what follows, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.model.zeros import hold_zeros
from fewbit.pruning.saliency import saliency_names


class Net(nn.Module):
    """A convolution, one without groups that is transposed, and a linear layer, for pictures with two bright rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one, self.back = nn.Conv2d(16, 24, 3, padding=1), nn.ConvTranspose2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(y + self.back(torch.relu(self.one(y))))
        out: Tensor = self.head(nn.functional.max_pool2d(y, 2).flatten(1))
        return out


def pictures(count: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(4, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 2.0
    return images, labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = fewbit.finetune(Net(), pictures(), epochs=4, batch_size=32, teacher=None, seed=0)
    return model.eval()


def learn(model: nn.Module) -> nn.Module:
    found: nn.Module = fewbit.finetune(model, pictures(), epochs=1, batch_size=32, teacher=None, seed=0)
    return found


def zeros(model: nn.Module) -> dict[str, Tensor]:
    names = ("stem.weight", "one.weight", "back.weight", "head.weight")
    return {name: model.get_parameter(name) == 0 for name in names}


@pytest.mark.parametrize("name", [n for n in saliency_names() if n != "movement"])
def test_every_criterion_reaches_the_share(trained: nn.Module, name: str) -> None:
    before = copy.deepcopy(trained.state_dict())
    small = fewbit.prune(trained, data=pictures(), sparsity=0.6, criterion=name)
    report = small.meta["sparsity"]
    assert report.share == pytest.approx(0.6, abs=0.01)
    dense = {each.weight for each in report.weights if each.reason is not None}
    assert dense == ({"back.weight"} if name in ("obs", "obc", "wanda") else set())
    found = zeros(small)
    assert all(bool(found[each.weight].any()) != (each.weight in dense) for each in report.weights)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert "% of the weights are zero. The file can be smaller" in str(report) and "not zero" in str(report)


def test_the_fit_brings_outputs_back(trained: nn.Module) -> None:
    images, _ = pictures()
    answers = [
        fewbit.prune(trained, data=pictures(), sparsity=0.7, criterion="obs", repair=repair)(images).detach()
        for repair in (False, True)
    ]
    errors = [float((a - trained(images).detach()).square().mean()) for a in answers]
    assert errors[1] < 0.5 * errors[0]


def test_structures(trained: nn.Module) -> None:
    images, _ = pictures()
    two = fewbit.prune(trained, images[:1], structure="2:4")
    report = {each.weight: each for each in two.meta["sparsity"].weights}
    assert "1 inputs are no multiple of 4" in str(report["stem.weight"].reason)
    for name, axis in (("one.weight", 1), ("back.weight", 0), ("head.weight", 1)):
        weight = two.get_parameter(name).movedim(axis, -1)
        assert bool((weight.unflatten(-1, (-1, 4)).count_nonzero(-1) == 2).all())
    blocks = fewbit.prune(
        trained, images[:1], structure="block", block=(8, 2), sparsity=0.5, ignore=("head",)
    )
    assert not bool((blocks.get_parameter("head.weight") == 0).any())
    tiles = (blocks.get_parameter("one.weight") == 0).reshape(3, 8, 8, 2, 9).float().mean((1, 3))
    assert set(tiles.unique().tolist()) == {0.0, 1.0}
    same = fewbit.prune(trained, images[:1], sparsity=0.5, scope="uniform")
    assert all(float(found.float().mean()) == pytest.approx(0.5, abs=0.01) for found in zeros(same).values())
    most = fewbit.prune(trained, images[:1], sparsity=0.95, least=0.04)
    assert all(each.nonzero >= round(0.04 * each.numbers) for each in most.meta["sparsity"].weights)


def test_zeros_stay_through_all_that_follows(trained: nn.Module, tmp_path: Path) -> None:
    """Fine-tuning, distillation, saving, quantization, training in codes, export."""
    small = fewbit.prune(trained, data=pictures(), sparsity=0.7)
    masks = zeros(small)

    def check(model: Any) -> None:
        tensors = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
        for name, mask in masks.items():
            value = model.qtensors[name].dequantize() if hasattr(model, "qtensors") else tensors[name]
            assert not bool(value[mask].any()), name

    tuned = fewbit.finetune(small, pictures(), epochs=2, teacher=trained, optimizer="sgd", weight_decay=0.01)
    assert not torch.equal(tuned.get_parameter("one.weight"), small.get_parameter("one.weight"))
    check(tuned)
    again = fewbit.load(fewbit.save(tuned, tmp_path / "tuned"))
    check(learn(again))
    for options in ({}, {"rounding": "gptq", "weights": "int4"}, {"rounding": "adaround", "weights": "int4"},
                    {"rounding": "brecq", "weights": "int4", "iterations": 4, "finetune": 1},
                    {"weights": "codebook3", "activations": "float", "finetune": 1}):  # fmt: skip
        check(fewbit.quantize(tuned, pictures()[0], **options))
    int8 = fewbit.quantize(tuned, pictures()[0])
    check(fewbit.finetune(int8, pictures(), epochs=1, teacher=trained))
    trained_in_codes = fewbit.finetune(
        tuned, pictures(), epochs=1, weights="codebook4", activations="float", granularity="tensor"
    )
    check(trained_in_codes)
    low = fewbit.finetune(
        fewbit.load(fewbit.save(tuned, tmp_path / "tuned")), pictures(), epochs=2, weights="ternary"
    )
    check(low)
    assert fewbit.export(low, tmp_path / "low.onnx").verification.exact


@pytest.mark.parametrize("budget", [{"sparsity": 0.6}, {"speedup": 1.5}])
def test_a_network_that_is_trained_in_codes(trained: nn.Module, budget: dict[str, Any]) -> None:
    """Pruned in its latent weights, and back in codes by its own recipe."""
    images, _ = pictures()
    aware = fewbit.quantize(trained, images, weights="int4", trainable=fewbit.Training(weights="ste"))
    small = fewbit.prune(aware, data=pictures(), **budget)
    assert (
        type(small) is type(aware)
        and small.recipe == aware.recipe
        and small.training_with == aware.training_with
    )
    done = fewbit.finetune(small, pictures(), epochs=1, teacher=trained)
    assert {row.scheme.format for row in done.plan.weights() if row.scheme} == {"int4"}
    if "sparsity" in budget:
        for name, mask in zeros(small.latent_model()).items():
            assert bool(mask.any()) and not bool(done.qtensors[name].dequantize()[mask].any())
    else:
        assert done.graph.get_submodule("one").out_channels < 24
    with pytest.raises(RecipeError, match="in one step"):
        fewbit.prune(aware, data=pictures(), steps=2, **budget)


def test_a_loop_of_ones_own_holds_zeros(trained: nn.Module) -> None:
    small = fewbit.prune(trained, data=pictures(), sparsity=0.7).train()
    masks, before = zeros(small), small.get_parameter("one.weight").detach().clone()
    optimizer = torch.optim.AdamW(small.parameters(), 0.01)
    images, labels = pictures()
    with hold_zeros(small):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(small(images), labels).backward()
            optimizer.step()
    for name, mask in masks.items():
        assert torch.equal(small.get_parameter(name) == 0, mask)
    assert not torch.equal(small.get_parameter("one.weight"), before)
    nn.functional.cross_entropy(small(images), labels).backward()
    assert bool(small.get_parameter("one.weight").grad[masks["one.weight"]].any()), "held only inside"


@pytest.mark.parametrize("options", [{"schedule": "cubic"}, {"schedule": "linear", "criterion": "movement"}])
def test_steps_with_training_in_between(trained: nn.Module, options: dict[str, Any]) -> None:
    seen = []

    def train(model: nn.Module) -> nn.Module:
        total = sum(int(mask.sum()) for mask in zeros(model).values())
        seen.append(total / sum(mask.numel() for mask in zeros(model).values()))
        return learn(model)

    small = fewbit.prune(trained, data=pictures(), sparsity=0.8, steps=3, train=train, **options)
    assert small.meta["sparsity"].share == pytest.approx(0.8, abs=0.01)
    expected = [0.8 * (1 - (2 / 3) ** 3), 0.8 * (1 - (1 / 3) ** 3), 0.8]
    if options.get("criterion") == "movement":  # which has to see what training does first
        expected = [0.0, 0.8 / 3, 1.6 / 3, 0.8]
    assert seen == pytest.approx(expected, abs=0.01)
    images, labels = pictures()
    assert float((small.eval()(images).argmax(1) == labels).double().mean()) > 0.9


def test_lottery_tickets_go_back_to_where_they_began(trained: nn.Module) -> None:
    torch.manual_seed(5)
    early = Net()
    states = []

    def train(model: nn.Module) -> nn.Module:
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return learn(model)

    small = fewbit.prune(
        trained, data=pictures(), sparsity=0.5, steps=2, schedule="geometric", train=train, rewind=early
    )
    start = dict(early.named_parameters())
    for state in states:
        for name, value in state.items():
            kept = value != 0
            assert torch.equal(value[kept], start[name][kept])
    left = [1 - float((state["one.weight"] == 0).float().mean()) for state in states]
    assert left[1] < left[0] and small.meta["sparsity"].share == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ModelError, match=r"rewind: stem.weight has shape"):
        fewbit.prune(
            trained, data=pictures(), sparsity=0.5, train=train, rewind={"stem.weight": torch.zeros(2)}
        )


def test_recurrent_and_shared_weights() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rnn, self.out = (
                nn.Embedding(20, 8),
                nn.LSTM(8, 8, batch_first=True),
                nn.Linear(8, 20),
            )
            self.out.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.rnn(self.words(x))[0])
            return y

    small = fewbit.prune(Text().eval(), torch.randint(20, (2, 5)), sparsity=0.5, train=lambda model: model)
    names = {each.weight for each in small.meta["sparsity"].weights}
    assert names == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"}
    assert small.get_parameter("out.weight") is small.get_parameter("words.weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "at most 0.99"),
        ({"sparsity": 0.5, "least": 0.6}, "at most 0.4"),
        ({"structure": "unstructured"}, "needs sparsity="),
        ({"structure": "2:4", "sparsity": 0.7}, "makes 0.5 of the weights zero"),
        ({"structure": "4:2"}, "or another N:M"),
        ({"structure": "2:4", "steps": 2}, "in one step"),
        ({"sparsity": 0.5, "speedup": 2.0}, "save no work"),
        ({"sparsity": 0.5, "structure": "channels"}, "single weights"),
        ({"sparsity": 0.5, "criterion": "l2"}, "unknown criterion of weights"),
        ({"sparsity": 0.5, "criterion": "movement"}, "give train="),
        ({"sparsity": 0.5, "schedule": "quick"}, "expected cubic"),
        ({"sparsity": 0.5, "ignore": ("nothing",)}, "matches no layer"),
        ({"sparsity": 0.5, "ignore": ("*",)}, "no weight of the model can be sparse"),
        ({"structure": "block", "sparsity": 0.5, "block": (0, 4)}, "how many outputs and inputs"),
        ({"structure": "block", "sparsity": 0.5, "block": 4}, "how many outputs and inputs"),
        ({"sparsity": 0.5, "least": -1}, "the share of zeros"),
        ({"sparsity": "0.5"}, "the share of zeros"),
        ({"sparsity": 0.5, "multiple": 8}, "multiple: not for"),
        ({"sparsity": 0.5, "block": (2, 2)}, "block: not for"),
        ({"speedup": 2.0, "schedule": "linear"}, "schedule: for single weights"),
        ({"speedup": float("nan")}, "expected at least 1"),
        ({"macs": float("inf")}, "a positive number"),
    ],
)
def test_what_cannot_be_is_refused(trained: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fewbit.prune(trained, pictures()[0][:1], **options)


def test_other_bad_input(trained: nn.Module) -> None:
    images, _ = pictures()
    with pytest.raises(DataError, match="'obs' has to see data"):
        fewbit.prune(trained, images[:1], sparsity=0.5, criterion="obs")
    small = fewbit.prune(trained, images[:1], sparsity=0.5)
    with pytest.raises(RecipeError, match="zero already"):
        fewbit.prune(small, images[:1], sparsity=0.4)
    with pytest.raises(
        RecipeError, match=r"stem.weight: .* were pruned, and binary makes them other than zero"
    ):
        fewbit.quantize(small, images, weights="binary", activations="float")

    def careless(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.get_parameter("one.weight").add_(0.1)
        return model

    with pytest.raises(ModelError, match="hold_zeros"):
        fewbit.prune(trained, images[:1], sparsity=0.5, train=careless)
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        broken.get_parameter("one.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"one.weight holds nan"):
        fewbit.prune(broken, images[:1], sparsity=0.5)


def test_a_layer_at_which_nothing_arrives(trained: nn.Module) -> None:
    """Nothing can be fitted there, and nothing must break."""
    dead = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 4)
    )
    with torch.no_grad():
        dead[0].bias.fill_(-1e3)
    x = torch.rand(64, 8)
    for budget in ({"sparsity": 0.5}, {"speedup": 2.0}):
        small = fewbit.prune(dead.eval(), data=x, **budget)
        assert all(bool(p.isfinite().all()) for p in small.parameters())
    assert fewbit.prune(dead, data=x, sparsity=0.5).meta["sparsity"].share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "wanda"},
        {"scope": "uniform"},
        {"scope": "uniform", "structure": "block", "block": (8, 1)},
    ],
)
def test_no_layer_is_emptied(options: dict[str, Any]) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 4)
    ).eval()
    small = fewbit.prune(net, data=torch.rand(32, 1, 8, 8), sparsity=0.95, **options)
    assert all(each.nonzero > 0 for each in small.meta["sparsity"].weights)


def test_structures_on_top_of_each_other(trained: nn.Module) -> None:
    images, _ = pictures()
    half = fewbit.prune(trained, images[:1], sparsity=0.5)
    blocks = fewbit.prune(
        half, images[:1], sparsity=0.75, structure="block", scope="uniform", ignore=("stem", "back", "head")
    )
    weight = half.get_parameter("one.weight").detach().abs().reshape(6, 4, 4, 4, 9).mean((1, 3))
    kept = (blocks.get_parameter("one.weight").reshape(6, 4, 4, 4, 9) != 0).any(3).any(1)
    assert float(weight[kept].min()) >= float(weight[~kept].max())
    assert bool((blocks.get_parameter("one.weight")[half.get_parameter("one.weight") == 0] == 0).all())
    pairs = fewbit.prune(half, images[:1], structure="2:4", ignore=("stem",))
    assert pairs.meta["sparsity"].share >= 0.5
    fewer = fewbit.prune(half, images[:1], speedup=1.3)
    assert "sparsity" not in fewer.meta and fewer.meta["sparse"] == half.meta["sparse"]


def test_inputs_and_outputs_of_other_kinds(trained: nn.Module) -> None:
    images, labels = pictures()
    wide = copy.deepcopy(trained).double()
    assert fewbit.prune(wide, images[:2].double(), sparsity=0.5).meta["sparsity"].share > 0.49
    assert fewbit.prune(trained, images[:2].numpy(), speedup=1.5).meta["pruning"].macs > 0

    class Named(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.body, self.heads = nn.Linear(64, 16), nn.ModuleList(nn.Linear(16, 4) for _ in range(heads))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = torch.relu(self.body(x.flatten(1)))
            return {str(i): head(y) for i, head in enumerate(self.heads)}

    fewbit.prune(Named(1).eval(), data=(images, labels), sparsity=0.5, criterion="taylor")
    with pytest.raises(DataError, match=r"heads\.1: the loss does not feel this layer"):
        fewbit.prune(Named(2).eval(), data=(images, labels), sparsity=0.5, criterion="obs")
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()
    with pytest.raises(DataError, match="no classes on its last axis"):
        fewbit.prune(one, data=images, sparsity=0.5, criterion="taylor")
    with pytest.raises(DataError, match="several times"):
        fewbit.prune(trained, images[:1], data=iter([images[:8]]), sparsity=0.5, criterion="wanda")


def test_what_training_may_give_back(trained: nn.Module) -> None:
    images, _ = pictures()

    def in_place(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("head.bias").add_(1.0)

    def forgetful(model: nn.Module) -> nn.Module:
        assert isinstance(model.meta, dict) and model.meta.pop("sparse")
        return model

    assert len(fewbit.prune(trained, images[:1], sparsity=0.5, train=forgetful).meta["sparse"]) == 4
    small = fewbit.prune(trained, images[:1], sparsity=0.5, train=in_place)
    assert torch.equal(small.get_parameter("head.bias"), trained.get_parameter("head.bias") + 1)
    with pytest.raises(ModelError, match=r"train= gave a model without .*\.module"):
        fewbit.prune(trained, images[:1], sparsity=0.5, train=nn.Sequential)
    with pytest.raises(ModelError, match="no weights known to be sparse"), hold_zeros(trained):
        pass
    sparse = fewbit.prune(trained, images[:1], sparsity=0.5)
    fewer = fewbit.prune(sparse, data=pictures(), speedup=1.3, train=learn)
    assert fewer.meta["sparse"] == sparse.meta["sparse"]
    assert float((fewer.get_parameter("one.weight") == 0).float().mean()) > 0.2
