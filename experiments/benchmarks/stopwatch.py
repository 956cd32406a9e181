"""What step.py, encode.py, gpu_fit.py and others measure with: the time of an action, and a Markdown table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds that an action takes once: CPU time on a CPU, where other programs may be at work, else wall time."""
    device = torch.device(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    wait_for(device)
    start = clock()
    action()
    wait_for(device)
    return clock() - start


def median_ms(action: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 10) -> float:
    """The median of `repeats` times that an action took, in ms, after two that are not counted."""
    times = [seconds_of(action, device) for _ in range(repeats + 2)]
    return 1000 * median(times[2:])


def table_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as a Markdown table; floats with three significant digits at least, None as a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
