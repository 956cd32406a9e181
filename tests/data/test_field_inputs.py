"""Sources as real people have them: other suffixes, flags, greys, marks of editors, rounded poses, masks."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.small_sources import POSE, edit_frame, edit_json, nerfstudio_scene, picture, srn_scene
from PIL import Image

from scaling.data.choose_scenes import choose_ids
from scaling.data.png import decode_layers, decode_png, encode_png
from scaling.data.readers.conventions import Convention
from scaling.data.readers.registry import list_scenes, read_scene
from scaling.data.readers.transforms_json import read_frames
from scaling.data.scene_ref import SceneError
from scaling.data.scene_store import SceneStore
from scaling.data.scene_views import views_from_row
from scaling.data.store_writer import StoreWriter
from scaling.data.stores import StoreSource


def read_one(source: Path) -> dict:
    [ref] = list_scenes(source)
    return read_scene(ref)


@pytest.fixture
def srn(tmp_path) -> Path:
    return srn_scene(tmp_path / "source" / "one")


def test_suffixes_in_any_case_and_jpeg(srn):
    (srn / "rgb" / "000000.png").rename(srn / "rgb" / "000000.PNG")
    grey = Image.fromarray(np.full((8, 8, 3), 77, np.uint8))
    (srn / "rgb" / "000001.png").unlink()
    grey.save(srn / "rgb" / "000001.JPG", format="JPEG")
    (srn / "pose" / "000002.txt").rename(srn / "pose" / "000002.TXT")
    row = read_one(srn.parent)
    assert [decode_png(png)[0, 0].tolist() for png in row["views"]] == [[0] * 3, [77] * 3, [2] * 3]
    assert all(png.startswith(b"\x89PNG") for png in row["views"])


def test_two_images_of_one_name_are_told(srn):
    (srn / "rgb" / "000001.jpg").write_bytes(b"")
    with pytest.raises(SceneError, match=r"000001.png: has the same name as 000001.jpg"):
        read_one(srn.parent)


@pytest.mark.parametrize(("line", "inverted"), [("0", False), ("1", True), ("1.", True)])
def test_the_last_line_of_intrinsics_says_which_way_poses_go(srn, line, inverted):
    with (srn / "intrinsics.txt").open("a") as file:
        file.write(f"{line}\n")
    row = read_one(srn.parent)
    expected = np.linalg.inv(POSE) if inverted else POSE
    np.testing.assert_allclose(row["cam2world"][:16].reshape(4, 4), expected, atol=1e-6)
    assert any("inverted" in note for note in row["notes"]) == inverted


def test_another_last_line_is_told(srn):
    with (srn / "intrinsics.txt").open("a") as file:
        file.write("2\n")
    with pytest.raises(SceneError, match="or 0 or 1 after it"):
        read_one(srn.parent)


@pytest.mark.parametrize(("mode", "value", "rgb"), [("L", 90, 90), ("LA", (90, 255), 90), ("I;16", 90 * 256 + 17, 90)])
def test_grey_is_a_colour(srn, mode, value, rgb):
    image = Image.fromarray(np.full((8, 8), value, np.uint16)) if mode == "I;16" else Image.new(mode, (8, 8), value)
    image.save(srn / "rgb" / "000001.png")
    assert decode_png(read_one(srn.parent)["views"][1])[3, 3].tolist() == [rgb] * 3


def test_grey_keeps_its_alpha():
    out = io.BytesIO()
    Image.new("LA", (2, 2), (90, 128)).save(out, format="PNG")
    assert decode_layers(out.getvalue())[0, 0].tolist() == [90, 90, 90, 128]


def test_marks_that_editors_leave_are_read(srn):
    for path in (srn / "pose" / "000000.txt", srn / "intrinsics.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_one(srn.parent)["views"]) == 3


def test_poses_with_three_decimals_are_made_orthonormal(srn):
    """A turn by 1 rad, printed with two and three decimals: R·Rᵀ is off by some thousandths."""
    c, s = np.cos(1.0), np.sin(1.0)
    turned = np.array([[c, -s, 0, 1.3], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    (srn / "pose" / "000001.txt").write_text(" ".join(f"{number:.2f}" for number in turned.ravel()))
    row = read_one(srn.parent)
    rotation = row["cam2world"][16:32].reshape(4, 4)[:3, :3].astype(np.float64)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(rotation, turned[:3, :3], atol=5e-3)
    assert any("orthonormal" in note for note in row["notes"])
    skewed = turned.copy()
    skewed[0, 0] += 0.05
    (srn / "pose" / "000001.txt").write_text(" ".join(map(str, skewed.ravel())))
    with pytest.raises(SceneError, match="not orthonormal"):
        read_one(srn.parent)


def test_a_mask_is_the_alpha(tmp_path):
    scene = nerfstudio_scene(tmp_path / "source" / "one")
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[:, 4:] = 255
    (scene / "masks").mkdir()
    (scene / "masks" / "1.png").write_bytes(encode_png(mask))
    edit_frame(scene / "transforms.json", 1, mask_path="masks/1.png")
    row = read_one(scene.parent)
    views = views_from_row(row, 8)
    assert views.images[1, 0, 0, 0] == 1 and views.images[1, 0, 0, 7] == pytest.approx(1 / 255)
    assert views.alpha[1, 0].tolist() == [0] * 4 + [1] * 4 and views.alpha[0].min() == 1
    edit_frame(scene / "transforms.json", 1, mask_path="../../x.png")
    with pytest.raises(SceneError, match=r'"mask_path" .* leads out'):
        read_one(scene.parent)
    (scene / "masks" / "1.png").write_bytes(picture(width=4))
    edit_frame(scene / "transforms.json", 1, mask_path="masks/1.png")
    with pytest.raises(SceneError, match=r"masks/1\.png: the mask has 4x8 pixels, its image 8x8"):
        read_one(scene.parent)


def test_keys_that_are_ignored_are_named(tmp_path):
    scene = nerfstudio_scene(tmp_path / "source" / "one")
    edit_json(scene / "transforms.json", scale=0.33, offset=[0.5, 0.5, 0.5])
    assert read_one(scene.parent)["notes"] == ['key "scale" is ignored', 'key "offset" is ignored']
    assert json.loads((scene / "transforms.json").read_text())["scale"] == 0.33


# ---------------------------------------------------------------------- splits, links, hints


def test_folders_of_splits_are_one_category(tmp_path):
    for folder, name in [
        ("cars_train", "a"),
        ("cars_val", "b"),
        ("cars_test", "c"),
        ("vans/test", "d"),
        ("other", "e"),
    ]:
        srn_scene(tmp_path / folder / name)
    found = {ref.scene_id: (ref.category, ref.split) for ref in list_scenes(tmp_path)}
    assert found == {
        "a": ("cars", "train"), "b": ("cars", "val"), "c": ("cars", "test"), "d": ("vans", "test"), "e": ("other", ""),
    }  # fmt: skip
    assert {ref.category for ref in list_scenes(tmp_path, category="cars")} == {"cars"}


def test_a_test_scene_is_taken_only_where_it_is_asked_for(tmp_path):
    with StoreWriter(tmp_path / "store", "made") as writer:
        for name, split in [("a", "test"), ("b", "train"), ("c", ""), ("d", "val")]:
            srn_scene(tmp_path / split / name)
            [ref] = [ref for ref in list_scenes(tmp_path / split) if ref.scene_id == name]
            writer.add({**read_scene(ref), "split": split})
    source = StoreSource(tmp_path / "store")
    assert source.splits() == ["test", "train", "", "val"]
    assert [row["split"] for row in source.rows()] == source.splits()
    assert choose_ids(source, None) == ["b", "c"] and choose_ids(source, None, split="test") == ["a", "c"]
    assert choose_ids(source, None, split="all") == ["a", "b", "c", "d"]
    with pytest.raises(
        ValueError, match=r"of 2 scenes of split val .* it holds 1 of test, 1 of train: choose by --split"
    ):
        choose_ids(source, None, split="val", leave_out=["c", "d"])


def test_a_store_without_splits_is_read(tmp_path):
    srn_scene(tmp_path / "source" / "a")
    with StoreWriter(tmp_path / "store", "made") as writer:
        writer.add(read_one(tmp_path / "source"))
    part = tmp_path / "store" / "scenes-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["split"]), part)
    source = StoreSource(tmp_path / "store")
    assert source.splits() == [""] and next(source.rows())["split"] == "" and choose_ids(source, None) == ["a"]


@pytest.mark.parametrize("layout", ["srn", "transforms"])
def test_links_are_followed_inside_the_source_alone(tmp_path, layout):
    """As hub caches, DVC and git-annex make them: blobs inside the source, or elsewhere on the disk."""
    source = tmp_path / "source"
    scene = (srn_scene if layout == "srn" else nerfstudio_scene)(source / "scenes" / "one")
    image = scene / ("rgb/000001.png" if layout == "srn" else "images/1.png")
    for blob, inside in [(source / "blobs" / "b1", True), (tmp_path / "cache" / "b2", False)]:
        blob.parent.mkdir()
        blob.write_bytes(image.read_bytes())
        image.unlink()
        image.symlink_to(blob)
        [ref] = list_scenes(source)
        if inside:
            assert len(read_scene(ref)["views"]) == 3
        else:
            with pytest.raises(
                SceneError, match=rf"{image.name}: is a link that leads out of the source, to .*b2: give"
            ):
                read_scene(ref)
            [ref] = list_scenes(source, follow_links=True)
            assert len(read_scene(ref)["views"]) == 3
    image.unlink()
    image.symlink_to(image.name)
    with pytest.raises(SceneError, match=r"is a link that cannot be followed|cannot be read"):
        read_scene(list_scenes(source)[0])


def test_a_folder_too_high_says_where_scenes_are(tmp_path):
    srn_scene(tmp_path / "download" / "data" / "cars" / "one")
    with pytest.raises(ValueError, match=r"found no scenes; .*; there are scenes in .*download/data: give that folder"):
        list_scenes(tmp_path)


def test_masks_that_are_not_there_are_named(tmp_path):
    scene = nerfstudio_scene(tmp_path / "source" / "one")
    edit_frame(scene / "transforms.json", 1, mask_path="masks/1.png")
    row = read_one(scene.parent)
    assert row["notes"] == ['key "mask_path" is ignored, as none of its files is there'] and len(row["views"]) == 3


def test_poses_are_read_by_the_convention_that_flags_name(srn):
    [ref] = list_scenes(srn.parent, poses="world2cam", axes="opengl")
    row = read_scene(ref)
    expected = np.linalg.inv(POSE) @ np.diag([1.0, -1, -1, 1])
    np.testing.assert_allclose(row["cam2world"][:16].reshape(4, 4), expected, atol=1e-6)
    assert row["convention"] == Convention("world2cam", "opengl")


# ---------------------------------------------------------------------- what a stranger's source may cost


def test_other_keys_of_a_file_are_not_there_once_for_each_frame(tmp_path):
    scene = nerfstudio_scene(tmp_path / "source" / "one")
    edit_json(scene / "transforms.json", **{f"key{number}": number for number in range(1000)})
    _, frames = read_frames(list_scenes(scene.parent)[0], scene / "transforms.json", Convention("cam2world", "opengl"))
    assert all(len(frame.camera) < 20 for frame in frames)


def test_a_link_in_place_of_the_map_is_not_followed(tmp_path):
    source = tmp_path / "source"
    (source / "square128_above").mkdir(parents=True)
    (tmp_path / "other.json").write_text('{"cars": ["secret"]}')
    (source / "dataset_map.json").symlink_to(tmp_path / "other.json")
    with pytest.raises(ValueError, match="is a link that leads out of the source"):
        list_scenes(source)
    assert [ref.scene_id for ref in list_scenes(source, follow_links=True)] == ["secret"]


def test_the_search_for_a_folder_too_high_follows_no_links(tmp_path):
    srn_scene(tmp_path / "elsewhere" / "cars" / "one")
    (tmp_path / "source" / "empty").mkdir(parents=True)
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "empty" / "torn.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"found no scenes; looked for (?!.*there are scenes in)"):
        list_scenes(tmp_path / "source")


def test_a_listed_part_counts_once_and_no_link_is_written_through(tmp_path):
    srn_scene(tmp_path / "source" / "one")
    with StoreWriter(tmp_path / "store", "made") as writer:
        writer.add(read_one(tmp_path / "source"))
    path = tmp_path / "store" / "store.json"
    for change in ({"parts": ["scenes-00000.parquet"] * 2}, {"num_scenes": -1}, {"num_scenes": 1e300}):
        told = json.loads(path.read_text())
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copytree(tmp_path / "store", tmp_path / "other", dirs_exist_ok=True)
        (tmp_path / "other" / "store.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(ValueError, match=r"store\.json is damaged"):
            SceneStore(tmp_path / "other")
    path.unlink()
    (tmp_path / "store" / "scenes-00000.parquet").unlink()
    (tmp_path / "store" / "scenes-00000.parquet").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(ValueError, match="is a link"), StoreWriter(tmp_path / "store", "made") as writer:
        writer.add(read_one(tmp_path / "source"))
    assert not (tmp_path / "outside.bin").exists()


def test_one_scene_of_another_size_does_not_spoil_the_box_of_all(tmp_path):
    row = read_one(srn_scene(tmp_path / "source" / "one").parent)
    with StoreWriter(tmp_path / "store", "made") as writer:
        for number in range(5):
            writer.add({**row, "scene_id": f"s{number}"}, [[-0.5] * 3, [0.5, 0.4, 0.3]])
        writer.add({**row, "scene_id": "large"}, [[-125.0] * 3, [125.0] * 3])
        writer.add({**row, "scene_id": "away"}, [[20.0] * 3, [20.5] * 3])
        writer.set_outliers_apart()
        assert list(writer.no_bounds.values()) == [["large", "away"]]
    assert SceneStore(tmp_path / "store").bounds() == [[-0.5] * 3, [0.5, 0.4, 0.3]]
