"""Re-iterable batches from tensors, arrays, files, data sets, loaders and iterables."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fewbit.data.files import load
from fewbit.data.intake import Batch, InputSpec, Intake
from fewbit.errors import DataError


class Batches:
    """Batches `(inputs, target)` of a data source; every pass checks them anew.

    `length` (batches) and `samples` are None where the source does not tell. A source that can be read only
    once (a generator) has `one_shot` True, and a second pass over it raises DataError.
    """

    def __init__(
        self,
        what: str,
        start: Callable[[], Iterator[Batch]],
        *,
        one_shot: bool = False,
        length: int | None = None,
        samples: int | None = None,
    ) -> None:
        self.what = what
        self.one_shot = one_shot
        self.length = length
        self.samples = samples
        self._start = start
        self._spent = False
        self._ahead: tuple[Batch, Iterator[Batch]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._ahead is not None:
            first, rest = self._ahead
            self._ahead = None
            return chain([first], rest)
        if self.one_shot and self._spent:
            raise DataError(
                f"{self.what} data is a generator that has already been read, and a second pass is needed: "
                "give a list, a DataLoader or arrays instead"
            )
        self._spent = True
        return self._start()

    def peek(self) -> Batch:
        """The first batch; a one-shot source still yields it again in its one pass."""
        iterator = iter(self)
        first = next(iterator)
        if self.one_shot:
            self._ahead = (first, iterator)
        return first


def as_batches(
    source: object,
    *,
    what: str,
    batch_size: int = 64,
    labels: bool | None = None,
    like: Sequence[Tensor | InputSpec] | None = None,
    n_inputs: int | None = None,
    names: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Batches:
    """Turn `source` into batches `(inputs: tuple of Tensor, target: Tensor | None)`.

    source: a tensor or array (samples along dimension 0); a tuple of arrays, inputs first and labels last; a
        mapping of named arrays; a path to .npy or .npz; a torch Dataset or DataLoader; any iterable of
        batches, each a tensor, (inputs..., label), ((inputs...), label) or a mapping. A *list* is such an
        iterable.
    what: names the data in errors ("calibration", "test").
    labels: True = every batch must have a target, False = targets are dropped, None = given when there.
    like: one example tensor or InputSpec for each input. Sizes beyond dimension 0 must agree with it;
        floating data are converted to its floating dtype, integers to its integer dtype; integers for a
        floating input are an error, since how to scale them is the model's business.
    n_inputs: how many leading elements of a tuple are inputs; by default as many as `like` has, otherwise 1.
    names: the inputs' names, by which a mapping or .npz is read; by default those of the InputSpecs.
    dtype: what floating data (inputs without `like`, and labels) become.

    Raises DataError for data that are missing, empty, of another shape or dtype, or not finite: at once where
    the whole source is at hand, otherwise when the batch is read.
    """
    if batch_size < 1:
        raise DataError(f"batch_size for the {what} data is {batch_size}, expected at least 1")
    if like is not None and not like:
        raise DataError(
            f"the example for the {what} data is empty: give one tensor for each input of the model"
        )
    specs = tuple(_spec(i, each) for i, each in enumerate(like or ()))
    named = tuple(each.name for each in like or () if isinstance(each, InputSpec))
    intake = Intake(
        what=what,
        labels=labels,
        specs=specs,
        n_inputs=n_inputs if n_inputs is not None else (len(specs) or None),
        names=tuple(names) or named,
        dtype=dtype,
    )
    if isinstance(source, (str, Path)):
        source = load(Path(source), what)
    if isinstance(source, (Tensor, np.ndarray, Mapping, tuple)):
        return _from_columns(source, intake, batch_size)
    return _from_iterable(source, intake, batch_size)


def _from_columns(source: Any, intake: Intake, batch_size: int) -> Batches:
    inputs, target = intake.split(source, f"{intake.what} data")
    columns = [intake.array(each, intake.role(i)) for i, each in enumerate(inputs)]
    goal = None if target is None else intake.array(target, "the label array")
    every = columns if goal is None else [*columns, goal]
    sizes = [len(each) if each.ndim else 0 for each in every]
    if sizes[0] == 0:
        raise DataError(f"{intake.what} data is empty: {intake.role(0)} has shape {tuple(columns[0].shape)}")
    if len(set(sizes)) > 1:
        raise DataError(
            f"{intake.what} data holds arrays of different lengths {sizes}: inputs and labels need one entry "
            "per sample (a tuple holds arrays; give batches as a list)"
        )

    def start() -> Iterator[Batch]:
        for index, begin in enumerate(range(0, sizes[0], batch_size)):
            part = slice(begin, begin + batch_size)
            yield intake.batch(tuple(c[part] for c in columns), None if goal is None else goal[part], index)

    return Batches(intake.what, start, length=math.ceil(sizes[0] / batch_size), samples=sizes[0])


def _from_iterable(source: Any, intake: Intake, batch_size: int) -> Batches:
    samples = one_shot = None
    if isinstance(source, Batches):
        samples, one_shot, length = source.samples, source.one_shot, source.length
    if isinstance(source, Dataset):
        samples = None if isinstance(source, IterableDataset) else _length(source)
        # An own generator: otherwise DataLoader draws from torch's global one and changes the user's run.
        source = DataLoader(source, batch_size, collate_fn=_collate(intake.what), generator=torch.Generator())
    if not hasattr(source, "__iter__"):
        raise DataError(
            f"{intake.what} data is a {type(source).__name__}, expected a tensor, an array, a tuple (x, y), "
            "an iterable of batches, a Dataset, a DataLoader or a path to .npy or .npz"
        )
    if one_shot is None:
        one_shot = isinstance(source, Iterator)
        length = None if one_shot else _length(source)
    if length == 0 and not isinstance(source, Batches):
        raise DataError(f"{intake.what} data is empty: the {type(source).__name__} holds nothing")
    return Batches(
        intake.what, lambda: _read(source, intake), one_shot=one_shot, length=length, samples=samples
    )


def _read(source: Any, intake: Intake) -> Iterator[Batch]:
    first: list[tuple[int, bool]] | None = None
    for index, item in enumerate(source):
        inputs, target = intake.split(item, f"{intake.what} data: batch {index}")
        batch = intake.batch(inputs, target, index)
        kinds = [(x.ndim, x.dtype.is_floating_point) for x in batch[0]]
        first = first or kinds
        if kinds != first:
            found = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in batch[0])
            raise DataError(
                f"{intake.what} data: batch {index} is {found}, unlike the first batch: "
                "a list or iterable holds batches; give arrays of inputs and labels as a tuple (x, y)"
            )
        yield batch
    if first is None:
        raise DataError(f"{intake.what} data is empty: the {type(source).__name__} yielded no batch")


def _spec(i: int, example: Tensor | InputSpec) -> InputSpec:
    if isinstance(example, InputSpec):
        return example
    return InputSpec(str(i), tuple(example.shape), example.dtype)


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def _collate(what: str) -> Callable[[list[Any]], Any]:
    def collate(samples: list[Any]) -> Any:
        try:
            return default_collate(samples)
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"{what} data: the Dataset's samples do not stack into a batch "
                f"({str(error).splitlines()[0]}): return tensors of one shape"
            ) from None

    return collate
