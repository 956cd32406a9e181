"""For fit.py: presets on the same scenes, as they are, and plain tri-planes that take as much time as one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fit_parts.stage1 import Job, stage1_seconds
from scaling.cli import read_preset
from scaling.config import Settings, SettingsError, make_settings, merge
from scaling.data.scene_views import SceneViews
from scaling.library.parts import encode_rows
from scaling.library.scene_row import PackedScene, pack_scene, unpack_scene
from scaling.models.shared_files import load_shared
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.evaluate import render_views
from scaling.training.fit_frozen import fit_scenes
from scaling.training.metrics.images import view_metrics

METHODS = ("default", "sharp", "compact", "rgb_triplanes", "same_field_triplanes")
SAME_TIME = {"rgb_triplanes": "default", "same_field_triplanes": "sharp"}  # tri-planes → preset whose time they take
GAINS = {"default_gain_db": ("default", "rgb_triplanes"), "sharp_gain_db": ("sharp", "same_field_triplanes")}
TRIPLANES_DTYPE = "int8"  # tri-planes are the baseline of quality: rounding must cost them nothing
SMALLEST_DTYPE = "int4"  # for which bytes are reported, too
# The time of a step is measured for two methods in turn, in rounds, so that other load on the machine affects both.
PACE_ROUNDS, PACE_WARM_UP, PACE_STEPS = 2, 10, 60


def method_settings(method: str) -> Settings:
    """A preset as it is, except that tri-planes are stored as int8. `same_field_triplanes` is made from `sharp`."""
    if method == "same_field_triplanes":
        return as_triplanes(make_settings(read_preset("sharp")))
    settings = make_settings(read_preset(method))
    return over(settings, stage2={"micro_dtype": TRIPLANES_DTYPE}) if method in SAME_TIME else settings


def as_triplanes(settings: Settings) -> Settings:
    """Plain tri-planes of pixels: 32 features, 64 texels a side, no base planes.

    Everything else is as in `settings`: the field, how features combine, where rays are sampled, rays and rates. Only
    1a is that of `rgb_triplanes`.
    """
    off = {"num_epochs": 0}
    warmup = method_settings("rgb_triplanes").stage1.warmup.model_dump()
    return over(
        settings,
        representation={"micro_features": 32, "macro_features": 0, "num_base_planes": 0, "resolution": 64},
        autoencoder={"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0, "pretrained": None},
        stage1={"autoencoder": off, "warmup": warmup, "joint": off, "adapt": off, "distil": off},
        stage2={"rgb": off, "micro_dtype": TRIPLANES_DTYPE},
    )


def over(settings: Settings, **values: Any) -> Settings:
    """The settings with nested plain values laid over them."""
    return make_settings(merge(settings.model_dump(), values))


def with_steps(settings: Settings, steps: float) -> Settings:
    """The settings with about `steps` steps of 2a, without early stopping."""
    epochs = settings.stage2.latent.num_epochs
    each = max(1, round(steps / epochs))
    return over(settings, stage2={"latent": {"steps_per_epoch": each, "check_every": None}})


def check_methods(methods: Sequence[str], uncarved: str | None = None) -> None:
    """Check the names of --presets and --uncarved.

    Raises SettingsError where tri-planes are named without the preset whose time they take, where a preset fits in mode
    cohort, and where `uncarved` is not run, is tri-planes, or is not sampled in hulls.
    """
    if uncarved is not None:
        if uncarved not in methods or uncarved in SAME_TIME:
            raise SettingsError(f"--uncarved {uncarved}: name one of --presets that is not tri-planes")
        if method_settings(uncarved).rendering.sampled != "hull":
            raise SettingsError(f"--uncarved {uncarved}: is not sampled in hulls")
    for method in methods:
        partner = SAME_TIME.get(method)
        if partner is not None and partner not in methods:
            raise SettingsError(f"--presets {method}: takes the time of {partner}; name that preset, too")
        if method_settings(method).stage2.mode != "frozen":
            raise SettingsError(f"--presets {method}: fits in mode cohort; compare it by --with-paper")


@dataclass
class StepClock:
    """An on_step for `fit_scenes` that sums the CPU seconds of steps.

    steps, seconds: of 2a, from its step number `first` on; rgb_seconds: of 2b. The first step of a phase does not
    count, because its time includes what comes before it.
    """

    first: int = 1
    steps: int = 0
    seconds: float = 0.0
    rgb_seconds: float = 0.0
    last: float = 0.0

    def __call__(self, phase: str, step: int, _: float) -> None:
        now = time.process_time()
        if phase == "rgb" and step:
            self.rgb_seconds += now - self.last
        elif phase == "latent" and step >= self.first:
            self.steps += 1
            self.seconds += now - self.last
        self.last = now

    @property
    def pace(self) -> float:
        """Seconds a step of 2a."""
        return self.seconds / max(1, self.steps)


@dataclass(frozen=True)
class Fit:
    """Scenes that were fitted together, as they are stored. seconds: CPU time of all scenes, from decoded views to
    packed planes; clock: of the steps in it."""

    packed: list[PackedScene]
    seconds: float
    clock: StepClock


def fit(shared: SharedModel, settings: Settings, scenes: Sequence[SceneViews]) -> Fit:
    """Fit the scenes in mode frozen and pack them.

    A few steps on one scene go first, because the first call of a part may compile it: this is in no method's time.
    """
    for scene in fit_scenes(shared, scenes[:1], with_steps(settings, 3)):
        pack_scene(scene.params, settings.stage2.micro_dtype)
    clock = StepClock()
    start = time.process_time()
    fitted = fit_scenes(shared, scenes, settings, clock)
    packed = [pack_scene(scene.params, settings.stage2.micro_dtype) for scene in fitted]
    return Fit(packed, time.process_time() - start, clock)


def stored_params(packed: PackedScene) -> SceneParams:
    """A scene's parameters as a reader of the library gets them, S = 1."""
    return unpack_scene(vars(packed))[None]


@torch.no_grad()
def measure(
    shared: SharedModel, packed: Sequence[PackedScene], scenes: Sequence[SceneViews]
) -> dict[str, dict[str, float]]:
    """Scene id → metric → mean over the scene's test views."""
    metrics = {}
    for scene, views in zip(packed, scenes, strict=True):
        test = list(views.test_views)
        images = render_views(shared, stored_params(scene), views.cam2world[test], views.intrinsics[test])["images"]
        metrics[views.scene_id] = view_metrics(images, views.images[test])
    return metrics


def paces(
    models: Sequence[SharedModel], settings: Sequence[Settings], scenes: Sequence[Sequence[SceneViews]]
) -> list[float]:
    """CPU seconds of a step of 2a, for several methods that are measured in turn.

    All scenes are fitted together, as in `fit`: a step of eight scenes takes less than eight steps of one scene.
    """
    clocks = [StepClock(first=PACE_WARM_UP) for _ in models]
    for _ in range(PACE_ROUNDS):
        for shared, each, views, clock in zip(models, settings, scenes, clocks):
            short = over(with_steps(each, PACE_WARM_UP + PACE_STEPS), stage2={"rgb": {"num_epochs": 0}})
            fit_scenes(shared, views, short, clock)
    return [clock.pace for clock in clocks]


def same_time_steps(settings: Settings, clock: StepClock, own_pace: float, pace: float) -> float:
    """How many steps of tri-planes take as long as the steps of a fit with `settings`.

    clock: of that fit; own_pace: CPU seconds of one of its steps, measured in turn with `pace`, CPU seconds of a step
    of the tri-planes. With early stopping the fit's own time counts instead of steps · own_pace, because steps get
    cheaper as scenes end. Hulls and packing are left out, because they take both methods the same time.
    """
    fitting = clock.seconds if settings.stage2.latent.check_every else clock.steps * own_pace
    return (fitting + clock.rgb_seconds) / pace


def run_methods(
    methods: dict[str, Settings], job: Job, folders: dict[str, Path], same_time: dict[str, str] = SAME_TIME
) -> dict[str, Any]:
    """Fit and measure one method after another. → their figures.

    methods: name → settings; folders: name → its stage 1; same_time: method → the method whose time it takes.
    """
    figures: dict[str, Any] = {"scenes": {}, "same_time": {}, "settings": {}, "steps": {}}
    clocks: dict[str, StepClock] = {}
    decoded = {each.data: job.views(job.fit, each) for each in methods.values()}
    # Methods that take another one's time come last, because that time must be known.
    for method, settings in sorted(methods.items(), key=lambda item: item[0] in same_time):
        shared, shared_hash = load_shared(folders[method])
        scenes = decoded[settings.data]
        partner = same_time.get(method)
        # Both paces are measured here, beside each other, because a machine's speed changes over a long run.
        if partner is not None:
            other = methods[partner]
            models, views = (load_shared(folders[partner])[0], shared), (decoded[other.data], scenes)
            own_pace, pace = paces(models, (other, settings), views)
            settings = with_steps(settings, same_time_steps(other, clocks[partner], own_pace, pace))
            figures["same_time"][method] = {"as": partner, "pace_ratio": pace / own_pace, "pace": pace}
        done = fit(shared, settings, scenes)
        clocks[method] = done.clock
        metrics = measure(shared, done.packed, scenes)
        figures["scenes"][method] = {scene_id: each["psnr"] for scene_id, each in metrics.items()}
        figures["settings"][method] = settings.model_dump()
        figures["steps"][method] = done.clock.steps + 1
        for name in next(iter(metrics.values())):
            figures[f"{method}_{name}"] = fmean(each[name] for each in metrics.values())
        figures[f"{method}_seconds"] = done.seconds / len(scenes)
        figures[f"{method}_stage1_seconds"] = stage1_seconds(folders[method])
        figures |= {f"{method}_{key}": value for key, value in bytes_of(done.packed, metrics, shared_hash).items()}
        print(f"  {method} {figures[f'{method}_psnr']:.2f} dB, {figures[f'{method}_seconds']:.2f} CPU-s", flush=True)
    for key, (ours, baseline) in GAINS.items():
        if ours in methods and baseline in methods:
            figures[key] = figures[f"{ours}_psnr"] - figures[f"{baseline}_psnr"]
    return figures


def bytes_of(packed: Sequence[PackedScene], metrics: dict[str, dict[str, float]], shared_hash: str) -> dict[str, float]:
    """Means over the scenes. bytes: what a scene takes without its id and metrics; row_bytes: its share of a library
    part that holds these scenes; int4_bytes: `bytes` if its planes were stored as int4."""
    rows = [
        {**vars(scene), **values, "scene_id": scene_id, "stage": 2, "shared": shared_hash, "seconds": 0.0, "seed": 0}
        for scene, (scene_id, values) in zip(packed, metrics.items(), strict=True)
    ]
    small = [pack_scene(stored_params(scene)[0], SMALLEST_DTYPE).num_bytes for scene in packed]
    return {
        "bytes": fmean(scene.num_bytes for scene in packed),
        "row_bytes": len(encode_rows(rows)) / len(rows),
        "int4_bytes": fmean(small),
    }


def uncarved_differences(
    settings: Settings, folder: Path, scenes: Sequence[SceneViews], known: dict[str, float] | None = None
) -> dict[str, float]:
    """Scene id → PSNR of a fit in the scene's hull minus that of a fit in the uncarved cuboid, in dB.

    Positive where the hull is better. Both have the same shared model, steps and samples, without early stopping.
    known: scene id → PSNR of the fits in hulls, if they have been made with these settings.
    """
    settings = over(settings, stage2={"latent": {"check_every": None}})
    if known is None:
        known = _psnrs(load_shared(folder)[0], settings, scenes)
    shared, _ = load_shared(folder)
    shared.settings = over(shared.settings, rendering={"sampled": "cuboid"})
    uncarved = _psnrs(shared, settings, scenes)
    return {scene_id: known[scene_id] - psnr for scene_id, psnr in uncarved.items()}


def _psnrs(shared: SharedModel, settings: Settings, scenes: Sequence[SceneViews]) -> dict[str, float]:
    metrics = measure(shared, fit(shared, settings, scenes).packed, scenes)
    return {scene_id: each["psnr"] for scene_id, each in metrics.items()}


def methods_table(figures: dict[str, Any]) -> str:
    """A row for each method, as Markdown; PSNR in dB."""
    lines = ["| method | PSNR | SSIM | bytes | in a part | stage 1, CPU-s | CPU-s/scene | steps |", "|---" * 8 + "|"]
    for method, steps in figures["steps"].items():
        psnr, ssim, size, row, stage1, seconds = (
            figures[f"{method}_{key}"] for key in ("psnr", "ssim", "bytes", "row_bytes", "stage1_seconds", "seconds")
        )
        lines.append(
            f"| {method} | {psnr:.2f} | {ssim:.3f} | {size:,.0f} | {row:,.0f} | {stage1:.0f} | {seconds:.2f} "
            f"| {steps:,} |"
        )
    gains = [f"| {key} | {figures[key]:+.2f} |" for key in (*GAINS, "default_minus_paper_db") if key in figures]
    return "\n".join([*lines, *(["", "| figure | dB |", "|---|---|", *gains] if gains else [])])


def scenes_table(figures: dict[str, Any]) -> str:
    """PSNR scene by scene as Markdown: a column for each method, and one for the hull's gain if it was measured."""
    columns = dict(figures["scenes"])
    if "uncarved_difference_db" in figures:
        columns[f"{figures['uncarved_preset']}, hull - cuboid"] = figures["uncarved_difference_db"]
    lines = ["| scene | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for scene_id in next(iter(columns.values())):
        lines.append(f"| {scene_id} | " + " | ".join(f"{column[scene_id]:.2f}" for column in columns.values()) + " |")
    return "\n".join(lines)
