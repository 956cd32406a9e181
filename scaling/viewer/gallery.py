"""The viewer's gallery: the scenes of a library that match a search, sorted, one page at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PER_PAGE = 24
SORTS = {
    "scene_id": "id",
    "category": "category",
    "psnr": "test PSNR",
    "ssim": "test SSIM",
    "ms_ssim": "test MS-SSIM",
    "flip": "test FLIP",
    "train_psnr": "train PSNR",
    "gap": "gap to autoencoder",
    "seconds": "seconds",
}
BEST_FIRST = ("psnr", "ssim", "ms_ssim", "train_psnr")  # sorted from the highest down, unless asked otherwise

FACTS = {
    "psnr": ("test PSNR", "{:.2f} dB"),
    "ssim": ("test SSIM", "{:.3f}"),
    "ms_ssim": ("test MS-SSIM", "{:.3f}"),
    "flip": ("test FLIP", "{:.3f}"),
    "lpips": ("test LPIPS", "{:.3f}"),
    "train_psnr": ("train PSNR", "{:.2f} dB"),
    "autoencoder_psnr": ("autoencoder", "{:.2f} dB"),
    "gap": ("gap to it", "{:.2f} dB"),
    "mean_image_psnr": ("mean image", "{:.2f} dB"),
    "seconds": ("fitted in", "{:.1f} s"),
    "stage": ("stage", "{}"),
    "cohort": ("cohort", "{:.8}…"),
    "category": ("category", "{}"),
}


@dataclass(frozen=True)
class Page:
    """One page of the gallery. rows: library rows without planes; num_found: scenes on all pages; number: of this page,
    from 1; num_pages: at least 1."""

    rows: list[dict[str, Any]]
    num_found: int
    number: int
    num_pages: int

    @property
    def first(self) -> int:
        """The place of the first row among all scenes found, from 1; 0 where none was found."""
        return (self.number - 1) * PER_PAGE + 1 if self.rows else 0


class Gallery:
    """Library rows (scene_id, category, stage, cohort, metrics, seconds) in memory: some kB a scene."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = {row["scene_id"]: {**row, "gap": _gap(row)} for row in rows}
        self._texts = {scene_id: _searched(row) for scene_id, row in self.rows.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def page(
        self,
        search: str = "",
        sort: str = "scene_id",
        descending: bool = False,
        number: int = 1,
        stage: int | None = None,
    ) -> Page:
        """One page of the scenes that match, sorted.

        search: every word must be in the id, category, stage ("stage2") or cohort; case does not count. sort: a key of
        SORTS; scenes without that number come last in either order, and scenes with equal ones are sorted by id.
        number: of the page, moved to the nearest that exists. stage: 1, 2 or None for both.
        """
        words = search.lower().split()
        found = [
            row for scene_id, row in self.rows.items()
            if stage in (None, row["stage"]) and all(word in self._texts[scene_id] for word in words)
        ]  # fmt: skip
        found.sort(key=lambda row: row["scene_id"])
        known = [row for row in found if _is_known(row[sort])]
        known.sort(key=lambda row: row[sort], reverse=descending)  # stable: equal ones stay sorted by id
        found = known + [row for row in found if not _is_known(row[sort])]
        num_pages = max(1, math.ceil(len(found) / PER_PAGE))
        number = min(max(number, 1), num_pages)
        return Page(found[(number - 1) * PER_PAGE : number * PER_PAGE], len(found), number, num_pages)


def facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the page says about a scene: (name, value with unit). What was not measured is left out."""
    return [(name, form.format(row[key])) for key, (name, form) in FACTS.items() if row[key] not in (None, "")]


def _gap(row: Mapping[str, Any]) -> float | None:
    """By how many dB a scene's test PSNR is below that of its autoencoder. None where either was not measured, as in
    RGB space."""
    limit, reached = row["autoencoder_psnr"], row["psnr"]
    return None if limit is None or reached is None else limit - reached


def _searched(row: Mapping[str, Any]) -> str:
    return f"{row['scene_id']} {row['category']} stage{row['stage']} {row['cohort'] or ''}".lower()


def _is_known(value: Any) -> bool:
    return value is not None and value == value  # NaN differs from itself
