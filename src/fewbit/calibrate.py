"""Calibration: one pass over the data, one observer a site, bounded memory; and what that data did not cover."""

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fewbit.checkpoint import Checkpoint
from fewbit.data import Batches
from fewbit.errors import CalibrationError, FewbitError
from fewbit.model.simulate import FakeQuantize, QuantizedModel
from fewbit.model.sites import Placement, display_name
from fewbit.numerics.scheme import Scheme, qparams
from fewbit.observers import RangeObserver, make_observer
from fewbit.plan import Plan
from fewbit.progress import shown

Watch = Callable[[Tensor], None]
_FEW = 32  # samples below which ranges are mostly luck
_CLIPPED = (
    0.005  # of a layer's held-out values: above this share, and five times that of calibration, is a warning
)
_SAVE_EVERY = 10.0  # seconds between saved states of a calibration that can resume


class CalibrationWarning(UserWarning):
    """Something about the calibration data or the ranges that a user should look at."""


@dataclass
class Facts:
    """What calibration saw. ``peak_bytes`` is the process's largest resident set so far, measured by the kernel."""

    samples: int = 0
    batches: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class Watcher(Interpreter):
    """Runs a graph and shows the outputs of some nodes; values are dropped as soon as nothing needs them."""

    def __init__(self, gm: GraphModule, watches: dict[Node, Watch]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.watches = {node.name: watch for node, watch in watches.items()}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        watch = self.watches.get(n.name)
        if watch is not None:
            watch(result)
        return result


def calibrate(
    gm: GraphModule,
    batches: Batches,
    observers: dict[Node, tuple[str, RangeObserver]],
    facts: Facts,
    progress: bool = False,
    resume: str | Path | None = None,
) -> None:
    """Show every batch to the observers (site name and observer by node), and count in ``facts``.

    With ``resume``, the state is kept in that file every few seconds and when the pass is interrupted; the same
    call then skips the batches that were seen, and removes the file when it is done. The data must come in the
    same order. Raises ``CalibrationError`` that names the layer where a range cannot be estimated.
    """
    started = time.perf_counter()
    watcher = Watcher(gm, {node: _watch(site, observer) for node, (site, observer) in observers.items()})
    checkpoint = None if resume is None else Checkpoint(resume, gm, dict(observers.values()))
    done, facts.samples = (0, 0) if checkpoint is None else checkpoint.load()
    saved = time.perf_counter()
    try:
        with torch.inference_mode():
            for index, (inputs, _) in enumerate(shown(batches, batches.length, "calibrating", progress)):
                facts.batches = index + 1
                if index < done:
                    continue
                # A batch counts when every observer has seen it: until then the state is not saved.
                watcher.run(*inputs)
                done += 1
                facts.samples += inputs[0].shape[0] if inputs[0].dim() else 1
                if checkpoint is not None and time.perf_counter() - saved > _SAVE_EVERY:
                    checkpoint.save(done, facts.samples)
                    saved = time.perf_counter()
    except KeyboardInterrupt:
        if checkpoint is not None and done == facts.batches:
            checkpoint.save(done, facts.samples)
        raise
    if checkpoint is not None:
        checkpoint.remove()
    facts.seconds = time.perf_counter() - started
    facts.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _watch(site: str, observer: RangeObserver) -> Watch:
    def update(x: Tensor) -> None:
        try:
            observer.update(x)
        except FewbitError as error:
            raise CalibrationError(f"{site}: {error}") from error

    return update


def calibrate_activations(
    gm: GraphModule,
    placement: Placement,
    plan: Plan,
    batches: Batches | None,
    facts: Facts,
    progress: bool,
    resume: str | Path | None = None,
) -> dict[Node, FakeQuantize]:
    """The quantize step of every node at which codes are born: observed on the batches, or fixed by the operator."""
    rows = {node: plan.row(site_name(node, placement)) for node in placement.born}
    rows = {node: row for node, row in rows.items() if row.scheme is not None}
    observers = {
        node: (row.site, make_observer(row.observer, row.scheme))
        for node, row in rows.items()
        if row.observer is not None and row.scheme is not None
    }
    if observers and batches is not None:
        calibrate(gm, batches, observers, facts, progress, resume)
        if facts.samples < _FEW:
            facts.warnings.append(
                f"only {facts.samples} calibration samples: ranges from fewer than {_FEW} are mostly luck; "
                "a few hundred are usual"
            )
    quantizers = {}
    for node, row in rows.items():
        assert row.scheme is not None
        if node in observers:
            scale, zero_point = _observed(*observers[node], row.scheme, facts)
        else:
            scale, zero_point = fixed_coding(row.scheme)
        quantizers[node] = FakeQuantize(row.scheme, scale, zero_point)
    return quantizers


def _observed(site: str, observer: RangeObserver, scheme: Scheme, facts: Facts) -> tuple[Tensor, Tensor]:
    try:
        lo, hi = observer.bounds()
        if bool((lo == hi).any()):
            facts.warnings.append(f"{site}: always zero on the calibration data; its range is a guess")
        return qparams(lo, hi, scheme)
    except FewbitError as error:
        raise CalibrationError(f"{site}: {error}") from error


def site_name(node: Node, placement: Placement) -> str:
    """The plan's name of the codes born at a node."""
    if node.op == "placeholder":
        return display_name(node)
    owners = (n for n, carrier in placement.carrier.items() if carrier is node and n in placement.forms)
    return f"{display_name(next(owners, node))}.output"


def fixed_coding(scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an output in [0, 1] (sigmoid, softmax): the lowest code is 0, one more than all is 1."""
    if scheme.qmin < 0 and scheme.symmetric:
        return torch.tensor([1.0 / scheme.qmax]), torch.zeros(1, dtype=torch.int32)
    levels = int(scheme.qmax) - int(scheme.qmin) + 1
    return torch.tensor([1.0 / levels]), torch.tensor([int(scheme.qmin)], dtype=torch.int32)


def clipped(model: QuantizedModel, batches: Batches) -> dict[str, float]:
    """By quantized activation, the share of its values that fall outside its range on these inputs."""
    outside: dict[str, int] = {}
    total: dict[str, int] = {}

    def watch(name: str, quantizer: FakeQuantize) -> Watch:
        scheme, scale, zero = quantizer.scheme, float(quantizer.scale), int(quantizer.zero_point)
        lo, hi = (scheme.qmin - zero - 0.5) * scale, (scheme.qmax - zero + 0.5) * scale

        def count(x: Tensor) -> None:
            outside[name] = outside.get(name, 0) + int(((x < lo) | (x > hi)).sum())
            total[name] = total.get(name, 0) + x.numel()

        return count

    watches = {}
    for node in model.graph.graph.nodes:
        module = model.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            source = node.args[0]
            watches[source] = watch(display_name(source), module)
    watcher = Watcher(model.graph, watches)
    with torch.inference_mode():
        for inputs, _ in batches:
            watcher.run(*inputs)
    return {name: outside[name] / max(total[name], 1) for name in total}


def clipping_warnings(model: QuantizedModel, seen: Batches | None, unseen: Batches) -> list[str]:
    """A sentence for each layer that clips held-out data much more than the calibration data."""
    before = clipped(model, seen) if seen is not None and not seen.one_shot else {}
    after = clipped(model, unseen)
    found = []
    for name, share in after.items():
        if share > _CLIPPED and share > 5 * before.get(name, 0.0):
            found.append(
                f"{name}: {share:.1%} of its values on held-out data are clipped, {before.get(name, 0.0):.2%} on the "
                "calibration data: calibrate with data like what the model will see"
            )
    return found
