"""Trace rays exactly against a few painted convex solids.

Coordinates and distances are in the solids' own units. A `Paint` maps points [N, 3] and outward normals [N, 3] on a
solid's surface to colours [N, 3] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling.storage.compiled import compiled

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
    polyhedra = [solid for solid in solids if isinstance(solid, Polyhedron)]
    cylinders = [solid for solid in solids if isinstance(solid, Cylinder)]
    low, high = bounds(solids)
    # The half-spaces of all polyhedra lie in one array, after those of the box around all solids.
    axes = np.eye(3, dtype=np.float32)
    normals = np.concatenate([axes, -axes, *[solid.normals for solid in polyhedra]])
    offsets = np.concatenate([high, -low, *[solid.offsets for solid in polyhedra]])
    ends = np.cumsum([6, *[len(solid.offsets) for solid in polyhedra]])
    nearest = np.full(len(directions), np.inf, dtype=np.float32)
    which, face = np.full((2, len(directions)), -1, dtype=np.int16)
    near = np.empty(len(directions), dtype=bool)
    directions = np.ascontiguousarray(directions)
    _enter_polyhedra(normals, offsets - normals @ origin, ends, directions, near, nearest, which, face)
    near_ones = np.flatnonzero(near)
    for index, cylinder in enumerate(cylinders, start=len(polyhedra)):
        enter = _enter_cylinder(cylinder, origin, directions[near_ones])
        closer = enter < nearest[near_ones]
        nearest[near_ones[closer]], which[near_ones[closer]] = enter[closer], index

    # Only the nearest solid of each ray is painted.
    colours = np.ones_like(directions)
    ordered: list[Solid] = [*polyhedra, *cylinders]
    by_solid = np.argsort(which[near_ones], kind="stable")  # those that nothing stops, of number −1, come first
    starts = np.searchsorted(which[near_ones[by_solid]], np.arange(len(ordered) + 1))
    for index, solid in enumerate(ordered):
        seen = near_ones[by_solid[starts[index] : starts[index + 1]]]
        if len(seen) == 0:
            continue
        points = origin + nearest[seen, None] * directions[seen]
        facing = normals[face[seen]] if isinstance(solid, Polyhedron) else _cylinder_normals(solid, points)
        light = 0.52 + 0.48 * np.maximum(facing @ _LIGHT, 0) + 0.1 * np.maximum(facing @ _FILL, 0)
        colours[seen] = np.clip(solid.paint(points, facing) * light[:, None], 0, 1)
    return colours, nearest


@compiled()
def _enter_polyhedra(normals, ahead, ends, directions, near, nearest, which, face):  # type: ignore[no-untyped-def]
    """Fill for rays [N] from one origin: near: whether they meet the first polyhedron, the box around the others;
    nearest: the distance at which they enter the first of the others on their way; which: its number; face: the
    half-space through which they enter it. What is not met stays as it is.

    normals [H, 3], ahead [H]: the half-spaces as seen from the origin (normals · p <= ahead); ends [1 + S]: numbers of
    half-spaces up to the end of each polyhedron; directions [N, 3].
    """
    for ray in range(len(directions)):
        x, y, z = directions[ray, 0], directions[ray, 1], directions[ray, 2]
        first = 0
        for solid in range(len(ends)):
            # A ray crosses a plane once, into the half-space or out of it. It enters the polyhedron through the
            # half-space that it enters last, unless it has left another one before.
            enter, leave, last = -np.inf, np.inf, -1
            for half_space in range(first, ends[solid]):
                slope = normals[half_space, 0] * x + normals[half_space, 1] * y + normals[half_space, 2] * z
                at = ahead[half_space] / (slope if abs(slope) >= _TINY else _TINY)
                if slope <= -_TINY:
                    if at > enter:
                        enter, last = at, half_space
                else:
                    leave = min(leave, at)
                if enter >= leave:
                    break
            first = ends[solid]
            if not solid:
                near[ray] = enter < leave and leave > 0
                if not near[ray]:
                    break
            elif enter < leave and enter > 0 and enter < nearest[ray]:
                nearest[ray], which[ray], face[ray] = enter, solid - 1, last


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
