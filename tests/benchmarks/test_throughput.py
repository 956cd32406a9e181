"""The benchmark of throughput in its smallest form."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


def test_a_small_job_is_taken_apart(tmp_path, monkeypatch):
    """Two batches by one actor: parts add up to what the actor's process took, and no time is counted twice."""
    flags = ["--scenes", "6", "--steps", "5", "--views", "6", "--image-sizes", "32", "--actors", "1"]
    command = [sys.executable, FOLDER / "throughput.py", *flags, "--out", tmp_path / "out", "--json", tmp_path / "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    log = tmp_path / "out" / "32-local-1" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.is_file() else "")
    found = json.loads((tmp_path / "json").read_text())
    [job] = found["jobs"]
    assert {"scenes", "wall_s", "fit_share", "actor_busy", "scenes_per_hour", "parts"} <= found.keys()
    assert 0 < found["fit_share"] < 1 and 0 < found["actor_busy"] <= 1
    assert found["scenes_per_hour"] == pytest.approx(3600 * 6 / found["wall_s"])
    cpu = {part: ms for part, ms in found["parts"].items() if "waiting" not in part and not part.startswith("steps: ")}
    assert min(cpu.values()) >= 0 and 0 < 6 * sum(cpu.values()) / 1000 < job["processes"]["actors"]
    loops = [ms for part, ms in found["parts"].items() if part.startswith("steps: ")]
    assert sum(loops) == pytest.approx(found["parts"]["steps"]) and len(loops) == 11
    assert 0 < job["start_s"] < found["wall_s"] and 0 < job["finish_s"] < found["wall_s"]


def test_seconds_in_several_spans_count_once(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    union = importlib.import_module("throughput_parts.clocked").union
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4 and union([]) == 0


def test_nested_parts_are_not_counted_twice(monkeypatch):
    """An outer part of 3 ticks that holds an inner one of 2: 1 tick is its own."""
    monkeypatch.syspath_prepend(FOLDER)
    clocked = importlib.import_module("throughput_parts.clocked")
    ticks = iter([0, 1, 3, 3])
    monkeypatch.setattr(clocked.time, "thread_time", lambda: next(ticks))
    notes = clocked.Notes()
    inner = notes.noted("inner", lambda: None)
    notes.noted("outer", inner)()
    assert [(line["part"], line["cpu"], line["own"]) for line in notes.lines] == [("inner", 2, 2), ("outer", 3, 1)]
