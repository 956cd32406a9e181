"""A frozen fit on random rays (2a): every scene has an Adam of its own and, with `check_every`, its own early stopping.

At the end of a fit the learning rate must fall, or its noise stays in the planes. Without `check_every` every scene
takes all steps, and the rate falls by `lr_cosine_to`. With it, a scene moves at its full rate until it stops improving
on two held-out training views. Then its rate falls to the lowest within `decay_steps`, and the scene leaves the batch.
The training loss does not show when to stop, and the test views are never used for it.

From `rounded_from` of all steps on, scenes are rendered from planes rounded as they will be stored, so that the fit
makes up for what rounding loses. A scene that stopped before that is rounded at the end alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scaling.config import Stage2Phase
from scaling.models.rounding import LEVELS, best_scale, rounded
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, texels_together
from scaling.training.fit_context import FitContext
from scaling.training.losses import rendered
from scaling.training.optim import lr_factor, lr_factors
from scaling.training.random_ray_batches import RayTable
from scaling.training.scene_step import of_rows
from scaling.training.steps.autograd_fit import AutogradFit, Span
from scaling.training.steps.cpu_fit import CpuFit
from scaling.training.steps.graph_fit import GraphFit
from scaling.training.training_scene import EncodedScene, TrainingScene

HELD_OUT = 2  # training views of a scene that are held out for early stopping
LEAST_VIEWS = 10  # with fewer, a scene holds none out: it trains on all of them, for all steps
RAYS_CHECKED = 512  # held-out rays at most, evenly spread: all rays of pixels would cost as much as the fit
LEAST_GAIN = 0.02  # part of the error that a scene must have lost since its best check to go on
REFRESHED_BEFORE = frozenset(100 << power for power in range(10))  # steps before which cells are filled again
SCALES_AGAIN = 200  # steps after which the scales of rounded planes are measured again


def fit_random_rays(
    fit: FitContext, name: str, phase: Stage2Phase, ready: Sequence[EncodedScene], params: SceneParams
) -> None:
    """Fit S scenes through a phase with rays_per_item; `params` move in place."""
    shared = fit.shared
    epoch_steps = phase.steps_per_epoch or ready[0].num_views
    total = phase.num_epochs * epoch_steps
    ends = Ends(shared, phase, ready, total)
    table = RayTable(shared, ends.trained)
    # Compiled loops read a texel's features side by side in memory; the caller's planes get the result at the end, and
    # its coefs are moved in place.
    micro = texels_together(params.micro_planes.detach())
    moved = replace(params, micro_planes=micro, coefs=params.coefs.detach())
    rounding = Rounding(moved, fit.settings.stage2.micro_dtype, round(phase.rounded_from * total))
    elsewhere = GraphFit if GraphFit.serves(shared, phase, total) else AutogradFit
    kind = CpuFit if CpuFit.serves(shared, phase) else elsewhere
    fitter = kind(shared, phase, table, moved, rounding.dtype)
    moving = [part for part in ("micro_planes", "coefs") if getattr(phase.lr, part) and getattr(moved, part).numel()]
    cells = Cells(shared, ready)
    # While coefs stand still, base planes need not be mixed again. Unless coefs are all that moves.
    coefs_stop = round(phase.coefs_until * total) if len(moving) > 1 else total
    changes = sorted({coefs_stop, total, *REFRESHED_BEFORE, *rounding.measured_before(total)})
    for first, uniforms in table.draws(fit.streams(name, ready), phase.rays_per_item or 0, total):
        step, drawn_to = first, first + uniforms.shape[1]
        while step < drawn_to and len(ends.moving):
            stop = min(drawn_to, ends.next_look(step), next(change for change in changes if change > step))
            rows = ends.moving
            cells.refresh(moved, rows, step)
            span = Span(
                first=step,
                rows=rows,
                moving=[part for part in moving if part != "coefs" or step < coefs_stop],
                factors=[ends.factors(phase, number // epoch_steps, number) for number in range(step, stop)],
                uniforms=of_rows(uniforms[:, step - first : stop - first], rows),
                cells=cells.of(rows),
                scale=rounding.scale_at(step, rows) if "micro_planes" in moving else None,
            )
            for number, losses in enumerate(fitter.take(span), start=step):
                fit.stepped(name, number, losses)
            ends.check(moved, cells, stop)
            step = stop
    rounding.finish()
    params.micro_planes.data.copy_(moved.micro_planes)


class Cells:
    """The cells of S scenes (see `SharedModel.cells`), filled from the scenes' densities again and again.

    table [S, CELLS³]; None with rendering.sampled: cuboid.
    """

    def __init__(self, shared: SharedModel, ready: Sequence[TrainingScene]) -> None:
        self.shared = shared
        grids = [scene.cells for scene in ready if scene.cells is not None]
        self.table = torch.stack(grids) if grids else None

    def of(self, rows: Tensor) -> Tensor | None:
        """The cells [N, CELLS³] of the scenes in `rows` [N]; None without hulls."""
        return None if self.table is None else of_rows(self.table, rows)

    @torch.no_grad()
    def refresh(self, params: SceneParams, rows: Tensor, step: int) -> None:
        """Before `step`, where it is one of REFRESHED_BEFORE: fill the cells of the scenes in `rows` [N] anew."""
        if self.table is not None and step in REFRESHED_BEFORE:
            found = self.shared.cells_of(replace(params[rows], hull=self.table[rows] > 0))
            self.table[rows] = self.table[rows] if found is None else found


class Rounding:
    """Rounds the micro planes of S scenes as they will be stored, from step `first` on; floats stay as they are."""

    def __init__(self, params: SceneParams, dtype: str, first: int) -> None:
        self.micro, self.dtype, self.first = params.micro_planes, dtype, first
        self.scale: Tensor | None = None

    def measured_before(self, total: int) -> range:
        """The steps, of `total`, before which scales are measured."""
        return range(self.first, total, SCALES_AGAIN) if self.dtype in LEVELS else range(0)

    def scale_at(self, step: int, rows: Tensor) -> Tensor | None:
        """The scales [N, P, F_mic, 1, 1] that round the planes of the scenes in `rows` [N] for a render at this step;
        None before the first."""
        if step < self.first or self.dtype not in LEVELS:
            return None
        if self.scale is None:
            self.scale = best_scale(self.micro, self.dtype)
        elif (step - self.first) % SCALES_AGAIN == 0:
            self.scale[rows] = best_scale(self.micro[rows], self.dtype)
        return self.scale[rows]

    def finish(self) -> None:
        """Round all scenes in place, if any step was taken with rounded planes."""
        if self.scale is not None:
            self.micro.copy_(rounded(self.micro, self.scale, self.dtype))


class Ends:
    """Early stopping: when each scene ends.

    trained: the scenes without their held-out rays; moving [N]: rows of the scenes that have not ended.
    """

    def __init__(self, shared: SharedModel, phase: Stage2Phase, ready: Sequence[EncodedScene], total: int) -> None:
        self.shared, self.total = shared, total
        self.check_every, self.decay_steps = phase.check_every, phase.decay_steps
        if self.check_every and total <= self.check_every + self.decay_steps:
            self.check_every = None  # too few steps for a look to end a scene early
        split = [_split(scene, shared.latent_size**2) for scene in ready] if self.check_every else []
        self.trained = [trained for trained, _ in split] or list(ready)
        held_out = [held for _, held in split]
        self.held_out = RayTable(shared, held_out) if any(len(held.drawn) for held in held_out) else None
        self.rows = list(range(len(ready)))
        self.moving = torch.arange(len(ready), device=shared.device)
        self.best = torch.full((len(ready),), torch.inf, device=shared.device)
        # The step at which a scene's rate begins to fall; also kept on the device, so that no step waits for a copy.
        self.falls = [total - self.decay_steps if split else 0] * len(ready)
        self.falls_there = torch.tensor(self.falls, device=shared.device)

    def next_look(self, step: int) -> int:
        """The first step after `step` at which scenes may begin or end their decay."""
        if not self.check_every:
            return self.total
        ends = [fall + self.decay_steps for fall in self.falls if fall + self.decay_steps > step]
        return min([self.total, step - step % self.check_every + self.check_every, *ends])

    def factors(self, phase: Stage2Phase, epoch: int, step: int) -> Tensor | float:
        """Factor on the rates: [N] for the scenes that move, or one for all where no scene ends before the others."""
        if not self.check_every:
            return lr_factor(phase, epoch, step / self.total)
        fallen = (step - self.falls_there[self.moving]).clamp(min=0)
        return lr_factors(phase, epoch, fallen / self.decay_steps)

    def check(self, params: SceneParams, cells: Cells, step: int) -> None:
        """After `step` steps: check the held-out rays when it is time, and drop scenes whose rates have fallen."""
        if not self.check_every:
            return
        if self.held_out and step % self.check_every == 0:
            self._end_those_that_stand(params, cells, step)
        if any(step - fall == self.decay_steps for fall in self.falls):
            self.rows = [row for row in self.rows if step - self.falls[row] < self.decay_steps]
            self.moving = torch.tensor(self.rows, dtype=torch.int64, device=self.moving.device)

    @torch.no_grad()
    def _end_those_that_stand(self, params: SceneParams, cells: Cells, step: int) -> None:
        """Start the decay of scenes that no longer improve on their held-out rays."""
        at_full_rate = [row for row in self.rows if self.falls[row] > step]
        if not at_full_rate or self.held_out is None:
            return
        rows = torch.tensor(at_full_rate, device=self.moving.device)
        batch = self.held_out.every_ray(rows, cells.of(rows))
        errors = (rendered(self.shared, batch, params[rows]) - batch.latents).square().mean(-1)
        errors = errors * self.held_out.real(rows)
        error = errors.sum(1) / self.held_out.counts[rows, 0]  # NaN, so never stopped, without held-out rays
        stands = error > self.best[rows] * (1 - LEAST_GAIN)
        self.best[rows] = error.minimum(self.best[rows])
        self.falls_there[rows[stands]] = step
        self.falls = self.falls_there.tolist()


def _split(scene: EncodedScene, rays_per_view: int) -> tuple[EncodedScene, EncodedScene]:
    """The scene without the rays of its held-out views, and the scene with at most RAYS_CHECKED of those rays alone.

    No view is held out where too little would be left to train on.
    """
    held = torch.linspace(0, scene.num_views - 1, HELD_OUT + 2)[1:-1].round().long().to(scene.drawn.device)
    of_held = torch.isin(scene.drawn // rays_per_view, held)
    if scene.num_views < LEAST_VIEWS or 2 * of_held.sum() > len(scene.drawn):
        of_held[:] = False
    looked_at = scene.drawn[of_held].unique()
    spread = torch.linspace(0, len(looked_at) - 1, min(len(looked_at), RAYS_CHECKED)).round().long()
    return replace(scene, drawn=scene.drawn[~of_held]), replace(scene, drawn=looked_at[spread.to(looked_at.device)])
