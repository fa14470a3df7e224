"""Recipe x sites x what the target can run -> plan: decisions with reasons, refusals by layer name."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fewbit.errors import FormatError, PlanError, RecipeError
from fewbit.numerics.codebooks import check_codebook, shared_table
from fewbit.numerics.format import Format, get_format
from fewbit.numerics.scheme import Granularity, Scheme, block_count
from fewbit.plan.plan import DERIVED, Plan, Row, Site
from fewbit.plan.recipe import Recipe, Rule

Check = Callable[[Row], str | None]

# Which of a rule's keys say something about a site of this kind; a rule none of whose keys do is a mistake.
_KEYS: dict[str, frozenset[str]] = {
    "weight": frozenset(
        {"weights", "granularity", "group_size", "weight_symmetric", "weight_observer", "rounding"}
    ),
    "activation": frozenset({"activations", "activation_symmetric", "observer"}),
    "output": frozenset({"activations", "outputs", "activation_symmetric", "observer"}),
}


def resolve(recipe: Recipe, sites: Sequence[Site], check: Check | None = None) -> Plan:
    """Decide every site of a model: the recipe's defaults, then each matching rule in order, the later wins.

    ``check(row)`` is the target's: None where it can run the row, otherwise why not. Sites that share copy
    the row they share with; sites without an integer form are float and the row says why.

    Raises RecipeError where a rule matches no layer or has no effect on those it matches, FormatError for an
    unknown format, and PlanError that lists all rows which the target refuses, by layer name.
    """
    if not sites:
        raise PlanError("the model has no tensor that could be quantized: it has no layer that fewbit knows")
    _check_rules(recipe, sites)
    decided = [_decide(recipe, site) for site in sites]
    plan = Plan(tuple(_dependent(decided)), recipe.name)
    refusals = [(row, reason) for row in plan.rows if row.scheme and check and (reason := check(row))]
    if refusals:
        listed = "\n".join(
            f"  {row.layer or row.site} ({row.kind} '{row.site}'): {reason}" for row, reason in refusals
        )
        raise PlanError(
            f"recipe '{recipe.name}': the target cannot run {len(refusals)} of {len(plan.rows)} rows:"
            f"\n{listed}\n"
            'change the recipe, or add a rule that gives these layers another format or "float"'
        )
    return plan


@dataclass
class _Settings:
    """What the recipe says about one site, which rules had a say, and which keys are theirs."""

    values: dict[str, Any]
    because: list[str] = field(default_factory=list)
    ruled: set[str] = field(default_factory=set)

    def __getattr__(self, key: str) -> Any:
        return self.values[key]


def _relevant(rule: Rule, site: Site) -> bool:
    return bool(_KEYS.get(site.kind, frozenset()) & rule.overrides().keys())


def _settings(recipe: Recipe, site: Site) -> _Settings:
    settings = _Settings({item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)})
    for number, rule in enumerate(recipe.rules, 1):
        if not (rule.matches(site.layer, site.op) and _relevant(rule, site)):
            continue
        overrides = rule.overrides()
        if "group_size" in overrides:
            overrides["granularity"] = "group"
        settings.values |= overrides
        settings.ruled |= overrides.keys()
        settings.because.append(f"rule {number}: {rule}")
    return settings


def _decide(recipe: Recipe, site: Site) -> Row:
    """The row of a site on its own: sites that share or are derived are mended by :func:`_dependent`."""
    row = Row(site.site, site.layer, site.op, site.kind, site.shape, None, constraint=site.constraint)
    if not site.integer_capable:
        return dataclasses.replace(row, because=f"float: {site.reason or f'{site.op} has no integer form'}")
    if site.kind == "bias":
        return row
    if site.kind == "gradient":
        return dataclasses.replace(row, because="float: gradients are not quantized")
    settings = _settings(recipe, site)
    because = "; ".join(settings.because) or f"default of recipe {recipe.name}"
    scheme = _weight_scheme(settings, site) if site.kind == "weight" else _activation_scheme(settings, site)
    if site.kind == "output" and scheme and scheme.format not in (settings.activations, settings.outputs):
        because += f"; {scheme.format}: a network's outputs keep 8 bits"
    if scheme is None:
        return dataclasses.replace(row, because=because if settings.because else f"float: {because}")
    observer: str | None
    rounding: str | None
    if site.kind == "weight":
        observer, rounding, note = _weight_means(settings, scheme)
        because += note
    else:
        observed = not scheme.dynamic and not site.constraint.startswith("fixed")
        observer, rounding = (settings.observer if observed else None), None
    return dataclasses.replace(row, scheme=scheme, observer=observer, rounding=rounding, because=because)


def _weight_means(settings: _Settings, scheme: Scheme) -> tuple[str, str, str]:
    """Range estimator and rounding: the format's own where the recipe has the defaults; and a remark on that."""
    spec, observer, rounding = scheme.spec, settings.weight_observer, settings.rounding
    note = ""
    if spec.name != settings.weights:
        note = f"; {spec.name}: the layer's channels are smaller than a table of {settings.weights}"
    if spec.learned:
        observer = "minmax"  # nothing saturates: the table is fitted to all numbers
    elif observer == "minmax" != spec.observer:
        observer, note = spec.observer, f"{note}; {spec.name} takes its scales from {spec.observer}"
    if rounding == "nearest" != spec.rounding:
        rounding, note = spec.rounding, f"{note}; {spec.name} is rounded by {spec.rounding}"
    return observer, rounding, note


def _weight_scheme(settings: _Settings, site: Site) -> Scheme | None:
    if settings.weights == "float":
        return None
    spec = get_format(settings.weights)
    symmetric = settings.weight_symmetric or not spec.integer  # only integers have a zero point
    # Symmetric codes leave out -2**(b-1): it has no positive twin, and kernels that add two products in
    # 16 bits rely on its absence. Unsigned codes have no such extreme.
    narrow = symmetric and spec.integer and spec.qmin < 0 < spec.qmax
    granularity: Granularity = settings.granularity if spec.scaled else "tensor"
    if spec.block is not None:
        settings = _in_blocks(settings, spec, site)
        granularity = "group"
    if granularity != settings.granularity == "group":
        raise PlanError(
            f"layer '{site.layer}': {spec.name} has no scales to give to groups: leave out group_size"
        )
    size = settings.group_size if granularity == "group" else None
    try:
        scheme = Scheme(settings.weights, granularity, site.axis, size, symmetric, narrow=narrow)
        block_count(site.shape, scheme)
        if spec.learned:
            scheme = _with_room_for_tables(
                scheme, site, recipe_wide=not {"weights", "granularity"} & settings.ruled
            )
    except FormatError as error:
        raise PlanError(f"layer '{site.layer}': {error}") from error
    return scheme


def _with_room_for_tables(scheme: Scheme, site: Site, recipe_wide: bool) -> Scheme:
    """The scheme, with one table for all channels where the recipe gives all layers a table for each channel and
    this layer has channels smaller than a table (depthwise convolutions do). Raises FormatError for any other
    tables larger than what they serve."""
    try:
        check_codebook(site.shape, scheme)
    except FormatError:
        if not recipe_wide or scheme.granularity != "channel" or shared_table(scheme):
            raise
        scheme = dataclasses.replace(scheme, format=f"{scheme.format}_shared")
        check_codebook(site.shape, scheme)
    return scheme


def _in_blocks(settings: _Settings, spec: Format, site: Site) -> _Settings:
    """The settings with the format's own group size. Raises PlanError where the recipe asks for another."""
    if settings.group_size not in (None, spec.block):
        raise PlanError(
            f"layer '{site.layer}': group_size is {settings.group_size}, but {spec.name} has one scale for every "
            f"{spec.block} numbers: leave out group_size"
        )
    return _Settings(settings.values | {"granularity": "group", "group_size": spec.block})


def _activation_scheme(settings: _Settings, site: Site) -> Scheme | None:
    name = _output_format(settings) if site.kind == "output" else settings.activations
    if name == "float":
        return None
    dynamic = name == "dynamic"
    if dynamic and site.kind == "output":
        return None  # a range taken at run time serves the layer that reads it, and nothing reads an output
    spec = get_format("int8" if dynamic else name)
    if spec.block is not None or spec.learned:
        what = "shares scales among blocks of numbers" if spec.block else "is fitted to each tensor"
        raise PlanError(
            f"layer '{site.layer}': {spec.name} {what}, which activations, whose one scale is fixed, cannot have: "
            "use it for weights, and for activations a format such as int8 or float8_e4m3"
        )
    return Scheme(spec.name, symmetric=settings.activation_symmetric or not spec.integer, dynamic=dynamic)


def _output_format(settings: _Settings) -> str:
    """What a network answers keeps 8 bits where few are asked for all activations: no layer multiplies it."""
    name: str = settings.activations if settings.outputs == "same" else settings.outputs
    if settings.outputs != "same" or "activations" in settings.ruled or name in ("float", "dynamic"):
        return name
    spec = get_format(name)
    return ("uint8" if spec.qmin == 0 else "int8") if spec.integer and spec.bits < 8 else name


def _dependent(rows: list[Row]) -> list[Row]:
    """Give sites that share the row they share with, and biases what follows from what they derive from."""
    by_site = {row.site: row for row in rows}

    def final(row: Row) -> Row:
        if row.kind == "bias" and not row.because:
            return _bias(row, by_site)
        if row.shared_with is None:
            return row
        source = _source(row, by_site)
        because = f"{row.constraint}: {source.because}"
        return dataclasses.replace(
            row, scheme=source.scheme, observer=source.observer, rounding=source.rounding, because=because
        )

    return [final(row) for row in rows]


def _bias(row: Row, by_site: dict[str, Row]) -> Row:
    """An int32 at the scale of input times weight if both are static integers; otherwise float, and free."""
    names = row.constraint.removeprefix(DERIVED).split(" and ") if row.constraint.startswith(DERIVED) else []
    for name in names:
        if name not in by_site:
            raise PlanError(f"site '{row.site}' is derived from '{name}', which is not in the model")
        scheme = _source(by_site[name], by_site).scheme
        if scheme is None or scheme.dynamic or not scheme.spec.integer:
            found = "float" if scheme is None else "dynamic" if scheme.dynamic else scheme.format
            return dataclasses.replace(row, constraint="free", because=f"float: '{name}' is {found}")
    return dataclasses.replace(
        row, because=f"int32, {row.constraint}" if names else "float: derived from nothing"
    )


def _source(row: Row, by_site: dict[str, Row]) -> Row:
    """The row at the end of a chain of sharing; the row itself if it shares with none."""
    seen = [row.site]
    while (other := row.shared_with) is not None:
        if other not in by_site:
            raise PlanError(f"site '{row.site}' is shared with '{other}', which is not in the model")
        if other in seen:
            raise PlanError(f"site '{other}' is shared in a circle: {' -> '.join([*seen, other])}")
        seen.append(other)
        row = by_site[other]
    return row


def _check_rules(recipe: Recipe, sites: Sequence[Site]) -> None:
    """Refuse a rule that matches no layer, and one that says nothing about the layers it matches."""
    for number, rule in enumerate(recipe.rules, 1):
        where = f"recipe '{recipe.name}', rule {number}: {rule}"
        matched = [site for site in sites if rule.matches(site.layer, site.op)]
        if not matched:
            raise RecipeError(f"{where} matches no layer; {_nearest(rule, sites)}")
        if {"float", "dynamic"} & {rule.weights, rule.activations}:
            continue  # these also decide which sites there are, so what is left of them proves nothing
        relevant = [site for site in matched if _relevant(rule, site)]
        keys = ", ".join(rule.overrides())
        if not relevant:
            kinds = ", ".join(sorted({site.kind for site in matched}))
            raise RecipeError(f"{where} has no effect: {keys} does not apply to the {kinds} it matches")
        if any(site.integer_capable and site.shared_with is None for site in relevant):
            continue
        site = relevant[0]
        why = site.constraint if site.shared_with else site.reason or f"{site.op} has no integer form"
        raise RecipeError(f"{where} has no effect: '{site.site}' is not free to choose ({why})")


def _nearest(rule: Rule, sites: Sequence[Site]) -> str:
    layers = sorted({site.layer for site in sites if site.layer})
    by_name = [layer for layer in layers if fnmatchcase(layer, rule.match)]
    if rule.op is not None and by_name:
        ops = sorted({site.op for site in sites if site.layer in set(by_name)})
        return f"'{rule.match}' matches layers, but only of op {', '.join(ops)}"
    bare = rule.match.replace("*", "")
    close = difflib.get_close_matches(bare, layers, n=5, cutoff=0.3) or layers[:5]
    return f"nearest layer names: {', '.join(close)}"
