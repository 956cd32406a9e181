"""Fit every further scene on top of a shared model: python experiments/stage2.py --store STORE --num-scenes 5000"""

import argparse
import sys

from scaling.cli import command_parser, count, location, parse_settings, positive_int, run_command


def add_flags() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "run", "store", "num-scenes", "address", "gpus")
    parser.add_argument("--skip-scenes", type=count, default=0, help="scenes to skip after those of stage 1")
    parser.add_argument("--shared", type=location, help="folder of the shared model (default: RUN/shared)")
    parser.add_argument("--num-actors", type=positive_int, help="actors (default: one per GPU, else one per CPU core)")
    parser.add_argument("--mode", choices=("frozen", "cohort"), help="default: the setting stage2.mode")
    parser.add_argument("--cohort-size", type=positive_int, help="default: the setting stage2.cohort_size")
    parser.add_argument("--retry-failed", action="store_true", help="try scenes again that were given up")
    parser.add_argument(
        "--lpips-weights", type=location, metavar="FILE",
        help="safetensors of LPIPS over VGG16: this process measures LPIPS when all scenes are fitted",
    )  # fmt: skip
    return parser


def main() -> int:
    parser = add_flags()
    arguments, settings = parse_settings(parser)
    from scaling.config import with_stage2
    from scaling.data.choose_scenes import choose_ids
    from scaling.data.stores import SourceSpec
    from scaling.distributed.cluster import connect
    from scaling.distributed.stage2.driver import Stage2Job, fit_stage2
    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import failures_text, table_text
    from scaling.models.shared_files import read_scene_ids, settings_on

    run = RunFolder(arguments.run)
    shared = arguments.shared or run.shared
    # All settings but stage 2's and the seed come from the shared model; a flag that contradicts them is an error.
    settings = settings_on(shared, with_stage2(settings, arguments.mode, arguments.cohort_size), arguments.given)
    spec = SourceSpec.of(arguments.store, settings.data)
    trained = read_scene_ids(shared)
    ids = choose_ids(
        spec.open(), arguments.scenes, trained, arguments.skip_scenes, arguments.num_scenes, split=arguments.split
    )
    if len(ids) < arguments.num_scenes:
        print(f"warning: only {len(ids)} scenes are left to fit; --num-scenes asked for {arguments.num_scenes}")
    cluster = connect(arguments.address, arguments.gpus)
    job = Stage2Job(
        run, settings, spec, ids, cluster, arguments.preset, shared_folder=shared, num_actors=arguments.num_actors,
        retry_failed=arguments.retry_failed, lpips_weights=arguments.lpips_weights,
    )  # fmt: skip
    metrics = fit_stage2(job)
    print(table_text(metrics))
    if metrics["num_failed"]:
        print(failures_text(run))
    print(f"metrics: {run.metrics}   pictures: {run.pictures}   failures: {metrics['num_failed']} ({run.failures})")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
