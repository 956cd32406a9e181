"""LPIPS from a local file: its formula, what a wrong file is told, and how a run's scenes get it without a download."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from scaling.library.lpips_values import measure_lpips, read_lpips_values
from scaling.library.run_folder import RunFolder
from scaling.library.summary import gather, summarise
from scaling.training.metrics.lpips import Lpips, read_lpips
from scaling.viewer.gallery import Gallery, facts

EVALUATE = Path(__file__).resolve().parents[2] / "experiments" / "evaluate.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of the right names and shapes, 59 MB, and of small numbers."""
    with torch.device("meta"):
        state = Lpips().state_dict()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file({name: torch.rand(t.shape, generator=generator).sub_(0.4).mul_(0.1) for name, t in state.items()}, path)
    return path


@pytest.fixture
def run(fitted_run: RunFolder, tmp_path) -> RunFolder:
    shutil.copytree(fitted_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_lpips_with_a_pencil():
    """One channel a layer that passes red on: white has the feature 2.25, which becomes 1 as a unit vector, black has a
    negative one, 0 after ReLU. So each layer's difference is 1, and LPIPS the sum of what the layers count."""
    network = Lpips((1, 1, 1, 1, 1)).requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.zero_()
        if name.startswith("net") and name.endswith("weight"):
            parameter[0, 0, 1, 1] = 1.0
        elif name.startswith("lin"):
            parameter.fill_(1.0 + int(name[3]))
    black, white = torch.zeros(9, 3, 16, 16), torch.ones(9, 3, 16, 16)
    assert network.mean(black, white) == pytest.approx(1 + 2 + 3 + 4 + 5)
    assert network.mean(white, white) == 0.0
    half = white.clone()
    half[:, 0, :, 8:] = 0
    # Half of all places differ, but in the last layer, where pooling has left one place, which sees both halves.
    assert network(half, white).tolist() == pytest.approx([(1 + 2 + 3 + 4) / 2] * 9)


def test_names_are_those_of_the_package_lpips():
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Lpips().state_dict().items()}
    assert len(shapes) == 2 * 13 + 5 and shapes["net.slice1.0.weight"] == [64, 3, 3, 3]
    assert shapes["net.slice5.28.bias"] == [512] and shapes["lin1.model.1.weight"] == [1, 128, 1, 1]


def test_a_wrong_file_is_told_by_its_key(weights, tmp_path):
    state = {name: torch.zeros(1) for name in read_lpips(weights)[0].state_dict()}
    wrong = tmp_path / "wrong.safetensors"
    for change, message in (
        ({}, "net.slice1.0.weight is float32 [1], expected float32 [64, 3, 3, 3]"),
        ({"fc.weight": torch.zeros(1)}, "tensor fc.weight is unexpected"),
    ):
        save_file({**state, **change}, wrong)
        with pytest.raises(ValueError, match="not weights of LPIPS") as told:
            read_lpips(wrong)
        assert message in str(told.value) and str(wrong) in str(told.value)
    save_file({name: tensor for name, tensor in state.items() if name != "lin3.model.1.weight"}, wrong)
    with pytest.raises(ValueError, match=r"tensor lin3.model.1.weight is missing"):
        read_lpips(wrong)
    wrong.write_bytes(b"PK\x03\x04 a pickle in a zip, as torch.save makes it")
    with pytest.raises(ValueError, match="not readable as safetensors"):
        read_lpips(wrong)
    with pytest.raises(ValueError, match="no such file"):
        read_lpips(tmp_path / "none.safetensors")


@pytest.mark.slow
def test_evaluate_measures_lpips(run, weights, monkeypatch):
    before = json.dumps(summarise(run)["test"])
    assert '"lpips": null' in before and "--lpips-weights" in before
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", str(run.path), "--lpips-weights", str(weights)])
    assert runpy.run_path(str(EVALUATE))["main"]() == 0
    test = json.loads(run.metrics.read_text())["test"]
    assert test["lpips"] > 0 and test["lpips_reason"] is None and test["lpips_network"] == "vgg"
    assert test["lpips_weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert pq.read_table(run.path / "scenes.parquet")["lpips"].null_count == 0
    rows = read_lpips_values(run).fill(run.library.table())[0].to_pylist()
    assert "test LPIPS" in dict(facts(next(iter(Gallery(rows).rows.values()))))


@pytest.mark.slow
def test_what_was_measured_is_kept_until_the_weights_change(run, weights, tmp_path, monkeypatch):
    measured: list[str] = []

    def mean(row, *rest):
        measured.append(row["scene_id"])
        return float(len(measured))

    monkeypatch.setattr("scaling.library.lpips_values._measured", mean)
    measure_lpips(run, weights)
    measure_lpips(run, weights)
    assert sorted(measured) == ["car-00002", "car-00003"] and gather(run)[0]["test"]["lpips"] == 1.5
    other = tmp_path / "other.safetensors"
    save_file({name: 2 * tensor for name, tensor in read_lpips(weights)[0].state_dict().items()}, other)
    measure_lpips(run, other)
    assert sorted(measured[2:]) == ["car-00002", "car-00003"] and gather(run)[0]["test"]["lpips"] == 3.5
    (run.path / "lpips.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match=r"lpips\.parquet: not readable"):
        gather(run)
