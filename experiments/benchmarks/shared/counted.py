"""For gpu_fit.py: count what an action computes and moves while it runs, and measure the limits of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shared.stopwatch import wall_seconds

CORNERS = 4  # texels that a bilinear sample reads


@dataclass(frozen=True)
class Work:
    """What an action did. flops: of matrix products, convolutions and attention; moved: bytes that operations read and
    wrote, with every tensor counted in full, as if nothing stayed in a cache."""

    flops: float
    moved: float


class _Traffic(TorchDispatchMode):
    """Sums the bytes of all inputs and outputs of operations; views, which move nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def count(action: Callable[[], Any]) -> Work:
    """The work of one call of the action. It runs uncompiled, because compiled code cannot be counted.

    The flops leave out bilinear samples: see `sampling_flops`.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        action()
    return Work(float(flops.get_total_flops()), float(traffic.moved))


def sampling_flops(points: int, planes: int, features: int) -> float:
    """Flops of bilinear samples in a forward and a backward pass: in each, every corner of a point costs a product and
    a sum for every feature."""
    return 2.0 * 2 * CORNERS * points * planes * features


def ceilings(device: torch.device, side: int, copied: int) -> dict[str, float]:
    """Measure the device's limits: "float32" (without TF32) and "bfloat16", flops a second of a large matrix product;
    "copy", bytes a second of a large copy, reading and writing both counted.

    side: of the matrices; copied: bytes of the copy.
    """
    found: dict[str, float] = {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("float32", "bfloat16"):
        left = torch.randn(side, side, device=device, dtype=getattr(torch, name))
        out = torch.empty_like(left)
        found[name] = 2 * side**3 / _least_seconds(lambda: torch.mm(left, left, out=out), device)  # noqa: B023
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * copied / _least_seconds(lambda: target.copy_(source), device)
    return found


def _least_seconds(action: Callable[[], Any], device: torch.device) -> float:
    """The best of 50 wall times: the best, because a limit is wanted; wall time, because it is compared with wall
    times."""
    return min(wall_seconds(action, device) for _ in range(50))
