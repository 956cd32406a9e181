"""Cameras that look at fitted scenes from where the scenes' own views do; a run notes them, as its store may be
gone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch
from pydantic import TypeAdapter
from torch import Tensor

from scaling.cameras import look_at, normalised_intrinsics, orbit, zone
from scaling.config import Data
from scaling.data.scene_views import SceneViews
from scaling.library.run_folder import RunFolder
from scaling.library.true_views import stored_views
from scaling.models.box import Box
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import first_fault, parse_json
from scaling.storage.limited import read_limited
from scaling.training.measure.region import looked_at

STEEPEST = math.radians(89.0)  # for a camera that looks straight down, the image's up direction is undefined
OFF_CENTRE = 0.02  # of the distance: nearer to the origin than that, cameras look at the origin
RADIUS, FOCAL = 1.3, 1.02  # of views that nothing is known of: distance in lengths of the box, focal length
NOTED = "viewpoints.json"
SMALLEST, LARGEST = 1e-9, 1e9  # of distances in world units, and of focal lengths


@dataclass(frozen=True)
class Viewpoints:
    """radius: distance from the centre, world units; focal: fraction of the image size; lowest, middle, highest:
    elevations, radians; centre: where cameras look, world coordinates."""

    radius: float
    focal: float
    lowest: float
    middle: float
    highest: float
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, views: SceneViews) -> Viewpoints:
        """Medians of a scene's own views, and the range of their elevations: beyond this range a model has seen
        nothing."""
        position = views.cam2world[:, :3, 3]
        region = looked_at(views.cam2world, views.intrinsics)
        centre = torch.zeros(3) if region is None else region.mean(0)
        if centre.norm() < OFF_CENTRE * (position - centre).norm(dim=1).median():
            centre = torch.zeros(3)
        away = position - centre
        distance = away.norm(dim=1)
        elevation = (away[:, 2] / distance).clamp(-1, 1).asin().clamp(-STEEPEST, STEEPEST)
        x, y, z = centre.tolist()
        return cls(
            distance.median().item(), views.intrinsics[:, 0, 0].median().item(),
            elevation.min().item(), elevation.median().item(), elevation.max().item(), (x, y, z),
        )  # fmt: skip

    @classmethod
    def around(cls, box: Box) -> Viewpoints:
        """Of a scene without known views: around its box."""
        x, y, z = box.centre.tolist() if box.side is None and box.length_unit == "box" else (0.0, 0.0, 0.0)
        return cls(RADIUS * float(box.unit), FOCAL, 0.0, math.radians(25.0), math.radians(60.0), (x, y, z))

    def cameras(self, path: str, num_views: int) -> tuple[Tensor, Tensor]:
        """cam2world [V, 4, 4], intrinsics [V, 3, 3]. path "ring": one turn at the middle elevation; "sphere": spread
        evenly between the lowest and the highest."""
        if path == "ring":
            cam2world = orbit(num_views, self.radius, self.middle, self.centre)
        else:
            cam2world = zone(num_views, self.radius, self.lowest, self.highest, self.centre)
        return cam2world, normalised_intrinsics(self.focal).repeat(num_views, 1, 1)

    def camera(self, azimuth: float, elevation: float) -> tuple[Tensor, Tensor]:
        """One camera at azimuth and elevation (radians): cam2world [4, 4], intrinsics [3, 3], float64."""
        at = [torch.tensor([value], dtype=torch.float64) for value in (azimuth, elevation, self.radius)]
        return look_at(at[0], at[1], at[2], self.centre)[0], normalised_intrinsics(self.focal).double()


def note_viewpoints(run: RunFolder, views: SceneViews) -> None:
    """Write RUN/viewpoints.json, from one scene's own views; not where they make no sense."""
    seen = Viewpoints.of(views)
    if _make_sense(seen):
        replace_file(run.path / NOTED, json.dumps(asdict(seen), indent=1).encode() + b"\n")


def _make_sense(seen: Viewpoints) -> bool:
    sizes = SMALLEST < seen.radius < LARGEST and SMALLEST < seen.focal < LARGEST
    return sizes and all(abs(x) < LARGEST for x in seen.centre) and -1.6 < seen.lowest <= seen.highest < 1.6


def run_viewpoints(run: RunFolder, scene_id: str, stage: int, data: Data, store: str | None) -> Viewpoints:
    """The viewpoints of a run's scenes: from the scene's views in `store`; None: as the run notes them, or, where it is
    of an older program, from the store that its config.yaml names.

    Raises FileNotFoundError or ValueError where views cannot be read, or viewpoints.json is damaged.
    """
    path = run.path / NOTED
    if store is not None or not path.is_file():
        return Viewpoints.of(stored_views(run, scene_id, stage, data, store))
    try:
        found = TypeAdapter(Viewpoints).validate_python(parse_json(read_limited(path)))
        if not _make_sense(found) or not found.lowest <= found.middle <= found.highest:
            raise ValueError("it holds numbers that no camera has")
    except ValueError as error:
        raise ValueError(f"{path}: {first_fault(error)}; give --store STORE, or restore the file") from None
    return found
