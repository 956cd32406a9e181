"""Renders a fitted scene: python experiments/render.py --run RUN --scene ID writes turntables and a contact sheet."""

import sys
from pathlib import Path

from scaling.command_line import positive_int, run_command, simple_parser


def main() -> int:
    parser = simple_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--scene", action="append", required=True, help="id of a fitted scene (may be repeated)")
    parser.add_argument("--frames", type=positive_int, default=48, help="frames of a turntable")
    arguments = parser.parse_args()

    from scaling.library.pictures import render_stored_scenes
    from scaling.library.run_folder import RunFolder

    for path in render_stored_scenes(RunFolder(arguments.run), arguments.scene, arguments.frames):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
