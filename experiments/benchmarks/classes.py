"""One set of base planes for all categories of a store, or one for each: quality of scenes that stage 1 never saw.

python experiments/benchmarks/classes.py --store STORE --json FILE [--preset quick] [--train 16] [--fit 8]

For each category one shared model is trained on its first --train scenes, with the preset's steps. One more is trained
on all of these scenes together, with the same number of steps, so it sees each scene less often. Every model then fits
the next --fit scenes of each category it knows, in mode frozen. Two models are made at a time, each by one CPU thread;
finished ones are kept under --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from scaling.cli import positive_int, read_preset, run_command
from scaling.config import Settings, make_settings
from scaling.storage.json_yaml import parse_json

ALL = "all"  # name of the set that all categories share


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="scene store with at least two categories")
    parser.add_argument("--preset", default="quick", help="name of a preset in experiments/presets [quick]")
    parser.add_argument("--train", type=positive_int, default=16, help="scenes of stage 1 in each category [16]")
    parser.add_argument("--fit", type=positive_int, default=8, help="scenes fitted in each category [8]")
    parser.add_argument("--out", type=Path, default=Path("runs/classes"), help="shared models")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def split(source: Any, train: int, fit: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The first `train` and the next `fit` ids of each category. Raises ValueError where the store has one category
    only, or too few scenes of one."""
    from scaling.data.choose_scenes import ids_by_category

    of_category = ids_by_category(source)
    if len(of_category) < 2:
        raise ValueError(f"{source.name}: one category only; this compares one set of base planes for several")
    short = {name: len(ids) for name, ids in of_category.items() if len(ids) < train + fit}
    if short:
        raise ValueError(f"{source.name}: {short} scenes; --train {train} and --fit {fit} need {train + fit} of each")
    chosen = {name: ids[:train] for name, ids in of_category.items()}
    return chosen, {name: ids[train : train + fit] for name, ids in of_category.items()}


def measure_set(
    job: tuple[str, list[str]], fit_ids: dict[str, list[str]], settings: Settings, spec: Any, out: Path
) -> dict[str, Any]:
    """Run stage 1 of one set, then its frozen fits. job: name of the set and ids of its scenes in stage 1.

    → the figures of each category that the set knows, by category, and those of stage 1.
    """
    import torch
    from variants import settings_key, train

    from scaling.data.scene_views import views_from_row
    from scaling.models.shared_files import load_shared
    from scaling.training.evaluate import evaluate_scene
    from scaling.training.fit_frozen import fit_scenes

    torch.set_num_threads(1)
    name, ids = job
    folder = out / f"{name}-{len(ids)}-{settings_key(settings)}"
    train(settings, spec, ids, folder)
    shared, _ = load_shared(folder)
    rows: dict[str, Any] = {"stage1_cpu_seconds": parse_json((folder / "seconds.json").read_bytes()), "scenes": ids}
    # A set of one category is not asked to fit another one.
    for category, wanted in fit_ids.items():
        if name not in (category, ALL):
            continue
        views = [views_from_row(row, settings.data.image_size) for row in spec.open().rows(wanted)]
        found = [
            evaluate_scene(shared, fitted.params[None], scene)
            for scene, fitted in zip(views, fit_scenes(shared, views, settings))
        ]
        keys = ("psnr", "ssim", "train_psnr", "autoencoder_psnr", "mean_image_psnr")
        rows[category] = {key: mean(values[key] for values in found if values[key] is not None) for key in keys}
    return rows


def table_text(figures: dict[str, Any]) -> str:
    """A row for each category and set, as Markdown."""
    lines = ["| category | base planes of | test | SSIM | train | autoencoder | mean image |", "|---" * 7 + "|"]
    for category in figures["fit"]:
        for name in (category, ALL):
            row = figures["sets"][name][category]
            cells = [f"{row[key]:.2f}" for key in ("train_psnr", "autoencoder_psnr", "mean_image_psnr")]
            lines.append(f"| {category} | {name} | {row['psnr']:.2f} | {row['ssim']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    arguments = make_parser().parse_args()

    from scaling.data.stores import SourceSpec

    settings = make_settings(read_preset(arguments.preset))
    spec = SourceSpec.of(arguments.store, settings.data)
    chosen, fit_ids = split(spec.open(), arguments.train, arguments.fit)
    together = [scene_id for in_turn in zip(*chosen.values()) for scene_id in in_turn]
    jobs = {**chosen, ALL: together}
    job = partial(measure_set, fit_ids=fit_ids, settings=settings, spec=spec, out=arguments.out)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        sets = dict(zip(jobs, pool.map(job, jobs.items())))
    figures = {"store": spec.store, "preset": arguments.preset, "fit": fit_ids, "sets": sets}
    arguments.json.write_text(json.dumps(figures, indent=1))
    print(table_text(figures))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
