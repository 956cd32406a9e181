"""What the readers make of sound sources: folders and zips of every layout."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_sources import (
    INTRINSICS,
    POSE,
    blender_scene,
    edit_frame,
    edit_json,
    nerfstudio_scene,
    picture,
    released_source,
    srn_scene,
    zip_folder,
)

from scaling.data.png import decode_png
from scaling.data.readers import registry
from scaling.data.scene_ref import SceneRef


def read_only_scene(source: Path) -> dict[str, Any]:
    [ref] = registry.list_scenes(source)
    return registry.read_scene(ref)


def shades(scene: dict[str, Any]) -> list[int]:
    return [int(decode_png(png)[0, 0, 0]) for png in scene["views"]]


# ShapeNet-SRN


def test_srn_scene(tmp_path: Path) -> None:
    for name in ("b", "a"):
        srn_scene(tmp_path / name)
    refs = registry.list_scenes(tmp_path)
    assert [(ref.scene_id, ref.category, ref.layout) for ref in refs] == [("a", "", "srn"), ("b", "", "srn")]
    scene = registry.read_scene(refs[0])
    assert (scene["source"], scene["height"], scene["width"], list(scene["test_views"])) == ("a", 8, 8, [0])
    assert scene["views"][2] == picture(2)  # RGB files keep their bytes
    focal = 131.25 / 128
    assert scene["intrinsics"][:9] == pytest.approx([focal, 0, 0.5, 0, focal, 0.375, 0, 0, 1])
    assert scene["cam2world"][16:32] == pytest.approx(POSE.ravel())


def test_srn_categories(tmp_path: Path) -> None:
    srn_scene(tmp_path / "planes" / "b")
    srn_scene(tmp_path / "cars" / "c")
    srn_scene(tmp_path / "cars" / "a")
    (tmp_path / "readme").mkdir()
    refs = registry.list_scenes(tmp_path, layout="srn")
    expected = [("a", "cars", "cars/a"), ("b", "planes", "planes/b"), ("c", "cars", "cars/c")]
    assert [(ref.scene_id, ref.category, ref.source) for ref in refs] == expected
    assert [ref.scene_id for ref in registry.list_scenes(tmp_path, category="cars")] == ["a", "c"]
    with pytest.raises(ValueError, match="no category 'boats'; it has cars, planes"):
        registry.list_scenes(tmp_path, category="boats")


def test_a_relative_source_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srn_scene(tmp_path / "cars" / "a")
    monkeypatch.chdir(tmp_path)
    [ref] = registry.list_scenes("cars")
    monkeypatch.chdir("/")
    assert registry.read_scene(ref)["source"] == "a"


# The paper's release


def test_released_layout(tmp_path: Path) -> None:
    source = released_source(tmp_path, {"car": ["b", "a"]})
    refs = registry.list_scenes(source)
    assert [(ref.scene_id, ref.category) for ref in refs] == [("b", "car"), ("a", "car")]
    scene = registry.read_scene(refs[0])
    assert scene["source"] == "square128_above/b"
    assert scene["intrinsics"][9:] == pytest.approx([1.02, 0, 0.5, 0, 1.02, 0.5, 0, 0, 1])
    assert scene["cam2world"][:16] == pytest.approx(POSE.ravel())


def test_released_categories(tmp_path: Path) -> None:
    source = released_source(tmp_path, {"sofa": ["s"], "car": ["b", "s", "a"]})
    refs = registry.list_scenes(source, layout="transforms")
    assert [(ref.scene_id, ref.category) for ref in refs] == [("s", "sofa"), ("b", "car"), ("s", "car"), ("a", "car")]
    assert [ref.scene_id for ref in registry.list_scenes(source, category="car")] == ["b", "s", "a"]
    with pytest.raises(ValueError, match="no category 'cars'; it has car, sofa"):
        registry.list_scenes(source, category="cars")


# nerfstudio and Blender


def test_nerfstudio_scene(tmp_path: Path) -> None:
    scene = read_only_scene(nerfstudio_scene(tmp_path / "a", num_views=20).parent)
    assert list(scene["test_views"]) == [0, 1] and shades(scene) == list(range(20))
    assert scene["cam2world"][16:32] == pytest.approx(POSE.ravel())
    assert scene["intrinsics"][:9] == pytest.approx([1.02, 0, 0.5, 0, 1.02, 0.5, 0, 0, 1])
    assert (scene["source"], scene["category"]) == ("a", "")


def test_intrinsics_of_transforms(tmp_path: Path) -> None:
    """A frame's keys win over the file's; its angle wins over the file's focal lengths."""
    camera = {"fl_x": 16, "fl_y": 20, "cx": 9, "cy": 7, "w": 16, "h": 16, "k1": 0.0, "camera_model": "OPENCV"}
    path = nerfstudio_scene(tmp_path / "a", **camera, camera_angle_x=1.0) / "transforms.json"
    edit_frame(path, 1, fl_x=8.0)
    edit_frame(path, 2, camera_angle_x=math.pi / 2)
    matrices = read_only_scene(tmp_path)["intrinsics"].reshape(3, 3, 3)
    assert matrices[:, 0, 0] == pytest.approx([1, 0.5, 0.5])
    assert matrices[:, 1, 1] == pytest.approx([1.25, 1.25, 0.5])
    assert matrices[:, :2, 2] == pytest.approx(np.array([[9 / 16, 7 / 16]] * 3))


def test_an_angle_spans_the_width_of_wide_images(tmp_path: Path) -> None:
    scene = nerfstudio_scene(tmp_path / "a", fl_x=None, camera_angle_x=math.pi / 2)
    edit_json(scene / "transforms.json", fl_x=None)
    for view in range(3):
        (scene / "images" / f"{view}.png").write_bytes(picture(view, width=16, height=8))
    row = read_only_scene(tmp_path)
    assert row["intrinsics"][:9] == pytest.approx([0.5, 0, 0.5, 0, 1, 0.5, 0, 0, 1])


@pytest.mark.parametrize(
    ("num_views", "expected_shades", "test_views"),
    [
        ({"train": 3, "val": 1, "test": 2}, [0, 1, 2, 50, 100, 101], [4, 5]),
        ({"train": 3, "val": 2}, [0, 1, 2, 50, 51], [3, 4]),
        ({"train": 3}, [0, 1, 2], [0]),
    ],
)
def test_blender_splits(
    tmp_path: Path, num_views: dict[str, int], expected_shades: list[int], test_views: list[int]
) -> None:
    blender_scene(tmp_path / "lego", **num_views)
    scene = read_only_scene(tmp_path)
    assert shades(scene) == expected_shades and list(scene["test_views"]) == test_views
    focal = 0.5 / math.tan(0.6911112070083618 / 2)
    assert scene["intrinsics"][:9] == pytest.approx([focal, 0, 0.5, 0, focal, 0.5, 0, 0, 1])
    assert scene["cam2world"][:16] == pytest.approx(POSE.ravel())


def test_an_image_that_is_a_test_view_is_no_training_view(tmp_path: Path) -> None:
    scene = blender_scene(tmp_path / "lego", train=3, val=2, test=2)
    (scene / "transforms_val.json").write_text((scene / "transforms_test.json").read_text())  # many do so
    edit_frame(scene / "transforms_train.json", 1, file_path="test/r_0.png")
    row = read_only_scene(tmp_path)
    assert shades(row) == [0, 2, 100, 101] and list(row["test_views"]) == [2, 3]


def test_nerfstudio_splits(tmp_path: Path) -> None:
    names = {"train_filenames": ["images/2.png", "./images/0.png"], "val_filenames": ["images/3.png"]}
    path = nerfstudio_scene(tmp_path / "a", num_views=5, **names, test_filenames=[]) / "transforms.json"
    row = read_only_scene(tmp_path)
    assert shades(row) == [2, 0, 3] and list(row["test_views"]) == [2]
    edit_json(path, test_filenames=["images/4.png"])
    row = read_only_scene(tmp_path)
    assert shades(row) == [2, 0, 3, 4] and list(row["test_views"]) == [3]


def test_blender_categories(tmp_path: Path) -> None:
    blender_scene(tmp_path / "toys" / "lego", train=2, test=1)
    nerfstudio_scene(tmp_path / "plants" / "ficus")
    refs = registry.list_scenes(tmp_path, layout="transforms")
    assert [(ref.scene_id, ref.category) for ref in refs] == [("ficus", "plants"), ("lego", "toys")]


# Zips


def test_a_zip_is_read_as_its_folder(tmp_path: Path) -> None:
    for name in ("b", "a"):
        srn_scene(tmp_path / "cars" / name)
    archive = zip_folder(tmp_path / "cars", tmp_path / "cars_train.zip", "cars_train")
    with zipfile.ZipFile(archive, "a") as out:  # what the macOS Finder adds
        out.writestr("__MACOSX/cars_train/a/rgb/._000000.png", b"x")
    refs = registry.list_scenes(archive)
    expected = [("a", "", "cars_train/a"), ("b", "", "cars_train/b")]
    assert [(ref.scene_id, ref.category, ref.source) for ref in refs] == expected
    unpacked = registry.list_scenes(tmp_path / "cars")
    for ref, same in zip(refs, unpacked, strict=True):
        travelled = SceneRef(**json.loads(json.dumps(asdict(ref))))
        ours, theirs = registry.read_scene(travelled), registry.read_scene(same)
        assert ours["views"] == theirs["views"] and np.array_equal(ours["cam2world"], theirs["cam2world"])
        assert np.array_equal(ours["intrinsics"], theirs["intrinsics"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cars", "cars_train.zip"], "nothing is unpacked"


def test_zips_of_a_folder_are_categories(tmp_path: Path) -> None:
    srn_scene(tmp_path / "source" / "planes" / "p")
    for name, scene_id in (("cars_test", "c"), ("cars_train", "d")):
        folder = srn_scene(tmp_path / name / scene_id).parent
        zip_folder(folder, tmp_path / "source" / f"{name}.zip", name)
    refs = registry.list_scenes(tmp_path / "source")
    found = [(ref.scene_id, ref.category, ref.split) for ref in refs]
    assert found == [("c", "cars", "test"), ("d", "cars", "train"), ("p", "planes", "")]
    [ref, _] = registry.list_scenes(tmp_path / "source", category="cars")
    assert registry.read_scene(ref)["source"] == "cars_test.zip/cars_test/c"


def test_a_zip_may_be_replaced(tmp_path: Path) -> None:
    archive = tmp_path / "cars.zip"
    for name in ("a", "bb"):
        zip_folder(srn_scene(tmp_path / name / name).parent, archive)
        assert [ref.scene_id for ref in registry.list_scenes(archive)] == [name]


def test_zips_of_the_other_layouts(tmp_path: Path) -> None:
    blender = zip_folder(blender_scene(tmp_path / "b" / "lego", train=2, test=1).parent, tmp_path / "nerf.zip", "nerf")
    assert shades(read_only_scene(blender)) == [0, 1, 100]
    released = zip_folder(released_source(tmp_path / "r", {"car": ["a"]}), tmp_path / "released.zip")
    assert registry.list_scenes(released)[0].category == "car" and shades(read_only_scene(released)) == [0, 1]


# Sources that are none


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        registry.list_scenes(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"looked for transforms .*dataset_map.json.* for srn .*; it is empty"):
        registry.list_scenes(tmp_path)
    with pytest.raises(ValueError, match="unknown layout 'blend'"):
        registry.list_scenes(tmp_path, layout="blend")
    (tmp_path / "cars.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cars.tar: is neither a folder nor a \.zip file"):
        registry.list_scenes(tmp_path / "cars.tar")
    srn_scene(tmp_path / "one")
    with pytest.raises(ValueError, match="single scene: give the folder above"):
        registry.list_scenes(tmp_path / "one")
    with pytest.raises(ValueError, match="looked for transforms"):
        registry.list_scenes(tmp_path, layout="transforms")
    with pytest.raises(ValueError, match="no category 'car'; it has no categories"):
        registry.list_scenes(tmp_path, category="car")
    nerfstudio_scene(tmp_path / "two")
    with pytest.raises(ValueError, match="several layouts, transforms and srn: choose one by --layout"):
        registry.list_scenes(tmp_path)
    with pytest.raises(ValueError, match="single scene: give the folder above"):
        registry.list_scenes(tmp_path / "two")


@pytest.mark.parametrize(("text", "reason"), [("[1]", "expected an object"), ("{", "not valid JSON")])
def test_maps_that_are_none(tmp_path: Path, text: str, reason: str) -> None:
    source = released_source(tmp_path, {"car": ["a"]})
    (source / "dataset_map.json").write_text(text)
    with pytest.raises(ValueError, match=rf"dataset_map.json: {reason}"):
        registry.list_scenes(source)


def test_zips_that_are_none(tmp_path: Path) -> None:
    sound = zip_folder(srn_scene(tmp_path / "cars" / "a").parent, tmp_path / "sound.zip")
    cut = tmp_path / "cut" / "cars.zip"
    cut.parent.mkdir()
    cut.write_bytes(sound.read_bytes()[:-40])
    for source in (cut, cut.parent):
        with pytest.raises(ValueError, match=r"cars.zip: is not a readable zip file \(.*\): fetch it again"):
            registry.list_scenes(source)
    for name in ("../evil/rgb/0.png", "/etc/rgb/0.png"):
        evil = tmp_path / "evil.zip"
        with zipfile.ZipFile(evil, "w") as out:
            out.writestr(name, picture())
        with pytest.raises(ValueError, match=r"evil.zip: its member '.*rgb/0.png' leads out of the archive"):
            registry.list_scenes(evil)


def test_same_pinhole_by_focal_or_by_angle() -> None:
    from scaling.data.readers.transforms_json import camera_intrinsics

    angle = {"camera_angle_x": 2 * math.atan(0.5)}
    assert camera_intrinsics(angle, (8, 8)) == pytest.approx(np.array(INTRINSICS))
    assert camera_intrinsics({"fl_x": 8}, (8, 8)) == pytest.approx(np.array(INTRINSICS))
