"""What a Keras file holds, found out before Keras opens it: its configuration, and that its sizes are honest."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import ArtifactError, ModelError
from fewbit.extras import require
from fewbit.model import keras_hdf5
from fewbit.model.keras_hdf5 import MAX_RATIO, SMALL
from fewbit.model.torch_export import first_line

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
MAX_CONFIG = 64 << 20  # bytes of JSON


@dataclass(frozen=True)
class Contents:
    """A file's model configuration as parsed JSON, how many numbers its weights are, and who wrote it."""

    config: dict[str, Any]
    numbers: int
    version: str


def contents(path: Path) -> Contents:
    """What a ``.keras`` or ``.h5`` file holds; ArtifactError where it is damaged, or lies about its sizes."""
    if not path.is_file():
        raise ArtifactError(
            f"{path}: no such file: expected a .keras or .h5 file that keras.Model.save wrote"
        )
    with _damage(path):
        return _of_archive(path) if path.suffix == ".keras" else _of_hdf5(path)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever breaks while a file is looked at is the file's fault."""
    try:
        yield
    except (ArtifactError, ModelError):
        raise
    except RecursionError as error:
        raise ArtifactError(
            f"{path} nests its configuration too deep: expected what keras.Model.save writes"
        ) from error
    except Exception as error:
        raise ArtifactError(
            f"{path} is damaged ({first_line(error)[:300]}): expected what keras.Model.save "
            "writes; save the model again"
        ) from error


def _of_archive(path: Path) -> Contents:
    if not zipfile.is_zipfile(path):
        kind = (
            "an HDF5 file: rename it to .h5"
            if path.read_bytes()[:4] == b"\x89HDF"
            else "no zip archive: damaged"
        )
        raise ArtifactError(f"{path} is {kind}; expected an archive that keras.Model.save wrote")
    with zipfile.ZipFile(path) as archive:
        _check_members(path, archive)
        config = _parsed(path, archive.read(CONFIG))
        names = archive.namelist()
        metadata = json.loads(archive.read("metadata.json")) if "metadata.json" in names else {}
    return Contents(
        config, int(_looked_at(path, WEIGHTS)["numbers"]), str(metadata.get("keras_version", ""))[:20]
    )


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """The parts that Keras writes, each once, none larger than its place in the file allows."""
    names = archive.namelist()
    if len(set(names)) != len(names) or not {CONFIG, WEIGHTS} <= set(names):
        raise ArtifactError(f"{path} holds {sorted(names)[:5]}: expected {CONFIG} and {WEIGHTS}, each once")
    for part in archive.infolist():
        if Path(part.filename).is_absolute() or ".." in Path(part.filename).parts or "\\" in part.filename:
            raise ArtifactError(
                f"{path} holds {part.filename!r}, a path out of the archive: expected plain names"
            )
        if (
            part.file_size > max(SMALL, MAX_RATIO * part.compress_size)
            or part.compress_size > path.stat().st_size
        ):
            raise ArtifactError(
                f"{path} would unpack {part.filename!r} from {part.compress_size} to {part.file_size} bytes: "
                f"expected at most {MAX_RATIO} times as many"
            )
    if archive.getinfo(CONFIG).file_size > MAX_CONFIG:
        raise ArtifactError(
            f"{path}: {CONFIG} is larger than {MAX_CONFIG} bytes: expected a model's configuration"
        )


def _of_hdf5(path: Path) -> Contents:
    found = _looked_at(path)
    if not found["config"]:
        raise ModelError(
            f"{path} holds weights without a model: expected a file of keras.Model.save; build the model in Keras, "
            "load_weights, and save it whole"
        )
    return Contents(_parsed(path, found["config"]), int(found["numbers"]), str(found["version"])[:20])


def _looked_at(path: Path, member: str = "") -> dict[str, Any]:
    """What an HDF5 file holds, found out in a process of its own: the HDF5 library may crash on damaged files."""
    require("h5py", "keras", "reading Keras files")
    seconds = 60 + path.stat().st_size / 10e6
    command = [sys.executable, "-P", keras_hdf5.__file__, str(path), member]
    try:
        run = subprocess.run(command, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(
            f"{path} takes more than {seconds:.0f} s to open: expected less; it is damaged"
        ) from error
    if run.returncode != 0:
        raise ArtifactError(
            f"{path} is damaged (the HDF5 library fails on it): expected what keras.Model.save writes"
        )
    answer: dict[str, Any] = json.loads(run.stdout)
    if "wrong" in answer:
        raise ArtifactError(f"{path} {answer['wrong']}")
    return answer


def _parsed(path: Path, text: str | bytes) -> dict[str, Any]:
    if len(text) > MAX_CONFIG:
        raise ArtifactError(
            f"{path}: the configuration is larger than {MAX_CONFIG} bytes: expected a model's"
        )
    config = json.loads(text)
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise ArtifactError(
            f"{path}: the configuration is no model's: expected an object with 'class_name' and 'config'"
        )
    return config
