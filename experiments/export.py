"""Export fitted scenes: python experiments/export.py --run RUN --what planes|mesh|views --out DIR

planes: tri-planes as a data set to train generative models on, 2 * 3 * F * K * K bytes a scene (float16; 256 kB with
preset default, 786 kB with paper). mesh: a coloured surface of each scene, 1 to 2 MB. views: images and cameras in
nerfstudio's layout. The same command again continues an export that was stopped.
"""

import argparse
import sys

from scaling.cli import (
    address,
    command_parser,
    disk_folder,
    local_file,
    parse_without_settings,
    positive_int,
    run_command,
)

# flag → what it is for
FLAGS = {"num_views": "views", "path": "views", "format": "mesh", "points": "mesh"}


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "run")
    parser.add_argument("--what", choices=("planes", "mesh", "views"), required=True, help="what to export")
    parser.add_argument("--out", type=disk_folder, required=True, metavar="DIR", help="folder to write to, on a disk")
    parser.add_argument(
        "--scenes", type=local_file, metavar="FILE", help="file of scene ids, one a line (default: all)"
    )
    parser.add_argument("--num-views", type=positive_int, metavar="N", help="views: number per scene (default: 48)")
    parser.add_argument(
        "--path", choices=("sphere", "ring"),
        help="views: sphere: over all elevations that scenes were seen from; ring: one turn (default: sphere)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("glb", "ply"), help="mesh: GLB for viewers, y up, or PLY, z up (default: glb)"
    )
    parser.add_argument(
        "--points", type=positive_int, metavar="N",
        help="mesh: densities along the longest side of the box; memory and time grow with its cube (default: 128)",
    )  # fmt: skip
    parser.add_argument(
        "--store", type=address,
        help="mesh, views: scene store whose cameras are taken (default: the viewpoints that the run notes)",
    )  # fmt: skip
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parse_without_settings(parser)
    for flag, what in FLAGS.items():
        if getattr(arguments, flag) is not None and arguments.what != what:
            parser.error(f"--{flag.replace('_', '-')} is for --what {what}")
    if arguments.store and arguments.what == "planes":
        parser.error("--store is for --what mesh and --what views: planes need no cameras")

    from scaling.library.run_folder import RunFolder

    run, out, scenes = RunFolder(arguments.run), arguments.out, arguments.scenes
    if arguments.what == "planes":
        from scaling.export.planes import export_planes

        index = export_planes(run, out, scenes)
        print(f"{out}: {index.num_scenes} scenes in {len(index.shards)} shards")
        if len(index.models) > 1:
            print(f"the planes belong to {len(index.models)} different fields (see index.json): train on those of one")
    elif arguments.what == "mesh":
        from scaling.export.meshes import NUM_POINTS, export_meshes
        from scaling.storage.text import shown

        form, points = arguments.format or "glb", arguments.points or NUM_POINTS
        made, without = export_meshes(run, out, scenes, form, points, arguments.store)
        print(f"{out}: {made} meshes")
        for scene_id, reason in without.items():
            print(f"scene {scene_id} has none: {shown(reason)}")
    else:
        from scaling.export.views import NUM_VIEWS, export_views

        path, num_views = arguments.path or "sphere", arguments.num_views or NUM_VIEWS
        made = export_views(run, out, scenes, path, num_views, arguments.store)
        print(f"{out}: views of {made} scenes")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
