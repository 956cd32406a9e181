"""Progress in a log file: a line now and then, and one at the end; long waits are told."""

from __future__ import annotations

import io
import sys
import time

import pytest

from scaling.storage import progress
from scaling.storage.paths import ObjectPath
from scaling.storage.progress import Progress, waiting_for


def test_outside_of_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with Progress(total=64, unit="scene", desc="fit") as bar:
        for done in range(64):
            bar.update()
            bar.set_postfix_str(f"{done} dB")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("fit: 0 of 64") and lines[1].startswith("fit: 64 of 64")
    assert lines[1].endswith("63 dB") and "\r" not in out.getvalue()


def test_in_a_terminal_it_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(total=2, desc="fit") as bar:
        bar.update(2)
    assert "\rfit: 100%|" in sys.stderr.getvalue()


def test_a_long_wait_is_told_and_a_short_one_is_not(monkeypatch, capfd):
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.05)
    with waiting_for("a server"):
        time.sleep(0.2)
    assert "still waiting for a server (0 s)" in capfd.readouterr().err
    with waiting_for("a server"):
        pass
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_a_bucket_that_does_not_answer_is_told(monkeypatch, capfd):
    class Silent:
        def get_file_info(self, _: str) -> None:
            time.sleep(0.2)
            raise OSError("no answer")

    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(ObjectPath, "filesystem", Silent())
    with pytest.raises(OSError, match="no answer"):
        ObjectPath.of("s3://runs/x").is_file()
    assert "still waiting for the object store at s3://runs/x" in capfd.readouterr().err
