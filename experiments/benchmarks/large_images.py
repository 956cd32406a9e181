"""Images larger than 128² through latents of 64²: `default` beside plain tri-planes of pixels, at equal CPU time.

python experiments/benchmarks/large_images.py --image-size 256 --json FILE

Scenes are embedded cars of 24 views: 16 for stage 1, and 4 others that are fitted. `default` has `autoencoder.shrink`
set to image size / 64. The tri-planes have the field, hulls, samples and rays of `default`, 32 features and 64² texels
a plane, and as many steps as take the same time. Finished stage 1s are kept under --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from scaling.cli import run_command

LATENTS = 64  # a side
TRAIN, FIT, VIEWS = 16, 4, 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, required=True, choices=(128, 256, 512))
    parser.add_argument("--out", type=Path, default=Path("runs/large-images"), help="stage-1 models")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    arguments = parser.parse_args()

    import torch
    from fit_parts.frontier import as_triplanes, method_settings, methods_table, over, run_methods, scenes_table
    from fit_parts.stage1 import Job, train_all
    from shared.stopwatch import cpu_model

    from scaling.data.embedded.scenes import embedded_ids

    torch.set_num_threads(1)
    ids = embedded_ids(TRAIN + FIT)
    size = arguments.image_size
    default = over(
        method_settings("default"),
        data={"image_size": size, "embedded_views": VIEWS},
        autoencoder={"shrink": size // LATENTS},
    )
    methods = {"default": default, "same_field_triplanes": as_triplanes(default)}
    job = Job(None, ids[:TRAIN], ids[TRAIN:], None, arguments.out)
    figures = {"torch": torch.__version__, "cpu": cpu_model(), "image_size": size}
    figures |= run_methods(methods, job, train_all(methods, job), {"same_field_triplanes": "default"})
    figures["gain_db"] = figures["default_psnr"] - figures["same_field_triplanes_psnr"]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(figures, indent=1))
    print(methods_table(figures) + "\n\n" + scenes_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
