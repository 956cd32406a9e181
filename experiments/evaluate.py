"""Gathers a run's metrics: python experiments/evaluate.py --run RUN writes RUN/metrics.json and RUN/scenes.parquet."""

import sys
from pathlib import Path

from scaling.command_line import run_command, simple_parser


def main() -> int:
    parser = simple_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    arguments = parser.parse_args()

    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import summarise, table_text

    run = RunFolder(arguments.run)
    print(table_text(summarise(run)))
    print(f"metrics: {run.metrics}   per scene: {run.path / 'scenes.parquet'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
