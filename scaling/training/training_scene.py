"""A scene made ready for training: its training views, its visual hull, the rays worth drawing, encoded latents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from scaling.cameras import rays_through
from scaling.data.latents import REMEDY
from scaling.data.scene_ref import SceneError
from scaling.data.scene_views import SceneViews
from scaling.models.cells import CELLS
from scaling.models.shared_model import SharedModel
from scaling.training.measure.box import MOST_COVERED, NO_BACKGROUND, NO_OBJECT
from scaling.training.measure.visual_hull import background_of, dilated, pooled, silhouettes, visual_hull

# Views encoded at once: as many as fit into a core's cache, or as keep a GPU busy. With channels last, convolutions of
# growing width read memory in order: 12.5 ms a view on a CPU, against 22 ms (32 views at once, channels first).
ENCODE_CHUNK = {"cpu": 4}
ENCODE_CHUNK_ELSEWHERE = 64


EDGE = 64  # of 255: a larger brightness difference between neighbours, in one channel, is an edge
BESIDE = 2  # latent pixels around silhouettes that also get rays: the hull is a little larger than the scene
EDGE_DRAWS = 3  # rays at an edge are drawn so many times as often as others: they teach most
OTHER_BACKGROUND = 0.04  # difference of two backgrounds in a latent channel, 0 to 1, that is worth a warning
LOOKED_AT = 4  # one in so many of the silhouettes' pixels is tested against the box
LEAST_OUTSIDE = 0.01  # fraction outside that is worth a warning: a pixel also shows what lies beside its centre
MARGIN = 1.0  # latent pixels around silhouettes that belong to the hull, for the same reason


@dataclass
class TrainingScene:
    """The training views of a scene, on the shared model's device.

    images: uint8 [V, 3, H, W], a quarter of the memory of floats; cam2world [V, 4, 4]; intrinsics [V, 3, 3]; drawn:
    indices of the latent pixels, among the views' V · h · w, that random rays go through, several times at edges; hull
    [CELLS³]: see `visual_hull`, None with rendering.sampled: cuboid; cells [CELLS³]: see `SharedModel.cells`, at first
    1 in the hull; cached [V, C, h, w]: latents that the present encoder has made before; warning: see
    `where_it_is_not`.
    """

    scene_id: str
    images: Tensor
    cam2world: Tensor
    intrinsics: Tensor
    drawn: Tensor
    warning: str = ""
    hull: Tensor | None = None
    cells: Tensor | None = None
    cached: Tensor | None = None

    @property
    def num_views(self) -> int:
        return len(self.images)

    def float_images(self, views: Sequence[int] | slice = slice(None)) -> Tensor:
        """[len(views), 3, H, W] in [0, 1]."""
        return self.images[views].float() / 255


@dataclass(kw_only=True)
class EncodedScene(TrainingScene):
    """A training scene with its mean latents [V · h · w, C] in [−1, 1], in the order of the views' latent pixels;
    seconds: that it took to make it ready."""

    latents: Tensor
    seconds: float = 0.0


def ready_scene(shared: SharedModel, views: SceneViews) -> EncodedScene:
    """All that a frozen fit needs of a scene: `prepare_scene` and `encode_scene`. Raises what they raise."""
    start = time.perf_counter()
    scene = encode_scene(shared, prepare_scene(shared, views))
    scene.seconds = time.perf_counter() - start
    return scene


def prepare_scene(shared: SharedModel, views: SceneViews) -> TrainingScene:
    """Make the training views of a scene ready, on the shared model's device.

    Raises ValueError where the views contradict each other or none of their rays meets the box; SceneError (a
    ValueError) where cached latents do not have the model's size.
    """
    train = list(views.train_views)
    images = as_bytes(views.images[train]).to(shared.device)
    cached = None if views.latents is None else _of_size(shared, views.scene_id, views.latents)[train]
    cameras = views.cam2world[train].to(shared.device), views.intrinsics[train].to(shared.device)
    shown = silhouettes(views)
    warning = where_it_is_not(shared, views, shown)
    # Rays are worth drawing around the silhouettes; where no hulls are in use, wherever they meet the box.
    if shared.settings.rendering.sampled == "hull":
        hull = scene_hull(shared, views, shown)
        shown = shown.to(shared.device)
        if not shown.any():  # all views are white: they do not tell where the scene is
            shown = ~shown
        near_it = dilated(pooled(shown, shared.autoencoder.shrink), BESIDE)
    else:
        rays = shared.latent_rays(*cameras)
        hull, near_it = None, shared.renderer.span(rays)[2].view(len(train), *[shared.latent_size] * 2)
    drawn = _drawn(near_it, _edges(images, shared.autoencoder.shrink))
    if not len(drawn) or (hull is not None and not hull.any()):
        raise ValueError(
            f"scene {views.scene_id}: no ray of its training views meets {shared.renderer.box}: check the poses' axes "
            "(OpenCV, camera-to-world) and scale"
        )
    cells = None if hull is None else hull.to(torch.uint8)
    return TrainingScene(views.scene_id, images, *cameras, drawn, warning, hull, cells, cached=cached)


def where_it_is_not(shared: SharedModel, views: SceneViews, shown: Tensor) -> str:
    """The warning for a scene whose silhouettes are `shown` [V, H, W]: a part of it lies outside of the shared box, or
    its views carve nothing. "" for all other scenes."""
    covered = shown.float().mean().item()
    if covered > MOST_COVERED or not covered:
        what = NO_BACKGROUND if covered else NO_OBJECT
        return f"scene {views.scene_id}: {what}, so nothing could be carved: all of the box is sampled"
    if other := _other_background(shared, views):
        return other
    outside = outside_box(shared, views, shown)
    if outside <= LEAST_OUTSIDE:
        return ""
    return (
        f"scene {views.scene_id}: {outside:.0%} of what its views show lies outside of {shared.renderer.box}: prepare "
        "the store with this scene in it, or train the shared model on a store that holds this scene"
    )


def _other_background(shared: SharedModel, views: SceneViews) -> str:
    """The warning for a scene whose background has another colour than the shared model's; "" for all other scenes."""
    colour = background_of(views)
    if colour is None or shared.settings.rendering.background == "white":
        return ""
    latent = shared.autoencoder.background(shared.settings.data.image_size, shared.device, colour)
    if (latent - shared.background.view(-1, len(latent)).mean(0)).abs().max() <= OTHER_BACKGROUND:
        return ""
    found = ", ".join(f"{255 * value:.0f}" for value in colour.tolist())
    return (
        f"scene {views.scene_id}: its background is rgb({found}), that of the shared model has another colour: learn "
        "scenes of one background together"
    )


def outside_box(shared: SharedModel, views: SceneViews, shown: Tensor) -> float:
    """The fraction of the silhouettes' pixels whose rays miss the shared box, estimated on every LOOKED_AT-th of them.

    shown [V, H, W]: the silhouettes of the training views.
    """
    height, width = shown.shape[1:]
    view, pixel = shown.flatten(1).nonzero()[::LOOKED_AT].T
    if not len(view):
        return 0.0
    train = torch.tensor(views.train_views)[view.cpu()]
    rays = rays_through(views.cam2world[train], views.intrinsics[train], pixel.cpu(), height, width)
    return 1 - shared.renderer.box.crossed(rays.to(shared.device)).float().mean().item()


def scene_hull(shared: SharedModel, views: SceneViews, shown: Tensor) -> Tensor:
    """The visual hull [CELLS³] (bool) of a scene in the shared model's box, on the model's device.

    shown [V, H, W]: the silhouettes of the training views.
    """
    margin = MARGIN * shared.autoencoder.shrink
    return visual_hull(shared.renderer.box.bounds, CELLS, views, shown.to(shared.device), margin)


def _edges(images: Tensor, shrink: int) -> Tensor:
    """Latent pixels [V, h, w] between which the uint8 images [V, 3, H, W] change by more than EDGE, and their
    neighbours."""
    small = images if shrink == 1 else avg_pool2d(images.float(), shrink).to(torch.uint8)
    edges = torch.zeros_like(small[:, 0], dtype=torch.bool)
    for dim in (1, 2):
        size = small.shape[dim + 1] - 1
        first, second = small.narrow(dim + 1, 0, size), small.narrow(dim + 1, 1, size)
        # Bytes have no sign, so the smaller one is subtracted from the larger one.
        change = (torch.maximum(first, second) - torch.minimum(first, second) > EDGE).any(1)
        edges.narrow(dim, 0, size).logical_or_(change)
        edges.narrow(dim, 1, size).logical_or_(change)
    return dilated(edges, 1)


def _drawn(near_it: Tensor, edges: Tensor) -> Tensor:
    """Indices of the latent pixels `near_it` [V, h, w], flattened; those at edges come EDGE_DRAWS times."""
    at_edges = (near_it & edges).flatten().nonzero()[:, 0]
    return torch.cat([near_it.flatten().nonzero()[:, 0], *[at_edges] * (EDGE_DRAWS - 1)])


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, any shape."""
    return (images * 255).round().to(torch.uint8)


def _of_size(shared: SharedModel, scene_id: str, latents: Tensor) -> Tensor:
    """Cached latents [V, C, h, w] as they are. Raises SceneError where they do not have the model's size."""
    found, needed = list(latents.shape[1:]), [shared.autoencoder.latent_channels, *[shared.latent_size] * 2]
    if found != needed:
        raise SceneError(scene_id, "cached latents", f"of shape {found}, the shared model's are {needed}; {REMEDY}")
    return latents


def encode_scene(shared: SharedModel, scene: TrainingScene) -> EncodedScene:
    """The scene with the latents of the encoder as it stands now; cached latents are taken as they are."""
    cached = scene.cached
    latents = encode_images(shared, scene.images) if cached is None else cached.to(shared.device).float()
    plain = {field.name: getattr(scene, field.name) for field in fields(TrainingScene)}
    return EncodedScene(**plain, latents=latents.permute(0, 2, 3, 1).flatten(0, 2))


@torch.no_grad()
def encode_images(shared: SharedModel, images: Tensor) -> Tensor:
    """Encode images, uint8 [V, 3, H, W] on the model's device → mean latents [V, C, h, w] in [−1, 1]."""
    chunks = []
    for chunk in images.split(ENCODE_CHUNK.get(shared.device.type, ENCODE_CHUNK_ELSEWHERE)):
        pixels = (chunk.float() / 255).contiguous(memory_format=torch.channels_last)
        chunks.append(shared.autoencoder.encode(pixels))
    return torch.cat(chunks)
