"""Ctrl-C during calibration: the same call goes on where it stopped, with the same result, or says why it cannot."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import ArtifactError, CalibrationError
from fewbit.observers import observer_names


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


class Data:
    """Eight batches; the reading of the sixth is interrupted if `interrupt` says so."""

    def __init__(self, interrupt: bool = False) -> None:
        self.interrupt = interrupt
        generator = torch.Generator().manual_seed(0)
        self.batches = [torch.randn(8, 3, 8, 8, generator=generator) * (1 + i) for i in range(8)]

    def __iter__(self) -> Iterator[Tensor]:
        for index, batch in enumerate(self.batches):
            if self.interrupt and index == 5:
                raise KeyboardInterrupt
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


def interrupted(state: Path, observer: str = "minmax") -> None:
    with pytest.raises(KeyboardInterrupt):
        fewbit.quantize(network(), Data(interrupt=True), resume=state, observer=observer)
    assert [p.name for p in state.parent.iterdir()] == [state.name]


@pytest.mark.parametrize("observer", observer_names())
def test_it_goes_on_with_the_same_result(tmp_path: Path, observer: str) -> None:
    state = tmp_path / "calibration.safetensors"
    whole = fewbit.quantize(network(), Data(), observer=observer)
    interrupted(state, observer)
    resumed = fewbit.quantize(network(), Data(), resume=state, observer=observer)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert (resumed.facts["batches"], resumed.facts["samples"]) == (8, 64)
    assert not state.exists()


def test_the_state_holds_what_was_seen(tmp_path: Path) -> None:
    state = tmp_path / "calibration.safetensors"
    interrupted(state)
    only_last = Data()
    only_last.batches = [batch * 0 for batch in only_last.batches]
    resumed = fewbit.quantize(network(), only_last, resume=state)
    assert float(resumed.quantizer("input_1" if resumed.quantizer("input") is None else "input").scale) > 0.05


def test_another_model_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "calibration.safetensors"
    interrupted(state)
    with pytest.raises(CalibrationError, match="the state of another model, recipe or target; delete it"):
        fewbit.quantize(network(seed=1), Data(), resume=state)
    with pytest.raises(CalibrationError, match="the state of another model"):
        fewbit.quantize(network(), Data(), resume=state, activations="int4")
    assert state.exists()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "calibration.safetensors"
    interrupted(state)
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="damaged calibration state"):
        fewbit.quantize(network(), Data(), resume=state)
