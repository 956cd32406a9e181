"""Presets side by side on the same scenes, one CPU thread: quality, bytes and CPU time of a scene, and of stage 1.

python experiments/benchmarks/fit.py --json FILE [--store STORE --train-scenes FILE --fit-scenes FILE]

Presets are run as they are in experiments/presets/, except that tri-planes are stored as int8 and get as many steps as
take the CPU time of another preset: `rgb_triplanes` that of `default`, `same_field_triplanes` that of `sharp`. The
latter is no preset: plain tri-planes of pixels, with everything else as in `sharp`. PSNR and SSIM are of test views,
rendered from planes as they are stored. Seconds a scene count from decoded views to packed planes. Fits run one after
another; let nothing run beside them. Finished stage 1s are kept under --out, so the same command continues a call that
was killed.

--with-paper also compares the published method with preset `sd`, which has the same kind of latents (see
fit_parts/paper.py and fit_parts/fit.yaml).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling.cli import run_command
from scaling.config import Data

TRAIN, FIT = 32, 6  # scenes of stage 1 and of stage 2 where no file names them


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help=f"scene store (default: the embedded cars, {TRAIN} and {FIT} of them)")
    parser.add_argument("--train-scenes", type=Path, help="ids of stage 1's scenes, one a line")
    parser.add_argument("--fit-scenes", type=Path, help="ids of stage 2's scenes, one a line")
    parser.add_argument("--presets", type=names, metavar="NAME,NAME", help="presets to run (default: all five)")
    parser.add_argument("--uncarved", metavar="PRESET", help="also fit this one's scenes in the uncarved cuboid")
    parser.add_argument("--with-paper", action="store_true", help="also compare `paper` with `sd`")
    parser.add_argument("--out", type=Path, default=Path("runs/fit"), help="keeps the autoencoder and stage-1 models")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def names(text: str) -> list[str]:
    """argparse type of a list of names, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def make_job(store: str | None, train_scenes: Path | None, fit_scenes: Path | None, out: Path) -> Any:
    """The scenes that all methods get. Where no file names them, the first ones of the store are taken."""
    from fit_parts.stage1 import Job, measured_bounds

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.stores import SourceSpec

    spec = SourceSpec.of(store, Data())
    source = spec.open()
    train = choose_ids(source, train_scenes, count=None if train_scenes else TRAIN)
    fit = choose_ids(source, fit_scenes, leave_out=train, count=None if fit_scenes else FIT)
    return Job(store, train, fit, measured_bounds(spec), out)


def plain(value: Any) -> Any:
    """Points and curves as plain values, for JSON."""
    return asdict(value)


def main() -> int:
    arguments = make_parser().parse_args()

    import torch
    from fit_parts.frontier import (
        METHODS,
        check_methods,
        method_settings,
        methods_table,
        run_methods,
        scenes_table,
        uncarved_differences,
    )
    from fit_parts.stage1 import train_all
    from shared.stopwatch import cpu_model

    # Everything is checked before the first stage 1, which takes minutes.
    methods = list(dict.fromkeys(arguments.presets or METHODS))
    check_methods(methods, arguments.uncarved)
    torch.set_num_threads(1)
    job = make_job(arguments.store, arguments.train_scenes, arguments.fit_scenes, arguments.out)
    settings = {method: method_settings(method) for method in methods}
    folders = train_all(settings, job)
    lists = {"source": asdict(job.spec(settings[methods[0]])), "train": job.train, "fit": job.fit, "bounds": job.bounds}
    figures = {"torch": torch.__version__, "cpu": cpu_model(), "threads": 1, "scene_lists": lists}
    figures |= run_methods(settings, job, folders)
    if arguments.uncarved:
        method = arguments.uncarved
        views = job.views(job.fit, settings[method])
        known = None if settings[method].stage2.latent.check_every else figures["scenes"][method]
        differences = uncarved_differences(settings[method], folders[method], views, known)
        figures |= {"uncarved_preset": method, "uncarved_difference_db": differences}
    write(arguments.json, figures)  # now, because the comparison below takes long
    if arguments.with_paper:
        from fit_parts.figures import row_of, table_text
        from fit_parts.paper import compare

        figures |= compare(job)
        # The presets' rows join those of `paper` and `sd`.
        figures["methods"] |= {method: row_of(figures, method) for method in methods}
        figures |= {method: row for method, row in figures["methods"].items() if method == "rgb_triplanes"}
        if "default" in methods:
            figures["default_minus_paper_db"] = figures["default_psnr"] - figures["methods"]["paper"]["psnr"]
        write(arguments.json, figures)
        print(table_text(figures) + "\n")
    print(methods_table(figures) + "\n\n" + scenes_table(figures))
    return 0


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures as JSON. The file's folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1, default=plain))


if __name__ == "__main__":
    sys.exit(run_command(main))
