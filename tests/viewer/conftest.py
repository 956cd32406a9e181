"""The viewer as a process of its own."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers.tiny_run import make_run

ROOT = Path(__file__).resolve().parents[2]
NUM_SCENES = 5000
CATEGORY = "<img src=x onerror=alert(1)>"  # a category is any text


def wait_for(address: str) -> None:
    """Return when the server takes connections; it prints its address a little earlier."""
    place = urlsplit(address)
    for _ in range(300):
        try:
            socket.create_connection((place.hostname, place.port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tiny_settings, tiny_scenes, tmp_path_factory) -> Iterator[tuple[str, int]]:
    """Address and process id of the viewer of a run with 5,000 scenes.

    car-00002 and car-00003 were fitted; the others are copies.
    """
    from scaling.library.parts import commit_part

    scenes = [*tiny_scenes[:3], replace(tiny_scenes[3], category=CATEGORY)]
    run = make_run(tmp_path_factory.mktemp("runs") / "many", tiny_settings, scenes)
    run.write_config("stage2", tiny_settings, {"store": "embedded"})
    row = run.library.scene("car-00002")
    rows = [row | {"scene_id": f"car-{n:05d}", "psnr": n / 1000} for n in range(4, NUM_SCENES + 2)]
    for start in range(0, len(rows), 1024):
        commit_part(run.library.folder, rows[start : start + 1024])
    command = [sys.executable, "experiments/view.py", "--run", str(run.path), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = server.stdout.readline()
    found = re.search(r"5,000 scenes of .* on (http://127\.0\.0\.1:\d+)", first)[1]
    wait_for(found)
    yield found, server.pid
    server.send_signal(signal.SIGINT)
    rest = server.communicate(timeout=60)[0]
    assert server.returncode == 0 and "Traceback" not in rest, rest
