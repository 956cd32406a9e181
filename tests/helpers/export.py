"""Runs experiments/export.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


def export_main(monkeypatch, *arguments: object) -> int:
    """experiments/export.py with a command line. → its exit status."""
    script = Path(__file__).resolve().parents[2] / "experiments" / "export.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    return end.value.code
