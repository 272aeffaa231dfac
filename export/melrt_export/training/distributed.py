"""The processes of a training, one for each GPU: alone, or as `torchrun` starts them."""

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
class Processes:
    """This process among the others."""

    device: torch.device
    """Where its networks are."""
    rank: int = 0
    """Its number; the first writes files and talks to people."""
    count: int = 1
    """How many there are."""

    def sum(self, *values: float) -> list[float]:
        """The sums of these values over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return [float(value) for value in total]

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, for all."""
        if self.count == 1:
            return make()
        made: list[Value | None] = [make() if self.rank == 0 else None]
        distributed.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]  # the first process's, which is no None

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            distributed.barrier()


@contextlib.contextmanager
def init_distributed(machine: MachineConfig) -> Iterator[Processes]:
    """This process among those that `torchrun` started (its environment variables tell), or alone.

    Raises:
        TrainingError: A GPU is asked for and there is none for this process.
    """
    count, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    device = _device(machine, local)
    if count == 1:
        yield Processes(device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, rank, count)
    finally:
        distributed.destroy_process_group()


def _device(machine: MachineConfig, local: int) -> torch.device:
    there = torch.cuda.device_count()
    if machine.device == "cpu" or (machine.device == "auto" and not there):
        return torch.device("cpu")
    if local >= there:
        raise TrainingError(
            f'device is {machine.device!r}, and process {local + 1} of this machine finds {there} GPUs; set device = "cpu".'
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
