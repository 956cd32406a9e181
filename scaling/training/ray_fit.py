"""A frozen fit on random rays (2a): every scene has an Adam of its own and ends when it has stopped to improve.

At the end of a fit the learning rate must fall, or its noise stays in the planes. So a scene goes at its full rate
until a look at two training views, which it is not trained on, finds it hardly better than the best look before; then
its rate falls to the lowest within `decay_steps` and it leaves the batch. Its training loss tells nothing, and its test
views are not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scaling import pulse
from scaling.config import Stage2Phase
from scaling.models.shared import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.losses import item_losses, variation, weighted
from scaling.training.optim import RowAdam, lr_factors
from scaling.training.ray_table import RayTable
from scaling.training.scene_data import TrainingScene
from scaling.training.streams import stream

HELD_OUT = 2  # training views to look at
LEAST_VIEWS = 10  # of a scene that can spare them; with fewer it trains on all of them, for all steps
RAYS_LOOKED_AT = 512  # of those views at most, evenly spread: in RGB space a look would cost as much as the fit
LEAST_GAIN = 0.02  # part of its error that a scene must have lost since its best look to go on


def fit_rays(
    shared: SharedModel,
    name: str,
    phase: Stage2Phase,
    ready: Sequence[TrainingScene],
    params: SceneParams,
    seed: int,
    on_step: Callable[[str, int, float], None] | None,
) -> None:
    """Moves params (S scenes) in place through a phase with rays_per_item. on_step(name, step, mean loss of those that
    still move) is called after every step."""
    epoch_steps = phase.steps_per_epoch or ready[0].num_views
    total = phase.num_epochs * epoch_steps
    ends = Ends(shared, phase, ready, total)
    table = RayTable(shared, ends.trained)
    tables = {"micro_planes": params.micro_planes, "coefs": params.coefs}
    moves = {key: RowAdam(t) for key, t in tables.items() if getattr(phase.lr, key) and t.numel()}
    draws = table.draws([stream(seed, name, scene.scene_id) for scene in ready], phase.rays_per_item or 0, total)
    for step, uniforms in enumerate(draws):
        rows = ends.moving
        leaves = {key: moves[key].leaf(rows) if key in moves else t[rows] for key, t in tables.items()}
        now = SceneParams(**leaves)
        batch = table.batch(uniforms[rows], rows)
        loss = weighted(item_losses(shared, phase.loss, batch, now), phase.loss).sum()
        if phase.tv_weight:
            loss = loss + phase.tv_weight * variation(shared, now)
        gradients = torch.autograd.grad(loss, [leaves[key] for key in moves])
        factors = ends.factors(phase, step // epoch_steps, step)
        for (key, optimiser), gradient in zip(moves.items(), gradients):
            optimiser.step(rows, gradient, getattr(phase.lr, key) * factors)
        pulse.beat()
        if on_step is not None:
            on_step(name, step, loss.item() / len(rows))
        ends.look(params, step + 1)
        if not len(ends.moving):
            break


class Ends:
    """When scenes end. trained: what they train on; moving [N]: rows of those that have not ended."""

    def __init__(self, shared: SharedModel, phase: Stage2Phase, ready: Sequence[TrainingScene], total: int) -> None:
        self.shared, self.total = shared, total
        self.check_every, self.decay_steps = phase.check_every, phase.decay_steps
        if self.check_every and total <= self.check_every + self.decay_steps:
            self.check_every = None  # too short for a look that could end anything
        split = [_split(scene, shared.latent_size**2) for scene in ready] if self.check_every else []
        self.trained = [trained for trained, _ in split] or list(ready)
        self.held_out = RayTable(shared, [held for _, held in split]) if split else None
        self.rows = list(range(len(ready)))
        self.moving = torch.arange(len(ready), device=shared.device)
        self.best = torch.full((len(ready),), torch.inf, device=shared.device)
        # The step from which on a scene's rate falls; on the device too, which a step need not wait for then.
        self.falls = [total - self.decay_steps if split else 0] * len(ready)
        self.falls_there = torch.tensor(self.falls, device=shared.device)

    def factors(self, phase: Stage2Phase, epoch: int, step: int) -> Tensor:
        """Factor on the rates of each scene that moves, [N]."""
        length = self.decay_steps if self.check_every else self.total
        return lr_factors(phase, epoch, (step - self.falls_there[self.moving]).clamp(min=0) / length)

    def look(self, params: SceneParams, step: int) -> None:
        """After `step` steps: at the held-out views, where it is time; those whose rates have fallen leave."""
        if self.held_out is None:
            return
        if self.check_every and step % self.check_every == 0:
            self._end_those_that_stand(params, step)
        if any(step - fall == self.decay_steps for fall in self.falls):
            self.rows = [row for row in self.rows if step - self.falls[row] < self.decay_steps]
            self.moving = torch.tensor(self.rows, dtype=torch.int64, device=self.moving.device)

    @torch.no_grad()
    def _end_those_that_stand(self, params: SceneParams, step: int) -> None:
        at_full_rate = [row for row in self.rows if self.falls[row] > step]
        if not at_full_rate or self.held_out is None or not self.held_out.numbers.shape[1]:
            return
        rows = torch.tensor(at_full_rate, device=self.moving.device)
        batch = self.held_out.every_ray(rows)
        assert batch.rays is not None and batch.latents is not None
        colours = self.shared.render(params[rows], batch.rays, None, batch.pixels, batch.span).colours
        errors = (colours - batch.latents).square().mean(-1) * self.held_out.real(rows)
        error = errors.sum(1) / self.held_out.counts[rows, 0]  # not a number, so never at its end, of one without any
        stands = error > self.best[rows] * (1 - LEAST_GAIN)
        self.best[rows] = error.minimum(self.best[rows])
        self.falls_there[rows[stands]] = step
        self.falls = self.falls_there.tolist()


def _split(scene: TrainingScene, rays_per_view: int) -> tuple[TrainingScene, TrainingScene]:
    """The scene without the held-out views' rays, and with them alone; none are held out where that would leave little
    to train on."""
    held = torch.linspace(0, scene.num_views - 1, HELD_OUT + 2)[1:-1].round().long().to(scene.hits.device)
    of_held = torch.isin(scene.hits // rays_per_view, held)
    if scene.num_views < LEAST_VIEWS or 2 * of_held.sum() > len(scene.hits):
        of_held[:] = False
    looked_at = scene.hits[of_held]
    spread = torch.linspace(0, len(looked_at) - 1, min(len(looked_at), RAYS_LOOKED_AT)).round().long()
    return replace(scene, hits=scene.hits[~of_held]), replace(scene, hits=looked_at[spread.to(looked_at.device)])
