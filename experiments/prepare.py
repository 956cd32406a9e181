"""Reads posed images into a scene store: python experiments/prepare.py --source DIR --store STORE"""

import sys

from scaling.command_line import command_parser, parse_without_settings, run_command


def main() -> int:
    parser = command_parser(__doc__, "address")
    parser.add_argument("--source", required=True, help="folder of scenes, or a .zip file of one")
    parser.add_argument("--store", required=True, help="scene store to write: a folder or a file-system URI")
    parser.add_argument("--layout", choices=("auto", "srn", "transforms"), default="auto", help="layout of the source")
    parser.add_argument("--category", help="only the scenes of this category")
    parser.add_argument("--latents", action="store_true", help="also cache latents (not built yet)")
    parser.add_argument("--shared", help="shared model whose encoder makes the latents")
    arguments = parse_without_settings(parser)
    if arguments.latents or arguments.shared:
        parser.error("--latents and --shared are not built yet: stage 2 encodes views itself")

    from scaling.distributed.cluster import connect
    from scaling.distributed.prepare import prepare

    connect(arguments.address)
    stored, rejected = prepare(arguments.source, arguments.store, arguments.layout, arguments.category)
    print(f"{stored} scenes in {arguments.store}, {rejected} rejected ({arguments.store}/rejects.parquet says why)")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
