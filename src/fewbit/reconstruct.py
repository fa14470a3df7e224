"""Block reconstruction: each block of a network learns to give the float block's outputs, in codes.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (arXiv 2102.05426); Wei et
al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (arXiv 2203.05740). What
is learned: which way weights round, biases, and the scales of activations.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.calibrate import shown
from fewbit.errors import CalibrationError
from fewbit.model.blocks import Block, as_module, split, twin
from fewbit.model.learned import LearnedBlock
from fewbit.model.simulate import FakeQuantize
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.soft_rounding import SoftRounding
from fewbit.numerics.straight_through import coin_flips
from fewbit.plan import Plan, Row
from fewbit.progress_file import Progress
from fewbit.rounding import reconstruction

_BATCH = 32  # samples of a step
_ROUNDING_RATE, _BIAS_RATE, _SCALE_RATE = 1e-2, 1e-3, 1e-3  # Adam's, for some hundred steps
_DECIDE = 0.01  # weight of the term that makes codes decide
_WARM_UP = 0.2  # share of the steps before that term begins
_MILD, _STRICT = 20.0, 2.0  # its exponent at first and at last
_AT_ONCE = 128  # samples that pass through a block at a time
_LEARNABLE_BITS = (
    7  # of weights: finer ones have nothing to win, and limits that are set for them may be passed
)

Values = dict[Node, Tensor]


@dataclass(frozen=True)
class Task:
    """What is to be reconstructed: the graph with its quantize steps, and the float one that it was made from.

    ``fixed``: paths of quantize steps whose scale is not free. ``iterations``: steps for each block.
    """

    gm: GraphModule
    float_gm: GraphModule
    plan: Plan
    qtensors: dict[str, QTensor]
    fixed: set[str]
    iterations: int
    seed: int = 0


def reconstructs(plan: Plan) -> bool:
    """Whether a row of the plan asks for reconstruction."""
    return any(_reconstructed(row) for row in plan.weights())


def _reconstructed(row: Row) -> bool:
    return row.scheme is not None and row.rounding is not None and reconstruction(row.rounding) is not None


def reconstruct(
    task: Task,
    inputs: tuple[Tensor, ...],
    progress: bool = False,
    kept: Progress | None = None,
) -> list[str]:
    """Learn block after block on these samples; ``task.gm`` and ``task.qtensors`` are changed in place.

    A block that learned nothing better than what it had stays as it was. ``kept`` gets what finished blocks learned,
    and blocks that it has are not learned again.

    Returns:
        a sentence for each block: its signal-to-noise ratio before and after.

    Raises:
        CalibrationError: fewer than two samples, or numbers that are not finite, by the block's first layer.
    """
    if len(inputs[0]) < 2:
        raise CalibrationError(
            "block reconstruction needs at least 2 calibration samples, and 1,024 are usual; found "
            f"{len(inputs[0])}"
        )
    rows = {layer: row for layer, row in learnable(task).items() if _reconstructed(row)}
    layers = {row.layer for row in task.plan.weights() if row.scheme is not None}
    blocks = split(task.gm, layers, tuple(x[:2] for x in inputs))
    kept = kept or Progress()
    quantized, exact = _placed(task.gm, inputs), _placed(task.float_gm, inputs)
    ticks = shown(
        range(task.iterations * len(blocks)), task.iterations * len(blocks), "reconstructing", progress
    )
    notes = []
    for index, block in enumerate(blocks):
        pair = twin(block, task.float_gm)
        expected = run(as_module(pair, task.float_gm), [exact[n] for n in pair.inputs])
        given = [quantized[n] for n in block.inputs]
        if str(index) in kept.parts:
            store(task, rows, kept.parts[str(index)])
        else:
            state, note = _improved(
                task, block, rows, index, given, [exact[n] for n in pair.inputs], expected, ticks
            )
            notes += [note] if note else []
            kept.keep(str(index), state)
        for path in block.calls():
            rows.pop(path, None)  # what a later block calls again has learned
        quantized |= dict(zip(block.outputs, run(as_module(block, task.gm), given), strict=True))
        exact |= dict(zip(pair.outputs, expected, strict=True))
        later = blocks[index + 1 :]
        quantized = _needed(quantized, {n for b in later for n in b.inputs})
        exact = _needed(exact, {n for b in later for n in twin(b, task.float_gm).inputs})
    return notes


def learnable(task: Task) -> dict[str, Row]:
    """The rows whose codes can be learned, by layer: of few bits, integers or a codebook, of that layer alone."""
    shared = {row.shared_with for row in task.plan.weights()}
    return {
        row.layer: row
        for row in task.plan.weights()
        if row.site == f"{row.layer}.weight"
        and isinstance(task.gm.get_submodule(row.layer), nn.Linear | nn.modules.conv._ConvNd)
        and row.scheme is not None
        and can_learn(row.scheme.spec)
        and row.shared_with is None
        and row.site not in shared
    }


def can_learn(spec: Format) -> bool:
    """Whether codes of that format can be learned at all: few bits, integers or a codebook."""
    return (spec.integer or spec.learned) and spec.bits <= _LEARNABLE_BITS


def owner(task: Task, inputs: tuple[Tensor, ...]) -> list[object]:
    """What a saved state belongs to; steps and epochs are in the plan's recipe."""
    settings = [task.plan.to_json(), task.seed, sorted(task.fixed)]
    return [settings, *inputs, *task.float_gm.state_dict().values(), *task.gm.state_dict().values()]


def _placed(gm: GraphModule, inputs: tuple[Tensor, ...]) -> Values:
    return dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))


def _needed(values: Values, needed: set[Node]) -> Values:
    return {node: value for node, value in values.items() if node in needed}


def run(module: GraphModule, inputs: list[Tensor]) -> list[Tensor]:
    """The block's outputs for all samples."""
    with torch.no_grad():
        starts = range(0, len(inputs[0]), _AT_ONCE)
        parts = [module(*(x[i : i + _AT_ONCE] for x in inputs)) for i in starts]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _improved(
    task: Task,
    block: Block,
    rows: dict[str, Row],
    index: int,
    quantized: list[Tensor],
    exact: list[Tensor],
    expected: list[Tensor],
    ticks: Iterator[int],
) -> tuple[dict[str, Tensor], str]:
    """What the block learned, which is stored if it is better than what was there; and a note."""
    weights = {
        path: (task.float_gm.get_submodule(path).get_parameter("weight"), task.qtensors[rows[path].site])
        for path in dict.fromkeys(block.calls())
        if path in rows
    }
    if not weights:
        return {}, ""
    generator = torch.Generator().manual_seed(task.seed * 1_000_003 + index)
    settings = reconstruction(rows[next(iter(weights))].rounding or "")
    drop = generator if settings is not None and settings.drop and _quantizes(task.gm, block) else None
    learned = LearnedBlock(block, task.gm, weights, SoftRounding, task.fixed, drop)
    before = _noise(run(as_module(block, task.gm), quantized), expected)
    old = {f"{path}:{kind}": current(task, rows, path, kind) for path, kind, _ in learned.learned()}
    _learn(learned, quantized, exact, expected, task.iterations, generator, ticks)
    state = {f"{path}:{kind}": value.clone().contiguous() for path, kind, value in learned.learned()}
    store(task, rows, state)
    after = _noise(run(as_module(block, task.gm), quantized), expected)
    names = ", ".join(weights)
    if not math.isfinite(after):
        raise CalibrationError(
            f"{names}: reconstruction gives numbers that are not finite; use rounding='gptq'"
        )
    if after >= before:
        store(task, rows, old)
        return {}, f"{names}: reconstruction found nothing better than rounding to nearest"
    return state, f"{names}: reconstructed, {decibels(before):.1f} -> {decibels(after):.1f} dB"


def _quantizes(gm: GraphModule, block: Block) -> bool:
    return any(isinstance(gm.get_submodule(path), FakeQuantize) for path in block.calls())


def _noise(found: list[Tensor], expected: list[Tensor]) -> float:
    """The power of the outputs' error, as a share of the outputs' power."""
    pairs = list(zip(found, expected, strict=True))
    power = sum(float(e.double().square().sum()) for _, e in pairs)
    return sum(float((f - e).double().square().sum()) for f, e in pairs) / max(power, 1e-300)


def decibels(noise: float) -> float:
    return -10 * math.log10(max(noise, 1e-30))


def _learn(
    learned: LearnedBlock[SoftRounding],
    quantized: list[Tensor],
    exact: list[Tensor],
    expected: list[Tensor],
    iterations: int,
    generator: torch.Generator,
    ticks: Iterator[int],
) -> None:
    """Adam on the error of the block's outputs; where values are dropped, inputs are float and quantized in a mix."""
    groups = [
        {"params": [weight.v for weight in learned.weights()], "lr": _ROUNDING_RATE},
        {"params": learned.biases(), "lr": _BIAS_RATE},
        {"params": learned.scales(), "lr": _SCALE_RATE},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    rates = [group["lr"] for group in optimizer.param_groups]
    drops = any(step.drop is not None for step in learned.steps.values())
    for step in range(iterations):
        next(ticks, None)
        done = step / iterations
        for group, rate in zip(optimizer.param_groups[1:], rates[1:], strict=True):
            group["lr"] = rate * falling(done)
        chosen = torch.randint(len(expected[0]), (_BATCH,), generator=generator)
        given = [q[chosen] for q in quantized]
        if drops:
            given = [
                torch.where(coin_flips(q.shape, generator).to(q.device), f[chosen], q)
                for q, f in zip(given, exact, strict=True)
            ]
        loss = _loss(learned.module(*given), [e[chosen] for e in expected])
        if done >= _WARM_UP:
            share = (done - _WARM_UP) / (1 - _WARM_UP)
            beta = _STRICT + (_MILD - _STRICT) * falling(share)
            loss = loss + _DECIDE * torch.stack([w.undecided(beta) for w in learned.weights()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def falling(done: float) -> float:
    """Half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _loss(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Squared error, summed over channels and averaged over all else, as the papers have it."""
    terms = []
    for f, e in zip(found, expected, strict=True):
        channels = e.shape[1] if e.dim() > 1 else 1
        terms.append((f - e).square().mean() * channels)
    return torch.stack(terms).sum()


def current(task: Task, rows: dict[str, Row], path: str, kind: str) -> Tensor:
    """A copy of what ``store`` would replace."""
    part = task.gm.get_submodule(path)
    of_codes = {"codes": "codes", "weight_scale": "scale", "codebook": "codebook"}
    value: object = (
        getattr(task.qtensors[rows[path].site], of_codes[kind]) if kind in of_codes else getattr(part, kind)
    )
    assert isinstance(value, Tensor)
    return value.detach().clone()


def store(task: Task, rows: dict[str, Row], state: dict[str, Tensor]) -> None:
    """Put what was learned into the graph and the codes; keys are ``<path>:<kind>`` as of ``LearnedBlock.learned``."""
    with torch.no_grad():
        for key, value in state.items():
            path, _, kind = key.rpartition(":")
            part = task.gm.get_submodule(path)
            if kind in ("weight_scale", "codebook"):
                continue
            if kind == "codes":
                old = task.qtensors[rows[path].site]
                table = state.get(f"{path}:codebook")
                q = QTensor.from_codes(
                    value, state[f"{path}:weight_scale"], old.zero_point, old.scheme, table
                )
                task.qtensors[rows[path].site] = q
                part.get_parameter("weight").copy_(q.dequantize())
            else:
                tensor = getattr(part, kind)
                assert isinstance(tensor, Tensor)
                tensor.copy_(value)
