"""What a Keras file holds, found out before Keras opens it: its configuration, and that its sizes are honest."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import ArtifactError, ModelError
from fewbit.extras import require
from fewbit.model.torch_export import first_line

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
MAX_CONFIG = 64 << 20  # bytes of JSON
MAX_RATIO = 200  # of what is unpacked over what is stored, above SMALL
SMALL = 16 << 20
MAX_OBJECTS = 1_000_000  # groups and data sets of one HDF5 file


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
            f"{path} is damaged ({first_line(error)}): expected what keras.Model.save writes; save the model again"
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
        h5py = require("h5py", "keras", "reading Keras files")
        with h5py.File(io.BytesIO(archive.read(WEIGHTS)), "r") as file:
            numbers = _numbers(path, file, archive.getinfo(WEIGHTS).file_size)
    return Contents(config, numbers, str(metadata.get("keras_version", ""))[:20])


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
    h5py = require("h5py", "keras", "reading Keras files")
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            raise ModelError(
                f"{path} holds weights without a model: expected a file of keras.Model.save; build the model in Keras, "
                "load_weights, and save it whole"
            )
        config = _parsed(path, file.attrs["model_config"])
        version = file.attrs.get("keras_version", "")
        numbers = _numbers(path, file, path.stat().st_size)
    return Contents(config, numbers, version.decode() if isinstance(version, bytes) else str(version)[:20])


def _parsed(path: Path, text: Any) -> dict[str, Any]:
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


def _numbers(path: Path, file: Any, size: int) -> int:
    """How many numbers an HDF5 file holds. Nothing may lie outside the file, or be larger than what is stored of it."""
    h5py = require("h5py", "keras", "reading Keras files")
    todo, seen, numbers, stored = ["/"], set(), 0, 0
    while todo:
        name = todo.pop()
        link = file.get(name, getlink=True) if name != "/" else h5py.HardLink()
        if not isinstance(link, h5py.HardLink):
            raise ArtifactError(f"{path}: {name!r} is a link out of its place: expected weights only")
        found = file[name]
        address = h5py.h5o.get_info(found.id).addr
        if address in seen:
            continue
        seen.add(address)
        if len(seen) > MAX_OBJECTS:
            raise ArtifactError(f"{path} holds more than {MAX_OBJECTS} groups: expected a model's weights")
        if isinstance(found, h5py.Group):
            todo += [f"{name.rstrip('/')}/{child}" for child in found]
        elif isinstance(found, h5py.Dataset):
            _check_data(path, name, found)
            numbers, stored = numbers + found.size, stored + found.id.get_storage_size()
    if stored > size:
        raise ArtifactError(
            f"{path} says that it stores {stored} bytes of weights, but has {size}: truncated or damaged"
        )
    return numbers


def _check_data(path: Path, name: str, data: Any) -> None:
    if data.dtype.kind not in "fiubSO" or data.is_virtual or data.external:
        raise ArtifactError(
            f"{path}: {name!r} holds {data.dtype} data or data of another file: expected numbers"
        )
    if data.nbytes > max(SMALL, MAX_RATIO * data.id.get_storage_size()) or (
        data.dtype.kind in "SO" and data.size > 1
    ):
        raise ArtifactError(
            f"{path}: {name!r} is {data.nbytes} bytes large, but {data.id.get_storage_size()} are stored: "
            f"expected at most {MAX_RATIO} times as many"
        )
