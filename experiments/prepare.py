"""Read posed images into a scene store: python experiments/prepare.py --source DIR --store STORE

--latents --shared DIR also caches the latents that the shared model's encoder makes of all views; stage 2 then reads
them. Without --source, latents are cached for a store that exists.
"""

import argparse
import sys

from scaling.cli import address, command_parser, location, parse_without_settings, run_command
from scaling.data.readers.conventions import AXES, POSES


def add_flags() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "address")
    parser.add_argument("--source", help="folder of scenes, or a .zip file of one")
    parser.add_argument("--store", type=address, required=True, help="scene store to write: folder or file-system URI")
    parser.add_argument("--layout", choices=("auto", "srn", "transforms"), default="auto", help="layout of the source")
    parser.add_argument("--category", help="only the scenes of this category")
    parser.add_argument("--poses", choices=POSES, help="which way the source's matrices map (default: the layout's)")
    parser.add_argument("--axes", choices=tuple(AXES), help="axes of the source's cameras (default: the layout's)")
    parser.add_argument("--follow-links", action="store_true", help="also read links that lead out of the source")
    parser.add_argument("--force", action="store_true", help="write the store although its cameras seem wrong")
    parser.add_argument("--latents", action="store_true", help="also cache the latents of all views, for stage 2")
    parser.add_argument("--shared", type=location, help="folder of the shared model whose encoder makes the latents")
    return parser


def parse() -> argparse.Namespace:
    parser = add_flags()
    arguments = parse_without_settings(parser)
    if arguments.latents != (arguments.shared is not None):
        parser.error("--latents and --shared DIR go together: the shared model in DIR makes the latents")
    if not (arguments.source or arguments.latents):
        parser.error("nothing to do: give --source DIR to write a store, or --latents --shared DIR for one that exists")
    how = arguments.category or arguments.poses or arguments.axes or arguments.follow_links or arguments.force
    if not arguments.source and (how or arguments.layout != "auto"):
        parser.error(
            "--layout, --category, --poses, --axes, --follow-links and --force say how --source is read; latents are "
            "cached of all scenes of a store"
        )
    return arguments


def main() -> int:
    arguments = parse()
    from scaling.distributed.cache_latents import cache_latents, check_encodes
    from scaling.distributed.cluster import connect
    from scaling.distributed.prepare import holds, prepare

    store = arguments.store
    if arguments.latents:
        check_encodes(arguments.shared)  # now, because reading the source takes long
    resources = connect(arguments.address)
    if arguments.latents and arguments.source and holds(store, arguments.source):
        print(f"{store} holds a scene store of {arguments.source} already; it stays as it is")
    elif arguments.source:
        names = ("layout", "category", "poses", "axes", "follow_links")
        how = {name: getattr(arguments, name) for name in names}
        stored, rejected = prepare(arguments.source, store, arguments.force, **how)
        print(f"{stored} scenes in {store}, {rejected} rejected ({store}/rejects.parquet says why)")
    if arguments.latents:
        cache_latents(store, arguments.shared, resources)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
