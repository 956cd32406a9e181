"""Sources whose cost is out of proportion to their size: they are refused, or lose what makes them large."""

from __future__ import annotations

import json
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
from helpers.small_sources import nerfstudio_scene, picture, srn_scene, zip_folder

from scaling.data.png import decode_png, encode_png, picture_of, read_image
from scaling.data.readers import zip_paths
from scaling.data.readers.registry import list_scenes, read_scene
from scaling.data.scene_ref import SceneError

pytestmark = pytest.mark.slow

JUNK = b"\0" * 1_000_000


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(png: bytes, kind: bytes) -> bytes:
    """A chunk of JUNK after the header."""
    return png[:33] + chunk(kind, JUNK) + png[33:]


def with_pixels_after_the_last(png: bytes) -> bytes:
    """JUNK in the chunk of the pixels, behind their end."""
    place = png.index(b"IDAT")
    length = int.from_bytes(png[place - 4 : place], "big")
    content = png[place + 4 : place + 4 + length] + JUNK
    return png[: place - 4] + chunk(b"IDAT", content) + png[place + 8 + length :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda png: png + JUNK,
        lambda png: with_chunk(png, b"juNk"),
        lambda png: with_chunk(png, b"tEXt"),
        with_pixels_after_the_last,
    ],
)
def test_only_what_makes_the_picture_is_kept(tmp_path, spoil):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(spoil(encode_png(rgb)))
    kept, size = read_image(path)
    assert size == (8, 8) and len(kept) < 1000
    np.testing.assert_array_equal(decode_png(kept), rgb)


def test_a_plain_picture_keeps_its_bytes():
    assert picture_of(picture()) == picture()


def test_too_many_frames_are_refused_before_they_are_read(tmp_path):
    scene = nerfstudio_scene(tmp_path / "source" / "one")
    values = json.loads((scene / "transforms.json").read_text())
    values["frames"] = values["frames"][:1] * 20_000
    (scene / "transforms.json").write_text(json.dumps(values))
    [ref] = list_scenes(tmp_path / "source")
    start = time.monotonic()
    with pytest.raises(SceneError, match='"frames" has 20000 entries; at most 10000'):
        read_scene(ref)
    assert time.monotonic() - start < 5


def test_a_zip_of_too_many_folders_is_refused(tmp_path, monkeypatch):
    """Members 31 folders deep, which no list of folders names."""
    monkeypatch.setattr(zip_paths, "MAX_FOLDERS", 2000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        for number in range(100):
            out.writestr(f"{number}/{'d/' * 29}x", b"")
    with pytest.raises(ValueError, match=r"a\.zip.*more than 2000 folders"):
        list_scenes(tmp_path / "a.zip")


def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path):
    scene = srn_scene(tmp_path / "source" / "one")
    image = scene / "rgb" / "000001.png"
    image.write_bytes(image.read_bytes() + JUNK * 8)
    [ref] = list_scenes(zip_folder(tmp_path / "source", tmp_path / "a.zip"))
    with pytest.raises(SceneError, match=r"000001.png: unpacks from \d+ to 80\d+ bytes"):
        read_scene(ref)


def test_a_member_without_a_name_is_told(tmp_path):
    archive = zip_folder(srn_scene(tmp_path / "source" / "one").parent, tmp_path / "a.zip")
    with zipfile.ZipFile(archive, "a") as out:
        out.writestr(zipfile.ZipInfo(""), b"x")
    with pytest.raises(ValueError, match=r"a\.zip.*a member without a name"):
        list_scenes(archive)
