"""The camera doctor: looks at a few scenes of a source, and says what it sees and which convention its poses have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.data.readers.conventions import AXES, POSES, Convention, as_read
from scaling.data.scene_views import SceneViews
from scaling.training.measure.agreement import agreement
from scaling.training.measure.box import DISAGREES, MOST_COVERED, NoBounds, scene_bounds
from scaling.training.measure.region import looked_at
from scaling.training.measure.visual_hull import background_of, silhouettes

AGREES = 0.8  # silhouettes that hulls fill to this part: the cameras are right; below DISAGREES they are wrong
BETTER = 0.25  # by how much another convention must fill more, to be recommended


@dataclass(frozen=True)
class Finding:
    """What the doctor sees of one scene: a line for people; `agrees`: how well silhouettes agree under each convention,
    as `agreement` measures it; None where silhouettes tell nothing."""

    line: str
    agrees: Mapping[Convention, float] | None


def examine(views: SceneViews, convention: Convention) -> Finding:
    """Look at one scene, whose poses were read by a convention."""
    shown = silhouettes(views)
    covered = shown.float().mean().item()
    said = [_distance(views), f"background {colour_name(views)}"]
    agrees = None
    if 0 < covered <= MOST_COVERED:
        agrees = _of_all(views, shown, convention)
        said += [_object(views), f"silhouettes agree to {agrees[convention]:.0%}"]
    else:
        said.append("its views show nothing but background" if not covered else "nothing to carve with")
    return Finding(f"scene {views.scene_id}: {', '.join(said)}", agrees)


def scene_fault(views: SceneViews, shown: Tensor, convention: Convention) -> str:
    """What is wrong with the cameras of one scene, where that is certain; "" elsewhere. shown: as in `agreement`."""
    if not 0 < shown.float().mean().item() <= MOST_COVERED:
        return ""
    return verdict([Finding("", _of_all(views, shown, convention))], convention, certain=True)


def _of_all(views: SceneViews, shown: Tensor, convention: Convention) -> dict[Convention, float]:
    """How well silhouettes agree under each convention."""
    return {
        Convention(poses, axes): agreement(views, shown, _read_as(views.cam2world, convention, poses, axes))
        for poses in POSES
        for axes in AXES
    }


def _read_as(cam2world: Tensor, convention: Convention, poses: str, axes: str) -> Tensor:
    """Camera-to-world matrices [V, 4, 4] as another convention would have read the same files."""
    written = cam2world.double() @ torch.from_numpy(AXES[convention.axes])
    written = torch.linalg.inv(written) if convention.poses == "world2cam" else written
    return torch.from_numpy(as_read(written.numpy(), Convention(poses, axes))).float()


def verdict(findings: Sequence[Finding], convention: Convention, certain: bool = False) -> str:
    """What is wrong with the cameras, and what to do; "" where nothing is, or silhouettes do not tell.

    certain: only where another convention is right.
    """
    known = [finding.agrees for finding in findings if finding.agrees is not None]
    if not known:
        return ""
    means = {each: sum(agrees[each] for agrees in known) / len(known) for each in known[0]}
    now, best = means[convention], max(means, key=means.__getitem__)
    if now >= AGREES or (now >= DISAGREES and means[best] < now + BETTER):
        return ""
    told = f"silhouettes of the views agree to {now:.0%} under the poses as they were read ({convention})"
    if means[best] >= max(AGREES, now + BETTER):
        return f"{told}, to {means[best]:.0%} as {best}: give {best.flags}"
    if certain:
        return ""
    return (
        f"{told}, and to at most {means[best]:.0%} under any other convention: check the focal lengths, which view "
        "belongs to which pose, and that the images are not mirrored"
    )


def _distance(views: SceneViews) -> str:
    region = looked_at(views.cam2world, views.intrinsics)
    if region is None:
        return "cameras look at no point together"
    middle = region.mean(0)
    distances = (views.cam2world[:, :3, 3] - middle).norm(dim=1)
    return f"{len(distances)} cameras {_range(distances)} from {_point(middle, distances.median())}, where they look"


def _object(views: SceneViews) -> str:
    try:
        low, high = scene_bounds(views)
    except NoBounds as error:
        return str(error)
    sides = " x ".join(f"{side:.3g}" for side in (high - low).tolist())
    return f"object {sides} around {_point((low + high) / 2, (high - low).max())}"


def colour_name(views: SceneViews) -> str:
    """The colour of a scene's background, for people."""
    colour = background_of(views)
    if views.alpha is not None:
        return "transparent"
    if colour is None:
        return "of no one colour"
    numbers = [round(255 * value) for value in colour.tolist()]
    return {(255,) * 3: "white", (0,) * 3: "black"}.get(tuple(numbers), "rgb({}, {}, {})".format(*numbers))


def _range(values: Tensor) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _point(point: Tensor, scale: Tensor) -> str:
    """A point of the world; numbers that are nearly 0 beside the scene's scale are 0."""
    return f"({', '.join('0' if abs(value) < 0.005 * scale else f'{value:.3g}' for value in point.tolist())})"
