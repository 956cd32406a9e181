"""What bad input is told: every reason names the file and what is wrong, and becomes a row of the store's rejects."""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.small_sources import (
    OPENGL_POSE,
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

from scaling.data.readers import registry, zip_paths
from scaling.data.scene_store import SceneStore
from scaling.data.scene_views import check_pose
from scaling.data.store_writer import StoreWriter
from scaling.distributed.prepare import read_refs, write_rows

pytestmark = pytest.mark.slow

Damage = Callable[[Path], Any]


def rejects(source: Path, store: Path) -> list[dict[str, str]]:
    """What `prepare` rejects of a source, by its functions, without Ray. A sound scene keeps the store from failing."""
    refs = pa.Table.from_pylist([asdict(ref) for ref in registry.list_scenes(source)])
    sound = srn_scene(store.parent / "sound" / "sound").parent
    with StoreWriter(store, str(source)) as writer:
        writer.add(registry.read_scene(registry.list_scenes(sound)[0]))
        for rows in read_refs(refs):
            write_rows(writer, rows)
    return SceneStore(store).rejects()


def check_reject(tmp_path: Path, file: Path, reason: str) -> None:
    """The only reject of tmp_path/source is of scene `one`."""
    [reject] = rejects(tmp_path / "source", tmp_path / "store")
    assert reject["scene_id"] == "one" and reject["source"].endswith("one")
    assert reject["file"] == str(file) and reason in reject["reason"]


def matrix(pose: np.ndarray, place: tuple[int, int], value: float) -> list[list[float]]:
    changed = pose.copy()
    changed[place] = value
    return changed.tolist()


def text(pose: list[list[float]]) -> str:
    return " ".join(str(number) for line in pose for number in line)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def with_header(width: int, height: int) -> bytes:
    data = picture()
    return data[:16] + struct.pack(">II", width, height) + data[24:]


def with_broken_chunk() -> bytes:
    """One of a length that Pillow does not check."""
    data = picture()
    return data[:33] + struct.pack(">I", 2) + b"pHYs\0\0" + b"\xef\x9a\x3a\xd7" + data[33:]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (lambda one: cut_short(one / "rgb/000001.png"), "rgb/000001.png", "damaged or cut short"),
        (lambda one: (one / "rgb/000001.png").write_bytes(with_broken_chunk()), "rgb/000001.png", "damaged"),
        (
            lambda one: (one / "rgb/000001.png").write_bytes(with_header(10**5, 10**5)),
            "rgb/000001.png",
            "100000x100000",
        ),
        (lambda one: (one / "rgb/000001.png").write_bytes(with_header(0, 8)), "rgb/000001.png", "0x8"),
        (lambda one: (one / "rgb/000001.png").write_bytes(b""), "rgb/000001.png", "empty"),
        (lambda one: (one / "rgb/000001.png").write_bytes(b"GIF89a" * 9), "rgb/000001.png", "not a PNG or JPEG file"),
        (lambda one: (one / "rgb/000001.png").write_bytes(b"\xff\xd8" * 30), "rgb/000001.png", "damaged or cut short"),
        (lambda one: replace_by_folder(one / "rgb/000001.png"), "rgb/000001.png", "is no plain file"),
        (lambda one: (one / "rgb/000002.png").write_bytes(picture(width=9)), "rgb/000002.png", "9x8"),
        (lambda one: (one / "pose/000002.txt").unlink(), "rgb/000002.png", "has no pose"),
        (lambda one: (one / "rgb/000002.png").unlink(), "pose/000002.txt", "has no image"),
        (lambda one: (one / "pose/000000.txt").write_text("1 0 0"), "pose/000000.txt", "4x4 numbers, got 3"),
        (lambda one: (one / "pose/000000.txt").write_text("one"), "pose/000000.txt", "expected numbers"),
        (lambda one: (one / "pose/000000.txt").write_bytes(b"\xff\xfe"), "pose/000000.txt", "expected numbers"),
        (
            lambda one: (one / "pose/000000.txt").write_text(text(matrix(POSE, (0, 3), np.nan))),
            "pose/000000.txt",
            "must be finite",
        ),
        (
            lambda one: (one / "pose/000000.txt").write_text(text(matrix(POSE, (1, 0), 1.01))),
            "pose/000000.txt",
            "not orthonormal",
        ),
        (lambda one: (one / "intrinsics.txt").unlink(), "intrinsics.txt", "cannot be read"),
        (lambda one: (one / "intrinsics.txt").write_text("131 64 64 0."), "intrinsics.txt", "H W"),
        (lambda one: (one / "intrinsics.txt").write_text("-1 4 4\n8 8"), "intrinsics.txt", "positive, got -0.125"),
        (lambda one: (one / "intrinsics.txt").write_text("0 4 4\n8 8"), "intrinsics.txt", "positive, got 0"),
        (lambda one: (one / "intrinsics.txt").write_text("9 4 4\n8 16"), "intrinsics.txt", "aspect ratio"),
        (lambda one: (one / "pose").rename(one / "poses"), "pose", "no such folder"),
        (lambda one: (one / "rgb").rename(one / "images"), "rgb", "no such folder"),
        (lambda one: [p.unlink() for p in one.glob("*/00000[12].*")], "", "found 1 views, need at least 2"),
    ],
)
def test_damaged_srn_scenes(tmp_path: Path, damage: Damage, file: str, reason: str) -> None:
    one = srn_scene(tmp_path / "source" / "one")
    srn_scene(tmp_path / "source" / "two")
    damage(one)
    check_reject(tmp_path, one / file, reason)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_text('{"frames": ['), "not valid JSON"),
        (lambda path: path.write_text("[" * 10**5), "not valid JSON"),
        (lambda path: path.write_text("[]"), '"frames" must be a list'),
        (lambda path: path.unlink(), "cannot be read (No such file"),
        (lambda path: edit_json(path, frames=None), '"frames" must be a list'),
        (lambda path: edit_json(path, frames=[]), '"frames" must be a list of objects, and not empty'),
        (lambda path: edit_json(path, frames=[1]), '"frames" must be a list'),
        (lambda path: edit_frame(path, transform_matrix=None), 'frames[1]: key "transform_matrix" is missing'),
        (lambda path: edit_frame(path, transform_matrix=[[1, 2], [3]]), '"transform_matrix": the pose must be 4x4'),
        (lambda path: edit_frame(path, transform_matrix=POSE[:3].tolist()), "must be 4x4 numbers, got 12"),
        (lambda path: edit_frame(path, transform_matrix=matrix(POSE, (0, 3), np.nan)), "must be finite"),
        (lambda path: edit_frame(path, transform_matrix=matrix(POSE, (2, 1), 1)), "mirrors"),
        (lambda path: edit_frame(path, fl_x=None), 'frames[1]: key "fl_x" (pixels) or "camera_angle_x"'),
        (lambda path: edit_frame(path, fl_x=10**400), "too large"),
        (lambda path: edit_frame(path, fl_x=float("nan")), "finite"),
        (lambda path: edit_frame(path, fl_x=0), "focal lengths must be positive, got 0"),
        (lambda path: edit_frame(path, fl_y="8"), 'frames[1]: key "fl_y" must be a number'),
        (lambda path: edit_frame(path, w=4), "another aspect ratio"),
        (lambda path: edit_frame(path, file_path="../../b/images/0.png"), "leads out of the scene's folder"),
        (lambda path: edit_frame(path, file_path="/etc/passwd"), "leads out of the scene's folder"),
        (lambda path: edit_frame(path, file_path=3), '"file_path" must be the name'),
        (lambda path: edit_frame(path, file_path="\ud800"), "can't encode"),
    ],
)
def test_damaged_released_scenes(tmp_path: Path, damage: Damage, reason: str) -> None:
    path = released_source(tmp_path / "source", {"car": ["one"]}) / "square128_above/one/transforms_opencv.json"
    damage(path)
    check_reject(tmp_path, path, reason)


def link_out(scene: Path) -> None:
    (scene / "images/1.png").unlink()
    (scene / "images/1.png").symlink_to(scene.parent.parent / "secret.png")


def link_to_itself(scene: Path) -> None:
    (scene / "images/1.png").unlink()
    (scene / "images/1.png").symlink_to("1.png")


def transforms(**keys: Any) -> Damage:
    return lambda scene: edit_json(scene / "transforms.json", **keys)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (transforms(k1=0.01), "transforms.json", "frames[0]: the lens distorts (k1 = 0.01): undistort the images"),
        (transforms(p2="x"), "transforms.json", 'key "p2" must be a number'),
        (transforms(camera_model="OPENCV_FISHEYE"), "transforms.json", "no pinhole ('OPENCV_FISHEYE'): undistort"),
        (transforms(is_fisheye=True), "transforms.json", "no pinhole (is_fisheye): undistort"),
        (transforms(fl_x=None), "transforms.json", '"camera_angle_x" (radians) is missing'),
        (transforms(fl_x=None, camera_angle_x=40), "transforms.json", "between 0 and π (radians), got 40"),
        (transforms(fl_x=None, camera_angle_x=5e-324), "transforms.json", "between 0 and π"),
        (transforms(fl_x=None, camera_angle_x=True), "transforms.json", 'key "camera_angle_x" must be a number'),
        (transforms(test_filenames=["images/0.png"]), "transforms.json", '"train_filenames" is missing or empty'),
        (transforms(train_filenames=["images/9.png"]), "transforms.json", "names 'images/9.png', which is no frame's"),
        (transforms(train_filenames="images"), "transforms.json", "must be a list of file names"),
        (link_out, "images/1.png", "is a link that leads out of the source"),
        (link_to_itself, "images/1.png", "is a link that cannot be followed"),
        (lambda scene: (scene / "images/2.png").unlink(), "images/2.png", "cannot be read (No such file"),
        (lambda scene: replace_by_folder(scene / "images/2.png"), "images/2.png", "is no plain file"),
        (lambda scene: cut_short(scene / "images/2.png"), "images/2.png", "cut short"),
        (lambda scene: (scene / "images/2.png").write_bytes(picture(height=4)), "images/2.png", "8x4 pixels"),
        (
            lambda scene: (scene / "images/2.png").write_bytes(b"GIF89a" * 30),
            "images/2.png",
            "not a PNG or JPEG file: convert",
        ),
        (lambda scene: (scene / "transforms.json").unlink(), "transforms.json", "cannot be read (No such file"),
    ],
)
def test_damaged_nerfstudio_scenes(tmp_path: Path, damage: Damage, file: str, reason: str) -> None:
    one = nerfstudio_scene(tmp_path / "source" / "one")
    nerfstudio_scene(tmp_path / "source" / "two")
    (tmp_path / "secret.png").write_bytes(picture())
    damage(one)
    check_reject(tmp_path, one / file, reason)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (
            lambda one: (one / "transforms_train.json").unlink(),
            "",
            "holds transforms_test.json, but no transforms_train.json",
        ),
        (lambda one: (one / "transforms_test.json").write_text("{"), "transforms_test.json", "not valid JSON"),
        (lambda one: edit_json(one / "transforms_test.json", frames=[]), "transforms_test.json", "not empty"),
        (lambda one: (one / "test/r_0.png").unlink(), "test/r_0.png", "cannot be read"),
        (
            lambda one: edit_frame(one / "transforms_train.json", transform_matrix=matrix(OPENGL_POSE, (3, 3), 2)),
            "transforms_train.json",
            'frames[1]: "transform_matrix": the pose\'s last row',
        ),
    ],
)
def test_damaged_blender_scenes(tmp_path: Path, damage: Damage, file: str, reason: str) -> None:
    one = blender_scene(tmp_path / "source" / "one", train=3, test=1)
    damage(one)
    check_reject(tmp_path, one / file, reason)


def spoil(archive: Path, scene: Path) -> None:
    """Changes a byte of the first image inside the archive."""
    data, image = bytearray(archive.read_bytes()), (scene / "rgb/000000.png").read_bytes()
    data[data.index(image[16:40]) + 3] ^= 1
    archive.write_bytes(data)


def understate(archive: Path, scene: Path) -> None:
    """Declares fewer bytes of every member than it holds."""
    data = bytearray(archive.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        data[place + 24 : place + 28] = struct.pack("<I", 40)
        place = data.find(b"PK\1\2", place + 4)
    archive.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(spoil, "cannot be read from its zip file (Bad CRC-32"), (understate, "cannot be read from its zip file")],
)
def test_damaged_zip_members(tmp_path: Path, damage: Callable[[Path, Path], None], reason: str) -> None:
    scene, archive = srn_scene(tmp_path / "cars" / "one"), tmp_path / "source" / "cars.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(scene.rglob("*.*")):
            out.write(path, path.relative_to(tmp_path))
    damage(archive, scene)
    check_reject(tmp_path, archive / "cars/one/rgb/000000.png", reason)


def test_members_that_are_missing_or_packed_in_another_way(tmp_path: Path) -> None:
    archive = zip_folder(srn_scene(tmp_path / "cars" / "one").parent, tmp_path / "cars.zip")
    with zipfile.ZipFile(archive, "a") as out:
        for name in ("rgb/0.png", "rgb/1.png"):
            out.writestr(f"half/{name}", picture())
            out.writestr(f"lzma/{name}", picture(), zipfile.ZIP_LZMA)
        for name in ("pose/0.txt", "pose/1.txt"):
            out.writestr(f"half/{name}", text(POSE.tolist()))
            out.writestr(f"lzma/{name}", text(POSE.tolist()))
    half, lzma = rejects(archive, tmp_path / "store")
    assert half["file"] == str(archive / "half/intrinsics.txt")
    assert half["reason"] == "the zip file holds no such member"
    assert lzma["file"] == str(archive / "lzma/rgb/0.png")
    assert lzma["reason"] == "is not stored or deflated in its zip file: pack it again"


def test_files_over_the_limit_are_not_read(tmp_path: Path) -> None:
    zip_folder(srn_scene(tmp_path / "cars" / "one").parent, tmp_path / "cars.zip")
    for folder in (tmp_path / "cars", tmp_path / "cars.zip"):
        with pytest.raises(ValueError, match=r"has \d+ bytes; at most 60 are read"):
            zip_paths.read_file(folder / "one/rgb/000000.png", 60)


def test_ids_never_become_paths(tmp_path: Path) -> None:
    source = released_source(tmp_path / "source", {"car": ["a"]})
    ids = ["../../secret", "..", "/etc", "a\\b", "\ud800", ""]
    (source / "dataset_map.json").write_text(json.dumps({"car": ids}))
    assert {ref.folder for ref in registry.list_scenes(source)} == {""}
    found = rejects(source, tmp_path / "store")
    assert [reject["scene_id"] for reject in found] == ["../../secret", "..", "/etc", "a\\b", "\\ud800", ""]
    assert {reject["file"] for reject in found} == {"dataset_map.json"}
    assert all("bad scene id" in reject["reason"] for reject in found)


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_folder_that_is_no_safe_id_is_rejected(tmp_path: Path, as_zip: bool) -> None:
    source = srn_scene(tmp_path / "cars" / "two words").parent
    [reject] = rejects(zip_folder(source, tmp_path / "cars.zip") if as_zip else source, tmp_path / "store")
    assert (reject["scene_id"], reject["file"]) == ("two words", "two words") and "bad scene id" in reject["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file system may hold names that are not UTF-8; tables may not."""
    srn_scene(tmp_path / "source" / "cars\udcff" / "one")
    srn_scene(tmp_path / "source" / "planes" / "\udcfe")
    image = srn_scene(tmp_path / "source" / "planes" / "two") / "rgb"
    (image / "000001.png").rename(image / "\udcff.png")
    reasons = {reject["scene_id"]: reject["reason"] for reject in rejects(tmp_path / "source", tmp_path / "store")}
    assert sorted(reasons) == ["\\udcfe", "one", "two"]
    assert "not valid UTF-8" in reasons["one"] and "has no pose" in reasons["two"] and "bad scene" in reasons["\\udcfe"]


def test_an_empty_folder_beside_scenes_is_rejected(tmp_path: Path) -> None:
    srn_scene(tmp_path / "source" / "two")
    (tmp_path / "source" / "one").mkdir()
    check_reject(tmp_path, tmp_path / "source/one/rgb", "no such folder")


def test_the_second_scene_of_an_id_is_rejected(tmp_path: Path) -> None:
    source = released_source(tmp_path / "source", {"sofa": ["a"], "car": ["a"]})
    [reject] = rejects(source, tmp_path / "store")
    assert reject["scene_id"] == "a" and "another scene of this source has the same id" in reject["reason"]
    assert SceneStore(tmp_path / "store").categories() == ["", "sofa"]


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ((0, 3), np.nan, "finite"),
        ((0, 3), 1e300, "finite"),
        ((1, 0), 1.01, "not orthonormal"),
        ((2, 1), 1.0, "mirrors"),
        ((3, 0), 0.5, "last row"),
    ],
)
def test_bad_poses(place: tuple[int, int], value: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_pose(matrix(POSE, place, value))
