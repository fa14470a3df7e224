"""Saved models, written whole or not at all, read without running code: a folder with ``model.json`` and
``model.safetensors``, or one ``.fewbit`` file with entropy-coded weights."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.errors import ArtifactError, FewbitError, ModelError
from fewbit.evaluation.size import DENSE
from fewbit.model import single_file
from fewbit.model.lowering import lower
from fewbit.model.packed import from_plain_parts, plain_parts
from fewbit.model.readers import read_path
from fewbit.model.serialize import describe, rebuild
from fewbit.model.simulate import QuantizedModel
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.targets import registry as targets
from fewbit.training.model import TrainableModel

VERSION = 2
_READABLE = (1, 2)  # in version 1, codes were never entropy-coded
MODEL, WEIGHTS = "model.json", "model.safetensors"
_MARK = "fewbit_model"
_LARGEST_DESCRIPTION = 256 * 2**20


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a quantized or trainable model, or a graph that ``fewbit.load`` gave, to ``path``; returns the path.

    A name that ends in ``.fewbit`` is one file, the smallest form: weights as entropy-coded codes, or as gaps and
    values where most of them are equal; of example inputs it keeps shapes and ranges. Any other name is a folder, with
    codes packed or entropy-coded. Either appears whole or not at all; one that fewbit wrote before is replaced,
    anything else is left alone.

    Raises ``ModelError`` for a model that cannot be saved and ``ArtifactError`` where the path cannot be written.
    """
    path = Path(path).absolute()
    check_replaceable(path)
    if isinstance(model, TrainableModel):
        model = model.convert()
    if not isinstance(model, QuantizedModel | GraphModule):
        raise ModelError(
            f"model is a {type(model).__name__}; only what fewbit.quantize or fewbit.load gave can be saved"
        )
    if path.suffix == single_file.SUFFIX:
        data, tensors, _ = describe(model, plain_parts)
        _write_file(path, single_file.to_bytes(data, tensors))
        return path
    return _save_folder(model, path)


def check_replaceable(path: str | Path) -> None:
    """Raise ``ArtifactError`` where ``save`` would not write to this path: before long work."""
    path = Path(path).absolute()
    (_check_file_replaceable if path.suffix == single_file.SUFFIX else _check_folder_replaceable)(path)


def _save_folder(model: QuantizedModel | GraphModule, folder: Path) -> Path:
    from safetensors.torch import save as to_bytes

    data, tensors, dense = describe(model)
    weights = to_bytes(tensors, {DENSE: json.dumps(dense)})
    text = _json(data)
    header = {_MARK: VERSION, "weights": _digest(weights), "model_digest": _digest(text), "model": data}
    temporary = ""
    try:
        temporary = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
        Path(temporary).chmod(0o755)
        for name, content in ((MODEL, _json(header)), (WEIGHTS, weights)):
            with (Path(temporary) / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _swap(Path(temporary), folder)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load(path: str | Path, example: Any = None) -> QuantizedModel | GraphModule:
    """A model from a file, or what ``save`` wrote: a quantized model that answers with the same bits, or a graph.

    ``.keras``, ``.h5`` and ``.onnx`` files become graphs like those of any other source; ``example``, an input or a
    tuple of them, is for files that leave the sizes of their inputs open. Raises ``ArtifactError`` for a file that is
    damaged, unknown or asks for more than numbers, ``ModelError`` for layers that cannot be read, all of them by name.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder")
    if path.is_dir():
        return _checked(_load_folder, path, path / MODEL)
    if path.suffix == single_file.SUFFIX:
        return _checked(_load_file, path, path)
    return read_path(path, example)


def _checked(
    read: Callable[[Path], QuantizedModel | GraphModule], path: Path, description: Path
) -> QuantizedModel | GraphModule:
    """What ``read`` gives, if it is sound; all that it raises becomes an ``ArtifactError`` that names the file."""
    try:
        model = read(path)
        _check_parts(model)
        return model
    except ArtifactError as error:
        message = str(error)
        raise ArtifactError(
            message if message.startswith(str(path)) else f"{description}: {message}"
        ) from error
    except Exception as error:  # a hostile file can make any constructor raise anything
        what = str(error).splitlines()[0][:200] if str(error) else ""
        raise ArtifactError(f"{description}: damaged or hostile ({type(error).__name__}: {what})") from error


def _check_parts(model: QuantizedModel | GraphModule) -> None:
    """ArtifactError unless target, graph, codes and plan of a quantized model belong together."""
    if isinstance(model, QuantizedModel):
        if model.target not in targets.names():
            raise ArtifactError(f"unknown target {model.target!r:.40}")
        try:
            lower(model)
        except FewbitError as error:
            raise ArtifactError(f"its parts do not fit together: {error}") from error


def _load_file(path: Path) -> QuantizedModel | GraphModule:
    data, tensors = single_file.from_bytes(_read(path, None))
    met: set[int] = set()

    def unpack(name: str, parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, ...]) -> QTensor:
        if id(parts["codes"]) in met:  # each time would take memory that the file has no bytes for
            raise ArtifactError(f"{name}: its codes are those of another weight, with other parts")
        met.add(id(parts["codes"]))
        return from_plain_parts(name, parts, scheme, shape)

    return rebuild(data, tensors, unpack)


def _load_folder(path: Path) -> QuantizedModel | GraphModule:
    from safetensors.torch import load as from_bytes

    try:
        header = json.loads(_read(path / MODEL, _LARGEST_DESCRIPTION))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path / MODEL}: not valid JSON ({str(error)[:100]}); save the model again"
        ) from error
    if not isinstance(header, dict) or _MARK not in header:
        raise ArtifactError(f"{path / MODEL}: not a description that fewbit.save wrote")
    if header[_MARK] not in _READABLE:
        raise ArtifactError(
            f"{path / MODEL}: version {header[_MARK]!r:.40} found, at most {VERSION} expected; save the model again"
        )
    data = header["model"]
    if _digest(_json(data)) != header["model_digest"]:
        raise ArtifactError(
            f"{path / MODEL}: its content does not have the checksum it states: damaged; save it again"
        )
    weights = _read(path / WEIGHTS, None)
    if _digest(weights) != header["weights"]:
        raise ArtifactError(
            f"{path / WEIGHTS}: damaged, or not the weights of this {MODEL}; save the model again"
        )
    try:
        tensors = from_bytes(weights)
    except Exception as error:  # safetensors has an error type of its own
        raise ArtifactError(f"{path / WEIGHTS}: not valid safetensors ({str(error)[:100]})") from error
    return rebuild(data, tensors)


def _read(path: Path, limit: int | None) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise ArtifactError(f"{path}: not an ordinary file")
        if limit is not None and status.st_size > limit:
            raise ArtifactError(f"{path}: larger than {limit >> 20} MiB, which no description of a model is")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error


def _json(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_folder_replaceable(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise ArtifactError(f"{folder}: the folder {folder.parent} does not exist; create it first")
    if not folder.exists() and not folder.is_symlink():
        return
    names = {p.name for p in folder.iterdir()} if folder.is_dir() and not folder.is_symlink() else {"?"}
    if names and not (names == {MODEL, WEIGHTS} and _is_ours(folder)):
        raise ArtifactError(
            f"{folder}: exists and is not a folder that fewbit.save wrote, so it is left alone; choose another name"
        )


def _check_file_replaceable(path: Path) -> None:
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not path.exists() and not path.is_symlink():
        return
    ours = False
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            ours = single_file.is_ours(file.read(single_file.LONGEST_HEADER))
    if not ours:
        raise ArtifactError(
            f"{path}: exists and is not a file that fewbit.save wrote, so it is left alone; choose another name"
        )


def _write_file(path: Path, content: bytes) -> None:
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    with contextlib.suppress(ArtifactError, ValueError, RecursionError):
        return _MARK in json.loads(_read(folder / MODEL, _LARGEST_DESCRIPTION))
    return False


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; after an error the old one is there again."""
    if not folder.exists():
        Path(new).rename(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    folder.rename(old / "model")
    try:
        Path(new).rename(folder)
    except BaseException:
        (old / "model").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
