"""Thousands of scenes through the driver, with a fit that does the minimum: speed, overhead, memory, restart.

python experiments/benchmarks/scale.py --scenes 5000 --json FILE

1. makes a store of N + 16 scenes (32 embedded cars, repeated under new names) and an untrained shared model;
2. runs stage 2 over N scenes with two actors on a local Ray. Rows are read, decoded, packed and committed as always,
   but scenes stay where they start. Figures: scenes a second; dispatch_ms, the actors' time per scene outside of
   decoding, packing and committing; the driver's peak RSS; the object store's peak; spilled bytes;
3. runs stage 2 again with all N scenes committed and 16 new ones: seconds from the command to the first new part.

To see how memory grows, compare calls with different N.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from shared.store_use import StoreUse
from shared.timed import MinimalFitter, read_times

from scaling.cli import positive_int, read_preset, run_command
from scaling.config import Settings, make_settings, merge
from scaling.models.shared_files import save_shared
from scaling.storage.own_folder import new_folder

NEW = 16  # scenes of the restart
ACTORS = 2
DIFFERENT = 32  # cars; the others repeat them
SAMPLE_SECONDS = 0.5


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive_int, default=5000, help="scenes to fit")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="folder of all runs, new or empty")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)  # run as the driver, over so many scenes
    return parser


def settings() -> Settings:
    """Preset quick with small images of few views; 16 scenes in a batch."""
    small = {"data": {"image_size": 64, "embedded_views": 8}, "stage2": {"scenes_per_batch": 16}}
    return make_settings(merge(read_preset("quick"), small))


def prepare(out: Path, num_scenes: int) -> None:
    """Make OUT/store and OUT/shared, and an empty OUT/times. Raises FileExistsError where OUT is not empty."""
    from scaling.data.embedded.scenes import embedded_car, embedded_ids
    from scaling.data.store_writer import StoreWriter
    from scaling.models.shared_model import SharedModel

    new_folder(out, "benchmark of scale")
    (out / "times").mkdir(parents=True)
    data = settings().data
    cars = [embedded_car(scene_id, data.image_size, data.embedded_views) for scene_id in embedded_ids(DIFFERENT)]
    with StoreWriter(out / "store", "embedded cars, repeated") as writer:
        for index in range(num_scenes + NEW):
            writer.add({**cars[index % DIFFERENT], "scene_id": f"scene-{index:06d}"})
    save_shared(SharedModel(settings()), out / "shared", ["none-of-them"])


def drive(out: Path, num_scenes: int, figures: Path) -> int:
    """What the driver runs: stage 2 over the first scenes of the store. The driver's own figures go to the file
    `figures`."""
    from scaling.data.stores import SourceSpec
    from scaling.distributed.cluster import connect
    from scaling.distributed.stage2.driver import Stage2Job, fit_stage2
    from scaling.library.run_folder import RunFolder

    spec = SourceSpec.of(str(out / "store"), settings().data)
    ids = [f"scene-{index:06d}" for index in range(num_scenes)]
    cluster = connect()
    use, done = StoreUse(), threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            use.sample()

    # The store's peak is over before the job ends, so it is sampled while the job runs.
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run = RunFolder(out / "run")
        made = Stage2Job(
            run, settings(), spec, ids, cluster, shared_folder=out / "shared", num_actors=ACTORS, fitter=MinimalFitter
        )
        fit_stage2(made)
    finally:
        done.set()
        sampler.join()
    own = {
        "driver_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "driver_cpu_s": round(time.process_time(), 1),
        "object_store_peak_mb": round(use.peak_bytes / 2**20, 1),
        "spilled_bytes": use.spilled_bytes,
    }
    figures.write_text(json.dumps(own))
    return 0


def call_driver(out: Path, num_scenes: int) -> tuple[float, dict[str, Any]]:
    """Run the driver in a process of its own. → the time of the call, the driver's figures."""
    start, figures = time.time(), out / "driver.json"
    command = [sys.executable, __file__, "--drive", str(num_scenes), "--out", str(out), "--json", str(figures)]
    with (out / "driver.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return start, json.loads(figures.read_text())


def main() -> int:
    arguments = make_parser().parse_args()
    out = arguments.out.absolute()
    os.environ["SCALING_TIMES"] = str(out / "times")
    if arguments.drive is not None:
        return drive(out, arguments.drive, arguments.json)
    from scaling.library.run_folder import RunFolder

    prepare(out, arguments.scenes)
    _, own = call_driver(out, arguments.scenes)
    run = RunFolder(out / "run")
    times = read_times(out / "times")
    wall = max(end for _, end, _ in times) - min(start for start, _, _ in times)
    busy = sum(end - start for start, end, _ in times)
    committed = len(run.library.ids())
    parts = {path.name for path in run.library.parts()}
    # The same job with a few more scenes: what is committed is skipped.
    restarted, _ = call_driver(out, arguments.scenes + NEW)
    first_new = min(path.stat().st_mtime for path in run.library.parts() if path.name not in parts)
    figures = {
        "scenes": arguments.scenes,
        "committed": committed,
        "scenes_per_second": round(arguments.scenes / wall, 1),
        "dispatch_ms": round(1000 * (ACTORS * wall - busy) / arguments.scenes, 2),
        "fit_ms": round(1000 * busy / arguments.scenes, 2),
        "driver_cpu_ms": round(1000 * own.pop("driver_cpu_s") / arguments.scenes, 2),
        **own,
        "restart_s": round(first_new - restarted, 1),
    }
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    for key, value in figures.items():
        print(f"{key:24}{value:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
