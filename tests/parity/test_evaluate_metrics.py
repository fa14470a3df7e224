"""Metrics agree with scikit-learn and with their definitions, whatever the batches and the absent classes."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.evaluation.metrics import Settings, evaluate

ALL = ["accuracy", "top_k", "precision", "recall", "f1", "confusion_matrix", "perplexity"]


def echo(x: Tensor) -> Tensor:
    """A model whose outputs are its inputs, so that a test chooses them."""
    return x


def random_case(samples: int, classes: int, seed: int, present: int | None = None) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, classes, generator=rng)
    labels = torch.randint(0, present or classes, (samples,), generator=rng)
    scores[torch.arange(samples), labels] += 0.7
    return scores, labels


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize(
    ("samples", "classes", "present"),
    [(200, 5, 5), (1, 3, 3), (7, 10, 10), (50, 6, 2), (30, 2, 2), (64, 4, 1)],
)
def test_classification_agrees_with_scikit_learn(
    samples: int, classes: int, present: int, average: str
) -> None:
    from sklearn import metrics as oracle

    scores, labels = random_case(samples, classes, seed=samples + classes, present=present)
    predicted = scores.argmax(1)
    settings = Settings(average=average, top_k=2)
    got = evaluate(echo, (scores, labels), ALL, batch_size=13, settings=settings).metrics
    options: dict[str, Any] = {"average": average, "zero_division": 0}
    assert got["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predicted), abs=1e-6)
    assert got["precision"] == pytest.approx(oracle.precision_score(labels, predicted, **options), abs=1e-6)
    assert got["recall"] == pytest.approx(oracle.recall_score(labels, predicted, **options), abs=1e-6)
    assert got["f1"] == pytest.approx(oracle.f1_score(labels, predicted, **options), abs=1e-6)
    matrix = oracle.confusion_matrix(labels, predicted, labels=list(range(classes)))
    assert got["confusion_matrix"] == matrix.tolist()
    best = scores.topk(2).indices
    assert got["top_k"] == pytest.approx((best == labels[:, None]).any(1).float().mean().item(), abs=1e-6)
    loss = oracle.log_loss(labels, scores.double().softmax(1), labels=list(range(classes)))
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_macro_f1_by_hand_with_a_class_absent_and_one_never_predicted() -> None:
    # True 0 0 1 1 2; predicted 0 1 1 1 1; class 3 neither occurs nor is predicted, and does not count.
    scores = functional.one_hot(torch.tensor([0, 1, 1, 1, 1]), 4).float()
    report = evaluate(echo, (scores, torch.tensor([0, 0, 1, 1, 2])), ["f1", "precision", "recall"])
    f1_of_0, f1_of_1, f1_of_2 = 2 / 3, 2 * 2 / (2 * 2 + 2 + 0), 0.0
    assert report.metrics["f1"] == pytest.approx((f1_of_0 + f1_of_1 + f1_of_2) / 3)
    assert report.metrics["precision"] == pytest.approx((1 + 2 / 4 + 0) / 3)
    assert report.metrics["recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_one_number_a_sample_is_two_classes_at_a_threshold() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    logits = torch.tensor([[-2.0], [0.3], [-0.1], [0.0], [5.0]])
    matrix = evaluate(echo, (logits, labels), ["confusion_matrix"]).metrics["confusion_matrix"]
    assert matrix == [[2, 0], [1, 2]]
    chances = logits.sigmoid()[:, 0]
    settings = Settings(threshold=0.55)
    shifted = evaluate(echo, (chances, labels), ["confusion_matrix"], settings=settings).metrics
    assert shifted["confusion_matrix"] == [[2, 0], [1, 2]]


def test_images_and_sequences_have_their_classes_in_their_usual_place() -> None:
    rng = torch.Generator().manual_seed(1)
    images, pixels = torch.randn(6, 3, 4, 5, generator=rng), torch.randint(0, 3, (6, 4, 5), generator=rng)
    expected = (images.argmax(1) == pixels).float().mean().item()
    assert evaluate(echo, (images, pixels), batch_size=4).metrics["accuracy"] == pytest.approx(expected)
    for length in (4, 7):  # 4 = number of classes: both axes would fit
        text = torch.randn(6, length, 4, generator=rng)
        words = torch.randint(0, 4, (6, length), generator=rng)
        words[0, :3] = -100
        kept = words != -100
        got = evaluate(echo, (text, words), ["accuracy", "perplexity"], batch_size=4).metrics
        assert got["accuracy"] == pytest.approx((text.argmax(2) == words)[kept].float().mean().item())
        loss = functional.cross_entropy(text.reshape(-1, 4), words.reshape(-1))
        assert got["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_perplexity_of_a_sure_and_wrong_model_is_large_and_not_infinite() -> None:
    scores = torch.tensor([[200.0, 0.0]])
    assert evaluate(echo, (scores, torch.tensor([1])), ["perplexity"]).metrics["perplexity"] == pytest.approx(
        math.exp(200), rel=1e-5
    )


def test_mean_squared_error() -> None:
    from sklearn.metrics import mean_squared_error

    rng = np.random.default_rng(0)
    outputs, wanted = rng.normal(size=(50, 3)), rng.normal(size=(50, 3))
    # Far from zero: sums in float32 would lose the digits that matter.
    outputs, wanted = (outputs + 3e3).astype(np.float32), (wanted + 3e3).astype(np.float32)
    got = evaluate(echo, (outputs, wanted), ["mse"], batch_size=7).metrics["mse"]
    assert got == pytest.approx(mean_squared_error(wanted.astype(float), outputs.astype(float)), rel=1e-9)
    column = evaluate(echo, (outputs[:, :1], wanted[:, 0]), ["mse"]).metrics["mse"]
    assert column == pytest.approx(np.square(wanted[:, 0].astype(float) - outputs[:, 0]).mean(), rel=1e-9)


def test_agreement_with_a_baseline_by_definition() -> None:
    scores, labels = random_case(40, 5, seed=3)
    report = evaluate(lambda x: x + 0.4 * (9 * x).sin(), (scores, labels), baseline=echo, batch_size=16)
    assert report.agreement is not None and report.baseline is not None
    after = scores + 0.4 * (9 * scores).sin()
    assert report.baseline["accuracy"] == pytest.approx((scores.argmax(1) == labels).float().mean().item())
    assert report.metrics["accuracy"] == pytest.approx((after.argmax(1) == labels).float().mean().item())
    difference = (after - scores).double()
    assert report.agreement.top1 == pytest.approx((scores.argmax(1) == after.argmax(1)).double().mean())
    assert report.agreement.max_abs == difference.abs().max().item()
    assert report.agreement.mean_abs == pytest.approx(difference.abs().mean().item())
    power = scores.double().square().sum() / difference.square().sum()
    assert report.agreement.sqnr_db == pytest.approx(10 * torch.log10(power).item())


def test_agreement_needs_no_labels_and_knows_identity_and_masks() -> None:
    x = torch.randn(8, 3)
    x[2, 1] = -math.inf
    hidden = torch.where(torch.isinf(x), torch.zeros(()), x)
    mask = torch.where(torch.isinf(x), -math.inf, 0.0)
    report = evaluate(lambda v: v + mask, hidden, [], baseline=lambda v: v + mask)
    assert report.agreement is not None and report.agreement.identical
    assert report.agreement.sqnr_db == math.inf and report.agreement.top1 == 1.0
    assert report.metrics == {} and json.loads(json.dumps(report.to_json()))["agreement"]["sqnr_db"] is None
    nothing = evaluate(echo, torch.ones(2, 3), [], baseline=torch.zeros_like).agreement
    assert nothing is not None and nothing.sqnr_db == -math.inf


class Net(nn.Module):
    """Drops half in training mode, so that a forgotten eval mode shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        assert not torch.is_grad_enabled()
        return self.drop(self.norm(x))


def test_a_module_runs_in_eval_mode_and_every_part_gets_its_own_mode_back() -> None:
    scores, labels = random_case(30, 4, seed=5)
    net = Net()
    net.norm.eval()  # frozen by the user
    before = net.norm.running_mean.clone() if net.norm.running_mean is not None else None
    report = evaluate(net, (scores, labels))
    assert report.metrics["accuracy"] == pytest.approx((scores.argmax(1) == labels).float().mean().item())
    assert net.modes == [False] and net.training and net.drop.training and not net.norm.training
    assert before is not None and torch.equal(before, net.norm.running_mean)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        evaluate(net, (scores, labels + 9))
    assert net.training and net.drop.training and not net.norm.training


def test_models_that_work_in_place_do_not_disturb_the_baseline() -> None:
    scores, labels = random_case(10, 3, seed=6)
    report = evaluate(lambda x: x.mul_(2), (scores, labels), baseline=echo)
    assert report.agreement is not None
    assert report.agreement.max_abs == pytest.approx(scores.abs().max().item())


def test_float64_and_half_modules_get_their_own_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        net = nn.Linear(3, 3).to(dtype)
        assert evaluate(net, (torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))).samples == 5


def test_several_outputs_must_be_chosen() -> None:
    scores, labels = random_case(10, 3, seed=7)
    expected = evaluate(echo, (scores, labels)).metrics
    assert evaluate(lambda x: (x * 0, x), (scores, labels), output=1).metrics == expected
    assert evaluate(lambda x: {"logits": x, "hidden": x * 0}, (scores, labels)).metrics == expected
    assert evaluate(lambda x: {"a": x * 0, "b": x}, (scores, labels), output="b").metrics == expected
    assert evaluate(lambda x: [x.numpy()], (scores, labels)).metrics == expected
    for answer, found in (
        ((1, 2), "2 outputs"),
        ({"a": 1, "b": 2}, "a mapping with the keys a, b"),
        (3, "a int"),
    ):
        with pytest.raises(
            ModelError, match=f"the model gives {found}, expected one tensor: choose one with"
        ):
            evaluate(lambda x, answer=answer: answer, (scores, labels))


def test_several_inputs_are_counted_from_the_signature() -> None:
    scores, labels = random_case(10, 3, seed=8)
    report = evaluate(lambda a, b: a + b, (scores * 3, scores * -2, labels))
    assert report.metrics == evaluate(echo, (scores, labels)).metrics
    agreement = evaluate(lambda a, b: a + b, (scores, scores), [], baseline=lambda a, b: b + a).agreement
    assert agreement is not None and agreement.identical


def test_progress_sees_every_batch_and_their_number() -> None:
    seen: list[Any] = []

    def progress(batches: Any, total: int | None) -> Any:
        seen.append(total)
        for each in batches:
            seen.append(len(each[0][0]))
            yield each

    evaluate(echo, random_case(10, 3, seed=9), batch_size=4, progress=progress)
    assert seen == [3, 4, 4, 2]


def test_report_is_readable_and_json() -> None:
    report = evaluate(echo, random_case(20, 3, seed=10), ["accuracy", "confusion_matrix"], baseline=echo)
    text = str(report)
    assert text.startswith("20 samples\naccuracy") and " % " in text and "same class 100.00 %" in text
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["metrics"]["accuracy"] == report.metrics["accuracy"] and data["samples"] == 20


SCORES = torch.eye(4)
LABELS = torch.arange(4)
PAIR = (SCORES, LABELS)
BAD: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (
        echo,
        PAIR,
        {"metrics": ["acuracy"]},
        RecipeError,
        "unknown metric 'acuracy': did you mean 'accuracy'? available: accuracy, top_k",
    ),
    (echo, PAIR, {"metrics": "f1"}, RecipeError, "metrics is the text 'f1', expected a list: metrics=['f1']"),
    (echo, PAIR, {"metrics": []}, RecipeError, "nothing to evaluate: name metrics or give a baseline"),
    (
        echo,
        PAIR,
        {"settings": Settings(average="mean")},
        RecipeError,
        "unknown average 'mean': available: macro, micro, weighted",
    ),
    (echo, PAIR, {"settings": Settings(top_k=0)}, RecipeError, "top_k is 0, expected at least 1"),
    (echo, SCORES, {}, DataError, "test data has no labels: give (x, y)"),
    (
        echo,
        (SCORES, LABELS + 1),
        {},
        DataError,
        "test data: batch 0 has the label 4 at position 3, but the model gives 4 classes (0..3)",
    ),
    (echo, (SCORES, LABELS - 1), {}, DataError, "the label -1 at position 0, but the model gives 4 classes"),
    (
        echo,
        (SCORES, LABELS * 1.0),
        {},
        DataError,
        "batch 0 has labels of shape (4,) and dtype float32, expected integers: class numbers from 0",
    ),
    (
        echo,
        (SCORES, SCORES.long()),
        {},
        DataError,
        "batch 0 has labels of shape (4, 4), but the model's output of shape (4, 4) needs (4,): "
        "one-hot labels must become class numbers, y.argmax(1)",
    ),
    (
        lambda x: x[:2],
        PAIR,
        {},
        DataError,
        "batch 0 has labels of shape (4,), but the model's output of shape (2, 4) needs (2,)",
    ),
    (echo, (SCORES, LABELS * 0 - 100), {}, DataError, "no label other than -100: accuracy is undefined"),
    (
        echo,
        PAIR,
        {"metrics": ["mse"]},
        DataError,
        "batch 0 has targets of shape (4,), but the model's output has shape (4, 4): "
        "the mean squared error needs one target for each output",
    ),
    (3, PAIR, {}, ModelError, "the model is a int, expected a module or a function"),
    (nn.Linear(5, 2), PAIR, {}, ModelError, "the model failed on batch 0 with float32 (4, 4): "),
    (lambda x: x / 0, PAIR, {}, ModelError, "gives nan at index (0, 1) of its output for batch 0"),
    (
        echo,
        PAIR,
        {"baseline": lambda x: x[:, :2]},
        DataError,
        "the label 2 at position 2, but the baseline gives 2",
    ),
    (
        echo,
        SCORES,
        {"baseline": lambda x: x[:, :2], "metrics": []},
        ModelError,
        "the model's output has shape (4, 4), but its baseline's (4, 2): they must be comparable",
    ),
]


@pytest.mark.parametrize(("model", "test", "options", "error", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_evaluated_says_why(
    model: Any, test: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        evaluate(model, test, **options)
