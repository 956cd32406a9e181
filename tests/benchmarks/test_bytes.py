"""The benchmark of what scenes take on disk, in a small form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "bytes.py"


def test_the_benchmark_measures_smaller_types_and_joined_parts_as_smaller(tmp_path):
    flags = ["--scenes", "80", "--plane-scenes", "32", "--resolution", "16"]
    files = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run([sys.executable, SCRIPT, *flags, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["ulw_bytes_per_scene"] < found["ulw_bytes_per_scene_apart"] < 600
    kinds = [found[name] for name in ("float16", "int8", "int4")]
    assert kinds[0]["bytes_per_scene"] > 1.75 * kinds[1]["bytes_per_scene"] > 2.7 * kinds[2]["bytes_per_scene"]
    assert kinds[0]["snr_db"] > 65 > kinds[1]["snr_db"] > 36 > kinds[2]["snr_db"] > 16
    assert done.stdout.startswith("| planes |") and "| `ulw` | 80 |" in done.stdout
