"""Scenes as rows and as tensors, and the scene store."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.small_sources import INTRINSICS, POSE, picture, row
from PIL import Image

from scaling.data.choose_scenes import choose_ids
from scaling.data.png import decode_png, encode_png, read_image
from scaling.data.scene_ref import SceneError
from scaling.data.scene_store import SCHEMA, SceneStore
from scaling.data.scene_views import check_scene_id, default_test_views, make_row, views_from_row
from scaling.data.store_writer import StoreWriter

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


def blob(width: int, height: int, centre: tuple[float, float], spread: float) -> bytes:
    """A soft dark blob on white; centre and spread in pixels from the upper left corner."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    darkness = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * spread**2))
    return encode_png(np.repeat(np.rint(255 * (1 - darkness))[..., None], 3, axis=2).astype(np.uint8))


def project(point: torch.Tensor, cam2world: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Where a point [3] in the world is seen: fractions [2] of the image's width and height."""
    seen = intrinsics @ (cam2world.inverse() @ torch.cat([point, torch.ones(1)]))[:3]
    return seen[:2] / seen[2]


@pytest.mark.parametrize(
    ("width", "height", "image_size"),
    [(48, 48, 16), (48, 48, 31), (60, 48, 20), (48, 61, 20), (61, 40, 40), (40, 40, 56), (40, 29, 64), (48, 48, 48)],
)
def test_intrinsics_follow_images_of_any_size(width: int, height: int, image_size: int) -> None:
    """A point drawn where the source's camera sees it lies where the resized view's camera sees it."""
    point = torch.tensor([0.1, -0.15, 0.2])
    intrinsics = torch.tensor([[1.1, 0.02, 0.45], [0.0, 1.3, 0.55], [0.0, 0.0, 1.0]])
    u, v = project(point, torch.from_numpy(POSE).float(), intrinsics).tolist()
    png = blob(width, height, (u * width, v * height), 3.0)
    scene = make_row("a", "", [png] * 2, [POSE] * 2, intrinsics.repeat(2, 1, 1), [1], height, width, "a")
    views = views_from_row(scene, image_size)
    assert views.images.shape == (2, 3, image_size, image_size)
    darkness = 1 - views.images[0, 0]
    places = (torch.arange(image_size) + 0.5) / image_size
    found = torch.stack([(darkness.sum(0) * places).sum(), (darkness.sum(1) * places).sum()]) / darkness.sum()
    expected = project(point, views.cam2world[0], views.intrinsics[0])
    assert (found - expected).abs().max() * image_size < 0.05  # pixels


def test_images_that_are_not_square_are_padded_with_their_borders_colour() -> None:
    """Black ones with black; with white where borders have many colours."""
    wide = make_row("a", "", [picture(0, 8, 4)] * 2, [POSE] * 2, [INTRINSICS] * 2, [1], 4, 8, "a")
    views = views_from_row(wide, 8)
    assert views.images[0, 0, :, 0].tolist() == [0] * 8
    many = encode_png(np.random.default_rng(0).integers(0, 200, (4, 8, 3)).astype(np.uint8))
    padded = views_from_row({**wide, "views": [many] * 2}, 8).images[0]
    assert (padded[:, [0, 1, 6, 7]] == 1).all() and (padded[:, 2:6] < 1).all()
    torch.testing.assert_close(views.intrinsics[0], torch.tensor([[1, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]]))
    tall = make_row("a", "", [picture(0, 5, 8)] * 2, [POSE] * 2, [INTRINSICS] * 2, [1], 8, 5, "a")
    views = views_from_row(tall, 8)
    assert views.images[0, 0, 0].tolist() == [0] * 8
    torch.testing.assert_close(views.intrinsics[0], torch.tensor([[0.625, 0, 3.5 / 8], [0, 1, 0.5], [0, 0, 1]]))


def test_images_are_made_larger_bilinearly() -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[:, 1] = 204
    scene = make_row("a", "", [encode_png(pixels)] * 2, [POSE] * 2, [INTRINSICS] * 2, [1], 2, 2, "a")
    assert views_from_row(scene, 4).images[0, 0, 2].tolist() == pytest.approx([0, 0.2, 0.6, 0.8])


def test_views_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SceneError, match=r"views\[1\]: the image is not 8x8 as the row says"):
        views_from_row({**row(), "views": [picture(), picture(width=9)]}, 8)
    with pytest.raises(SceneError, match="2 views, 2 poses and 1 intrinsics"):
        views_from_row({**row(), "intrinsics": [1.0, 0, 0.5, 0, 1, 0.5, 0, 0, 1]}, 8)
    with pytest.raises(SceneError, match="2 views, 1 poses and 2 intrinsics"):
        views_from_row({**row(), "cam2world": POSE.ravel()}, 8)
    with pytest.raises(SceneError, match="test_views"):
        views_from_row({**row(), "test_views": [2]}, 8)


def test_transparency_is_composited_on_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(out, format="PNG")
    assert decode_png(out.getvalue())[0, 0].tolist() == [255, 204, 204]


def test_transparency_goes_through_a_store(tmp_path: Path) -> None:
    """A wide image, the left half of which is transparent, beside one that is opaque; a palette is made RGBA."""
    pixels = np.full((2, 4, 4), 255, np.uint8)
    pixels[:, :, 1:3] = 0
    pixels[:, :2, 3] = 0
    (tmp_path / "rgba.png").write_bytes(encode_png(pixels))
    opaque = pixels.copy()
    opaque[..., 3] = 255
    (tmp_path / "opaque.png").write_bytes(encode_png(opaque))
    Image.fromarray(pixels).quantize(4).save(tmp_path / "palette.png")
    kept, made_rgb, palette = (read_image(tmp_path / f"{name}.png")[0] for name in ("rgba", "opaque", "palette"))
    assert kept == (tmp_path / "rgba.png").read_bytes()
    assert (kept[25], made_rgb[25], palette[25]) == (6, 2, 6), "colour types: RGBA, RGB, RGBA"
    scene = make_row("a", "", [kept, made_rgb, palette], [POSE] * 3, [INTRINSICS] * 3, [1], 2, 4, "a")
    views = views_from_row(scene, 2)
    clear_and_red = [[0.0, 0.5], [0.0, 0.5]]  # a row of padding and one of the image, both half as high
    torch.testing.assert_close(views.alpha[0], torch.tensor(clear_and_red))
    torch.testing.assert_close(views.alpha[2], torch.tensor(clear_and_red))
    assert (views.alpha[1] == 0.5).all(), "what has no transparency is opaque, but for the padding"
    assert views.images[0, 1].tolist() == [[1.0, 0.5], [1.0, 0.5]]
    assert views_from_row({**scene, "views": [made_rgb] * 3}, 2).alpha is None


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
    (tmp_path / "store.json").write_text(json.dumps({**described, "format_version": 3}))
    with pytest.raises(ValueError, match=r"store\.json: format version 3, this program reads up to 2"):
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


def test_stage_1_takes_categories_in_turn():
    """Three cars, a plane and two ships, listed by category; a file's own order stays."""

    class Mixed:
        name = "mixed"

        def ids(self) -> list[str]:
            return ["c1", "c2", "c3", "p1", "s1", "s2"]

        def categories(self) -> list[str]:
            return ["car", "car", "car", "plane", "ship", "ship"]

        def splits(self) -> list[str]:
            return [""] * 6

    assert choose_ids(Mixed(), None, balanced=True) == ["c1", "p1", "s1", "c2", "s2", "c3"]
    assert choose_ids(Mixed(), None, balanced=True, count=4) == ["c1", "p1", "s1", "c2"]
    assert choose_ids(Mixed(), None) == Mixed().ids()
