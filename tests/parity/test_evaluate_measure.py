"""Everything at once on a small network, beside an artifact; and the memory of the process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fewbit.errors import ArtifactError, ModelError
from fewbit.evaluation.costs import LayerCost
from fewbit.evaluation.measure import Artifact, measure
from fewbit.evaluation.memory import PeakMemory, peak_memory
from fewbit.model.graph import refresh

MEGABYTE = 2**20


class Clock:
    """Time as the candidates make it pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Timed(nn.Module):
    """Takes half a second of the test's time; forgets nothing about how it was called."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 0.5
        self.calls.append((self.training, torch.is_inference_mode_enabled()))
        return x


def network(clock: Clock) -> fx.GraphModule:
    g = fx.Graph()
    node = g.call_module("timed", (g.call_module("head", (g.placeholder("x"),)),))
    g.output(node)
    gm = fx.GraphModule({"head": nn.Linear(6, 4), "timed": Timed(clock)}, g)
    refresh(gm, (torch.zeros(1, 6),))
    return gm.train()


def test_a_module_and_its_artifact_side_by_side(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    clock = Clock()
    gm = network(clock)
    save_file({"w": torch.zeros(4, 6, dtype=torch.int8)}, tmp_path / "small.safetensors")
    seen: list[tuple[int, ...]] = []

    def run(x: Tensor) -> None:
        clock.now += 0.125
        seen.append(tuple(x.shape))

    files = {"int8": Artifact(tmp_path / "small.safetensors", run, {"head": (8, 8)})}
    options: dict[str, Any] = {"repeat": 4, "energy_seconds": 0.0, "rapl": tmp_path, "clock": clock}
    found = measure(gm, torch.zeros(3, 6), artifacts=files, sleep=clock.sleep, **options)
    assert (found.params, found.macs, found.bops) == (28, 24, 24 * 1024)
    assert found.layers == (LayerCost("head", "linear", 24, 28),)
    assert found.activations.nbytes == 4 * 3 * (6 + 4)  # of this example, not of that in the graph
    model, int8 = found.candidates["model"], found.candidates["int8"]
    assert (model.latency.median_ms, int8.latency.median_ms) == (500.0, 125.0)
    assert model.times_model is None and int8.times_model is not None and int8.times_model.median == 0.25
    assert (model.size.total, int8.size.total) == (28 * 4, 24)
    assert model.energy.kind == int8.energy.kind == "estimated"
    assert model.energy.joules == pytest.approx((24 * 4.6 + 28 * 640) * 1e-12)
    assert int8.energy.joules == pytest.approx((24 * (3.1 / 16 + 0.1) + 28 * 160) * 1e-12)
    assert model.memory.peak >= model.memory.before > 0
    assert set(seen) == {(3, 6)} and all(call == (False, True) for call in gm.timed.calls[1:])
    assert gm.training and gm.timed.training
    assert gm.graph.find_nodes(op="placeholder")[0].meta["shape"] == (1, 6)
    text = str(found)
    assert text.startswith("28 parameters, 24 MACs, 24,576 BOPs a sample") and "0.25 x" in text
    assert (
        json.loads(json.dumps(found.to_json(), allow_nan=False))["candidates"]["int8"]["times_model"]["n"]
        == 4
    )


def test_a_plain_module_is_read_and_counted(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    found = measure(
        net, torch.zeros(1, 1, 4, 4), repeat=1, seconds=0.0, energy_seconds=0.0, pause=0.0, rapl=tmp_path
    )
    assert (found.params, found.macs) == (20 + 27, 4 * 2 * 9 + 24)
    assert list(found.candidates) == ["model"] and net.training


def test_what_fails_is_named(tmp_path: Path) -> None:
    clock = Clock()
    gm = network(clock)

    def fails(x: Tensor) -> None:
        raise RuntimeError("no session")

    x = torch.zeros(1, 6)
    with pytest.raises(ArtifactError, match="int8 failed on the example: no session"):
        measure(gm, x, artifacts={"int8": Artifact(tmp_path, fails)})
    with pytest.raises(ArtifactError, match="an artifact is called 'model', which is the module's own name"):
        measure(gm, x, artifacts={"model": Artifact(tmp_path, fails)})
    gm.head = nn.Linear(7, 4)
    with pytest.raises(ModelError, match="model failed on the example: mat1 and mat2 shapes"):
        measure(gm, x)


@pytest.mark.parametrize("sample", [False, True])
def test_peak_memory_sees_what_was_held_for_a_while(sample: bool) -> None:
    kept: list[bytes] = []

    def hold(size: int) -> None:
        import time

        block = bytearray(size)
        block[::4096] = b"x" * len(block[::4096])
        time.sleep(0.05)
        kept.append(bytes(block[:1]))

    large = peak_memory(lambda: hold(256 * MEGABYTE), sample=sample)
    # After the large one: an old high-water mark must not count.
    small = peak_memory(lambda: hold(MEGABYTE), sample=sample)
    assert 240 * MEGABYTE < large.added < 400 * MEGABYTE
    assert small.added < 60 * MEGABYTE
    assert ("sampled every 1 ms" in str(large)) == (sample or "mark" not in large.method)
    assert json.loads(json.dumps(large.to_json()))["added"] == large.added


def test_added_memory_is_never_negative_and_failures_go_through() -> None:
    assert PeakMemory(5, 9, "x").added == 0

    def fails() -> None:
        raise ValueError("mine")

    for sample in (False, True):
        with pytest.raises(ValueError, match="mine"):
            peak_memory(fails, sample=sample)
