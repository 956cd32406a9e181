"""For fit.py --with-paper: the published method and preset `sd`, side by side on the same scenes.

Both get the same autoencoder, trained from scratch, and stage 1s of about the same CPU time. First both start from the
published stage-1 model: they fit the same scenes and fine-tune its shared parts (mode cohort). Ours does so several
times, between epochs of the published one, and once with those parts frozen. Then ours starts from its own stage-1
model: 2a, and from its result 2b twice, frozen as in `sd`, and in mode cohort as in the published 2b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fit_parts.stage1 import Job, kept_folder, stage1_seconds, train_all
from scaling.cli import read_preset, read_yaml
from scaling.config import Settings, make_settings, merge

SCHEDULES = Path(__file__).with_name("fit.yaml")
METHODS = ("paper", "sd")
REPEATS_AT = (10, 20, 30)  # epochs of the published 2a after which ours runs, so that other load affects both
LEAST_RISE = 1.0  # dB; below it a ratio of times would mean nothing


def method_settings(method: str, autoencoder: Path | None, store: str | None) -> Settings:
    """The settings of method `paper` or `sd`: the preset, its schedules in fit.yaml (those of embedded cars where
    `store` is None) and the folder of the autoencoder. Method `autoencoder`: the settings that train this
    autoencoder."""
    schedules = read_yaml(SCHEDULES)
    preset = "sd" if method == "autoencoder" else method
    values = merge(merge(read_preset(preset), schedules["everywhere"]), schedules[method])
    if store is None:
        values = merge(values, schedules["embedded"][method])
    if method == "autoencoder":
        still = {phase: {"num_epochs": 0} for phase in ("warmup", "joint", "adapt", "distil")}
        values = merge(values, {"stage1": still})
    else:
        named = {"pretrained": str(autoencoder), "subfolder": None, "revision": None}
        values = merge(values, {"autoencoder": named})
    return make_settings(values)


def autoencoder_folder(job: Job) -> Path:
    """The folder of the autoencoder that both methods use, in diffusers' layout. It is trained unless it is there; the
    folder's name depends only on what shapes it."""
    from variants import train

    settings = method_settings("autoencoder", None, job.store)
    parts = (settings.data, settings.autoencoder, settings.stage1.autoencoder)
    shaping = [settings.seed, *(part.model_dump() for part in parts), asdict(job.spec(settings)), job.train]
    folder = kept_folder(job.out, shaping)
    train(settings, job.spec(settings), job.train, folder)
    return folder / "autoencoder"


def laid_over(shared: Any, settings: Settings, section: str | None = None) -> Settings:
    """The settings of a shared model with stage 2 of `settings`, and a section of fit.yaml over them."""
    values = merge(shared.settings.model_dump(), {"stage2": settings.stage2.model_dump()})
    return make_settings(merge(values, read_yaml(SCHEDULES)[section]) if section else values)


def same_model(
    folder: Path, settings: dict[str, Settings], train: Sequence[Any], scenes: Sequence[Any]
) -> dict[str, Any]:
    """Fit the scenes by both methods, from the published stage-1 model in `folder`, which was trained on `train`.

    → figures of 2a, and the curves of both methods.
    """
    from shared.measured import autoencoder_ceiling, render_as

    from fit_parts.curves import our_2a, our_cohort, published_stage2
    from scaling.models.shared_files import load_shared

    shared, name = load_shared(folder)
    ours, _ = load_shared(folder)
    render_as(ours, settings["sd"].rendering, train)
    curves, frozen = [], []

    # Ours runs between epochs of the published 2a: both then meet the same load on the machine.
    def between(epoch: int) -> None:
        if epoch not in REPEATS_AT:
            return
        curves.append(our_cohort(ours, laid_over(ours, settings["sd"], "cohort_2a"), scenes))
        print(f"  ours {curves[-1].end}", flush=True)
        if not frozen:
            frozen.append(our_2a(ours, laid_over(ours, settings["sd"]), scenes)[0])
            print(f"  ours, frozen {frozen[0].end}", flush=True)

    published = published_stage2(shared, settings["paper"], scenes, name, between)
    # The target is where the published 2a ends; each method's time is the one at which it first gets there.
    target = published["latent"].end.latent
    times = [curve.seconds_to("latent", target) for curve in curves]
    rise = target - published["start"].latent
    reached = [time for time in times if time]  # without runs that never got there, or started there
    theirs = published["latent"].seconds_to("latent", target)
    ratio = theirs / median(reached) if theirs and len(reached) == len(times) else None
    return {
        "speedup_2a": ratio if rise >= LEAST_RISE else None,
        "paper_rise_2a_db": rise,
        "paper_seconds_2a": theirs,
        "sd_seconds_2a": times,
        "frozen_latent_psnr": frozen[0].end.latent,
        "paper_latent_psnr": target,
        "autoencoder_psnr": autoencoder_ceiling(shared, scenes),
        "published": published,
        "curves": curves,
        "frozen": frozen,
    }


def own_model(folder: Path, settings: Settings, scenes: Sequence[Any]) -> dict[str, Any]:
    """Fit the scenes by our method, from its own stage-1 model. 2b runs twice from the same 2a: in mode cohort, and
    frozen. → its curves and figures."""
    from shared.measured import autoencoder_ceiling

    from fit_parts.curves import one_decoded_batch, our_2a, our_2b, our_cohort
    from fit_parts.frontier import measure
    from scaling.library.scene_row import pack_scene
    from scaling.models.shared_files import load_shared

    shared, _ = load_shared(folder)
    curve, params, ready, encoding = our_2a(shared, settings, scenes)
    # The frozen 2b moves params in place, so the cohort takes its copy first.
    first = one_decoded_batch(shared, len(scenes))
    cohort = our_cohort(shared, laid_over(shared, settings, "cohort_2b"), scenes, params, first)
    print(f"  ours, 2b in mode cohort {cohort.end}", flush=True)
    aligned = our_2b(shared, settings, scenes, params, ready, first)
    print(f"  ours, 2b {aligned.end}", flush=True)
    packed = [pack_scene(params[row], settings.stage2.micro_dtype) for row in range(len(scenes))]
    metrics = measure(shared, packed, scenes)
    return {
        "encode_seconds": encoding,
        "latent": curve,
        "rgb": aligned,
        "cohort": cohort,
        "psnr": fmean(each["psnr"] for each in metrics.values()),
        "views": ready[0].num_views,
        "student": shared.student is not None and settings.stage2.rgb.through == "student",
        "bytes_per_scene": fmean(scene.num_bytes for scene in packed),
        "autoencoder_psnr": autoencoder_ceiling(shared, scenes),
    }


def compare(job: Job) -> dict[str, Any]:
    """The figures of `paper` and `sd`, after training what is missing. Figures that had another name when `sd` was
    called default are given under both names."""
    import os

    import torch

    from fit_parts.figures import AS_BEFORE, methods_rows, sd_size, speedup_2b

    torch.set_num_threads(os.cpu_count() or 1)
    autoencoder = autoencoder_folder(job)  # by all cores, because its time is not compared
    torch.set_num_threads(1)
    settings = {method: method_settings(method, autoencoder, job.store) for method in METHODS}
    folders = train_all(settings, job)
    seconds = {method: stage1_seconds(folder) for method, folder in folders.items()}
    scenes, train = (job.views(ids, settings["sd"]) for ids in (job.fit, job.train))
    same = same_model(folders["paper"], settings, train, scenes)
    own = own_model(folders["sd"], settings["sd"], scenes)
    rows = methods_rows(same, own, seconds, settings, len(scenes))
    figures = {
        **{key: same[key] for key in ("speedup_2a", "paper_rise_2a_db", "paper_seconds_2a", "sd_seconds_2a")},
        **speedup_2b(same["published"], own),
        **sd_size(same["published"], own, settings, len(scenes)),
        "psnr_gain_db": rows["sd"]["psnr"] - rows["paper"]["psnr"],
        "psnr_gain_cohort_db": own["cohort"].end.decoded - rows["paper"]["psnr"],
        "bytes_per_scene": rows["sd"]["bytes_per_scene"],
        "methods": rows,
        "curves": {"same_model": same, "sd": own},
    }
    return figures | {before: figures[now] for before, now in AS_BEFORE.items()}
