"""Render turntables and a contact sheet of a fitted scene: python experiments/render.py --run RUN --scene ID"""

import sys

from scaling.cli import address, command_parser, parse_without_settings, positive_int, run_command


def main() -> int:
    parser = command_parser(__doc__, "run")
    parser.add_argument("--scene", action="append", required=True, help="id of a fitted scene (may be repeated)")
    parser.add_argument("--frames", type=positive_int, default=48, help="frames of a turntable")
    parser.add_argument("--store", type=address, help="scene store of the true views (default: the run's own)")
    arguments = parse_without_settings(parser)

    from scaling.library.run_folder import RunFolder
    from scaling.pictures.of_runs import render_stored_scenes

    for path in render_stored_scenes(RunFolder(arguments.run), arguments.scene, arguments.frames, arguments.store):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
