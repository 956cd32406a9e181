"""Optimisers: Adam for the shared model, row-wise Adam for the scenes' own parameters; and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from scaling.config import Phase, Rates
from scaling.models.shared_model import SharedModel

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def lr_factor(phase: Phase, epoch: int, progress: float) -> float:
    """Factor on a phase's learning rates: decay and milestones by epoch, times a half cosine over the phase.

    epoch counts from 0; progress in [0, 1) is the part of the phase that is done.

    >>> lr_factor(Phase(lr_decay=0.5, lr_cosine_to=0.5), epoch=1, progress=0.5)  # 0.5 · (0.5 + 0.5 · ½)
    0.375
    """
    return lr_factors(phase, epoch, torch.tensor(progress, dtype=torch.float64)).item()


def lr_factors(phase: Phase, epoch: int, progress: Tensor) -> Tensor:
    """`lr_factor` for several scenes, each at its own part `progress` of the phase; any shape."""
    factor = phase.lr_decay**epoch
    factor *= phase.lr_milestone_factor ** sum(epoch >= milestone for milestone in phase.lr_milestones)
    lowest = phase.lr_cosine_to
    return factor * (lowest + (1 - lowest) * 0.5 * (1 + torch.cos(math.pi * progress)))


class RowAdam:
    """Row-wise Adam: on a table with one row per scene, it steps only the rows of a batch.

    Every row has its own moments and step count, so a row moves as under an Adam of its own. `dense` is the published
    behaviour: all rows step each time, those outside the batch with a zero gradient. `together`: all rows are in every
    batch, at one rate; this takes a sixth of the time.
    """

    def __init__(self, table: Tensor, dense: bool = False, together: bool = False) -> None:
        self.table = table
        self.dense = dense
        self.first = torch.zeros_like(table)
        self.second = torch.zeros_like(table)
        self.steps = torch.zeros(len(table), dtype=torch.int64, device=table.device)
        self.together = torch.zeros((), device=table.device) if together else None  # step count of all rows

    @torch.no_grad()
    def step(self, rows: Tensor, grad: Tensor, lr: float | Tensor) -> None:
        """Move `rows` [N] (ascending, no duplicates) along their gradients [N, …].

        lr: one rate for all rows, or one per row, [N] (not with `dense` or `together`).
        """
        if self.dense:
            rows, grad = torch.arange(len(self.table)), torch.zeros_like(self.table).index_copy_(0, rows, grad)
        self.steps[rows] += 1
        if self.together is not None:
            assert len(rows) == len(self.table) and isinstance(lr, float)
            self._all_together(grad, lr)
            return
        # In double precision: in single precision, 1 - 0.999 ** count loses four digits in the first steps.
        count = self.steps[rows].double().view(-1, *[1] * (grad.dim() - 1))
        rate = lr.view(count.shape) if isinstance(lr, Tensor) else lr
        rate, correction = (rate / (1 - BETAS[0] ** count)).to(grad.dtype), (1 - BETAS[1] ** count).to(grad.dtype)
        table, first, second = self.table[rows], self.first[rows], self.second[rows]
        first.lerp_(grad, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        table.sub_((second / correction).sqrt_().add_(EPSILON).reciprocal_().mul_(first).mul_(rate))
        self.table[rows], self.first[rows], self.second[rows] = table, first, second

    def _all_together(self, grad: Tensor, lr: float) -> None:
        """Step all rows as one tensor."""
        assert self.together is not None
        if grad.stride() != self.table.stride():  # the fused loop takes both in memory order
            grad = torch.empty_like(self.table).copy_(grad)
        adam(
            [self.table], [grad], [self.first], [self.second], [], [self.together],
            fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=0.0, eps=EPSILON,
            maximize=False,
        )  # fmt: skip


def shared_parts(shared: SharedModel) -> dict[str, list[nn.Parameter]]:
    """Parameters of the shared model by the name of their learning rate; `decoder`: the adapted one if there is one."""
    encoder, decoder = shared.autoencoder.halves()
    if shared.decoder is not None:
        decoder = list(shared.decoder.parameters())
    base = [shared.base_planes] if shared.base_planes.numel() else []
    parts = {"encoder": encoder, "decoder": decoder, "field": list(shared.field.parameters()), "base_planes": base}
    return parts | {"student": list(shared.student.parameters()) if shared.student is not None else []}


def shared_optimiser(shared: SharedModel, rates: Rates) -> torch.optim.Adam | None:
    """Make exactly the parts with a learning rate above 0 trainable. → an Adam that owns them; None without any."""
    shared.requires_grad_(False)
    groups = []
    for name, parameters in shared_parts(shared).items():
        rate = getattr(rates, name)
        if rate > 0 and parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)
            groups.append({"params": parameters, "lr": rate, "base_lr": rate, "name": name})
    optimiser = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True) if groups else None
    check_ownership(shared, optimiser)
    return optimiser


def check_ownership(module: nn.Module, optimiser: torch.optim.Optimizer | None) -> None:
    """Raise RuntimeError unless the optimiser owns exactly the trainable parameters of the module, each once."""
    owned = [p for group in optimiser.param_groups for p in group["params"]] if optimiser else []
    names = {id(p): name for name, p in module.named_parameters()}
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    ids = {id(p) for p in owned}
    if len(owned) != len(ids) or ids != trainable:
        lost = sorted(names[i] for i in trainable - ids)
        extra = sorted(names.get(i, "not of this model") for i in ids - trainable)
        raise RuntimeError(
            f"optimiser and trainable parameters differ: no optimiser owns {lost}; owned but frozen {extra}; "
            f"{len(owned) - len(ids)} owned twice"
        )


def set_learning_rates(optimiser: torch.optim.Adam | None, factor: float, frozen: tuple[str, ...] = ()) -> None:
    """Set each group's rate to its starting rate times `factor`; groups named in `frozen` stand still."""
    for group in optimiser.param_groups if optimiser else []:
        group["lr"] = 0.0 if group["name"] in frozen else group["base_lr"] * factor
