"""Epochs over data: optimizer, schedule, mixed precision, several processes; a state and a record after each."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.data import Batches
from fewbit.errors import DataError, TrainingError
from fewbit.model.zeros import hold_zeros, sparse_names
from fewbit.progress import shown
from fewbit.training.examples import Examples
from fewbit.training.faults import check_batch_norms, check_gradients, check_scales, first_fault
from fewbit.training.groups import parameter_groups
from fewbit.training.model import TrainableModel
from fewbit.training.objective import Objective, label_loss, logits
from fewbit.training.processes import Processes, full_state, set_full_state
from fewbit.training.records import Board, write_records
from fewbit.training.state import load_state, save_state

STATE = "last.safetensors"
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RATES = {"adamw": 1e-3, "sgd": 0.01}
_MOMENTUM = 0.9
_BEST = "best|"
_WARM_UP = 100  # steps over which the rate rises, at most a tenth of all

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Settings:
    """How to train; see ``fewbit.finetune`` for the meaning of each."""

    epochs: int = 10
    optimizer: str | MakeOptimizer | torch.optim.Optimizer = "adamw"
    lr: float | None = None
    weight_decay: float = 0.0
    schedule: str = "cosine"
    accumulate: int = 1
    clip: float | None = None
    precision: str = "float32"
    compile: bool = False
    patience: int | None = None
    folder: Path | None = None
    resume: bool = False
    seed: int = 0
    progress: bool = True

    def check(self) -> None:
        """TrainingError for values that cannot be."""
        for name, known in (("schedule", SCHEDULES), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in known:
                raise TrainingError(
                    f"{name} is {getattr(self, name)!r:.40}, expected one of: {', '.join(known)}"
                )
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise TrainingError(
                f"optimizer is {self.optimizer!r:.40}, expected one of {', '.join(OPTIMIZERS)}, a function that "
                "makes one of parameter groups, or an optimizer"
            )
        for name in ("epochs", "accumulate"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.lr is not None and not self.lr > 0:
            raise TrainingError(f"lr is {self.lr}, expected a positive number")
        if self.resume and self.folder is None:
            raise TrainingError("resume=True needs folder=..., where the interrupted training kept its state")


@dataclass
class _State:
    """How far training has come."""

    epoch: int = 0
    step: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    best: float = math.inf
    since: int = 0


class Trainer:
    """One training of ``objective.model``, in place, on ``examples``; ``held_out`` is watched, if there is any."""

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        held_out: Batches | None,
        settings: Settings,
        processes: Processes,
        device: torch.device,
    ) -> None:
        settings.check()
        self.objective, self.examples, self.held_out = objective, examples, held_out
        self.settings, self.processes, self.device = settings, processes, device
        self.model = objective.model
        self.student: nn.Module = objective.student
        self.optimizer: torch.optim.Optimizer
        self.rates: list[float]
        self.scaler: torch.amp.GradScaler
        # Channels last is what 16-bit kernels of convolutions work on; FSDP cannot shard such memory.
        self.images = any(p.dim() == 4 for p in self.model.parameters()) and processes.strategy != "fsdp"
        self.state = _State()
        if processes.strategy == "fsdp" and sparse_names(self.model):
            raise TrainingError("the model has sparse weights, whose zeros parallel='ddp' can hold: use that")
        if settings.patience is not None and held_out is None:
            raise TrainingError("patience=... stops by held-out data: give held_out=0.1, or held-out data")

    def run(self) -> list[dict[str, Any]]:
        """Train for all epochs; the records of each. Raises TrainingError where the loss is not finite."""
        settings = self.settings
        first = next(iter(self.examples.epoch(0)))[0]
        check_batch_norms(self.model, len(first[0]))
        check_scales(self.model)
        self.objective.prepare(self._moved(first))
        if self.images:
            self.objective.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(settings.seed + self.processes.rank)
        self.processes.agree(list(self.objective.student.state_dict().values()))
        whole = copy.deepcopy(self.model) if self.processes.strategy == "fsdp" else self.model
        self.student = self.processes.wrapped(self.objective.student, self.device)
        self.optimizer, self.rates = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        path = None if settings.folder is None else settings.folder / STATE
        best: dict[str, Tensor] | None = None
        if settings.resume and path is not None and path.exists():
            best = self._resume(path)
        if settings.compile:
            self.student.compile()
        board = Board(settings.folder if self.processes.first else None)
        with hold_zeros(self.model) if sparse_names(self.model) else nullcontext():
            best = self._epochs(board, path, best)
        board.close()
        self._finish(whole, best)
        return self.state.records

    def _epochs(
        self, board: Board, path: Path | None, best: dict[str, Tensor] | None
    ) -> dict[str, Tensor] | None:
        """What is left of all epochs; gives the best state so far, where held-out data decide."""
        settings = self.settings
        for epoch in range(self.state.epoch, settings.epochs):
            record = self._epoch(epoch)
            if self.held_out is not None:
                record |= self._watched(self.held_out)
            self.state.epoch = epoch + 1
            self.state.records.append(record)
            if path is not None or settings.patience is not None:
                model, optimizer = full_state(self.objective.student, self.optimizer)
                best = self._better(record, model, best)
                if path is not None:
                    self._save(path, model, optimizer, best)
            if self.processes.first:
                board.add(record)
            if settings.patience is not None and self.state.since > settings.patience:
                break
        return best

    def _finish(self, whole: nn.Module, best: dict[str, Tensor] | None) -> None:
        """The model as it ends: the best by held-out data if these decide, in one piece."""
        if best is not None or whole is not self.model:
            last = best if best is not None else full_state(self.objective.student, self.optimizer)[0]
            state, prefix = self.processes.everyone(last), "tapped.model."
            own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
            whole.load_state_dict(own)
        self.processes.agree(list(whole.state_dict().values()))  # each has batch norms' statistics of its own
        self.model = whole
        if self.images:
            self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.model.eval()

    # ---- one epoch ---------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> dict[str, Any]:
        started = time.perf_counter()
        self.model.train()
        steps = self.examples.per_epoch
        sums, right, seen, batches = 0.0, 0, 0, 0
        what = f"epoch {epoch + 1} of {self.settings.epochs}"
        show = self.settings.progress and self.processes.first
        waiting = 0
        for index, (inputs, labels) in enumerate(shown(self.examples.epoch(epoch), steps, what, show)):
            inputs = self._moved(inputs)
            labels = None if labels is None else labels.to(self.device)
            done = (epoch + (index / steps if steps else 0.0)) / self.settings.epochs
            share = self._share(done)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * share
            if isinstance(self.model, TrainableModel):
                self.model.set_progress(done)
            with self._autocast():
                loss, found = self.objective(self.student, inputs, labels, index)
            if not bool(torch.isfinite(loss)):
                raise TrainingError(self._not_finite(epoch, index, inputs))
            self.scaler.scale(loss / self.settings.accumulate).backward()
            waiting += 1
            if waiting == self.settings.accumulate:
                self._step()
                waiting = 0
            sums, batches = sums + float(loss.detach()), batches + 1
            if labels is not None and not labels.is_floating_point() and labels.shape == found.shape[:-1]:
                right += int((found.argmax(-1) == labels).sum())
                seen += labels.numel()
        if waiting:
            self._step()
        if not batches:
            raise DataError(f"training data gave no batch in epoch {epoch + 1}: it can be read once only")
        mean, correct, total = self.processes.mean([sums / batches, float(right), float(seen)])
        record = {"epoch": epoch + 1, "loss": mean, "lr": self.optimizer.param_groups[0]["lr"]}
        if total:
            record["accuracy"] = correct / total
        return record | {"seconds": round(time.perf_counter() - started, 2)}

    def _step(self) -> None:
        if self.settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if self.state.step == 0:
            check_gradients(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1

    def _share(self, done: float) -> float:
        """Of the full rate, after this share of training."""
        steps = (self.examples.per_epoch or 100) * self.settings.epochs // self.settings.accumulate
        warm = min(_WARM_UP, steps // 10) / max(steps, 1)
        if self.settings.schedule == "constant":
            return 1.0
        rising = min(1.0, (done + 1 / max(steps, 1)) / warm) if warm else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * done)) if self.settings.schedule == "cosine" else 1 - done
        return rising * falling

    def _autocast(self) -> Any:
        dtype = PRECISIONS[self.settings.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _moved(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moved = (x.to(self.device, non_blocking=True) for x in inputs)
        if not self.images:
            return tuple(moved)
        return tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in moved)

    def _optimizer(self) -> tuple[torch.optim.Optimizer, list[float]]:
        asked = self.settings.optimizer
        if isinstance(asked, torch.optim.Optimizer):
            self._check_own(asked)
            return asked, [float(group["lr"]) for group in asked.param_groups]
        name = asked if isinstance(asked, str) else "adamw"
        rate = self.settings.lr or _RATES[name]
        groups = parameter_groups(
            self.objective.student, rate, self.settings.weight_decay, adaptive=name != "sgd"
        )
        if not groups:
            raise TrainingError(
                "nothing learns: no parameter of the model requires gradients; call requires_grad_()"
            )
        if callable(asked):
            made = asked(groups)
        elif asked == "sgd":
            made = torch.optim.SGD(groups, rate, momentum=_MOMENTUM, nesterov=True)
        else:
            made = torch.optim.AdamW(groups, rate, fused=True)
        return made, [float(group["lr"]) for group in made.param_groups]

    def _check_own(self, optimizer: torch.optim.Optimizer) -> None:
        own = {id(p) for p in self.model.parameters()}
        given = [p for group in optimizer.param_groups for p in group["params"]]
        strange = sum(id(p) not in own for p in given)
        if strange:
            raise TrainingError(
                f"{strange} of the optimizer's {len(given)} parameters are not the model's: it was built before the "
                "model was quantized, or for another one; build it from the quantized model's parameters(), or name it "
                "(optimizer='sgd')"
            )

    # ---- held-out data -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _watched(self, held_out: Batches) -> dict[str, Any]:
        """Loss and accuracy on data that training does not see, as the converted model answers."""
        self.model.eval()
        loss, right, seen, samples = 0.0, 0, 0, 0
        for index, (inputs, labels) in enumerate(held_out):
            if labels is None:
                raise DataError("held-out data have no labels: they cannot say when to stop; give (x, y)")
            answer, _ = self.objective.student([], *self._moved(inputs))
            found = logits(answer, "the model").float()
            labels = labels.to(self.device)
            own = self.objective.label_loss
            loss += float(own(found, labels) if own is not None else label_loss(found, labels, index)) * len(
                labels
            )
            samples += len(labels)
            if not labels.is_floating_point():
                right += int((found.argmax(-1) == labels).sum())
                seen += labels.numel()
        self.model.train()
        # One number for all processes, whose batch norms differ, so that all stop at the same time.
        mean, share = self.processes.mean([loss / max(samples, 1), right / max(seen, 1)])
        return {"held_out_loss": mean} | ({"held_out_accuracy": share} if seen else {})

    def _better(
        self, record: dict[str, Any], model: dict[str, Tensor], best: dict[str, Tensor] | None
    ) -> dict[str, Tensor] | None:
        """The state to end with, where a patience says to stop by held-out data; else None: the last one."""
        if self.settings.patience is None:
            return None
        found = record["held_out_loss"]
        if found < self.state.best:
            self.state.best, self.state.since = found, 0
            return {name: value.clone() for name, value in model.items()}
        self.state.since += 1
        return best

    # ---- interruptions -----------------------------------------------------------------------------------------------

    def _owner(self) -> str:
        """What a saved state belongs to."""
        names = {name: tuple(p.shape) for name, p in self.objective.student.named_parameters()}
        settings = {k: v for k, v in vars(self.settings).items() if k not in ("folder", "resume", "progress")}
        text = json.dumps(
            [list(names.items()), settings, self.processes.count], default=_name, sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _save(
        self, path: Path, model: dict[str, Tensor], optimizer: dict[str, Any], best: dict[str, Tensor] | None
    ) -> None:
        if self.processes.first:
            kept = model | {f"{_BEST}{name}": value for name, value in (best or {}).items()}
            rest = vars(self.state) | {
                "best": min(self.state.best, 1e308),
                "scaler": self.scaler.state_dict(),
            }
            save_state(path, self._owner(), kept, optimizer, rest)
            write_records(path.parent, self.state.records)
        self.processes.wait()

    def _resume(self, path: Path) -> dict[str, Tensor] | None:
        kept, state, rest = load_state(path, self._owner())
        best = {name[len(_BEST) :]: value for name, value in kept.items() if name.startswith(_BEST)}
        model = {name: value for name, value in kept.items() if not name.startswith(_BEST)}
        set_full_state(self.objective.student, self.optimizer, model, state)
        self.scaler.load_state_dict(rest.pop("scaler"))
        self.state = _State(**rest)
        return best or None

    def _not_finite(self, epoch: int, index: int, inputs: tuple[Tensor, ...]) -> str:
        where = first_fault(self.model, inputs)
        kept = "nothing was kept: give folder=... to keep a state after each epoch"
        if self.settings.folder is not None and self.state.epoch:
            kept = f"the state after epoch {self.state.epoch} is in {self.settings.folder / STATE}"
        return (
            f"epoch {epoch + 1}, batch {index}: the loss is not finite; {where}; {kept}. Use a smaller lr, clip=1.0, "
            "precision='float32', or look for extreme inputs"
        )


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
