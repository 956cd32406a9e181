"""One step of the scenes' own parameters, as stage 1 and every fit take it: values → losses and gradients → Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from scaling.config import Phase, Rates
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.losses import Batch, item_losses, variation, weighted
from scaling.training.optim import RowAdam

Reported = TypeVar("Reported")
# Params of N scenes, and the names of the params that move → what is reported of the losses, and a gradient for each
# name. A name is left out where the loss does not depend on it.
Gradients = Callable[[SceneParams, Sequence[str]], tuple[Reported, dict[str, Tensor]]]


class SceneOptimiser:
    """Moves micro planes and coefs of S scenes in place; a part with a rate of 0, or without numbers, stands still.

    table: params of S scenes; dense, together: see `RowAdam`; moving: name of each part that moves → its Adam.
    """

    def __init__(self, table: SceneParams, rates: Rates, dense: bool = False, together: bool = False) -> None:
        self.table, self.rates = table, rates
        self.adams = {
            name: RowAdam(values, dense, together)
            for name, values in (("micro_planes", table.micro_planes), ("coefs", table.coefs))
            if getattr(rates, name) and values.numel()
        }

    def step(
        self,
        rows: Tensor,
        gradients_of: Gradients[Reported],
        factor: float | Tensor,
        seen_as: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Reported, dict[str, Tensor]]:
        """Take one step of the scenes in `rows` [N], ascending. → what is reported, and the gradients that moved them.

        factor: on the rates, one for all scenes or [N]; seen_as: micro planes [N, …] → what the loss sees of them. The
        gradient in what the loss sees moves the planes themselves (straight-through gradient).
        """
        micro, coefs = of_rows(self.table.micro_planes, rows), of_rows(self.table.coefs, rows)
        seen = SceneParams(micro if seen_as is None else seen_as(micro), coefs)
        reported, gradients = gradients_of(seen, list(self.adams))
        for name, gradient in gradients.items():
            self.adams[name].step(rows, gradient, getattr(self.rates, name) * factor)
        return reported, gradients


def of_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows] for ascending rows [N]. Where `rows` are all rows: the table itself, as a copy takes time."""
    return table if len(rows) == len(table) else table[rows]


def by_autograd(
    values: SceneParams, moving: Sequence[str], loss_of: Callable[[SceneParams], tuple[Tensor, Reported]]
) -> tuple[Reported, dict[str, Tensor]]:
    """`Gradients` of any loss, by autograd. loss_of: params → the loss [], and what to report of it.

    The backward pass also fills the gradients of everything else that is trainable.
    """
    leaves = {"micro_planes": values.micro_planes.detach(), "coefs": values.coefs.detach()}
    for name in moving:
        leaves[name].requires_grad_()
    loss, reported = loss_of(replace(values, **leaves))
    loss.backward()
    found = {name: leaves[name].grad for name in moving}
    return reported, {name: gradient for name, gradient in found.items() if gradient is not None}


def scene_loss(
    shared: SharedModel,
    phase: Phase,
    batch: Batch,
    params: SceneParams,
    decode: Callable[[Tensor], Tensor] | None = None,
    kl_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of a batch, summed over its B items, with total variation; and each unweighted loss [B].

    params: of the items' scenes, in their order; decode: see `item_losses`.
    """
    losses = item_losses(shared, phase.loss, batch, params, decode)
    total = weighted(losses, phase.loss, kl_weight).sum()
    if phase.tv_weight:
        total = total + phase.tv_weight * variation(shared, params)
    return total, losses
