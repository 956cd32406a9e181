"""The campaign of faults in its small form: a cluster of three nodes, real fits, nothing lost and nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "faults.py"


def test_a_small_campaign_loses_nothing(tmp_path):
    """In a process of its own: Ray's nodes are added from a main thread only."""
    figures = tmp_path / "figures.json"
    flags = ["--scenes", "12", "--faults", "6", "--seed", "3", "--out", tmp_path / "out", "--json", figures]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=900)
    log = tmp_path / "out" / "driver.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-5000:] if log.is_file() else "")
    found = json.loads(figures.read_text())
    assert (found["lost"], found["duplicated"], found["differing"], found["wrongly_failed"]) == (0, 0, 0, 0)
    assert (found["committed"], found["failed"], found["scenes"]) == (8, 4, 12)
    assert found["num_faults"] == sum(found["faults"].values()) > 4, "four are scenes, the others came over time"
