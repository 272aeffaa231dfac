"""Process group of a training: one process for each GPU, started by `torchrun`, or a single process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from melrt.errors import TrainingError
from melrt_export.training.config import MachineConfig

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The processes of a training, seen from this process."""

    device: torch.device
    """Device of this process's networks."""
    rank: int = 0
    """Process rank; rank 0 writes files and logs."""
    world_size: int = 1
    """Number of processes."""

    def sum(self, *values: float) -> list[float]:
        """Return the sums of these values over all processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return [float(value) for value in total]

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """Call a function in the process of rank 0, and return its result in every process."""
        if self.world_size == 1:
            return make()
        made: list[Value | None] = [make() if self.rank == 0 else None]
        distributed.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]  # the result of rank 0, never the placeholder

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.world_size > 1:
            distributed.barrier()


@contextlib.contextmanager
def init_distributed(machine: MachineConfig) -> Iterator[ProcessGroup]:
    """Join the processes that `torchrun` started, which its environment variables describe; without them, use a single process.

    Raises:
        TrainingError: The configuration needs a GPU, and this process has none.
    """
    world_size, rank, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    device = choose_device(machine, local_rank)
    if world_size == 1:
        yield ProcessGroup(device)
        return
    if device.type == "cuda":
        distributed.init_process_group("nccl", device_id=device)  # without a device, NCCL guesses it at the first barrier, and warns
    else:
        distributed.init_process_group("gloo")
    try:
        yield ProcessGroup(device, rank, world_size)
    finally:
        distributed.destroy_process_group()


def choose_device(machine: MachineConfig, local_rank: int = 0) -> torch.device:
    """Return the device of a process, from its number among the processes of this machine.

    Raises:
        TrainingError: The configuration needs a GPU, and this process has none.
    """
    gpus = torch.cuda.device_count()
    if machine.device == "cpu" or (machine.device == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise TrainingError(
            f"the device is {machine.device!r}, but PyTorch {torch.__version__} finds no GPU on this machine. "
            "Use the device 'cpu', or 'auto', which takes a GPU if there is one."
        )
    if local_rank >= gpus:
        raise TrainingError(
            f"device is {machine.device!r}, but process {local_rank + 1} of this machine finds {gpus} GPUs. "
            'Start at most one process for each GPU, or set device = "cpu" under [machine].'
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
