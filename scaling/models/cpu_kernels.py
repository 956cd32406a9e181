"""What a step does most on a CPU, as loops that Numba compiles: where to sample rays, and planes' features at points.

In torch each of these is dozens of passes over small tensors; here a ray or a point goes through all of them while it
is in the core's cache. The torch code stays the reference (`Box.parts` with `sampling.surface_depths`, and
`triplanes.sample_planes` with `combine_planes`); tests hold the two against each other, gradients included. Compiled
code is kept beside this file, as Python keeps its own.
"""

# The loops are compiled from numpy arrays, whose types no annotation says.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math

import numpy as np
from numba import njit

COMPILED = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**COMPILED)
def surface_samples(
    origins, directions, low, high, cells, jitter, middle, num_cells, num_parts, blur, evenly, depths, lengths, ends
):
    """Rays [S, R, 3], the box's corners [3] each, cells [S, num_cells³], jitter [S, R, D], or [1, 1, D] where `middle`.
    Fills depths [S, R, D], lengths [S, R, D − 1] and ends [S, R, 3]: where the
    ray enters and leaves the box, and whether it meets a cell above 0. See `sampling.surface_depths`."""
    samples = depths.shape[2]
    above = np.empty(num_parts, np.bool_)
    weights = np.empty(num_parts, np.float32)
    cdf = np.empty(num_parts + 1, np.float32)
    before = np.empty(num_parts + 1, np.float32)
    centre, scale = np.empty(3, np.float32), np.empty(3, np.float32)
    for axis in range(3):
        centre[axis] = (low[axis] + high[axis]) / np.float32(2)
        scale[axis] = np.float32(2) / (high[axis] - low[axis])
    half = np.float32(num_cells / 2)
    for scene in range(origins.shape[0]):
        grid = cells[scene]
        for ray in range(origins.shape[1]):
            near, far = np.float32(0), np.float32(np.inf)
            start, along = np.empty(3, np.float32), np.empty(3, np.float32)
            for axis in range(3):
                start[axis] = (origins[scene, ray, axis] - centre[axis]) * scale[axis]
                along[axis] = directions[scene, ray, axis] * scale[axis]
                safe = along[axis] if abs(along[axis]) >= 1e-9 else np.float32(1e-9)
                first, second = (-1 - start[axis]) / safe, (1 - start[axis]) / safe
                near, far = max(near, min(first, second)), min(far, max(first, second))
            far = max(near, far)
            step = (far - near) / np.float32(num_parts)
            # Parts in cells above 0, and the weight that volume rendering gives each.
            through, total, filled = np.float32(1), np.float32(0), 0
            for part in range(num_parts):
                depth = near + step * np.float32(part + 0.5)
                number = 0
                for axis in range(3):
                    place = int((start[axis] + depth * along[axis] + 1) * half)
                    number = number * num_cells + min(max(place, 0), num_cells - 1)
                value = grid[number]
                above[part] = value > 0
                weights[part] = 0
                if value > 0:
                    kept = np.float32(math.exp(-(np.float32(value) - np.float32(0.5)) * step))
                    weights[part] = through * (1 - kept)
                    through *= kept
                    filled += 1
            # Of each the largest beside it; spread the rest evenly; summed up.
            cdf[0], before[0] = 0, 0
            for part in range(num_parts):
                largest = np.float32(0)
                if above[part]:
                    for other in range(max(part - blur, 0), min(part + blur + 1, num_parts)):
                        largest = max(largest, weights[other])
                cdf[part + 1] = largest
                total += largest
            share = np.float32(evenly) / max(filled, 1)
            for part in range(num_parts):
                mass = (share if above[part] else np.float32(0)) + (1 - evenly) * cdf[part + 1] / max(total, 1e-9)
                cdf[part + 1] = cdf[part] + mass
                before[part + 1] = before[part] + (1 if above[part] else 0)
            whole = max(cdf[num_parts], np.float32(1e-9))
            # Strata ascend, so the parts that they fall into do.
            part, last = 0, np.float32(0)
            for sample in range(samples):
                place = jitter[0, 0, sample] if middle else jitter[scene, ray, sample]
                wanted = (sample + place) / np.float32(samples) * whole
                while part < num_parts - 1 and cdf[part + 1] <= wanted:
                    part += 1
                inside = (wanted - cdf[part]) / max(cdf[part + 1] - cdf[part], np.float32(1e-9))
                inside = min(max(inside, np.float32(0)), np.float32(1))
                depths[scene, ray, sample] = near + (part + inside) * step
                now = before[part] + (before[part + 1] - before[part]) * inside
                if sample:
                    lengths[scene, ray, sample - 1] = (now - last) * step
                last = now
            ends[scene, ray, 0], ends[scene, ray, 1] = near, far
            ends[scene, ray, 2] = filled > 0 and step > 0


@njit(**COMPILED)
def texels_of(x, y, size, places, weights):
    """The four texels of a plane around a point in [−1, 1], row by row, and their weights; 0 beyond the edge."""
    across, down = (x + 1) * np.float32(size / 2) - np.float32(0.5), (y + 1) * np.float32(size / 2) - np.float32(0.5)
    # Far points must not overflow an int; beyond the edge all weights are 0.
    across, down = (
        min(max(across, np.float32(-2)), np.float32(size + 1)),
        min(max(down, np.float32(-2)), np.float32(size + 1)),
    )
    left, top = math.floor(across), math.floor(down)
    for corner in range(4):
        column, row = int(left) + corner % 2, int(top) + corner // 2
        weight = (across - left if corner % 2 else 1 - (across - left)) * (
            down - top if corner // 2 else 1 - (down - top)
        )
        within = 0 <= column < size and 0 <= row < size
        places[corner] = min(max(row, 0), size - 1) * size + min(max(column, 0), size - 1)
        weights[corner] = weight if within else np.float32(0)


@njit(fastmath=True, **COMPILED)
def sample_and_combine(texels, points, columns, product, keeps, sampled, features):
    """texels [S, P, K², F], points [S, N, 3], columns [P, 2]: the coordinates along width and height of each plane.
    Fills features [S, N, F]: Π (1 + f) − 1 over the planes, or their sum, and where it `keeps` them sampled
    [S, N, P, F], what each plane says."""
    size = int(math.sqrt(texels.shape[2]) + 0.5)
    num_planes, width = texels.shape[1], texels.shape[3]
    places, weights = np.empty(4, np.int64), np.empty(4, np.float32)
    for scene in range(points.shape[0]):
        for point in range(points.shape[1]):
            out = features[scene, point]
            for plane in range(num_planes):
                texels_of(
                    points[scene, point, columns[plane, 0]],
                    points[scene, point, columns[plane, 1]],
                    size,
                    places,
                    weights,
                )
                table = texels[scene, plane]
                found = sampled[scene, point, plane] if keeps else sampled[0, 0, plane]
                a, b, c, d = table[places[0]], table[places[1]], table[places[2]], table[places[3]]
                for k in range(width):
                    found[k] = weights[0] * a[k] + weights[1] * b[k] + weights[2] * c[k] + weights[3] * d[k]
                if product:
                    for k in range(width):
                        out[k] = (1 + found[k]) * (out[k] if plane else np.float32(1))
                else:
                    for k in range(width):
                        out[k] = found[k] + (out[k] if plane else np.float32(0))
            if product:
                for k in range(width):
                    out[k] -= 1


@njit(fastmath=True, **COMPILED)
def scatter_gradient(gradient, sampled, points, columns, product, texels):
    """The gradient [S, N, F] of features on to texels [S, P, K², F], which is 0 before; see `sample_and_combine`."""
    size = int(math.sqrt(texels.shape[2]) + 0.5)
    num_planes, width = texels.shape[1], texels.shape[3]
    places, weights = np.empty(4, np.int64), np.empty(4, np.float32)
    own = np.empty(width, np.float32)
    for scene in range(points.shape[0]):
        for point in range(points.shape[1]):
            for plane in range(num_planes):
                texels_of(
                    points[scene, point, columns[plane, 0]],
                    points[scene, point, columns[plane, 1]],
                    size,
                    places,
                    weights,
                )
                for k in range(width):
                    own[k] = gradient[scene, point, k]
                if product:  # d/df_p of Π (1 + f) is the product of the others
                    for other in range(num_planes):
                        if other != plane:
                            for k in range(width):
                                own[k] *= 1 + sampled[scene, point, other, k]
                table = texels[scene, plane]
                for corner in range(4):
                    if weights[corner] != 0:
                        row = table[places[corner]]
                        for k in range(width):
                            row[k] += weights[corner] * own[k]
