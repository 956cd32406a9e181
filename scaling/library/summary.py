"""metrics.json and scenes.parquet: a run's quality and cost, computed from the library's rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tabulate import tabulate

from scaling.library.lpips_values import LpipsValues, read_lpips_values
from scaling.library.manifest import Event
from scaling.library.run_folder import RunFolder
from scaling.models.shared_files import shared_bytes
from scaling.storage.atomic import replace_file
from scaling.storage.parquet import table_bytes
from scaling.storage.text import shown
from scaling.training.metrics.images import VIEW_METRICS, why_no_lpips
from scaling.training.metrics.lpips import NETWORK

UNNAMED = "no category"
ALL_ALIKE = 99.0  # dB of the mean image, which is capped at 100: the test views are the training views' mean


def summarise(run: RunFolder) -> dict[str, Any]:
    """Write RUN/metrics.json and RUN/scenes.parquet. → the metrics.

    Raises FileNotFoundError where the run has no fitted scenes.
    """
    metrics, table = gather(run)
    replace_file(run.metrics, json.dumps(metrics, indent=1, allow_nan=False).encode() + b"\n")
    in_order = table.sort_by([("stage", "ascending"), ("scene_id", "ascending")])
    replace_file(run.path / "scenes.parquet", table_bytes(in_order))
    return metrics


def gather(run: RunFolder) -> tuple[dict[str, Any], pa.Table]:
    """Compute what metrics.json says of the library as it is now; nothing is written. → the metrics, and the library's
    rows without planes, in the library's order. Raises FileNotFoundError where the run has no fitted scenes."""
    run.check_fitted()
    table = run.library.table()
    stages = [table.filter(pc.equal(table["stage"], stage)) for stage in (1, 2)]
    committed = set(table["scene_id"].to_pylist())
    failed = failed_scenes(run, committed)
    metrics: dict[str, Any] = {"num_scenes": 0, "num_failed": len(failed)}
    measured = read_lpips_values(run)
    metrics |= _stage(run, stages[1], measured, stage=2)
    metrics["shared_bytes"] = shared_bytes(run.shared_in_use())
    metrics["stage1"] = _stage(run, stages[0], measured, stage=1)
    return metrics, measured.fill(table)[0]


def _stage(run: RunFolder, rows: pa.Table, measured: LpipsValues, stage: int) -> dict[str, Any]:
    """The metrics of one stage's rows. Scenes whose views are all alike (all white) say nothing: they are counted
    apart, and left out of means."""
    rows, weights = measured.fill(rows)
    fitted = len(rows)
    rows = rows.filter(pc.less(pc.fill_null(rows["mean_image_psnr"], 0.0), ALL_ALIKE))
    lpips = mean(rows, "lpips")
    return {
        "num_scenes": fitted,
        "num_left_out": fitted - len(rows),
        "test": {
            **_means(rows),
            "lpips": lpips,
            "lpips_reason": _why_none() if lpips is None else None,
            "lpips_network": None if lpips is None else NETWORK,
            "lpips_weights": weights,  # None beside a value: torchmetrics fetched its own
        },
        "train": _means(rows, "train_"),
        "autoencoder": _means(rows, "autoencoder_"),
        "mean_image": {"psnr": mean(rows, "mean_image_psnr")},
        "latent": {"psnr": mean(rows, "latent_psnr")},
        "seconds_per_scene": mean(rows, "seconds"),
        "bytes_per_scene": run.library.num_bytes(stage) / fitted if fitted else None,
        "categories": _categories(rows),
    }


def _why_none() -> str:
    why = why_no_lpips() or "the scenes were fitted without it"
    return f"{why}; evaluate.py --lpips-weights FILE measures it without a download"


def _categories(rows: pa.Table) -> dict[str, Any]:
    """Quality by category; empty where all scenes have the same category."""
    names = [f"{side}{name}" for side in ("", "train_", "autoencoder_") for name in VIEW_METRICS]
    names.append("mean_image_psnr")
    # One pass over the rows, however many categories a store's author made up.
    finite = {name: pc.if_else(pc.is_finite(rows[name]), rows[name], None) for name in names}
    groups = pa.table({"category": rows["category"], **finite}).group_by("category")
    parts = groups.aggregate([([], "count_all"), *((name, "mean") for name in names)]).sort_by("category").to_pylist()
    return {
        part["category"] or UNNAMED: {
            "num_scenes": part["count_all"],
            "test": {name: part[f"{name}_mean"] for name in VIEW_METRICS},
            "train": {name: part[f"train_{name}_mean"] for name in VIEW_METRICS},
            "autoencoder": {name: part[f"autoencoder_{name}_mean"] for name in VIEW_METRICS},
            "mean_image": {"psnr": part["mean_image_psnr_mean"]},
        }
        for part in parts
        if len(parts) > 1
    }


def _means(rows: pa.Table, side: str = "") -> dict[str, float | None]:
    """Means of VIEW_METRICS, which each side has: test views (""), "train_" and "autoencoder_"."""
    return {name: mean(rows, f"{side}{name}") for name in VIEW_METRICS}


def mean(rows: pa.Table, key: str) -> float | None:
    """Mean of a column over the scenes with a finite value; None where no scene has one."""
    values = rows[key].drop_null()
    return pc.mean(values.filter(pc.is_finite(values))).as_py()


# Rows of the table on the terminal: label, path in metrics.json, number format.
ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("scenes fitted", ("num_scenes",), ",d"),
    ("  all of one colour: in no mean", ("num_left_out",), ",d"),
    ("test PSNR, dB", ("test", "psnr"), ".2f"),
    ("test SSIM", ("test", "ssim"), ".3f"),
    ("test MS-SSIM", ("test", "ms_ssim"), ".3f"),
    ("test FLIP (lower is better)", ("test", "flip"), ".3f"),
    ("test LPIPS (lower is better)", ("test", "lpips"), ".3f"),
    ("train PSNR, dB", ("train", "psnr"), ".2f"),
    ("autoencoder PSNR, dB", ("autoencoder", "psnr"), ".2f"),
    ("mean image PSNR, dB (the floor)", ("mean_image", "psnr"), ".2f"),
    ("device seconds a scene", ("seconds_per_scene",), ".2f"),
    ("bytes a scene", ("bytes_per_scene",), ",.0f"),
)


def table_text(metrics: dict[str, Any]) -> str:
    """The metrics as a small table for the terminal."""
    rows = [*ROWS]
    for name in sorted({*metrics["stage1"]["categories"], *metrics["categories"]}):
        rows.append((f"{shown(name)[:16]}: scenes", ("categories", name, "num_scenes"), ",d"))
        rows.append((f"{shown(name)[:16]}: test PSNR, dB", ("categories", name, "test", "psnr"), ".2f"))
    cells = [
        (label, *(_cell(stage, path, form) for stage in (metrics["stage1"], metrics))) for label, path, form in rows
    ]
    cells.append(("shared model, bytes", f"{metrics['shared_bytes']:,d}", ""))
    cells.append(("scenes failed", "", f"{metrics['num_failed']:,d}"))
    return tabulate(
        cells, ["", "stage 1", "stage 2"], "simple", colalign=("left", "right", "right"), disable_numparse=True
    )


def _cell(values: dict[str, Any] | None, path: Sequence[str], form: str) -> str:
    found: Any = values
    for key in path:
        found = None if found is None else found.get(key)
    return "-" if found is None else format(found, form)


def failed_scenes(run: RunFolder, committed: Collection[str]) -> dict[str, Event]:
    """The scenes that were given up and not fitted since, each with its latest event."""
    return {scene_id: event for scene_id, event in run.given_up().items() if scene_id not in committed}


def failures_text(run: RunFolder, most: int = 10) -> str:
    """The failed scenes, one a line, at most `most` of them; "" where there are none."""
    failed = sorted(failed_scenes(run, set(run.library.ids())).items())
    lines = [f"  {scene_id}: {shown(event.kind)}: {shown(event.message)}" for scene_id, event in failed[:most]]
    more = [f"  … and {len(failed) - most} more"] if len(failed) > most else []
    return "\n".join(["failed:", *lines, *more]) if failed else ""
