"""All that a GPU has to show of this project, in ten minutes, without Ray, MLflow and downloads.

python experiments/benchmarks/gpu_run.py --out FOLDER

1. checks: 2a by CUDA graphs, compiled, and in bfloat16, each against the plain steps;
2. sweep: scenes a second for several numbers of scenes in a batch;
3. parts: ms of each part of a fit, what it reaches of the measured limits (FLOP/s of a large product, bytes/s of a
   large copy), and a profile of some steps (OUT/trace.json, for chrome://tracing);
4. run: stage 1 on 500 embedded cars at 128² for three minutes, stage 2 on as many cars as fit into two, PSNR, scenes a
   GPU-hour, and a picture (OUT/cars.png).

Each part prints its figures and writes OUT/gpu_run.json as it ends, so a run that is cut off still tells. Drawing the
cars takes a minute or two of 16 cores. --small is the form for a CPU: it shows that the benchmark runs, no more.
Preset compact; 1 to 3 in float32, but for the check of bfloat16; 4 as users run it, with the field in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling.cli import positive_int, run_command
from scaling.storage.own_folder import new_folder

PARTS = ("checks", "sweep", "parts", "run")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is measured, new or empty")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--stage1-scenes", type=positive_int, default=500)
    parser.add_argument("--stage2-scenes", type=positive_int, default=1000, help="cars drawn for stage 2")
    parser.add_argument("--small", action="store_true", help="a few small cars, a few seconds; on a CPU if need be")
    return parser


def plan_of(arguments: argparse.Namespace) -> Any:
    """The plan of a run. Raises ValueError where there is no GPU, unless --small is given."""
    import torch
    from gpu_parts.workload import Plan

    gpu = torch.cuda.is_available()
    if not gpu and not arguments.small:
        raise ValueError("torch sees no GPU: --small runs a small form on the CPU, which shows that it works, no more")
    device, out = torch.device("cuda" if gpu else "cpu"), arguments.out.absolute()
    if arguments.small:
        return Plan(device, out, 32, 8, 4, 6, (2, 4), 2.0, 5.0, steps=10, processes=1)
    processes = len(os.sched_getaffinity(0))
    numbers = (arguments.stage1_scenes, arguments.stage2_scenes)
    return Plan(device, out, 128, 24, *numbers, (16, 64, 256), 180.0, 120.0, steps=None, processes=processes)


class Benchmark:
    """The parts, on scenes and a model that the first three share."""

    def __init__(self, plan: Any) -> None:
        from gpu_parts.workload import FEW_STEPS, cars, train

        from scaling.training.training_scene import ready_scene

        self.plan = plan
        some = cars(plan, 4)
        self.shared, _ = train(plan.settings({**FEW_STEPS, "precision": "float32"}), some, plan.device)
        self.views = some
        self.ready = [ready_scene(self.shared, views) for views in some]

    def checks(self) -> list[dict[str, Any]]:
        """See gpu_parts/checks.py."""
        from gpu_parts.checks import check_all

        return check_all(self.shared, self.ready)

    def sweep(self) -> list[dict[str, Any]]:
        """Scenes a second of 2a, after one batch that is not counted; what does not fit memory says so."""
        import copy

        import torch
        from shared.stopwatch import wall_seconds

        from scaling.training.fit_frozen import fit_ready

        rows: list[dict[str, Any]] = []
        for size in self.plan.scenes_per_batch:
            scenes = [copy.copy(self.ready[index % len(self.ready)]) for index in range(size)]
            try:
                fit_ready(self.shared, scenes[:1], self.shared.settings)
                seconds = wall_seconds(lambda: fit_ready(self.shared, scenes, self.shared.settings), self.plan.device)  # noqa: B023
            except torch.OutOfMemoryError:
                rows.append({"scenes_per_batch": size, "scenes_per_second": None})
                continue
            rows.append({"scenes_per_batch": size, "scenes_per_second": size / seconds})
        return rows

    def parts(self) -> list[dict[str, Any]]:
        """ms of each part of a batch, and its work a second beside the device's limits."""
        from gpu_fit import CEILING_SIZES, measure_parts
        from shared.counted import ceilings

        limits = ceilings(self.plan.device, *CEILING_SIZES[self.plan.device.type])
        found = measure_parts(self.shared, self.views, self.shared.settings, limits)
        self.profile()
        rows = [{"part": name, **part} for name, part in found.items()]
        return [*rows, *({"part": f"limit: {name}", "per_second": value} for name, value in limits.items())]

    def profile(self) -> None:
        """Print what takes most of some steps, and write their trace."""
        from gpu_parts.checks import losses_of
        from torch.profiler import ProfilerActivity, profile

        from scaling.training.steps.autograd_fit import AutogradFit

        gpu = [ProfilerActivity.CUDA] if self.plan.on_gpu else []
        with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiled:
            losses_of(AutogradFit, self.shared, self.ready)
        order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
        print(profiled.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
        profiled.export_chrome_trace(str(self.plan.out / "trace.json"))

    def run(self) -> list[dict[str, Any]]:
        """See gpu_parts/real_run.py."""
        from gpu_parts.real_run import real_run

        return [real_run(self.plan)]


def main() -> int:
    arguments = make_parser().parse_args()
    plan = plan_of(arguments)
    import torch
    from shared.stopwatch import cpu_model, table_text

    new_folder(plan.out, "benchmark of a GPU")
    torch.set_num_threads(1 if not plan.on_gpu else torch.get_num_threads())
    name = torch.cuda.get_device_name(plan.device) if plan.on_gpu else f"no GPU, one thread of {cpu_model()}"
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "small": arguments.small}
    start, benchmark = time.perf_counter(), Benchmark(plan)
    print(f"{name}, torch {torch.__version__}; ready after {time.perf_counter() - start:.0f} s", flush=True)
    for part in arguments.only:
        measure: Callable[[], list[dict[str, Any]]] = getattr(benchmark, part)
        print(f"\n== {part}", flush=True)
        figures[part] = measure()
        figures["seconds"] = time.perf_counter() - start
        (plan.out / "gpu_run.json").write_text(json.dumps(figures, indent=1) + "\n")
        columns = list(dict.fromkeys(key for row in figures[part] for key in row))
        print(table_text(columns, [[row.get(key) for key in columns] for row in figures[part]]), flush=True)
        print(f"({figures['seconds']:.0f} s so far)", flush=True)
    return 0 if all(row["ok"] for row in figures.get("checks", [])) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
