"""The measured box: around the visual hulls of all scenes of a store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cuboids import FOCAL, RADIUS, cuboid_views, row_of

from scaling.data.scene_store import SceneStore
from scaling.data.scene_views import SceneViews
from scaling.data.store_writer import StoreWriter
from scaling.data.stores import EmbeddedCars, StoreSource
from scaling.models.box import Box
from scaling.training.measure.box import CELLS, NoBounds, row_bounds, scene_bounds, set_box, source_bounds
from scaling.training.process_group import Workers

SIDES = torch.tensor([0.4, 0.2, 0.3])  # of the cuboids, half of them
UP = torch.tensor([0.0, 0.0, 0.1])
CELL = 1.6 / CELLS
NEAR = 2.5 * CELL  # how much larger than the scene its bounds may be


@pytest.fixture(scope="module")
def scenes() -> list[SceneViews]:
    """The second one stands higher."""
    return [
        cuboid_views([(-SIDES, SIDES)], scene_id="low"),
        cuboid_views([(-SIDES + UP, SIDES + UP)], scene_id="high"),
    ]


def assert_around(bounds: torch.Tensor, low: torch.Tensor, high: torch.Tensor, near: float = NEAR) -> None:
    assert (bounds[0] <= low).all() and (bounds[0] >= low - near).all(), bounds
    assert (bounds[1] >= high).all() and (bounds[1] <= high + near).all(), bounds


def test_the_bounds_of_a_scene_hold_it_and_little_more(scenes):
    assert_around(scene_bounds(scenes[0]), -SIDES, SIDES)
    assert_around(row_bounds(row_of(scenes[1])), -SIDES + UP, SIDES + UP, NEAR + 2 * CELL)  # by 16 of its views


def test_the_box_has_a_latent_pixel_more_on_each_side(scenes):
    box, bounds = Box(None), torch.tensor([[-0.4, -0.2, -0.3], [0.4, 0.2, 0.4]])
    set_box(box, bounds, scenes, 32, Workers())
    pixel = RADIUS / FOCAL / 32  # 0.04
    # Cameras are as far from the box's middle as from the origin, on average.
    torch.testing.assert_close(box.corners, bounds + torch.tensor([[-pixel], [pixel]]), rtol=0, atol=1e-3)


def test_without_bounds_the_box_is_around_the_workers_scenes(scenes):
    box = Box(None)
    set_box(box, None, scenes, 32, Workers())
    assert_around(box.corners, -SIDES, SIDES + UP, NEAR + RADIUS / FOCAL / 32)
    blank = [replace(scenes[0], images=torch.ones_like(scenes[0].images))]
    with pytest.raises(NoBounds, match=r"low: its views show nothing but background\. Likely causes: .*box_side SIDE"):
        set_box(Box(None), None, blank, 32, Workers())


def test_a_box_with_a_side_is_not_measured(scenes):
    box = Box(1.5)
    set_box(box, torch.tensor([[-0.1] * 3, [0.1] * 3]), scenes, 32, Workers())
    assert box.bounds.tolist() == [[-0.75] * 3, [0.75] * 3]


def write_store(path: Path, scenes: list[SceneViews], bounds: list | None = None) -> StoreSource:
    with StoreWriter(path, "made") as writer:
        for views, known in zip(scenes, bounds or [None] * len(scenes)):
            writer.add(row_of(views), known)
    return StoreSource(path)


def test_a_store_keeps_the_union_of_its_scenes_bounds(scenes, tmp_path):
    low, high = [[-0.4, -0.2, -0.3], [0.4, 0.2, 0.3]], [[-0.3, -0.25, -0.2], [0.5, 0.1, 0.4]]
    store = write_store(tmp_path, scenes, [low, high])
    assert store.bounds() == [[-0.4, -0.25, -0.3], [0.5, 0.2, 0.4]]
    assert source_bounds(store, Workers()).tolist() == pytest.approx(np.array(store.bounds()))
    info = json.loads((tmp_path / "store.json").read_text())
    assert info["bounds"] == store.bounds()


def test_an_older_store_is_measured_when_it_is_used(scenes, tmp_path):
    """Also of scenes that stage 1 does not take; one that cannot be read says nothing."""
    store = write_store(tmp_path, scenes)
    info = json.loads((tmp_path / "store.json").read_text())
    assert info.pop("bounds") is None
    (tmp_path / "store.json").write_text(json.dumps(info))
    store = StoreSource(tmp_path)
    assert store.bounds() is None
    assert_around(source_bounds(store, Workers()), -SIDES, SIDES + UP, NEAR + 2 * CELL)


@pytest.mark.parametrize(
    "bounds",
    ["wide", [[0, 0, 0]], [[0, 0, 0], [1, 1]], [[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 1e999]], {"low": 1}, 7],
)
def test_bounds_that_are_none_are_refused(scenes, tmp_path, bounds):
    write_store(tmp_path, scenes)
    info = json.loads((tmp_path / "store.json").read_text())
    text = json.dumps({**info, "bounds": bounds}).replace("Infinity", "1e999")
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(ValueError, match=r"store\.json"):
        SceneStore(tmp_path).bounds()


def test_cars_without_an_end_are_not_measured():
    """Stage 1 then measures its own scenes."""
    assert source_bounds(EmbeddedCars(32, 12), Workers()) is None
