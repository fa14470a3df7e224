"""Several steps by one recipe: their order, what is kept for an interruption, what is refused before all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import DataError, RecipeError
from fewbit.plan import Recipe, Steps, steps_names


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def pictures(count: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(4, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 2.0
    return images, labels


def steps(*entries: dict[str, Any]) -> Steps:
    return Steps.from_dict("mine", {"steps": list(entries)})


PRUNE = {"do": "prune", "sparsity": 0.7, "steps": 2, "epochs": 1, "training": {"lr": 0.002}}
CODES = {
    "do": "finetune",
    "epochs": 1,
    "weights": "codebook3",
    "granularity": "tensor",
    "activations": "float",
}


def test_shipped_recipes_load_and_describe_themselves() -> None:
    assert "deep-compression" in steps_names()
    for name in steps_names():
        found = Steps.load(name)
        assert found.name == name and found.description.endswith(".") and found.steps
        with pytest.raises(RecipeError, match=r"give it to fewbit\.compress"):
            Recipe.load(name)


def test_prune_share_and_code(tmp_path: Path) -> None:
    """What is written is what is done: zeros, then shared values, then a small file."""
    trained = fewbit.finetune(net(), pictures(), epochs=8, batch_size=32, teacher=None, progress=False)
    small = fewbit.compress(trained, pictures(), recipe=steps(PRUNE, CODES), progress=False)
    for site in ("1.weight", "3.weight"):
        q = small.qtensors[site]
        assert q.scheme.format == "codebook3" and len(q.dequantize().unique()) <= 8
        assert float((q.dequantize() == 0).float().mean()) > 0.5
    images, labels = pictures()
    assert float((small(images).argmax(1) == labels).double().mean()) > 0.9


def test_the_order_is_the_recipes() -> None:
    first = fewbit.compress(
        net(), pictures(), recipe=steps({"do": "prune", "speedup": 2.0}, {"do": "quantize"}), progress=False
    )
    assert first.graph.get_submodule("1").out_features == 16 and first.integer
    with pytest.raises(fewbit.FewbitError, match="quantized already"):
        fewbit.compress(
            net(),
            pictures(),
            recipe=steps({"do": "quantize"}, {"do": "prune", "speedup": 2.0}),
            progress=False,
        )


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    recipe = steps(PRUNE, CODES)
    options: dict[str, Any] = {"recipe": recipe, "teacher": None, "progress": False}
    whole = fewbit.compress(net(), pictures(), **options)
    calls = []

    def interrupted(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        calls.append(len(inputs[0]))
        if len(calls) == 8:  # each training looks at a batch first, and its epoch has two: in the last step
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        fewbit.compress(net(), pictures(), folder=tmp_path / "kept", augment=interrupted, **options)
    again = fewbit.compress(
        net(), pictures(), folder=tmp_path / "kept", augment=interrupted, resume=True, **options
    )
    assert len(calls) == 11, "only what was missing is trained"
    images, _ = pictures()
    assert torch.equal(again(images), whole(images))
    kept: dict[str, Any] = {"folder": tmp_path / "kept", "resume": True}
    with pytest.raises(RecipeError, match="1-prune: kept for another"):
        fewbit.compress(
            net(), pictures(), **{**options, **kept, "recipe": steps({**PRUNE, "sparsity": 0.8}, CODES)}
        )
    other = net()
    with torch.no_grad():
        other.get_parameter("1.bias").add_(1.0)
    with pytest.raises(RecipeError, match="1-prune: kept for another"):
        fewbit.compress(other, pictures(), **options, **kept)


def test_what_cannot_be_is_refused_first(tmp_path: Path) -> None:
    def refused(message: str, *entries: dict[str, Any], **options: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            fewbit.compress(net(), pictures(), recipe=steps(*entries), **options)

    refused("step 1: do is 'sell'", {"do": "sell"})
    refused(
        "step 2: prune has no 'sparcity': did you mean 'sparsity'", CODES, {"do": "prune", "sparcity": 0.5}
    )
    refused("step 1: training has no 'rate'", {**PRUNE, "training": {"rate": 1}})
    refused("training is 3, expected keywords", {**PRUNE, "training": 3})
    refused("step 1: finetune has no 'teacher'", {"do": "finetune", "teacher": "me"})
    refused("resume=True needs folder", PRUNE, resume=True)
    for text, message in (
        ("weights = 'int8'", "unknown key 'weights'"),
        ("description = 'x'", r"no \[\[steps\]\]"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(RecipeError, match=rf"bad\.toml: {message}"):
            fewbit.compress(net(), pictures(), recipe=tmp_path / "bad.toml")
    refused("step 1: sparsity='0.5'", {"do": "prune", "sparsity": "0.5"})
    refused("step 2: unknown criterion", CODES, {"do": "prune", "speedup": 2.0, "criterion": "nope"})
    refused("training without epochs", {"do": "prune", "sparsity": 0.5, "training": {"lr": 1e-3}})
    with pytest.raises(fewbit.FewbitError, match="quantized already"):
        fewbit.compress(fewbit.quantize(net(), pictures()[0]), pictures(), recipe={"steps": [PRUNE]})
    with pytest.raises(DataError, match="many times"):
        fewbit.compress(net(), iter([pictures()]), recipe=steps(PRUNE))
