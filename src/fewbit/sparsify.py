"""Single weights pruned: zeros anywhere, N:M or in blocks; the shapes stay, the file gets smaller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import Batch, Batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.evidence import Seen, see
from fewbit.model.graph import copy_graph
from fewbit.model.zeros import SPARSE, sparse_names
from fewbit.normalise import retrained
from fewbit.progress import shown
from fewbit.pruned import Sparsity, Zeros
from fewbit.pruning.allocation import Scope
from fewbit.pruning.evidence import Loss
from fewbit.pruning.groups import couple
from fewbit.pruning.patterns import Pattern, reached, thresholded
from fewbit.pruning.saliency import Weight, needs, per_output, saliency
from fewbit.refit import refit
from fewbit.statistics import LAYERS

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MULTIPLY = (*LAYERS, *_TRANSPOSED, nn.RNNBase, nn.MultiheadAttention)
LEAST = 0.01
_WIDEST = 8192  # inputs of an output, of which second moments are kept

Train = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class _Site:
    """A weight of the graph, as [outputs, inputs, ...] whatever its layer's order."""

    name: str
    layer: str
    transposed: bool

    def of(self, gm: GraphModule) -> Tensor:
        value = self.turned(gm.get_parameter(self.name).detach())
        assert value is not None
        return value

    def turned(self, value: Tensor | None) -> Tensor | None:
        """From the layer's order to this one, or back."""
        return value.transpose(0, 1) if self.transposed and value is not None else value


@dataclass(frozen=True)
class Sparsifying:
    """How single weights are to be pruned; see ``fewbit.prune`` for the meaning of each."""

    pattern: Pattern
    sparsity: float
    criterion: str
    scope: Scope
    least: float
    ignore: tuple[str, ...]
    steps: int
    schedule: str
    loss: Loss | None = None
    train: Train | None = None
    rewind: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, int | float) or not 0 <= self.least < 1:
            raise RecipeError(
                f"sparsity={self.sparsity!r}, least={self.least!r}: expected the share of zeros, and one that stays"
            )
        if not 0 < self.sparsity <= 1 - self.least or self.sparsity == 1:
            raise RecipeError(
                f"sparsity={self.sparsity:g}: expected more than 0 and at most {1 - self.least:g}, since least="
                f"{self.least:g} of each layer stays"
            )
        reached(0.0, self.sparsity, 1, 1, self.schedule)
        if self.steps > 1 and self.pattern.ratio is not None:
            raise RecipeError(f"steps={self.steps}: {self.pattern.structure} is reached in one step")
        if "training" in needs(self.criterion) and self.train is None:
            raise RecipeError(f"criterion {self.criterion!r} looks at what training does: give train=")

    @property
    def sees(self) -> frozenset[str]:
        """What the criterion has to see on data."""
        return needs(self.criterion) - {"training"}


def sparsified(
    gm: GraphModule,
    examples: tuple[Tensor, ...],
    batches: Batches | None,
    how: Sparsifying,
    repair: bool,
    seed: int,
    progress: bool,
) -> GraphModule:
    """The graph with the zeros that ``how`` asks for, which ``gm.meta["sparse"]`` names. Raises as ``fewbit.prune``."""
    generator = torch.Generator().manual_seed(seed)
    before: dict[str, Tensor] = {}
    if "training" in needs(how.criterion) and how.train is not None:
        before, gm = _weights(gm), retrained(how.train, gm, examples)
    start = _share(gm, [site for site, reason in _sites(gm, how) if reason is None])
    if start >= how.sparsity and how.pattern.ratio is None:
        raise RecipeError(f"sparsity={how.sparsity:g}: {start:.2%} of the weights are zero already")
    for step in range(1, how.steps + 1):
        share = reached(start, how.sparsity, step, how.steps, how.schedule)
        dense = gm
        gm = copy_graph(gm)
        masks = _masks(gm, how, share, batches, before, generator, progress)
        _apply(gm, masks)
        if how.rewind is not None:
            _rewind(gm, how.rewind, masks)
        elif repair:
            refit(couple(dense), set(), gm, batches or (), progress)
        if how.train is not None:
            before, gm = _weights(gm), retrained(how.train, gm, examples)
    gm.meta["sparsity"] = _report(gm, how)
    return gm


def _sites(gm: GraphModule, how: Sparsifying) -> list[tuple[_Site, str | None]]:
    """Weights of the layers that multiply, shared ones once, and why some are left dense."""
    found, known = [], set()
    for layer, module in gm.named_modules():
        if not isinstance(module, _MULTIPLY):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in known:
                continue
            known.add(id(parameter))
            site = _Site(f"{layer}.{key}", layer, isinstance(module, _TRANSPOSED))
            found.append((site, _obstacle(site, module, gm, how)))
    return found


def _obstacle(site: _Site, module: nn.Module, gm: GraphModule, how: Sparsifying) -> str | None:
    if any(fnmatch(site.layer, pattern) for pattern in how.ignore):
        return "ignored"
    if how.sees & {"inputs", "hessian"} and not isinstance(module, LAYERS):
        return f"{how.criterion!r} does not see what {type(module).__name__} reads"
    return how.pattern.obstacle(site.of(gm))


def _masks(
    gm: GraphModule,
    how: Sparsifying,
    share: float,
    batches: Batches | None,
    before: Mapping[str, Tensor],
    generator: torch.Generator,
    progress: bool,
) -> dict[str, Tensor]:
    """By name, which numbers of each weight stay."""
    sites = [site for site, reason in _sites(gm, how) if reason is None]
    if not sites:
        reasons = "; ".join(f"{site.name}: {reason}" for site, reason in _sites(gm, how))
        raise RecipeError(
            f"no weight of the model can be sparse: {reasons or 'it has no layers that multiply'}"
        )
    seen = Seen()
    if how.sees:
        _check_width(gm, sites, how)
        seen = see(gm, [s.name for s in sites], how.sees, _shown(batches, progress), generator, how.loss)
    scores = []
    for site in shown(sites, len(sites), "scoring weights", progress):
        scores.append(_scores(gm, site, how, seen, before, generator))
    gone = [site.of(gm) == 0 if site.name in sparse_names(gm) else None for site in sites]
    masks = _chosen(how, share, scores, gone)
    return {
        site.name: mask.transpose(0, 1) if site.transposed else mask
        for site, mask in zip(sites, masks, strict=True)
    }


def _scores(
    gm: GraphModule,
    site: _Site,
    how: Sparsifying,
    seen: Seen,
    before: Mapping[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    for kind, found, cure in (
        ("hessian", seen.hessians, "the data did not reach this layer: give other data"),
        ("inputs", seen.inputs, "the data did not reach this layer: give other data"),
        ("gradients", seen.outputs, "the loss does not feel this layer: give loss=, which reads all outputs"),
    ):
        if kind in how.sees and how.sees & {"inputs", "hessian"} and site.layer not in found:
            raise DataError(f"{site.layer}: {cure}, or name the layer in ignore=")
    weight = Weight(
        site.of(gm), generator, seen.inputs.get(site.layer), seen.hessians.get(site.layer),
        seen.outputs.get(site.layer), site.turned(seen.squares.get(site.name)), site.turned(before.get(site.name)),
    )  # fmt: skip
    scores = saliency(how.criterion, weight)
    if not bool(torch.isfinite(scores).all()):
        raise ModelError(
            f"{site.name}: criterion {how.criterion!r} is not finite there; look for NaN in the data"
        )
    return scores


def _check_width(gm: GraphModule, sites: Collection[_Site], how: Sparsifying) -> None:
    for site in sites:
        inputs = site.of(gm)[0].numel()
        if "hessian" in how.sees and inputs > _WIDEST:
            raise RecipeError(
                f"{site.name}: its outputs have {inputs:,} inputs each, too many for the second moments that criterion "
                f"{how.criterion!r} sees (at most {_WIDEST:,}): use 'wanda' or 'magnitude', or ignore= for the layer"
            )


def _chosen(how: Sparsifying, share: float, scores: list[Tensor], gone: list[Tensor | None]) -> list[Tensor]:
    """Which numbers of each weight stay; ``gone``: those that have left before, which do not come back."""
    pattern = how.pattern
    scores = [
        each if left is None else each.masked_fill(left, 0.0 if pattern.structure == "block" else -torch.inf)
        for each, left in zip(scores, gone, strict=True)
    ]
    if pattern.ratio is not None:
        return [pattern.strongest(each) for each in scores]
    units = [_with_least(pattern.units(each), how.least) for each in scores]
    if pattern.structure == "block":
        empty = [None if left is None else pattern.units(left.double()) == 1 for left in gone]
        units = [u if e is None else u.masked_fill(e, -torch.inf) for u, e in zip(units, empty, strict=True)]
    if per_output(how.criterion) and pattern.structure == "unstructured":
        rows = [list(u.reshape(each.shape).flatten(1)) for u, each in zip(units, scores, strict=True)]
        kept = [torch.cat(thresholded(each, share, together=False)) for each in rows]
    else:
        kept = thresholded(units, share, how.scope == "global" and not per_output(how.criterion))
    return [pattern.mask(some, each.shape) for some, each in zip(kept, scores, strict=True)]


def _with_least(units: Tensor, least: float) -> Tensor:
    """The same scores, those of the strongest share, one unit at least, beyond all others."""
    strongest = units.topk(max(1, round(least * len(units)))).indices
    return units.index_fill(0, strongest, torch.inf)


def _apply(gm: GraphModule, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            gm.get_parameter(name).masked_fill_(~mask, 0.0)  # a product could be -0.0
    gm.meta[SPARSE] = tuple(dict.fromkeys((*sparse_names(gm), *masks)))


def _rewind(gm: GraphModule, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """What stays goes back to what it was; buffers that the state lacks are left as they are."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    for name, value in {**parameters, **dict(gm.named_buffers())}.items():
        if name not in state and name not in parameters:
            continue
        if name not in state or state[name].shape != value.shape:
            found = "nothing" if name not in state else f"shape {tuple(state[name].shape)}"
            raise ModelError(
                f"rewind: {name} has shape {tuple(value.shape)}, and there is {found} to go back to"
            )
        with torch.no_grad():
            value.copy_(state[name])
    _apply(gm, masks)


def _weights(gm: GraphModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in gm.named_parameters(remove_duplicate=False)}


def _share(gm: GraphModule, sites: Collection[_Site]) -> float:
    """Of zeros that were pruned before."""
    sparse = set(sparse_names(gm))
    zeros = sum(int((site.of(gm) == 0).sum()) for site in sites if site.name in sparse)
    return zeros / max(sum(site.of(gm).numel() for site in sites), 1)


def _report(gm: GraphModule, how: Sparsifying) -> Sparsity:
    weights = (
        Zeros(site.name, site.of(gm).numel(), int(site.of(gm).count_nonzero()), reason)
        for site, reason in _sites(gm, how)
    )
    return Sparsity(how.pattern.structure, tuple(weights))


def _shown(batches: Batches | None, progress: bool) -> Iterator[Batch]:
    if batches is not None:
        yield from shown(batches, batches.length, "measuring weights", progress)
