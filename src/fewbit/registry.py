"""A folder is the registry: every module file in a package is one plug-in, and the file's name is its key."""

import difflib
import importlib
import pkgutil
from types import ModuleType

from fewbit.errors import FewbitError, RecipeError


def nearest(name: str, known: list[str]) -> str:
    """The tail of an "unknown name" message: the closest known name, if there is one, and all known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}available: {', '.join(known)}"


class Registry:
    """The plug-ins of one package, found by listing its folder and imported when first asked for.

    The package's `__path__` is walked at each call: a folder appended to it adds its files as plug-ins.
    Modules whose name starts with an underscore are not plug-ins.

    Args:
        package: dotted name of the package, for example "fewbit.observers".
        kind: what one plug-in is called in messages, for example "observer".
        error: the exception class for an unknown name.
    """

    def __init__(self, package: str, kind: str, error: type[FewbitError] = RecipeError) -> None:
        self.package = package
        self.kind = kind
        self.error = error

    def names(self) -> list[str]:
        """Sorted names of all plug-ins; imports none of them."""
        path = importlib.import_module(self.package).__path__
        return sorted({found.name for found in pkgutil.iter_modules(path) if not found.name.startswith("_")})

    def module(self, name: str) -> ModuleType:
        """The plug-in's module. Raises the registry's error, with the nearest match, if there is none."""
        known = self.names()
        if name not in known:
            raise self.error(f"unknown {self.kind} {name!r}: {nearest(name, known)}")
        # A file added a moment ago may not be in the import system's directory cache yet.
        importlib.invalidate_caches()
        return importlib.import_module(f"{self.package}.{name}")
