"""Energy of one inference: measured by the processor (RAPL) where possible, or estimated from operations.

Constants of the estimate: Han et al., Learning both Weights and Connections for Efficient Neural Networks
(arXiv:1506.02626), quoting Horowitz, Computing's Energy Problem, ISSCC 2014: a 45 nm process.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewbit.errors import FewbitError
from fewbit.evaluation.costs import Bits, LayerCost

RAPL = Path("/sys/class/powercap")

# Picojoules of one 32-bit operation or one access to 32 bits.
INT_ADD, FLOAT_ADD, INT_MUL, FLOAT_MUL, SRAM, DRAM = 0.1, 0.9, 3.1, 3.7, 5.0, 640.0

_SOURCE = "operation counts with the 45 nm constants of Horowitz, ISSCC 2014, as in Han et al. 2015"
_ASSUMPTIONS = (
    "an integer multiplication costs 3.1 pJ x weight bits x activation bits / 1024 (as his 0.2 pJ at 8 bits)",
    "sums are 32 bits wide; where weights or activations are float the whole multiply-accumulate is",
    "every parameter is read once per inference from the stated memory, at its layer's weight bits / 32",
    "other traffic, instructions and idle power are not counted",
)


@dataclass(frozen=True)
class Energy:
    """Joules of one inference. `kind` says whether they were measured or estimated, `source` how.

    Measured: the whole processor package per call, with whatever else ran on it; `watts` is its mean
    power, `runs` the number of calls and `seconds` their time. Estimated: `assumptions` are what the
    number rests on.
    """

    joules: float
    kind: Literal["measured", "estimated"]
    source: str
    watts: float | None = None
    runs: int = 0
    seconds: float = 0.0
    assumptions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"assumptions": list(self.assumptions)}

    def __str__(self) -> str:
        text = f"{1000 * self.joules:.4g} mJ, {self.kind} ({self.source})"
        return text if self.watts is None else f"{text}, {self.watts:.1f} W over {self.seconds:.1f} s"


@dataclass(frozen=True)
class _Package:
    name: str
    counter: Path
    wraps_at: int

    def read(self) -> int:
        return int(self.counter.read_text())


def energy(
    run: Callable[[], object],
    costs: Iterable[LayerCost],
    bits: Bits | None = None,
    *,
    weights_in: Literal["dram", "sram"] = "dram",
    seconds: float = 2.0,
    root: Path = RAPL,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Joules of one call of `run`, measured if RAPL is readable under `root`, or else estimated from `costs`.

    The returned object says which; where it is an estimate, its source says why nothing was measured.
    """
    try:
        return measured_energy(run, seconds=seconds, root=root, clock=clock)
    except FewbitError as error:
        return estimated_energy(costs, bits, weights_in=weights_in, because=str(error))


def measured_energy(
    run: Callable[[], object],
    *,
    seconds: float = 2.0,
    root: Path = RAPL,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Repeat `run` for at least `seconds` and divide what the package counters gained by the number of calls.

    root: the powercap tree of sysfs. Only packages are summed: their cores, caches and memory
    controllers are parts of them. A counter that wraps around once is made good (a run must be shorter
    than that: minutes to an hour). Raises FewbitError where there is no RAPL or it may not be read (root
    only, on most systems since CVE-2020-8694).
    """
    packages = _packages(Path(root))
    run()
    before = [package.read() for package in packages]
    start = clock()
    runs = 0
    while runs == 0 or clock() - start < seconds:
        run()
        runs += 1
    elapsed = clock() - start
    after = [package.read() for package in packages]
    gained = 0
    for package, first, last in zip(packages, before, after, strict=True):
        gained += last - first if last >= first else last - first + package.wraps_at
    joules = gained / 1e6
    if joules <= 0:
        raise FewbitError(f"the RAPL counters under {str(root)!r} stood still for {elapsed:.2f} s")
    names = ", ".join(package.name for package in packages)
    return Energy(
        joules / runs, "measured", f"RAPL {names}", joules / elapsed if elapsed else None, runs, elapsed
    )


def _packages(root: Path) -> list[_Package]:
    packages = []
    reasons = set()
    # intel-rapl-mmio:0 is the package intel-rapl:0 once more; AMD's processors are called intel-rapl, too.
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            package = _Package(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
            package.read()
        except (OSError, ValueError) as error:
            reasons.add(getattr(error, "strerror", None) or str(error))
            continue
        # psys is the whole platform, and holds the packages; core, uncore and dram are parts of one.
        if name.startswith("package"):
            packages.append(package)
    if not packages:
        why = f"cannot be read ({'; '.join(sorted(reasons))})" if reasons else "has no processor package"
        raise FewbitError(f"RAPL {why} under {str(root)!r}")
    return packages


def estimated_energy(
    costs: Iterable[LayerCost],
    bits: Bits | None = None,
    *,
    weights_in: Literal["dram", "sram"] = "dram",
    because: str = "",
) -> Energy:
    """Joules of one inference from its multiply-accumulates and its parameters' traffic.

    bits: layer -> (weight bits, activation bits); a layer that is not named is float (32, 32).
    weights_in: where parameters are read from: "dram" (larger than the cache) or "sram" (they stay on chip).
    """
    memory = DRAM if weights_in == "dram" else SRAM
    picojoules = 0.0
    for each in costs:
        weight, activation = (bits or {}).get(each.layer, (32, 32))
        if weight >= 32 or activation >= 32:
            operation = FLOAT_MUL + FLOAT_ADD
        else:
            operation = INT_MUL * weight * activation / 1024 + INT_ADD
        picojoules += each.macs * operation + each.params * memory * weight / 32
    note = f"; {because}" if because else ""
    return Energy(
        picojoules * 1e-12,
        "estimated",
        f"{_SOURCE}, weights in {weights_in.upper()}{note}",
        assumptions=_ASSUMPTIONS,
    )
