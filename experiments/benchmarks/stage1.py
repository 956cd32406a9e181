"""Stage 1, one CPU thread: CPU time until ours reaches the quality of the published 1a, and an epoch over 100 scenes.

python experiments/benchmarks/stage1.py --json FILE [--store STORE --train-scenes FILE]

Ours is preset `sd`. Both train phase 1a on the same scenes and latents, with the schedules and the autoencoder of
fit.py --with-paper (fit_parts/fit.yaml); the autoencoder is kept under --out. Quality is the PSNR of rendered against
encoded latents, on test views of every fourth scene.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling.cli import run_command
from scaling.config import Settings, make_settings, merge

FINE = 6  # measurements in each epoch of ours
EVERY_PAPER = 10  # epochs of the published 1a between two measurements
EVERY_SCENE = 4  # one of so many scenes is measured
EPOCH_SCENES = 100  # embedded cars, for the time of an epoch


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="scene store (default: 32 embedded cars)")
    parser.add_argument("--train-scenes", type=Path, help="ids of the scenes, one a line (default: 32)")
    parser.add_argument("--out", type=Path, default=Path("runs/fit"), help="where fit.py keeps its autoencoder")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def warmup_only(settings: Settings, **schedule: Any) -> Settings:
    """The settings with phase 1a alone. schedule: what overrides its keys."""
    stage1: dict[str, Any] = {phase: {"num_epochs": 0} for phase in ("joint", "adapt", "distil")}
    return make_settings(merge(settings.model_dump(), {"stage1": {**stage1, "warmup": schedule}}))


def quality_curve(settings: Settings, ids: list[str], views: Sequence[Any], every: int) -> Any:
    """Run phase 1a in this process. → a curve with a point after every `every` epochs and at the end. Time includes
    encoding."""
    from shared.measured import Clock, Curve, test_point

    from scaling.training.stage1 import Stage1

    clock, curve = Clock(), Curve()
    stage1 = Stage1(settings, ids, views)
    rows = list(range(0, len(ids), EVERY_SCENE))

    def on_epoch(report: Any) -> None:
        if report.epoch % every and report.epoch != settings.stage1.warmup.num_epochs:
            return
        with clock.stopped():
            params = stage1.table[rows]
            point = test_point(stage1.shared, [views[row] for row in rows], params, report.epoch, clock.seconds)
            curve.points.append(point)
            print(f"  {point}", flush=True)

    stage1.run(on_epoch)
    return curve


def epoch_seconds(settings: Settings) -> dict[str, float]:
    """Measure one epoch of our 1a over embedded cars: its steps, its wall seconds, and the CPU seconds of encoding all
    cars and of the epoch together."""
    from shared.measured import Clock

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.scene_views import views_from_row
    from scaling.data.stores import SourceSpec
    from scaling.training.stage1 import Stage1

    settings = warmup_only(settings, num_epochs=1)
    source = SourceSpec.of(None, settings.data).open()
    ids = choose_ids(source, None, count=EPOCH_SCENES)
    views = [views_from_row(row, settings.data.image_size) for row in source.rows(ids)]
    stage1 = Stage1(settings, ids, views)
    seconds: list[float] = []
    clock = Clock()
    stage1.run(lambda report: seconds.append(report.seconds))
    steps = settings.stage1.warmup.steps_per_epoch or 0
    whole = clock.seconds
    return {"scenes": EPOCH_SCENES, "steps": steps, "wall_seconds": seconds[0], "cpu_seconds_with_encoding": whole}


def main() -> int:
    arguments = make_parser().parse_args()

    import torch
    from fit_parts.paper import autoencoder_folder, method_settings
    from fit_parts.stage1 import Job

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.scene_views import views_from_row
    from scaling.data.stores import SourceSpec

    torch.set_num_threads(1)
    # Both methods get the same scenes and the same autoencoder.
    spec = SourceSpec.of(arguments.store, method_settings("autoencoder", None, arguments.store).data)
    ids = choose_ids(spec.open(), arguments.train_scenes, count=None if arguments.train_scenes else 32)
    autoencoder = autoencoder_folder(Job(arguments.store, ids, [], None, arguments.out))
    paper, ours = (method_settings(method, autoencoder, spec.store) for method in ("paper", "sd"))
    views = [views_from_row(row, ours.data.image_size) for row in spec.open().rows(ids)]
    theirs = quality_curve(warmup_only(paper), ids, views, EVERY_PAPER)
    # Each epoch of ours is cut into FINE short ones, because quality is measured between epochs.
    warmup = ours.stage1.warmup
    steps = (warmup.steps_per_epoch or FINE) // FINE
    mine = quality_curve(warmup_only(ours, num_epochs=warmup.num_epochs * FINE, steps_per_epoch=steps), ids, views, 1)
    reached = mine.seconds_to("latent", theirs.end.latent)
    theirs_reached = theirs.seconds_to("latent", theirs.end.latent) or theirs.end.seconds
    figures = {
        "speedup_1a": None if reached is None else theirs_reached / reached,
        "paper_latent_psnr": theirs.end.latent,
        "paper_seconds": theirs_reached,
        "default_seconds": reached,
        "default_end": asdict(mine.end),
        "epoch": epoch_seconds(ours),
        "scenes": {"source": asdict(spec), "train": ids},
        "curves": {"paper": theirs.plain(), "default": mine.plain()},
    }
    arguments.json.write_text(json.dumps(figures, indent=1))
    print("| figure | value |\n|---|---|")
    for key in ("speedup_1a", "paper_latent_psnr", "paper_seconds", "default_seconds"):
        print(f"| {key} | {'null' if figures[key] is None else format(figures[key], ',.2f')} |")
    print(f"| epoch over {EPOCH_SCENES} scenes, wall s | {figures['epoch']['wall_seconds']:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
