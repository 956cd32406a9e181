"""All rays of several scenes that meet something, in one table: a step takes its random rays by one look-up.

The same batches could be put together from `TrainingScene`s, scene by scene, as `make_batch` does for whole views. A
frozen fit takes hundreds of steps of a few dozen rays from each of many scenes; there the table is what keeps Python,
and on a GPU the launches and copies of every scene, out of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scaling.cameras import Rays
from scaling.models.shared import SharedModel
from scaling.training.losses import Batch
from scaling.training.scene_data import TrainingScene

STEPS_PER_DRAW = 64  # steps whose random numbers are drawn, and copied to the device, together


class RayTable:
    """scenes: encoded. What a ray is made of lies side by side: origin, direction, near, far, latents.

    RuntimeError where a scene has no latents.
    """

    def __init__(self, shared: SharedModel, scenes: Sequence[TrainingScene]) -> None:
        self.uniforms_per_ray = shared.renderer.uniforms_per_ray
        counts = [len(scene.hits) for scene in scenes]
        self.counts = torch.tensor(counts, device=shared.device, dtype=torch.float32)[:, None]
        self.numbers = torch.zeros(
            len(scenes), max(counts), 8 + shared.autoencoder.latent_channels, device=shared.device
        )
        self.pixels = torch.zeros(len(scenes), max(counts), dtype=torch.int64, device=shared.device)
        for row, scene in enumerate(scenes):
            if scene.latents is None:
                raise RuntimeError(f"scene {scene.scene_id} was not encoded before its rays were put into a table")
            rays, at = scene.rays, scene.hits
            ends = torch.stack([scene.near, scene.far], 1)
            parts = [rays.origins[at], rays.directions[at], ends[at], scene.latents[at]]
            self.numbers[row, : len(at)] = torch.cat(parts, 1)
            self.pixels[row, : len(at)] = at % shared.latent_size**2

    def batch(self, uniforms: Tensor, rows: Tensor) -> Batch:
        """A ray for each row of uniforms [N, R, 1 + uniforms_per_ray] in [0, 1), whose first number chooses it, of the
        scenes in `rows` [N]."""
        # A number just below 1 times a large count may round up to it.
        counts = self.counts[rows]
        chosen = (uniforms[..., 0] * counts).minimum(counts - 1).long()
        return self._look_up(rows[:, None], chosen, uniforms[..., 1:])

    def every_ray(self, rows: Tensor) -> Batch:
        """All rays of the scenes in `rows` [N], without random numbers. Not all of them are `real`."""
        return self._look_up(rows, slice(None), None)

    def real(self, rows: Tensor) -> Tensor:
        """Which places of the table hold rays of the scenes in `rows` [N]. [N, places], bool."""
        return torch.arange(self.numbers.shape[1], device=rows.device) < self.counts[rows]

    def draws(self, streams: Sequence[torch.Generator], rays_per_item: int, steps: int) -> Iterator[Tensor]:
        """The numbers of `steps` batches, [S, rays_per_item, 1 + uniforms_per_ray] of all scenes; what one gets depends
        on its own stream alone."""
        for start in range(0, steps, STEPS_PER_DRAW):
            size = (min(STEPS_PER_DRAW, steps - start), rays_per_item, 1 + self.uniforms_per_ray)
            drawn = torch.stack([torch.rand(size, generator=stream) for stream in streams], 1)
            yield from drawn.to(self.numbers.device)

    def _look_up(self, rows: Tensor, places: Tensor | slice, uniforms: Tensor | None) -> Batch:
        found = self.numbers[rows, places]
        origins, directions, near, far, latents = found.split([3, 3, 1, 1, found.shape[-1] - 8], -1)
        return Batch(
            rays=Rays(origins, directions),
            span=(near[..., 0], far[..., 0]),
            pixels=self.pixels[rows, places],
            uniforms=uniforms,
            latents=latents,
        )
