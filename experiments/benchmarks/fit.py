"""The published method and ours side by side on the same scenes, one CPU thread: cost and quality of a scene.

python experiments/benchmarks/fit.py --json FILE [--store STORE --train-scenes FILE --fit-scenes FILE]

Both get one autoencoder, trained from scratch and kept under --out, and stage 1s of about the same CPU time. From the
published stage-1 model both fit the same scenes and fine-tune its shared parts (mode cohort), ours again and again
between the epochs of the published one; what ours reaches with those parts frozen is told, too. Ours then goes on from
its own stage-1 model, 2a and 2b apart: 2b frozen, as `default` is, and from the same 2a in mode cohort, as the
published 2b is. Stage 1s that are done are kept, so a killed call goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from scaling.command_line import read_preset, read_yaml, run_command
from scaling.config import Settings, make_settings, merge
from scaling.parsing import parse_json

SCHEDULES = Path(__file__).with_name("fit.yaml")
REPEATS_AT = (10, 20, 30)  # epochs of the published 2a after which ours is fitted: side by side on a noisy machine
LEAST_RISE = 1.0  # dB below which a ratio of times would say nothing


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="scene store (default: the embedded cars, 32 and 6 of them)")
    parser.add_argument("--train-scenes", type=Path, help="ids of stage 1's scenes, one a line")
    parser.add_argument("--fit-scenes", type=Path, help="ids of stage 2's scenes, one a line")
    parser.add_argument("--out", type=Path, default=Path("runs/fit"), help="autoencoder and stage-1 models")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def method_settings(method: str, autoencoder: Path | None, store: str | None) -> Settings:
    """A preset (`default`: sd) with its schedules of fit.yaml over it and, where its kind is kl, the one autoencoder;
    those of embedded cars where `store` is None."""
    schedules = read_yaml(SCHEDULES)
    preset = "sd" if method in ("autoencoder", "default") else method
    values = merge(merge(read_preset(preset), schedules["everywhere"]), schedules[method])
    if store is None:
        values = merge(values, schedules["embedded"][method])
    if method == "autoencoder":
        still = {phase: {"num_epochs": 0} for phase in ("warmup", "joint", "adapt", "distil")}
        values = merge(values, {"stage1": still})
    elif make_settings(values).autoencoder.kind == "kl":
        values = merge(values, {"autoencoder": {"pretrained": str(autoencoder), "subfolder": None}})
    return make_settings(values)


def stage1_folder(out: Path, settings: Settings, spec: Any, ids: list[str]) -> Path:
    """The folder under `out` that is named by the settings, the store and the scenes, trained if it is not yet, by one
    thread."""
    import torch
    from variants import settings_key

    torch.set_num_threads(1)  # in a process of its own
    return _trained(out, [settings_key(settings)], settings, spec, ids)


def stage1_folders(out: Path, settings: dict[str, Settings], spec: Any, ids: list[str]) -> dict[str, Path]:
    """Those of each method, two at a time: CPU time is what counts, and two cores are what there is."""
    job = partial(stage1_folder, out, spec=spec, ids=ids)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(settings, pool.map(job, settings.values())))


def autoencoder_folder(out: Path, spec: Any, ids: list[str]) -> Path:
    """The one autoencoder, a diffusers folder; named by what shapes an autoencoder alone."""
    settings = method_settings("autoencoder", None, spec.store)
    parts = (settings.data, settings.autoencoder, settings.stage1.autoencoder)
    shaping = [settings.seed, *(part.model_dump() for part in parts)]
    return _trained(out, shaping, settings, spec, ids) / "autoencoder"


def _trained(out: Path, shaping: list[Any], settings: Settings, spec: Any, ids: list[str]) -> Path:
    from variants import train

    job = json.dumps([shaping, asdict(spec), ids])
    folder = out / hashlib.sha256(job.encode()).hexdigest()[:12]
    train(settings, spec, ids, folder)
    return folder.absolute()


def stored(params: Any, settings: Settings) -> tuple[Any, float]:
    """The params as a reader of the library gets them, and the bytes of a scene: what its row holds beside id and
    metrics."""
    import torch

    from scaling.library.fitted_scenes import pack_scene, unpack_scene
    from scaling.models.triplanes import SceneParams

    packed = [pack_scene(params[row], settings.stage2.micro_dtype) for row in range(len(params.coefs))]
    read = [unpack_scene(vars(scene)) for scene in packed]
    params = SceneParams(torch.stack([p.micro_planes for p in read]), torch.stack([p.coefs for p in read]))
    return params, sum(len(p.micro_planes) + 4 * len(p.micro_scale) + 4 * len(p.coefs) for p in packed) / len(packed)


def laid_over(shared: Any, settings: Settings, section: str | None = None) -> Settings:
    """Stage 2 of `settings` on a shared model, with a section of fit.yaml over it."""
    values = merge(shared.settings.model_dump(), {"stage2": settings.stage2.model_dump()})
    return make_settings(merge(values, read_yaml(SCHEDULES)[section]) if section else values)


def same_model(
    folder: Path, settings: dict[str, Settings], train: Sequence[Any], scenes: Sequence[Any]
) -> dict[str, Any]:
    """Both from the published stage-1 model, which was trained on `train`."""
    from fit_curves import our_2a, our_cohort, published_stage2
    from measured import autoencoder_ceiling, render_as_default

    from scaling.models.shared import load_shared

    shared, name = load_shared(folder)
    ours, _ = load_shared(folder)
    render_as_default(ours, settings["default"].rendering.samples, train)
    curves, frozen = [], []

    def between(epoch: int) -> None:
        if epoch not in REPEATS_AT:
            return
        curves.append(our_cohort(ours, laid_over(ours, settings["default"], "cohort_2a"), scenes))
        print(f"  ours {curves[-1].end}", flush=True)
        if not frozen:
            frozen.append(our_2a(ours, laid_over(ours, settings["default"]), scenes)[0])
            print(f"  ours, frozen {frozen[0].end}", flush=True)

    published = published_stage2(shared, settings["paper"], scenes, name, between)
    target = published["latent"].end.latent
    times = [curve.seconds_to("latent", target) for curve in curves]
    rise = target - published["start"].latent
    reached = [time for time in times if time]  # a start that is there already would be no fit
    theirs = published["latent"].seconds_to("latent", target)
    ratio = theirs / median(reached) if theirs and len(reached) == len(times) else None
    return {
        "speedup_2a": ratio if rise >= LEAST_RISE else None,
        "paper_rise_2a_db": rise,
        "paper_seconds_2a": theirs,
        "default_seconds_2a": times,
        "frozen_latent_psnr": frozen[0].end.latent,
        "paper_latent_psnr": target,
        "autoencoder_psnr": autoencoder_ceiling(shared, scenes),
        "published": published,
        "curves": curves,
        "frozen": frozen,
    }


def own_model(folder: Path, settings: Settings, scenes: Sequence[Any]) -> dict[str, Any]:
    """Ours, from its own stage-1 model. In latent space 2b twice from the same 2a: frozen, and in mode cohort."""
    from fit_curves import one_decoded_batch, our_2a, our_2b, our_cohort
    from measured import autoencoder_ceiling, test_point

    from scaling.models.shared import load_shared

    shared, _ = load_shared(folder)
    curve, params, ready, encoding = our_2a(shared, settings, scenes)
    aligned, cohort = curve, None
    if settings.autoencoder.kind == "kl":
        first = one_decoded_batch(shared, len(scenes))
        cohort = our_cohort(shared, laid_over(shared, settings, "cohort_2b"), scenes, params, first)
        print(f"  ours, 2b in mode cohort {cohort.end}", flush=True)
        aligned = our_2b(shared, settings, scenes, params, ready, first)
        print(f"  ours, 2b {aligned.end}", flush=True)
    read, num_bytes = stored(params, settings)
    return {
        "encode_seconds": encoding,
        "latent": curve,
        "rgb": aligned,
        "cohort": cohort,
        "psnr": test_point(shared, scenes, read, aligned.end.step, aligned.end.seconds).decoded,
        "views": ready[0].num_views,
        "student": shared.student is not None and settings.stage2.rgb.through == "student",
        "bytes_per_scene": num_bytes,
        "autoencoder_psnr": autoencoder_ceiling(shared, scenes) if cohort else None,
    }


def plain(value: Any) -> Any:
    """For JSON: points and curves."""
    return asdict(value)


def main() -> int:
    arguments = make_parser().parse_args()

    import torch
    from fit_figures import METHODS, methods_rows, sd_size, speedup_2b, table_text

    from scaling.data.scene_source import SourceSpec, choose_ids
    from scaling.data.scenes import views_from_row

    alone = method_settings("autoencoder", None, arguments.store)
    spec = SourceSpec.of(arguments.store, alone.data)
    train_ids = choose_ids(spec.open(), arguments.train_scenes, count=None if arguments.train_scenes else 32)
    fit_ids = choose_ids(
        spec.open(), arguments.fit_scenes, leave_out=train_ids, count=None if arguments.fit_scenes else 6
    )

    autoencoder = autoencoder_folder(arguments.out, spec, train_ids)  # by all cores: its time is not compared
    torch.set_num_threads(1)
    settings = {method: method_settings(method, autoencoder, spec.store) for method in METHODS}
    folders = stage1_folders(arguments.out, settings, spec, train_ids)
    seconds = {method: parse_json((folder / "seconds.json").read_bytes()) for method, folder in folders.items()}
    scenes, train = (
        [views_from_row(row, alone.data.image_size) for row in spec.open().rows(ids)] for ids in (fit_ids, train_ids)
    )
    same = same_model(folders["paper"], settings, train, scenes)
    own = {name: own_model(folders[name], settings[name], scenes) for name in ("default", "rgb_triplanes")}
    rows = methods_rows(same, own, seconds, settings, len(scenes))
    figures = {
        **{key: same[key] for key in ("speedup_2a", "paper_rise_2a_db", "paper_seconds_2a", "default_seconds_2a")},
        **speedup_2b(same["published"], own["default"]),
        **sd_size(same["published"], own["default"], settings, len(scenes)),
        "psnr_gain_db": rows["default"]["psnr"] - rows["paper"]["psnr"],
        "psnr_gain_cohort_db": own["default"]["cohort"].end.decoded - rows["paper"]["psnr"],
        "bytes_per_scene": rows["default"]["bytes_per_scene"],
        "rgb_triplanes": rows["rgb_triplanes"],
        "methods": rows,
        "scenes": {"source": asdict(spec), "train": train_ids, "fit": fit_ids},
        "curves": {"same_model": same, **own},
    }
    arguments.json.write_text(json.dumps(figures, indent=1, default=plain))
    print(table_text(figures))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
