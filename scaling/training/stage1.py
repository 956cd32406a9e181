"""Stage 1: train the shared model on the first scenes, as one worker does it.

Phases: `autoencoder` (0, only where it is trained from scratch), `warmup` (1a, on cached latents), `joint` (1b,
everything), `adapt` (1c, a copy of the decoder learns rendered latents), `distil` (1d, a small student learns that
decoder). The shared model's gradients are averaged over workers. A scene's micro planes and coefs belong to the worker
that owns its bucket and are never synchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from scaling.config import Phase, Settings, SettingsError
from scaling.data.scene_views import SceneViews
from scaling.models.autoencoders.normalised import TARGET_STD, NormalisedAutoencoder
from scaling.models.shared_model import SharedModel
from scaling.training.checkpoints.state import load_checkpoint, load_optimisers, save_checkpoint
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_frozen import hulls_of
from scaling.training.measure.background import common_colour, measure_background
from scaling.training.measure.box import set_box
from scaling.training.phase_loop import EpochReport, Phases, PhaseStep
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.sampler import bucket_of
from scaling.training.training_scene import encode_scene, prepare_scene

PHASES = ("autoencoder", "warmup", "joint", "adapt", "distil")


def active_phases(settings: Settings) -> list[str]:
    """Names of the phases that a run goes through, in order."""
    phases = [name for name in PHASES if getattr(settings.stage1, name).num_epochs]
    return phases if settings.autoencoder.trains_first else [name for name in phases if name != "autoencoder"]


class Stage1(Phases):
    """Stage 1's phases on one worker.

    scene_ids: all scenes of the stage, in order; scenes: those that this worker owns; bounds [2, 3]: the cuboid around
    all scenes, where it has been measured (see `set_box`).
    """

    def __init__(
        self,
        settings: Settings,
        scene_ids: Sequence[str],
        scenes: Sequence[SceneViews],
        workers: Workers | None = None,
        bounds: Tensor | None = None,
    ) -> None:
        workers = workers or Workers()
        torch.manual_seed(settings.seed)  # every worker starts with the same weights of the shared model
        shared = SharedModel(settings).to(workers.device)
        self.scene_ids = list(scene_ids)
        self.views = list(scenes)
        shown = settings.rendering.background == "views"
        self.background_colour = common_colour(self.views, workers) if shown else torch.ones(3)
        if shared.background.dim() == 1:
            shared.background.copy_(self._plain_background(shared))
        set_box(shared.renderer.box, bounds, self.views, shared.latent_size, workers)
        ready = [prepare_scene(shared, views) for views in scenes]
        table = shared.random_params([stream(settings.seed, "start", views.scene_id) for views in scenes])
        super().__init__(
            settings,
            shared,
            ready,
            table=replace(table, hull=hulls_of(ready)),
            phases={name: getattr(settings.stage1, name) for name in active_phases(settings)},
            identity={"scene_ids": self.scene_ids, "settings": settings.model_dump(exclude={"stage2"})},
            buckets=bucket_of(self.scene_ids, settings.stage1.num_buckets),
            workers=workers,
        )

    def run(self, on_epoch: Callable[[EpochReport], None], resume: Path | None = None) -> None:
        """Go through all phases, from the start or from the checkpoint folder `resume`.

        Then gather the statistics for stage 2. on_epoch is called after every epoch and may call `save`. Raises
        SettingsError where the checkpoint belongs to another job, Diverged where numbers are no longer finite.
        """
        if resume:
            load_checkpoint(self, resume)
            if self.at_the_end:
                return  # the checkpoint already holds the statistics
        self.run_phases(self._enter, on_epoch, (lambda: load_optimisers(self, resume)) if resume else None)
        self._finish()

    def save(self, folder: Path) -> None:
        """Write this worker's part of a checkpoint: its scenes, and on rank 0 the shared model."""
        save_checkpoint(self, folder)

    def _enter(self, name: str, phase: Phase) -> PhaseStep:
        """Make the shared model and the caches ready for a phase."""
        # The first phase on latents fixes their scale, on the autoencoder as phase 0 left it; a resume loads the scale.
        first_on_latents = next((p for p in self.phases if p != "autoencoder"), None)
        if name == first_on_latents and not self.epoch:
            self._derive_scale()
            self._update_background()
        if name in ("adapt", "distil"):
            self._update_background()
        if name == "adapt":
            self.shared.adapt_decoder()
        if name == "distil" and self.shared.student is None:
            with torch.random.fork_rng(devices=[]):  # the same weights whatever was drawn before, also after a resume
                torch.manual_seed(stream(self.settings.seed, "student").initial_seed())
                self.shared.add_student()
        if phase.loss.latent and not phase.encodes_views:
            self.scenes = [encode_scene(self.shared, scene) for scene in self.scenes]
        return PhaseStep(self.shared, phase, self.settings.autoencoder.kl_weight if name == "autoencoder" else 0.0)

    def _derive_scale(self) -> None:
        """Measure the scale of the latents' normalisation, once, on the autoencoder that the scenes start from."""
        autoencoder = self.shared.autoencoder
        if isinstance(autoencoder, NormalisedAutoencoder) and self.settings.autoencoder.latent_scale is None:
            sums = torch.zeros(3, dtype=torch.float64, device=self.shared.device)
            for scene in self.scenes:
                with torch.no_grad():
                    raw = autoencoder.encode_raw(scene.float_images(slice(0, 8)))[0].double()
                sums += torch.stack([raw.sum(), raw.square().sum(), raw.new_tensor(raw.numel())])
            total, squares, count = self.workers.sum(sums).tolist()
            std = (squares / count - (total / count) ** 2) ** 0.5
            autoencoder.latent_scale.fill_(TARGET_STD / std)

    def _update_background(self) -> None:
        """Derive the background again, from the autoencoder as it stands now."""
        shared = self.shared
        if shared.background.dim() == 1:
            background = self._plain_background(shared)
        else:
            background = measure_background(shared, self.scenes, self.background_colour, self.workers)
        shared.background.copy_(background)

    def _plain_background(self, shared: SharedModel) -> Tensor:
        """The latent [C] of an image of the background's colour."""
        return shared.autoencoder.background(shared.settings.data.image_size, shared.device, self.background_colour)

    def _finish(self) -> None:
        """Derive the background for stage 2, and gather the statistics that its scenes start from."""
        self._update_background()
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
    """Raise SettingsError where a worker would have no scene bucket of its own."""
    if num_workers > settings.stage1.num_buckets:
        raise SettingsError(
            f"{num_workers} workers for stage1.num_buckets = {settings.stage1.num_buckets}: "
            "every worker needs a bucket; lower --num-workers or raise stage1.num_buckets"
        )
