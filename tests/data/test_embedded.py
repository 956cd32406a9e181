"""The embedded cars: repeatable, different from each other, of the promised size, and one solid object in all views."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaling.cameras import normalised_intrinsics, pixel_rays
from scaling.data.embedded.scenes import (
    ELEVATIONS,
    FOCAL,
    embedded_cameras,
    embedded_car,
    embedded_ids,
    embedded_scene,
    embedded_solids,
    trace_car,
)
from scaling.data.embedded.solids import Polyhedron, bounds, box, plain, trace
from scaling.data.scene_views import default_test_views


def test_ids() -> None:
    assert embedded_ids(3) == ["car-00000", "car-00001", "car-00002"]


def test_a_car_depends_on_its_id_alone() -> None:
    first, again = embedded_car("car-00003", 32, 4), embedded_car("car-00003", 32, 4)
    other = embedded_car("car-00004", 32, 4)
    assert first["views"] == again["views"]
    assert np.array_equal(first["cam2world"], again["cam2world"])
    assert all(one != two for one, two in zip(first["views"], other["views"]))


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="bad scene id"):
        embedded_car("../car", 32, 4)
    with pytest.raises(ValueError, match="at least 2 views"):
        embedded_car("car-00000", 32, 1)


def test_views_show_a_car_on_white() -> None:
    scene = embedded_scene("car-00000", 32, 12)
    assert scene.images.shape == (12, 3, 32, 32)
    assert scene.test_views == default_test_views(12) == (0,)
    border = torch.cat([scene.images[..., 0, :], scene.images[..., -1, :]], dim=-1)
    assert (border == 1).all()
    covered = (scene.images < 0.97).any(dim=1).float().mean(dim=(1, 2))
    assert (covered > 0.06).all() and (covered < 0.5).all()


def test_cameras_look_at_the_origin_from_the_upper_hemisphere() -> None:
    cam2world = embedded_cameras("car-00000", 24).double()
    position, forward = cam2world[:, :3, 3], cam2world[:, :3, 2]
    torch.testing.assert_close(position, -1.3 * forward, atol=1e-5, rtol=0)
    elevation = torch.asin(position[:, 2] / 1.3)
    assert elevation.min() > ELEVATIONS[0] - 1e-5 and elevation.max() < ELEVATIONS[1] + 1e-5
    azimuth = torch.atan2(position[:, 1], position[:, 0]).sort().values
    gaps = torch.diff(torch.cat([azimuth, azimuth[:1] + 2 * torch.pi]))
    assert gaps.max() < torch.pi / 4


@pytest.mark.parametrize("scene_id", embedded_ids(12))
def test_a_car_fills_a_cube_of_side_1_and_stays_in_it(scene_id: str) -> None:
    solids = embedded_solids(scene_id)
    low, high = bounds(solids)
    assert high[0] - low[0] == pytest.approx((high - low).max()) == pytest.approx(1, abs=0.01)
    pose = embedded_cameras(scene_id, 2)[0]
    rays = pixel_rays(pose, normalised_intrinsics(FOCAL), 96, 96)
    _, distances = trace_car(solids, pose[:3, 3].numpy(), rays.directions.numpy())
    hit = np.isfinite(distances)
    points = pose[:3, 3].numpy() + distances[hit, None] * rays.directions.numpy()[hit]
    assert hit.any() and np.abs(points).max() <= 0.5 + 1e-5


def test_a_surface_point_has_one_colour_in_all_views() -> None:
    """Points seen by one camera, traced from another: they are at their own distance there, or something is before."""
    solids = embedded_solids("car-00005")
    intrinsics = normalised_intrinsics(FOCAL)
    one, two = embedded_cameras("car-00005", 8)[:2]
    rays = pixel_rays(one, intrinsics, 64, 64)
    colours, distances = trace_car(solids, one[:3, 3].numpy(), rays.directions.numpy())
    hit = np.isfinite(distances)
    points = one[:3, 3].numpy() + distances[hit, None] * rays.directions.numpy()[hit]
    towards = points - two[:3, 3].numpy()
    expected = np.linalg.norm(towards, axis=1)
    seen_colours, seen = trace_car(solids, two[:3, 3].numpy(), towards / expected[:, None])
    assert (seen < expected + 1e-3).mean() > 0.995
    visible = np.abs(seen - expected) < 1e-4
    assert visible.mean() > 0.2
    differs = np.abs(seen_colours[visible] - colours[hit][visible]).max(axis=1) > 0.01
    assert differs.mean() < 0.02  # points on the edge of a painted line may fall on either side


def test_tracing_a_box_by_hand() -> None:
    cube = box((-1, -1, -1), (1, 1, 1), plain((1.0, 0.5, 0.25)))
    directions = np.array([[0, 0, -1], [0, 0, 1], [0.6, 0, -0.8]], dtype=np.float32)
    colours, distances = trace([cube], np.array([0, 0, 3], dtype=np.float32), directions)
    assert distances[0] == pytest.approx(2) and np.isinf(distances[1:]).all()
    assert colours[0] == pytest.approx(colours[0, 0] * np.array([1, 0.5, 0.25]))
    assert (colours[1:] == 1).all()


def test_the_loop_over_half_spaces_finds_what_whole_arrays_find() -> None:
    """A ray is inside a polyhedron from the last half-space that it enters to the first one that it leaves."""
    solids = [solid for solid in embedded_solids("car-00005") if isinstance(solid, Polyhedron)]
    pose = embedded_cameras("car-00005", 2)[1]
    rays = pixel_rays(pose, normalised_intrinsics(FOCAL), 64, 64)
    origin, directions = rays.origins[0].numpy() * 1.2, rays.directions.numpy()
    expected = np.full(len(directions), np.inf)
    for solid in solids:
        slope = solid.normals @ directions.T
        at = (solid.offsets - solid.normals @ origin)[:, None] / slope
        enter, leave = np.where(slope < 0, at, -np.inf).max(0), np.where(slope < 0, np.inf, at).min(0)
        expected = np.where((enter < leave) & (enter < expected), enter, expected)
    found = trace(solids, origin, directions)[1]
    assert np.isfinite(found).mean() > 0.1
    assert np.allclose(found, expected, rtol=1e-5)
