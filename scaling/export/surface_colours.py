"""RGB colours of a surface, taken from decoded views around it.

A field of latents has no RGB. A field in RGB space has, but in a fog of density: at the surface, its own colours differ
by 34 of 255 from what the renderer shows, colours taken from views by 12 (a car of preset rgb_triplanes).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from scaling.export.surface import AT_ONCE, DensityGrid, Surface
from scaling.models.shared_model import SharedModel
from scaling.training.evaluate import render_planes

STEPS = 32  # samples on the way from a vertex out of the box; they take most of a mesh's time
FACING = 4.0  # power of the cosine: views that look straight at a vertex count more
SOLID = 8.0  # power of a pixel's opacity
OUT_OF_VIEW = -1e4  # added to the logarithm of a weight


@torch.no_grad()
def seen_colours(
    shared: SharedModel,
    planes: Tensor,
    surface: Surface,
    grid: DensityGrid,
    cam2world: Tensor,
    intrinsics: Tensor,
    hull: Tensor | None = None,
) -> NDArray[np.uint8]:
    """Colour of each vertex: the weighted mean, over decoded views, of the pixel that it falls on. → [N, 3], sRGB.

    A view's weight is a product: how much light gets from the vertex to its camera, how straight it looks at the
    surface, and how opaque the pixel is (at an object's edge the background shines in). Weights are compared as
    logarithms, so a vertex that no view sees takes the colour of the view that nearly sees it.
    cam2world [V, 4, 4], intrinsics [V, 3, 3].
    """
    views = render_planes(shared, planes, cam2world, intrinsics, hull)
    images, opacities = views["images"].cpu(), views["opacity"].cpu()[:, None]
    vertices, normals = torch.from_numpy(surface.vertices), torch.from_numpy(surface.normals)
    colours = []
    for points, facing in zip(vertices.split(AT_ONCE), normals.split(AT_ONCE)):
        logs, seen = [], []
        for image, opacity, pose, camera in zip(images, opacities, cam2world, intrinsics):
            place, outside = _pixel(points, pose, camera)
            seen.append(_sampled(image, place))
            # Opacity and cosine are clamped: the logarithm of 0 is not finite.
            solid = _sampled(opacity, place)[0].clamp(min=1e-3)
            way = pose[:3, 3] - points
            cosine = (F.normalize(way, dim=1) * facing).sum(1).clamp(min=1e-3)
            hidden = _optical_depth(grid, points, way)
            logs.append(FACING * cosine.log() + SOLID * solid.log() - hidden + OUT_OF_VIEW * outside)
        weights = torch.stack(logs).softmax(0)
        colours.append((weights[:, None] * torch.stack(seen)).sum(0).T)
    return _bytes(torch.cat(colours))


def _pixel(points: Tensor, pose: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
    """Where points [N, 3] fall on a view, [N, 2], −1 to 1 from edge to edge; and whether beside it, [N]: 1, else 0."""
    in_camera = (points - pose[:3, 3]) @ pose[:3, :3]
    projected = in_camera @ camera.T
    place = 2 * projected[:, :2] / projected[:, 2:].clamp(min=1e-6) - 1
    return place, ((place.abs() > 1).any(1) | (in_camera[:, 2] <= 0)).float()


def _sampled(image: Tensor, place: Tensor) -> Tensor:
    """Values of image [C, H, W] at places [N, 2], −1 to 1 from edge to edge → [C, N]."""
    return F.grid_sample(image[None], place[None, None], align_corners=False, padding_mode="border")[0, :, 0]


def _optical_depth(grid: DensityGrid, points: Tensor, way: Tensor) -> Tensor:
    """∫ σ along the way [N, 3] from points [N, 3] to a camera, up to where the way leaves the box. → [N]."""
    low, high = grid.bounds
    towards = F.normalize(way, dim=1)
    safe = torch.where(towards.abs() < 1e-9, 1e-9, towards)
    out = ((torch.where(safe > 0, high, low) - points) / safe).amin(1).clamp(min=0)  # where the way leaves the box
    length = torch.minimum(out, way.norm(dim=1))
    place = (torch.arange(STEPS) + 0.5) / STEPS
    along = points[:, None] + (length[:, None] * place)[..., None] * towards[:, None]
    return softplus(grid.at(along) - 1).mean(1) * length / grid.unit


def _bytes(colours: Tensor) -> NDArray[np.uint8]:
    """Colours [N, 3] in [0, 1] → uint8."""
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
