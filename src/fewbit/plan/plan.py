"""The plan: one row per tensor that says which scheme it gets, and why; printable, diffable, a file."""

import difflib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from fewbit.errors import FewbitError, PlanError
from fewbit.numerics.scheme import Scheme, block_count

Kind = Literal["weight", "activation", "bias", "output", "gradient"]
KINDS: tuple[str, ...] = get_args(Kind)

VERSION = 1
SHARED = "shared with "
DERIVED = "derived from "
_MAX_BYTES = 64 * 2**20  # a plan has some 200 bytes a tensor: more than this is no plan


@dataclass(frozen=True)
class Site:
    """A tensor of the model that could be quantized, before anybody has decided how.

    ``site`` is unique in the model; ``layer`` is the user's dotted layer name (several sites share one);
    ``op`` the canonical operator name. ``constraint`` is ``"free"``, ``"shared with <site>"``,
    ``"fixed ..."`` (the range follows from the operator and is not observed) or
    ``"derived from <input site> and <weight site>"`` (biases: int32 at the product of their scales).
    ``integer_capable`` is False where the operator has no integer form, and ``reason`` then says why.
    ``axis`` is the output-channel axis of a weight.
    """

    site: str
    layer: str
    op: str
    kind: Kind
    shape: tuple[int, ...]
    constraint: str = "free"
    integer_capable: bool = True
    reason: str = ""
    axis: int = 0

    @property
    def shared_with(self) -> str | None:
        """The site whose scheme this one must copy, if any."""
        return self.constraint.removeprefix(SHARED) if self.constraint.startswith(SHARED) else None


@dataclass(frozen=True)
class Row:
    """What one tensor gets: ``scheme`` None is float, or int32 where ``constraint`` says ``derived from``.

    ``because`` names the default or the rule that decided. ``observer`` is None where no range is observed:
    float, dynamic and fixed ranges; ``rounding`` is None but for weights. A row that shares repeats both.
    """

    site: str
    layer: str
    op: str
    kind: Kind
    shape: tuple[int, ...]
    scheme: Scheme | None
    observer: str | None = None
    rounding: str | None = None
    constraint: str = "free"
    because: str = ""

    @property
    def shared_with(self) -> str | None:
        """The site whose scheme, scale and zero point this row uses, if any."""
        return self.constraint.removeprefix(SHARED) if self.constraint.startswith(SHARED) else None

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types only."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return data | {"shape": list(self.shape), "scheme": self.scheme and self.scheme.to_json()}

    @classmethod
    def from_json(cls, data: object) -> "Row":
        """The inverse of :meth:`to_json`; PlanError where ``data`` is not a row."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"a plan row has the keys {sorted(names)}; found {found}")
        where = f"plan row {data['site']!r:.80}"
        for key in ("site", "layer", "op", "kind", "constraint", "because"):
            _expect(isinstance(data[key], str), where, key, data[key], "a string")
        for key in ("observer", "rounding"):
            _expect(
                data[key] is None or isinstance(data[key], str), where, key, data[key], "a string or null"
            )
        _expect(data["kind"] in KINDS, where, "kind", data["kind"], f"one of {', '.join(KINDS)}")
        shape = data["shape"]
        sizes_ok = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        _expect(sizes_ok, where, "shape", shape, "a list of sizes")
        scheme = data["scheme"]
        _expect(scheme is None or isinstance(scheme, Mapping), where, "scheme", scheme, "an object or null")
        try:
            parsed = None if scheme is None else Scheme.from_json(scheme)
            if parsed is not None:
                block_count(tuple(shape), parsed)
        except FewbitError as error:
            raise PlanError(f"{where}: its scheme is not valid: {error}") from error
        return cls(**{**data, "shape": tuple(shape), "scheme": parsed})


@dataclass(frozen=True)
class Plan:
    """One :class:`Row` per tensor, in the model's order, and the name of the recipe they came from.

    Raises PlanError where two rows claim one site, or a row shares with a site that is not there or whose
    scheme is another.
    """

    rows: tuple[Row, ...]
    recipe: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        seen: set[str] = set()
        for row in self.rows:
            if row.site in seen:
                raise PlanError(f"the plan has two rows for site '{row.site}': keep one")
            seen.add(row.site)
        for row in self.rows:
            other = row.shared_with
            if other is None:
                continue
            if other not in self._by_site:
                raise PlanError(f"site '{row.site}' is shared with '{other}', which is not in the plan")
            if self._by_site[other].scheme != row.scheme:
                raise PlanError(
                    f"site '{row.site}' is shared with '{other}' but has another scheme: give both the same"
                )

    @cached_property
    def _by_site(self) -> dict[str, Row]:
        return {row.site: row for row in self.rows}

    def row(self, site: str) -> Row:
        """The row of ``site``; PlanError with the nearest match where there is none."""
        try:
            return self._by_site[site]
        except KeyError:
            close = difflib.get_close_matches(site, list(self._by_site), n=3, cutoff=0.3)
            near = f"; nearest: {', '.join(close)}" if close else ""
            raise PlanError(f"the plan has no site '{site}'{near}") from None

    def weights(self) -> tuple[Row, ...]:
        """Rows of kind ``weight``."""
        return tuple(row for row in self.rows if row.kind == "weight")

    def activations(self) -> tuple[Row, ...]:
        """Rows of kind ``activation`` or ``output``: what flows between layers and leaves the model."""
        return tuple(row for row in self.rows if row.kind in ("activation", "output"))

    @property
    def needs_calibration(self) -> bool:
        """Whether any activation's range has to be observed on data."""
        return any(row.observer and row.scheme and not row.scheme.dynamic for row in self.activations())

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types only, with a version number."""
        return {"fewbit_plan": VERSION, "recipe": self.recipe, "rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: object) -> "Plan":
        """The inverse of :meth:`to_json`; PlanError where ``data`` is not a plan of this version."""
        if not isinstance(data, Mapping) or "fewbit_plan" not in data:
            raise PlanError(
                "not a plan: a JSON object with the keys fewbit_plan, recipe and rows was expected"
            )
        if type(data["fewbit_plan"]) is not int or data["fewbit_plan"] != VERSION:
            raise PlanError(
                f"the plan has version {data['fewbit_plan']!r:.40}, this fewbit reads version {VERSION}: "
                "make the plan again with this fewbit"
            )
        if set(data) != {"fewbit_plan", "recipe", "rows"}:
            raise PlanError(
                f"a plan has the keys fewbit_plan, recipe and rows; found {sorted(map(str, data))}"
            )
        _expect(isinstance(data["recipe"], str), "plan", "recipe", data["recipe"], "a string")
        _expect(isinstance(data["rows"], list), "plan", "rows", data["rows"], "a list of rows")
        return cls(tuple(Row.from_json(row) for row in data["rows"]), data["recipe"])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: all of it or, after an error, what ``path`` held before."""
        path = Path(path)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise PlanError(
                    f"{path}: the plan could not be written ({error.strerror or error})"
                ) from error
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what :meth:`save` wrote; PlanError where the file is missing, damaged or too new or old."""
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise PlanError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, which no plan is")
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: the plan could not be read ({error.strerror or error})") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not a plan: the file is not valid JSON ({error})") from error
        try:
            return cls.from_json(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def __str__(self) -> str:
        """A table in plain text: one line per tensor."""
        header = ("site", "op", "kind", "format", "granularity", "observer", "rounding", "because")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def diff(self, other: "Plan") -> str:
        """What changes from this plan to ``other``: ``-`` gone, ``+`` new, ``~`` changed; empty if equal.

        A row whose reason alone is another is not listed.
        """
        names = [field.name for field in fields(Row)]
        lines = []
        for row in self.rows:
            if row.site not in other._by_site:
                lines.append(f"- {row.site}: {_describe(row)}")
                continue
            new = other._by_site[row.site]
            changed = [name for name in names if getattr(row, name) != getattr(new, name)]
            if changed == ["because"]:
                continue
            what = "; ".join(f"{name} {_value(row, name)} -> {_value(new, name)}" for name in changed)
            if what:
                lines.append(f"~ {row.site}: {what}")
        lines += [f"+ {row.site}: {_describe(row)}" for row in other.rows if row.site not in self._by_site]
        return "\n".join(lines)


def _expect(holds: bool, where: str, key: str, found: object, expected: str) -> None:
    if not holds:
        raise PlanError(f"{where}: {key} is {found!r:.80}, expected {expected}")


def _granularity(scheme: Scheme) -> str:
    where = f"group {scheme.group_size}" if scheme.granularity == "group" else scheme.granularity
    return where + ("" if scheme.symmetric else ", affine") + (", dynamic" if scheme.dynamic else "")


def _cells(row: Row) -> tuple[str, ...]:
    scheme = row.scheme
    return (
        row.site,
        row.op,
        row.kind,
        scheme.format if scheme else "int32" if row.constraint.startswith(DERIVED) else "float",
        _granularity(scheme) if scheme else "-",
        row.observer or "-",
        row.rounding or "-",
        row.because,
    )


def _describe(row: Row) -> str:
    return f"{row.scheme.format} {_granularity(row.scheme)}" if row.scheme else "float"


def _value(row: Row, name: str) -> str:
    if name == "scheme":
        return _describe(row) + (" narrow" if row.scheme and row.scheme.narrow else "")
    return str(cast(object, getattr(row, name)))
