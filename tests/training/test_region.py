"""Where a scene is: found from its cameras at any scale and place; and what the camera doctor says of wrong poses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cuboids import cuboid_views

from scaling.cameras import look_at_origin, normalised_intrinsics
from scaling.data.readers.conventions import Convention, as_read
from scaling.data.scene_views import SceneViews
from scaling.training.measure import box as measure_box
from scaling.training.measure.agreement import agreement
from scaling.training.measure.box import NoBounds, scene_bounds
from scaling.training.measure.doctor import examine, scene_fault, verdict
from scaling.training.measure.region import WIDER, looked_at
from scaling.training.measure.visual_hull import silhouettes

SIDES = torch.tensor([0.4, 0.2, 0.3])  # of the cuboid, half of them
AS_IS = Convention("cam2world", "opencv")


@pytest.fixture(scope="module")
def views() -> SceneViews:
    return cuboid_views([(-SIDES, SIDES)], num_views=24)


def moved(views: SceneViews, scale: float, to: list[float]) -> SceneViews:
    """The same scene, larger and elsewhere: images do not change."""
    cam2world = views.cam2world.clone()
    cam2world[:, :3, 3] = cam2world[:, :3, 3] * scale + torch.tensor(to)
    return replace(views, cam2world=cam2world)


def test_cameras_tell_where_they_look():
    """On a circle of radius 2, with a focal length of half an image: at the middle a view shows ±2."""
    azimuth = torch.arange(8) * torch.pi / 4
    cameras = look_at_origin(azimuth, torch.full((8,), 0.3), torch.full((8,), 2.0))
    cameras[:, :3, 3] += torch.tensor([5.0, 0.0, -1.0])
    low, high = looked_at(cameras, normalised_intrinsics(0.5).expand(8, 3, 3))
    torch.testing.assert_close((low + high) / 2, torch.tensor([5.0, 0.0, -1.0]))
    torch.testing.assert_close(high - low, torch.full((3,), 2 * 2 * WIDER))


def test_cameras_that_look_away_or_all_the_same_way_tell_nothing(views):
    away = views.cam2world.clone()
    away[:, :3, 1:3] *= -1
    assert looked_at(away, views.intrinsics) is None
    alike = torch.eye(4).repeat(24, 1, 1)
    alike[:, 0, 3] = torch.arange(24)
    assert looked_at(alike, views.intrinsics) is None


@pytest.mark.parametrize(
    ("scale", "to"), [(1.0, [0, 0, 0]), (3.1, [0, 0, 2]), (0.01, [0, 0, 0]), (100.0, [200, -3, 0])]
)
def test_a_scene_of_any_scale_is_found_anywhere(views, scale, to):
    bounds = (scene_bounds(moved(views, scale, to)) - torch.tensor(to, dtype=torch.float32)) / scale
    assert (bounds[0] <= -SIDES + 0.01).all() and (bounds[0] >= -SIDES - 0.08).all(), bounds
    assert (bounds[1] >= SIDES - 0.01).all() and (bounds[1] <= SIDES + 0.08).all(), bounds


@pytest.mark.parametrize("shade", [0.0, 231 / 255])
def test_other_backgrounds_than_white_are_recognised(views, shade):
    """The object is mid grey, the background black or the white of Blender's Filmic view."""
    images = torch.where(views.images < 0.5, torch.tensor(0.5), torch.tensor(shade))
    torch.testing.assert_close(scene_bounds(replace(views, images=images)), scene_bounds(views))


def test_views_that_do_not_tell_say_why(views):
    noise = torch.rand(views.images.shape, generator=torch.Generator().manual_seed(0)) * 0.8
    inverted = replace(views, cam2world=torch.linalg.inv(views.cam2world))
    for images, why in [(torch.ones_like(noise), measure_box.NO_OBJECT), (noise, measure_box.NO_BACKGROUND)]:
        with pytest.raises(NoBounds, match=why):
            scene_bounds(replace(views, images=images))
    mixed = replace(views, intrinsics=views.intrinsics * torch.tensor([0.01, 1, 1])[:, None])
    with pytest.raises(NoBounds, match=f"{measure_box.DISAGREE}|{measure_box.NO_HULL}"):
        scene_bounds(mixed)
    with pytest.raises(NoBounds, match=f"{measure_box.NO_MIDDLE}|{measure_box.NO_HULL}"):
        scene_bounds(inverted)


@pytest.mark.parametrize("poses", ["cam2world", "world2cam"])
@pytest.mark.parametrize("axes", ["opencv", "opengl"])
def test_the_doctor_names_the_convention(views, poses, axes):
    """Poses of one convention that are read as another one are told, and reading them as told is right."""
    true = Convention(poses, axes)
    written = views.cam2world.double() @ torch.linalg.inv(
        torch.from_numpy(as_read(torch.eye(4).double().numpy(), Convention("cam2world", axes)))
    )
    written = torch.linalg.inv(written) if poses == "world2cam" else written
    read = replace(views, cam2world=torch.from_numpy(as_read(written.numpy(), AS_IS)).float())
    told = verdict([examine(read, AS_IS)], AS_IS)
    assert scene_fault(read, silhouettes(read), AS_IS) == told
    if true == AS_IS:
        assert told == "" and agreement(views, silhouettes(views), views.cam2world) > 0.95
    else:
        assert f"give --poses {poses} --axes {axes}" in told
        again = replace(views, cam2world=torch.from_numpy(as_read(written.numpy(), true)).float())
        assert verdict([examine(again, true)], true) == ""


def test_the_doctor_says_what_it_sees(views):
    line = examine(views, AS_IS).line
    assert line.startswith("scene cuboid: 24 cameras 1.3 from (0, 0, 0), where they look, background white")
    assert "silhouettes agree to 100%" in line or "silhouettes agree to 99%" in line


def test_mixed_up_views_are_told():
    """An L, whose views have each other's poses: no convention helps."""
    legs = [([-0.4, -0.1, -0.1], [0.4, 0.1, 0.1]), ([-0.4, -0.1, 0.1], [-0.2, 0.1, 0.4])]
    views = cuboid_views([(torch.tensor(low), torch.tensor(high)) for low, high in legs], num_views=24)
    mixed = replace(views, cam2world=views.cam2world.roll(7, 0))
    told = verdict([examine(mixed, AS_IS)], AS_IS)
    assert "under any other convention" in told and "which view belongs to which pose" in told
