"""Stage 1: trains the shared model on the first scenes, one worker's view of it.

Phases: `autoencoder` (0, from scratch only), `warmup` (1a, on cached latents), `joint` (1b, everything), `adapt`
(1c, a copy of the decoder learns rendered latents). The shared model's gradients are averaged over workers; a
scene's micro planes and coefs belong to the worker that owns its bucket and are never synchronised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scaling.config import Settings, SettingsError, Stage1Phase
from scaling.data.scenes import SceneViews
from scaling.models.autoencoder import TARGET_STD, LatentAutoencoder
from scaling.models.shared import SceneParams, SharedModel
from scaling.models.triplanes import fuse_planes, total_variation
from scaling.training.checkpoint import load_checkpoint, load_optimisers, save_checkpoint
from scaling.training.evaluate import evaluate_scene
from scaling.training.losses import Batch, item_losses, weighted
from scaling.training.optim import RowAdam, lr_factor, set_learning_rates, shared_optimiser
from scaling.training.sampler import Entry, bucket_of, epoch_batches
from scaling.training.scene_data import Item, encode_scene, make_batch, prepare_scene
from scaling.training.streams import stream
from scaling.training.workers import Workers

PHASES = ("autoencoder", "warmup", "joint", "adapt")


def active_phases(settings: Settings) -> list[str]:
    """Phases that a run goes through, in order."""
    scratch = settings.representation.space == "latent" and settings.autoencoder.pretrained is None
    phases = [name for name in PHASES if getattr(settings.stage1, name).num_epochs]
    return phases if scratch else [name for name in phases if name != "autoencoder"]


class PhaseStep(nn.Module):
    """The forward pass of one step, the module that becomes data-parallel. Per-scene parameters come as arguments,
    so that they stay outside of the gradient averaging."""

    def __init__(self, shared: SharedModel, phase: Stage1Phase, kl_weight: float) -> None:
        super().__init__()
        self.shared = shared
        self.phase = phase
        self.kl_weight = kl_weight

    def forward(self, batch: Batch, micro_planes: Tensor, coefs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows of the items' scenes → the loss summed over items, and each unweighted loss summed over items."""
        params = SceneParams(micro_planes, coefs)
        losses = item_losses(self.shared, self.phase.loss, batch, params)
        total = weighted(losses, self.phase.loss, self.kl_weight).sum()
        if self.phase.tv_weight:
            planes = fuse_planes(micro_planes, coefs, self.shared.base_planes)
            total = total + self.phase.tv_weight * len(planes) * total_variation(planes)
        return total, {name: loss.detach().sum() for name, loss in losses.items()}


@dataclass(frozen=True)
class EpochReport:
    """Called for after every epoch: the phase, epochs done in it and in all, mean losses over the global batches."""

    phase: str
    epoch: int
    epochs_done: int
    epochs_total: int
    losses: dict[str, float]
    seconds: float


class Stage1:
    """scene_ids: all scenes of the stage, in order; scenes: those that this worker owns."""

    def __init__(
        self, settings: Settings, scene_ids: Sequence[str], scenes: Sequence[SceneViews], workers: Workers | None = None
    ) -> None:
        self.settings = settings
        self.workers = workers or Workers()
        self.scene_ids = list(scene_ids)
        self.buckets = bucket_of(self.scene_ids, settings.stage1.num_buckets)
        torch.manual_seed(settings.seed)  # initial weights of the shared model, alike on every worker
        self.shared = SharedModel(settings).to(self.workers.device)
        self.views = list(scenes)
        self.scenes = [prepare_scene(self.shared, views) for views in scenes]
        self.row = {scene.scene_id: row for row, scene in enumerate(self.scenes)}
        self.table = self.shared.random_params([stream(settings.seed, "start", s.scene_id) for s in self.scenes])
        self.phase_index, self.epoch, self.seconds = 0, 0, 0.0
        self.optimiser: torch.optim.Adam | None = None
        self.row_optimisers: dict[str, RowAdam] = {}

    # ------------------------------------------------------------------ the run

    def run(self, on_epoch: Callable[[EpochReport], None], resume: Path | None = None) -> None:
        """All phases, from the start or from the checkpoint folder `resume`, then the statistics for stage 2.

        on_epoch is called after every epoch and may call `save`.
        """
        phases = active_phases(self.settings)
        if resume:
            load_checkpoint(self, resume)
            if self.phase_index == len(phases):
                return  # the statistics too are in the checkpoint
        total = sum(getattr(self.settings.stage1, name).num_epochs for name in phases)
        while self.phase_index < len(phases):
            name = phases[self.phase_index]
            phase: Stage1Phase = getattr(self.settings.stage1, name)
            step = self._enter(name, phase)
            if resume:
                load_optimisers(self, resume)
                resume = None
            while self.epoch < phase.num_epochs:
                start = time.perf_counter()
                losses = self._epoch(name, phase, step)
                self.epoch += 1
                seconds = time.perf_counter() - start
                self.seconds += seconds
                done = sum(getattr(self.settings.stage1, p).num_epochs for p in phases[: self.phase_index])
                report = (self.epoch, done + self.epoch, total, losses, seconds)
                on_epoch(EpochReport(name, *report))
            self.phase_index, self.epoch = self.phase_index + 1, 0
        self._finish()

    def save(self, folder: Path) -> None:
        """Writes this worker's part of a checkpoint: its scenes, and on rank 0 the shared model."""
        save_checkpoint(self, folder)

    # ------------------------------------------------------------------ phases

    def _enter(self, name: str, phase: Stage1Phase) -> nn.Module:
        """Readies the shared model, caches and optimisers for a phase. → the data-parallel step."""
        on_latents = [p for p in active_phases(self.settings) if p != "autoencoder"]
        if name in on_latents[:1] and not self.epoch:
            self._derive_scale()
            self.shared.update_background()
        if name == "adapt":
            self.shared.update_background()
            self.shared.adapt_decoder()
        if phase.loss.latent and not phase.encodes_views:
            for scene in self.scenes:
                encode_scene(self.shared, scene)
        self.optimiser = shared_optimiser(self.shared, phase.lr)
        dense = self.settings.stage1.dense_adam
        tables = {"micro_planes": self.table.micro_planes, "coefs": self.table.coefs}
        self.row_optimisers = {
            key: RowAdam(table, dense) for key, table in tables.items() if getattr(phase.lr, key) and table.numel()
        }
        scratch = name == "autoencoder"
        step = PhaseStep(self.shared, phase, self.settings.autoencoder.kl_weight if scratch else 0.0)
        return self.workers.wrap(step) if self.optimiser else step

    def _derive_scale(self) -> None:
        """The scale of the latents' normalisation, measured once, on the autoencoder that the scenes start from."""
        autoencoder = self.shared.autoencoder
        if isinstance(autoencoder, LatentAutoencoder) and self.settings.autoencoder.latent_scale is None:
            sums = torch.zeros(3, dtype=torch.float64, device=self.shared.device)
            for scene in self.scenes:
                with torch.no_grad():
                    raw = autoencoder.encode_raw(scene.float_images(slice(0, 8)))[0].double()
                sums += torch.stack([raw.sum(), raw.square().sum(), raw.new_tensor(raw.numel())])
            total, squares, count = self.workers.sum(sums).tolist()
            std = (squares / count - (total / count) ** 2) ** 0.5
            autoencoder.latent_scale.fill_(TARGET_STD / std)

    def _entries(self, phase: Stage1Phase) -> dict[int, list[Entry]]:
        owned: dict[int, list[Entry]] = {}
        for scene in self.scenes:
            views: list[int | None] = [None] if phase.rays_per_item else list(range(scene.num_views))
            owned.setdefault(self.buckets[scene.scene_id], []).extend((scene.scene_id, view) for view in views)
        return owned

    def _steps_per_epoch(self, phase: Stage1Phase) -> int:
        if phase.steps_per_epoch:
            return phase.steps_per_epoch
        views = torch.tensor(float(sum(s.num_views for s in self.scenes)), device=self.shared.device)
        return max(1, round(self.workers.sum(views).item() / phase.items_per_step))

    def _epoch(self, name: str, phase: Stage1Phase, step: nn.Module) -> dict[str, float]:
        steps = self._steps_per_epoch(phase)
        per_bucket = phase.items_per_step // self.settings.stage1.num_buckets
        names = (self.settings.seed, name, self.epoch)
        sums: dict[str, Tensor] = {}
        batches = epoch_batches(self._entries(phase), per_bucket, steps, *names)
        for index, entries in enumerate(batches):
            items = [
                Item(self.scenes[self.row[scene_id]], view, stream(*names, index, place, scene_id))
                for place, (scene_id, view) in entries
            ]
            factor = lr_factor(phase, self.epoch, (self.epoch * steps + index) / (phase.num_epochs * steps))
            for key, value in self._step(phase, step, items, factor).items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value
        keys = sorted(sums)
        total = self.workers.sum(torch.stack([sums[key] for key in keys])) / (steps * phase.items_per_step)
        losses = dict(zip(keys, total.tolist()))
        if not all(value == value and abs(value) != float("inf") for value in losses.values()):
            raise FloatingPointError(f"stage 1, {name}, epoch {self.epoch}: a loss is not finite: {losses}")
        return losses

    def _step(self, phase: Stage1Phase, step: nn.Module, items: list[Item], factor: float) -> dict[str, Tensor]:
        """One step. The loss is the sum over the global batch over its size: data-parallel averages over workers,
        so a worker's part is scaled by their number; its scenes' own gradients are scaled back."""
        batch = make_batch(self.shared, phase, items)
        rows, place = torch.unique(
            torch.tensor([self.row[item.scene.scene_id] for item in items], device=self.shared.device),
            return_inverse=True,
        )
        leaves = {key: optimiser.leaf(rows) for key, optimiser in self.row_optimisers.items()}
        micro = leaves["micro_planes"] if "micro_planes" in leaves else self.table.micro_planes[rows]
        coefs = leaves["coefs"] if "coefs" in leaves else self.table.coefs[rows]
        total, losses = step(batch, micro[place], coefs[place])
        (total * self.workers.size / phase.items_per_step).backward()
        field_frozen = phase.field_frozen_from_epoch is not None and self.epoch >= phase.field_frozen_from_epoch
        set_learning_rates(self.optimiser, factor, ("field",) if field_frozen else ())
        if self.optimiser:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        for key, leaf in leaves.items():
            if leaf.grad is not None:
                self.row_optimisers[key].step(rows, leaf.grad / self.workers.size, getattr(phase.lr, key) * factor)
        return losses

    # ------------------------------------------------------------------ the end

    def _finish(self) -> None:
        """Derives the background for stage 2 and gathers the statistics that its scenes start from."""
        self.shared.update_background()
        coefs, micro = self.table.coefs, self.table.micro_planes
        ones = torch.tensor([float(len(coefs)), float(micro.numel())], device=self.shared.device)
        num_scenes, num_texels = self.workers.sum(ones).tolist()
        self.shared.coefs_mean.copy_(self.workers.sum(coefs.sum(0)) / num_scenes)
        deviation = (coefs - self.shared.coefs_mean).square().sum(0)
        self.shared.coefs_std.copy_((self.workers.sum(deviation) / num_scenes).sqrt())
        if num_texels:
            self.shared.micro_mean.copy_(self.workers.sum(micro.sum()) / num_texels)
            spread = (micro - self.shared.micro_mean).square().sum()
            self.shared.micro_std.copy_((self.workers.sum(spread) / num_texels).sqrt())

    def evaluate(self) -> dict[str, dict[str, float | None]]:
        """Metrics of this worker's scenes, by scene id."""
        return {
            views.scene_id: evaluate_scene(self.shared, self.table[row : row + 1], views)
            for row, views in enumerate(self.views)
        }


def check_workers(settings: Settings, num_workers: int) -> None:
    """Raises SettingsError unless the workers can share the scene buckets equally."""
    if settings.stage1.num_buckets % num_workers:
        raise SettingsError(
            f"{num_workers} workers cannot share stage1.num_buckets = {settings.stage1.num_buckets} equally: "
            "use a number of workers that divides it"
        )
