"""Results of a sweep: a record of each trial; sweep.json, a table and the Pareto fronts of all trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from tabulate import tabulate

from scaling.distributed.sweep.pareto import fronts, plot_fronts
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import first_fault, parse_json
from scaling.storage.limited import read_limited
from scaling.storage.links import refuse_links
from scaling.storage.text import shown

FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
FORMAT_VERSION = 1
DOWN = {"seconds_per_scene", "bytes_per_scene"}  # metrics that are better when lower
RECORD = "trial.json"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a trial's record to its folder: `trial`, `values`, `status`, and its figures or its `error`."""
    replace_file(folder / RECORD, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")


class _Record(BaseModel):
    """What every record holds, whoever wrote it."""

    trial: str
    status: Literal["finished", "failed", "stopped"]
    values: dict[str, Any]


class _Finished(_Record):
    """What the record of a finished trial holds."""

    model_config = ConfigDict(strict=True)

    psnr: float
    ssim: float
    seconds_per_scene: float
    bytes_per_scene: float
    stage1_seconds: float | None


class _Stopped(_Record):
    """What the record of a stopped trial holds. progress: in per cent."""

    model_config = ConfigDict(strict=True)

    progress: float
    psnr: float | None


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a trial; None for a trial that is not done. Raises ValueError naming a damaged file."""
    path = folder / RECORD
    try:
        record = parse_json(read_limited(path))
        known = _Record.model_validate(record)
        if known.status == FINISHED:
            _Finished.model_validate(record)
        elif known.status == STOPPED:
            _Stopped.model_validate(record)
        if known.trial != folder.name:  # it becomes the name of a folder again
            raise ValueError(f"it says that it is of trial {known.trial!r:.200}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path}: no record of a trial ({first_fault(error)}); set it aside, and the same command runs that trial "
            "again"
        ) from error
    return record


def records_by_folder(sweep: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folders and records of the trials that are done, in the order of their names. Raises ValueError naming a
    record that is damaged, or a folder that is a link."""
    folders = [path.parent for path in sorted((sweep / "trials").glob(f"*/{RECORD}"))]
    refuse_links(*folders)
    return [(folder, record) for folder in folders if (record := read_record(folder))]


def read_records(sweep: Path) -> list[dict[str, Any]]:
    """The records of the trials that are done, in the order of their names."""
    return [record for _, record in records_by_folder(sweep)]


def summarise_sweep(sweep: Path, job: dict[str, Any], metric: str) -> dict[str, Any]:
    """Write SWEEP/sweep.json and, where trials have finished, SWEEP/pictures/pareto.png. → what sweep.json holds."""
    records = in_order(read_records(sweep), metric)
    finished = [record for record in records if record["status"] == FINISHED]
    result = {
        "format_version": FORMAT_VERSION,
        **job,
        "metric": metric,
        "best": finished[0]["trial"] if finished else None,
        "pareto": fronts(finished),
        "trials": records,
    }
    replace_file(sweep / "sweep.json", json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    if finished:
        plot_fronts(finished, sweep / "pictures" / "pareto.png")
    return result


def in_order(records: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Sort records: finished trials first, the best by `metric` first among them, then stopped and failed trials."""

    def place(record: dict[str, Any]) -> tuple[bool, float]:
        value = record.get(metric) or 0.0
        return record["status"] != FINISHED, value if metric in DOWN else -value

    return sorted(records, key=place)


def sweep_table(result: dict[str, Any]) -> str:
    """The trials as a Markdown table, the best first; * marks those on a Pareto front."""
    starred = {trial for front in result["pareto"].values() for trial in front}
    rows = []
    for record in result["trials"]:
        if record["status"] == FINISHED:
            stage1 = "-" if record["stage1_seconds"] is None else f"{record['stage1_seconds']:.0f}"
            cells = [
                f"{record['psnr']:.2f}", f"{record['ssim']:.3f}", f"{record['seconds_per_scene']:.2f}",
                f"{record['bytes_per_scene']:,.0f}", stage1, "*" if record["trial"] in starred else "",
            ]  # fmt: skip
        else:
            psnr = "-" if record.get("psnr") is None else f"{record['psnr']:.2f} at {record['progress']:.0f} %"
            cells = [
                psnr,
                "-",
                "-",
                "-",
                "-",
                shown(f"{record['status']}: {record.get('error', 'behind the others')}")[:80],
            ]
        rows.append([shown(record["trial"]), *cells])
    columns = ["trial", "test PSNR, dB", "SSIM", "s/scene", "bytes/scene", "stage 1, s", ""]
    return tabulate(rows, columns, "github", disable_numparse=True)
