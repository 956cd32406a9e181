"""From what fitters and processes noted to the figures of a job."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from throughput_parts.clocked import FIT, WHOLE, read_notes, union


def figures_of(
    job: dict[str, Any], start: float, end: float, times: Path, processes: dict[str, float]
) -> dict[str, Any]:
    """The figures of a job that ran from start to end (seconds of the wall clock); see throughput.py. times: the
    fitters' notes; processes: CPU-seconds by role. Raises RuntimeError where no fitter noted anything."""
    scenes, notes = job["scenes"], read_notes(times)
    lines = [line for process in notes.values() for line in process]
    if not lines:
        raise RuntimeError(f"no actor wrote its times to {times}")
    own: dict[str, float] = defaultdict(float)
    for line in lines:
        own[line["part"]] += line["own"]
    whole = [[line for line in process if line["part"] in WHOLE] for process in notes.values()]
    busy = sum(union([(line["start"], line["end"]) for line in process]) for process in whole)
    first, last = min(line["start"] for line in lines), max(line["end"] for line in lines)
    at_work = job["actors"] * (last - first)
    cpu = {part: sum(line["cpu"] for line in lines if line["part"] in part) for part in (WHOLE, FIT)}
    parts = {part: 1000 * seconds / scenes for part, seconds in sorted(own.items(), key=lambda item: -item[1])}
    parts["waiting (wall)"] = 1000 * (at_work - busy) / scenes
    return {
        **{key: job[key] for key in ("scenes", "actors", "image_size", "where")},
        "wall_s": end - start,
        "start_s": first - start,
        "finish_s": end - last,
        "fit_share": cpu[FIT] / cpu[WHOLE],
        "actor_busy": busy / at_work,
        "scenes_per_hour": 3600 * scenes / (end - start),
        "parts": parts,
        "processes": dict(sorted(processes.items(), key=lambda item: -item[1])),
    }
