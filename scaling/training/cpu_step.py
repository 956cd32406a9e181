"""One step of a frozen fit on random rays, on a CPU: the losses and their gradients, without autograd.

`RayTable.batch`, `item_losses` and autograd do this in a hundred small operations. Here it takes a few compiled loops,
and matrix products of the field and the base planes, in memory that steps reuse: a third of the time.
`fit_random_rays.AutogradStep` is the same step by autograd, for GPUs and all other phases; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scaling.config import Stage2Phase
from scaling.models import cpu_kernels
from scaling.models.box import STEPS
from scaling.models.cpu_ops import as_numpy, takes
from scaling.models.sampling import BLUR, EVENLY
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, axis_columns
from scaling.training.random_ray_batches import RayTable


class CpuStep:
    """The losses and gradients of a step, by compiled loops. table: rays of all scenes that are fitted together."""

    def __init__(self, shared: SharedModel, phase: Stage2Phase, table: RayTable) -> None:
        self.weight, self.table = phase.loss.latent, table
        renderer, shape = shared.renderer, shared.settings.representation
        self.columns = np.array(axis_columns(renderer.plane_axes))
        self.product = renderer.combine == "product"
        self.low, self.high = map(as_numpy, renderer.box.bounds)
        self.unit = np.float32(float(renderer.box.unit))
        self.backgrounds = as_numpy(shared.background.view(-1, shared.background.shape[-1]))
        field = shared.field
        self.layers = [
            (layer.weight.detach(), layer.bias.detach()) for layer in (field.hidden, *field.more, field.head)
        ]
        self.base = shared.base_planes.detach().permute(0, 1, 3, 4, 2).flatten(1)  # a texel's features side by side
        self.counts = shape.micro_features, shape.macro_features
        self.room: dict[str, Tensor] = {}  # memory that steps reuse, by name
        self.mixed: Tensor | None = None  # the coefs that mixed the base planes in room["texels"]

    @staticmethod
    def serves(shared: SharedModel, phase: Stage2Phase) -> bool:
        """Whether a phase on random rays needs no more than `CpuStep` does: samples in hulls, the latent loss alone, a
        field with ReLU, and single precision on a CPU."""
        plain = not (phase.loss.rgb or phase.loss.student or phase.tv_weight)
        hulls = shared.settings.rendering.sampled == "hull"
        relu = shared.settings.representation.field_activation == "relu"
        return plain and hulls and relu and takes(shared.background, shared.base_planes)

    @torch.no_grad()
    def __call__(
        self, values: SceneParams, moving: Sequence[str], rows: Tensor, uniforms: Tensor, cells: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step's losses and gradients.

        values: params of the scenes in `rows` [N] of the table; uniforms [N, R, 1 + D] in [0, 1); cells [N, CELLS³]
        → the scenes' weighted losses [N], and the gradients of their sum for the names of `values` in `moving`.
        """
        micro = values.micro_planes
        texels = self._texels(micro, values.coefs)
        pixels, targets, points, lengths = self._draw(rows, uniforms, cells)
        # Forward: what each plane gives at a point is kept in `sampled`, as the gradient of a product needs it.
        features = self._new("features", *points.shape[:2], texels.shape[-1])
        sampled = self._new("sampled", *points.shape[:2], len(self.columns), texels.shape[-1])
        cpu_kernels.sample_and_combine(
            texels.numpy(), points.numpy(), self.columns, self.product, True, sampled.numpy(), features.numpy()
        )
        heads, hidden = self._field(features.flatten(0, 1))
        # One loop composites a ray and finds its error's gradient, while its samples are in the core's cache.
        errors, at_heads = torch.empty(len(rows)), self._new("at_heads", *heads.shape)
        shape = *uniforms.shape[:2], -1, heads.shape[1]
        cpu_kernels.composite_error(
            heads.view(shape).numpy(), lengths.numpy(), self.backgrounds, pixels.numpy(), targets.numpy(), self.weight,
            errors.numpy(), at_heads.view(shape).numpy(),
        )  # fmt: skip
        # Backward: macro features lie behind micro features, so where coefs stand still the first F_mic are enough.
        at_features = self._back_through_field(at_heads, hidden).view(features.shape)
        at_texels = self._new("at_texels", *texels.shape[:3], sum(self.counts) if "coefs" in moving else self.counts[0])
        cpu_kernels.scatter_gradient(
            at_features.numpy(), sampled.numpy(), points.numpy(), self.columns, self.product, at_texels.zero_().numpy()
        )
        found: dict[str, Tensor] = {}
        if "micro_planes" in moving:
            own = at_texels[..., : self.counts[0]].unflatten(2, micro.shape[-2:])
            found["micro_planes"] = own.permute(0, 1, 4, 2, 3)
        if "coefs" in moving:
            found["coefs"] = at_texels[..., self.counts[0] :].flatten(1) @ self.base.T
        return errors, found

    def _new(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory that every step reuses: getting megabytes from the system takes longer than filling
        them."""
        if name not in self.room or self.room[name].shape != shape:
            self.room[name] = torch.empty(shape)
        return self.room[name]

    def _texels(self, micro: Tensor, coefs: Tensor) -> Tensor:
        """Fused planes [N, P, K², F], with features in the order of `fuse_planes`. The base planes are mixed again only
        when coefs differ from those of the step before."""
        count, macro = self.counts
        texels = self._new("texels", *micro.shape[:2], micro.shape[-1] ** 2, count + macro)
        texels[..., :count] = micro.permute(0, 1, 3, 4, 2).flatten(2, 3)
        if macro and (self.mixed is None or not torch.equal(self.mixed, coefs)):
            texels[..., count:] = (coefs @ self.base).view(*texels.shape[:3], macro)
            self.mixed = coefs.clone()
        return texels

    def _draw(self, rows: Tensor, uniforms: Tensor, cells: Tensor | None) -> tuple[Tensor, ...]:
        """Rays and their samples: pixels [N, R], targets [N, R, C], points [N, R · D, 3], lengths [N, R, D − 1]."""
        assert cells is not None  # `serves` allows only scenes with hulls, which have cells
        table, (scenes, rays, numbers) = self.table, uniforms.shape
        of_all = table.drawn, table.counts[:, 0], table.cam2world, table.intrinsics, table.latents
        pixels = torch.empty(scenes, rays, dtype=torch.int64)
        targets = torch.empty(scenes, rays, table.latents.shape[-1])
        points = self._new("points", scenes, rays, numbers - 1, 3)
        lengths = torch.empty(scenes, rays, numbers - 2)
        cpu_kernels.drawn_samples(
            as_numpy(uniforms), as_numpy(rows), *map(as_numpy, of_all), table.size, self.low, self.high, self.unit,
            as_numpy(cells), STEPS, BLUR, np.float32(EVENLY),
            *(tensor.numpy() for tensor in (pixels, targets, points, lengths)),
        )  # fmt: skip
        return pixels, targets, points.flatten(1, 2), lengths

    def _field(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """features [N, F] → the outputs of the field's head [N, 1 + C], and the activations of its hidden layers."""
        hidden: list[Tensor] = []
        for weight, bias in self.layers[:-1]:
            features = torch.addmm(bias, features, weight.T).relu_()
            hidden.append(features)
        weight, bias = self.layers[-1]
        return torch.addmm(bias, features, weight.T), hidden

    def _back_through_field(self, gradient: Tensor, hidden: list[Tensor]) -> Tensor:
        """Gradient of the loss in the head's outputs [N, 1 + C] → its gradient in the features [N, F]."""
        for (weight, _), active in zip(self.layers[:0:-1], hidden[::-1]):
            gradient = torch.ops.aten.threshold_backward(gradient @ weight, active, 0)
        return gradient @ self.layers[0][0]
