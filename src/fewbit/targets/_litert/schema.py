"""The flatbuffer schema of ``.tflite`` files, as the package ``ai-edge-litert`` carries it."""

from functools import cache
from types import ModuleType

from fewbit.extras import require


@cache
def schema() -> ModuleType:
    """The generated classes (``ModelT``, ``OperatorT``, ...). Raises ``MissingExtraError`` where they are missing."""
    return require("ai_edge_litert.schema_py_generated", "litert", "writing and reading .tflite files")


@cache
def names(enumeration: str) -> dict[int, str]:
    """Names of a schema's enumeration by number, say ``names("BuiltinOperator")[3] == "CONV_2D"``."""
    return {
        value: name
        for name, value in vars(getattr(schema(), enumeration)).items()
        if isinstance(value, int) and not name.startswith("_")
    }
