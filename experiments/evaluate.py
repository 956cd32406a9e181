"""Gathers a run's metrics: python experiments/evaluate.py --run RUN writes RUN/metrics.json and RUN/scenes.parquet."""

import sys

from scaling.command_line import command_parser, parse_without_settings, run_command


def main() -> int:
    parser = command_parser(__doc__, "run")
    arguments = parse_without_settings(parser)

    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import summarise, table_text

    run = RunFolder(arguments.run)
    print(table_text(summarise(run)))
    print(f"metrics: {run.metrics}   per scene: {run.path / 'scenes.parquet'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
