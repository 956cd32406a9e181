"""What fit.py and stage1.py measure with: a clock of CPU time that can be stopped, and PSNR curves over this time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from scaling.config import Rendering, make_settings, merge
from scaling.data.scene_views import SceneViews
from scaling.models.renderer import Renderer
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.evaluate import render_views
from scaling.training.measure.background import measure_background
from scaling.training.metrics.images import psnr
from scaling.training.process_group import Workers
from scaling.training.training_scene import prepare_scene


class Clock:
    """CPU seconds of this process since the clock was made, without the time spent within `stopped`."""

    def __init__(self) -> None:
        self._start = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self._start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context in which the clock stands still."""
        before = time.process_time()
        try:
            yield
        finally:
            self._start += time.process_time() - before


@dataclass(frozen=True)
class Point:
    """PSNR in dB on test views, mean over scenes. latent: rendered against encoded latents; unadapted: images decoded
    by the autoencoder's own decoder; decoded: images decoded by the model's decoder."""

    step: int
    seconds: float
    latent: float
    unadapted: float
    decoded: float


@dataclass
class Curve:
    """Points in the order of their steps."""

    points: list[Point] = field(default_factory=list)

    @property
    def end(self) -> Point:
        return self.points[-1]

    def seconds_to(self, key: str, target: float) -> float | None:
        """CPU seconds at the first point whose PSNR `key` reaches the target; None where no point does."""
        return next((point.seconds for point in self.points if getattr(point, key) >= target), None)

    def plain(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(point) for point in self.points]


@torch.no_grad()
def test_point(
    shared: SharedModel, scenes: Sequence[SceneViews], params: SceneParams, step: int, seconds: float
) -> Point:
    """Measure the scenes on their test views. params: one row for each scene, in the same order."""
    sums = torch.zeros(3, dtype=torch.float64)
    for row, views in enumerate(scenes):
        test = list(views.test_views)
        truth = views.images[test]
        out = render_views(shared, params[row : row + 1], views.cam2world[test], views.intrinsics[test])
        encoded = shared.autoencoder.encode(truth)
        unadapted = shared.autoencoder.decode(out["latents"])
        pairs = ((out["latents"] / 2, encoded / 2), (unadapted, truth), (out["images"], truth))
        sums += torch.tensor([psnr(*pair).mean().item() for pair in pairs], dtype=torch.float64)
    return Point(step, seconds, *(sums / len(scenes)).tolist())


@torch.no_grad()
def autoencoder_ceiling(shared: SharedModel, scenes: Sequence[SceneViews]) -> float:
    """PSNR of the test views encoded and decoded, mean over scenes."""
    sums = 0.0
    for views in scenes:
        truth = views.images[list(views.test_views)]
        sums += psnr(shared.autoencoder.decode(shared.autoencoder.encode(truth)), truth).mean().item()
    return sums / len(scenes)


def render_as(shared: SharedModel, rendering: Rendering, scenes: Sequence[SceneViews]) -> SharedModel:
    """Change a published model in place so that it is sampled as ours is, and return it.

    Rays are sampled in each scene's hull, in front of the background that is measured on the views of stage 1's
    `scenes`. The planes still span their own box.
    """
    values = merge(shared.settings.model_dump(), {"rendering": rendering.model_dump()})
    shared.settings = make_settings(values)
    old = shared.renderer
    shared.renderer = Renderer(
        old.plane_axes, old.box, rendering.near, rendering.far, rendering.samples, rendering.importance_samples,
        old.combine,
    )  # fmt: skip
    shared.background = shared.background.expand(shared.latent_size**2, -1).clone()
    ready = [prepare_scene(shared, views) for views in scenes]
    shared.background.copy_(measure_background(shared, ready, torch.ones(3), Workers()))
    return shared


def every(steps: Sequence[int], action: Callable[[int], None]) -> Callable[[str, int, float], None]:
    """An on_step for `fit_scenes` that calls action(steps done) after each of the given numbers of steps."""
    wanted = set(steps)

    def on_step(_: str, step: int, __: float) -> None:
        if step + 1 in wanted:
            action(step + 1)

    return on_step
