"""A step of preset sd taken apart, on one CPU thread: where its time goes, and how it grows.

python experiments/benchmarks/step.py --json FILE

layouts: ways to lay out and to sample planes, forward and backward, at the sizes of a 2a step;
parts: the parts of a step of 2a, of 2b through the student, and of 2b through the decoder;
scenes: whole steps of stage 2, by the number of scenes in a batch;
store: a step of stage 1's warmup, by the number of scenes in the stage; the batch keeps its size, and Adam moves the
rows of the batch or, as published, all rows.

The autoencoder is a small one from scratch. Times are CPU times, with --device cuda wall times.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scaling.cli import positive_int, run_command
from scaling.config import Settings, make_settings, merge

TABLES = ("layouts", "parts", "scenes", "store")
LAYOUT_SIZES = ((8, 32, 24), (64, 32, 24), (8, 20, 12), (64, 20, 12))  # scenes, K, samples a ray
EPOCHS = 4  # of warmup; the first one is not counted
STORE_PICTURES = {"data": {"image_size": 32}}  # quick to encode; a step on cached latents never sees them


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="sd", help="settings of the steps")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    parser.add_argument("--batch", type=positive_int, default=16, help="scenes in a batch whose step is taken apart")
    parser.add_argument("--scenes", type=positive_int, nargs="+", default=[1, 4, 16, 64], help="scenes in a batch")
    parser.add_argument("--store", type=positive_int, nargs="+", default=[32, 256, 1024], help="scenes of stage 1")
    parser.add_argument("--views", type=positive_int, help="views of a scene (default: as an embedded car has)")
    parser.add_argument("--repeats", type=positive_int, default=10, help="how often each thing is measured")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def layout_rows(settings: Settings, batch: list[int], repeats: int, device: Any) -> list[dict[str, Any]]:
    """Rows of every way to sample planes, at every size up to the largest batch that was asked for."""
    from step_parts.plane_layouts import compare_layouts

    shape, rows = settings.representation, []
    for scenes, size, samples in LAYOUT_SIZES:
        if scenes > max(*batch, LAYOUT_SIZES[0][0]):
            continue
        at = {"plane_axes": tuple(shape.plane_axes), "size": size}
        points = (settings.stage2.latent.rays_per_item or 64) * samples
        features = shape.micro_features + shape.macro_features
        found = compare_layouts(scenes, points, features, at, repeats, device)
        rows += [{"scenes": scenes, "K": size, "samples": samples, "way": way, **row} for way, row in found.items()]
    return rows


def kinds(shared: Any) -> dict[str, tuple[str, Any]]:
    """The kinds of steps of stage 2: kind → (name of the phase, its settings)."""
    latent, rgb = shared.settings.stage2.latent, shared.settings.stage2.rgb
    through = {f"2b, {name}": ("rgb", rgb.model_copy(update={"through": name})) for name in ("student", "decoder")}
    return {"2a": ("latent", latent), **through}


def parts_rows(shared: Any, ready: list[Any], repeats: int) -> list[dict[str, Any]]:
    """ms and share of each part of each kind of step."""
    from step_parts.parts import latent_parts, rgb_parts

    rows: list[dict[str, Any]] = []
    for kind, (name, phase) in kinds(shared).items():
        parts = (latent_parts if name == "latent" else rgb_parts)(shared, phase, ready, repeats)
        total = sum(parts.values())
        found = {**parts, "all parts": total}
        rows += [
            {"step": kind, "scenes": len(ready), "part": part, "ms": ms, "percent": 100 * ms / total}
            for part, ms in found.items()
        ]
    return rows


def scenes_rows(shared: Any, ready: list[Any], numbers: list[int], largest: int, repeats: int) -> list[dict[str, Any]]:
    """ms of whole steps, and ms per scene. Steps through the decoder take long, so they are measured only up to
    `largest` scenes."""
    from step_parts.parts import whole_step

    rows: list[dict[str, Any]] = []
    for scenes in numbers:
        for kind, (name, phase) in kinds(shared).items():
            if kind == "2b, decoder" and scenes > largest:
                continue
            ms = whole_step(shared, name, phase, ready[:scenes], repeats)
            rows.append({"step": kind, "scenes": scenes, "ms": ms, "ms_per_scene": ms / scenes})
    return rows


def store_rows(settings: Settings, numbers: list[int], repeats: int, device: Any) -> list[dict[str, Any]]:
    """ms of a step of stage 1's warmup, with Adam on the rows of the batch and on all rows."""
    steps = -(-repeats // 3)
    return [
        {
            "scenes": scenes, "batch": settings.stage1.warmup.items_per_step,
            "rows_ms": warmup_ms(settings, scenes, False, steps, device),
            "dense_ms": warmup_ms(settings, scenes, True, steps, device),
        }
        for scenes in numbers
    ]  # fmt: skip


def warmup_ms(settings: Settings, num_scenes: int, dense: bool, steps: int, device: Any) -> float:
    """ms of one step of warmup, the mean over all epochs but the first. steps: in an epoch."""
    from shared.stopwatch import now
    from shared.workload import everywhere, random_scenes

    from scaling.training.process_group import Workers
    from scaling.training.stage1 import Stage1

    # Only warmup counts: the other phases are left out, and the autoencoder takes a single step.
    still: dict[str, Any] = {phase: {"num_epochs": 0} for phase in ("joint", "adapt", "distil")}
    still["autoencoder"] = {"num_epochs": 1, "steps_per_epoch": 1, "items_per_step": settings.stage1.num_buckets}
    warmup = {"num_epochs": EPOCHS, "steps_per_epoch": steps}
    over = {**STORE_PICTURES, "stage1": {**still, "warmup": warmup, "dense_adam": dense}}
    settings = make_settings(merge(settings.model_dump(), over))
    views = random_scenes(num_scenes, settings, num_views=2)
    times: list[float] = []
    stage1 = Stage1(settings, [view.scene_id for view in views], views, Workers(device=device), everywhere())
    stage1.run(lambda report: times.append(now(device)) if report.phase == "warmup" else None)
    return 1000 * (times[-1] - times[0]) / ((EPOCHS - 1) * steps)


def main() -> int:
    arguments = make_parser().parse_args()
    import torch
    from shared.stopwatch import table_text
    from shared.workload import preset_settings, ready_scenes, untrained_model

    torch.set_num_threads(1)
    device, repeats = torch.device(arguments.device), arguments.repeats
    settings = preset_settings(arguments.preset)
    shared = untrained_model(settings, device=device)
    batch, numbers = arguments.batch, arguments.scenes
    ready = ready_scenes(shared, max(batch, *numbers), arguments.views)
    make = {
        "layouts": lambda: layout_rows(settings, numbers, repeats, device),
        "parts": lambda: parts_rows(shared, ready[:batch], repeats),
        "scenes": lambda: scenes_rows(shared, ready, numbers, batch, repeats),
        "store": lambda: store_rows(settings, arguments.store, repeats, device),
    }
    figures: dict[str, Any] = {"preset": arguments.preset, "device": arguments.device}
    for name in arguments.tables:
        rows = figures[name] = make[name]()
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"\n{name}\n\n{table_text(list(rows[0]), [list(row.values()) for row in rows])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
