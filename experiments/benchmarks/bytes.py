"""How many bytes a fitted scene takes on disk: python experiments/benchmarks/bytes.py --json FILE

Libraries of random scenes are committed in parts of 16, then joined as stage 2 joins parts at its end. Bytes count all
files in the library's folder: parts, manifests, lease. Ids are 32 random hexadecimal digits, like those of ShapeNet;
metrics and coefs are random float32. Micro planes have a spectrum of 1/f, like smooth fields, plus Laplacian noise of
scale 0.1.

1. `ulw`: no micro planes, 50 coefs;
2. F_mic = 4, K = --resolution, stored as float16, int8, int4, with the signal-to-noise ratio of the planes read back.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaling.cli import positive_int, run_command
from scaling.library.compact import compact
from scaling.library.ledger import open_ledger
from scaling.library.parts import commit_part, part_name
from scaling.library.row_schema import METRICS
from scaling.library.run_folder import RunFolder
from scaling.library.scene_row import pack_scene, unpack_scene
from scaling.models.triplanes import SceneParams
from scaling.storage.own_folder import new_folder

SCENES_PER_PART = 16
COEFS = 50
FEATURES = 4


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=positive_int, default=5000, help="scenes without micro planes")
    parser.add_argument("--plane-scenes", type=positive_int, default=1024, help="scenes with micro planes")
    parser.add_argument("--resolution", type=positive_int, default=32, help="K, side of the micro planes")
    parser.add_argument("--out", type=Path, default=Path("runs/bytes"), help="folder of the libraries, new or empty")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def planes(features: int, resolution: int) -> Tensor:
    """Random micro planes [3, features, K, K], of standard deviation 1 before the noise is added."""
    shape = (3, features, resolution, resolution)
    if not features:
        return torch.zeros(shape)
    side = torch.fft.fftfreq(resolution)
    frequency = (side[:, None].square() + side.square()).sqrt()
    frequency[0, 0] = 1 / resolution
    smooth = torch.fft.ifft2(torch.fft.fft2(torch.randn(shape)) / frequency).real
    noise = torch.distributions.Laplace(0.0, 0.1).sample(shape)
    return smooth / smooth.std((2, 3), keepdim=True) + noise


def scenes(number: int, features: int, resolution: int) -> Iterator[SceneParams]:
    """Random scenes, the same at each call. Coefs vary about a mean, as those of a category do."""
    torch.manual_seed(0)
    mean = 0.3 * torch.randn(COEFS)
    for _ in range(number):
        yield SceneParams(planes(features, resolution), mean + 0.2 * torch.randn(COEFS))


def random_row(index: int, params: SceneParams, dtype: str) -> dict[str, Any]:
    """A library row as an actor makes it, with random metrics."""
    metrics = {name: None if name == "lpips" else 20 + torch.randn(()).item() for name in METRICS}
    return {
        **vars(pack_scene(params, dtype)), **metrics, "scene_id": hashlib.md5(str(index).encode()).hexdigest(),
        "category": "02958343", "stage": 2, "shared": "ab" * 32, "cohort": None,
        "seconds": 3 + torch.rand(()).item(), "settings_hash": "0123456789ab", "seed": 0,
    }  # fmt: skip


def measure(folder: Path, number: int, features: int, resolution: int, dtype: str) -> dict[str, float]:
    """Commit a library and join its parts. → bytes a scene before ("apart") and after ("joined"), "seconds" of
    joining."""
    new_folder(folder, "benchmark of bytes")
    run = RunFolder(folder)
    library = run.library.folder
    rows: list[dict[str, Any]] = []
    with open_ledger(run) as ledger:
        for index, params in enumerate(scenes(number, features, resolution), start=1):
            rows.append(random_row(index, params, dtype))
            if len(rows) == SCENES_PER_PART or index == number:
                batch = [row["scene_id"] for row in rows]
                ledger.add(commit_part(library, rows, part_name(ledger.epoch, 1, batch)))
                rows = []
        ledger.publish()
        apart = folder_bytes(library)
        start = time.perf_counter()
        compact(ledger, grace_seconds=0.0)
        seconds = time.perf_counter() - start
    assert len(run.library.ids()) == number
    return {"apart": apart / number, "joined": folder_bytes(library) / number, "seconds": seconds}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def snr(dtype: str, resolution: int, number: int = 64) -> float:
    """The signal-to-noise ratio in dB of planes that are stored as `dtype` and read back, against float32."""
    signal, noise = 0.0, 0.0
    for params in scenes(number, FEATURES, resolution):
        back = unpack_scene(vars(pack_scene(params, dtype))).micro_planes
        signal += params.micro_planes.square().sum().item()
        noise += (back - params.micro_planes).square().sum().item()
    return 10 * torch.tensor(signal / noise).log10().item()


def main() -> int:
    arguments = make_parser().parse_args()
    ulw = measure(arguments.out / "ulw", arguments.scenes, 0, arguments.resolution, "float16")
    figures: dict[str, Any] = {
        "scenes": arguments.scenes,
        "plane_scenes": arguments.plane_scenes,
        "resolution": arguments.resolution,
        "ulw_bytes_per_scene": round(ulw["joined"], 1),
        "ulw_bytes_per_scene_apart": round(ulw["apart"], 1),
        "ulw_joining_seconds": round(ulw["seconds"], 2),
    }
    lines = [("`ulw`", arguments.scenes, ulw, None)]
    for dtype in ("float16", "int8", "int4"):
        found = measure(arguments.out / dtype, arguments.plane_scenes, FEATURES, arguments.resolution, dtype)
        ratio = snr(dtype, arguments.resolution)
        figures[dtype] = {
            "bytes_per_scene": round(found["joined"], 1),
            "bytes_per_scene_apart": round(found["apart"], 1),
            "joining_seconds": round(found["seconds"], 2),
            "snr_db": round(ratio, 2),
        }
        lines.append((f"3 x {FEATURES} x {arguments.resolution}², {dtype}", arguments.plane_scenes, found, ratio))
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(
        "| planes | scenes | bytes/scene, parts of 16 | joined | seconds to join | SNR, dB |\n|---|---|---|---|---|---|"
    )
    for name, number, found, ratio in lines:
        text = "-" if ratio is None else f"{ratio:.1f}"
        print(
            f"| {name} | {number} | {found['apart']:,.0f} | {found['joined']:,.0f} | {found['seconds']:.1f} | {text} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
