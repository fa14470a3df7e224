"""Single weights pruned: zeros anywhere, N:M or in blocks; the shapes stay, the file gets smaller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import Batch, Batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.evidence import SEEN_LAYERS, Seen, see
from fewbit.model.graph import copy_graph
from fewbit.model.zeros import SPARSE, sparse_names
from fewbit.normalise import standard
from fewbit.progress import shown
from fewbit.pruned import Sparsity, Zeros
from fewbit.pruning.allocation import Scope
from fewbit.pruning.evidence import Loss
from fewbit.pruning.groups import couple
from fewbit.pruning.patterns import Pattern, reached, thresholded
from fewbit.pruning.saliency import Weight, needs, per_output, saliency
from fewbit.refit import refit

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MULTIPLY = (*SEEN_LAYERS, *_TRANSPOSED, nn.RNNBase, nn.MultiheadAttention)
LEAST = 0.01

Train = Callable[[nn.Module], nn.Module]


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
        reached(0.0, self.sparsity, 1, 1, self.schedule)
        if not 0 < self.sparsity < 1 or self.sparsity > 1 - self.least:
            raise RecipeError(
                f"sparsity={self.sparsity:g}: expected more than 0 and at most {1 - self.least:g}, since least="
                f"{self.least:g} of each layer stays"
            )
        if self.steps > 1 and self.pattern.ratio is not None:
            raise RecipeError(f"steps={self.steps}: {self.pattern.structure} is reached in one step")
        if "training" in needs(self.criterion) and self.train is None:
            raise RecipeError(f"criterion {self.criterion!r} looks at what training does: give train=")

    @property
    def sees(self) -> frozenset[str]:
        """What the criterion has to see on data."""
        return needs(self.criterion) & {"hessian", "gradients"}


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
    if "training" in needs(how.criterion):
        before, gm = _trained(gm, how, examples)
    start = _share(gm, [site for site, reason in _sites(gm, how) if reason is None])
    if start >= how.sparsity:
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
            before, gm = _trained(gm, how, examples)
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
    if needs(how.criterion) & {"hessian"} and not isinstance(module, SEEN_LAYERS):
        return f"{how.criterion!r} knows no second moments of what {type(module).__name__} reads"
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
        seen = see(gm, [s.name for s in sites], how.sees, _shown(batches, progress), generator, how.loss)
    scores = []
    for site in shown(sites, len(sites), "scoring weights", progress):
        scores.append(_scores(gm, site, how, seen, before, generator))
    masks = _chosen(how, share, scores)
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
    value = site.of(gm)
    if "hessian" in needs(how.criterion) and site.layer not in seen.hessians:
        raise DataError(
            f"{site.layer}: the data did not reach this layer: name it in ignore=, or give other data"
        )
    weight = Weight(
        value, generator, seen.hessians.get(site.layer), seen.outputs.get(site.layer),
        site.turned(seen.squares.get(site.name)), site.turned(before.get(site.name)),
    )  # fmt: skip
    found = saliency(how.criterion, weight)
    if not bool(torch.isfinite(found).all()):
        raise ModelError(
            f"{site.name}: criterion {how.criterion!r} is not finite there; look for NaN in the data"
        )
    if site.name in sparse_names(gm):
        found = found.masked_fill(value == 0, -torch.inf)  # what has left does not come back
    return found


def _chosen(how: Sparsifying, share: float, scores: list[Tensor]) -> list[Tensor]:
    pattern = how.pattern
    if pattern.ratio is not None:
        return [pattern.strongest(each) for each in scores]
    if per_output(how.criterion) and pattern.structure == "unstructured":
        return [
            torch.stack(thresholded(list(each.flatten(1)), share, together=False)).reshape(each.shape)
            for each in scores
        ]
    units = [pattern.units(each) for each in scores]
    together = how.scope == "global" and not per_output(how.criterion)
    if together:
        units = [_with_least(each, how.least) for each in units]
    kept = thresholded(units, share, together)
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
    """What stays goes back to what it was."""
    own = gm.state_dict()
    for name, value in own.items():
        if name not in state or state[name].shape != value.shape:
            found = "nothing" if name not in state else f"shape {tuple(state[name].shape)}"
            raise ModelError(
                f"rewind: {name} has shape {tuple(value.shape)}, and there is {found} to go back to"
            )
        with torch.no_grad():
            value.copy_(state[name])
    _apply(gm, masks)


def _trained(
    gm: GraphModule, how: Sparsifying, examples: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], GraphModule]:
    """The weights as they were, and the graph after the user's training, whose zeros must have stayed."""
    assert how.train is not None
    names, report = sparse_names(gm), gm.meta.get("sparsity")
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    trained = standard(how.train(gm), examples)
    for name in names:
        now = trained.get_parameter(name)
        if bool((now[before[name] == 0] != 0).any()):
            raise ModelError(
                f"{name}: training moved zeros away: in a loop of your own, train inside of hold_zeros(model)"
            )
    trained.meta[SPARSE] = tuple(names)
    if report is not None:
        trained.meta["sparsity"] = report
    return before, trained


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
