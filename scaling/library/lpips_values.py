"""LPIPS of a run's fitted scenes, measured after the fit and kept in RUN/lpips.parquet; the library is unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels, chosen_device
from scaling.library.true_views import TrueViews
from scaling.storage.atomic import replace_file
from scaling.storage.parquet import TableError, open_table, read_columns, table_bytes
from scaling.storage.paths import AnyPath, file_of
from scaling.storage.progress import Progress
from scaling.training.evaluate import render_views
from scaling.training.metrics.lpips import read_lpips

FIT = ("scene_id", "shared", "settings_hash")  # names what was measured: another fit of a scene is measured anew
SCHEMA = pa.schema([*[(name, pa.string()) for name in (*FIT, "weights")], ("lpips", pa.float32())])

Fit = tuple[str, ...]


@dataclass(frozen=True)
class LpipsValues:
    """values: mean LPIPS over each fit's test views; weights: SHA-256 of the weights' file that measured all of them,
    "" where there are none."""

    weights: str
    values: dict[Fit, float] = field(default_factory=dict)

    def fill(self, rows: pa.Table) -> tuple[pa.Table, str | None]:
        """Put the measured values into column `lpips` of library rows; other rows keep their value.

        → the rows, and `weights`: None where no row was measured.
        """
        fits = list(zip(*(rows[name].to_pylist() for name in FIT)))
        if self.values.keys().isdisjoint(fits):
            return rows, None
        old = rows["lpips"].to_pylist()
        column = pa.array([self.values.get(fit, value) for fit, value in zip(fits, old)], pa.float32())
        return rows.set_column(rows.column_names.index("lpips"), "lpips", column), self.weights


def read_lpips_values(run: RunFolder) -> LpipsValues:
    """Read what `measure_lpips` wrote; no values where there is no file. Rows of other weights than the first row's are
    left out. Raises ValueError naming a damaged file."""
    path = run.path / "lpips.parquet"
    try:
        with open_table(*file_of(path)) as file:
            rows = read_columns(file, SCHEMA).to_pylist()
    except FileNotFoundError:
        rows = []
    except TableError as error:
        raise ValueError(f"{path}: not readable ({error}); set it aside and measure LPIPS again") from error
    weights = rows[0]["weights"] if rows else ""
    return LpipsValues(weights, {_fit(row): row["lpips"] for row in rows if row["weights"] == weights})


def measure_lpips(run: RunFolder, weights: AnyPath, store: str | None = None) -> None:
    """Measure LPIPS of the fitted scenes on their test views, on the GPU if there is one, and write RUN/lpips.parquet.

    Scenes that were already measured with the same weights are skipped. weights: a safetensors file; store: of the true
    views, instead of the stores that config.yaml names. Raises ValueError for wrong weights, FileNotFoundError or
    ValueError where scenes or their true views cannot be read.
    """
    network, sha256 = read_lpips(weights)
    run.check_fitted()
    # Values of other weights cannot be compared with new ones, so they are dropped.
    known = read_lpips_values(run)
    found = LpipsValues(sha256, dict(known.values) if known.weights == sha256 else {})
    fits = {row["scene_id"]: _fit(row) for row in run.library.table(FIT).to_pylist()}
    missing = [scene_id for scene_id, fit in fits.items() if fit not in found.values]
    device = chosen_device()
    network.to(device)
    models, truth = StoredModels(run, device), TrueViews(run, store)
    # Measuring takes long: an interrupted call keeps the values that it has, and the next call goes on from them.
    try:
        for row in Progress(run.library.scenes(missing), "LPIPS", len(missing), unit=" scenes", disable=None):
            value = _measured(row, models, truth, network.mean)
            if value is not None:
                found.values[_fit(row)] = value
    finally:
        if missing and found.values:
            _write(run, found)


@torch.no_grad()
def _measured(row: Mapping[str, Any], models: StoredModels, truth: TrueViews, mean_lpips: Any) -> float | None:
    """Mean LPIPS over the test views of a whole row's scene; None where it has no test views."""
    shared, params = models.scene(row)
    views = truth.views(row["scene_id"], row["stage"], shared.settings.data)
    test = list(views.test_views)
    if not test:
        return None
    rendered = render_views(shared, params, views.cam2world[test], views.intrinsics[test])["images"]
    return mean_lpips(rendered, views.images[test].to(rendered))


def _write(run: RunFolder, measured: LpipsValues) -> None:
    rows = [
        {**dict(zip(FIT, fit)), "weights": measured.weights, "lpips": value} for fit, value in measured.values.items()
    ]
    replace_file(run.path / "lpips.parquet", table_bytes(pa.Table.from_pylist(rows, SCHEMA), use_dictionary=False))


def _fit(row: Mapping[str, Any]) -> Fit:
    return tuple(row[name] for name in FIT)
