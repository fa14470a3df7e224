"""What each epoch measured, where people look for it: JSON lines, CSV, and TensorBoard if it is installed."""

import csv
import io
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewbit.errors import ArtifactError

JSONL, CSV = "metrics.jsonl", "metrics.csv"


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    """All epochs so far, as ``metrics.jsonl`` and ``metrics.csv``, and for TensorBoard; whole files, or as before."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for record in records for key in record)))
    writer.writeheader()
    writer.writerows(records)
    for name, text in ((JSONL, lines), (CSV, table.getvalue())):
        temporary = folder / f".{name}.{os.getpid()}.part"
        try:
            temporary.write_text(text, newline="")
            temporary.replace(folder / name)
        except OSError as error:
            raise ArtifactError(f"{folder / name}: cannot be written ({error.strerror or error})") from error
        finally:
            temporary.unlink(missing_ok=True)


class Board:
    """TensorBoard's event file in a folder, where the package is there; nothing where it is not."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, record: dict[str, Any]) -> None:
        """One epoch's numbers."""
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "epoch":
                    self._writer.add_scalar(key, value, record["epoch"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
