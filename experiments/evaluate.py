"""Gather a run's metrics into RUN/metrics.json and RUN/scenes.parquet: python experiments/evaluate.py --run RUN"""

import sys

from scaling.cli import command_parser, location, parse_without_settings, run_command


def main() -> int:
    parser = command_parser(__doc__, "run")
    parser.add_argument(
        "--lpips-weights", type=location, metavar="FILE",
        help="safetensors of LPIPS over VGG16: render all test views and measure LPIPS, without a download",
    )  # fmt: skip
    parser.add_argument("--store", help="scene store of the true views for LPIPS (default: what config.yaml names)")
    arguments = parse_without_settings(parser)
    if arguments.store and not arguments.lpips_weights:
        parser.error("--store: only LPIPS needs the true views again; name its weights by --lpips-weights")

    from scaling.library.lpips_values import measure_lpips
    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import summarise, table_text

    run = RunFolder(arguments.run)
    if arguments.lpips_weights:
        measure_lpips(run, arguments.lpips_weights, arguments.store)
    print(table_text(summarise(run)))
    print(f"metrics: {run.metrics}   per scene: {run.path / 'scenes.parquet'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
