"""The rays of several scenes in one table: a step takes random rays of all scenes by one look-up.

`make_batch` could put the same batches together scene by scene, as it does for whole views. But a frozen fit takes
thousands of steps of a few dozen rays from each of many scenes. The table keeps Python loops over scenes, and on a GPU
the launches and copies of every scene, out of these steps. Rays are made only when they are drawn: a fit draws a part
of the half million that a scene has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scaling.cameras import rays_through
from scaling.models.shared_model import SharedModel
from scaling.training.losses import RayBatch
from scaling.training.training_scene import EncodedScene

STEPS_PER_DRAW = 64  # steps whose random numbers are drawn, and copied to the device, together


class RayTable:
    """The training rays of S scenes, which must have equally many views."""

    def __init__(self, shared: SharedModel, scenes: Sequence[EncodedScene]) -> None:
        self.uniforms_per_ray = shared.renderer.uniforms_per_ray
        self.size = shared.latent_size
        self.counts = torch.tensor([len(scene.drawn) for scene in scenes], device=shared.device)[:, None]
        self.drawn = torch.zeros(len(scenes), int(self.counts.max()), dtype=torch.int64, device=shared.device)
        for row, scene in enumerate(scenes):
            self.drawn[row, : len(scene.drawn)] = scene.drawn
        self.latents = torch.stack([scene.latents for scene in scenes])
        self.cam2world = torch.stack([scene.cam2world for scene in scenes])
        self.intrinsics = torch.stack([scene.intrinsics for scene in scenes])

    def batch(self, uniforms: Tensor, rows: Tensor, cells: Tensor | None) -> RayBatch:
        """Random rays of the scenes in `rows` [N], whose cells are [N, CELLS³].

        uniforms [N, R, 1 + uniforms_per_ray] in [0, 1): the first number of each ray chooses the ray, the others place
        its samples.
        """
        # Rounding may turn a number just below 1, times a large count, into the count itself.
        counts = self.counts[rows]
        place = (uniforms[..., 0] * counts).long().minimum(counts - 1)
        return self._look_up(rows[:, None], self.drawn[rows[:, None], place], uniforms[..., 1:], cells)

    def every_ray(self, rows: Tensor, cells: Tensor | None) -> RayBatch:
        """All rays of the scenes in `rows` [N], without random numbers; rays that are not `real` are padding."""
        return self._look_up(rows[:, None], self.drawn[rows], None, cells)

    def real(self, rows: Tensor) -> Tensor:
        """Which places of the table hold rays, and not padding, for the scenes in `rows` [N]. → [N, places] (bool)."""
        return torch.arange(self.drawn.shape[1], device=rows.device) < self.counts[rows]

    def draws(self, streams: Sequence[torch.Generator], rays_per_item: int, steps: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the random numbers of `steps` steps, some steps at a time: the number of the first of them, and numbers
        [S, n, rays_per_item, 1 + uniforms_per_ray] of n steps of all scenes.

        The numbers of a scene depend on its own stream alone.
        """
        for start in range(0, steps, STEPS_PER_DRAW):
            size = (min(STEPS_PER_DRAW, steps - start), rays_per_item, 1 + self.uniforms_per_ray)
            drawn = torch.stack([torch.rand(size, generator=stream) for stream in streams])
            yield start, drawn.to(self.drawn.device)

    def _look_up(self, rows: Tensor, chosen: Tensor, uniforms: Tensor | None, cells: Tensor | None) -> RayBatch:
        view, pixels = chosen // self.size**2, chosen % self.size**2
        return RayBatch(
            rays=rays_through(self.cam2world[rows, view], self.intrinsics[rows, view], pixels, self.size, self.size),
            cells=cells,
            pixels=pixels,
            uniforms=uniforms,
            latents=self.latents[rows, chosen],
        )
