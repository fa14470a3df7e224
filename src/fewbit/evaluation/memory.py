"""Peak memory: measured for the process, and estimated for the activations from when each tensor dies."""

import math
import operator
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fewbit.errors import ModelError

aten = torch.ops.aten

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")

# Their outputs are views of their first input in any sensible runtime, and take no memory of their own.
_VIEWS = {
    operator.getitem,
    aten.alias.default,
    aten.chunk.default,
    aten.detach.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
}


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of this process while something ran.

    `peak` and `before` are bytes; `added` is what came on top, and is too small where the allocator had
    free memory to reuse: compare it between processes rather than between calls. `method` says how the
    peak was found.
    """

    peak: int
    before: int
    method: str

    @property
    def added(self) -> int:
        return max(0, self.peak - self.before)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"added": self.added}

    def __str__(self) -> str:
        return (
            f"{self.added / 2**20:.1f} MiB on top of {self.before / 2**20:.1f} MiB (measured: {self.method})"
        )


def peak_memory(run: Callable[[], object], *, interval: float = 0.001, sample: bool = False) -> PeakMemory:
    """Measure the resident set's high-water mark during `run()`.

    On Linux the kernel's own mark is reset before and read after (exact). Elsewhere, or with `sample`, a
    thread reads the size every `interval` seconds, and misses what is shorter. What `run` raises goes
    through.
    """
    import psutil  # type: ignore[import-untyped]

    process = psutil.Process()
    if not sample and _reset_high_water_mark():
        before = process.memory_info().rss
        run()
        return PeakMemory(max(_high_water_mark(), before), before, "the kernel's high-water mark")
    before = process.memory_info().rss
    sampler = _Sampler(lambda: int(process.memory_info().rss), interval)
    with sampler:
        run()
    return PeakMemory(max(sampler.peak, before), before, f"sampled every {1000 * interval:g} ms")


def _reset_high_water_mark() -> bool:
    try:
        _RESET.write_text("5")
        return _high_water_mark() > 0
    except OSError:
        return False


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


class _Sampler:
    """Keeps the largest of the values that a thread reads."""

    def __init__(self, read: Callable[[], int], interval: float) -> None:
        self.peak = 0
        self._read = read
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, self._read())
            time.sleep(self._interval)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._read())


@dataclass(frozen=True)
class ActivationPeak:
    """The most bytes of activations that live at once, and the node where they do; an estimate."""

    nbytes: int
    node: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self).copy()

    def __str__(self) -> str:
        return f"{self.nbytes / 1024:.1f} KiB at {self.node} (estimated from the graph)"


def activation_peak_bytes(gm: fx.GraphModule, bits: int | Mapping[str, int] = 32) -> ActivationPeak:
    """Estimate the peak of activation memory from the graph's order, for the batch of its example.

    A tensor lives from its node to its last reader; during a node its inputs and its output are all
    there. Views (reshape, transpose, slice, ...) take nothing and keep their source alive. Not counted:
    weights, scratch memory, and what a runtime saves by fusing or working in place.

    bits: of one element, for all tensors, or by node name (those it lacks have 32).
    Raises ModelError where a node has no shape.
    """
    nodes = list(gm.graph.nodes)
    roots: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        roots[node] = (
            roots[node.args[0]] if _is_view(node, gm) and isinstance(node.args[0], fx.Node) else node
        )
    last = {}
    for index, node in enumerate(nodes):
        last[roots[node]] = index
        for source in node.all_input_nodes:
            last[roots[source]] = index
    live: dict[fx.Node, int] = {}
    best = ActivationPeak(0, "")
    for index, node in enumerate(nodes):
        if node.op == "output":
            break
        if roots[node] is node and node.op != "get_attr":
            width = bits if isinstance(bits, int) else bits.get(node.name, 32)
            live[node] = -(-_elements(node) * width // 8)
        total = sum(live.values())
        if total > best.nbytes:
            best = ActivationPeak(total, node.name)
        live = {each: size for each, size in live.items() if last[each] > index}
    return best


def _is_view(node: fx.Node, gm: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        # A quantize-dequantize step of the simulation: an integer runtime stores its source's codes and
        # nothing else.
        if type(module).__name__ in ("FakeQuantize", "DynamicFakeQuantize"):
            return True
        return isinstance(module, (nn.Dropout, nn.Identity, nn.Flatten))
    return node.op == "call_function" and node.target in _VIEWS


def _elements(node: fx.Node) -> int:
    shape = node.meta.get("shape")
    if shape is not None:
        return math.prod(shape)
    if node.op == "placeholder":
        raise ModelError(f"node {node.name!r} has no shape: estimate on a graph that fewbit has read")
    # A tuple has no shape of its own: it is what its elements are. What remains is arithmetic on sizes.
    parts = [user for user in node.users if user.target is operator.getitem]
    return sum(math.prod(user.meta.get("shape", (0,))) for user in parts)
