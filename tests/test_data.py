"""Readers on tiny folders, the scene store, and what bad input is told."""

from __future__ import annotations

import copy
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from scaling.data import sources
from scaling.data.png import decode_png, encode_png
from scaling.data.scene_store import SCHEMA, SceneStore, StoreWriter
from scaling.data.scenes import (
    SceneError,
    check_pose,
    check_scene_id,
    default_test_views,
    make_row,
    views_from_row,
)

POSE = np.array([[0, 0, -1, 1.3], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
INTRINSICS = [[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]


def picture(shade: int = 100, width: int = 8, height: int = 8) -> bytes:
    return encode_png(np.full((height, width, 3), shade, dtype=np.uint8))


def row(scene_id: str = "one", num_views: int = 2, shade: int = 100) -> dict[str, Any]:
    pngs = [picture(shade + view) for view in range(num_views)]
    cameras = np.tile(POSE, (num_views, 1, 1)), np.tile(INTRINSICS, (num_views, 1, 1))
    return make_row(scene_id, "car", pngs, *cameras, default_test_views(num_views), 8, 8, scene_id)


def srn_scene(folder: Path, num_views: int = 3) -> Path:
    (folder / "rgb").mkdir(parents=True)
    (folder / "pose").mkdir()
    for view in range(num_views):
        (folder / "rgb" / f"{view:06d}.png").write_bytes(picture(view))
        (folder / "pose" / f"{view:06d}.txt").write_text(" ".join(str(number) for number in POSE.ravel()))
    (folder / "intrinsics.txt").write_text("131.25 64. 48. 0.\n0. 0. 0.\n1.\n128 128\n")
    return folder


def released_source(folder: Path, ids: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dataset_map.json").write_text(json.dumps({"car": ids}))
    for scene_id in ids:
        images = folder / "square128_above" / scene_id / "images"
        images.mkdir(parents=True)
        frames = []
        for view in range(2):
            (images / f"{view}.png").write_bytes(picture(view))
            camera = {"fl_x": 8.16, "fl_y": 8.16, "cx": 4, "cy": 4, "w": 8, "h": 8}
            frames.append({"file_path": f"images/{view}.png", "transform_matrix": POSE.tolist(), **camera})
        (images.parent / "transforms_opencv.json").write_text(json.dumps({"frames": frames}))
    return folder


# Scenes


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a\\b", "a b", "ä", "a\n", "a" * 201, "a\0", None])
def test_bad_scene_ids(bad: Any) -> None:
    with pytest.raises(ValueError, match="bad scene id"):
        check_scene_id(bad)


def test_good_scene_ids_and_default_test_views() -> None:
    assert check_scene_id("a-B_2.x") == "a-B_2.x"
    assert [default_test_views(num_views) for num_views in (2, 19, 40)] == [(0,), (0,), (0, 1, 2, 3)]


def test_scene_error_says_everything() -> None:
    error = SceneError("one", "rgb/3.png", "is cut short", "cars/one")
    again = copy.copy(error)  # rebuilt from its arguments, as between processes
    assert (again.scene_id, again.file, again.reason, again.source) == ("one", "rgb/3.png", "is cut short", "cars/one")
    assert str(again) == "scene one (source cars/one): rgb/3.png: is cut short"


def test_images_are_made_smaller_by_averaging_areas() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[:2, :2, 0] = [[0, 51], [102, 255]]
    pixels[2:, 2:, 2] = 255
    scene = make_row("a", "", [encode_png(pixels)] * 2, [POSE] * 2, [INTRINSICS] * 2, [1], 4, 4, "a")
    views = views_from_row(scene, 2)
    expected = torch.zeros(3, 2, 2)
    expected[0, 0, 0] = (0 + 51 + 102 + 255) / 4 / 255
    expected[2, 1, 1] = 1
    torch.testing.assert_close(views.images[0], expected)
    assert views.images.dtype == torch.float32 and views.cam2world.shape == (2, 4, 4)
    assert views.test_views == (1,) and views.train_views == (0,)
    torch.testing.assert_close(views_from_row(scene, 4).images[1], torch.from_numpy(pixels).permute(2, 0, 1) / 255)


def test_views_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SceneError, match=r"scene one.*16 were asked for"):
        views_from_row(row(), 16)
    with pytest.raises(SceneError, match=r"views\[1\]: the image is not 8x8 as the row says"):
        views_from_row({**row(), "views": [picture(), picture(width=9)]}, 8)
    wide = {**row(), "views": [picture(width=16)] * 2, "width": 16}
    with pytest.raises(SceneError, match="must be square, these have 16x8"):
        views_from_row(wide, 8)
    with pytest.raises(SceneError, match="2 views, 2 poses and 1 intrinsics"):
        views_from_row({**row(), "intrinsics": [1.0, 0, 0.5, 0, 1, 0.5, 0, 0, 1]}, 8)
    with pytest.raises(SceneError, match="test_views"):
        views_from_row({**row(), "test_views": [2]}, 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pose: pose.__setitem__((0, 3), np.nan), "finite"),
        (lambda pose: pose.__setitem__((0, 3), 1e300), "finite"),
        (lambda pose: pose.__setitem__((1, 0), 1.01), "not orthonormal"),
        (lambda pose: pose.__setitem__((2, 1), 1.0), "mirrors"),
        (lambda pose: pose.__setitem__((3, 0), 0.5), "last row"),
    ],
)
def test_bad_poses(change: Callable[[np.ndarray], None], reason: str) -> None:
    pose = POSE.copy()
    change(pose)
    with pytest.raises(ValueError, match=reason):
        check_pose(pose)


def test_transparency_is_composited_on_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(out, format="PNG")
    assert decode_png(out.getvalue())[0, 0].tolist() == [255, 204, 204]


# Readers


def test_srn_scene(tmp_path: Path) -> None:
    for name in ("b", "a"):
        srn_scene(tmp_path / name)
    refs = sources.list_scenes(tmp_path)
    assert [(ref.scene_id, ref.category, ref.layout) for ref in refs] == [("a", "", "srn"), ("b", "", "srn")]
    scene = sources.read_scene(refs[0])
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
    refs = sources.list_scenes(tmp_path, layout="srn")
    expected = [("a", "cars", "cars/a"), ("b", "planes", "planes/b"), ("c", "cars", "cars/c")]
    assert [(ref.scene_id, ref.category, ref.source) for ref in refs] == expected
    assert [ref.scene_id for ref in sources.list_scenes(tmp_path, category="cars")] == ["a", "c"]
    with pytest.raises(ValueError, match="no category 'boats'; it has cars, planes"):
        sources.list_scenes(tmp_path, category="boats")


def _cut_short(scene: Path) -> None:
    path = scene / "rgb/000001.png"
    path.write_bytes(path.read_bytes()[:-30])


def _huge_header(scene: Path) -> None:
    data = picture()
    (scene / "rgb/000001.png").write_bytes(data[:16] + struct.pack(">II", 100_000, 100_000) + data[24:])


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (_cut_short, "rgb/000001.png", "damaged or cut short"),
        (_huge_header, "rgb/000001.png", "100000x100000"),
        (lambda scene: (scene / "rgb/000001.png").write_bytes(b""), "rgb/000001.png", "empty"),
        (lambda scene: (scene / "rgb/000001.png").write_bytes(b"GIF89a" * 9), "rgb/000001.png", "not a PNG"),
        (lambda scene: Image.new("L", (8, 8)).save(scene / "rgb/000002.png"), "rgb/000002.png", "greyscale"),
        (lambda scene: (scene / "rgb/000002.png").write_bytes(picture(width=9)), "rgb/000002.png", "9x8"),
        (lambda scene: (scene / "pose/000002.txt").unlink(), "rgb/000002.png", "has no pose"),
        (lambda scene: (scene / "rgb/000002.png").unlink(), "pose/000002.txt", "has no image"),
        (lambda scene: (scene / "pose/000000.txt").write_text("1 0 0"), "pose/000000.txt", "4x4 numbers, got 3"),
        (lambda scene: (scene / "pose/000000.txt").write_text("one"), "pose/000000.txt", "expected numbers"),
        (lambda scene: (scene / "intrinsics.txt").unlink(), "intrinsics.txt", "cannot be read"),
        (lambda scene: (scene / "intrinsics.txt").write_text("131 64 64 0."), "intrinsics.txt", "H W"),
        (lambda scene: (scene / "intrinsics.txt").write_text("-1 4 4\n8 8"), "intrinsics.txt", "positive"),
        (lambda scene: (scene / "intrinsics.txt").write_text("9 4 4\n8 16"), "intrinsics.txt", "aspect ratio"),
        (lambda scene: (scene / "pose").rename(scene / "poses"), "pose", "no such folder"),
    ],
)
def test_damaged_srn_scenes(tmp_path: Path, damage: Callable[[Path], Any], file: str, reason: str) -> None:
    damage(srn_scene(tmp_path / "one"))
    with pytest.raises(SceneError) as caught:
        sources.read_scene(sources.list_scenes(tmp_path)[0])
    assert caught.value.scene_id == caught.value.source == "one"
    assert caught.value.file == str(tmp_path / "one" / file)
    assert reason in caught.value.reason and reason in str(caught.value)


def test_a_folder_that_is_no_safe_id_is_listed_and_refused_when_read(tmp_path: Path) -> None:
    srn_scene(tmp_path / "two words")
    with pytest.raises(SceneError, match="bad scene id"):
        sources.read_scene(sources.list_scenes(tmp_path)[0])


def test_released_layout(tmp_path: Path) -> None:
    source = released_source(tmp_path, ["b", "a"])
    refs = sources.list_scenes(source)
    assert [(ref.scene_id, ref.category) for ref in refs] == [("b", "car"), ("a", "car")]
    scene = sources.read_scene(refs[0])
    assert scene["source"] == "square128_above/b"
    assert scene["intrinsics"][9:] == pytest.approx([1.02, 0, 0.5, 0, 1.02, 0.5, 0, 0, 1])


def _edit(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda transforms: transforms["frames"][1].__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda transforms: transforms.pop("frames"), '"frames"'),
        (lambda transforms: transforms["frames"][1].pop("transform_matrix"), r'frames\[1\]: key "transform_matrix"'),
        (lambda transforms: transforms["frames"][1].pop("fl_y"), r'frames\[1\]: key "fl_y"'),
        (_edit("fl_x", 10**400), r"frames\[1\]: .*too large"),
        (_edit("fl_x", float("nan")), r"frames\[1\]: .*finite"),
        (_edit("transform_matrix", [[1, 2], [3]]), r'"transform_matrix": the pose must be 4x4'),
        (_edit("file_path", "../../b/images/0.png"), "leads out of the scene's folder"),
        (_edit("file_path", "/etc/passwd"), "leads out of the scene's folder"),
        (_edit("file_path", 3), '"file_path" must be the name'),
    ],
)
def test_damaged_transforms(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], reason: str) -> None:
    path = released_source(tmp_path, ["a"]) / "square128_above/a/transforms_opencv.json"
    transforms = json.loads(path.read_text())
    edit(transforms)
    path.write_text(json.dumps(transforms))
    with pytest.raises(SceneError, match=reason) as caught:
        sources.read_scene(sources.list_scenes(tmp_path)[0])
    assert caught.value.file == str(path)


def test_ids_of_a_map_never_become_paths(tmp_path: Path) -> None:
    source = released_source(tmp_path / "source", ["a"])
    (source / "dataset_map.json").write_text(json.dumps({"car": ["../../secret"]}))
    (ref,) = sources.list_scenes(source)
    assert ref.folder == ""
    with pytest.raises(SceneError, match="bad scene id"):
        sources.read_scene(ref)
    (source / "dataset_map.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"dataset_map.json: expected an object"):
        sources.list_scenes(source)
    (source / "dataset_map.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_map.json: not valid JSON"):
        sources.list_scenes(source)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        sources.list_scenes(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"looked for transforms .*dataset_map.json.* for srn .*the folder is empty"):
        sources.list_scenes(tmp_path)
    with pytest.raises(ValueError, match="unknown layout 'blend'"):
        sources.list_scenes(tmp_path, layout="blend")
    srn_scene(tmp_path / "one")
    with pytest.raises(ValueError, match="single scene: give the folder above"):
        sources.list_scenes(tmp_path / "one")
    with pytest.raises(ValueError, match="looked for transforms"):
        sources.list_scenes(tmp_path, layout="transforms")
    with pytest.raises(ValueError, match="no category 'car'; it has no categories"):
        sources.list_scenes(tmp_path, category="car")


# The store


def make_store(uri: str | Path, count: int) -> list[str]:
    ids = [f"s{number:03d}" for number in reversed(range(count))]
    with StoreWriter(uri, "somewhere") as writer:
        for number, scene_id in enumerate(ids):
            assert writer.add(row(scene_id, shade=number % 200))
    return ids


@pytest.mark.parametrize("as_uri", [False, True])
def test_store_round_trip(tmp_path: Path, as_uri: bool) -> None:
    uri = f"file://{tmp_path}/store" if as_uri else str(tmp_path / "store")
    with StoreWriter(uri, "somewhere") as writer:
        writer.add(row("b", num_views=3))
        writer.add(row("a"))
        assert not writer.add(row("b"))
        writer.reject("c", "cars/c", "rgb/0.png", "is cut short")
    store = SceneStore(uri)
    assert store.ids() == ["b", "a"] and store.categories() == ["car", "car"] and len(store) == 2
    assert store.info["format_version"] == 1 and store.info["source"] == "somewhere"
    assert [reject["scene_id"] for reject in store.rejects()] == ["b", "c"]
    assert "same id" in store.rejects()[0]["reason"] and store.rejects()[1]["file"] == "rgb/0.png"
    (stored, _) = store.rows()
    expected = row("b", num_views=3)
    assert stored["views"] == expected["views"] and stored["source"] == "b"
    assert np.array_equal(np.float32(stored["cam2world"]), expected["cam2world"])
    views = views_from_row(stored, 4)
    torch.testing.assert_close(views.images[2], torch.full((3, 4, 4), 102 / 255))
    assert pq.read_schema(store.paths()[0], filesystem=store.filesystem).equals(SCHEMA)


def test_store_parts_row_groups_and_order(tmp_path: Path) -> None:
    ids = make_store(tmp_path, 260)
    store = SceneStore(tmp_path)
    assert [Path(path).name for path in store.paths()] == ["scenes-00000.parquet", "scenes-00001.parquet"]
    part = pq.read_metadata(store.paths()[0])
    assert [part.row_group(group).num_rows for group in range(part.num_row_groups)] == [16] * 16
    assert store.ids() == ids == [stored["scene_id"] for stored in store.rows()]
    asked = [ids[257], ids[3], ids[255], ids[2]]
    assert [stored["scene_id"] for stored in store.rows(asked)] == asked
    assert next(store.rows([ids[17]]))["views"][0] == picture(17)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no scene nobody"):
        next(store.rows(["nobody"]))


def test_only_a_complete_store_opens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"experiments/prepare.py"):
        SceneStore(tmp_path / "none")
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path, "somewhere") as writer:
        for number in range(20):
            writer.add(row(f"old-{number}"))
        raise KeyboardInterrupt
    assert (tmp_path / "scenes-00000.parquet").exists()
    with pytest.raises(FileNotFoundError, match="no complete scene store"):
        SceneStore(tmp_path)
    make_store(tmp_path, 3)  # replaces what the interrupted one left
    assert SceneStore(tmp_path).ids() == ["s002", "s001", "s000"]
    with pytest.raises(FileExistsError, match="already holds a scene store"):
        make_store(tmp_path, 3)


def test_stores_that_are_damaged_or_newer(tmp_path: Path) -> None:
    make_store(tmp_path, 2)
    described = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**described, "format_version": 2}))
    with pytest.raises(ValueError, match="has format version 2, this program reads up to 1"):
        SceneStore(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps({**described, "num_scenes": 3}))
    with pytest.raises(ValueError, match=r"holds 2 scenes, its store.json says 3"):
        SceneStore(tmp_path).ids()
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store.json is damaged"):
        SceneStore(tmp_path)


def test_a_store_without_scenes_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 were rejected; the first, one: is cut short"):  # noqa: SIM117
        with StoreWriter(tmp_path, "somewhere") as writer:
            writer.reject("one", "one", "rgb/0.png", "is cut short")
    assert not (tmp_path / "store.json").exists() and (tmp_path / "rejects.parquet").exists()
