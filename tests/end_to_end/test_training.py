"""Training on real digits: quantized, distilled, by stages, from Keras, in loops of one's own; what is refused."""

import copy
import json
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fewbit
from fewbit import finetuning
from fewbit.demo import DigitsNet
from fewbit.errors import DataError, ModelError, RecipeError, TrainingError
from fewbit.training.groups import parameter_groups

FEW = {"weights": "binary", "activations": "uint2", "ends": "int8"}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,300 digits to train on and 497 others."""
    bunch: Any = load_digits()
    images = torch.from_numpy((bunch.images / 16).astype(np.float32)[:, None])
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(7))
    return images[order[:1300]], labels[order[:1300]], images[order[1300:]], labels[order[1300:]]


def network(norms: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if norms else (lambda _: nn.Identity())
    return nn.Sequential(
        nn.Conv2d(1, 12, 3), norm(12), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), norm(24), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    images, labels, _, _ = digits()
    return fewbit.finetune(network(), (images, labels), epochs=6, batch_size=32, lr=3e-3, teacher=None)


def accuracy(model: Any) -> float:
    _, _, images, labels = digits()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def test_a_float_model_is_trained_as_a_copy(trained: nn.Module) -> None:
    assert isinstance(trained, nn.Sequential) and not trained.training
    assert accuracy(trained) > 0.95 > 0.3 > accuracy(network().eval())


def test_two_bits_come_near_float_and_are_exported_as_trained(trained: nn.Module, tmp_path: Any) -> None:
    images, labels, held, _ = digits()
    q = fewbit.finetune(trained, (images, labels), epochs=6, batch_size=32, **FEW)
    recipe = fewbit.Recipe(**FEW)
    assert accuracy(fewbit.quantize(trained, images, recipe=recipe)) < accuracy(q) - 0.08
    assert accuracy(q) > accuracy(trained) - 0.03
    artifact = fewbit.export(q, tmp_path / "q.onnx", time=False)
    assert artifact.verification.exact
    assert [r["epoch"] for r in q.facts["training"]] == [1, 2, 3, 4, 5, 6]
    assert q.facts["training"][-1]["loss"] < q.facts["training"][0]["loss"]
    again = fewbit.load(fewbit.save(q, tmp_path / "q"))
    with torch.no_grad():
        assert torch.equal(again(held), q(held))


def test_a_quantized_model_goes_on_to_learn(trained: nn.Module) -> None:
    images, labels, _, _ = digits()
    q = fewbit.quantize(trained, images, recipe=fewbit.Recipe(**FEW))
    before = accuracy(q)
    better = fewbit.finetune(q, (images, labels), epochs=3, batch_size=32, teacher=trained)
    assert accuracy(q) == before < accuracy(better) - 0.02
    assert better.plan == q.plan


def test_a_loop_of_ones_own(trained: nn.Module, tmp_path: Any) -> None:
    images, labels, held, _ = digits()
    q = fewbit.quantize(trained, images[:256], trainable=True, **FEW)
    optimizer = torch.optim.SGD(parameter_groups(q, 0.02, adaptive=False), 0.02, momentum=0.9)
    for _ in range(4):
        for x, y in DataLoader(TensorDataset(images, labels), 32, shuffle=True):
            loss = F.cross_entropy(q(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    q.eval()
    assert accuracy(q) > accuracy(trained) - 0.05
    fewbit.export(q, tmp_path / "q.onnx", time=False)
    with torch.no_grad():
        assert torch.equal(q(held), q.convert()(held))


@pytest.mark.parametrize(
    "way",
    [
        {"optimizer": "sgd", "lr": 0.02, "schedule": "linear"},
        {"optimizer": lambda groups: torch.optim.RMSprop(groups, 1e-4), "schedule": "constant"},
        {"precision": "bfloat16"},
        {"accumulate": 4, "clip": 1.0},
        {"distill": "dkd"},
        {"distill": "mse", "lr": 3e-4},
        {"distill": fewbit.Distillation(labels=1.0, temperature=2.0)},
        {"distill": fewbit.Distillation(features=["0", "3"], feature_weight=10.0)},
        {"distill": fewbit.Distillation(features={"3": "3"}, feature_loss="hint")},
        {"training": fewbit.Training(gradients="int8")},
        {"training": fewbit.Training(gradients="float8_e5m2", activations="pact")},
        {"training": fewbit.Training(freeze=0.1), "dampen": 1e-3},
        {
            "stages": [
                {"weights": "int8", "activations": "uint8"},
                {"weights": "int4", "activations": "uint4"},
            ]
        },
        {"compile": True, "epochs": 1},
        {"teacher": None, "loss": lambda found, labels: F.cross_entropy(found, labels, label_smoothing=0.1)},
        {"held_out": 0.1, "patience": 1, "epochs": 20},
    ],
    ids=lambda way: "-".join(way),
)
def test_every_way_to_train_helps(trained: nn.Module, way: dict[str, Any], tmp_path: Any) -> None:
    images, labels, _, _ = digits()
    settings = {"epochs": 4, "batch_size": 32, "lr": 2e-3, "folder": tmp_path, **FEW, **way}
    q = fewbit.finetune(trained, (images, labels), **settings)
    start = accuracy(fewbit.quantize(trained, images, recipe=fewbit.Recipe(**FEW)))
    assert accuracy(q) > start + 0.05


def test_features_of_a_graph_are_those_of_its_modules(trained: nn.Module) -> None:
    """Distilled by features, a student's block is compared with the same block: a float copy has no loss."""
    from fewbit.model.readers.torch import read
    from fewbit.training.features import Tapped

    images = digits()[0][:8]
    graph = read(trained, (images,))
    names = ["0", "1", "3", "7"]
    with torch.no_grad():
        _, from_modules = Tapped(copy.deepcopy(trained), names)(images)
        output, from_graph = Tapped(graph, names)(images)
        assert torch.allclose(output, trained(images), atol=1e-5)
    for a, b in zip(from_modules, from_graph, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(ModelError, match="the model has no layer 'conv9'"):
        Tapped(graph, ["conv9"])


def test_a_smaller_student_learns_from_a_teacher(trained: nn.Module) -> None:
    images, _, _, _ = digits()
    small = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    learned = fewbit.distill(small, trained, images, epochs=12, batch_size=32, lr=5e-3)  # no labels at all
    assert accuracy(learned) > 0.9
    in_codes = fewbit.distill(learned, trained, images, epochs=2, batch_size=32, weights="int4")
    assert isinstance(in_codes.plan, fewbit.Plan) and accuracy(in_codes) > 0.88


def test_tokens_are_distilled_where_they_count() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20))
    teacher = copy.deepcopy(student)
    tokens = torch.randint(20, (64, 9))
    labels = tokens.roll(-1, 1)
    labels[:, 5:] = -100
    with torch.no_grad():
        teacher[1].weight += 0.5 * torch.randn_like(teacher[1].weight)
    found = fewbit.distill(student, teacher, (tokens, labels), epochs=40, batch_size=16, lr=1e-2)
    with torch.no_grad():
        p, q = (F.log_softmax(m(tokens[:, :5]), -1) for m in (teacher, found))
        before = F.log_softmax(student(tokens[:, :5]), -1)
    assert F.kl_div(q, p, log_target=True) < 0.2 * F.kl_div(before, p, log_target=True)


def test_records_are_where_people_look(tmp_path: Any) -> None:
    images, labels, _, _ = digits()
    fewbit.finetune(
        network(), (images, labels), epochs=2, teacher=None, held_out=0.2, folder=tmp_path / "run"
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    table = np.genfromtxt(tmp_path / "run" / "metrics.csv", delimiter=",", names=True)
    assert [line["epoch"] for line in lines] == table["epoch"].tolist() == [1, 2]
    assert table["held_out_accuracy"].tolist() == [line["held_out_accuracy"] for line in lines]


def test_early_stopping_ends_with_the_best_epoch(tmp_path: Any) -> None:
    """Trained with a rate that ruins it after a while, the model is that of the smallest held-out loss."""
    images, labels, _, _ = digits()
    aside = (images[:300], labels[:300])
    rise = {"epochs": 12, "batch_size": 16, "schedule": "constant", "lr": 2e-2, "teacher": None}
    model = fewbit.finetune(
        network(False), (images[300:], labels[300:]), held_out=aside, patience=2, folder=tmp_path, **rise
    )
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [r["held_out_loss"] for r in records]
    assert 3 < len(losses) < 12 and losses.index(min(losses)) == len(losses) - 4
    with torch.no_grad():
        found = F.cross_entropy(model(aside[0]), aside[1]).item()
    assert found == pytest.approx(min(losses), rel=1e-4)


def test_a_keras_model_learns_in_codes(tmp_path: Any) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)), layers.Conv2D(8, 3, use_bias=False), layers.BatchNormalization(), layers.ReLU(),
            layers.Flatten(), layers.Dense(10),
        ]
    )  # fmt: skip
    images, labels, held, classes = digits()
    images, held = images.permute(0, 2, 3, 1), held.permute(0, 2, 3, 1)
    q = fewbit.finetune(
        model, (images, labels), epochs=8, batch_size=32, weights="int4", lr=5e-3, teacher=None
    )
    with torch.no_grad():
        assert float((q(held).argmax(1) == classes).double().mean()) > 0.9
    assert fewbit.export(q, tmp_path / "k.onnx", time=False).verification.exact


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(
    error: type[Exception], message: str, model: Any = None, data: Any = None, **settings: Any
) -> None:
    images, labels, _, _ = digits()
    with pytest.raises(error, match=message):
        data = (images, labels) if data is None else data
        fewbit.finetune(model or network(), data, **{"epochs": 1, "teacher": None, **settings})


def test_a_loss_that_is_not_finite_names_the_layer_and_keeps_the_last_state(tmp_path: Any) -> None:
    class Explodes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.mean() > 0.75, torch.log(-x.abs() - 1), x)

    images, labels, _, _ = digits()
    bad = images.clone()
    net = nn.Sequential(nn.Flatten(), Explodes(), nn.Linear(64, 10))
    good = DataLoader(TensorDataset(images[:64], labels[:64]), 32)

    class Later:
        epoch = 0

        def __iter__(self) -> Any:
            Later.epoch += 1
            yield from ((x if Later.epoch < 4 else bad[:32] * 0 + 1, y) for x, y in good)

    refused(
        TrainingError, r"epoch 3, batch 0: the loss is not finite; layer '1' is the first.*after epoch 2 is in", net,
        Later(), epochs=3, folder=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "last.safetensors").exists()


def test_steps_that_go_too_far_are_told() -> None:
    refused(TrainingError, "not finite", lr=1e30, epochs=3, optimizer="sgd")


def test_a_frozen_scale() -> None:
    q = fewbit.quantize(network(), digits()[0][:64], trainable=True)
    dict(q.layers())["3"].estimators["weight"].scale.requires_grad_(False)
    refused(TrainingError, r"3\.\S*scale: this scale is frozen.*'ste'", q)


def test_a_detached_scale() -> None:
    q = fewbit.quantize(network(), digits()[0][:64], trainable=True)
    layer = dict(q.layers())["3"]
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    refused(TrainingError, r"no gradient reaches this scale", q)


def test_a_teacher_that_does_not_match(trained: nn.Module) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    refused(ModelError, r"teacher gives outputs of shape \(128, 7\) and the model \(128, 10\)", teacher=other)
    refused(TrainingError, "teacher is 'resnet'", teacher="resnet")
    refused(
        RecipeError, "choose layers of the same height", teacher=trained,
        distill=fewbit.Distillation(features={"0": "3"}),
    )  # fmt: skip


def test_batches_of_one_with_batch_norm() -> None:
    refused(DataError, "batches of 1, and batch norm '1'", batch_size=1)
    images, labels, _, _ = digits()
    fewbit.finetune(
        network(), (images[:33], labels[:33]), batch_size=16, epochs=1, teacher=None
    )  # the last is left out


def test_labels_out_of_range() -> None:
    images, labels, _, _ = digits()
    labels[700] = 10
    refused(DataError, r"has label 10 at .*, and the model has 10 classes, 0 to 9", data=(images, labels))
    refused(DataError, "expected class numbers of shape", data=(images, labels[:, None]))
    refused(DataError, "has no labels", data=images)


def test_an_optimizer_from_before() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    q = fewbit.quantize(net, digits()[0][:64], trainable=True)
    refused(
        TrainingError,
        "12 of the optimizer's 12 parameters are not the model's: it was built before",
        q,
        optimizer=optimizer,
    )
    right = torch.optim.SGD([p for p in q.parameters() if p.requires_grad], 0.01)
    images, labels, _, _ = digits()
    fewbit.finetune(q, (images, labels), epochs=1, optimizer=right)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"schedule": "cosinus"}, "schedule is 'cosinus', expected one of: cosine"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"resume": True}, "resume=True needs folder"),
        ({"patience": 2}, "patience=... stops by held-out data"),
        ({"parallel": "dp"}, "parallel is 'dp'"),
        ({"weights": "int4", "stages": [{}, {}]}, "1 epochs for 3 stages"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    refused(TrainingError, message, **settings)


def test_data_that_cannot_be() -> None:
    images, labels, _, _ = digits()
    refused(DataError, "different lengths", data=(images, labels[:5]))
    refused(DataError, "generator, which can be read once", data=iter([(images, labels)]))
    refused(DataError, "only arrays and data sets can be divided", data=[(images, labels)], held_out=0.1)
    refused(DataError, "augment is 'flip'", augment="flip")
    holes = images.clone()
    holes[5] = math.nan
    refused(DataError, "holds nan at index", data=(holes, labels))


def test_a_plan_is_not_replaced(trained: nn.Module) -> None:
    q = fewbit.quantize(trained, digits()[0][:64])
    refused(ModelError, "has a plan already", q, weights="int4")
    learns = fewbit.quantize(trained, digits()[0][:64], trainable=True)
    refused(ModelError, "has its estimators already", learns, training=fewbit.Training(weights="ste"))


def test_estimators_or_stages_alone_ask_for_codes() -> None:
    images, labels, _, _ = digits()
    for asked in (
        {"training": fewbit.Training(weights="ste")},
        {"stages": [{"weights": "int8"}], "epochs": 2},
    ):
        q = fewbit.finetune(network(), (images, labels), **{"epochs": 1, "teacher": None, **asked})
        assert {row.scheme.format for row in q.plan.weights()} == {"int8"}


def test_held_out_samples_set_no_ranges() -> None:
    """The samples that calibrate are among those that are trained on."""
    images, labels, _, _ = digits()
    marked = images + torch.arange(len(images)).reshape(-1, 1, 1, 1)
    seen = [x for batch in finetuning._few((marked, labels), None, 0.5, 0) for x in batch]
    _, aside = finetuning.examples(
        (marked, labels), None, batch_size=64, labels=True, held_out=0.5, augment=None, workers=0, seed=0,
        processes=finetuning.Processes(),
    )  # fmt: skip
    assert aside is not None
    kept = {int(n) for inputs, _ in aside for n in inputs[0].amin((1, 2, 3)).floor()}
    assert not kept & {int(n) for x in seen for n in x.amin((1, 2, 3)).floor()}


def test_networks_that_train_from_the_start_need_ranges_that_follow() -> None:
    images, labels, _, _ = digits()
    found = {}
    for name in ("observed", "lsq"):
        torch.manual_seed(0)
        q = fewbit.finetune(
            DigitsNet(), (images, labels), epochs=6, batch_size=16, teacher=None, seed=0, recipe="int8",
            optimizer=lambda groups: torch.optim.SGD(groups, 0.02, momentum=0.9), schedule="constant",
            training=fewbit.Training(weights=name, activations=name),
        )  # fmt: skip
        found[name] = accuracy(q)
    assert found["observed"] > 0.8 > found["lsq"] + 0.1, found
