"""Arrays from .npy and .npz files, which may be truncated or hostile; never a pickle."""

from pathlib import Path
from typing import Any

import numpy as np

from fewbit.errors import DataError


def load(path: Path, what: str) -> Any:
    """The array of a .npy (memory-mapped, read-only), or the arrays of a .npz by name.

    Keras-style `x_train`/`y_train` and `x_test`/`y_test` are also found as `x` and `y`: the test split if
    `what` says test. Raises DataError for a file that is missing, damaged, larger than free memory, or holds
    Python objects.
    """
    if path.suffix not in (".npy", ".npz"):
        raise DataError(
            f"{what} file {str(path)!r} is not .npy or .npz: save it with numpy.save or numpy.savez"
        )
    if not path.is_file():
        raise DataError(f"{what} file {str(path)!r} does not exist")
    try:
        if path.suffix == ".npz":
            return _load_npz(path, what)
        # Not np.load: it looks at the content, and would open a .npz that is called .npy.
        return np.lib.format.open_memmap(path, mode="r")
    except DataError:
        raise
    # numpy and zipfile raise a dozen unrelated classes on damaged files (BadZipFile, SyntaxError, ...).
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{what} file {str(path)!r} is damaged or holds no plain numbers ({detail}): save it again"
        ) from None


def _load_npz(path: Path, what: str) -> dict[str, Any]:
    import zipfile

    import psutil  # type: ignore[import-untyped]

    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    free = psutil.virtual_memory().available
    if size > free:
        raise DataError(
            f"{what} file {str(path)!r} unpacks to {size:,} bytes, but {free:,} are free: "
            "save the inputs as .npy"
        )
    with np.load(path, allow_pickle=False) as arrays:
        found = {key: arrays[key] for key in arrays.files}
    if not found:
        raise DataError(f"{what} file {str(path)!r} is empty")
    for short in ("x", "y"):
        split = f"{short}_test" if "test" in what else f"{short}_train"
        if short not in found and split in found:
            found[short] = found[split]
    return found
