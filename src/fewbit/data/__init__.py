"""Data intake: what users have goes in (arrays, files, loaders, iterables), checked batches come out."""

from fewbit.data.batches import Batches, as_batches
from fewbit.data.intake import Batch, InputSpec

__all__ = ["Batch", "Batches", "InputSpec", "as_batches"]
