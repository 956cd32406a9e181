"""Phases over many scenes at once: the loop that stage 1 and a cohort of stage 2 have in common.

One Adam moves the shared model's parts, under data-parallel averaging. Each scene's micro planes and coefs are rows of
a table, which a row-wise Adam moves on the worker that owns the scene.

    start ─► enter(phase): readies the model ─► optimisers are made ◄─────────────────┐
                │        (of a checkpoint: their states are loaded, once)              │
                ▼                                                                      │
    ┌──► epoch: cells are filled from densities ─► steps: batch ─► PhaseStep ─► Adams  │
    │           ▼                                                                      │
    │    end of the epoch: are all numbers finite? ── no ──► Diverged is raised        │
    │           ▼                                                                      │
    └─── on_epoch(report): the caller saves a checkpoint ─► last epoch ─► next phase ──┘
                                                                      └─► none is left: at_the_end
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaling.config import Phase, Rates, Settings
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training import watchdog
from scaling.training.batches import Item, make_batch
from scaling.training.losses import Batch
from scaling.training.optim import lr_factor, set_learning_rates, shared_optimiser
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.sampler import Entry, epoch_batches
from scaling.training.scene_step import SceneOptimiser, by_autograd, scene_loss
from scaling.training.training_scene import TrainingScene

NEVER = torch.iinfo(torch.int64).max  # the "first bad step" of a scene whose numbers were finite at every step


class Diverged(FloatingPointError):
    """Numbers are not finite. scene_ids: the scenes that diverged first; empty where no scene is to blame."""

    def __init__(self, scene_ids: Sequence[str], message: str) -> None:
        super().__init__(list(scene_ids), message)
        self.scene_ids = list(scene_ids)
        self.message = message

    def __str__(self) -> str:
        named = f"; first in scene {', '.join(self.scene_ids[:5])}" if self.scene_ids else ""
        return self.message + named


class PhaseStep(nn.Module):
    """The forward pass of one step: the module that becomes data-parallel.

    Per-scene parameters come as arguments, so that their gradients are not averaged.
    """

    def __init__(self, shared: SharedModel, phase: Phase, kl_weight: float = 0.0) -> None:
        super().__init__()
        self.shared = shared
        self.phase = phase
        self.kl_weight = kl_weight

    def forward(self, batch: Batch, micro_planes: Tensor, coefs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """micro_planes [B, P, F_mic, K, K], coefs [B, M] of the items' scenes → the weighted loss, summed over items,
        and each unweighted loss [B]."""
        params = SceneParams(micro_planes, coefs)
        total, losses = scene_loss(self.shared, self.phase, batch, params, kl_weight=self.kl_weight)
        return total, {name: loss.detach() for name, loss in losses.items()}


@dataclass(frozen=True)
class EpochReport:
    """What is reported after every epoch.

    epoch: epochs done in the phase; epochs_done, epochs_total: of all phases; losses: means over the global batches;
    seconds: of this epoch.
    """

    phase: str
    epoch: int
    epochs_done: int
    epochs_total: int
    losses: dict[str, float]
    seconds: float


class Phases:
    """Goes through phases, in order; can be stopped and resumed after every epoch (see checkpoints/state.py).

    shared: moves in place; scenes: those of this worker, made ready; table: params of these scenes, one row each;
    buckets: the sampler's bucket of every scene; identity: what a checkpoint must agree with to belong to this job;
    dropped: scenes that no longer take part, and why.
    """

    def __init__(
        self,
        settings: Settings,
        shared: SharedModel,
        scenes: Sequence[TrainingScene],
        table: SceneParams,
        phases: Mapping[str, Phase],
        identity: dict[str, Any],
        buckets: dict[str, int],
        workers: Workers,
    ) -> None:
        self.settings = settings
        self.shared = shared
        self.scenes: list[TrainingScene] = list(scenes)
        self.row = {scene.scene_id: row for row, scene in enumerate(self.scenes)}
        self.table = table
        self.phases = phases
        self.identity = identity
        self.buckets = buckets
        self.num_buckets = len(set(buckets.values()))
        self.workers = workers
        self.phase_index, self.epoch, self.seconds = 0, 0, 0.0
        self.dropped: dict[str, str] = {}
        self.optimiser: torch.optim.Adam | None = None
        self.scene_optimiser = SceneOptimiser(table, Rates())  # nothing moves before the first phase

    @property
    def at_the_end(self) -> bool:
        """Whether no phase is left."""
        return self.phase_index == len(self.phases)

    def run_phases(
        self,
        enter: Callable[[str, Phase], PhaseStep],
        on_epoch: Callable[[EpochReport], None],
        load_optimisers: Callable[[], None] | None = None,
    ) -> None:
        """Go through the epochs and phases that `phase_index` and `epoch` leave.

        enter: makes the model ready for a phase; load_optimisers: called once, after a resumed phase has made its
        optimisers. Raises Diverged where numbers are not finite.
        """
        names = list(self.phases)
        total = sum(phase.num_epochs for phase in self.phases.values())
        while not self.at_the_end:
            name = names[self.phase_index]
            phase = self.phases[name]
            step = self._with_optimisers(enter(name, phase))
            if load_optimisers:  # their states belong to the phase of the checkpoint, the first one here
                load_optimisers()
                load_optimisers = None
            while self.epoch < phase.num_epochs:
                start = time.perf_counter()
                losses = self._epoch(name, phase, step)
                self.epoch += 1
                seconds = time.perf_counter() - start
                self.seconds += seconds * self.workers.size  # summed over devices: the number of workers may change
                done = sum(self.phases[before].num_epochs for before in names[: self.phase_index]) + self.epoch
                on_epoch(EpochReport(name, self.epoch, done, total, losses, seconds))
            self.phase_index, self.epoch = self.phase_index + 1, 0

    def _with_optimisers(self, step: PhaseStep) -> nn.Module:
        rates = step.phase.lr
        self.optimiser = shared_optimiser(self.shared, rates)
        self.scene_optimiser = SceneOptimiser(self.table, rates, self.settings.stage1.dense_adam)
        return self.workers.wrap(step) if self.optimiser else step

    def _entries(self, phase: Phase) -> dict[int, list[Entry]]:
        """What each bucket of this worker deals out: its scenes' views, or its scenes in a phase on random rays."""
        owned: dict[int, list[Entry]] = {}
        for scene in self.scenes:
            if scene.scene_id not in self.dropped:
                views = 1 if phase.rays_per_item else scene.num_views  # random rays are of all views at once
                entries = [(scene.scene_id, view) for view in range(views)]
                owned.setdefault(self.buckets[scene.scene_id], []).extend(entries)
        return owned

    def _epoch(self, name: str, phase: Phase, step: nn.Module) -> dict[str, float]:
        """Take the steps of one epoch. → the mean of each unweighted loss over the global batches."""
        self._look_where_scenes_are(phase)
        entries = self._entries(phase)
        items_per_step = phase.items_per_step or len(self.scenes) - len(self.dropped)
        steps = phase.steps_per_epoch or self._one_pass(items_per_step)
        names = (self.settings.seed, name, self.epoch)
        sums: dict[str, Any] = {}
        # The first step with numbers that are not finite: of each scene, and of a whole batch of several scenes. Both
        # stay on the device until the epoch ends, so that no step waits for them.
        first_bad = torch.full((len(self.scenes),), NEVER, device=self.shared.device)
        whole_batch_bad = torch.full((), NEVER, device=self.shared.device)
        for index, dealt in enumerate(epoch_batches(entries, items_per_step // self.num_buckets, steps, *names)):
            items = [
                Item(self.scenes[self.row[scene_id]], view, stream(*names, index, place, scene_id))
                for place, (scene_id, view) in dealt
            ]
            factor = lr_factor(phase, self.epoch, (self.epoch * steps + index) / (phase.num_epochs * steps))
            watchdog.beat()
            rows, finite, losses = self._step(phase, step, items, items_per_step, factor)
            first_bad[rows[~finite]] = first_bad[rows[~finite]].clamp(max=index)
            if len(rows) > 1:
                whole_batch_bad = torch.where(finite.any(), whole_batch_bad, whole_batch_bad.clamp(max=index))
            for key, value in losses.items():
                sums[key] = sums.get(key, 0) + value.sum()
        keys = sorted(sums)
        total = self.workers.sum(torch.stack([sums[key] for key in keys])) / (steps * items_per_step)
        self._check(name, dict(zip(keys, total.tolist())), first_bad, int(whole_batch_bad))
        return dict(zip(keys, total.tolist()))

    @torch.no_grad()
    def _look_where_scenes_are(self, phase: Phase) -> None:
        """Fill the scenes' cells from their densities, before an epoch that renders them; not before a run's first."""
        started = self.phase_index or self.epoch
        if started and (phase.loss.latent or phase.loss.rgb or phase.loss.student):
            for row, scene in enumerate(self.scenes):
                found = self.shared.cells_of(self.table[row : row + 1])
                scene.cells = None if found is None else found[0]

    def _one_pass(self, items_per_step: int) -> int:
        """The number of steps that take as many items as all workers have training views; the last may repeat some."""
        views = float(sum(scene.num_views for scene in self.scenes if scene.scene_id not in self.dropped))
        total = self.workers.sum(torch.tensor(views, device=self.shared.device)).item()
        return math.ceil(total / items_per_step)

    def _step(
        self, phase: Phase, step: nn.Module, items: list[Item], items_per_step: int, factor: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Take one step. → the rows of its scenes, whether their losses and gradients were finite, the items' losses.

        The loss is the sum over the global batch, divided by the size of that batch. Data-parallel training averages
        gradients over workers, so each worker's part is scaled by the number of workers. The gradients of the scenes'
        own params are not averaged, so they are scaled back.
        """
        batch = make_batch(self.shared, phase, items)
        rows, place = torch.unique(
            torch.tensor([self.row[item.scene.scene_id] for item in items], device=self.shared.device),
            return_inverse=True,
        )

        def loss_of(params: SceneParams) -> tuple[Tensor, dict[str, Tensor]]:
            total, losses = step(batch, params.micro_planes[place], params.coefs[place])
            return total * self.workers.size / items_per_step, losses

        def gradients_of(params: SceneParams, moving: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            losses, found = by_autograd(params, moving, loss_of)
            return losses, {name: gradient / self.workers.size for name, gradient in found.items()}

        # One backward pass gives all gradients: those of the scenes move them here, those of the shared model below.
        losses, gradients = self.scene_optimiser.step(rows, gradients_of, factor)
        set_learning_rates(self.optimiser, factor, ("field",) if self._field_stands(phase) else ())
        if self.optimiser:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        finite = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for loss in losses.values():
            finite[place[~loss.isfinite()]] = False
        for gradient in gradients.values():
            finite &= gradient.flatten(1).isfinite().all(1)
        return rows, finite, losses

    def _field_stands(self, phase: Phase) -> bool:
        return phase.field_frozen_from_epoch is not None and self.epoch >= phase.field_frozen_from_epoch

    def _check(self, name: str, losses: dict[str, float], first_bad: Tensor, whole_batch_bad: int) -> None:
        """Raise Diverged where a loss, a scene's gradients or a shared parameter is not finite.

        The scenes of the first such step are to blame; those of later steps may have caught it through the shared
        model. No scene is to blame where all scenes of this worker's part of that batch diverged at once: then the
        shared model did.
        """
        worst = first_bad.min() if len(first_bad) else first_bad.new_tensor(NEVER)
        earliest = int(self.workers.smallest(worst))
        shared = [p for p in self.shared.parameters() if p.requires_grad]
        sound = all(bool(p.isfinite().all()) for p in shared) and all(math.isfinite(v) for v in losses.values())
        if earliest == NEVER and sound:
            return
        alone = earliest < NEVER and earliest != whole_batch_bad
        rows = first_bad.eq(earliest).nonzero()[:, 0].tolist() if alone else []
        shown = ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
        message = f"{name}, epoch {self.epoch}: numbers are not finite (mean losses: {shown})"
        raise Diverged([self.scenes[row].scene_id for row in rows], message)
