"""Hostile models and fitted scenes: wrong sizes, numbers that are none, weights that are no safetensors or move."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.damage import edit_json, edit_tensors, header, write
from helpers.fitted_rows import row as fitted_row
from helpers.tiny_run import make_run
from safetensors.torch import load_file, save_file

from scaling.cli import read_preset
from scaling.config import Autoencoder, SettingsError, make_settings
from scaling.library.cohorts import commit_cohort, load_cohort
from scaling.library.parts import encode_rows
from scaling.library.run_folder import RunFolder
from scaling.library.scene_row import unpack_scene
from scaling.library.stored_models import StoredModels
from scaling.models.autoencoders.checks import check_config
from scaling.models.autoencoders.load import build_autoencoder
from scaling.models.shared_files import SharedModelError, load_shared
from scaling.storage.atomic import replace_file
from scaling.storage.tensors import read_tensors, tensor_kinds, tensors_hash
from scaling.training.checkpoints.state import read_progress, read_state

PLANES, VAE = "planes.safetensors", "autoencoder/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_settings: Any, tiny_scenes: Any, tmp_path_factory: Any) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("safe") / "cars", tiny_settings, tiny_scenes)


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to damage."""
    return RunFolder(Path(shutil.copytree(whole.path, tmp_path / "cars")))


def nan_like(path: Path, name: str) -> torch.Tensor:
    return torch.full_like(load_file(path)[name], float("nan"))


def grow(folder: Path) -> None:
    os.truncate(folder / PLANES, 1 << 42)  # holes: it takes no room


def pipe(name: str) -> Any:
    return lambda folder: (folder / name).unlink() or os.mkfifo(folder / name)


def representation(**values: Any) -> Any:
    return edit_json("config.json", lambda config: config["settings"]["representation"].update(values))


def vae(**values: Any) -> Any:
    return edit_json("autoencoder/config.json", lambda config: config.update(values))


OVERLAP = json.dumps(
    {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
).encode()


@pytest.mark.parametrize(
    ("damage", "file", "told"),
    [
        (lambda folder: edit_tensors(PLANES, base_planes=nan_like(folder / PLANES, "base_planes"))(folder), PLANES,
         "base_planes holds numbers that are not finite"),
        (edit_tensors(PLANES, coefs_std=torch.tensor([0.1, float("inf")])), PLANES, "coefs_std holds numbers that are"),
        (edit_tensors(VAE, encoder__conv_in__bias=torch.zeros(8, dtype=torch.int64)), VAE, "is int64 [8], expected"),
        (grow, PLANES, "has 4398046511104 bytes, its tensors have"),
        (write(PLANES, header(2**40, b"{}")), PLANES, "a header of 1099511627776 bytes; at most 8388608 are read"),
        (write(PLANES, header(10**5, b"[" * 10**5)), PLANES, "nested too deeply"),
        (write(PLANES, header(7, b'{"a":1}')), PLANES, "tensor a without a type and a shape"),
        (lambda folder: (folder / PLANES).write_bytes((folder / PLANES).read_bytes()[:-1]), PLANES, "not readable as"),
        (pipe(PLANES), PLANES, "no such file"),
        (pipe("config.json"), "config.json", "is no plain file"),
        (lambda folder: os.truncate(folder / "config.json", 1 << 40), "config.json", "has 1099511627776 bytes"),
        (write("config.json", b'{"a":' * 10**5), "config.json", "nested too deeply"),
        (write("config.json", b'{"settings": {}, "settings": {}}'), "config.json", "key 'settings' is there twice"),
        (representation(resolution=10**9), "config.json", "representation.resolution: Input should be less than"),
        (representation(num_base_planes=10**9), "config.json", "num_base_planes: Input should be less than"),
        (representation(plane_axes=["xy"] * 10**5), "config.json", "plane_axes: List should have at most 6 items"),
        (representation(base_std=float("nan")), "config.json", "NaN is not a JSON number"),
        (representation(**{f"key{n}": 1 for n in range(10**4)}), "config.json", "unknown key"),
        (vae(layers_per_block=10**9), "autoencoder/config.json", "layers_per_block: Input should be less than"),
        (vae(block_out_channels=[8] * 10**5), "autoencoder/config.json", "block_out_channels: List should have at"),
        (vae(latent_channels=10**9), "autoencoder/config.json", "latent_channels: Input should be less than"),
        (vae(in_channels=4), "autoencoder/config.json", "in_channels: Input should be 3"),
    ],
)  # fmt: skip
def test_shared_models_that_are_none(run: RunFolder, damage: Any, file: str, told: str) -> None:
    damage(run.shared)
    with pytest.raises(SharedModelError) as error:
        load_shared(run.shared)
    text = str(error.value)
    assert text.startswith(f"{run.shared}/{file}: ") and told in text and len(text) < 10_000


def test_tensors_that_share_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(header(len(OVERLAP), OVERLAP) + bytes(12))
    assert tensor_kinds(path) == {"a": "float32 [2]", "b": "float32 [2]"}
    with pytest.raises(ValueError, match="not readable as safetensors"):
        read_tensors(path, {"a": torch.zeros(2), "b": torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("base_planes", lambda tensor: tensor * float("nan"), "base_planes holds numbers that are not finite"),
        ("base_planes", lambda tensor: tensor[:1], "base_planes is float32 [1, 3, 3, 4, 4], expected float32 [2, 3"),
        ("more", lambda _: torch.ones(1), "tensor more is unexpected"),
    ],
)
def test_cohorts_that_are_none(run: RunFolder, name: str, change: Any, told: str) -> None:
    """Their hash is right: who makes such a file can compute one."""
    shared, shared_hash = load_shared(run.shared)
    tuned = {name: change(shared.state_dict().get(name)).contiguous()}
    folder = run.library.folder
    with pytest.raises(ValueError) as error:
        load_cohort(folder, commit_cohort(folder, tuned, shared_hash, ["a"]), shared, shared_hash)
    path = folder / "cohorts" / tensors_hash(tuned) / "cohort.safetensors"
    assert str(error.value).startswith(f"{path}: {told}")
    for config in (b"[1]", b"[" * 10**5, b'{"format_version": NaN}'):
        path.with_name("config.json").write_bytes(config)
        with pytest.raises(ValueError, match=f"{path.parent}/config.json: not readable as a cohort's"):
            load_cohort(folder, path.parent.name, shared, shared_hash)
    with pytest.raises(ValueError, match="bad cohort hash"):
        load_cohort(folder, "../" * 20 + "etc", shared, shared_hash)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"micro_shape": [2**31 - 1] * 4}, "bytes of micro planes, shape (2147483647"),
        ({"micro_shape": [-3, -2, 4, 4]}, "of shape (-3, -2, 4, 4), expected [P, F_mic, K, K]"),
        ({"micro_shape": []}, "expected [P, F_mic, K, K]"),
        ({"micro_dtype": "object"}, "unknown type of micro planes 'object'"),
        ({"micro_planes": np.full(96, np.nan, np.float16).tobytes()}, "micro_planes holds numbers that are not finite"),
        ({"coefs": [float("inf")] * 5}, "coefs holds numbers that are not finite"),
        ({"micro_dtype": "int8", "micro_planes": bytes(96), "micro_scale": [1.0]}, "1 scales for 3 planes of 2"),
        ({"micro_dtype": "int4", "micro_planes": bytes(47)}, "47 bytes of micro planes, shape (3, 2, 4, 4) needs 48"),
        ({"micro_dtype": "int4", "micro_shape": [1, 1, 1, 3], "micro_planes": b"1"}, "shape (1, 1, 1, 3) needs 2"),
        ({"micro_dtype": "int4", "micro_planes": bytes(48), "micro_scale": []}, "0 scales for 3 planes of 2"),
        (
            {"micro_dtype": "int8", "micro_planes": bytes(96), "micro_scale": [float("nan")] * 6},
            "micro_scale holds num",
        ),
    ],
)
def test_planes_that_are_none(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        unpack_scene(fitted_row("a") | change)
    assert str(error.value).startswith("scene a: ") and told in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"coefs": [1.0] * 3}, "3 coefs, its model has 2 planes"),
        (
            {"micro_dtype": "float16", "micro_shape": [3, 1, 4, 4], "micro_planes": bytes(96), "micro_scale": []},
            "micro planes [3, 1, 4, 4], its model has [3, 2, 4, 4]",
        ),
        ({"coefs": [float("nan")] * 2}, "coefs holds numbers that are not finite"),
        ({"shared": "../../etc"}, "shared '../../etc' is no hash"),
        ({"cohort": "../../etc"}, "cohort '../../etc' is no hash"),
        ({"cohort": "0" * 63}, "bad cohort hash"),
        ({"stage": 7}, "stage 7 is neither 1 nor 2"),
    ],
)
def test_fitted_scenes_that_fit_no_model(run: RunFolder, change: dict[str, Any], told: str) -> None:
    good = run.library.scene("car-00002")
    rows = encode_rows([{**good, "scene_id": "bad", **change}])
    replace_file(run.library.folder / "parts" / f"part-{'0' * 20}.parquet", rows)
    with pytest.raises(ValueError) as error:
        StoredModels(run).scene(run.library.scene("bad"))
    assert str(run.library.folder) in str(error.value) and told in str(error.value)


def test_weights_of_the_hub_are_pinned_and_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def from_pretrained(source: str, **options: Any) -> AutoencoderKL:
        calls.append({"source": source, **options})
        raise OSError("not here")

    monkeypatch.setattr(AutoencoderKL, "load_config", lambda source, **options: {"latent_channels": 4})
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_pretrained)
    pinned = Autoencoder(**read_preset("sd")["autoencoder"])
    with pytest.raises(ValueError, match="not here"):
        build_autoencoder(pinned, 64)
    assert calls[0]["use_safetensors"] is True and len(calls[0]["revision"]) == 40
    with pytest.raises(ValueError, match=r"autoencoder\.revision is null: name the commit"):
        build_autoencoder(pinned.model_copy(update={"revision": None}), 64)
    monkeypatch.setattr(AutoencoderKL, "load_config", lambda source, **options: {"_class_name": "AutoencoderTiny"})
    with pytest.raises(ValueError, match=r"autoencoder\.kind must be tiny"):
        build_autoencoder(pinned, 64)
    assert len(calls) == 1 and "trust_remote_code" not in calls[0]
    for moving in ("main", "v1.0", "fp16", "refs/pr/1"):
        with pytest.raises(SettingsError, match=r"autoencoder\.revision"):
            make_settings({"autoencoder": {"revision": moving}})


def test_a_local_autoencoder_that_is_none(run: RunFolder) -> None:
    folder = run.shared / "autoencoder"
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(header(2**60, b""))
    with pytest.raises(ValueError, match=f"autoencoder.pretrained: cannot load '{folder}'"):
        build_autoencoder(Autoencoder(kind="kl", pretrained=str(folder)), 16)
    vae(layers_per_block=10**9)(run.shared)
    with pytest.raises(ValueError, match=rf"'{folder}'.*layers_per_block: Input should be less than"):
        build_autoencoder(Autoencoder(kind="kl", pretrained=str(folder)), 16)
    check_config({"sample_size": 512, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}, "kl")


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "shared.safetensors")
    (tmp_path / "shared.safetensors").write_bytes((tmp_path / "shared.safetensors").read_bytes()[:-4])
    (tmp_path / "progress.json").write_text("[" * 10**5)
    for read, name in ((read_state, "shared.safetensors"), (read_progress, "progress.json")):
        with pytest.raises(ValueError, match=f"{tmp_path}/{name}: .*; set this checkpoint aside"):
            read(tmp_path)
