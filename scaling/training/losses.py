"""The losses, per item of a batch: the paper's latent, RGB and autoencoder losses (mean squared errors), and the
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
class CameraRays:
    """What is rendered of B items: R rays of each item's scene. Several items may show one scene.

    rays [B, R]; uniforms [B, R, U] in [0, 1), which place the rays' samples, None: in the middle of each stratum;
    pixels [B, R]: the pixels of a latent image that the rays go through, None: all h · w of whole views, in order;
    cells [B, CELLS³] of the items' scenes (see `SharedModel.cells`), None with rendering.sampled: cuboid.
    """

    rays: Rays
    uniforms: Tensor | None
    pixels: Tensor | None
    cells: Tensor | None


@dataclass(frozen=True)
class RayBatch(CameraRays):
    """Random rays, or those of a view, with the encoded latents [B, R, C] in [−1, 1] that they should show."""

    latents: Tensor


@dataclass(frozen=True)
class ViewBatch(CameraRays):
    """A view of each scene, or a square of it, with all of its rays.

    images [B, 3, H, W] in [0, 1]; noise [B, C, h, w], with which the encoder samples, None where the step does not
    encode; latents [B, h · w, C] that were encoded before, None where the step encodes or no loss needs them.
    """

    images: Tensor
    noise: Tensor | None = None
    latents: Tensor | None = None


Batch = RayBatch | ViewBatch


def per_item(difference: Tensor) -> Tensor:
    """Mean square of each item: [B, …] → [B]."""
    return difference.square().flatten(1).mean(1)


def pixel_error(images: Tensor, truth: Tensor) -> Tensor:
    """MSE of each item with RGB in [−1, 1], as in the paper; images are in [0, 1], hence the factor 4. → [B]."""
    return 4 * per_item(images - truth)


def item_losses(
    shared: SharedModel,
    weights: LossWeights,
    batch: Batch,
    params: SceneParams,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The unweighted losses that `weights` asks for, each [B]. params: rows of the items' scenes, in their order.

    For an image x (in [−1, 1]) and its rendered latents z̃, each a mean over values: latent ‖E(x) − z̃‖²; rgb
    ‖x − D(z̃)‖²; autoencoder ‖x − D(E(x))‖²; kl, the divergence of E(x); student: see `student_error`. Where the step
    encodes, `latent` moves E too. decode: D of `rgb`, latents [B, C, h, w] → images [B, 3, H, W] in [0, 1]; None: the
    shared model's.
    """
    if isinstance(batch, RayBatch):
        return {"latent": per_item(rendered(shared, batch, params) - batch.latents)}
    losses: dict[str, Tensor] = {}
    target = batch.latents
    if weights.autoencoder or (weights.latent and target is None):
        encoded, losses["kl"] = shared.autoencoder.encode_sample(batch.images, batch.noise)
        target = encoded.flatten(2).transpose(1, 2)
        if weights.autoencoder:
            losses["autoencoder"] = pixel_error(shared.autoencoder.decode(encoded), batch.images)
    if weights.latent or weights.rgb or weights.student:
        colours = rendered(shared, batch, params)
        if weights.latent and target is not None:
            losses["latent"] = per_item(colours - target)
        if weights.rgb:
            losses["rgb"] = pixel_error((decode or shared.decode)(shared.as_latents(colours)), batch.images)
        if weights.student:
            losses["student"] = student_error(shared, shared.as_latents(colours), batch.images)
    return losses


def rendered(shared: SharedModel, rays: CameraRays, params: SceneParams) -> Tensor:
    """The colours [B, R, C] in [−1, 1] of a batch's rays through the scenes `params`."""
    return shared.render(params, rays.rays, rays.uniforms, rays.pixels, rays.cells).colours


def student_error(shared: SharedModel, latents: Tensor, images: Tensor) -> Tensor:
    """How far the student S is from the decoder D on rendered latents z̃ [B, C, h, w] of images [B, 3, H, W]. → [B].

    ‖S(z̃) − D(z̃)‖² + ‖(S(z) − S(z̃)) − (D(z) − D(z̃))‖², with RGB in [−1, 1] and z the encoded image. Stage 2 moves a
    scene's z̃ towards z, so S must change as D does on the way from z̃ to z. D stands still.
    """
    assert shared.student is not None
    with torch.no_grad():
        latents = latents.detach()
        towards = shared.autoencoder.encode(images)
        wanted, wanted_there = shared.decode(torch.cat([latents, towards])).chunk(2)
    found, found_there = shared.student(torch.cat([latents, towards])).chunk(2)
    return pixel_error(found, wanted) + pixel_error(found_there - found, wanted_there - wanted)


def variation(shared: SharedModel, params: SceneParams) -> Tensor:
    """Total variation of the fused planes, summed over items. params: rows of the items' scenes. → scalar."""
    planes = fuse_planes(params.micro_planes, params.coefs, shared.base_planes)
    return len(planes) * total_variation(planes)


def weighted(losses: dict[str, Tensor], weights: LossWeights, kl_weight: float = 0.0) -> Tensor:
    """For each item, the weighted sum of its losses, [B]."""
    factors = {**weights.model_dump(), "kl": kl_weight}
    terms = [factors[name] * loss for name, loss in losses.items() if factors[name]]
    return torch.stack(terms).sum(0)
