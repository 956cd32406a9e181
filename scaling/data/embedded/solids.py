"""Trace rays against a few painted convex solids in numpy: exactly, with one matrix product for all half-spaces.

Coordinates and distances are in the solids' own units. A `Paint` maps points [N, 3] and outward normals [N, 3] on a
solid's surface to colours [N, 3] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Paint = Callable[[Floats, Floats], Floats]

# The lights stand still and the shading is diffuse: a surface point has the same colour in every view.
_LIGHT = np.array([0.44, 0.36, 0.8224], dtype=np.float32)
_FILL = np.array([-0.6, -0.8, 0.0], dtype=np.float32)  # makes sides in the shade differ from each other
_TINY = np.float32(1e-9)


@dataclass(frozen=True)
class Polyhedron:
    """The points p with normals · p <= offsets; they lie in the box [low, high].

    normals: [H, 3] of length 1; offsets: [H]; low, high: [3].
    """

    normals: Floats
    offsets: Floats
    low: Floats
    high: Floats
    paint: Paint


@dataclass(frozen=True)
class Cylinder:
    """A cylinder with flat caps, its axis parallel to y through centre [3]."""

    centre: Floats
    radius: float
    half_width: float
    paint: Paint

    @property
    def low(self) -> Floats:
        return self.centre - np.array([self.radius, self.half_width, self.radius], dtype=np.float32)

    @property
    def high(self) -> Floats:
        return self.centre + np.array([self.radius, self.half_width, self.radius], dtype=np.float32)


Solid = Polyhedron | Cylinder


def prism(
    profile: Sequence[tuple[float, float]],
    half_width: float,
    paint: Paint,
    top_half_width: float | None = None,
    cuts: Sequence[tuple[tuple[float, float, float], float]] = (),
) -> Polyhedron:
    """Extrude a convex side view along y, to both sides.

    profile: corners (x, z), counter-clockwise with x to the right and z up. half_width: the extent to each side at the
    lowest corner; top_half_width: the extent at the highest corner, by default the same. cuts: further half-spaces
    (normal, offset).
    """
    corners = np.array(profile, dtype=np.float64)
    along = np.roll(corners, -1, axis=0) - corners
    outward = np.stack([along[:, 1], np.zeros(len(along)), -along[:, 0]], axis=1)
    bottom, top = corners[:, 1].min(), corners[:, 1].max()
    # The side planes lean linearly with height: ±y + lean · z <= half_width + lean · bottom.
    lean = (half_width - (half_width if top_half_width is None else top_half_width)) / (top - bottom)
    sides = np.array([[0, 1, lean], [0, -1, lean]])
    normals = [*outward, *sides, *(normal for normal, _ in cuts)]
    on_profile = np.insert(corners, 1, 0.0, axis=1)
    offsets = [*(outward * on_profile).sum(1), *[half_width + lean * bottom] * 2, *(offset for _, offset in cuts)]
    lengths = np.linalg.norm(normals, axis=1)
    widest = max(half_width, top_half_width or 0.0)
    return Polyhedron(
        normals=(np.array(normals) / lengths[:, None]).astype(np.float32),
        offsets=(np.array(offsets) / lengths).astype(np.float32),
        low=np.array([corners[:, 0].min(), -widest, bottom], dtype=np.float32),
        high=np.array([corners[:, 0].max(), widest, top], dtype=np.float32),
        paint=paint,
    )


def box(low: Sequence[float], high: Sequence[float], paint: Paint) -> Polyhedron:
    """An axis-aligned box from corner low [3] to corner high [3]."""
    below, above = np.array(low, dtype=np.float32), np.array(high, dtype=np.float32)
    normals = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    return Polyhedron(normals, np.concatenate([above, -below]), below, above, paint)


def plain(colour: Sequence[float]) -> Paint:
    """A paint of one colour everywhere."""
    return lambda points, normals: np.broadcast_to(np.array(colour, dtype=np.float32), points.shape)


def bounds(solids: Sequence[Solid]) -> tuple[Floats, Floats]:
    """(low [3], high [3]) of a box around all solids."""
    return np.min([solid.low for solid in solids], axis=0), np.max([solid.high for solid in solids], axis=0)


def trace(solids: Sequence[Solid], origin: Floats, directions: Floats) -> tuple[Floats, Floats]:
    """Trace rays from one point outside the solids.

    origin: [3], directions: [N, 3] of length 1 → colours [N, 3] in [0, 1], distances [N]. Where nothing is hit, the
    colour is white and the distance infinite.
    """
    colours = np.ones_like(directions)
    distances = np.full(len(directions), np.inf, dtype=np.float32)
    low, high = bounds(solids)
    planes = np.concatenate([np.eye(3, dtype=np.float32), -np.eye(3, dtype=np.float32)])
    enter, leave = _interval(_crossings(planes, np.concatenate([high, -low]), origin, directions), slice(None))
    near = np.flatnonzero((enter < leave) & (leave > 0))  # the other rays miss the bounding box
    if len(near):
        colours[near], distances[near] = _trace_all(solids, origin, directions[near])
    return colours, distances


def _trace_all(solids: Sequence[Solid], origin: Floats, directions: Floats) -> tuple[Floats, Floats]:
    """`trace`, without the test of the bounding box."""
    polyhedra = [solid for solid in solids if isinstance(solid, Polyhedron)]
    cylinders = [solid for solid in solids if isinstance(solid, Cylinder)]
    normals = np.concatenate([solid.normals for solid in polyhedra])
    crossings = _crossings(normals, np.concatenate([solid.offsets for solid in polyhedra]), origin, directions)
    # The half-spaces of all polyhedra lie in one array; `spans` tells which of them belong to which polyhedron.
    nearest = np.full(len(directions), np.inf, dtype=np.float32)
    which = np.full(len(directions), -1)
    ends = np.cumsum([len(solid.offsets) for solid in polyhedra])
    spans = [slice(end - len(solid.offsets), end) for solid, end in zip(polyhedra, ends)]
    for index, span in enumerate(spans):
        enter, leave = _interval(crossings, span)
        closer = (enter < leave) & (enter > 0) & (enter < nearest)
        nearest[closer], which[closer] = enter[closer], index
    for index, cylinder in enumerate(cylinders, start=len(polyhedra)):
        enter = _enter_cylinder(cylinder, origin, directions)
        closer = enter < nearest
        nearest[closer], which[closer] = enter[closer], index

    # Only the nearest solid of each ray is painted.
    colours = np.ones_like(directions)
    ordered: list[Solid] = [*polyhedra, *cylinders]
    for index, solid in enumerate(ordered):
        seen = np.flatnonzero(which == index)
        if len(seen) == 0:
            continue
        points = origin + nearest[seen, None] * directions[seen]
        # A ray enters a polyhedron through the half-space that it enters last: that face is the visible one.
        if isinstance(solid, Polyhedron):
            facing = solid.normals[crossings[0][spans[index]][:, seen].argmax(0)]
        else:
            facing = _cylinder_normals(solid, points)
        light = 0.52 + 0.48 * np.maximum(facing @ _LIGHT, 0) + 0.1 * np.maximum(facing @ _FILL, 0)
        colours[seen] = np.clip(solid.paint(points, facing) * light[:, None], 0, 1)
    return colours, nearest


def _crossings(normals: Floats, offsets: Floats, origin: Floats, directions: Floats) -> tuple[Floats, Floats]:
    """Distances [H, N] at which rays enter each half-space, and distances [H, N] at which they leave it.

    A ray crosses a plane once: a ray that leaves the half-space entered it at -inf; one that enters it leaves at inf.
    """
    slope = normals @ directions.T
    slope = np.where(np.abs(slope) < _TINY, _TINY, slope)
    at = (offsets - normals @ origin)[:, None] / slope
    inwards = slope < 0
    return np.where(inwards, at, -np.inf), np.where(inwards, np.inf, at)


def _interval(crossings: tuple[Floats, Floats], span: slice) -> tuple[Floats, Floats]:
    """Distances [N] at which each ray enters and leaves the intersection of the half-spaces in `span`."""
    return crossings[0][span].max(0), crossings[1][span].min(0)


def _enter_cylinder(cylinder: Cylinder, origin: Floats, directions: Floats) -> Floats:
    """Distances [N] at which rays enter the cylinder, infinite for rays that miss it."""
    # The cylinder is the intersection of an infinite one (a quadratic equation) and the slab between its caps.
    start = origin - cylinder.centre
    across = np.maximum(directions[:, 0] ** 2 + directions[:, 2] ** 2, _TINY)
    middle = -(directions[:, 0] * start[0] + directions[:, 2] * start[2]) / across
    inside = middle**2 - (start[0] ** 2 + start[2] ** 2 - cylinder.radius**2) / across
    half = np.sqrt(np.maximum(inside, 0))
    slope = np.where(np.abs(directions[:, 1]) < _TINY, _TINY, directions[:, 1])
    caps = np.stack([(-cylinder.half_width - start[1]) / slope, (cylinder.half_width - start[1]) / slope])
    enter, leave = np.maximum(middle - half, caps.min(0)), np.minimum(middle + half, caps.max(0))
    return np.where((inside > 0) & (enter < leave) & (enter > 0), enter, np.float32(np.inf))


def _cylinder_normals(cylinder: Cylinder, points: Floats) -> Floats:
    offset = points - cylinder.centre
    on_cap = np.abs(offset[:, 1]) > cylinder.half_width - 1e-4
    normals = np.where(on_cap[:, None], offset * [0, 1, 0], offset * [1, 0, 1])
    length = np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), _TINY)
    return (normals / length).astype(np.float32)
