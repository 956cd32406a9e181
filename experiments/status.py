"""Show how a run stands, from its files alone: python experiments/status.py --run RUN"""

import sys

from scaling.cli import command_parser, parse_without_settings, run_command


def main() -> int:
    parser = command_parser(__doc__, "run")
    arguments = parse_without_settings(parser)

    from scaling.library.run_folder import RunFolder
    from scaling.library.status import status_text

    print(status_text(RunFolder(arguments.run)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
