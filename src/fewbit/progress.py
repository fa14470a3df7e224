"""A progress bar with the time left, on a terminal, for work that takes a while."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

_SHOW_AFTER = 2.0  # seconds of work before a progress bar is worth its lines


def shown(items: Iterable[Any], total: int | None, what: str, progress: bool) -> Iterator[Any]:
    """The items, with a progress bar and the time left on a terminal's stderr once they take a while."""
    if not (progress and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    started, bar, task = time.perf_counter(), None, None
    try:
        for done, item in enumerate(items, 1):
            yield item
            if bar is None and time.perf_counter() - started > _SHOW_AFTER:
                bar = Progress(console=Console(stderr=True), transient=True)
                bar.start()
                task = bar.add_task(what, total=total)
            if bar is not None and task is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()
