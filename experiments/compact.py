"""Join the many small parts of a run's library into a few large ones: python experiments/compact.py --run RUN"""

import argparse
import sys

from scaling.cli import command_parser, parse_without_settings, run_command


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "run")
    parser.add_argument(
        "--grace", type=float, default=600.0, metavar="SECONDS",
        help="how long replaced parts are kept for readers; 0 only if nobody reads the library (default: 600)",
    )  # fmt: skip
    return parser


def main() -> int:
    arguments = parse_without_settings(make_parser())

    from scaling.library.compact import compact
    from scaling.library.ledger import open_ledger
    from scaling.library.run_folder import RunFolder

    run = RunFolder(arguments.run)
    run.check_fitted()
    with open_ledger(run) as ledger:
        before, after = compact(ledger, arguments.grace)
        waiting = len(ledger.manifest.replaced)
    print(f"{run.library.folder}: {before} parts became {after}")
    if waiting:
        print(f"{waiting} old parts stay for {arguments.grace:.0f} s for their readers; run this again to remove them")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
