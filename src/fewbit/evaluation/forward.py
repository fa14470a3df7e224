"""Runs any model for measuring: modules in eval mode without gradients, runtimes as plain functions."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbit.errors import ModelError

Model = nn.Module | Callable[..., Any]


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Put a module into eval mode, and every part of it back into its own mode afterwards.

    Each part is remembered on its own: users train with some batch norms frozen, and a plain `train()`
    would thaw them.
    """
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module) and any(training for _, training in modes):
            model.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


class Forward:
    """One model as a function from a batch's inputs to one output tensor on the CPU.

    `output` chooses among several outputs: an index, or a name where the model gives a mapping. Without it
    a single output is taken, or the one called "logits". Raises ModelError where the model fails, gives no
    tensor or gives NaN.
    """

    def __init__(self, model: Model, name: str, output: int | str | None = None) -> None:
        if not callable(model):
            raise ModelError(f"{name} is a {type(model).__name__}, expected a module or a function")
        self.model = model
        self.name = name
        self.output = output
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        floating = [each for each in tensors if each.is_floating_point()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = floating[0].dtype if floating else torch.float32

    def __call__(self, inputs: tuple[Tensor, ...], batch: int) -> Tensor:
        shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in inputs)
        # Copies: a model may work in place, and the next model is to see the same batch.
        copies = [x.to(self.device, copy=True) for x in inputs]
        try:
            with torch.inference_mode():
                answer = self.model(*copies)
        except Exception as error:
            raise ModelError(f"{self.name} failed on batch {batch} with {shapes}: {error}") from error
        result = self._choose(answer)
        if result.is_floating_point() and result.isnan().any():
            at = tuple(int(i) for i in result.isnan().nonzero()[0])
            raise ModelError(f"{self.name} gives nan at index {at} of its output for batch {batch}")
        return result

    def _choose(self, answer: Any) -> Tensor:
        chosen = answer
        if isinstance(answer, Mapping):
            key = self.output if self.output is not None else "logits"
            chosen = answer.get(key, next(iter(answer.values())) if len(answer) == 1 else None)
            found = f"a mapping with the keys {', '.join(map(str, answer))}"
        elif isinstance(answer, (tuple, list)):
            single = 0 if len(answer) == 1 else None
            index = self.output if isinstance(self.output, int) else single
            chosen = answer[index] if index is not None and -len(answer) <= index < len(answer) else None
            found = f"{len(answer)} outputs"
        else:
            found = f"a {type(answer).__name__}"
        if isinstance(chosen, np.ndarray):
            chosen = torch.from_numpy(np.ascontiguousarray(chosen))
        if not isinstance(chosen, Tensor):
            raise ModelError(f"{self.name} gives {found}, expected one tensor: choose one with output=...")
        return chosen.detach().cpu()


def input_count(model: Model) -> int | None:
    """How many tensors the model must be called with, or None where its signature does not say."""
    example = getattr(model, "example", None)
    if isinstance(example, tuple):
        return len(example)
    target = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters) or None
