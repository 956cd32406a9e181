"""How many scenes and views a second go from a source into a scene store, and back out of it.

python experiments/benchmarks/prepare.py --json FILE

The source is made in a temporary folder: embedded cars in ShapeNet-SRN's layout. A few cars are repeated until there
are --scenes of them. read: this process alone reads and checks the scenes; prepare: what experiments/prepare.py does,
on a local Ray that is up already; rows: rows come out of the store, PNGs as they are; views: PNGs are decoded, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling.cli import positive_int, run_command

DIFFERENT = 4  # cars; the others repeat them


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive_int, default=64, help="scenes of the source")
    parser.add_argument("--views", type=positive_int, default=40, help="views of each scene")
    parser.add_argument("--image-size", type=positive_int, default=128, help="side of a view in pixels")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def write_source(folder: Path, num_scenes: int, num_views: int, image_size: int) -> int:
    """Write scenes in SRN's layout under `folder`. → bytes of the PNGs."""
    import numpy as np

    from scaling.data.embedded.scenes import embedded_car, embedded_ids

    cars = [embedded_car(scene_id, image_size, num_views) for scene_id in embedded_ids(min(DIFFERENT, num_scenes))]
    size = 0
    for number in range(num_scenes):
        car, scene = cars[number % len(cars)], folder / f"scene-{number:05d}"
        for name in ("rgb", "pose"):
            (scene / name).mkdir(parents=True)
        poses = np.asarray(car["cam2world"], dtype=np.float64).reshape(num_views, 16)
        for view, (png, pose) in enumerate(zip(car["views"], poses)):
            (scene / "rgb" / f"{view:06d}.png").write_bytes(png)
            (scene / "pose" / f"{view:06d}.txt").write_text(" ".join(map(repr, pose.tolist())))
            size += len(png)
        focal, centre = np.asarray(car["intrinsics"]).ravel()[0] * image_size, image_size / 2
        text = f"{focal} {centre} {centre} 0.\n0. 0. 0.\n1.\n{image_size} {image_size}\n"
        (scene / "intrinsics.txt").write_text(text)
    return size


def actions(source: Path, store: Path, image_size: int) -> dict[str, Callable[[], Any]]:
    """Name → what is timed, in this order: the later ones read the store that "prepare" writes."""
    from scaling.data.readers.registry import list_scenes, read_scene
    from scaling.data.scene_store import SceneStore
    from scaling.data.scene_views import views_from_row
    from scaling.distributed.prepare import prepare

    return {
        "read": lambda: [read_scene(ref) for ref in list_scenes(source, "srn")],
        "prepare": lambda: prepare(str(source), str(store), "srn"),
        "rows": lambda: list(SceneStore(store).rows()),
        "views": lambda: [views_from_row(row, image_size) for row in SceneStore(store).rows()],
    }


def main() -> int:
    arguments = make_parser().parse_args()
    from shared.stopwatch import table_text, wall_seconds

    from scaling.data.scene_store import SceneStore
    from scaling.distributed.cluster import connect

    scenes, views, rows = arguments.scenes, arguments.views, []
    with tempfile.TemporaryDirectory() as folder:
        source, store = Path(folder) / "source", Path(folder) / "store"
        source_bytes = write_source(source, scenes, views, arguments.image_size)
        connect()
        for name, action in actions(source, store, arguments.image_size).items():
            seconds = wall_seconds(action)
            rates = {"scenes_per_second": scenes / seconds, "views_per_second": scenes * views / seconds}
            rows.append({"what": name, "seconds": seconds, **rates})
        stored = len(SceneStore(store))
        store_bytes = sum(path.stat().st_size for path in store.rglob("*.parquet"))
    if stored != scenes:
        raise RuntimeError(f"{stored} of {scenes} scenes are in the store")
    sizes = {"source_png_bytes": source_bytes, "store_bytes": store_bytes}
    figures = {"scenes": scenes, "views": views, "image_size": arguments.image_size, **sizes, "rows": rows}
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(table_text(list(rows[0]), [list(row.values()) for row in rows]))
    print(f"\n{scenes} scenes of {views} views: {source_bytes:,} bytes of PNG, {store_bytes:,} bytes of store")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
