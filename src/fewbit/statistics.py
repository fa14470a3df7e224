"""What calibration tells roundings about a layer: second moments of its inputs, collected in bounded memory."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import pad

from fewbit.calibrate import Facts, shown
from fewbit.data import Batches
from fewbit.errors import CalibrationError, DataError
from fewbit.observers import weight_statistics
from fewbit.plan import Plan, Row
from fewbit.rounding import required_statistics

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_BYTES = 2**31  # of statistics kept at a time; more take further passes over the data
_WIDE = 1024  # inputs from which sums are kept in float32
_MOST_PLACES = 2**15  # of one batch that a layer's statistics are taken from; of more, as many are drawn
_NUMBERS = 2**24  # unfolded at a time


def needed(row: Row) -> frozenset[str]:
    """The statistics that a weight's rounding and range estimator ask for."""
    if row.scheme is None or row.observer is None or row.rounding is None:
        return frozenset()
    return required_statistics(row.rounding) | weight_statistics(row.observer)


def without_statistics(plan: Plan, gm: GraphModule) -> Plan:
    """The plan in which layers without statistics of their inputs (embeddings, recurrent layers) do without them."""
    rows = []
    for row in plan.rows:
        asked = needed(row) if row.kind == "weight" else frozenset()
        layer, name = row.site.rsplit(".", 1) if asked else ("", "")
        if asked and not (isinstance(gm.get_submodule(layer), LAYERS) and name == "weight"):
            assert row.rounding is not None and row.observer is not None and row.scheme is not None
            rounding = row.scheme.spec.rounding if required_statistics(row.rounding) else row.rounding
            row = replace(
                row,
                rounding=rounding,
                observer="mse" if weight_statistics(row.observer) else row.observer,
                because=f"{row.because}; no {' and '.join(sorted(asked))} of the inputs of {row.op} layers: {rounding}",
            )
        rows.append(row)
    return replace(plan, rows=tuple(rows))


@dataclass
class _Sums:
    """Sums over the data for one weight, which several layers may share."""

    asked: frozenset[str]
    groups: int
    inputs: int
    total: Tensor  # [groups, inputs, inputs], or [groups, inputs] where only the diagonal is asked for
    seen: int = 0  # places at which inputs were read
    kept: int = 0  # those of them that the sums are of

    def add(self, patches: Tensor) -> None:
        """patches: [groups, places, inputs]."""
        patches = patches.to(self.total.dtype)
        if "hessian" in self.asked:
            self.total.baddbmm_(patches.mT, patches)
        else:
            self.total += patches.square_().sum(dim=1)
        self.kept += patches.shape[1]

    def statistics(self, weight: Tensor) -> dict[str, Tensor]:
        """What was asked for, as means over the places."""
        mean = self.total / max(self.kept, 1)
        diagonal = mean.diagonal(dim1=1, dim2=2) if "hessian" in self.asked else mean
        found: dict[str, Tensor] = {"hessian": mean} if "hessian" in self.asked else {}
        if "importance" in self.asked:
            outputs = len(weight) // self.groups
            found["importance"] = diagonal.repeat_interleave(outputs, dim=0).reshape(weight.shape)
        return found


@dataclass
class Statistics:
    """The statistics of a model's weights, collected when first asked for, as many at a time as memory allows.

    They are those of the float graph, however many of its weights have been rounded since: a copy is kept where
    the statistics need more than one pass.

    Attributes:
        gm: the float graph; rounded weights may be written into it between calls of `of`.
        plan: which weight asks for what.
        batches: the calibration data; read once or, for more than 2 GiB of statistics, several times.
        facts: gets a warning for each layer that saw too little.
    """

    gm: GraphModule
    plan: Plan
    batches: Batches | None
    facts: Facts
    progress: bool = False
    _passes: list[list[Row]] = field(init=False)
    _kept: dict[str, dict[str, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows = [row for row in self.plan.weights() if row.shared_with is None and needed(row)]
        if rows and self.batches is None:
            what = f"rounding {rows[0].rounding!r}"
            if weight_statistics(str(rows[0].observer)):
                what = f"weight_observer {rows[0].observer!r}"
            raise CalibrationError(
                f"{rows[0].layer}: {what} needs calibration data: call quantize(model, calibration=data), "
                "or use rounding='nearest' and weight_observer='mse'"
            )
        self._passes = list(self._chunks(rows))
        twice = len(self._passes) > 1 or self.plan.needs_calibration
        if rows and self.batches is not None and self.batches.one_shot and twice:
            raise DataError(
                f"{rows[0].layer}: rounding reads the calibration data again, and a generator can be read once: "
                "give a list, a DataLoader or arrays instead"
            )
        if len(self._passes) > 1:
            self.gm = copy.deepcopy(self.gm)

    def of(self, site: str) -> dict[str, Tensor]:
        """Statistics of a weight by name, empty where it asks for none; sites must be asked for in the plan's order."""
        if self._passes and any(row.site == site for row in self._passes[0]):
            self._kept = self._collect(self._passes.pop(0))
        return self._kept.pop(site, {})

    def _chunks(self, rows: list[Row]) -> Iterator[list[Row]]:
        chunk: list[Row] = []
        size = 0
        for row in rows:
            sums = self._sums(row, "meta")
            size += sums.total.numel() * sums.total.element_size()
            if chunk and size > _MOST_BYTES:
                yield chunk
                chunk, size = [], sums.total.numel() * sums.total.element_size()
            chunk.append(row)
        if chunk:
            yield chunk

    def _sums(self, row: Row, device: torch.device | str) -> _Sums:
        module = self.gm.get_submodule(row.site.rsplit(".", 1)[0])
        weight: Any = module.weight
        groups = int(getattr(module, "groups", 1))
        inputs = weight[0].numel()
        shape = (groups, inputs, inputs) if "hessian" in needed(row) else (groups, inputs)
        dtype = torch.float32 if inputs > _WIDE else torch.float64
        return _Sums(needed(row), groups, inputs, torch.zeros(shape, dtype=dtype, device=device))

    def _collect(self, rows: list[Row]) -> dict[str, dict[str, Tensor]]:
        """One pass over the data: hooks on the layers that have these weights."""
        assert self.batches is not None
        weights: dict[str, Tensor] = {row.site: self.gm.get_parameter(row.site) for row in rows}
        sums = {row.site: self._sums(row, weights[row.site].device) for row in rows}
        owner = {id(weight): site for site, weight in weights.items()}
        generator = torch.Generator().manual_seed(0)
        hooks = []
        for module in self.gm.modules():
            if isinstance(module, LAYERS) and id(module.weight) in owner:
                hooks.append(
                    module.register_forward_pre_hook(_hook(sums[owner[id(module.weight)]], generator))
                )
        samples = 0
        try:
            with torch.inference_mode():
                for inputs, _ in shown(self.batches, self.batches.length, "second moments", self.progress):
                    samples += inputs[0].shape[0] if inputs[0].dim() else 1
                    self.gm(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for row in rows:
            self._check(row, sums[row.site], samples)
        return {site: sums[site].statistics(weights[site]) for site in sums}

    def _check(self, row: Row, sums: _Sums, samples: int) -> None:
        if not bool(torch.isfinite(sums.total).all()):
            raise CalibrationError(
                f"{row.layer}: its inputs are not finite on the calibration data, or too large"
            )
        if sums.seen < sums.inputs and "hessian" in sums.asked:
            enough = -(-sums.inputs * samples // max(sums.seen, 1))
            self.facts.warnings.append(
                f"{row.layer}: {samples} calibration samples show its {sums.inputs} inputs {sums.seen} times, too few "
                f"for rounding {row.rounding!r}: give at least {enough} samples"
            )


def _hook(sums: _Sums, generator: torch.Generator) -> Any:
    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        for patches in input_patches(module, args[0], generator):
            sums.add(patches)
        sums.seen += _places(module, args[0])

    return see


def _places(module: nn.Module, x: Tensor) -> int:
    """How many vectors of inputs a layer reads from x."""
    if isinstance(module, nn.Linear):
        return x.numel() // x.shape[-1]
    windows = _windows(module, x)
    return windows.shape[0] * windows.shape[2 : 2 + len(module.kernel_size)].numel()  # type: ignore[arg-type]


def _windows(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution's inputs, a view of the padded x: [n, channels, *places, *kernel]."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    spatial = len(module.kernel_size)
    x = x.unsqueeze(0) if x.dim() == spatial + 1 else x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # torch's own list of padding on both sides of each dimension, the last one first; "same" may be uneven.
    x = pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for d, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


def input_patches(module: nn.Module, x: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The vectors of inputs that a layer multiplies its weights by: [groups, places, inputs], a part at a time.

    Of more than 32,768 in one batch, as many are drawn: enough for means over places.
    """
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        for chosen in _draw(len(rows), rows.shape[1], generator):
            yield rows[chosen.to(x.device)].unsqueeze(0)
        return
    windows = _windows(module, x)
    groups = int(module.groups)  # type: ignore[arg-type]
    spatial = windows.dim() // 2 - 1
    windows = windows.movedim(1, 1 + spatial)  # [n, *places, channels, *kernel]
    inputs = windows.shape[1 + spatial :].numel()
    for chosen in _draw(windows.shape[: 1 + spatial].numel(), inputs, generator):
        places = torch.unravel_index(chosen.to(x.device), windows.shape[: 1 + spatial])
        yield windows[places].reshape(len(chosen), groups, -1).transpose(0, 1)


def _draw(count: int, inputs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of places, in parts that are small enough to be copied."""
    chosen = torch.arange(count)
    if count > _MOST_PLACES:
        chosen = torch.randperm(count, generator=generator)[:_MOST_PLACES].sort().values
    yield from chosen.split(max(1, _NUMBERS // max(inputs, 1)))
