"""Several processes that train one network: each draws its own documents, all add up their gradients.

On a CPU one process with one thread for each core beats one process with many threads, because most operations of so
small a network are too short to be shared out. Called by `hybrid.nano.train`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among `count`. One alone needs no group."""

    rank: int = 0
    count: int = 1

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by its sum over the workers, in one exchange; all get the same bits."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gathered(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


ALONE = Workers()


def join(rank: int, count: int, meeting: Path) -> Workers:
    """Join the group that meets in the file `meeting`, and take this worker's share of the threads."""
    if count > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    return Workers(rank, count)
