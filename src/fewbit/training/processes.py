"""More than one process on one training, by ``torchrun``: PyTorch's own DDP or FSDP2, and who writes files."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fewbit.errors import TrainingError

STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """This process among its peers: ``rank`` of ``count``; ``strategy`` says how they share the model."""

    rank: int = 0
    count: int = 1
    strategy: str = "ddp"

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def wrapped(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module as all processes train it together; itself where there is one only."""
        if self.count == 1:
            return module
        if self.strategy == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            sharded: nn.Module = fully_shard(module, mesh=init_device_mesh(device.type, (self.count,)))  # type: ignore[assignment]
            return sharded
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def mean(self, values: list[float]) -> list[float]:
        """Means over all processes."""
        if self.count == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(v) for v in sums / self.count]

    def agree(self, tensors: list[Tensor]) -> None:
        """Every process takes the first one's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def everyone(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, in all of them; others may come with none."""
        if self.count == 1:
            return state
        found: list[Any] = [
            {name: (tuple(t.shape), t.dtype) for name, t in state.items()} if self.first else None
        ]
        dist.broadcast_object_list(found, 0)
        tensors = {n: state[n] if self.first else torch.empty(s, dtype=d) for n, (s, d) in found[0].items()}
        self.agree(list(tensors.values()))
        return tensors

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def processes(strategy: str = "ddp") -> Processes:
    """Who this process is: started by ``torchrun`` it joins its peers, else it is alone.

    Raises TrainingError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise TrainingError(f"parallel is {strategy!r:.40}, expected one of: {', '.join(STRATEGIES)}")
    if not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return Processes()
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_world_size() < 2:
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size(), strategy)


def full_state(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state of a module and its optimizer, however shared, on the CPU, by parameters' names.

    Every process must ask for it; it is for the first one alone.
    """
    model, state = get_state_dict(module, optimizer, options=_options())
    return dict(model), dict(state)  # type: ignore[arg-type]


def set_full_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, model: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """The inverse of `full_state`, in every process."""
    set_state_dict(
        module, optimizer, model_state_dict=dict(model), optim_state_dict=state, options=_options()
    )
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # Fused optimizers go through memory in its order, so that it must be the parameter's.
                values[key] = torch.empty_like(parameter).copy_(value)


def _options() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)
