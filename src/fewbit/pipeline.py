"""The main job, step by step: read, normalise, plan, calibrate, round; the result answers as the deployed file will."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.calibrate import CalibrationWarning, Facts, calibrate_activations, clipping_warnings, site_name
from fewbit.data import Batches, as_batches
from fewbit.edges import SAME, answering, narrowed, with_edges
from fewbit.effort import BEST, strongest
from fewbit.errors import CalibrationError, DataError, ModelError, RecipeError
from fewbit.learning import MOST, USUAL, learn_on
from fewbit.model.biases import round_biases
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel, insert_dynamic, insert_quantizer
from fewbit.model.sites import QUANTIZERS, WEIGHTED, Placement, find_sites, layer_name, place
from fewbit.model.ties import separate_ties
from fewbit.normalise import adapted_to_data, corrected, moves_weights, normalised, standard
from fewbit.observers import observer_names
from fewbit.plan import Plan, Recipe, resolve
from fewbit.reconstruct import Task, reconstructs
from fewbit.rounding import reconstruction, rounding_names
from fewbit.statistics import Statistics, without_statistics
from fewbit.synthesis import synthesize
from fewbit.targets import adapt_and_check, get_target
from fewbit.training.building import make_trainable
from fewbit.training.model import TrainableModel, Training
from fewbit.weights import dead_channels, round_weights, weight_limits

_KEPT = 16  # samples that the model keeps for the export gate


@overload
def quantize(
    model: Any, calibration: object = None, *, trainable: Literal[False] = False, **settings: Any
) -> QuantizedModel: ...
@overload
def quantize(
    model: Any, calibration: object = None, *, trainable: Literal[True] | Training, **settings: Any
) -> TrainableModel: ...
def quantize(
    model: Any,
    calibration: object = None,
    *,
    example: Tensor | tuple[Tensor, ...] | None = None,
    recipe: Recipe | str | Path = "int8",
    target: str = "onnx",
    held_out: object = None,
    resume: str | Path | None = None,
    time: str | float | None = None,
    trainable: bool | Training = False,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    **overrides: Any,
) -> QuantizedModel | TrainableModel:
    """A quantized copy of ``model`` that answers as the deployed file will.

    ``model``: an ``nn.Module``, a ``keras.Model`` or a graph that ``fewbit.load`` gave; left as it is. ``calibration``:
    a few hundred typical inputs without labels: tensor, array, iterable of batches, ``Dataset``, ``DataLoader``,
    ``.npy`` or ``.npz`` path; needed where activations are quantized statically; ``"synthetic"`` for inputs that
    ``fewbit.synthesize`` learns from the model's batch norms. ``example``: one input (or a tuple of them), by default
    the first calibration batch, or what the model was read with. ``recipe``: a preset's name, a TOML
    file or a ``Recipe``; further keywords replace its values, as in ``quantize(model, data, weights="int4",
    equalize=True)``. ``target``: the runtime it is meant for. ``held_out``: inputs like those the model will see; a
    warning names the layers that would clip them much more than the calibration data. ``resume``: a file that keeps the
    calibration's state if it is interrupted (and beside it one with ``.blocks`` at the end, for what is learned); the
    same call goes on from there, with the same result. ``time``: with ``rounding="best"``, what the rounding may take,
    such as ``"10 min"``: the strongest that fits is chosen, and a note in ``.facts`` says which. ``trainable``: give a
    ``TrainableModel`` for a training loop of yours, or for ``fewbit.finetune``; ``True``, or a ``Training`` that names
    estimators; what a recipe would learn on calibration data is then left out. ``seed``: of reconstruction's random
    choices. ``progress``: show a bar on a terminal.

    What calibration saw, its memory and its warnings are in ``.facts``; warnings are also issued as
    ``CalibrationWarning``. Raises ``ModelError``, ``DataError``, ``CalibrationError``, ``RecipeError`` or
    ``PlanError``, by layer name.
    """
    chosen = _recipe(recipe, overrides)
    examples = (example,) if isinstance(example, Tensor) else example
    module = _module(model, examples)
    if isinstance(calibration, str) and calibration == "synthetic":
        calibration = synthesize(module, examples, progress=progress)
    batches = None
    if calibration is not None:
        batches = as_batches(
            calibration, what="calibration", like=examples, labels=False, batch_size=batch_size
        )
        examples = examples or batches.peek()[0]
    examples = examples or _meta(module).get("example")
    if examples is None:
        raise DataError(
            f"recipe {chosen.name!r} needs calibration data, or an example input where it is dynamic or weight-only: "
            "call quantize(model, calibration=data) or quantize(model, example=x, ...)"
        )
    source = standard(module, examples)
    gm = normalised(source, examples, chosen)
    notes = []
    if trainable:
        chosen = _to_be_trained(chosen)
    if chosen.rounding == BEST:
        chosen, note = strongest(chosen, gm, examples, _count(batches), time)
        notes.append(note)
    elif time is not None:
        raise RecipeError(
            f"time is given, which only rounding='best' keeps to, and rounding is {chosen.rounding!r}"
        )
    placement, resolved = _planned(gm, chosen, target)
    if placement.born and batches is None:
        raise CalibrationError(
            f"recipe {chosen.name!r} quantizes activations statically and needs calibration data: "
            'call quantize(model, calibration=data), or use activations="dynamic"'
        )
    notes += adapted_to_data(gm, examples, chosen, batches)
    job = _Job(chosen, placement, resolved, target, progress, resume, seed)
    latent = copy.deepcopy(gm) if trainable else None
    quantized = _quantized(gm, job, batches, examples)
    quantized.facts["notes"] = [*notes, *quantized.facts["notes"]]
    if held_out is not None:
        unseen = as_batches(held_out, what="held-out", like=examples, labels=False, batch_size=batch_size)
        quantized.facts["warnings"] += clipping_warnings(quantized, batches, unseen)
    for sentence in quantized.facts["warnings"]:
        warnings.warn(sentence, CalibrationWarning, stacklevel=2)
    if not trainable:
        return quantized
    made = make_trainable(
        quantized,
        latent,
        None if moves_weights(chosen) else source,
        trainable if isinstance(trainable, Training) else Training(),
        get_target(target).portable_bounds if chosen.portable else None,
    )
    made.recipe = chosen
    return made


def plan(
    model: Any,
    example: Tensor | tuple[Tensor, ...],
    *,
    recipe: Recipe | str | Path = "int8",
    target: str = "onnx",
    **overrides: Any,
) -> Plan:
    """What ``quantize`` would do to each tensor, and why, without any data but an example. Errors as there."""
    chosen = _recipe(recipe, overrides)
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    gm = normalised(_module(model, examples), examples, chosen)
    if chosen.rounding == BEST:
        chosen, _ = strongest(chosen, gm, examples, USUAL, None)
    return _planned(gm, chosen, target)[1]


def _recipe(recipe: Recipe | str | Path, overrides: dict[str, Any]) -> Recipe:
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    chosen = chosen.replace(**overrides) if overrides else chosen
    chosen.validate(observer_names(), [*rounding_names(), BEST])
    return chosen


def _to_be_trained(recipe: Recipe) -> Recipe:
    """The recipe without what learns on calibration data: training does that, and better."""
    learns = recipe.rounding == BEST or reconstruction(recipe.rounding) is not None
    if not learns and not recipe.finetune:
        return recipe
    return recipe.replace(rounding="nearest" if learns else recipe.rounding, finetune=0)


def _module(model: object, examples: tuple[Tensor, ...] | None) -> nn.Module:
    """The model as an ``nn.Module``; Keras models become graphs."""
    if isinstance(model, QuantizedModel | TrainableModel):
        raise ModelError("the model is quantized already; quantize the float model it came from")
    return as_module(model, examples)


def _count(batches: Batches | None) -> int:
    """How many samples there are to learn from; the usual number where the data does not tell."""
    if batches is None:
        return 0
    return USUAL if batches.samples is None else min(batches.samples, MOST)


def _meta(module: nn.Module) -> dict[str, Any]:
    return getattr(module, "meta", {}) if isinstance(module, GraphModule) else {}


def _planned(gm: GraphModule, recipe: Recipe, target: str) -> tuple[Placement, Plan]:
    placement = place(gm, recipe.mode, recipe.decoded)
    if recipe.addends not in (SAME, recipe.activations) and narrowed(gm, placement):
        placement = place(gm, recipe.mode, recipe.decoded)
    if recipe.outputs == "float":
        last = {layer_name(n) for n in answering(gm, placement)}
        placement = place(
            gm,
            lambda layer, op: "weight-only" if layer in last else recipe.mode(layer, op),
            recipe.decoded,
        )
    recipe = with_edges(recipe, gm, placement)
    resolved = without_statistics(resolve(recipe, find_sites(gm, placement)), gm)
    nodes = (*placement.forms.items(), *placement.dynamic.items())
    integer = {str(node.target) for node, form in nodes if form.kind in WEIGHTED}
    return placement, adapt_and_check(resolved, get_target(target), target, integer)


@dataclass(frozen=True)
class _Job:
    """What is to be done, and how."""

    recipe: Recipe
    placement: Placement
    plan: Plan
    target: str
    progress: bool
    resume: str | Path | None
    seed: int


def _quantized(
    gm: GraphModule, job: _Job, batches: Batches | None, examples: tuple[Tensor, ...]
) -> QuantizedModel:
    facts, placement = Facts(), job.placement
    quantizers = calibrate_activations(gm, placement, job.plan, batches, facts, job.progress, job.resume)
    learns = reconstructs(job.plan) or job.recipe.finetune > 0
    float_gm = copy.deepcopy(gm) if job.recipe.bias_correction or learns else None
    limits = weight_limits(gm, job.recipe, placement, quantizers, get_target(job.target))
    facts.warnings += dead_channels(gm, job.plan)
    statistics = Statistics(gm, job.plan, batches, facts, job.progress)
    qtensors = round_weights(gm, job.plan, limits, statistics)
    for node, quantizer in quantizers.items():
        insert_quantizer(gm, node, quantizer)
    for node in placement.dynamic:
        insert_dynamic(gm, node)
    gm.recompile()
    if float_gm is not None and learns:
        fixed = {
            f"{QUANTIZERS}.{n.name}"
            for n in quantizers
            if job.plan.row(site_name(n, placement)).observer is None
        }
        task = Task(gm, float_gm, job.plan, qtensors, fixed, job.recipe.iterations, job.seed)
        facts.notes += learn_on(task, batches, facts, job.recipe.finetune, job.progress, job.resume)
    if float_gm is not None and job.recipe.bias_correction:
        pairs = (*placement.forms.items(), *placement.dynamic.items())
        layers = list(dict.fromkeys(str(n.target) for n, form in pairs if form.kind in WEIGHTED))
        facts.notes += corrected(float_gm, gm, layers, job.recipe, batches, examples)
    integer = frozenset(n.name for n in (*placement.forms, *placement.dynamic))
    kept = tuple(x[:_KEPT] for x in examples)
    model = QuantizedModel(gm, job.plan, qtensors, integer, kept, job.target, facts.to_json())
    separate_ties(model)
    round_biases(model)
    return model
