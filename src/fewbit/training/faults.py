"""What can be wrong with a network that is to be trained, found before it costs hours: by layer, with what to do."""

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import DataError, TrainingError
from fewbit.training.layers import TrainableLayer, TrainableStep
from fewbit.training.model import TrainableModel


def check_batch_norms(model: nn.Module, batch: int) -> None:
    """DataError for batches of one where batch norms learn: they would normalise every sample by itself."""
    if batch > 1:
        return
    norms = (
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
    )
    name = next(norms, None)
    if name is not None:
        raise DataError(
            f"training data comes in batches of 1, and batch norm {_user_name(name)!r} takes its statistics from each "
            "batch: use batch_size of at least 2 (16 and more are usual)"
        )


def check_scales(model: nn.Module) -> None:
    """TrainingError for a scale that should learn and cannot."""
    for name, p in _scales(model):
        if not p.requires_grad:
            raise TrainingError(
                f"{_user_name(name)}: this scale is frozen, and its estimator learns it: call requires_grad_(), or use "
                "the estimator 'ste', which keeps scales as they are"
            )


def check_gradients(model: nn.Module) -> None:
    """After the first backward pass: TrainingError for a scale that no gradient reached."""
    for name, p in _scales(model):
        if p.grad is None:
            raise TrainingError(
                f"{_user_name(name)}: no gradient reaches this scale: its layer is not used, or a detach() or "
                "no_grad() cuts it off from the loss"
            )


def _scales(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    if not isinstance(model, TrainableModel):
        return []
    found = []
    for path, part in model.named_modules():
        if isinstance(part, TrainableLayer):
            found += [(f"{path}.{name}", p) for name, p in part.estimators.named_parameters()]
        elif isinstance(part, TrainableStep):
            found += [(f"{path}.{name}", p) for name, p in part.estimator.named_parameters()]
    return found


def first_fault(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """The first thing that is not finite when these inputs pass through, in a sentence."""
    for i, x in enumerate(inputs):
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            return f"input {i} of this batch holds numbers that are not finite"
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            return f"{_user_name(name)} is not finite: the step before went too far"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                found.append(name)

        return hook

    handles = [
        part.register_forward_hook(watch(name))
        for name, part in model.named_modules()
        if name and (isinstance(part, TrainableLayer | TrainableStep) or not list(part.children()))
    ]
    try:
        with torch.enable_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"layer {_user_name(found[0])!r} is the first whose output is not finite"
    return "the network's outputs are finite, so it is the loss itself"


def _user_name(path: str) -> str:
    """A layer's name without the parts that training puts around it."""
    for part in ("network.", "tapped.model."):
        path = path.removeprefix(part)
    return path.replace(".layer.", ".").replace(".estimator.", ".").removesuffix(".norm")
