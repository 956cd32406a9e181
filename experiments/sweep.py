"""Run the trials of a space, several at a time: python experiments/sweep.py --space FILE --run RUN [--store STORE]

The sweep ends with a table and the Pareto fronts of PSNR against seconds and bytes a scene: RUN/sweep.json and
RUN/pictures/pareto.png. The same command again continues a stopped sweep; trials that are done are not run again.
experiments/sweeps/ has ready-made spaces. Flags override a space's settings; a key that it varies cannot be a flag.
"""

import argparse
import sys
from pathlib import Path

from scaling.cli import Parser, command_parser, local_file, parse_settings, run_command


def add_flags() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "run", "store", "address", "gpus")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--space", type=local_file, required=True, help="YAML file that says what trials vary, and how")
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that failed")
    return parser


def named_space() -> Path | None:
    """The file that --space names, read before the other flags: their defaults for preset and run folder depend on
    it."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--space", type=local_file)
    return first.parse_known_args()[0].space


def main() -> int:
    parser = add_flags()
    if path := named_space():
        from scaling.distributed.sweep.space import read_space

        parser.set_defaults(preset=read_space(path).preset, run=Path("runs") / f"sweep-{path.stem}")
    arguments, _ = parse_settings(parser)
    from scaling.distributed.cluster import connect
    from scaling.distributed.sweep.driver import run_sweep
    from scaling.distributed.sweep.results import sweep_table
    from scaling.distributed.sweep.space import Plan, read_space
    from scaling.distributed.tracking import ui_command
    from scaling.library.run_folder import RunFolder

    space = read_space(arguments.space)
    run = RunFolder(arguments.run)
    plan = Plan(space, arguments.preset, arguments.given)
    result = run_sweep(run, plan, arguments.store, connect(arguments.address, arguments.gpus), arguments.retry_failed)
    print(sweep_table(result))
    for cost, trials in result["pareto"].items():
        print(f"Pareto front of PSNR against {cost.replace('_', ' ')}: {', '.join(trials)}")
    print(f"figures: {run.path / 'sweep.json'}   picture: {run.pictures / 'pareto.png'}")
    print(f"curves, pictures and comparisons in a browser: {ui_command(run)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
