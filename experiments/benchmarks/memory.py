"""How much memory one more scene takes in a frozen fit and in stage 1, with preset sd and a small autoencoder.

python experiments/benchmarks/memory.py --json FILE

Each is run with a small and with a large number of scenes, every run in a process of its own. Bytes a scene are the
difference of the two peaks over the difference of the two numbers. A peak is that of resident memory, and on a GPU also
that of what torch has allocated there. Every phase runs for a single step, because more steps do not raise the peak.
The peak includes the scenes' decoded views, which the caller holds; bytes_of_views says how many bytes those are. Stage
1's figure is a lower bound: both peaks include a step's temporary memory, which scenes may reuse.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from scaling.cli import positive_int, run_command
from scaling.storage.json_yaml import parse_json

NUMBERS = {"fit": (8, 72), "stage1": (32, 96)}
STEPS = {"num_epochs": 1, "steps_per_epoch": 1}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=list(NUMBERS), default=list(NUMBERS), help="default: both")
    parser.add_argument("--scenes", type=positive_int, nargs=2, help="default: 8 and 72 of a fit, 32 and 96 of stage 1")
    parser.add_argument("--views", type=positive_int, default=40, help="views of each scene")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--measure", type=positive_int, help=argparse.SUPPRESS)  # scenes to measure in this process
    return parser


def fit(num_scenes: int, num_views: int, device: Any) -> int:
    """Fit the scenes in one frozen batch. → bytes of their decoded views."""
    from shared.workload import preset_settings, random_scenes, untrained_model

    from scaling.training.fit_frozen import fit_scenes

    settings = preset_settings("sd", stage2={"latent": STEPS, "rgb": STEPS})
    shared = untrained_model(settings, device=device)
    scenes = random_scenes(num_scenes, settings, num_views)
    fit_scenes(shared, scenes, settings)
    return sum(scene.images.nbytes for scene in scenes)


def stage1(num_scenes: int, num_views: int, device: Any) -> int:
    """Run stage 1 on the scenes. → bytes of their decoded views."""
    from shared.workload import everywhere, preset_settings, random_scenes

    from scaling.training.process_group import Workers
    from scaling.training.stage1 import PHASES, Stage1

    steps: dict[str, Any] = {phase: {**STEPS, "items_per_step": 1} for phase in PHASES}
    steps |= {"warmup": STEPS, "num_buckets": 1}
    settings = preset_settings("sd", stage1=steps)
    scenes = random_scenes(num_scenes, settings, num_views)
    ids = [scene.scene_id for scene in scenes]
    Stage1(settings, ids, scenes, Workers(device=device), everywhere()).run(lambda report: None)
    return sum(scene.images.nbytes for scene in scenes)


def measure(what: str, num_scenes: int, num_views: int, device_name: str) -> dict[str, Any]:
    """Run "fit" or "stage1" in this process. → the peaks of its memory."""
    import torch

    torch.set_num_threads(1)
    device = torch.device(device_name)
    bytes_of_views = {"fit": fit, "stage1": stage1}[what](num_scenes, num_views, device)
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "scenes": num_scenes,
        "peak_bytes": peak_bytes(),
        "gpu_peak_bytes": on_gpu,
        "bytes_of_views": bytes_of_views,
    }


def peak_bytes() -> int:
    """Peak of resident memory since this program started. Read from /proc, because getrusage also counts the parent's.

    Raises RuntimeError on other systems than Linux.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux")
    return 1024 * int(found[1])


def call(what: str, num_scenes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a process of its own. → its figures."""
    flags = ["--what", what, "--measure", num_scenes, "--views", arguments.views, "--device", arguments.device]
    command = [sys.executable, __file__, *map(str, flags), "--json", str(arguments.json)]
    subprocess.run(command, check=True)
    return parse_json(arguments.json.read_bytes())


def row(what: str, small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """The row of the table: what one more scene adds. small, large: the figures of the two runs."""
    more = large["scenes"] - small["scenes"]
    found: dict[str, Any] = {"what": what, "scenes": f"{small['scenes']} → {large['scenes']}"}
    for key in ("peak_bytes", "gpu_peak_bytes", "bytes_of_views"):
        known = small[key] is not None
        found[f"{key}_a_scene"] = (large[key] - small[key]) // more if known else None
    found["peak_mb"] = large["peak_bytes"] / 2**20
    return found


def main() -> int:
    arguments = make_parser().parse_args()
    if arguments.measure:
        found = measure(arguments.what[0], arguments.measure, arguments.views, arguments.device)
        arguments.json.write_text(json.dumps(found))
        return 0
    from shared.stopwatch import table_text

    rows, runs = [], {}
    for what in arguments.what:
        small, large = sorted(arguments.scenes or NUMBERS[what])
        if small == large:
            raise ValueError("--scenes: give two different numbers")
        runs[what] = [call(what, number, arguments) for number in (small, large)]
        rows.append(row(what, *runs[what]))
    figures = {"device": arguments.device, "views": arguments.views, "rows": rows, "runs": runs}
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(table_text(list(rows[0]), [list(found.values()) for found in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
