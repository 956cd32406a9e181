"""How well two single-thread actors share two cores: real fits by one actor and by two, side by side.

python experiments/benchmarks/actors.py --scenes 32 --json FILE

One and two actors fit the same scenes of a store with preset `quick` (fewer steps), in turn, --rounds times each.
efficiency: seconds of one actor over twice the seconds of two. Time counts from the start of the first batch to the
commit of the last one. It leaves out the start of actors and the drawing of cars: as in a job, scenes are read from a
store. Run this on two idle cores.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from shared.timed import TimedFitter, read_times

from scaling.cli import positive_int, read_preset, run_command
from scaling.config import make_settings, merge
from scaling.models.shared_files import save_shared
from scaling.storage.own_folder import new_folder

STEPS = {"latent": {"steps_per_epoch": 150}}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive_int, default=32, help="scenes of each run; batches hold four")
    parser.add_argument("--rounds", type=positive_int, default=2, help="how often each number of actors has its turn")
    parser.add_argument("--out", type=Path, default=Path("runs/actors"), help="folder of the runs, new or empty")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    from scaling.data.embedded.scenes import embedded_car, embedded_ids
    from scaling.data.store_writer import StoreWriter
    from scaling.data.stores import SourceSpec
    from scaling.distributed.cluster import connect
    from scaling.distributed.stage2.driver import Stage2Job, fit_stage2
    from scaling.library.run_folder import RunFolder
    from scaling.models.shared_model import SharedModel

    out, chosen = arguments.out.absolute(), make_settings(merge(read_preset("quick"), {"stage2": STEPS}))
    new_folder(out, "benchmark of actors")
    times = out / "times"
    times.mkdir(parents=True)
    os.environ["SCALING_TIMES"] = str(times)  # before Ray starts: its workers inherit it
    # An untrained model will do, because only time is measured.
    save_shared(SharedModel(chosen), out / "shared", ["none-of-them"])
    ids = embedded_ids(arguments.scenes)
    with StoreWriter(out / "store", "embedded cars") as writer:
        for scene_id in ids:
            writer.add(embedded_car(scene_id, chosen.data.image_size, chosen.data.embedded_views))
    spec = SourceSpec.of(str(out / "store"), chosen.data)
    cluster = connect()
    # One and two actors take turns, so that what else the machine does meets both.
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(arguments.rounds):
        for actors in (1, 2):
            for old in times.iterdir():
                old.unlink()
            run = RunFolder(out / f"run-{turn}-{actors}")
            job = Stage2Job(
                run, chosen, spec, ids, cluster, shared_folder=out / "shared", num_actors=actors, fitter=TimedFitter
            )
            fit_stage2(job)
            found = read_times(times)
            seconds[actors].append(max(end for _, end, _ in found) - min(start for start, _, _ in found))
            print(f"{actors} actors: {seconds[actors][-1]:.1f} s", flush=True)
    one, two = (sum(values) / len(values) for values in seconds.values())
    figures = {"scenes": arguments.scenes, "seconds_1": one, "seconds_2": two, "efficiency": round(one / (2 * two), 3)}
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(figures)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
