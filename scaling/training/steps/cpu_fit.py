"""Steps of a frozen fit on random rays, on a CPU: the losses, their gradients and Adam, without autograd.

Autograd does a step in a hundred small operations over all scenes. Here a compiled loop takes all steps of a span,
scene by scene, in memory that steps reuse: a scene's numbers stay in the core's cache. `fit_random_rays.AutogradFit`
takes the same steps by autograd, for GPUs and all other phases; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scaling.config import Stage2Phase
from scaling.models.cpu_ops import as_numpy
from scaling.models.cpu_render import one_blas_thread, takes_model, world_of
from scaling.models.cpu_render_loops import World
from scaling.models.rounding import LEVELS
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.random_ray_batches import RayTable
from scaling.training.steps.cpu_fit_loops import Moving, Room, Scene, Task, fit_scene

if TYPE_CHECKING:
    from scaling.training.steps.autograd_fit import Span


class CpuFit:
    """Takes steps by compiled loops. table: rays of all scenes that are fitted together; params: theirs, which move in
    place; texels of their micro planes lie side by side in memory (see `texels_together`)."""

    def __init__(
        self, shared: SharedModel, phase: Stage2Phase, table: RayTable, params: SceneParams, micro_dtype: str
    ) -> None:
        self.phase, self.table = phase, table
        self.world, self.task = world_of(shared), _task(shared, phase)
        self.levels = tuple(map(np.float32, LEVELS.get(micro_dtype, (0, 0))))
        self.planes = params.micro_planes.permute(0, 1, 3, 4, 2).flatten(2, 3).numpy()  # [S, P, K², F_mic], not a copy
        self.own = self.planes.shape[-1]
        # Loops take eight numbers at once: planes are padded where that fits into a texel.
        padded = min(-(-self.own // 8) * 8, len(self.world.forward[0]))
        self.micro = np.zeros((*self.planes.shape[:-1], padded), np.float32)
        self.micro[..., : self.own] = self.planes
        self.coefs = params.coefs.numpy()
        self.moments = [np.zeros_like(values) for values in (self.micro, self.micro, self.coefs, self.coefs)]
        self.room: Room | None = None  # of the first span's number of rays

    @staticmethod
    def serves(shared: SharedModel, phase: Stage2Phase) -> bool:
        """Whether a phase on random rays needs no more than `CpuFit` does: a model that the loops take, and the latent
        loss alone."""
        plain = not (phase.loss.rgb or phase.loss.student or phase.tv_weight)
        return plain and takes_model(shared)

    def take(self, span: Span) -> Iterator[Tensor]:
        """Take the steps of a span. → for each step, the scenes' weighted losses [N]."""
        uniforms = as_numpy(span.uniforms)
        num_scenes, num_steps, num_rays, numbers = uniforms.shape
        if self.room is None:
            self.room = _room(self.world, self.micro.shape, self.own, num_rays, numbers - 1)
        losses = np.empty((num_scenes, num_steps), np.float32)
        factors = torch.stack([torch.as_tensor(factor).expand(num_scenes) for factor in span.factors], 1).numpy()
        moves = np.array(["micro_planes" in span.moving, "coefs" in span.moving])
        with one_blas_thread():
            for index, row in enumerate(span.rows.tolist()):
                rates = np.stack([factors[index] * self.phase.lr.micro_planes, factors[index] * self.phase.lr.coefs], 1)
                scene, moving = self._scene(row, span, index), self._moving(row, span, index)
                fit_scene(
                    uniforms[index], scene, self.world, self.task, moving, self.room,
                    rates.astype(np.float64), span.first, moves, losses[index],
                )  # fmt: skip
                self.planes[row] = self.micro[row, ..., : self.own]
        return iter(torch.from_numpy(losses.T))

    def _scene(self, row: int, span: Span, index: int) -> Scene:
        table = self.table
        assert span.cells is not None  # `serves` allows only scenes with hulls, which have cells
        of_scene = table.drawn[row, : int(table.counts[row])], table.cam2world[row], table.intrinsics[row]
        return Scene(*map(as_numpy, (*of_scene, table.latents[row], span.cells[index])))

    def _moving(self, row: int, span: Span, index: int) -> Moving:
        scale = np.empty((0, 0), np.float32) if span.scale is None else as_numpy(span.scale[index].flatten(1))
        micro_first, micro_second, coefs_first, coefs_second = (moments[row] for moments in self.moments)
        return Moving(
            self.own, self.micro[row], micro_first, micro_second, self.coefs[row], coefs_first, coefs_second,
            scale, *self.levels,
        )  # fmt: skip


def _task(shared: SharedModel, phase: Stage2Phase) -> Task:
    field = shared.field
    return Task(
        weight=float(phase.loss.latent),
        base=as_numpy(shared.base_planes.permute(0, 1, 3, 4, 2).flatten(1)),
        back=tuple(as_numpy(layer.weight) for layer in (field.hidden, *field.more, field.head)),
    )


def _room(world: World, shape: tuple[int, ...], own: int, num_rays: int, samples: int) -> Room:
    """Room for steps of num_rays rays. shape: [S, P, K², ≥ F_mic] of the micro planes; own: F_mic."""
    _, planes, places, padded = shape
    width = len(world.forward[0])
    points = num_rays * samples
    hidden = [len(bias[0]) for bias in world.biases[:-1]]

    def new(*sizes: int) -> Any:
        return np.zeros(sizes, np.float32)

    return Room(
        texels=new(1, planes, places, width),
        at_texels=new(1, planes, places, width),
        at_own=new(1, planes, places, padded),
        points=new(num_rays, samples, 3),
        lengths=new(1, num_rays, samples - 1),
        sampled=new(1, points, planes, width),
        features=new(points, width),
        at_features=new(points, width),
        hidden=tuple(new(points, size) for size in hidden),
        at_hidden=tuple(new(points, size) for size in hidden),
        heads=new(points, len(world.biases[-1][0])),
        at_heads=new(points, len(world.biases[-1][0])),
        mixed=new(planes * places * (width - own)),
        at_mixed=new(planes * places * (width - own)),
    )
