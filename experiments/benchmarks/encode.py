"""How many views a second are encoded, by autoencoders of two sizes, and decoded from PNG before that.

python experiments/benchmarks/encode.py --json FILE

small: preset sd's sizes from scratch; sd: Stable Diffusion's size. Both have random weights; views are 128². A CPU uses
one thread. png_percent: the share of PNG decoding, by one CPU thread, in the time of decoding and encoding together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from scaling.cli import positive_int, run_command

IMAGE_SIZE = 128
PNG_VIEWS = 8


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("small", "sd"), default=("small", "sd"), help="default: both")
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[1, 8, 32], help="views encoded at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each is measured, at least once")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def rate(action: Callable[[], Any], views: int, least_seconds: float, device: Any) -> float:
    """Views a second of an action that handles `views` of them. It is called once without counting, then until the
    calls have taken `least_seconds`."""
    from shared.stopwatch import seconds_of

    action()
    done, seconds = 0, 0.0
    while not done or seconds < least_seconds:
        seconds += seconds_of(action, device)
        done += 1
    return done * views / seconds


def png_rates(least_seconds: float) -> dict[str, float]:
    """Views of an embedded car a second, from PNG to pixels, and from PNG to the tensors that a fit takes."""
    from scaling.data.embedded.scenes import embedded_car
    from scaling.data.png import decode_png
    from scaling.data.scene_views import views_from_row

    car = embedded_car("car-00000", IMAGE_SIZE, PNG_VIEWS)
    actions: dict[str, Callable[[], Any]] = {
        "decode_png": lambda: [decode_png(png) for png in car["views"]],
        "views_from_row": lambda: views_from_row(car, IMAGE_SIZE),
    }
    return {name: rate(action, PNG_VIEWS, least_seconds, "cpu") for name, action in actions.items()}


def variants(batches: list[int], device: Any) -> Iterator[tuple[int, bool, str, bool]]:
    """Combinations (batch, channels-last, precision, compiled). On a CPU, precision is float32 and nothing is
    compiled."""
    gpu = device.type == "cuda"
    yield from product(
        batches, (False, True), ("float32", "bfloat16") if gpu else ("float32",), (False, True) if gpu else (False,)
    )


def encode_rate(size: str, variant: tuple[int, bool, str, bool], least_seconds: float, device: Any) -> float:
    """Views a second that one variant encodes."""
    import torch
    from shared.sd_size import sd_size_autoencoder
    from shared.workload import preset_settings

    from scaling.models.autoencoders.load import build_autoencoder
    from scaling.models.precision import set_precision

    batch, channels_last, precision, compiled = variant
    small = preset_settings("sd").autoencoder
    sd = size == "sd"
    autoencoder = sd_size_autoencoder(precision) if sd else build_autoencoder(small, IMAGE_SIZE, precision)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    autoencoder = autoencoder.to(device=device, memory_format=layout).requires_grad_(False).eval()
    set_precision(precision)
    images = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device).contiguous(memory_format=layout)
    torch.compiler.reset()  # else earlier variants count towards the limit on how often a method is compiled
    encode = torch.compile(autoencoder.encode, dynamic=False) if compiled else autoencoder.encode
    with torch.no_grad():
        return rate(lambda: encode(images), batch, least_seconds, device)


def main() -> int:
    arguments = make_parser().parse_args()
    import torch
    from shared.stopwatch import table_text

    torch.set_num_threads(1)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    png = png_rates(arguments.seconds)
    rows: list[dict[str, Any]] = []
    figures = {"device": str(device), "png_views_per_second": png, "rows": rows}
    for size, variant in product(arguments.sizes, variants(arguments.batches, device)):
        views = encode_rate(size, variant, arguments.seconds, device)
        names = dict(zip(("batch", "channels_last", "precision", "compiled"), variant))
        share = 100 / png["views_from_row"] / (1 / png["views_from_row"] + 1 / views)
        rows.append({"autoencoder": size, **names, "views_per_second": views, "png_percent": share})
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")  # after each row: the last ones take minutes
    print(table_text(list(rows[0]), [list(row.values()) for row in rows]))
    print("\nPNG, views a second: " + ", ".join(f"{name} {value:,.0f}" for name, value in png.items()))
    if device.type != "cuda":
        print("bfloat16 and torch.compile are left out on a CPU: they are for GPUs")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
