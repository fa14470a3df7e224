"""Saved folders: the same bits, the same program, small, and nothing but fewbit's own folders replaced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import ArtifactError, FewbitError
from fewbit.model.lowering import lower
from fewbit.model.readers.torch import read
from fewbit.pipeline import quantize
from fewbit.storage import MODEL, WEIGHTS, load, save


class Net(nn.Module):
    """A constant, a split, a product of free sizes, and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(64, 32)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = torch.relu(self.conv(x) * self.gain).split(2, 1)
        y = torch.cat([b, a], 1)
        return {"head": self.head(y.flatten(1)), "map": y.view(y.shape[0], -1, y.shape[3])}


def _data() -> Tensor:
    return torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def _quantized(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return quantize(Net(), _data(), **overrides)


@pytest.mark.parametrize("overrides", [{}, {"activations": "dynamic"}, {"weights": "int4"}])
def test_same_answers_and_same_program(tmp_path: Path, overrides: dict[str, str]) -> None:
    model = _quantized(**overrides)
    again = load(save(model, tmp_path / "net"))
    for name, value in model(_data()).items():
        assert torch.equal(again(_data())[name], value)
    before, after = lower(model), lower(again)  # type: ignore[arg-type]
    assert before.to_json() == after.to_json()
    assert before.tensors().keys() == after.tensors().keys()
    assert all(torch.equal(value, after.tensors()[key]) for key, value in before.tensors().items())


def test_sizes_that_export_found_to_be_fixed_stay_fixed(tmp_path: Path) -> None:
    model = quantize(nn.Linear(8, 4), example=torch.rand(4, 6, 8), activations="dynamic")
    again = load(save(model, tmp_path / "net"))
    assert lower(again).input_shapes == lower(model).input_shapes == [(None, None, 8)]  # type: ignore[arg-type]


def test_float_graph_returns_with_its_free_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = read(Net(), (_data(),))
    again = load(save(gm, tmp_path / "net"))
    assert torch.equal(again(_data()[:3])["head"], gm(_data()[:3])["head"])


def test_four_bits_take_half_the_bytes(tmp_path: Path) -> None:
    eight, four = (save(_quantized(weights=w), tmp_path / w) / WEIGHTS for w in ("int8", "int4"))
    assert eight.stat().st_size - four.stat().st_size >= 64 * 32 // 2 - 64


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ArtifactError, match=r"is not a folder that fewbit.save wrote, so it is left alone"):
        save(_quantized(), tmp_path / "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_own_folder_is_replaced(tmp_path: Path) -> None:
    save(_quantized(), tmp_path / "net")
    save(_quantized(weights="int4"), tmp_path / "net")
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert load(tmp_path / "net").qtensors["head.weight"].scheme.format == "int4"  # type: ignore[union-attr,index]


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    folder = save(_quantized(), tmp_path / "net")
    generator = torch.Generator().manual_seed(0)
    for name in (MODEL, WEIGHTS):
        good = (folder / name).read_bytes()
        places = torch.randint(len(good), (60,), generator=generator).tolist()
        for bad in (good[:-1], b"", good[: len(good) // 2], *(_flipped(good, p) for p in places)):
            (folder / name).write_bytes(bad)
            with pytest.raises(ArtifactError) as caught:
                load(folder)
            assert str(folder) in str(caught.value)
        (folder / name).write_bytes(good)
    load(folder)


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(
        FewbitError, match=r"no reader for .bin; expected a folder that fewbit.save wrote, or one of"
    ):
        load(tmp_path / "a.bin")
