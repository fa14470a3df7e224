"""Optional dependencies: imported when they are first needed, with an error that says which extra to install."""

from importlib import import_module
from types import ModuleType

from fewbit.errors import MissingExtraError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """The imported module, say ``require("openvino", "openvino", "running OpenVINO files")``.

    Raises ``MissingExtraError`` with the command that installs the extra where the package is not there.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise  # the package is there, but one that it needs itself is not
        raise MissingExtraError(
            f"{purpose} needs the package {module.split('.')[0]}, which is not installed: "
            f"pip install 'fewbit[{extra}]'"
        ) from error
