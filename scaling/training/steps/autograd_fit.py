"""Steps of a fit on random rays by autograd: for any phase on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from scaling.config import Stage2Phase
from scaling.models.rounding import rounded
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.losses import weighted
from scaling.training.random_ray_batches import RayTable
from scaling.training.scene_step import SceneOptimiser, by_autograd, scene_loss


@dataclass(frozen=True)
class Span:
    """Some steps in a row, between which nothing changes but the rates.

    first: the number of the first one, from 0; rows [N]: the scenes that move, ascending; moving: names of what moves;
    factors: for each step, the factor on the rates, one for all scenes or [N]; uniforms [N, n, R, 1 + D] in [0, 1):
    see `RayTable.batch`; cells [N, CELLS³]; scale [N, P, F_mic, 1, 1]: planes are rendered as they are rounded to
    multiples of it; None: as they are.
    """

    first: int
    rows: Tensor
    moving: Sequence[str]
    factors: Sequence[float | Tensor]
    uniforms: Tensor
    cells: Tensor | None
    scale: Tensor | None


class AutogradFit:
    """Takes steps by autograd: for any phase on any device; the reference for `CpuFit`."""

    def __init__(
        self, shared: SharedModel, phase: Stage2Phase, table: RayTable, params: SceneParams, micro_dtype: str
    ) -> None:
        self.shared, self.phase, self.table, self.micro_dtype = shared, phase, table, micro_dtype
        self.optimiser = SceneOptimiser(params, phase.lr, together=not phase.check_every)

    def take(self, span: Span) -> Iterator[Tensor]:
        """Take the steps of a span. → after each step, the scenes' weighted losses [N]."""
        if "coefs" not in span.moving:
            self.optimiser.adams.pop("coefs", None)
        scale, dtype = span.scale, self.micro_dtype
        seen_as = None if scale is None else lambda micro: rounded(micro, scale, dtype)
        for number, factor in enumerate(span.factors):
            gradients_of = partial(self.gradients, rows=span.rows, uniforms=span.uniforms[:, number], cells=span.cells)
            losses, _ = self.optimiser.step(span.rows, gradients_of, factor, seen_as)
            yield losses

    def gradients(
        self, values: SceneParams, moving: Sequence[str], rows: Tensor, uniforms: Tensor, cells: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step's losses and gradients.

        values: params of the scenes in `rows` [N] of the table; uniforms [N, R, 1 + D]; cells [N, CELLS³] → the scenes'
        weighted losses [N], and the gradients of their sum for the names of `values` in `moving`.
        """
        batch = self.table.batch(uniforms, rows, cells)
        losses, found = by_autograd(values, moving, lambda now: scene_loss(self.shared, self.phase, batch, now))
        return weighted(losses, self.phase.loss).detach(), found
