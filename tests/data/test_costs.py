"""Sources whose cost is out of proportion to their size: they are refused, or lose what makes them large."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
from helpers.small_sources import nerfstudio_scene, picture, srn_scene, zip_folder
from PIL import Image

from scaling.data.png import decode_jpeg, decode_png, encode_png, picture_of, read_image
from scaling.data.readers import zip_paths
from scaling.data.readers.registry import list_scenes, read_scene
from scaling.data.readers.transforms_json import image_path
from scaling.data.scene_ref import SceneError, SceneRef
from scaling.data.scene_views import read_pngs

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


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, format="JPEG", progressive=True)
    data = out.getvalue()
    assert decode_jpeg(data).shape == (64, 64, 3)
    last = data.rfind(b"\xff\xda")
    with pytest.raises(ValueError, match=r"has 2[0-9][0-9] scans; at most 64 are read"):
        decode_jpeg(data[:-2] + data[last:-2] * 200 + data[-2:])


def test_a_file_path_of_many_steps_is_refused(tmp_path):
    for name in ("a/" * 16_000 + "b", "a" * 5000):
        with pytest.raises(ValueError, match="is too long or too deep"):
            image_path(tmp_path, name)


def test_one_image_does_not_fill_a_store(tmp_path):
    ref = SceneRef("one", "", str(tmp_path / "one"), "nerfstudio", "one")
    with pytest.raises(SceneError, match="its 9 views name 1 images"):
        read_pngs(ref, [tmp_path / "one" / "a.png"] * 9)


def test_an_end_record_inside_the_end_record_hides_nothing(tmp_path):
    """zipfile takes the first of two marks that overlap; so does the check."""
    path = tmp_path / "a.zip"
    record = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 600 << 20, 0, 0)
    with path.open("wb") as file:
        file.truncate(600 << 20)
        file.seek(600 << 20)
        file.write(record[:4] + b"PK\5\6" + record[8:])
    with pytest.raises(ValueError, match=r"list of its members has 629,145,600 bytes|not a readable zip"):
        list_scenes(path)


def test_what_a_library_says_of_a_long_text_is_cut():
    assert len(str(SceneError("one", "f" * 100_000, "r" * 20_000_000))) < 9000
