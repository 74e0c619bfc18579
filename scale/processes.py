"""Several processes as one: the share of every batch that this one works on, by accelerate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algorithms.division import Division


@dataclass(frozen=True, eq=False)
class Processes:
    """This process among all of a run. One that was started alone is the only one, and needs nothing of accelerate.

    Attributes:
        rank, world: which of how many.
    """

    rank: int = 0
    world: int = 1
    accelerator: Any = None

    @classmethod
    def here(cls, cpu: bool = False) -> Processes:
        """Join the processes that `torchrun` or `accelerate launch` started, or be alone.

        Args:
            cpu: stay on the processor, where there are GPUs too.

        Raises:
            ValueError: if the environment names several processes, but they cannot meet.
        """
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked == 1:
            return cls()
        from accelerate import Accelerator

        try:
            accelerator = Accelerator(cpu=cpu)
        except RuntimeError as fault:  # torch's, when the others do not come
            raise ValueError(f"{asked} processes were asked for, they did not meet: {fault}") from fault
        if accelerator.num_processes != asked:
            # `accelerate launch --cpu` has been seen to start several that do not know each other.
            raise ValueError(
                f"{asked} processes were asked for, {accelerator.num_processes} met: start them with "
                f"torchrun --nproc-per-node {asked}"
            )
        return cls(accelerator.process_index, accelerator.num_processes, accelerator)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def device(self, asked: torch.device) -> torch.device:
        """Return this process's device: of several GPUs, its own."""
        if self.world > 1 and asked.type == "cuda":
            return self.accelerator.device
        return asked

    def division(self, micro_batch: int | None) -> Division:
        """Return how this process works on a batch."""
        if self.world == 1:
            return Division(micro_batch)
        return Division(micro_batch, self.rank, self.world, gather=self._gather, add=self._add)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def any(self, here: bool) -> bool:
        """Return whether it is so in any process."""
        return here if self.world == 1 else bool(self._gather(torch.tensor([int(here)])).any())

    def leave(self, together: bool = True) -> None:
        """Leave the group; a process that ends in it without a word is now and then aborted.

        Args:
            together: wait for the others first; not after an error, when they may wait for this one elsewhere.
        """
        if self.world > 1:
            if together:
                self.wait()
            self.accelerator.end_training()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def _gather(self, value: Tensor) -> Tensor:
        # Between GPUs nothing goes that lies elsewhere.
        return self.accelerator.gather(value.contiguous().to(self.accelerator.device)).to(value.device)

    def _add(self, value: Tensor) -> Tensor:
        # In the order of the ranks, so that all processes get the same bits.
        return torch.stack([part for part in self._gather(value[None])]).sum(0)
