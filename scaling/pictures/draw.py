"""Pictures of fitted scenes: turntables in colour, latents and depth, truth beside render, and many scenes at once."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling.data.png import encode_png
from scaling.data.scene_id import check_scene_id
from scaling.data.scene_views import SceneViews
from scaling.library.viewpoints import Viewpoints
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.storage.atomic import replace_file
from scaling.storage.paths import AnyPath
from scaling.training.evaluate import render_views

Pixels = NDArray[np.uint8]  # [..., H, W, 3]

ELEVATION = math.radians(25.0)
SHEET_VIEWS = 8  # columns of a scene's contact sheet; more would not fit on a screen
SMALLEST_VIDEO = 128  # pixels a side; players blur or refuse smaller ones
# Colours of depth from near to far; all of them stand out from the white background.
DEPTH_COLOURS = np.array([[255, 205, 70], [230, 95, 60], [125, 40, 110], [30, 25, 75]], dtype=np.float64)


def turntable(
    shared: SharedModel,
    params: SceneParams,
    num_frames: int = 48,
    seen: Viewpoints | None = None,
    elevation: float = ELEVATION,
) -> dict[str, Pixels]:
    """Render one turn around a scene (params of S = 1). seen: distance, focal length and centre; None: around its box;
    elevation: radians.

    → "rgb", "latents" (small images, or the first three channels, each stretched to its range over the turn) and
    "depth" (near yellow, far blue, empty white), each [num_frames, H, W, 3]. Latents and depth are rendered at the
    latents' size and enlarged. Raises ValueError where num_frames is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"a turntable needs at least 1 frame, not {num_frames}")
    seen = seen or Viewpoints.around(shared.renderer.box)
    cam2world, intrinsics = replace(seen, middle=elevation).cameras("ring", num_frames)
    views = render_views(shared, params, cam2world, intrinsics)
    factor = shared.autoencoder.shrink
    return {
        "rgb": to_pixels(views["images"]),
        "latents": enlarge(latent_colours(views["latents"], shown_range(shared)), factor),
        "depth": enlarge(depth_colours(views["depth"], views["opacity"]), factor),
    }


def to_pixels(images: Tensor) -> Pixels:
    """Images [..., 3, H, W] in [0, 1] → pixels [..., H, W, 3]; values outside of the range are clamped."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).numpy()


def latent_colours(latents: Tensor, stretch: tuple[Tensor, Tensor] | None = None) -> Pixels:
    """Latents [N, C, h, w] → colours [N, h, w, 3]: three channels, each stretched from its lowest to its highest value.

    stretch: the range to use, from `latent_range`; None: that of these latents. Normalised latents fill only a part of
    [−1, 1], so colours of two calls can be compared only if both calls are given the same range.
    """
    low, high = latent_range(latents) if stretch is None else stretch
    return to_pixels((_three(latents) - low) / (high - low).clamp(min=1e-6))


def shown_range(shared: SharedModel) -> tuple[Tensor, Tensor] | None:
    """The range for `latent_colours` of latents that are small images: it leaves their colours as they are. None for
    other latents."""
    if shared.autoencoder.has_encoder:
        return None
    return torch.tensor(-1.0, device=shared.device), torch.tensor(1.0, device=shared.device)


def latent_range(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest values, [1, 3, 1, 1] each, of the channels that `latent_colours` shows."""
    chosen = _three(latents)
    return chosen.amin((0, 2, 3), keepdim=True), chosen.amax((0, 2, 3), keepdim=True)


def _three(latents: Tensor) -> Tensor:
    """The first three channels of [N, C, h, w]; the last is repeated where there are fewer."""
    return latents[:, [min(index, latents.shape[1] - 1) for index in range(3)]]


def depth_colours(depth: Tensor, opacity: Tensor) -> Pixels:
    """Depth and opacity [N, h, w] → colours [N, h, w, 3]: DEPTH_COLOURS over the depth range of the solid pixels (more
    than half opaque), faded to white where opacity is low."""
    distance, solid = depth.detach().cpu().double().numpy(), opacity.detach().cpu().double().numpy()
    inside = distance[solid > 0.5]
    low, high = (inside.min(), inside.max()) if inside.size else (0.0, 1.0)
    place = np.clip((distance - low) / max(high - low, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(DEPTH_COLOURS))
    colours = np.stack([np.interp(place, stops, DEPTH_COLOURS[:, channel]) for channel in range(3)], axis=-1)
    faded = colours * solid[..., None] + 255 * (1 - solid[..., None])
    return np.rint(np.clip(faded, 0, 255)).astype(np.uint8)


def enlarge(pixels: Pixels, factor: int) -> Pixels:
    """Every pixel of [..., H, W, 3] repeated factor times each way."""
    return pixels.repeat(factor, axis=-3).repeat(factor, axis=-2)


def grid(rows: Sequence[Sequence[Pixels]], gutter: int = 2) -> Pixels:
    """One picture of images [H, W, 3] of one size, row by row, with white gutters between them; short rows end in
    white."""
    height, width, _ = rows[0][0].shape
    num_columns = max(len(row) for row in rows)
    sheet = np.full(
        (len(rows) * (height + gutter) - gutter, num_columns * (width + gutter) - gutter, 3), 255, dtype=np.uint8
    )
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + gutter), j * (width + gutter)
            sheet[top : top + height, left : left + width] = image
    return sheet


def contact_sheet(
    truth: Tensor, rendered: Tensor, autoencoded: Tensor | None = None, show_error: bool = True, gutter: int = 2
) -> Pixels:
    """Rows: truth, render, autoencoded truth (if given), error (if shown); one column a view. Each [V, 3, H, W] in
    [0, 1]."""
    kinds = [truth, rendered]
    if autoencoded is not None:
        kinds.append(autoencoded)
    if show_error:
        kinds.append(error_image(truth, rendered))
    return grid([list(to_pixels(images)) for images in kinds], gutter)


def error_image(truth: Tensor, rendered: Tensor) -> Tensor:
    """Error pictures: white where render and truth agree, black where they differ by half the range or more, mean over
    channels. All [V, 3, H, W]."""
    error = (rendered.cpu() - truth.cpu()).abs().mean(1, keepdim=True)
    return (1 - 2 * error).expand_as(truth)


def overview(truth: Tensor, rendered: Tensor, scenes_per_row: int = 4) -> Pixels:
    """Many scenes in one picture: one view of each, truth on the left of its render. Both [N, 3, H, W] in [0, 1]."""
    pairs = [grid([[left, right]]) for left, right in zip(to_pixels(truth), to_pixels(rendered), strict=True)]
    rows = [pairs[start : start + scenes_per_row] for start in range(0, len(pairs), scenes_per_row)]
    return grid(rows, gutter=10)


def save_png(path: AnyPath, image: Pixels) -> AnyPath:
    """Write an image [H, W, 3]; make its folder. → path."""
    replace_file(path, encode_png(image))
    return path


def save_video(path_without_suffix: AnyPath, frames: Pixels, fps: int = 24) -> list[AnyPath]:
    """Write frames [N, H, W, 3] as .mp4 (H.264) and as .gif (looping for ever); make their folder. → both paths.

    Small frames are enlarged to at least 128 pixels a side. Players round a GIF's frame time to 10 ms.
    """
    frames = enlarge(frames, math.ceil(SMALLEST_VIDEO / min(frames.shape[1:3])))
    mp4, gif = (path_without_suffix.parent / f"{path_without_suffix.name}{suffix}" for suffix in (".mp4", ".gif"))
    # H.264's usual pixel format halves the colour resolution, so sides must be even.
    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with tempfile.TemporaryDirectory() as folder:  # the encoder can only write to a disk
        temporary = Path(folder) / "video.mp4"
        iio.imwrite(temporary, even, plugin="FFMPEG", fps=fps, codec="libx264", macro_block_size=2)
        replace_file(mp4, temporary.read_bytes())
    replace_file(gif, iio.imwrite("<bytes>", frames, extension=".gif", plugin="pillow", duration=1000 / fps, loop=0))
    return [mp4, gif]


def render_scene_pictures(
    shared: SharedModel,
    params: SceneParams,
    views: SceneViews | None,
    folder: AnyPath,
    scene_id: str,
    num_frames: int = 48,
    fps: int = 24,
) -> list[AnyPath]:
    """Write <folder>/<scene_id>/turntable-{rgb,latents,depth}.{mp4,gif} and contact-sheet.png. → paths.

    params: of S = 1. views: the scene's; their cameras also set the turntable's distance and focal length; None: the
    defaults of `turntable`, and no contact sheet. Raises ValueError where scene_id is no safe name for a folder.
    """
    folder = folder / check_scene_id(scene_id)
    turn = turntable(shared, params, num_frames, None if views is None else Viewpoints.of(views))
    paths = [path for kind, frames in turn.items() for path in save_video(folder / f"turntable-{kind}", frames, fps)]
    if views is not None:
        paths.append(save_png(folder / "contact-sheet.png", scene_sheet(shared, params, views)))
    return paths


@torch.no_grad()
def scene_sheet(shared: SharedModel, params: SceneParams, views: SceneViews, num_views: int = SHEET_VIEWS) -> Pixels:
    """Contact sheet of up to num_views test views, spread over all of them. params: of S = 1. → [H', W', 3]."""
    chosen = some_test_views(views, num_views)
    truth = views.images[chosen].to(shared.device)
    rendered = render_views(shared, params, views.cam2world[chosen], views.intrinsics[chosen])["images"]
    autoencoded = None
    if not shared.autoencoder.is_identity:
        autoencoded = shared.autoencoder.decode(shared.autoencoder.encode(truth))
    return contact_sheet(truth, rendered, autoencoded)


def some_test_views(views: SceneViews, num_views: int) -> list[int]:
    """Indices of up to num_views of a scene's test views, spread over all of them."""
    spread = np.linspace(0, len(views.test_views) - 1, min(num_views, len(views.test_views)))
    return [views.test_views[round(place)] for place in spread]
