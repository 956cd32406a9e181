"""Pictures of scenes: sizes, colours and files that read back."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from scaling.models.shared_model import SharedModel
from scaling.pictures.draw import (
    contact_sheet,
    depth_colours,
    enlarge,
    grid,
    latent_colours,
    overview,
    render_scene_pictures,
    save_png,
    save_video,
    to_pixels,
    turntable,
)


def play(video: Path) -> tuple[np.ndarray, dict]:
    """Frames [N, H, W, 3] and what the file says of itself. imageio's mp4 reader leaves its pipes to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        plugin = "FFMPEG" if video.suffix == ".mp4" else "pillow"
        played = iio.imread(video, plugin=plugin), iio.immeta(video, plugin=plugin)
        gc.collect()
    return played


@pytest.fixture(scope="module")
def shared(tiny_settings):
    torch.manual_seed(0)
    return SharedModel(tiny_settings).requires_grad_(False)


@pytest.fixture
def params(shared):
    return shared.random_params([torch.Generator().manual_seed(1)])


def test_to_pixels_rounds_and_clamps():
    images = torch.tensor([0.0, 0.5, 1.2]).view(3, 1, 1)
    assert to_pixels(images).tolist() == [[[0, 128, 255]]]


def test_latents_are_stretched_channel_by_channel():
    latents = torch.zeros(1, 4, 1, 2)
    latents[0, 0, 0] = torch.tensor([-0.3, 0.1])
    latents[0, 1, 0] = torch.tensor([0.9, 0.8])
    assert latent_colours(latents).tolist() == [[[[0, 255, 0], [255, 0, 0]]]]
    assert latent_colours(latents[:, :1]).tolist() == [[[[0, 0, 0], [255, 255, 255]]]], "one channel is shown as grey"


def test_depth_is_yellow_near_blue_far_and_white_where_empty():
    colours = depth_colours(torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]]))
    assert colours[0, 0].tolist() == [[255, 205, 70], [30, 25, 75], [255, 255, 255]]
    assert (depth_colours(torch.full((1, 2, 2), 3.0), torch.zeros(1, 2, 2)) == 255).all(), "an empty view is white"


def test_enlarge_repeats_pixels():
    pixels = np.arange(6, dtype=np.uint8).reshape(1, 1, 2, 3)
    large = enlarge(pixels, 2)
    assert large.shape == (1, 2, 4, 3)
    assert (large[0, :, :2] == pixels[0, 0, 0]).all() and (large[0, :, 2:] == pixels[0, 0, 1]).all()


def test_contact_sheet_places_every_kind():
    truth, rendered = torch.zeros(3, 3, 4, 5), torch.full((3, 3, 4, 5), 0.2)
    rendered[0] = 1.0
    sheet = contact_sheet(truth, rendered, autoencoded=torch.full_like(truth, 0.4), gutter=2)
    assert sheet.shape == (4 * 4 + 3 * 2, 3 * 5 + 2 * 2, 3)
    rows, middle = [0, 6, 12, 18], 7
    assert [int(sheet[row, middle, 0]) for row in rows] == [0, 51, 102, 153], "the error row shows 1 - 2 * 0.2"
    assert int(sheet[18, 0, 0]) == 0, "an error of half the range or more is black"
    assert (sheet[4:6] == 255).all() and (sheet[:, 5:7] == 255).all(), "gutters are white"
    assert contact_sheet(truth, rendered, show_error=False).shape == (2 * 4 + 2, 3 * 5 + 2 * 2, 3)


def test_overview_pairs_scenes_and_fills_the_last_row():
    picture = overview(torch.zeros(3, 3, 4, 4), torch.full((3, 3, 4, 4), 0.2), scenes_per_row=2)
    pair = 2 * 4 + 2
    assert picture.shape == (2 * 4 + 10, 2 * pair + 10, 3)
    assert int(picture[0, 0, 0]) == 0 and int(picture[0, 6, 0]) == 51
    assert (picture[14:, pair:] == 255).all(), "there is no fourth scene"


def test_grid_refuses_images_of_different_sizes():
    small, large = np.zeros((2, 2, 3), np.uint8), np.zeros((3, 3, 3), np.uint8)
    with pytest.raises(ValueError):
        grid([[small, large]])


def test_png_reads_back(tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (iio.imread(save_png(tmp_path / "new" / "image.png", image)) == image).all()


def test_videos_have_every_frame_even_sides_and_loop(tmp_path):
    shades = np.array([30, 90, 150, 210], dtype=np.uint8)
    frames = np.broadcast_to(shades[:, None, None, None], (4, 43, 65, 3)).copy()
    mp4, gif = save_video(tmp_path / "new" / "car-1.5", frames, fps=10)
    assert (mp4.name, gif.name) == ("car-1.5.mp4", "car-1.5.gif"), "a dot in the name is no suffix"
    told = {}
    for path, size in ((mp4, (130, 196)), (gif, (129, 195))):  # 43 · 3 = 129, 65 · 3 = 195
        played, told[path] = play(path)
        assert played.shape == (4, *size, 3)
        assert np.abs(played[:, 60, 60, 0].astype(int) - shades).max() <= 6
    assert told[gif]["loop"] == 0 and told[gif]["duration"] == 100
    assert told[mp4]["fps"] == 10


def test_turntable_sizes_and_movement(shared, params):
    turn = turntable(shared, params, num_frames=3)
    assert set(turn) == {"rgb", "latents", "depth"}
    for frames in turn.values():
        assert frames.shape == (3, 16, 16, 3) and frames.dtype == np.uint8
    assert (turn["latents"][:, ::2, ::2] == turn["latents"][:, 1::2, 1::2]).all(), "latents are enlarged, not smoothed"
    assert (turn["latents"][0] != turn["latents"][1]).any(), "the camera moves"
    with pytest.raises(ValueError, match="at least 1 frame"):
        turntable(shared, params, num_frames=0)


def test_scene_pictures(shared, params, tiny_scenes, tmp_path):
    views = tiny_scenes[0]
    paths = render_scene_pictures(shared, params, views, tmp_path, views.scene_id, num_frames=3)
    folder = tmp_path / views.scene_id
    kinds = [f"turntable-{kind}.{suffix}" for kind in ("rgb", "latents", "depth") for suffix in ("mp4", "gif")]
    assert paths == [folder / name for name in [*kinds, "contact-sheet.png"]]
    assert all(path.stat().st_size for path in paths)
    for suffix in ("mp4", "gif"):
        assert play(folder / f"turntable-rgb.{suffix}")[0].shape == (3, 128, 128, 3)
    sheet = iio.imread(folder / "contact-sheet.png")
    assert sheet.shape == (4 * 16 + 3 * 2, 16, 3), "one test view: truth, render, autoencoder, error"
    assert (sheet[:16] == to_pixels(views.images[0])).all()


def test_scene_pictures_without_views(shared, params, tmp_path):
    paths = render_scene_pictures(shared, params, None, tmp_path, "car", num_frames=2)
    assert len(paths) == 6 and "contact-sheet.png" not in {path.name for path in paths}


@pytest.mark.parametrize("scene_id", ["../car", "..", "a/b", "/tmp/car", ""])
def test_a_bad_id_writes_nothing(shared, params, tmp_path, scene_id):
    inside = tmp_path / "pictures"
    with pytest.raises(ValueError, match="bad scene id"):
        render_scene_pictures(shared, params, None, inside, scene_id)
    assert not list(tmp_path.iterdir())
