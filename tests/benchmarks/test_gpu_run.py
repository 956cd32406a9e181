"""The benchmark for a borrowed GPU in its small form on a CPU."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["gpu_run", *flags])
    return importlib.import_module("gpu_run").main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="its small form then runs on the GPU")
def test_all_parts_in_small(tmp_path, monkeypatch, capsys):
    """By a backend that compiles nothing: what is compiled can be traced whole."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    assert run(monkeypatch, "--small", "--out", str(tmp_path / "out")) == 0
    found = json.loads((tmp_path / "out" / "gpu_run.json").read_text())
    assert [row["what"] for row in found["checks"]] == ["torch.compile"] and found["checks"][0]["difference"] < 1e-3
    assert [row["scenes_per_batch"] for row in found["sweep"]] == [2, 4] and found["sweep"][0]["scenes_per_second"] > 0
    assert {row["part"] for row in found["parts"]} >= {"2a step", "evaluate a view", "limit: copy"}
    [real] = found["run"]
    assert real["psnr_worst"] <= real["psnr"] <= real["psnr_best"] and real["psnr"] > 10
    assert real["scenes_per_gpu_hour"] == pytest.approx(3600 * real["stage2_scenes"] / real["stage2_s"])
    assert imageio.imread(tmp_path / "out" / "cars.png").std() > 10 and (tmp_path / "out" / "trace.json").stat().st_size
    assert "== run" in capsys.readouterr().out


def test_what_computes_something_else_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    checks = importlib.import_module("gpu_parts.checks")
    monkeypatch.setattr(checks, "_ways", lambda *_: {"torch.compile": lambda: 1.0, "bfloat16": lambda: 1 / 0})
    monkeypatch.setattr(checks, "losses_of", lambda *_: 2.0)
    shared = type("Model", (), {"settings": None})
    first, second = checks.check_all(shared, [])
    assert not first["ok"] and first["difference"] == 0.5
    assert not second["ok"] and second["note"] == "ZeroDivisionError: division by zero"


def test_without_a_gpu_only_the_small_form_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--small"):
        run(monkeypatch, "--out", str(tmp_path / "out"))


def test_it_needs_neither_ray_nor_mlflow():
    without = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None"
    imports = f"{without}; import gpu_run, gpu_parts.checks, gpu_parts.real_run, gpu_parts.workload"
    done = subprocess.run([sys.executable, "-c", imports], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
