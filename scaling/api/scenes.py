"""The Python API, `scaling.load_library` and `scaling.fit_scene`: fitted scenes as tensors that can be rendered.

It needs neither Ray nor MLflow: one process, one device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from scaling.api.arrays import cameras_from_arrays, views_from_arrays
from scaling.config import Settings, SettingsError, flatten, make_settings, merge
from scaling.library.row_schema import METRICS
from scaling.library.run_folder import RunFolder
from scaling.library.scene_row import pack_scene
from scaling.library.stored_models import StoredModels, chosen_device
from scaling.models.shared_files import load_shared, read_config, settings_on
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, fuse_planes
from scaling.storage.addresses import ask_server
from scaling.storage.paths import AnyPath, to_path
from scaling.training.evaluate import evaluate_scene, render_views
from scaling.training.fit_frozen import fit_scenes


@dataclass(frozen=True, eq=False)
class Scene:
    """A fitted scene and the model that it was fitted on: the shared one, or its cohort's. Tensors lie on the model's
    device.

    params: of S = 1; stage: 1 or 2, the stage that fitted the scene; metrics: named as by `evaluate_scene` (PSNR in
    dB), None where not measured; seconds: device time of the fit.
    """

    scene_id: str
    category: str
    stage: int
    metrics: dict[str, float | None]
    seconds: float
    params: SceneParams = field(repr=False)
    shared: SharedModel = field(repr=False)

    @property
    def micro_planes(self) -> Tensor:
        """The scene's own planes, [P, F_mic, K, K]."""
        return self.params.micro_planes[0]

    @property
    def coefs(self) -> Tensor:
        """The scene's coefficients over the base tri-planes, [M]."""
        return self.params.coefs[0]

    @property
    def tri_planes(self) -> Tensor:
        """The fused planes concat(T^mic, Σ_k w^k B_k), micro features first: [P, F_mic + F_mac, K, K]."""
        return fuse_planes(self.params.micro_planes, self.params.coefs, self.shared.base_planes)[0]

    def render(self, cam2world: ArrayLike | Tensor, intrinsics: ArrayLike | Tensor) -> Tensor:
        """Render V views: images [V, 3, H, W] in [0, 1], H = W = the model's image size, without gradients.

        cam2world [V, 4, 4], OpenCV axes; intrinsics [3, 3] or [V, 3, 3], normalised by the image size. Raises
        ValueError naming the argument whose shape or camera is wrong.
        """
        poses, normalised = cameras_from_arrays(cam2world, intrinsics)
        views = render_views(self.shared, self.params, torch.from_numpy(poses), torch.from_numpy(normalised))
        return views["images"]


class SceneLibrary:
    """The fitted scenes of a run, by id: `library[scene_id]`, `scene_id in library`, `len(library)`.

    Each call reads what is on disk, so scenes that are committed meanwhile appear. `library[scene_id]` looks for the
    scene's part; to go over many scenes, use `scenes()` or `tri_planes()`, which read every part once.
    """

    def __init__(self, run: RunFolder, device: torch.device) -> None:
        self.run = run
        self.models = StoredModels(run, device)

    def ids(self, stage: int | None = None) -> list[str]:
        """Ids of all scenes, or of those that one stage fitted. Raises ValueError naming a part that cannot be read."""
        return self.run.library.ids(stage)

    def __len__(self) -> int:
        return len(self.ids())

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    def __contains__(self, scene_id: object) -> bool:
        return scene_id in self.ids()

    def __getitem__(self, scene_id: str) -> Scene:
        """Raises LookupError where the library holds no such scene, ValueError where the scene's model is not found."""
        return self._scene(self.run.library.scene(scene_id))

    def scenes(self) -> Iterator[Scene]:
        """Yield all scenes, at most one part of the library in memory at a time."""
        return (self._scene(row) for row in self.run.library.scenes())

    def tri_planes(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (id, fused planes [P, F_mic + F_mac, K, K]) of all scenes, at most one part in memory at a time."""
        return ((scene.scene_id, scene.tri_planes) for scene in self.scenes())

    def _scene(self, row: Mapping[str, Any]) -> Scene:
        shared, params = self.models.scene(row)
        metrics = {name: row[name] for name in METRICS}
        return Scene(row["scene_id"], row["category"], row["stage"], metrics, row["seconds"], params, shared)


def load_library(run: str | AnyPath, device: torch.device | str | None = None) -> SceneLibrary:
    """Open the library of the run folder `run`. device None: the GPU if there is one.

    Raises FileNotFoundError where the folder holds no fitted scene. Example:

        library = scaling.load_library("runs/cars")
        scene = library["car-00003"]
        images = scene.render(orbit(12, radius=1.3), normalised_intrinsics(focal=1.02))  # from scaling.cameras
    """
    ask_server(str(run))
    folder = RunFolder(to_path(str(run)))
    folder.check_fitted()
    return SceneLibrary(folder, chosen_device(device))


def fit_scene(
    shared: str | AnyPath,
    images: ArrayLike | Tensor,
    cam2world: ArrayLike | Tensor,
    intrinsics: ArrayLike | Tensor,
    *,
    scene_id: str = "scene",
    test_views: Sequence[int] = (),
    settings: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> Scene:
    """Fit one new scene on the shared model in the folder `shared`, as stage 2 does. Nothing is written.

    images: uint8 [V, H, W, 3] (or 4, with transparency), or float [V, 3, H, W] in [0, 1]; at least 2 views, of any
    size: like views of a store, they are padded to a square and resized. cam2world [V, 4, 4], OpenCV axes; intrinsics
    [3, 3] or [V, 3, 3], normalised by the image's width and height.
    scene_id: seeds the random numbers; test_views: views to hold out and measure; without any, all views are trained on
    and every metric is None. settings: nested, they override the stage-2 settings noted with the shared model. device
    None: the GPU if there is one.

    Warns where a part of the scene lies outside of the shared model's box, or where views that are all white, or show
    no white background, give no visual hull. Raises ValueError naming a wrong argument, SettingsError for a wrong
    setting, SharedModelError where `shared` cannot be used, NotFinite where the fit diverged. Example:

        settings = {"stage2": {"latent": {"num_epochs": 2}}}
        scene = scaling.fit_scene("runs/cars/shared", images, cam2world, intrinsics, test_views=[0], settings=settings)
        print(scene.metrics["psnr"])  # dB, on view 0
    """
    folder = to_path(str(shared))
    chosen = _fit_settings(folder, dict(settings or {}))
    views = views_from_arrays(images, cam2world, intrinsics, scene_id, test_views, chosen.data.image_size)
    model, _ = load_shared(folder, chosen_device(device))
    [fitted] = fit_scenes(model, [views], chosen)
    if fitted.warning:
        warnings.warn(fitted.warning, stacklevel=2)
    pack_scene(fitted.params, chosen.stage2.micro_dtype)  # refuses a fit that diverged, as stage 2 does
    params = fitted.params[None]
    metrics = evaluate_scene(model, params, views) if views.test_views else dict.fromkeys(METRICS)
    return Scene(scene_id, views.category, 2, metrics, fitted.seconds, params, model)


def _fit_settings(folder: AnyPath, given: dict[str, Any]) -> Settings:
    """The settings noted with the shared model, overridden by `given`. Raises SettingsError where `given` contradicts
    what the shared model fixes."""
    settings = make_settings(merge(read_config(folder).model_dump(), given))
    settings = settings_on(folder, settings, flatten(given))
    if settings.stage2.mode != "frozen":
        raise SettingsError(
            f"stage2.mode is {settings.stage2.mode}, but a single scene is fitted on the unchanged shared model: "
            'give settings={"stage2": {"mode": "frozen"}}'
        )
    return settings
