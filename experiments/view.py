"""Show a run's fitted scenes in a browser, on this machine only: python experiments/view.py --run RUN"""

import sys

from scaling.cli import address, command_parser, parse_without_settings, port_number, run_command


def main() -> int:
    parser = command_parser(__doc__, "run")
    parser.add_argument(
        "--store", type=address, help="scene store of the true views (default: what the run's config.yaml names)"
    )
    parser.add_argument("--port", type=port_number, default=8080, help="port of 127.0.0.1; 0: any free one [8080]")
    arguments = parse_without_settings(parser)

    from scaling.library.run_folder import RunFolder
    from scaling.viewer.view import view

    view(RunFolder(arguments.run), arguments.store, arguments.port)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
