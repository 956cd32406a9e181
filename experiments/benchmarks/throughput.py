"""Where the time of a stage-2 job goes, from its command to its exit.

python experiments/benchmarks/throughput.py --scenes 64 --json FILE

For each number of actors, image size and kind of store, a process of its own runs stage 2 on embedded cars, as
experiments/stage2.py does, with a fitter that notes when it does what. Cars are drawn before, and the shared model is
trained for a few steps only, or both are given (--store, --shared): the time of a fit does not depend on how good the
shared model is. Only the first scenes of a job compile loops, so let a small job go first.

Figures of a job: wall_s: from command to exit; fit_share: making scenes ready and moving their parameters, as part of
the actors' busy time; actor_busy: the busy part of the time from the first batch that an actor takes to the last
commit; parts: CPU-ms a scene, what an actor's parts contain of others left out; processes: CPU-seconds of the whole job
by role. `waiting` is wall time of actors. The figures at the top are those of the first job.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from scaling.cli import positive_int, read_preset, run_command
from scaling.config import Settings, make_settings, merge
from scaling.storage.own_folder import new_folder

TRAIN_SCENES = 8
LATENCY = 0.03  # seconds before every answer of the slow store
BUCKET = "throughput"
FEW_STEPS = {"stage1": {"warmup": {"num_epochs": 1, "steps_per_epoch": 20}}}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive_int, default=64)
    parser.add_argument("--preset", default="compact")
    parser.add_argument("--actors", type=positive_int, nargs="+", default=[2], help="numbers of actors")
    parser.add_argument("--image-sizes", type=positive_int, nargs="+", default=[128])
    parser.add_argument("--stores", nargs="+", choices=("local", "s3"), default=["local"], help="s3: of 30 ms latency")
    parser.add_argument("--views", type=positive_int, help="of a car (default: the setting data.embedded_views)")
    parser.add_argument("--steps", type=positive_int, help="of 2a (default: the preset's)")
    parser.add_argument("--store", type=Path, help="a store of cars of the one image size, instead of drawn cars")
    parser.add_argument("--shared", type=Path, help="folder of a shared model for --store")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="folder of the runs, new or empty")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)  # run the job of this file
    return parser


def settings_of(arguments: argparse.Namespace, image_size: int) -> Settings:
    over: dict[str, Any] = {"data": {"image_size": image_size}}
    if arguments.views:
        over["data"]["embedded_views"] = arguments.views
    if arguments.steps:
        over["stage2"] = {"latent": {"steps_per_epoch": arguments.steps}}
    return make_settings(merge(merge(read_preset(arguments.preset), FEW_STEPS), over))


def prepare(folder: Path, chosen: Settings, num_scenes: int) -> tuple[str, str]:
    """Draw cars and train a shared model for a few steps. → its store and its folder."""
    from scaling.data.embedded.scenes import embedded_car, embedded_ids
    from scaling.data.scene_views import views_from_row
    from scaling.data.store_writer import StoreWriter
    from scaling.models.shared_files import save_shared
    from scaling.training.stage1 import Stage1

    ids = embedded_ids(TRAIN_SCENES + num_scenes)
    rows = []
    with StoreWriter(folder / "store", "embedded cars") as writer:
        for scene_id in ids:
            row = embedded_car(scene_id, chosen.data.image_size, chosen.data.embedded_views)
            writer.add(row)
            if len(rows) < TRAIN_SCENES:
                rows.append(row)
    views = [views_from_row(row, chosen.data.image_size) for row in rows]
    stage1 = Stage1(chosen, ids[:TRAIN_SCENES], views)
    stage1.run(lambda report: None)
    save_shared(stage1.shared, folder / "shared", ids[:TRAIN_SCENES])
    return str(folder / "store"), str(folder / "shared")


def measure(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a process of its own. → its figures."""
    from throughput_parts.figures import figures_of
    from throughput_parts.processes import Watch

    (folder / "times").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, __file__, "--drive", str(folder / "job.json"), "--json", os.devnull]
    start = time.time()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "SCALING_TIMES": str(folder / "times")}
        )
        with Watch(process.pid) as watch:
            status = process.wait()
    if status:
        raise RuntimeError(f"the job ended with {status}: see {folder / 'log.txt'}")
    return figures_of(job, start, time.time(), folder / "times", watch.seconds())


def drive(path: Path) -> int:
    """What a job's process runs: stage 2 as in experiments/stage2.py, with a fitter that notes its times."""
    job = json.loads(path.read_text())
    from throughput_parts.clocked import ClockedFitter

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.stores import SourceSpec
    from scaling.distributed.cluster import connect
    from scaling.distributed.stage2.driver import Stage2Job, fit_stage2
    from scaling.library.run_folder import RunFolder
    from scaling.models.shared_files import read_scene_ids
    from scaling.storage.paths import to_path

    chosen, shared = make_settings(job["settings"]), to_path(job["shared"])
    spec = SourceSpec.of(job["store"], chosen.data)
    ids = choose_ids(spec.open(), None, read_scene_ids(shared), 0, job["scenes"])
    run = RunFolder(to_path(job["run"]))
    fit_stage2(
        Stage2Job(
            run, chosen, spec, ids, connect(), shared_folder=shared, num_actors=job["actors"], fitter=ClockedFitter
        )
    )
    return 0


def to_s3(local: str, uri: str) -> str:
    """Copy a folder to an object store. → its address there."""
    from scaling.storage.paths import to_path

    for path in Path(local).rglob("*"):
        if path.is_file():
            target = to_path(uri)
            for step in path.relative_to(local).parts:
                target = target / step
            target.write_bytes(path.read_bytes())
    return uri


def measure_in_s3(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """As `measure`, with store, shared model and run in an S3-compatible server that answers after LATENCY."""
    from scaling.storage.paths import to_path

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ.update(keys, no_proxy="127.0.0.1")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = Path(__file__).parent / "throughput_parts" / "slow_store.py"
    server = subprocess.Popen(
        [sys.executable, script, str(port), str(LATENCY)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&allow_bucket_creation=true&region=us-east-1"
        for _ in range(100):
            try:
                to_path(f"s3://{BUCKET}{options}").filesystem.create_dir(BUCKET)
                break
            except OSError:
                time.sleep(0.1)
        places = {key: to_s3(job[key], f"s3://{BUCKET}/{key}{options}") for key in ("store", "shared")}
        return measure(folder, {**job, **places, "run": f"s3://{BUCKET}/run{options}"})
    finally:
        server.terminate()
        server.wait()


def parts_of_steps(steps: float, chosen: Settings, store: str, shared: str) -> dict[str, float]:
    """What the loops of a step take of the time of all `steps`."""
    from throughput_parts.kernels import shares_of_a_step

    from scaling.data.scene_views import views_from_row
    from scaling.data.stores import SourceSpec
    from scaling.models.shared_files import load_shared, read_scene_ids
    from scaling.storage.paths import to_path

    model, _ = load_shared(to_path(shared))
    source = SourceSpec.of(store, chosen.data).open()
    row = next(iter(source.rows(read_scene_ids(to_path(shared))[:1])))
    shares = shares_of_a_step(model, views_from_row(row, chosen.data.image_size), chosen)
    return {f"steps: {name}": share * steps for name, share in shares.items()}


def main() -> int:
    arguments = make_parser().parse_args()
    if arguments.drive:
        return drive(arguments.drive)
    from shared.stopwatch import cpu_model, table_text

    out = arguments.out.absolute()
    new_folder(out, "benchmark of throughput")
    jobs: list[dict[str, Any]] = []
    places: dict[int, tuple[str, str]] = {}
    for image_size, store, actors in product(arguments.image_sizes, arguments.stores, arguments.actors):
        chosen = settings_of(arguments, image_size)
        if image_size not in places:
            given = arguments.store and (str(arguments.store.absolute()), str(arguments.shared.absolute()))
            places[image_size] = given or prepare(out / str(image_size), chosen, arguments.scenes)
        folder = out / f"{image_size}-{store}-{actors}"
        job: dict[str, Any] = {
            "scenes": arguments.scenes, "actors": actors, "image_size": image_size, "where": store,
            "store": places[image_size][0], "shared": places[image_size][1], "run": str(folder / "run"),
            "settings": chosen.model_dump(),
        }  # fmt: skip
        jobs.append(measure_in_s3(folder, job) if store == "s3" else measure(folder, job))
        jobs[-1]["parts"] |= parts_of_steps(jobs[-1]["parts"]["steps"], chosen, *places[image_size])
        print(f"\n{actors} actors, {image_size}², {store}: {jobs[-1]['wall_s']:.1f} s\n", flush=True)
        print(table_text(("part", "CPU-ms a scene"), list(jobs[-1]["parts"].items())), flush=True)
        print(table_text(("process", "CPU-s"), list(jobs[-1]["processes"].items())), flush=True)
    top = ("scenes", "wall_s", "fit_share", "actor_busy", "scenes_per_hour", "parts")
    figures = {**{key: jobs[0][key] for key in top}, "jobs": jobs, "cpu": cpu_model()}
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(table_text(top[:-1], [[job[key] for key in top[:-1]] for job in jobs]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
