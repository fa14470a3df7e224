"""What learns after weights are rounded: block reconstruction, then fine-tuning, on the calibration data."""

from pathlib import Path

import torch
from torch import Tensor

from fewbit.calibrate import Facts
from fewbit.data import Batches
from fewbit.errors import CalibrationError, DataError
from fewbit.progress_file import Progress, ProgressFile
from fewbit.reconstruct import Task, owner, reconstruct, reconstructs
from fewbit.tuning import finetune

FEW, USUAL, MOST = 256, 1024, 4096  # samples


def learn_on(
    task: Task,
    batches: Batches | None,
    facts: Facts,
    epochs: int,
    progress: bool,
    resume: str | Path | None,
) -> list[str]:
    """Reconstruct where the plan asks for it, then fine-tune for some epochs, on at most 4,096 samples.

    With ``resume``, finished blocks and epochs are kept in the file ``<resume>.blocks``; the same call goes on from
    there with the same result, and removes it at the end.
    Returns what was done, in sentences. Raises ``CalibrationError`` without data, ``DataError`` where it is read once.
    """
    samples = _samples(task, batches, facts)
    file = None if resume is None else ProgressFile(f"{resume}.blocks", owner(task, samples))
    kept, notes = Progress(file), []
    if reconstructs(task.plan):
        notes += reconstruct(task, samples, progress, kept)
    if epochs:
        notes += finetune(task, samples, epochs, progress, kept)
    kept.done()
    return notes


def _samples(task: Task, batches: Batches | None, facts: Facts) -> tuple[Tensor, ...]:
    rounding = next((row.rounding for row in task.plan.weights() if row.rounding), None)
    what = f"rounding {rounding!r}" if reconstructs(task.plan) else "finetune"
    if batches is None:
        raise CalibrationError(
            f"{what} needs calibration data: call quantize(model, calibration=data), or use rounding='nearest'"
        )
    if batches.one_shot and facts.samples:
        raise DataError(
            f"{what} reads the calibration data again, and a generator can be read once: "
            "give a list, a DataLoader or arrays instead"
        )
    parts: list[tuple[Tensor, ...]] = []
    for inputs, _ in batches:
        parts.append(inputs)
        if sum(len(part[0]) for part in parts) >= MOST:
            break
    samples = tuple(torch.cat(tensors)[:MOST] for tensors in zip(*parts, strict=True))
    if len(samples[0]) < FEW:
        facts.warnings.append(
            f"{what} learns {len(samples[0])} samples by heart: give at least {FEW}; 1,024 are usual"
        )
    return samples
