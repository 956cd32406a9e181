"""Hostile images, archives and texts: refused before they are unpacked, by an error that names the file."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.damage import LAUGHS
from helpers.small_sources import edit_json, nerfstudio_scene, picture, row, srn_scene, zip_folder

from scaling.cli import read_yaml
from scaling.config import SettingsError
from scaling.data.png import decode_png, png_size
from scaling.data.readers import registry
from scaling.data.scene_ref import SceneError
from scaling.data.scene_store import SceneStore
from scaling.data.store_writer import StoreWriter
from scaling.storage.json_yaml import parse_json, parse_yaml

# ---------------------------------------------------------------------- images and archives


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(kind: bytes, data: bytes) -> bytes:
    """A picture with a chunk more after its header."""
    good = picture()
    return good[:33] + chunk(kind, data) + good[33:]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (png_with(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), "damaged"),
        (png_with(b"IHDR", struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)), "second header, of another size"),
        (png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20))), "too large"),
    ],
)
def test_image_bombs(tmp_path: Path, data: bytes, told: str) -> None:
    """What the header says is checked in test_bad_scenes.py; this is what it does not say."""
    assert png_size(data) == (8, 8)
    with pytest.raises(ValueError, match=told):
        decode_png(data)
    scene = srn_scene(tmp_path / "source" / "one")
    (scene / "rgb/000001.png").write_bytes(data)
    with pytest.raises(SceneError, match=rf"{scene}/rgb/000001.png: .*{told}"):
        registry.read_scene(registry.list_scenes(tmp_path / "source")[0])


def test_files_that_unpack_to_gigabytes(tmp_path: Path) -> None:
    archive = zip_folder(nerfstudio_scene(tmp_path / "cars" / "one").parent, tmp_path / "cars.zip")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as out, out.open("two/transforms.json", "w") as member:
        for _ in range(40):
            member.write(bytes(1 << 20))
    [two] = [ref for ref in registry.list_scenes(archive) if ref.scene_id == "two"]
    with pytest.raises(SceneError, match=r"two/transforms.json: has 41943040 bytes; at most 33554432 are read"):
        registry.read_scene(two)
    pose = srn_scene(tmp_path / "srn" / "one") / "pose/000000.txt"
    os.truncate(pose, 1 << 40)  # holes: it takes no room
    with pytest.raises(SceneError, match=r"pose/000000\.txt: has 1099511627776 bytes"):
        registry.read_scene(registry.list_scenes(tmp_path / "srn")[0])


@pytest.mark.parametrize("name", ["a/" * 32_000 + "b", "/etc/passwd", "a/../../b", "b" * 2000])
def test_names_of_members_that_are_none(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "cars.zip", "w") as out:
        out.writestr(name, b"")
    with pytest.raises(ValueError, match=rf"{tmp_path}/cars.zip: .*do not trust this file"):
        registry.list_scenes(tmp_path / "cars.zip")


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("read", "data", "told"),
    [
        (parse_json, b"[" * 10**6, "nested too deeply"),
        (parse_json, b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (parse_json, b'[{"a": [NaN]}]', "NaN is not a JSON number"),
        (parse_json, b"[-Infinity]", "-Infinity is not a JSON number"),
        (parse_json, b"1" * 5000, "limit"),
        (parse_json, b"\xff", "decode"),
        (parse_yaml, b"[" * 10**4, "nested too deeply"),
        (parse_yaml, LAUGHS, "aliases"),
        (parse_yaml, b"a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (parse_yaml, b"a: 2020-99-99", "month must be in"),
        (parse_yaml, b"9" * 5000, "limit"),
        (parse_yaml, b"{[]: 1}", "unhashable"),
    ],
)
def test_texts_that_are_none(read: Callable[[Any], Any], data: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        read(data)
    assert "\n" not in str(error.value)


def test_texts_that_are_none_are_named(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, "test") as writer:
        writer.add(row())
    info, settings = tmp_path / "store.json", tmp_path / "settings.yaml"
    for text in ("[" * 10**6, '{"format_version": 1, "num_scenes": NaN}', '{"format_version": "x"}', "[1]", ""):
        info.write_text(text)
        with pytest.raises(ValueError, match=rf"{info} is damaged"):
            SceneStore(tmp_path)
    for text, told in ((LAUGHS, "aliases"), ("a" * 300_000, "at most 262144 are read")):
        settings.write_text(text)
        with pytest.raises(SettingsError, match=rf"{settings}: .*{told}"):
            read_yaml(settings)


def test_numbers_that_are_none_are_found_where_they_stand(tmp_path: Path) -> None:
    scene = nerfstudio_scene(tmp_path / "source" / "one", aabb=float("inf"))
    assert registry.read_scene(registry.list_scenes(scene.parent)[0])["width"] == 8, "nobody needs that number"
    edit_json(scene / "transforms.json", fl_x=float("nan"))
    with pytest.raises(SceneError, match=r"transforms.json: frames\[0\]: .*finite"):
        registry.read_scene(registry.list_scenes(scene.parent)[0])
