"""What a long job has finished, in one safetensors file, so that the same job goes on after an interruption."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewbit.errors import ArtifactError, CalibrationError

_KEY = "fewbit.progress"
Parts = dict[str, dict[str, Tensor]]


class ProgressFile:
    """Named parts of a job, each a dict of tensors; ``owner`` (tensors and JSON values) says whose job it is."""

    def __init__(self, path: str | Path, owner: list[object]) -> None:
        self.path = Path(path)
        self.owner = _fingerprint(owner)

    def save(self, parts: Parts) -> None:
        """Write all parts: beside the file first, then in its place. Raises ``ArtifactError``."""
        tensors = {f"{name}|{key}": value for name, part in parts.items() for key, value in part.items()}
        header = json.dumps({"owner": self.owner, "parts": list(parts)})
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, str(temporary), metadata={_KEY: header})
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.path}: the state cannot be written ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> Parts:
        """The parts that were saved, none without a file.

        Raises ``ArtifactError`` for a damaged file and ``CalibrationError`` for one of another job.
        """
        if not self.path.exists():
            return {}
        try:
            with safe_open(str(self.path), framework="pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            owner = header["owner"]
            parts: Parts = {str(name): {} for name in header["parts"]}
            for name, tensor in tensors.items():
                part, _, key = name.partition("|")
                parts[part][key] = tensor
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self.path}: damaged state ({error}); delete it to start anew") from error
        if owner != self.owner:
            raise CalibrationError(
                f"{self.path}: the state of another model, recipe or data; delete it, or give another file"
            )
        return parts

    def remove(self) -> None:
        """The job is done."""
        self.path.unlink(missing_ok=True)


class Progress:
    """The finished parts of a running job, kept in a file if there is one. Raises as ``ProgressFile`` does."""

    def __init__(self, file: ProgressFile | None = None) -> None:
        self.file = file
        self.parts: Parts = {} if file is None else file.load()

    def keep(self, name: str, part: dict[str, Tensor]) -> None:
        """A part is finished, or has come further."""
        if self.file is not None:
            self.parts[name] = part
            self.file.save(self.parts)

    def done(self) -> None:
        """All parts are."""
        if self.file is not None:
            self.file.remove()


def _fingerprint(owner: list[object]) -> str:
    digest = hashlib.sha256()
    for item in owner:
        if isinstance(item, Tensor):
            array = item.detach().cpu().contiguous().reshape(-1).numpy()
            digest.update(f"{tuple(item.shape)} {array.dtype}".encode())
            digest.update(array.tobytes())
        else:
            digest.update(json.dumps(item, sort_keys=True).encode())
    return digest.hexdigest()
