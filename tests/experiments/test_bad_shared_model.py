"""Shared models that are none: what is wrong, where, and what to do."""

from __future__ import annotations

import pickle
import re
import shutil

import pytest
import torch
from helpers.damage import edit_json, edit_tensors, header, write

from scaling.models.shared_files import SharedModelError, load_shared, read_scene_ids

PLANES = "planes.safetensors"
VAE = "autoencoder/diffusion_pytorch_model.safetensors"
DECODER = "decoder/model.safetensors"

ENORMOUS = {"resolution": 2**30}


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (
            edit_tensors(PLANES, base_planes=torch.zeros(2, 3, 3, 8, 8)),
            PLANES,
            "base_planes is float32 [2, 3, 3, 8, 8], expected float32 [2, 3, 3, 4, 4]",
        ),
        (edit_tensors(PLANES, field__head__bias=torch.zeros(9)), PLANES, "field.head.bias is float32 [9]"),
        (edit_tensors(PLANES, background=torch.ones(4, dtype=torch.float16)), PLANES, "background is float16 [4]"),
        (edit_tensors(PLANES, base_planes=None), PLANES, "tensor base_planes is missing"),
        (edit_tensors(VAE, encoder__conv_in__bias=None), VAE, "tensor encoder.conv_in.bias is missing"),
        (edit_tensors(VAE, more=torch.ones(1)), VAE, "tensor more is unexpected"),
        (edit_tensors(DECODER, more=torch.ones(1)), DECODER, "tensor more is unexpected"),
        (write(PLANES, header(2**60, b"x" * 64)), PLANES, "not readable as safetensors"),
        (write(DECODER, header(50, b"\x80" * 64)), DECODER, "not readable as safetensors"),
        (write(VAE, pickle.dumps({"encoder.conv_in.bias": [0.0] * 8})), VAE, "not readable as safetensors"),
        (lambda folder: (folder / PLANES).rename(folder / "planes.pt"), PLANES, "read from safetensors alone"),
        (lambda folder: shutil.rmtree(folder / "autoencoder"), "autoencoder/config.json", "No such file"),
        (write("autoencoder/config.json", b"[1]"), "autoencoder/config.json", "expected an object, found a list"),
        (
            edit_json("autoencoder/config.json", lambda config: config.update(latent_channels="four")),
            "autoencoder/config.json",
            "no autoencoder can be made of it",
        ),
        (edit_json("config.json", lambda config: config["settings"].update(new=1)), "config.json", "new: unknown key"),
        (edit_json("config.json", lambda config: config.update(settings=[1])), "config.json", "settings are missing"),
        (edit_json("config.json", lambda config: config.update(format_version="one")), "config.json", "format_version"),
        (edit_json("config.json", lambda config: config["settings"]["representation"].update(ENORMOUS)), "config.json",
         "representation.resolution: Input should be less than or equal to 4096"),
        (write("config.json", b"\xff\xfe"), "config.json", "not a text file"),
        (write("hash.txt", b""), "", "hash.txt says nothing"),
    ],
)  # fmt: skip
def test_a_shared_model_that_is_none(run, damage, file, words):
    damage(run.shared)
    with pytest.raises(SharedModelError, match=re.escape(words)) as error:
        load_shared(run.shared)
    assert str(error.value).startswith(str(run.shared / file)) and "\n" not in str(error.value)


def test_sizes_that_fit_no_memory_are_refused_before_they_take_it(run):
    grow = {"resolution": 2**12, "num_base_planes": 2**12}  # 2.5 TB
    edit_json("config.json", lambda config: config["settings"]["representation"].update(grow))(run.shared)
    with pytest.raises(SharedModelError, match=r"expected float32 \[4096, 3, 3, 4096, 4096\]"):
        load_shared(run.shared)


@pytest.mark.parametrize(("text", "told"), [(None, "No such file"), (b"", "names none"), (b"\xff", "not a text file")])
def test_a_shared_model_without_the_names_of_its_scenes(run, command, text, told):
    path = run.shared / "scenes.txt"
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(SharedModelError, match=told):
        read_scene_ids(run.shared)
    status, error = command("stage2", "--run", run.path, "--num-scenes", 4)
    assert status == 1 and error.startswith(f"error: {path}: ") and error.count("\n") == 1
