"""Gather a run's metrics into RUN/metrics.json and RUN/scenes.parquet: python experiments/evaluate.py --run RUN"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from scaling.cli import address, command_parser, location, parse_without_settings, run_command

if TYPE_CHECKING:
    from scaling.library.run_folder import RunFolder


def report_faults(run: RunFolder) -> int:
    """Print what is wrong with the run's files. → 1 where anything is, else 0."""
    from scaling.library.verify import verify
    from scaling.storage.text import shown

    num_scenes, faults = verify(run)
    for fault in faults:
        print(f"fault: {shown(fault)}")
    print(f"{num_scenes:,} scenes of {run.library.folder} were read, {len(faults)} faults")
    return 1 if faults else 0


def main() -> int:
    parser = command_parser(__doc__, "run")
    parser.add_argument(
        "--lpips-weights", type=location, metavar="FILE",
        help="safetensors of LPIPS over VGG16: render all test views and measure LPIPS, without a download",
    )  # fmt: skip
    parser.add_argument(
        "--store", type=address, help="scene store of the true views for LPIPS (default: what config.yaml names)"
    )
    parser.add_argument(
        "--verify", action="store_true",
        help="read all parts, shared models and cohorts, compare them with the manifest, and write nothing",
    )  # fmt: skip
    arguments = parse_without_settings(parser)
    if arguments.store and not arguments.lpips_weights:
        parser.error("--store: only LPIPS needs the true views again; name its weights by --lpips-weights")

    from scaling.library.lpips_values import measure_lpips
    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import summarise, table_text

    run = RunFolder(arguments.run)
    if arguments.verify:
        return report_faults(run)
    if arguments.lpips_weights:
        measure_lpips(run, arguments.lpips_weights, arguments.store)
    print(table_text(summarise(run)))
    print(f"metrics: {run.metrics}   per scene: {run.path / 'scenes.parquet'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
