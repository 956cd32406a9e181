"""A scene made ready for training: its training views, the table of all their rays, and their encoded latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.cameras import Rays
from scaling.config import Phase
from scaling.data.latents import REMEDY
from scaling.data.scenes import SceneError, SceneViews
from scaling.models.shared import SharedModel
from scaling.training.losses import Batch

# Views encoded at once: as many as stay in a core's cache, or as keep a GPU busy. With channels last, convolutions at
# growing widths read memory in order: 12.5 ms a view against 22 (32 at once, channels first) on a CPU.
ENCODE_CHUNK = {"cpu": 4}
ENCODE_CHUNK_ELSEWHERE = 64


@dataclass
class TrainingScene:
    """images uint8 [V, 3, H, W] (a quarter of the memory of floats); rays [V · h · w], their near and far, and hits:
    indices of those that have a part to sample; latents [V · h · w, C] in [−1, 1] once encoded; cached [V, C, h, w]:
    latents made before, by the encoder as it stands now."""

    scene_id: str
    images: Tensor
    rays: Rays
    near: Tensor
    far: Tensor
    hits: Tensor
    latents: Tensor | None = None
    cached: Tensor | None = None

    @property
    def num_views(self) -> int:
        return len(self.images)

    def float_images(self, views: Sequence[int] | slice = slice(None)) -> Tensor:
        """[len(views), 3, H, W] in [0, 1]."""
        return self.images[views].float() / 255


def prepare_scene(shared: SharedModel, views: SceneViews) -> TrainingScene:
    """The training views of a scene on the shared model's device. ValueError where none of their rays meets the box,
    SceneError (a ValueError) where its cached latents are not of the model's size."""
    train = list(views.train_views)
    images = as_bytes(views.images[train]).to(shared.device)
    rays = shared.latent_rays(views.cam2world[train], views.intrinsics[train])
    rays = Rays(rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)).to(shared.device)
    near, far, hit = shared.renderer.span(rays)
    hits = hit.nonzero()[:, 0]
    if not len(hits):
        raise ValueError(
            f"scene {views.scene_id}: no ray of its training views meets {shared.renderer.box}: check the poses' axes "
            "(OpenCV, camera-to-world) and scale"
        )
    cached = None if views.latents is None else _of_size(shared, views.scene_id, views.latents)[train]
    return TrainingScene(views.scene_id, images, rays, near, far, hits, cached=cached)


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, any shape."""
    return (images * 255).round().to(torch.uint8)


def _of_size(shared: SharedModel, scene_id: str, latents: Tensor) -> Tensor:
    found, needed = list(latents.shape[1:]), [shared.autoencoder.latent_channels, *[shared.latent_size] * 2]
    if found != needed:
        raise SceneError(scene_id, "cached latents", f"of shape {found}, the shared model's are {needed}; {REMEDY}")
    return latents


def encode_scene(shared: SharedModel, scene: TrainingScene) -> None:
    """Sets the scene's mean latents, [V · h · w, C] in [−1, 1]; those that were cached are taken as they are."""
    cached = scene.cached
    latents = encode_images(shared, scene.images) if cached is None else cached.to(shared.device).float()
    scene.latents = latents.permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def encode_images(shared: SharedModel, images: Tensor) -> Tensor:
    """uint8 [V, 3, H, W] on the model's device → mean latents [V, C, h, w] in [−1, 1]."""
    chunks = []
    for chunk in images.split(ENCODE_CHUNK.get(shared.device.type, ENCODE_CHUNK_ELSEWHERE)):
        pixels = (chunk.float() / 255).contiguous(memory_format=torch.channels_last)
        chunks.append(shared.autoencoder.encode(pixels))
    return torch.cat(chunks)


@dataclass(frozen=True)
class Item:
    """What a batch takes of a scene: one whole view, or (view None) random rays over all of them."""

    scene: TrainingScene
    view: int | None
    generator: torch.Generator


def make_batch(shared: SharedModel, phase: Phase, items: Sequence[Item]) -> Batch:
    """A batch [B, …] of B items with what the phase's losses ask for (see `Batch`); each draws from its own generator.

    RuntimeError where a loss needs the latents of a scene that was not encoded.
    """
    loss = phase.loss
    device = shared.device
    images = noise = latents = uniforms = rays = span = pixels = None
    if loss.rgb or loss.student or phase.encodes_views:
        images = torch.stack([item.scene.float_images([item.view])[0] for item in items if item.view is not None])
    if phase.encodes_views:
        size = (shared.autoencoder.latent_channels, shared.latent_size, shared.latent_size)
        noise = torch.stack([torch.randn(size, generator=item.generator) for item in items]).to(device)
    if loss.latent or loss.rgb or loss.student:
        picks = [_pick_rays(item, phase.rays_per_item, shared.latent_size**2) for item in items]
        rays = Rays(
            torch.stack([item.scene.rays.origins[pick] for item, pick in zip(items, picks)]),
            torch.stack([item.scene.rays.directions[pick] for item, pick in zip(items, picks)]),
        )
        span = (
            torch.stack([item.scene.near[pick] for item, pick in zip(items, picks)]),
            torch.stack([item.scene.far[pick] for item, pick in zip(items, picks)]),
        )
        numbers = (rays.origins.shape[1], shared.renderer.uniforms_per_ray)
        uniforms = torch.stack([torch.rand(numbers, generator=item.generator) for item in items]).to(device)
        if phase.rays_per_item:
            pixels = torch.stack([pick % shared.latent_size**2 for pick in picks if isinstance(pick, Tensor)])
        if loss.latent and not phase.encodes_views:
            latents = torch.stack([_latents(item.scene)[pick] for item, pick in zip(items, picks)])
    return Batch(rays, span, pixels, uniforms, latents, images, noise)


def _latents(scene: TrainingScene) -> Tensor:
    if scene.latents is None:
        raise RuntimeError(f"scene {scene.scene_id} was not encoded before a phase that needs its latents")
    return scene.latents


def _pick_rays(item: Item, rays_per_item: int | None, rays_per_view: int) -> Tensor | slice:
    if item.view is not None:
        return slice(item.view * rays_per_view, (item.view + 1) * rays_per_view)
    hits = item.scene.hits
    choice = torch.randint(len(hits), (rays_per_item or 0,), generator=item.generator)
    return hits[choice.to(hits.device)]
