"""What the viewer shows of a run: renders of its scenes and of mixtures of two, as PNG bytes, and their true views."""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from scaling.cameras import pixel_rays
from scaling.data.png import encode_png
from scaling.data.scene_views import SceneViews
from scaling.library.lpips_values import read_lpips_values
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels
from scaling.library.true_views import TrueViews
from scaling.library.viewpoints import Viewpoints
from scaling.models.shared_model import SharedModel
from scaling.models.student import Student
from scaling.models.triplanes import SceneParams, hull_between
from scaling.pictures.draw import depth_colours, latent_colours, latent_range, shown_range, to_pixels
from scaling.training.metrics.images import view_metrics
from scaling.viewer.camera import Camera, start_camera
from scaling.viewer.gallery import Gallery

MODES = {"rgb": "Colour", "latents": "Latents", "depth": "Depth"}
DRAFT_SIDE = 64  # rays per side of a draft where latents are images or pixels
THUMBNAIL_BYTES = 64 << 20  # about 8,000 thumbnails of 64², or 2,000 of 128²
OPENED = 4  # scenes in memory: the two shown and the two before; each may hold its cohort's own model


@dataclass(frozen=True)
class OpenScene:
    """A fitted scene in memory. params: of S = 1; model: the hashes of its shared model and of its cohort, the latter
    None in mode frozen."""

    scene_id: str
    stage: int
    model: tuple[str, str | None]
    params: SceneParams
    shared: SharedModel


@dataclass(frozen=True)
class Shot:
    """What to draw: the scene `first`, or its mixture with `second`.

    coefs, micro: what to take of each, from 0 (the first scene's coefs or micro planes) to 1 (the second's); draft:
    whether a quick picture will do, as while the mouse moves; truth: the image [3, H, W] that the camera should see.
    """

    first: str
    camera: Camera
    mode: str = "rgb"
    draft: bool = False
    second: str | None = None
    coefs: float = 0.0
    micro: float = 0.0
    truth: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """A drawn shot. png: the render; draft: whether the full picture would differ; measured: VIEW_METRICS of the render
    against the shot's truth, empty for drafts, in modes other than "rgb", and without a truth."""

    png: bytes
    draft: bool
    measured: Mapping[str, float]


def mix(first: OpenScene, second: OpenScene, coefs: float, micro: float) -> SceneParams:
    """Interpolate two scenes linearly. coefs, micro: places in [0, 1], where 0 is the first scene and 1 the second.

    Raises ValueError where the scenes belong to different models: the same numbers then mean different things.
    """
    if first.model != second.model:
        on = " and ".join(f"{_name(scene.model)} ({scene.scene_id})" for scene in (first, second))
        raise ValueError(
            f"these two scenes cannot be mixed: they belong to different models, {on}, in which coefs and planes mean "
            "different things; choose two scenes of the same model"
        )
    return SceneParams(
        first.params.micro_planes.lerp(second.params.micro_planes, micro),
        first.params.coefs.lerp(second.params.coefs, coefs),
        hull_between(first.params, second.params, coefs, micro),
    )


def _name(model: tuple[str, str | None]) -> str:
    shared, cohort = model
    return f"shared model {shared[:8]}…" if cohort is None else f"cohort {cohort[:8]}…"


def modes_of(shared: SharedModel) -> dict[str, str]:
    """The MODES that a model has: no "latents" where latents are the pixels."""
    return {mode: name for mode, name in MODES.items() if mode != "latents" or not shared.autoencoder.is_identity}


def has_drafts(shared: SharedModel, mode: str) -> bool:
    """Whether a draft differs from the full picture; see `render`."""
    if shared.autoencoder.has_encoder:
        return mode == "rgb" and _drafting(shared) is not None
    return shared.latent_size > DRAFT_SIDE


def _drafting(shared: SharedModel) -> Student | None:
    """The student where it is smaller than the decoder, else None. A decoder from scratch for small images is smaller
    than the student."""
    own = shared.decoder
    decoder = shared.autoencoder.halves()[1] if own is None else list(own.parameters())
    if shared.student is None or _size(shared.student.parameters()) >= _size(decoder):
        return None
    return shared.student


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@torch.no_grad()
def render(shared: SharedModel, params: SceneParams, camera: Camera, decoded: bool, draft: bool) -> dict[str, Tensor]:
    """Render one view. params: of S = 1; draft: faster, and possibly not the full picture.

    → latents [1, C, h, w] in [−1, 1], depth and opacity [1, h, w], and, if `decoded`, images [1, 3, H, W].

    With an autoencoder of Stable Diffusion's size the decoder is 99 % of the cost, so a draft is decoded by stage 1's
    student where that is smaller. Where latents are images or pixels, rays are the cost, so a draft has at most
    DRAFT_SIDE of them per side, and smaller images.
    """
    fewer = draft and not shared.autoencoder.has_encoder
    size = min(shared.latent_size, DRAFT_SIDE) if fewer else shared.latent_size
    pose, intrinsics = camera.cam2world.float(), camera.intrinsics.float()
    out = shared.render(params, pixel_rays(pose, intrinsics, size, size)[None].to(shared.device))
    latents = out.colours.transpose(1, 2).unflatten(2, (size, size))
    view = {"latents": latents, "depth": out.depth.view(1, size, size), "opacity": out.opacity.view(1, size, size)}
    if decoded:
        student = _drafting(shared) if draft else None
        view["images"] = shared.decode(latents) if student is None else student(latents)
    return view


class ViewedRun:
    """A run's library with its models and true views. Only one thread at a time may call the methods that read scenes.

    store: scene store of the true views, None for those that config.yaml names.
    Raises FileNotFoundError where the run has no fitted scenes or `store` holds no scene store, ValueError where a part
    or the store is damaged.
    """

    def __init__(self, run: RunFolder, store: str | None, device: torch.device | str = "cpu") -> None:
        run.check_fitted()
        self.run = run
        self.models = StoredModels(run, device)
        self._thumbnails: LRUCache[str, bytes] = LRUCache(THUMBNAIL_BYTES, getsizeof=len)
        self._lock = threading.Lock()  # guards the thumbnails: the page reads them while others are drawn
        self.truth = TrueViews(run, store)
        self._opened: LRUCache[str, OpenScene] = LRUCache(OPENED)
        self._ranges: LRUCache[str, tuple[Tensor, Tensor]] = LRUCache(OPENED)
        self._gallery: tuple[list[str], Gallery] | None = None
        first = self.open(run.library.ids()[0])
        self.shared = first.shared
        self.start = start_camera(Viewpoints.around(first.shared.renderer.box))
        self.no_truth = self._try_truth(first)

    def gallery(self) -> Gallery:
        """The scenes that are committed now, without their planes. All visitors share one gallery, as it takes some kB
        a scene; it is made anew once other parts count."""
        parts = [path.name for path in self.run.library.parts()]
        if self._gallery is None or self._gallery[0] != parts:
            rows, _ = read_lpips_values(self.run).fill(self.run.library.table())
            self._gallery = parts, Gallery(rows.to_pylist())
        return self._gallery[1]

    def open(self, scene_id: str) -> OpenScene:
        """Read a scene, or take it from memory. Raises LookupError where there is none, ValueError where it is
        damaged."""
        found = self._opened.get(scene_id)
        if found is None:
            found = self._opened[scene_id] = self._read(self.run.library.scene(scene_id))
        return found

    def _read(self, row: dict[str, Any]) -> OpenScene:
        shared, params = self.models.scene(row)
        return OpenScene(row["scene_id"], row["stage"], (row["shared"], row["cohort"]), params, shared)

    def draw(self, shot: Shot) -> Drawn:
        """Draw a shot. Raises what `open` and `mix` raise."""
        scene = self.open(shot.first)
        params = scene.params
        if shot.second is not None:
            params = mix(scene, self.open(shot.second), shot.coefs, shot.micro)
        draft = shot.draft and has_drafts(scene.shared, shot.mode)
        view = render(scene.shared, params, shot.camera, shot.mode == "rgb", draft)
        if shot.mode == "rgb":
            pixels = to_pixels(view["images"])[0]
        elif shot.mode == "depth":
            pixels = depth_colours(view["depth"], view["opacity"])[0]
        else:
            pixels = latent_colours(view["latents"], self._latent_range(scene))[0]
        measured: dict[str, float] = {}
        if shot.truth is not None and shot.mode == "rgb" and not draft:
            measured = view_metrics(view["images"], shot.truth[None].to(scene.shared.device))
        return Drawn(encode_png(pixels), draft, measured)

    def _latent_range(self, scene: OpenScene) -> tuple[Tensor, Tensor]:
        """The range of latents that colours span, measured on four views around the scene, so that colours do not
        change as it turns. Latents that are small images keep their own colours."""
        whole = shown_range(scene.shared)
        if whole is not None:
            return whole
        found = self._ranges.get(scene.scene_id)
        if found is None:
            around = [self.start.turned(quarter * math.pi / 2, 0.0) for quarter in range(4)]
            views = [render(scene.shared, scene.params, camera, False, False)["latents"] for camera in around]
            found = self._ranges[scene.scene_id] = latent_range(torch.cat(views))
        return found

    def thumbnail(self, scene_id: str) -> bytes | None:
        """The PNG that `draw_thumbnails` drew, None where it is not kept. Any thread may call this."""
        with self._lock:
            return self._thumbnails.get(scene_id)

    def draw_thumbnails(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Draw drafts of the scenes from the first camera. → id → PNG; the PNGs are also kept for a while.

        Ids that the library does not hold are left out.
        """
        # A cohort's scenes come together, because only one cohort's model is kept in memory.
        rows = sorted(self.run.library.scenes(ids), key=lambda row: (row["shared"], row["cohort"] or ""))
        made = {}
        for row in rows:
            shared, params = self.models.scene(row)
            view = render(shared, params, self.start, decoded=True, draft=True)
            made[row["scene_id"]] = encode_png(to_pixels(view["images"])[0])
            with self._lock:
                self._thumbnails[row["scene_id"]] = made[row["scene_id"]]
        return made

    def _try_truth(self, scene: OpenScene) -> str | None:
        """Take the first camera's distance and focal length from the true views of a scene.

        → None, or why there are no true views. Raises OSError or ValueError where the user named their store.
        """
        try:
            views = self.truth.views(scene.scene_id, scene.stage, scene.shared.settings.data)
            self.start = start_camera(Viewpoints.of(views))
        except (OSError, ValueError) as error:
            if self.truth.store is not None:
                raise
            return str(error) if "--store" in str(error) else f"{error}; name the scene store with --store"
        return None


def data_url(png: bytes) -> str:
    """PNG bytes as a data URL, which a browser shows without a request."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def view_png(views: SceneViews, index: int) -> bytes:
    """One of the views as PNG bytes."""
    return encode_png(to_pixels(views.images[index]))
