"""``rounding="best"``: the strongest rounding that fits the time that a user has."""

import dataclasses
import re
import time as clock

from torch import Tensor
from torch.fx import GraphModule

from fewbit.errors import RecipeError
from fewbit.numerics.format import get_format
from fewbit.plan import Recipe
from fewbit.reconstruct import can_learn
from fewbit.rounding import can_round

BEST = "best"
_DEFAULT = 600.0  # seconds
_BATCH = 32  # samples of a step of reconstruction
_OVERHEAD = (
    4.0  # a step of reconstruction, in steps of training the float network: quantize steps, soft roundings
)
_SHARE = 0.7  # of the time that learning may take; the rest passes data through
_FEWEST, _MOST = 100, 4000  # steps a block: with fewer, GPTQ is as good; more win nothing
_EPOCHS = 20  # of fine-tuning, at most
_MANY_WEIGHT_BITS, _MANY_ACTIVATION_BITS = 4, 8
_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def seconds(time: str | float | None) -> float:
    """``"10 min"``, ``"90 s"``, ``"1 h"`` or a number, in seconds; 10 minutes for None. Raises ``RecipeError``."""
    if time is None:
        return _DEFAULT
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(time))
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(f"time is {time!r:.40}, expected a positive time such as '10 min' or '90 s'")
    return float(match[1]) * _UNITS[match[2]]


def strongest(
    recipe: Recipe,
    gm: GraphModule,
    examples: tuple[Tensor, ...],
    samples: int,
    time: str | float | None,
) -> tuple[Recipe, str]:
    """The recipe with a rounding and a number of steps in the place of "best", and a sentence that says why.

    Block reconstruction and fine-tuning where data and time are enough; GPTQ where the time is not, where the
    format has codes that blocks cannot learn, and where there are bits enough that fine-tuning alone wins as much;
    HQQ or nearest codes without data. ``samples``: how many there are to learn from.
    """
    given = seconds(time)
    if not samples:
        rounding = "nearest" if recipe.weight_symmetric else "hqq"
        return dataclasses.replace(recipe, rounding=rounding), f"rounding: {rounding}, the best without data"
    step = _step_seconds(gm, examples) * _OVERHEAD
    steps = int(given * _SHARE / step)
    epoch = samples / _BATCH  # in steps, which take as long for all blocks as for the network
    rounding = "qdrop" if recipe.activations not in ("float", "dynamic") else "brecq"
    spec = get_format(recipe.weights)
    if not (can_learn(spec) and can_round(rounding, spec)) or _many_bits(recipe):
        epochs = min(_EPOCHS, int(steps / epoch)) if can_learn(spec) else 0
        found = dataclasses.replace(recipe, rounding="gptq", finetune=epochs)
        return found, f"rounding: gptq with {epochs} epochs of fine-tuning, the best for {recipe.weights}"
    if steps < _FEWEST:
        found = dataclasses.replace(recipe, rounding="gptq")
        return (
            found,
            f"rounding: gptq, since {given:.0f} s are enough for {steps} steps of reconstruction only",
        )
    epochs = min(_EPOCHS, int(steps / 2 / epoch))
    steps = min(int(steps - epochs * epoch), _MOST)
    found = dataclasses.replace(recipe, rounding=rounding, iterations=steps, finetune=epochs)
    needed = (steps + epochs * epoch) * step / _SHARE
    return found, (
        f"rounding: {rounding} with {steps} steps a block and {epochs} epochs of fine-tuning, in about {needed:.0f} s"
    )


def _many_bits(recipe: Recipe) -> bool:
    """Whether rounding loses little: ResNet-20 at W4A8 is 25 dB from float after GPTQ and 10 epochs, 23 dB after QDrop
    in the same time; at W2A8, GPTQ is the weaker one by far."""
    activations = recipe.activations
    many = activations in ("float", "dynamic") or get_format(activations).bits >= _MANY_ACTIVATION_BITS
    return many and get_format(recipe.weights).bits >= _MANY_WEIGHT_BITS


def _step_seconds(gm: GraphModule, examples: tuple[Tensor, ...]) -> float:
    """One step of training on a batch: forward and backward, the faster of two."""
    few = [x.repeat(-(-_BATCH // len(x)), *[1] * (x.dim() - 1))[:_BATCH] for x in examples]
    times = []
    for _ in range(2):
        started = clock.perf_counter()
        outputs = gm(*few)
        first = outputs if isinstance(outputs, Tensor) else next(iter(outputs))
        if first.requires_grad:
            first.sum().backward()
        times.append(clock.perf_counter() - started)
    gm.zero_grad(set_to_none=True)
    return min(times)
