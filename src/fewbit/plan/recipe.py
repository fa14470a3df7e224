"""The recipe: what the user wants, as defaults and rules over layer names; in Python or as a TOML file."""

import dataclasses
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fewbit.errors import FormatError, RecipeError
from fewbit.numerics.format import get_format
from fewbit.registry import nearest

GRANULARITIES = ("tensor", "channel", "group")
_BOOLS = {"weight_symmetric", "activation_symmetric", "equalize", "absorb_bias", "portable"}
_INTS = {"group_size", "iterations", "finetune"}
BIAS_CORRECTIONS = ("empirical", "analytic")
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Rule:
    """Overrides for the layers whose name matches the glob ``match`` and, if given, whose operator is ``op``.

    A field left at None keeps what the recipe, or an earlier rule, says.
    """

    match: str = "*"
    op: str | None = None
    weights: str | None = None
    activations: str | None = None
    outputs: str | None = None
    granularity: str | None = None
    group_size: int | None = None
    weight_symmetric: bool | None = None
    activation_symmetric: bool | None = None
    weight_observer: str | None = None
    observer: str | None = None
    rounding: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            where = f"rule for {self.match!r:.80}"
            _check_type(where, field.name, getattr(self, field.name), optional=field.name != "match")
        _check_granularity(where, self.granularity or ("group" if self.group_size else None), self.group_size)
        if not self.overrides():
            raise RecipeError(f'{where}: it changes nothing: give it a key such as weights = "int4"')

    def matches(self, layer: str, op: str) -> bool:
        """Whether the rule speaks of the layer of that name, which has that operator."""
        return fnmatchcase(layer, self.match) and self.op in (None, op)

    def overrides(self) -> dict[str, Any]:
        """The fields that the rule sets, without ``match`` and ``op``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: value for key, value in values.items() if key not in ("match", "op") and value is not None
        }

    def __str__(self) -> str:
        what = "".join(f" {_text(key, value)}" for key, value in self.overrides().items())
        return f"'{self.match}'" + (f" op={self.op}" if self.op else "") + what


@dataclass(frozen=True)
class Recipe:
    """Defaults for every layer, and rules in order, of which the later wins.

    ``weights``: a format's name or ``"float"``. ``activations``: a format's name, ``"float"`` or
    ``"dynamic"`` (int8 with the range of each batch, taken at run time: needs no calibration).
    ``outputs``, what the model returns: ``"same"`` as the activations but in 8 bits at least, ``"float"``, or a format.
    ``granularity`` and ``group_size`` are the weights'; activations are always per tensor.
    ``portable`` keeps 8-bit weights where no CPU saturates (x86 without VNNI adds two products in 16 bits).
    ``weight_observer`` and ``observer`` (the activations') name range estimators.
    ``iterations`` are the steps that block reconstruction (``rounding="brecq"`` or ``"qdrop"``) learns each block for.
    ``finetune`` is for how many epochs the whole network then learns the float one's outputs on the calibration data.
    ``ends`` is the format of the first and last layer with weights and of what they read and return, and ``addends``
    that of activations as sums, pooling and the like read them: layers that multiply them get their own, of fewer bits.
    ``"same"`` makes no difference.
    ``smooth_quant`` may be its alpha, from 0 to 1, and true is 0.5. ``bias_correction`` is ``"empirical"`` (true:
    means measured on the calibration data) or ``"analytic"`` (means that the folded batch norms tell).

    Raises RecipeError for a value of the wrong type, an unknown granularity, or a missing group size.
    """

    name: str = "int8"
    description: str = ""
    weights: str = "int8"
    activations: str = "int8"
    outputs: str = "same"
    granularity: str = "channel"
    group_size: int | None = None
    weight_symmetric: bool = True
    activation_symmetric: bool = False
    weight_observer: str = "minmax"
    observer: str = "minmax"
    rounding: str = "nearest"
    iterations: int = 500
    finetune: int = 0
    ends: str = "same"
    addends: str = "same"
    equalize: bool = False
    absorb_bias: bool = False
    smooth_quant: bool | float = False
    bias_correction: bool | str = False
    portable: bool = True
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        where = f"recipe '{self.name}'"
        for field in fields(self):
            if field.name != "rules":
                _check_type(where, field.name, getattr(self, field.name), optional=field.name == "group_size")
        _check_granularity(where, self.granularity, self.group_size)
        for key, least in (("iterations", 1), ("finetune", 0)):
            if getattr(self, key) < least:
                raise RecipeError(f"{where}: {key} is {getattr(self, key)}, expected at least {least}")
        if self.granularity == "group" and self.group_size is None:
            raise RecipeError(
                f"{where}: granularity is 'group' but group_size is missing: set for example 32"
            )
        if not isinstance(self.rules, list | tuple):
            raise RecipeError(f"{where}: rules is {self.rules!r:.60}, expected a list of rules")
        object.__setattr__(self, "rules", tuple(_as_rule(where, n, r) for n, r in enumerate(self.rules, 1)))

    @classmethod
    def from_kwargs(cls, **values: Any) -> "Recipe":
        """The default recipe with ``values`` in place of its own; RecipeError for an unknown key."""
        return cls().replace(**values)

    def replace(self, **values: Any) -> "Recipe":
        """This recipe with ``values`` in place of its own; its name tells what was replaced."""
        _check_keys(f"recipe '{self.name}'", values, Recipe)
        shown = {key: value for key, value in values.items() if key not in ("name", "description")}
        changed = [_text(key, value) for key, value in shown.items()]
        name = f"{self.name} with {', '.join(changed)}" if changed else self.name
        return dataclasses.replace(self, **{"name": name, **values})

    @classmethod
    def load(cls, source: str | Path) -> "Recipe":
        """A preset by name (``"int8"``), or a TOML file by path (a Path, a ``.toml`` or a ``/``)."""
        values, path = read_toml(source, preset_names())
        if "steps" in values:
            raise RecipeError(f"{path}: a recipe of several steps: give it to fewbit.compress")
        try:
            _check_keys("the recipe", values, Recipe)
            return cls(**{"name": path.stem, **values})
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    def mode(self, layer: str, op: str) -> str:
        """How a layer computes, by rules: ``"static"``, ``"dynamic"``, ``"weight-only"`` or ``"float"``."""
        weights, activations = self.weights, self.activations
        for rule in self.rules:
            if rule.matches(layer, op):
                weights, activations = rule.weights or weights, rule.activations or activations
        if weights == "float":
            return "float"
        return {"float": "weight-only", "dynamic": "dynamic"}.get(activations, "static")

    def decoded(self, layer: str, op: str) -> str | None:
        """The layer's weight format, by rules, if no integer kernel can multiply it, however it is stored; else None.

        Such a layer computes in float, on decoded weights, whatever its activations. Formats that are numbers
        themselves (integers, float16) are not meant: to ask for those with integer activations may be a mistake.
        """
        weights, grouped = self.weights, self.granularity == "group"
        for rule in self.rules:
            if rule.matches(layer, op):
                weights = rule.weights or weights
                grouped = grouped if rule.granularity is None else rule.granularity == "group"
                grouped = grouped or rule.group_size is not None
        if weights == "float":
            return None
        spec = get_format(weights)
        if spec.integer or spec.code_dtype.is_floating_point:
            return None
        return weights if spec.unit is None or spec.block or (grouped and spec.scaled) else None

    def validate(self, observers: Collection[str], roundings: Collection[str]) -> None:
        """RecipeError where a format does not exist, or an observer or rounding is not among those given."""
        for where, key, value in self._names():
            words = {
                "weights": ("float",),
                "activations": ("float", "dynamic"),
                "outputs": ("float", "same"),
                "ends": ("same",),
                "addends": ("same",),
            }
            if key in words:
                if value in words[key]:
                    continue
                try:
                    get_format(value)
                except FormatError as error:
                    also = " or ".join(f"'{word}'" for word in words[key])
                    raise RecipeError(f"{where}: {key}: {error}; also allowed: {also}") from error
            else:
                known = roundings if key == "rounding" else observers
                if value not in known:
                    kind = "rounding" if key == "rounding" else "observer"
                    raise RecipeError(
                        f"{where}: {key}: unknown {kind} '{value}': {nearest(value, sorted(known))}"
                    )

    def _names(self) -> Iterator[tuple[str, str, str]]:
        keys = ("weights", "activations", "outputs", "weight_observer", "observer", "rounding")
        own = (*keys, "ends", "addends")
        yield from ((f"recipe '{self.name}'", key, getattr(self, key)) for key in own)
        for number, rule in enumerate(self.rules, 1):
            where = f"recipe '{self.name}', rule {number}"
            yield from ((where, key, value) for key, value in rule.overrides().items() if key in keys)


def preset_names() -> list[str]:
    """Names of the recipes that ship with fewbit."""
    return sorted(path.stem for path in presets() if "[[steps]]" not in path.read_text("utf-8"))


def presets() -> list[Path]:
    """The files of all recipes that ship with fewbit."""
    return sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def read_toml(source: str | Path, known: list[str]) -> tuple[dict[str, Any], Path]:
    """What a preset, one of ``known``, or a file holds (a Path, a ``.toml`` or a ``/``), and where that lies."""
    path = Path(source)
    if isinstance(source, str) and not path.suffix and path.name == source:
        found = [preset for preset in presets() if preset.stem == source]
        if not found:
            raise RecipeError(f"unknown recipe '{source}': {nearest(source, known)}")
        path = found[0]
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: the recipe could not be read ({error.strerror or error})") from error
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, which no recipe is")
    try:
        return tomllib.loads(raw.decode("utf-8")), path
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid TOML ({error})") from error


def _as_rule(where: str, number: int, rule: object) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping):
        raise RecipeError(
            f'{where}: rule {number} is {rule!r:.60}, expected a table such as {{match = "layer1.*"}}'
        )
    _check_keys(f"{where}, rule {number}", rule, Rule)
    try:
        return Rule(**rule)
    except RecipeError as error:
        raise RecipeError(f"{where}, rule {number}: {error}") from error


def _check_keys(where: str, values: Mapping[str, Any], cls: type[Recipe] | type[Rule]) -> None:
    known = sorted(field.name for field in fields(cls))
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}': {nearest(str(key), known)}")


def _check_type(where: str, key: str, value: object, optional: bool) -> None:
    if value is None and optional:
        return
    if key == "bias_correction" and value in BIAS_CORRECTIONS:
        return
    if key == "smooth_quant" and isinstance(value, int | float) and 0 <= value <= 1:
        return
    also = {
        "bias_correction": f" or one of {', '.join(BIAS_CORRECTIONS)}",
        "smooth_quant": " or alpha, from 0 to 1",
    }
    expected: type = bool if key in _BOOLS | also.keys() else int if key in _INTS else str
    if type(value) is not expected:
        words = {bool: "true or false", int: "a whole number", str: "a string"}
        raise RecipeError(f"{where}: {key} is {value!r:.60}, expected {words[expected]}{also.get(key, '')}")


def _check_granularity(where: str, granularity: str | None, group_size: int | None) -> None:
    if granularity is not None and granularity not in GRANULARITIES:
        near = nearest(granularity, list(GRANULARITIES))
        raise RecipeError(f"{where}: unknown granularity '{granularity}': {near}")
    if group_size is not None and group_size < 1:
        raise RecipeError(f"{where}: group_size is {group_size}, expected at least 1")
    if group_size is not None and granularity != "group":
        raise RecipeError(
            f"{where}: group_size is {group_size} but granularity is not 'group': set both or neither"
        )


def _text(key: str, value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} {key}" if len(value) != 1 else "1 rule"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
