"""Metrics of a fitted scene on its test views, beside those of its autoencoder and of its mean image."""

from __future__ import annotations

import torch
from torch import Tensor

from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, fuse_planes
from scaling.training.metrics.images import VIEW_METRICS, lpips, psnr, view_metrics

VIEW_CHUNK = 8
TRAIN_VIEWS = 2  # of a scene that are evaluated beside its test views: they show whether it was fitted, no more


@torch.no_grad()
def render_views(shared: SharedModel, params: SceneParams, cam2world: Tensor, intrinsics: Tensor) -> dict[str, Tensor]:
    """Render whole views of one scene: params of S = 1, cam2world [V, 4, 4], intrinsics [V, 3, 3].

    → images [V, 3, H, W] in [0, 1], latents [V, C, h, w] in [−1, 1], depth and opacity [V, h, w].
    """
    planes = fuse_planes(params.micro_planes, params.coefs, shared.base_planes)
    hull = None if params.hull is None else params.hull[0]
    return render_planes(shared, planes[0], cam2world, intrinsics, hull)


@torch.no_grad()
def render_planes(
    shared: SharedModel, planes: Tensor, cam2world: Tensor, intrinsics: Tensor, hull: Tensor | None = None
) -> dict[str, Tensor]:
    """As `render_views`, of a tri-plane [P, F_mic + F_mac, K, K] on the model's device, fitted or generated.

    hull [CELLS³]: where the scene is; None: its densities alone show where.
    """
    parts: dict[str, list[Tensor]] = {"images": [], "latents": [], "depth": [], "opacity": []}
    size = shared.latent_size
    cells = shared.cells(planes[None], None if hull is None else hull[None])
    for start in range(0, len(cam2world), VIEW_CHUNK):
        chunk = slice(start, start + VIEW_CHUNK)
        rays = shared.latent_rays(cam2world[chunk], intrinsics[chunk]).to(shared.device)
        views = rays.origins.shape[0]
        flat = type(rays)(rays.origins.reshape(1, -1, 3), rays.directions.reshape(1, -1, 3))
        out = shared.render_planes(planes[None], flat, cells=cells)
        latents = shared.as_latents(out.colours[0].unflatten(0, (views, size * size)))
        parts["latents"].append(latents)
        parts["images"].append(shared.decode(latents))
        parts["depth"].append(out.depth.view(views, size, size))
        parts["opacity"].append(out.opacity.view(views, size, size))
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


@torch.no_grad()
def evaluate_scene(shared: SharedModel, params: SceneParams, views: SceneViews) -> dict[str, float | None]:
    """Metrics of one scene, each the mean over views. params: of S = 1; views: must include test views.

    → psnr (dB), ssim, ms_ssim, flip, lpips: on the test views; lpips None where it cannot be computed.
    train_psnr …: all but lpips on TRAIN_VIEWS evenly spread training views.
    autoencoder_psnr …: all but lpips on test views encoded and decoded by the pair trained together.
    mean_image_psnr: the mean training image as the prediction of every test view.
    latent_psnr: rendered against encoded latents of the test views.
    The metrics of the autoencoder and of latents are None where latents are the pixels.
    """
    test, train = list(views.test_views), list(views.train_views)
    spread = torch.linspace(0, len(train) - 1, min(TRAIN_VIEWS, len(train)) + 2)[1:-1].round().long()
    train_part = [train[int(i)] for i in spread]
    truth = views.images[test].to(shared.device)
    # Together: the scene's planes are fused, and its cells filled, once.
    both = [*test, *train_part]
    everything = render_views(shared, params, views.cam2world[both], views.intrinsics[both])
    rendered, seen = everything["images"].split([len(test), len(train_part)])
    values: dict[str, float | None] = dict(view_metrics(rendered, truth))
    values["lpips"] = lpips(rendered, truth)
    of_train = view_metrics(seen, views.images[train_part].to(shared.device))
    values |= {f"train_{name}": value for name, value in of_train.items()}
    mean_image = views.images[train].mean(0, keepdim=True).to(shared.device).expand_as(truth)
    values["mean_image_psnr"] = psnr(mean_image, truth).mean().item()
    values |= {**{f"autoencoder_{name}": None for name in VIEW_METRICS}, "latent_psnr": None}
    if not shared.autoencoder.is_identity:
        encoded = shared.autoencoder.encode(truth)
        decoded = shared.autoencoder.decode(encoded)
        values |= {f"autoencoder_{name}": value for name, value in view_metrics(decoded, truth).items()}
        # Latents span [−1, 1], twice the range of images; halved, they are compared on the images' scale.
        values["latent_psnr"] = psnr(everything["latents"][: len(test)] / 2, encoded / 2).mean().item()
    return values
