"""Stage 1 under faults: what a killed worker, a lost node, a new node and a torn checkpoint cost, and what they change.

python experiments/benchmarks/stage1_faults.py --json FILE [--out DIR]

1. starts a Ray cluster of two nodes on this machine, with one worker each;
2. runs stage 1 of a tiny model on embedded cars undisturbed: the reference;
3. runs it again and, one after the other: kills a worker; takes a node away; adds one; kills the driver, tears its
   newest checkpoint, leaves a half-written one beside it, and starts the same command again;
4. prints what each fault cost, and how far the final model is from the reference. "Epochs repeated" may be -1, when an
   epoch's checkpoint was complete but its report had not been printed yet.

Needs Linux or macOS, but no GPU. Takes about ten minutes on two CPU cores.
"""

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling.cli import run_command
from scaling.storage.own_folder import new_folder

STAGE1 = Path(__file__).resolve().parent.parent / "stage1.py"
NUM_SCENES = 8
SETTINGS = {
    "data.image_size": 64,
    "data.embedded_views": 12,
    "autoencoder.kind": "kl",  # so that every phase has something to train
    "autoencoder.block_out_channels": "[8, 32]",
    "autoencoder.norm_num_groups": 8,
    "stage1.autoencoder.lr.encoder": 2e-3,
    "stage1.autoencoder.num_epochs": 4,
    "stage1.autoencoder.steps_per_epoch": 40,
    "stage1.warmup.num_epochs": 60,
    "stage1.warmup.steps_per_epoch": 40,
    "stage1.joint.num_epochs": 8,
    "stage1.joint.steps_per_epoch": 12,
    "stage1.adapt.num_epochs": 2,
    "stage1.adapt.steps_per_epoch": 12,
}
EPOCH = re.compile(r"stage 1: epoch (\d+)/(\d+)")
PATIENCE = 300  # seconds to wait for a line of output


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stage1-faults"), help="run folders, new or empty")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


class Driver:
    """experiments/stage1.py in a process of its own, and the lines that it prints, each with its time."""

    def __init__(self, run: Path, address: str) -> None:
        flags = [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, str(STAGE1), "--preset", "quick", "--run", str(run), "--address", address]
        self.process = subprocess.Popen(
            [*command, "--num-scenes", str(NUM_SCENES), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.coming: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(f"  {line}", end="", flush=True)
            self.coming.put((time.time(), line.strip()))
        self.coming.put(None)

    def until(self, pattern: str) -> tuple[float, re.Match[str]]:
        """Wait for the next line in which the pattern is found. → when it came, and the match.

        Raises RuntimeError where the process ends before, queue.Empty where no line comes for PATIENCE seconds.
        """
        while (item := self.coming.get(timeout=PATIENCE)) is not None:
            self.lines.append(item)
            if found := re.search(pattern, item[1]):
                return item[0], found
        raise RuntimeError(f"stage 1 ended with status {self.process.wait()} before a line with {pattern!r}")

    def epochs(self, more: int) -> None:
        """Wait for `more` further epochs."""
        for _ in range(more):
            self.until(EPOCH.pattern)

    def finish(self) -> None:
        """Wait for the end. Raises RuntimeError where stage 1 failed."""
        while (item := self.coming.get(timeout=PATIENCE)) is not None:
            self.lines.append(item)
        if self.process.wait():
            raise RuntimeError(f"stage 1 ended with status {self.process.returncode}")


def measure(name: str, driver: Driver, fault: Callable[[], Driver | None], back: str) -> dict[str, Any]:
    """Cause the fault, then wait until training goes on and has finished one more epoch. → the row of the table.

    fault: returns the driver that goes on, None for the same one; back: pattern of the line that says at which epoch
    training goes on, with the group `epoch`.
    """
    time.sleep(1)  # so that the fault comes within an epoch
    began = time.time()
    after = fault() or driver
    again, found = after.until(back)
    done, last = next((int(m[1]), at) for at, line in reversed(driver.lines) if (m := EPOCH.search(line)))
    next_epoch, _ = after.until(EPOCH.pattern)
    return {
        "fault": name,
        "seconds_until_new_group": round(again - began, 1),
        "seconds_between_epochs": round(next_epoch - last, 1),
        "epochs_repeated": done + 1 - int(found["epoch"]),
    }


def tear_newest(run: Path) -> None:
    """Cut a file of the newest checkpoint short, and add a newer one as a crash during its upload would leave it."""
    folder = run / "checkpoints" / "stage1"
    newest = max(path for path in folder.iterdir() if path.is_dir())
    torn = newest / "shared.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    orphan = folder / f"{int(newest.name[:5]) + 1:05d}-warmup-orphan"
    orphan.mkdir()
    (orphan / "shared.safetensors").write_bytes(b"half")


def disturbed(run: Path, nodes: Any) -> list[dict[str, Any]]:
    """Run stage 1 with all faults, to its end. → one row for each fault."""
    driver = Driver(run, nodes.address)
    # Between two faults training goes on for some epochs, so that each is measured alone.
    driver.until("worker group of 2 starts at epoch 1")
    driver.epochs(4)
    rows = [
        measure(
            "worker killed", driver, lambda: os.kill(nodes.train_workers()[0], signal.SIGKILL),
            r"group of 2 restarts at epoch (?P<epoch>\d+)",
        )
    ]  # fmt: skip
    driver.epochs(2)
    rows.append(measure("node lost", driver, nodes.lose, r"shrinks to 1 \(of 2\) and goes on at epoch (?P<epoch>\d+)"))
    driver.epochs(2)
    rows.append(measure("node added", driver, nodes.add, r"grows to 2 and goes on at epoch (?P<epoch>\d+)"))
    driver.epochs(2)
    following: list[Driver] = []

    def kill_and_tear() -> Driver:
        driver.process.kill()
        driver.process.wait()
        tear_newest(run)
        following.append(Driver(run, nodes.address))
        return following[0]

    rows.append(measure("driver killed, checkpoint torn", driver, kill_and_tear, r"starts at epoch (?P<epoch>\d+)"))
    following[0].finish()
    return rows


def final(run: Path) -> dict[str, float]:
    """PSNR of the run's scenes in dB, on test and on training views."""
    metrics = json.loads((run / "metrics.json").read_text())["stage1"]
    return {"test_psnr": metrics["test"]["psnr"], "train_psnr": metrics["train"]["psnr"]}


def main() -> int:
    arguments = make_parser().parse_args()
    from fault_parts.fake_nodes import FakeNodes

    new_folder(arguments.out, "faults of stage 1")
    nodes = FakeNodes(2)
    try:
        reference = arguments.out / "undisturbed"
        start = time.time()
        driver = Driver(reference, nodes.address)
        driver.finish()
        seconds = {"undisturbed": round(time.time() - start, 1)}
        start = time.time()
        rows = disturbed(arguments.out / "disturbed", nodes)
        seconds["disturbed"] = round(time.time() - start, 1)
    finally:
        nodes.stop()
    figures = {
        "faults": rows, "seconds": seconds, "settings": SETTINGS,
        "undisturbed": final(reference), "disturbed": final(arguments.out / "disturbed"),
    }  # fmt: skip
    arguments.json.write_text(json.dumps(figures, indent=1))
    print("| fault | s until the new group is up | s from the last epoch before it to the next | epochs repeated |")
    print("|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print({key: figures[key] for key in ("seconds", "undisturbed", "disturbed")})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
