"""The report's tables: numbers as text that is easy to read, with the full values behind them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import humanize

from scaling.config import Settings, flatten
from scaling.report.figures import Cost, RunFigures

NONE = "-"  # stands where there is no number or setting
SCENE_COUNTS = (100, 1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Cell:
    """text: what is shown; value: the number behind the text, if there is one; best: whether it is the best of its
    row."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table. note: what the label means, in a few words."""

    label: str
    cells: Sequence[Cell]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """head: the title of each column; the first one stands over the labels of the rows."""

    head: Sequence[str]
    rows: Sequence[Row]

    @property
    def of_numbers(self) -> bool:
        """Whether the columns are aligned as numbers."""
        return any(cell.value is not None for row in self.rows for cell in row.cells)


Form = Callable[[float], str]


def seconds_text(seconds: float) -> str:
    """A duration in the unit that suits it: 1.3 s, 12 min, 3.4 h, 56 days."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds)} s"


def bytes_text(num_bytes: float) -> str:
    """A size in the decimal unit that suits it: 840 B, 3.9 kB, 361 MB."""
    return re.sub(r" Bytes?$", " B", humanize.naturalsize(num_bytes, format="%.3g"))


def _three(value: float) -> str:
    """The number with about three digits."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def count_text(value: float) -> str:
    return f"{value:,.0f}"


def decibels(value: float) -> str:
    return f"{value:.2f}"


def _share(value: float) -> str:
    return f"{value:.3f}"


# Label, path in metrics.json, form, which value is best (1: the highest, -1: the lowest, 0: none is marked), note.
METRIC_ROWS: tuple[tuple[str, str, Form, int, str], ...] = (
    ("scenes fitted", "num_scenes", count_text, 0, ""),
    ("scenes failed", "num_failed", count_text, 0, ""),
    ("test PSNR, dB", "test.psnr", decibels, 1, "views that were not trained on"),
    ("test SSIM", "test.ssim", _share, 1, ""),
    ("test MS-SSIM", "test.ms_ssim", _share, 1, "SSIM at several scales, as many as fit the images"),
    ("test FLIP", "test.flip", _share, -1, "the error that an eye sees; lower is better"),
    ("test LPIPS", "test.lpips", _share, -1, "lower is better"),
    ("train PSNR, dB", "train.psnr", decibels, 0, "on as many training views"),
    ("train SSIM", "train.ssim", _share, 0, ""),
    ("train MS-SSIM", "train.ms_ssim", _share, 0, ""),
    ("train FLIP", "train.flip", _share, 0, ""),
    ("autoencoder PSNR, dB", "autoencoder.psnr", decibels, 0, "test views encoded and decoded: what a fit can reach"),
    ("autoencoder SSIM", "autoencoder.ssim", _share, 0, ""),
    ("autoencoder MS-SSIM", "autoencoder.ms_ssim", _share, 0, ""),
    ("autoencoder FLIP", "autoencoder.flip", _share, 0, ""),
    ("mean image PSNR, dB", "mean_image.psnr", decibels, 0, "the floor: the mean training image for every view"),
    ("latent PSNR, dB", "latent.psnr", decibels, 0, "rendered against encoded latents"),
    (
        "device time a scene",
        "seconds_per_scene",
        seconds_text,
        -1,
        "stage 2: from encoding to packing; stage 1: its share of the training",
    ),
    ("bytes a scene", "bytes_per_scene", bytes_text, -1, "on disk, ids and metrics included"),
    ("shared model", "shared_bytes", bytes_text, 0, "once, for all scenes"),
)


def metrics_table(columns: Sequence[tuple[str, Mapping[str, Any]]], compare: bool) -> Table:
    """A table of METRIC_ROWS. columns: (head, a stage's metrics as in metrics.json); compare: marks the best of a row.

    A row is left out where no column has a number for it.
    """
    rows = []
    flat = [flatten(dict(metrics)) for _, metrics in columns]
    for label, path, form, better, note in METRIC_ROWS:
        values = [metrics.get(path) for metrics in flat]
        if any(value is not None for value in values):
            rows.append(Row(label, number_cells(values, form, better if compare else 0), note))
    return Table(["", *(head for head, _ in columns)], rows)


def number_cells(values: Sequence[float | None], form: Form, better: int = 0) -> list[Cell]:
    """Cells of numbers, a dash where there is none.

    better: marks the highest number (1) or the lowest (-1), unless all are equal; 0 marks none.
    """
    known = [better * value for value in values if value is not None]
    return [
        Cell(NONE)
        if value is None
        else Cell(form(value), value, better != 0 and len(set(known)) > 1 and better * value == max(known))
        for value in values
    ]


def cost_table(labels: Sequence[str], costs: Sequence[Cost], form: Form) -> Table:
    """What N scenes cost in all, by the formula, for each run whose costs are known."""
    known = [(label, cost) for label, cost in zip(labels, costs) if cost.is_known]
    rows = [
        Row(f"{count:,} scenes", number_cells([cost.total(count) for _, cost in known], form, -1))
        for count in SCENE_COUNTS
    ]
    heads = [label for label, _ in known] if len(labels) > 1 else ["in all"]
    return Table(["N", *heads], rows)


def categories_table(runs: Sequence[RunFigures]) -> Table | None:
    """Test PSNR and number of scenes by category; None where there are fewer than two categories."""
    means = [run.psnr_by_category() for run in runs]
    names = sorted({name for found in means for name in found})
    if len(names) < 2:
        return None
    rows = []
    for name in names:
        found = [of.get(name) for of in means]
        cells = [Cell(NONE) if one is None else Cell(f"{one[0]:.2f} ({one[1]:,})", one[0]) for one in found]
        rows.append(Row(name or "(none)", cells))
    return Table(["category", *(run.label for run in runs)], rows)


def settings_table(runs: Sequence[RunFigures]) -> Table:
    """The settings, numbers of scenes and stores that differ between the runs.

    For a single run: the settings that differ from the defaults, which are those of the preset `default`.
    """
    columns = [(run.label, run.noted) for run in runs]
    if len(runs) == 1:
        known = flatten(Settings().model_dump())
        columns = [("default", known), (runs[0].label, {k: v for k, v in runs[0].noted.items() if k in known})]
    keys = list(dict.fromkeys(key for _, values in columns for key in values))
    rows = []
    for key in keys:
        shown = [_setting_text(values[key]) if key in values else NONE for _, values in columns]
        if len(set(shown)) > 1:
            rows.append(Row(key, [Cell(text) for text in shown]))
    return Table(["setting", *(head for head, _ in columns)], rows)


def _setting_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def origin_table(runs: Sequence[RunFigures]) -> Table:
    """Where the runs lie, which shared models they use, and the commands and versions that made them."""
    noted = [run.run.read_config() for run in runs]
    rows = [
        ("run folder", [str(run.run.path) for run in runs]),
        ("shared model, SHA-256", [", ".join(sorted(set(run.rows["shared"].to_pylist()))) for run in runs]),
    ]
    for stage in ("stage1", "stage2"):
        notes = [config.get(stage, {}) for config in noted]
        rows += [
            (f"{stage[:-1]} {stage[-1]}, started", [_setting_text(of.get("written", NONE)) for of in notes]),
            (f"{stage[:-1]} {stage[-1]}, command", [_command(of.get("command")) for of in notes]),
            (f"{stage[:-1]} {stage[-1]}, versions", [_versions(of.get("versions")) for of in notes]),
        ]
    known = [(label, texts) for label, texts in rows if set(texts) != {NONE}]
    return Table(["", *(run.label for run in runs)], [Row(label, [Cell(text) for text in of]) for label, of in known])


def _command(words: Any) -> str:
    return shlex.join(map(str, words)) if isinstance(words, list) else NONE


def _versions(found: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) if isinstance(found, dict) else NONE
