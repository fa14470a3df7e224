"""Training data as shuffled batches: the order follows from seed and epoch alone, and each process gets its share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fewbit.data import Batch, Batches, as_batches
from fewbit.data.files import load
from fewbit.errors import DataError
from fewbit.training.processes import Processes

Augment = Callable[[tuple[Tensor, ...], torch.Generator], tuple[Tensor, ...]]
_EDGE = 8  # images are moved by up to a size's eighth
_COLOURS = 4  # channels that a tensor of images has at most


@dataclass
class Examples:
    """Batches of one epoch, in an order of its own. ``per_epoch`` is None where the source does not tell."""

    source: "_Source"
    batches: Batches
    per_epoch: int | None
    augment: Augment | None
    seed: int
    processes: Processes

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, varied if an augmentation was given."""
        self.source.number = number
        stream = torch.Generator().manual_seed(_mixed(self.seed, number, self.processes.rank, 1))
        for inputs, labels in self.batches:
            yield (inputs if self.augment is None else self.augment(inputs, stream)), labels


def examples(
    train: object,
    like: tuple[Tensor, ...] | None,
    *,
    batch_size: int,
    labels: bool | None,
    held_out: float,
    augment: Augment | str | None,
    workers: int,
    seed: int,
    processes: Processes,
) -> tuple[Examples, Batches | None]:
    """Training batches, and those held out of them: a share of arrays and data sets, drawn by the seed.

    Raises DataError for data that cannot be used, or cannot be divided.
    """
    if isinstance(train, str | Path):
        train = load(Path(train), "training")
    source = _source(train, batch_size, held_out, workers, seed, processes)
    common: dict[str, Any] = {"like": like, "batch_size": batch_size, "labels": labels}
    batches = as_batches(source, what="training", **common)
    aside = None
    if held_out:
        kept = source.held_out()
        aside = as_batches(kept, what="held-out", **common)
    return Examples(source, batches, source.length(), _augment(augment), seed, processes), aside


def moved_and_mirrored(inputs: tuple[Tensor, ...], stream: torch.Generator) -> tuple[Tensor, ...]:
    """Images [n, c, h, w] moved by up to an eighth of their size, edges filled with zeros, half of them mirrored."""
    return tuple(_moved(x, stream) if _is_image(x) else x for x in inputs)


def _augment(augment: Augment | str | None) -> Augment | None:
    if augment is None or callable(augment):
        return augment
    if augment != "images":
        raise DataError(
            f"augment is {augment!r:.40}: expected 'images', a function (inputs, generator) or None"
        )
    return moved_and_mirrored


def _is_image(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_floating_point() and x.shape[1] <= _COLOURS and min(x.shape[2:]) >= _EDGE


def _moved(x: Tensor, stream: torch.Generator) -> Tensor:
    n, channels, height, width = x.shape
    reach = min(height, width) // _EDGE
    wide = torch.nn.functional.pad(x, (reach, reach, reach, reach))
    up, left = torch.randint(2 * reach + 1, (2, n), generator=stream)
    mirrored = torch.rand(n, generator=stream) < 0.5
    rows = up[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    wide = wide.gather(2, rows[:, None, :, None].expand(n, channels, height, wide.shape[3]))
    return wide.gather(3, columns[:, None, None, :].expand(n, channels, height, width))


def _mixed(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---- sources ---------------------------------------------------------------------------------------------------------


class _Source:
    """Raw batches of one epoch after another; ``number`` says which epoch comes next."""

    def __init__(self, processes: Processes) -> None:
        self.number = 0
        self.processes = processes

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def length(self) -> int | None:
        """Batches of an epoch."""
        return None

    def held_out(self) -> Any:
        raise DataError(
            "held_out is a share, and only arrays and data sets can be divided: give arrays, a Dataset, or the "
            "held-out data themselves"
        )


def _source(
    train: Any, batch_size: int, held_out: float, workers: int, seed: int, processes: Processes
) -> _Source:
    if isinstance(train, Tensor | np.ndarray | Mapping | tuple):
        return _Columns(train, batch_size, held_out, seed, processes)
    if (
        isinstance(train, DataLoader)
        and processes.count > 1
        and not isinstance(train.dataset, IterableDataset)
    ):
        # Every process must see a part of its own: the loader's own sampler knows nothing of the others.
        batch_size, train = train.batch_size or batch_size, train.dataset
    if isinstance(train, Dataset) and not isinstance(train, IterableDataset):
        return _Samples(train, batch_size, held_out, workers, seed, processes)
    if isinstance(train, Iterator):
        raise DataError(
            "training data is a generator, which can be read once, and every epoch reads it anew: give a list, a "
            "DataLoader or arrays instead"
        )
    return _Ready(train, processes)


class _Indexed(_Source):
    """A source of samples by number: divided once, shuffled in every epoch."""

    def __init__(self, count: int, batch_size: int, held_out: float, seed: int, processes: Processes) -> None:
        super().__init__(processes)
        if not count:
            raise DataError("training data is empty")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_mixed(seed, 0, 0, 2)))
        aside = round(count * held_out)
        if held_out and not 0 < aside < count:
            raise DataError(f"held_out={held_out} of {count} samples is {aside}: leave some on both sides")
        self.aside, self.used = order[:aside], order[aside:].sort().values
        self.batch_size, self.seed = batch_size, seed
        if len(self.used) < processes.count * 2:
            raise DataError(f"{len(self.used)} training samples are too few for {processes.count} processes")

    def order(self) -> list[Tensor]:
        """The samples' numbers by batch, for this process: as many batches for each, none of one sample alone."""
        stream = torch.Generator().manual_seed(_mixed(self.seed, self.number, 0, 0))
        mixed = self.used[torch.randperm(len(self.used), generator=stream)]
        share = len(mixed) // self.processes.count
        mine = mixed[self.processes.rank :: self.processes.count][:share]
        batches = list(mine.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()
        return batches

    def length(self) -> int:
        return len(self.order())


class _Columns(_Indexed):
    """Arrays with one entry per sample."""

    def __init__(self, train: Any, batch_size: int, held_out: float, seed: int, processes: Processes) -> None:
        self.train = train
        arrays = list(train.values()) if isinstance(train, Mapping) else _flat(train)
        sizes = {len(array) for array in arrays if getattr(array, "ndim", 0)}
        if len(sizes) != 1:
            raise DataError(
                f"training data holds arrays of different lengths {sorted(sizes)}: inputs and labels need one entry "
                "per sample (a tuple holds arrays; give batches as a list)"
            )
        super().__init__(sizes.pop(), batch_size, held_out, seed, processes)

    def __iter__(self) -> Iterator[Any]:
        return (self._taken(index) for index in self.order())

    def held_out(self) -> Any:
        return [self._taken(index) for index in self.aside.split(self.batch_size)]

    def _taken(self, index: Tensor) -> Any:
        def take(array: Any) -> Any:
            if isinstance(array, tuple | list):
                return tuple(take(each) for each in array)
            return array[index] if isinstance(array, Tensor) else np.asarray(array)[index.numpy()]

        if isinstance(self.train, Mapping):
            return {key: take(array) for key, array in self.train.items()}
        return take(self.train)


class _Samples(_Indexed):
    """A ``Dataset`` with numbered samples."""

    def __init__(
        self, data: Any, batch_size: int, held_out: float, workers: int, seed: int, processes: Processes
    ) -> None:
        self.data, self.workers = data, workers
        super().__init__(len(data), batch_size, held_out, seed, processes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader(self.order()))

    def held_out(self) -> Any:
        return self._loader(list(self.aside.split(self.batch_size)))

    def _loader(self, order: Sequence[Tensor]) -> DataLoader[Any]:
        batches = [index.tolist() for index in order]
        return DataLoader(
            self.data, batch_sampler=batches, num_workers=self.workers, collate_fn=default_collate
        )


class _Ready(_Source):
    """Batches that somebody else makes: a ``DataLoader``, a list, any iterable that can be read again."""

    def __init__(self, train: Any, processes: Processes) -> None:
        super().__init__(processes)
        if not hasattr(train, "__iter__"):
            raise DataError(
                f"training data is a {type(train).__name__}, expected a tuple of arrays (x, y), an iterable of "
                "batches, a Dataset, a DataLoader or a path to .npz"
            )
        self.train = train

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.train), self.processes.rank, self._even(), self.processes.count)

    def length(self) -> int | None:
        try:
            return len(self.train) // self.processes.count
        except TypeError:
            return None

    def _even(self) -> int | None:
        """Where to stop so that all processes get as many batches."""
        length = self.length()
        return None if length is None else length * self.processes.count


def _flat(train: Any) -> list[Any]:
    if isinstance(train, tuple | list):
        return [array for each in train for array in _flat(each)]
    return [train]
