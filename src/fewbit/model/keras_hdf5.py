"""Looks into an HDF5 file as a program of its own: on damaged files the HDF5 library may crash, and then this does."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_OBJECTS = 1_000_000  # groups and data sets of one file
MAX_RATIO = 200  # of what is unpacked over what is stored, above SMALL
SMALL = 16 << 20
MEMORY = 4 << 30  # bytes, and four times the file's size


class Damaged(Exception):
    """What is wrong with the file."""


def look(path: Path, member: str) -> dict[str, Any]:
    """What a file (or, with ``member``, a part of an archive) holds: its ``config`` and ``version``, "" where it has
    none, and how many ``numbers`` its data sets are. Everything in it is read once. Raises Damaged, or what h5py does.
    """
    import h5py

    source: Any = path
    size = path.stat().st_size
    if member:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(member)
        source, size = io.BytesIO(content), len(content)
    with h5py.File(source, "r") as file:
        numbers = stored = 0
        for name, found in _objects(file):
            for attribute in found.attrs:
                found.attrs[attribute]
            if isinstance(found, h5py.Dataset):
                _check(name, found)
                found[()]
                numbers, stored = numbers + found.size, stored + found.id.get_storage_size()
        if stored > size:
            raise Damaged(
                f"says that it stores {stored} bytes of weights, but has {size}: expected as many or fewer"
            )
        texts = {key: _text(file.attrs.get(name, "")) for key, name in
                 (("config", "model_config"), ("version", "keras_version"))}  # fmt: skip
    return {"numbers": numbers, **texts}


def _objects(file: Any) -> Iterator[tuple[str, Any]]:
    """Every group and data set once. Nothing may lie outside the file."""
    import h5py

    todo, seen = ["/"], set()
    while todo:
        name = todo.pop()
        if name != "/" and not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise Damaged(f"has {name!r}, a link out of its place: expected weights only")
        found = file[name]
        address = h5py.h5o.get_info(found.id).addr
        if address in seen:
            continue
        seen.add(address)
        if len(seen) > MAX_OBJECTS:
            raise Damaged(f"holds more than {MAX_OBJECTS} groups: expected a model's weights")
        yield name, found
        if isinstance(found, h5py.Group):
            todo += [f"{name.rstrip('/')}/{child}" for child in found]


def _check(name: str, data: Any) -> None:
    if data.is_virtual or data.external or data.dtype.kind not in "fiubSO":
        raise Damaged(f"has {name!r}, {data.dtype} data or data of another file: expected numbers")
    stored = data.id.get_storage_size()
    if data.nbytes > max(SMALL, MAX_RATIO * stored) or (data.dtype.kind in "SO" and data.size > 1):
        raise Damaged(
            f"has {name!r}, which is {data.nbytes} bytes large, but {stored} are stored: expected at most {MAX_RATIO} "
            "times as many"
        )


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def main(path: str, member: str) -> None:
    """Print what ``look`` found, or what was wrong, as JSON."""
    try:
        import resource

        limit = MEMORY + 4 * Path(path).stat().st_size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except ImportError:  # Windows: no limits
        pass
    try:
        answer = look(Path(path), member)
    except Damaged as error:
        answer = {"wrong": str(error)}
    except Exception as error:
        lines = str(error).strip().splitlines()
        answer = {
            "wrong": f"is damaged ({lines[0] if lines else type(error).__name__}): expected an HDF5 file"
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:3])
