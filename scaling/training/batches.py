"""Batches, put together scene by scene: random rays, whole views, or squares of views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.cameras import Rays, rays_through
from scaling.config import Phase
from scaling.models.shared_model import SharedModel
from scaling.training.losses import Batch, CameraRays, RayBatch, ViewBatch
from scaling.training.training_scene import EncodedScene, TrainingScene


@dataclass(frozen=True)
class Item:
    """What a batch takes of a scene: its training view `view`, or, in a phase with rays_per_item, random rays over all
    of its training views, whatever `view` is."""

    scene: TrainingScene
    view: int
    generator: torch.Generator


def make_batch(shared: SharedModel, phase: Phase, items: Sequence[Item]) -> Batch:
    """Make a batch of B items, with what the phase's losses need; each item draws from its own generator.

    Raises RuntimeError where a loss needs the latents of a scene that was not encoded.
    """
    if phase.rays_per_item:
        picks = [_random_pick(item, phase.rays_per_item) for item in items]
        return RayBatch(**vars(_camera_rays(shared, items, picks, False)), latents=_latents(items, picks))
    windows = [_window(item, phase.crop, shared.latent_size) for item in items]
    side = windows[0].side
    noise = (
        _noise(shared, items, side) if phase.encodes_views else None
    )  # before the uniforms, as ever: a seed keeps its numbers
    picks = [window.pick(item, shared.latent_size) for item, window in zip(items, windows)]
    rays = _camera_rays(shared, items, picks, whole=side == shared.latent_size)
    if not (phase.loss.rgb or phase.loss.student or phase.encodes_views):
        return RayBatch(**vars(rays), latents=_latents(items, picks))
    images = torch.stack([window.image(item, shared.autoencoder.shrink) for item, window in zip(items, windows)])
    needs_latents = phase.loss.latent and not phase.encodes_views
    return ViewBatch(
        **vars(rays), images=images, noise=noise, latents=_latents(items, picks) if needs_latents else None
    )


def _random_pick(item: Item, num_rays: int) -> Tensor:
    """Random latent pixels [R], as indices over all of the scene's training views."""
    drawn = item.scene.drawn
    return drawn[torch.randint(len(drawn), (num_rays,), generator=item.generator).to(drawn.device)]


@dataclass(frozen=True)
class Window:
    """A square of a view's latent pixels: its first row and column, and its side."""

    top: int
    left: int
    side: int

    def pick(self, item: Item, size: int) -> Tensor:
        """Its latent pixels [side²], as indices over all of the scene's training views of size² latent pixels each."""
        side = torch.arange(self.side, device=item.scene.drawn.device)
        return (item.view * size**2 + (self.top + side)[:, None] * size + self.left + side).flatten()

    def image(self, item: Item, shrink: int) -> Tensor:
        """Its image, [3, side · shrink, side · shrink] in [0, 1]."""
        rows, columns = (slice(first * shrink, (first + self.side) * shrink) for first in (self.top, self.left))
        return item.scene.images[item.view, :, rows, columns].float() / 255


def _window(item: Item, crop: int | None, size: int) -> Window:
    """The whole view, or a square of `crop` latent pixels a side around a random pixel that shows the scene.

    Pixels at edges, where there is most to learn, are drawn more often.
    """
    if crop is None or crop >= size:
        return Window(0, 0, size)
    drawn = item.scene.drawn
    shown = drawn[drawn // size**2 == item.view].cpu() % size**2
    if not len(shown):
        shown = torch.arange(size**2)
    centre = shown[torch.randint(len(shown), (1,), generator=item.generator)].item()
    top, left = (min(max(place - crop // 2, 0), size - crop) for place in divmod(int(centre), size))
    return Window(top, left, crop)


def _noise(shared: SharedModel, items: Sequence[Item], side: int) -> Tensor:
    """Normal noise with which the encoder samples, [B, C, side, side]."""
    size = (shared.autoencoder.latent_channels, side, side)
    return torch.stack([torch.randn(size, generator=item.generator) for item in items]).to(shared.device)


def _camera_rays(shared: SharedModel, items: Sequence[Item], picks: Sequence[Tensor], whole: bool) -> CameraRays:
    """The rays of the picked latent pixels, [R] per scene. whole: these are all pixels of one view, in order."""
    size, per_item = shared.latent_size, []
    for item, pick in zip(items, picks):
        view, pixel = pick // size**2, pick % size**2
        per_item.append(rays_through(item.scene.cam2world[view], item.scene.intrinsics[view], pixel, size, size))
    rays = Rays(torch.stack([r.origins for r in per_item]), torch.stack([r.directions for r in per_item]))
    numbers = (rays.origins.shape[1], shared.renderer.uniforms_per_ray)
    uniforms = torch.stack([torch.rand(numbers, generator=item.generator) for item in items]).to(shared.device)
    pixels = None if whole else torch.stack([pick % size**2 for pick in picks])
    cells = [item.scene.cells for item in items if item.scene.cells is not None]
    return CameraRays(rays, uniforms, pixels, torch.stack(cells) if cells else None)


def _latents(items: Sequence[Item], picks: Sequence[Tensor]) -> Tensor:
    """Encoded latents [B, R, C] of the picked pixels, [R] per scene."""
    found = []
    for item, pick in zip(items, picks):
        if not isinstance(item.scene, EncodedScene):
            raise RuntimeError(f"scene {item.scene.scene_id} was not encoded before a phase that needs its latents")
        found.append(item.scene.latents[pick])
    return torch.stack(found)
