"""A campaign of faults against stage 2: nothing may be lost, stored twice or different.

python experiments/benchmarks/faults.py --scenes 200 --faults 100 --seed 0 --json FILE

1. makes a store of embedded cars, some of them damaged, and a shared model of preset `quick` with few steps;
2. fits all scenes once, in this process, undisturbed;
3. runs the same job on a Ray cluster of three nodes, two of which have a GPU that exists only in Ray's books. Meanwhile
   actors are killed and frozen, nodes vanish and return, fits hang, writes are torn and fail, the driver is killed,
   stopped and paused, and some scenes crash, raise or diverge whenever they are fitted;
4. compares the library with the undisturbed one.

Faults come at random moments. They are spread over the run by the number of scenes that are settled. A driver that ends
is started again with the same command, until one reports that the job is done.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

from fault_parts.campaign_report import compare, print_table
from fault_parts.faulty import AT_COMMIT, AT_FIT

from scaling.cli import positive_int, read_preset, run_command
from scaling.config import Settings, make_settings, merge
from scaling.storage.own_folder import new_folder

POISON = ("crash", "raise", "diverge")
TIMED = {  # kind of fault → how often, relative to the others
    "actor killed": 5, "actor frozen": 1, "node removed": 3, "driver killed": 2, "driver stopped": 1,
    **dict.fromkeys(AT_FIT, 1), **dict.fromkeys(AT_COMMIT, 1), "driver paused": 0.3,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 64, "embedded_views": 12},
    "stage1": {"warmup": {"num_epochs": 1, "steps_per_epoch": 30}, "num_buckets": 4},
    "stage2": {
        "scenes_per_batch": 4, "latent": {"steps_per_epoch": 60, "rays_per_item": 64}, "max_attempts": 4,
        "deadline_seconds": 40.0, "stall_seconds": 12.0,
    },
}  # fmt: skip
TRAIN_SCENES = 8


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive_int, default=200, help="scenes of stage 2")
    parser.add_argument("--faults", type=positive_int, default=100, help="faults to inject, poison scenes included")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged, and of kinds and moments of faults")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="folder of the campaign, new or empty")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--drive", help=argparse.SUPPRESS)  # run as the driver, on the cluster at this address
    return parser


def settings() -> Settings:
    return make_settings(merge(read_preset("quick"), SETTINGS))


class Campaign:
    """The folder and the plan of a campaign.

    injected: faults so far, by kind; timed: the kinds of the faults that come over time, in their order; fixed: number
    of the faults that are scenes. After `prepare`: ids: the scenes of stage 2; poison: what a scene does when it is
    fitted → the scenes that do so; corrupt: scenes whose row in the store is damaged.
    """

    def __init__(self, out: Path, num_scenes: int, num_faults: int, seed: int) -> None:
        self.out = out
        self.random = random.Random(seed)
        self.num_scenes = num_scenes
        self.injected: Counter[str] = Counter()
        self.drivers: list[int] = []  # exit status of each
        fixed = max(4, min(num_faults, num_scenes) // 8)  # faults that are scenes: at least one of each kind
        self.timed = self.random.choices(list(TIMED), list(TIMED.values()), k=max(0, num_faults - fixed))
        self.fixed = fixed

    def prepare(self) -> None:
        """Make the plan, the store, with rows damaged as planned, and the shared model. Raises FileExistsError
        where the campaign's folder is not empty."""
        from scaling.data.embedded.scenes import embedded_car, embedded_ids
        from scaling.data.scene_views import views_from_row
        from scaling.data.store_writer import StoreWriter
        from scaling.data.stores import SourceSpec
        from scaling.models.shared_files import save_shared
        from scaling.training.stage1 import Stage1

        new_folder(self.out, "campaign of faults")
        for name in ("tokens", "taken", "pids", "fits"):
            (self.out / "faults" / name).mkdir(parents=True)
        chosen, ids = settings(), embedded_ids(TRAIN_SCENES + self.num_scenes)
        train, self.ids = ids[:TRAIN_SCENES], ids[TRAIN_SCENES:]
        # Bad scenes are dealt out evenly: a quarter to each kind of POISON, and a quarter gets a damaged row.
        bad = self.random.sample(self.ids, self.fixed)
        self.poison = {kind: bad[index::4] for index, kind in enumerate(POISON)}
        self.corrupt = bad[3::4]
        self.injected.update({f"scene: {kind}": len(found) for kind, found in self.poison.items()})
        self.injected["scene: corrupt row"] = len(self.corrupt)
        (self.out / "faults" / "poison.json").write_text(json.dumps(self.poison))
        size, num_views = chosen.data.image_size, chosen.data.embedded_views
        with StoreWriter(self.out / "store", "embedded cars") as writer:
            for scene_id in ids:
                row = embedded_car(scene_id, size, num_views)
                if scene_id in self.corrupt:  # half of a PNG is missing
                    row["views"][3] = row["views"][3][: len(row["views"][3]) // 2]
                writer.add(row)
        self.spec = SourceSpec.of(str(self.out / "store"), chosen.data)
        views = [views_from_row(row, size) for row in self.spec.open().rows(train)]
        stage1 = Stage1(chosen, train, views)
        stage1.run(lambda report: print(f"  stage 1: {report.epochs_done}/{report.epochs_total}", flush=True))
        save_shared(stage1.shared, self.out / "shared", train)

    def fit_undisturbed(self) -> None:
        """Fit every scene by one fitter, in batches of their order, into OUT/reference."""
        import pyarrow as pa

        from scaling.data.scene_store import SCHEMA
        from scaling.distributed.stage2.actors import FitJob, SceneFitter

        # Nothing is disturbed yet, but this process may compile loops first, which takes longer than a stall may.
        patient = merge(settings().model_dump(), {"stage2": {"stall_seconds": 600.0}})
        job = FitJob(str(self.out / "reference"), str(self.out / "shared"), patient, astuple(self.spec))
        fitter, size = SceneFitter(job), settings().stage2.scenes_per_batch
        schema = SCHEMA.append(pa.field("error", pa.string()))
        for start in range(0, len(self.ids), size):
            rows = [{**row, "error": None} for row in self.spec.open().rows(self.ids[start : start + size])]
            fitter.fit(pa.Table.from_pylist(rows, schema=schema), attempt=1)

    def run(self) -> float:
        """Run the disturbed job, from its first driver to the one that ends with status 0. → seconds."""
        from fault_parts.fake_nodes import FakeNodes

        start, nodes = time.time(), FakeNodes(2)
        try:
            driver = self.start_driver(nodes.address)
            # A fault is due when so many scenes are settled; the last ones leave time for what they cause.
            moments = sorted(self.random.uniform(0, 0.95 * self.num_scenes) for _ in range(len(self.timed)))
            while driver.poll() != 0:
                # A campaign of a dozen scenes is over in seconds.
                time.sleep(self.random.uniform(0.5, 2.5) * min(1.0, self.num_scenes / 100))
                if driver.poll():
                    self.drivers.append(driver.returncode)
                    print(f"  the driver ended with {driver.returncode}", flush=True)
                    driver = self.start_driver(nodes.address)
                elif moments and self.settled() >= moments[0] and self.at_work():
                    moments.pop(0)
                    driver = self.inject(nodes, driver)
        finally:
            nodes.stop()
        self.drivers.append(0)
        return time.time() - start

    def start_driver(self, address: str) -> subprocess.Popen:
        """Start a driver by the command that a user would give again. Its output goes to OUT/driver.log."""
        command = [sys.executable, __file__, "--drive", address, "--out", str(self.out), "--json", os.devnull]
        with (self.out / "driver.log").open("a") as log:
            print(f"== driver {len(self.drivers) + 1}", file=log, flush=True)
            return subprocess.Popen(command, stdout=log, stderr=log)

    def settled(self) -> int:
        """The number of scenes that are fitted or given up."""
        from scaling.library.run_folder import RunFolder

        run = RunFolder(self.out / "run")
        return len(set(run.library.ids()) | set(run.given_up()))

    def at_work(self) -> list[int]:
        """Process ids of the fitters that are alive."""
        alive = [int(path.name) for path in (self.out / "faults" / "pids").iterdir() if _lives(int(path.name))]
        return sorted(alive)

    def inject(self, nodes: Any, driver: subprocess.Popen) -> subprocess.Popen:
        """Inject the next fault. → the driver that is in charge after it."""
        kind = self.timed.pop(0)
        self.injected[kind] += 1
        print(f"  {sum(self.injected.values())}: {kind}  ({self.settled()} scenes settled)", flush=True)
        if kind.startswith("actor"):
            pid = self.random.choice(self.at_work() or [0])
            if pid:
                os.kill(pid, signal.SIGKILL if kind == "actor killed" else signal.SIGSTOP)
        elif kind == "node removed":
            nodes.lose(self.random.randrange(2))
            nodes.add()
        elif kind == "driver killed":
            driver.kill()
        elif kind == "driver stopped":
            driver.terminate()
        elif kind == "driver paused":
            return self.pause(nodes, driver)
        else:  # a fitter takes the token, and does what it says
            (self.out / "faults" / "tokens" / f"{kind}-{self.injected[kind]}").touch()
        return driver

    def pause(self, nodes: Any, driver: subprocess.Popen) -> subprocess.Popen:
        """Pause the driver until a second one has taken over its run; on waking it must end. → the second one."""
        driver.send_signal(signal.SIGSTOP)
        second = self.start_driver(nodes.address)
        time.sleep(45)  # a lease is taken over after 30 s without a renewal
        driver.send_signal(signal.SIGCONT)
        self.drivers.append(driver.wait())
        print(f"  the paused driver ended with {driver.returncode}", flush=True)
        return second


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def drive(address: str, out: Path) -> int:
    """What the driver runs: stage 2 as in experiments/stage2.py, with a fitter that fails on demand."""
    from fault_parts.faulty import FaultyFitter

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.stores import SourceSpec
    from scaling.distributed.cluster import connect
    from scaling.distributed.stage2.driver import Stage2Job, fit_stage2
    from scaling.library.run_folder import RunFolder
    from scaling.models.shared_files import read_scene_ids

    shared, chosen = out / "shared", settings()
    spec = SourceSpec.of(str(out / "store"), chosen.data)
    ids = choose_ids(spec.open(), None, leave_out=read_scene_ids(shared))
    cluster = connect(address)
    run = RunFolder(out / "run")
    # Parts are not joined, because the report compares batches with those of the undisturbed library.
    job = Stage2Job(
        run, chosen, spec, ids, cluster, shared_folder=shared, num_actors=2, fitter=FaultyFitter, join_parts=False
    )
    fit_stage2(job)
    return 0


def main() -> int:
    arguments = make_parser().parse_args()
    out = arguments.out.absolute()
    os.environ["SCALING_FAULTS"] = str(out / "faults")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if arguments.drive:
        return drive(arguments.drive, out)
    campaign = Campaign(out, arguments.scenes, arguments.faults, arguments.seed)
    campaign.prepare()
    campaign.fit_undisturbed()
    seconds = campaign.run()
    figures = compare(campaign, seconds)
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print_table(figures)
    sound = not (figures["lost"] or figures["duplicated"] or figures["differing"] or figures["wrongly_failed"])
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
