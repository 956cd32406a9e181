"""The three losses of the paper, per item of a batch: latent, RGB, autoencoder (all mean squared errors); and the
student's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.cameras import Rays
from scaling.config import LossWeights
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, fuse_planes, total_variation


@dataclass(frozen=True)
class Batch:
    """B items: rays of one scene each. Whole views have all h · w rays of a latent image, in order.

    rays [B, R], the cells [B, CELLS³] of their scenes (see `SharedModel.cells`; None where rays are sampled evenly),
    and pixels [B, R] of their latent image that they go through, None for whole views;
    uniforms [B, R, U] in [0, 1); latents [B, R, C] cached targets in [−1, 1]; images [B, 3, H, W] in [0, 1] and noise
    [B, C, h, w] where views are decoded or encoded. None where the losses do not ask for it.
    """

    rays: Rays | None = None
    cells: Tensor | None = None
    pixels: Tensor | None = None
    uniforms: Tensor | None = None
    latents: Tensor | None = None
    images: Tensor | None = None
    noise: Tensor | None = None


def per_item(difference: Tensor) -> Tensor:
    """Mean square of each item, [B, …] → [B]."""
    return difference.square().flatten(1).mean(1)


def pixel_error(images: Tensor, truth: Tensor) -> Tensor:
    """MSE with RGB in [−1, 1], as the paper takes it; images come in [0, 1], hence the factor 4. → [B]."""
    return 4 * per_item(images - truth)


def item_losses(
    shared: SharedModel,
    weights: LossWeights,
    batch: Batch,
    params: SceneParams | None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The unweighted losses that `weights` asks for, each [B]. params: rows of the items' scenes, in their order.

    latent ‖E(x) − z̃‖², rgb ‖x − D(z̃)‖², autoencoder ‖x − D(E(x))‖² with its divergence kl, of an image x (in [−1, 1])
    and its rendered latents z̃; each a mean over values; student: see `student_error`. Where views are encoded, `latent`
    moves E too. decode: D of `rgb`, latents [B, C, h, w] → images [B, 3, H, W] in [0, 1]; None: the shared model's.
    """
    losses: dict[str, Tensor] = {}
    encoded: Tensor | None = None
    if weights.autoencoder or (weights.latent and batch.latents is None):
        assert batch.images is not None and batch.noise is not None
        encoded, losses["kl"] = shared.autoencoder.encode_sample(batch.images, batch.noise)
    if weights.autoencoder:
        assert encoded is not None and batch.images is not None
        losses["autoencoder"] = pixel_error(shared.autoencoder.decode(encoded), batch.images)
    if weights.latent or weights.rgb or weights.student:
        assert batch.rays is not None and params is not None
        colours = shared.render(params, batch.rays, batch.uniforms, batch.pixels, batch.cells).colours
        if weights.latent:
            target = batch.latents if encoded is None else encoded.flatten(2).transpose(1, 2)
            assert target is not None
            losses["latent"] = per_item(colours - target)
        if weights.rgb:
            assert batch.images is not None
            losses["rgb"] = pixel_error((decode or shared.decode)(shared.as_latents(colours)), batch.images)
        if weights.student:
            assert batch.images is not None
            losses["student"] = student_error(shared, shared.as_latents(colours), batch.images)
    return losses


def student_error(shared: SharedModel, latents: Tensor, images: Tensor) -> Tensor:
    """How far the student S is from the decoder D on rendered latents z̃ [B, C, h, w] of images [B, 3, H, W]. → [B].

    ‖S(z̃) − D(z̃)‖² + ‖(S(z) − S(z̃)) − (D(z) − D(z̃))‖², with RGB in [−1, 1] and z the encoded image: towards it stage 2
    moves scenes, so the student must change as the decoder does on the way. D stands still.
    """
    assert shared.student is not None
    with torch.no_grad():
        latents = latents.detach()
        towards = shared.autoencoder.encode(images)
        wanted, wanted_there = shared.decode(torch.cat([latents, towards])).chunk(2)
    found, found_there = shared.student(torch.cat([latents, towards])).chunk(2)
    return pixel_error(found, wanted) + pixel_error(found_there - found, wanted_there - wanted)


def variation(shared: SharedModel, params: SceneParams) -> Tensor:
    """Total variation of the fused planes, summed over items; params: rows of the items' scenes. → scalar."""
    planes = fuse_planes(params.micro_planes, params.coefs, shared.base_planes)
    return len(planes) * total_variation(planes)


def weighted(losses: dict[str, Tensor], weights: LossWeights, kl_weight: float = 0.0) -> Tensor:
    """Weighted sum of item losses, [B]."""
    factors = {**weights.model_dump(), "kl": kl_weight}
    terms = [factors[name] * loss for name, loss in losses.items() if factors[name]]
    return torch.stack(terms).sum(0)
