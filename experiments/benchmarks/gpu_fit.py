"""Frozen fits of preset sd: scenes a device-hour, where the time goes, and how near that is to the device's limits.

python experiments/benchmarks/gpu_fit.py --json FILE

Needs torch, numpy, diffusers and what `scaling` below `distributed` imports, but neither Ray nor MLflow. On a GPU: 256
scenes, an autoencoder of Stable Diffusion's size. On a CPU, a small form: 4 scenes, a small autoencoder, no bfloat16.
Weights and pictures are random: time does not depend on them, and quality means nothing.

For each row all scenes are fitted with `fit_scenes`, one batch after another, which gives scenes an hour. Then the
parts of one batch are timed alone: encoding, 2a, 2b through the student, and evaluation (rendering and decoding test
views), which scenes an hour do not include. Work is counted in one more step or view of each (see counted.py). Flops
are compared with a large matrix product in the row's precision, bytes with a large copy; both are measured in this run.
All times are wall times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scaling.cli import count, positive_int, run_command
from scaling.config import Settings, make_settings, merge

ON_GPU = {
    "scenes": 256, "scenes_per_batch": [16, 64, 256], "precision": ["float32", "bfloat16"], "autoencoder": "sd",
    "variants": ["eager", "compiled"],
}  # fmt: skip
ON_CPU = {  # not compiled: that takes minutes there and gains nothing
    "scenes": 4, "scenes_per_batch": [2, 4], "precision": ["float32"], "autoencoder": "small", "variants": ["eager"],
}  # fmt: skip
CEILING_SIZES = {"cuda": (8192, 2**30), "cpu": (512, 2**27)}  # side of matrices, bytes copied


def compile_parts(shared: Any) -> None:
    """Compile the parts that take most of a step's time. The number of scenes stays dynamic, because scenes end one by
    one."""
    shared.renderer.compile(dynamic=True)
    if shared.student is not None:
        shared.student.compile()


# Variant → what is done to the shared model before the fits of a row.
VARIANTS: dict[str, Callable[[Any], None]] = {"eager": lambda shared: None, "compiled": compile_parts}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive_int, help="scenes to fit")
    parser.add_argument("--scenes-per-batch", type=positive_int, nargs="+", help="a row for each")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), help="a row for each")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="a row for each")
    parser.add_argument(
        "--autoencoder", choices=("sd", "small"), help="Stable Diffusion's size, or a small one from scratch"
    )
    parser.add_argument("--views", type=positive_int, default=40, help="views of each scene, test views included")
    parser.add_argument("--latent-steps", type=positive_int, help="steps of 2a (default: the preset's)")
    parser.add_argument("--rgb-epochs", type=count, help="epochs of 2b (default: the preset's)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def row_settings(precision: str, arguments: argparse.Namespace) -> Settings:
    """Preset sd in a precision, with the numbers of steps that the flags name."""
    from shared.workload import preset_settings

    settings = preset_settings("sd", precision=precision)
    over: dict[str, Any] = {"latent": {}, "rgb": {}}
    if arguments.latent_steps:
        over["latent"] = {"num_epochs": 1, "steps_per_epoch": arguments.latent_steps}
    if arguments.rgb_epochs is not None:
        over["rgb"] = {"num_epochs": arguments.rgb_epochs}
    return make_settings(merge(settings.model_dump(), {"stage2": over}))


def fit_all(shared: Any, scenes: Sequence[Any], settings: Settings, size: int) -> list[Any]:
    """Fit all scenes in batches of `size`. → results in the order of the scenes."""
    from scaling.training.fit_frozen import fit_scenes

    batches = [scenes[start : start + size] for start in range(0, len(scenes), size)]
    return [fitted for batch in batches for fitted in fit_scenes(shared, batch, settings)]


def part_actions(shared: Any, scenes: Sequence[Any], settings: Settings) -> dict[str, tuple[Callable, int, Callable]]:
    """The parts of one batch, in the order in which they are timed: name → (action to time, number of steps or views in
    it, action of one step or view, whose work is counted)."""
    from scaling.training.evaluate import render_views
    from scaling.training.fit_context import FitContext
    from scaling.training.fit_frozen import run_phase, start_params
    from scaling.training.training_scene import encode_scene, ready_scene

    ready = [ready_scene(shared, views) for views in scenes]
    params = start_params(shared, settings, [scene.scene_id for scene in ready])

    # As in a fit, the phases move the same params one after another.
    def phase(name: str, steps: int | None = None) -> None:
        chosen = getattr(settings.stage2, name)
        if steps:
            chosen = chosen.model_copy(update={"num_epochs": 1, "steps_per_epoch": steps})
        if name == "latent":
            chosen = chosen.model_copy(update={"check_every": None})  # no early stopping: every scene takes all steps
        stage2 = settings.stage2.model_copy(update={name: chosen})
        run_phase(FitContext(shared, settings.model_copy(update={"stage2": stage2})), name, ready, params)

    def encode() -> None:
        for scene in ready:
            encode_scene(shared, scene)

    def evaluate() -> None:
        for row, views in enumerate(scenes):
            test = list(views.test_views)
            render_views(shared, params[row : row + 1], views.cam2world[test], views.intrinsics[test])

    numbers = {
        name: getattr(settings.stage2, name).num_epochs
        * (getattr(settings.stage2, name).steps_per_epoch or ready[0].num_views)
        for name in ("latent", "rgb")
    }
    views = sum(scene.num_views for scene in ready)
    actions: dict[str, tuple[Callable, int, Callable]] = {
        "encode a view": (encode, views, lambda: encode_scene(shared, ready[0])),
        "2a step": (lambda: phase("latent"), numbers["latent"], lambda: phase("latent", 1)),
        "2b step": (lambda: phase("rgb"), numbers["rgb"], lambda: phase("rgb", 1)),
        "evaluate a view": (evaluate, sum(len(scene.test_views) for scene in scenes), evaluate),
    }
    return {name: action for name, action in actions.items() if action[1]}


def counted_of(shared: Any, scenes: Sequence[Any], settings: Settings, name: str, once: Callable) -> Any:
    """The work of one step or view, including the samples of planes. None for evaluation, which is not counted."""
    from shared.counted import Work, sampling_flops
    from shared.counted import count as count_work

    from scaling.training.training_scene import prepare_scene

    if name == "evaluate a view":
        return None
    work = count_work(once)
    if name == "encode a view":
        views = len(scenes[0].train_views)
        return Work(work.flops / views, work.moved / views)
    phase, shape = settings.stage2.latent, settings.representation
    ready = prepare_scene(shared, scenes[0])
    # In a whole view, only the rays that meet something are sampled.
    rays = (
        phase.rays_per_item
        if name == "2a step" and phase.rays_per_item
        else len(ready.drawn.unique()) / ready.num_views
    )
    points = round(len(scenes) * rays * settings.rendering.samples)
    features = shape.micro_features + shape.macro_features
    return Work(work.flops + sampling_flops(points, len(shape.plane_axes), features), work.moved)


def measure_parts(shared: Any, scenes: Sequence[Any], settings: Settings, limits: dict[str, float]) -> dict[str, Any]:
    """Time each part of one batch in ms, and compare its work a second with the limits."""
    from shared.stopwatch import wall_seconds

    found: dict[str, Any] = {}
    for name, (action, number, once) in part_actions(shared, scenes, settings).items():
        seconds = wall_seconds(action, shared.device) / number
        work = counted_of(shared, scenes, settings, name, once)
        found[name] = {"ms": 1000 * seconds, "number": number}
        if work is not None:
            rates = {"flops_per_second": work.flops / seconds, "bytes_per_second": work.moved / seconds}
            share = {"flops_percent": 100 * rates["flops_per_second"] / limits[settings.precision]}
            share["bytes_percent"] = 100 * rates["bytes_per_second"] / limits["copy"]
            found[name] |= {"flops": work.flops, "bytes": work.moved, **rates, **share}
    return found


def measure_row(
    variant: str, precision: str, size: int, scenes: Sequence[Any], arguments: argparse.Namespace, limits: dict
) -> dict[str, Any]:
    """Measure one row: all scenes in batches of `size`, after a short warm-up with a batch of the same size.

    Raises RuntimeError where a scene was not fitted or its planes are not finite.
    """
    import torch
    from shared.sd_size import sd_size_autoencoder
    from shared.stopwatch import wall_seconds
    from shared.workload import untrained_model

    device, settings = arguments.device, row_settings(precision, arguments)
    autoencoder = sd_size_autoencoder(precision) if arguments.autoencoder == "sd" else None
    shared = untrained_model(settings, autoencoder, device)
    VARIANTS[variant](shared)
    few = {"stage2": {name: {"num_epochs": 1, "steps_per_epoch": 2} for name in ("latent", "rgb")}}
    # A batch of the same size goes first, so that compiling and the first allocations are in nobody's time.
    fit_all(shared, scenes[:size], make_settings(merge(settings.model_dump(), few)), size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    fitted: list[Any] = []
    seconds = wall_seconds(lambda: fitted.extend(fit_all(shared, scenes, settings, size)), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    finite = all(bool(scene.params.micro_planes.isfinite().all()) for scene in fitted)
    if len(fitted) != len(scenes) or not finite:
        raise RuntimeError("a scene was not fitted, or its planes are not finite")
    row = {"variant": variant, "precision": precision, "scenes_per_batch": size, "scenes": len(scenes)}
    row |= {"seconds": seconds, "scenes_per_hour": 3600 * len(scenes) / seconds, "gpu_peak_bytes": peak}
    return {**row, "parts": measure_parts(shared, scenes[:size], settings, limits)}


def print_tables(figures: dict[str, Any]) -> None:
    """Print the rows, then the parts of each row, as Markdown."""
    from shared.stopwatch import table_text

    names = ("variant", "precision", "scenes_per_batch")
    rows, parts = [], []
    for row in figures["rows"]:
        head = [row[name] for name in names]
        peak = None if row["gpu_peak_bytes"] is None else row["gpu_peak_bytes"] / 2**30
        rows.append([*head, row["scenes_per_hour"], *(part["ms"] for part in row["parts"].values()), peak])
        for name, part in row["parts"].items():
            rates = [part.get(key) for key in ("flops_per_second", "bytes_per_second")]
            scaled = [None if rate is None else rate / 1e9 for rate in rates]
            shares = [part.get(key) for key in ("flops_percent", "bytes_percent")]
            parts.append([*head, name, part["ms"], scaled[0], shares[0], scaled[1], shares[1]])
    columns = [f"{name}, ms" for name in figures["rows"][0]["parts"]]
    print(f"\n{figures['device']}, {figures['scenes']} scenes of {figures['views']} views, "
          f"autoencoder: {figures['autoencoder']}\n")  # fmt: skip
    print(table_text([*names, "scenes/hour", *columns, "GPU peak, GiB"], rows))
    print()
    print(table_text([*names, "part", "ms", "GFLOP/s", "% of matmul", "GB/s", "% of copy"], parts))
    limits = figures["ceilings"]
    shown = ", ".join(f"{name} {limits[name] / 1e9:,.0f} GFLOP/s" for name in ("float32", "bfloat16"))
    print(f"\nmeasured limits: {shown}, copy {limits['copy'] / 1e9:,.1f} GB/s")


def main() -> int:
    arguments = make_parser().parse_args()
    import torch
    from shared.counted import ceilings
    from shared.workload import preset_settings, random_scenes

    arguments.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = arguments.device.type == "cuda"
    for name, value in (ON_GPU if gpu else ON_CPU).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if not gpu:
        if "bfloat16" in arguments.precision:
            raise ValueError("--precision bfloat16: needs a GPU, because a CPU computes in float32 only")
        torch.set_num_threads(1)
        print("on a CPU, in small form: this shows that the benchmark runs, not how fast a GPU is", flush=True)
    limits = ceilings(arguments.device, *CEILING_SIZES[arguments.device.type])
    scenes = random_scenes(arguments.scenes, preset_settings("sd"), arguments.views)
    name = torch.cuda.get_device_name(arguments.device) if gpu else "one CPU thread"
    figures: dict[str, Any] = {"device": name, "scenes": arguments.scenes, "views": arguments.views}
    figures |= {"autoencoder": arguments.autoencoder, "torch": torch.__version__, "ceilings": limits, "rows": []}
    for variant in arguments.variants:
        for precision in arguments.precision:
            for size in sorted({min(size, len(scenes)) for size in arguments.scenes_per_batch}):
                figures["rows"].append(measure_row(variant, precision, size, scenes, arguments, limits))
                arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
                print(f"  {variant}, {precision}, {size} scenes a batch: done", flush=True)
    print_tables(figures)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
