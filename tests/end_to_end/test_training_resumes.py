"""A training that is killed goes on with the same result; several processes train one model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_script import data, network, train

import fewbit
from fewbit.errors import ArtifactError, TrainingError

SCRIPT = Path(__file__).parent / "training_script.py"


def started(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), *arguments])


def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert started(whole).wait() == 0
    process = started(cut)
    state = cut / "last.safetensors"
    while not (cut / "metrics.jsonl").exists():  # the first epoch is over
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len((cut / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 4 and state.exists()
    assert started(cut).wait() == 0
    expected, found = load_file(whole / "result-0"), load_file(cut / "result-0")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    records = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, cut)
    ]
    for a, b in zip(*records, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


@pytest.mark.parametrize("change", ["last epoch", "momentum", "generator"])
def test_each_part_of_the_state_matters(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were one of them not restored, the test above could not pass."""
    from fewbit.training import loop

    whole = train(tmp_path / "whole", resume=False)
    train_half(tmp_path / "half", monkeypatch)
    load = loop.load_state

    def damaged(path, owner):
        before = torch.get_rng_state()
        model, optimizer, rest = load(path, owner)
        if change == "last epoch":
            rest["epoch"] -= 1
        elif change == "momentum":
            for values in optimizer["state"].values():
                values["exp_avg"] *= 0
        else:
            torch.set_rng_state(before)
        return model, optimizer, rest

    monkeypatch.setattr(loop, "load_state", damaged)
    found = train(tmp_path / "half")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), found.state_dict().values(), strict=True)
    )


def train_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.training import loop

    def stop(*args, **kwargs):
        records(*args, **kwargs)
        if len(args[1]) == 2:
            raise KeyboardInterrupt

    records = loop.write_records
    monkeypatch.setattr(loop, "write_records", stop)
    with pytest.raises(KeyboardInterrupt):
        train(folder)
    monkeypatch.setattr(loop, "write_records", records)


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    with pytest.raises(TrainingError, match="the state of another training"):
        train(tmp_path, epochs=2)
    state = tmp_path / "last.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged state"):
        train(tmp_path, epochs=1)


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = train(tmp_path)
    seconds = [r["seconds"] for r in first.facts["training"]]
    again = train(tmp_path)
    assert [r["seconds"] for r in again.facts["training"]] == seconds
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def torchrun(folder: Path, *arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(SCRIPT),
    ]
    result = subprocess.run(
        [*command, str(folder), *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_same_call_works_in_two_processes(tmp_path: Path, parallel: str) -> None:
    torchrun(tmp_path, f"parallel={parallel}")
    first, second = load_file(tmp_path / "result-0"), load_file(tmp_path / "result-1")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4 and records[-1]["accuracy"] > 0.6
    start = fewbit.quantize(
        network(), data()[0], weights="int4", activations="uint4", progress=False
    ).state_dict()
    steps = [name for name in first if "activation_quantizers" in name and name.endswith("scale")]
    assert steps and all(not torch.equal(first[name], start[name]) for name in steps)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == ["last.safetensors", "metrics.csv", "metrics.jsonl", "result-0", "result-1"]
