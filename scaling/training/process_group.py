"""The processes that train together, seen from one of them. The default is one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _unchanged(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True)
class Workers:
    """rank and size of the group, this process's device, and how a module becomes data-parallel (`wrap`)."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = _unchanged

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, a new tensor of the same shape; every worker must call it."""
        tensor = tensor.clone()
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def smallest(self, number: Tensor) -> Tensor:
        """The element-wise minimum over all workers, a new tensor of the same shape; every worker must call it."""
        number = number.clone()
        if self.size > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MIN)
        return number

    def owns(self, bucket: int) -> bool:
        """Whether the scenes of a bucket belong to this worker."""
        return bucket % self.size == self.rank
