"""Energy from a counter tree that the test builds, and the stated estimate by hand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import FewbitError
from fewbit.evaluation.costs import LayerCost
from fewbit.evaluation.energy import energy, estimated_energy, measured_energy

RANGE = 1_000_000


class Processor:
    """A powercap tree whose counters advance by a fixed energy per run, and a clock that does by 0.25 s."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 0.0
        self.rates: dict[str, int] = {}

    def add(self, folder: str, name: str, start: int, rate: int) -> None:
        path = self.root / folder
        path.mkdir(parents=True)
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{start}\n")
        (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
        self.rates[folder] = rate

    def run(self) -> None:
        self.now += 0.25
        for folder, rate in self.rates.items():
            counter = self.root / folder / "energy_uj"
            counter.write_text(f"{(int(counter.read_text()) + rate) % RANGE}\n")

    def clock(self) -> float:
        return self.now


def test_packages_are_summed_and_their_parts_and_doubles_are_not(tmp_path: Path) -> None:
    cpu = Processor(tmp_path)
    cpu.add("intel-rapl:0", "package-0", 1000, 300)
    cpu.add("intel-rapl:1", "package-1", 2000, 500)
    cpu.add("intel-rapl:0:0", "core", 0, 100)
    cpu.add("intel-rapl:0/intel-rapl:0:0", "core", 0, 100)
    cpu.add("intel-rapl:2", "psys", 0, 5000)
    cpu.add("intel-rapl-mmio:0", "package-0", 1000, 300)
    found = measured_energy(cpu.run, seconds=1.0, root=tmp_path, clock=cpu.clock)
    assert found.joules == pytest.approx(800e-6)
    assert (found.kind, found.source, found.runs, found.seconds) == (
        "measured",
        "RAPL package-0, package-1",
        4,
        1.0,
    )
    assert found.watts == pytest.approx(4 * 800e-6)
    assert "measured (RAPL package-0, package-1)" in str(found)
    assert json.loads(json.dumps(found.to_json()))["kind"] == "measured"


def test_a_counter_that_wraps_around_is_made_good(tmp_path: Path) -> None:
    cpu = Processor(tmp_path)
    cpu.add("intel-rapl:0", "package-0", RANGE - 1000, 700)
    found = measured_energy(cpu.run, seconds=1.0, root=tmp_path, clock=cpu.clock)
    assert int((tmp_path / "intel-rapl:0" / "energy_uj").read_text()) < RANGE - 1000
    assert found.joules == pytest.approx(700e-6)


def test_one_run_is_enough_however_long(tmp_path: Path) -> None:
    cpu = Processor(tmp_path)
    cpu.add("intel-rapl:0", "package-0", 0, 700)
    assert measured_energy(cpu.run, seconds=0.0, root=tmp_path, clock=cpu.clock).runs == 1


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    def refused(root: Path, message: str) -> None:
        with pytest.raises(FewbitError, match=re.escape(message)):
            measured_energy(lambda: None, seconds=0.0, root=root, clock=lambda: 0.0)

    refused(tmp_path / "none", f"RAPL has no processor package under '{tmp_path}/none'")
    cpu = Processor(tmp_path / "still")
    cpu.add("intel-rapl:0", "package-0", 5, 0)
    refused(tmp_path / "still", "stood still for 0.00 s")
    cpu = Processor(tmp_path / "secret")
    cpu.add("intel-rapl:0", "package-0", 5, 0)
    counter = tmp_path / "secret" / "intel-rapl:0" / "energy_uj"
    counter.unlink()
    counter.mkdir()  # unreadable for root too, who runs tests in containers
    refused(tmp_path / "secret", "RAPL cannot be read (Is a directory)")
    cpu = Processor(tmp_path / "odd")
    cpu.add("intel-rapl:0", "package-0", 5, 0)
    (tmp_path / "odd" / "intel-rapl:0" / "energy_uj").write_text("no number")
    refused(tmp_path / "odd", "RAPL cannot be read (invalid literal")


COSTS = [LayerCost("conv", "conv", 1_000_000, 1000), LayerCost("head", "linear", 1000, 10)]


def test_estimate_by_hand() -> None:
    floats = estimated_energy(COSTS)
    assert floats.joules == pytest.approx((1_001_000 * (3.7 + 0.9) + 1010 * 640) * 1e-12)
    mixed = estimated_energy(COSTS, {"conv": (4, 8)}, weights_in="sram")
    conv = 1_000_000 * (3.1 * 4 * 8 / 1024 + 0.1) + 1000 * 5 * 4 / 32
    assert mixed.joules == pytest.approx((conv + 1000 * 4.6 + 10 * 5) * 1e-12)
    weight_only = estimated_energy(COSTS[:1], {"conv": (4, 32)})
    assert weight_only.joules == pytest.approx((1_000_000 * 4.6 + 1000 * 640 / 8) * 1e-12)
    # Horowitz's own figure for an 8-bit multiplication is 0.2 pJ.
    eight = estimated_energy([LayerCost("a", "conv", 1, 0)], {"a": (8, 8)}).joules * 1e12 - 0.1
    assert eight == pytest.approx(0.2, rel=0.05)


def test_an_estimate_says_so_and_why(tmp_path: Path) -> None:
    found = energy(lambda: None, COSTS, root=tmp_path, seconds=0.0)
    assert found.kind == "estimated" and found.watts is None
    assert "Horowitz, ISSCC 2014" in found.source and "RAPL has no processor package" in found.source
    assert "weights in DRAM" in found.source and any("1024" in each for each in found.assumptions)
    assert "mJ, estimated (operation counts" in str(found)
    cpu = Processor(tmp_path)
    cpu.add("intel-rapl:0", "package-0", 0, 700)
    again: Any = energy(cpu.run, COSTS, root=tmp_path, seconds=0.0, clock=cpu.clock)
    assert again.kind == "measured" and again.joules == pytest.approx(700e-6)
