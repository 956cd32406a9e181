"""A step of preset default taken apart, one CPU thread: where its time goes, and how it grows.

python experiments/benchmarks/step.py --json FILE

layouts: ways to keep and to sample planes, side by side at the sizes of a 2a step, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scaling.command_line import positive_int, read_preset, run_command
from scaling.config import Settings, make_settings

LAYOUT_SIZES = ((8, 32, 24), (64, 32, 24), (8, 20, 12), (64, 20, 12))  # scenes, K, samples a ray


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="default", help="settings of the steps")
    parser.add_argument("--repeats", type=positive_int, default=10, help="times that each thing is done")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def layout_rows(settings: Settings, repeats: int) -> list[dict[str, Any]]:
    """Every way at every size."""
    import torch
    from plane_layouts import compare_layouts

    shape, rows = settings.representation, []
    for scenes, size, samples in LAYOUT_SIZES:
        at = {"plane_axes": tuple(shape.plane_axes), "box_side": shape.box_side, "size": size}
        points = (settings.stage2.latent.rays_per_item or 64) * samples
        features = shape.micro_features + shape.macro_features
        found = compare_layouts(scenes, points, features, at, repeats, torch.device("cpu"))
        rows += [{"scenes": scenes, "K": size, "samples": samples, "way": way, **row} for way, row in found.items()]
    return rows


def main() -> int:
    arguments = make_parser().parse_args()
    import torch
    from stopwatch import table_text

    torch.set_num_threads(1)
    settings = make_settings(read_preset(arguments.preset))
    figures = {"layouts": layout_rows(settings, arguments.repeats)}
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    columns = ("scenes", "K", "samples", "way", "layout", "forward_ms", "both_ms", "speed")
    print(table_text(columns, [[row[key] for key in columns] for row in figures["layouts"]]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
