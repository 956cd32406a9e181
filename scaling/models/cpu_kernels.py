"""The most frequent work on a CPU, as loops that Numba compiles: sampling of rays, features of points, compositing.

In torch each of these makes dozens of passes over small tensors; here all of them happen to a ray while it is in the
core's cache. The torch code stays the reference (`rays_through`, `surface_depths`, `sample_planes` with
`combine_planes`, `quadrature`); tests compare the two, gradients included. Compiled code is cached beside this file, as
Python caches its own. Feature counts are unsigned integers: only then does the compiler know that no index is negative
(which would count from an array's end), and vectorises the loops over features, eight at once.
"""

# The loops are compiled for numpy arrays, whose types no annotation says.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np

from scaling.storage.compiled import compiled

f32 = np.float32
# A Python number in their place would make Numba continue in double precision.
ZERO, HALF, ONE, TWO, TINY = f32(0), f32(0.5), f32(1), f32(2), f32(1e-9)


@compiled()
def into_box(origin, direction, low, high, unit, start, along):
    """Fill start and along [3]: a ray (origin, direction [3]) in the box's coordinates; see `Box.into`. low, high: the
    box's corners [3]; unit: of distances. → distances at which the ray enters and leaves the box, equal where it
    misses."""
    near, far = ZERO, f32(np.inf)
    for axis in range(3):
        half = (high[axis] - low[axis]) / TWO
        start[axis] = (origin[axis] - (low[axis] + high[axis]) / TWO) / half
        along[axis] = direction[axis] * (unit / half)
        safe = along[axis] if abs(along[axis]) >= TINY else TINY
        first, second = (-ONE - start[axis]) / safe, (ONE - start[axis]) / safe
        near, far = max(near, min(first, second)), min(far, max(first, second))
    return near, max(near, far)


@compiled(fastmath=True)
def cells_along(start, along, near, step, side, numbers):
    """Fill numbers [parts]: the cells in which the middles of a ray's parts lie. Several parts at once: the compiler
    vectorises this loop."""
    half, last = f32(side / 2), np.int32(side - 1)
    x, y, z = (start[0] + ONE) * half, (start[1] + ONE) * half, (start[2] + ONE) * half
    dx, dy, dz = along[0] * half, along[1] * half, along[2] * half
    for part in range(np.uint64(len(numbers))):
        depth = near + step * (f32(part) + HALF)
        i, j, k = np.int32(x + depth * dx), np.int32(y + depth * dy), np.int32(z + depth * dz)
        i, j, k = min(max(i, np.int32(0)), last), min(max(j, np.int32(0)), last), min(max(k, np.int32(0)), last)
        numbers[part] = (i * np.int32(side) + j) * np.int32(side) + k


@compiled()
def weigh_parts(start, along, near, step, cells, side, numbers, weights, before):
    """Fill weights [parts]: those of a ray's parts in volume rendering; and before [parts + 1]: how many of the first
    n parts lie in cells above 0. → how many do in all.

    cells [side³]; numbers [parts]: scratch memory.
    """
    cells_along(start, along, near, step, side, numbers)
    through, filled = ONE, 0
    before[0] = 0
    for part in range(len(weights)):
        value = cells[numbers[part]]
        weights[part] = 0
        if value > 0:
            filled += 1
            if through > f32(1e-7):
                kept = f32(math.exp(-(f32(value) - HALF) * step))
                weights[part] = through * (ONE - kept)
                through *= kept
        before[part + 1] = filled
    return filled


@compiled()
def place_samples(weights, before, near, step, places, blur, evenly, cdf, depths, lengths):
    """Fill depths [D] and lengths [D − 1] of a ray's samples like `sampling.surface_depths`.

    weights [parts], before [parts + 1]: from `weigh_parts`; places [D] in the strata, in [0, 1); cdf [parts + 1]:
    scratch memory.
    """
    parts = len(weights)
    # A cell is coarser than a surface, so a part takes the largest weight within `blur` of it. The CDF mixes these
    # weights with an even distribution.
    total = ZERO
    for part in range(parts):
        largest = ZERO
        if before[part + 1] > before[part]:
            for other in range(max(part - blur, 0), min(part + blur + 1, parts)):
                largest = max(largest, weights[other])
        cdf[part + 1] = largest
        total += largest
    share, scale = evenly / max(before[parts], ONE), (ONE - evenly) / max(total, TINY)
    cdf[0] = 0
    for part in range(parts):
        cdf[part + 1] = cdf[part] + share * (before[part + 1] - before[part]) + scale * cdf[part + 1]
    whole = max(cdf[parts], TINY)
    # Inverting the CDF takes one pass: strata ascend, and so do the parts that they fall into.
    part, last = 0, ZERO
    for sample in range(len(depths)):
        wanted = (f32(sample) + places[sample]) / f32(len(depths)) * whole
        while part < parts - 1 and cdf[part + 1] <= wanted:
            part += 1
        inside = (wanted - cdf[part]) / max(cdf[part + 1] - cdf[part], TINY)
        inside = min(max(inside, ZERO), ONE)
        depths[sample] = near + (f32(part) + inside) * step
        now = before[part] + (before[part + 1] - before[part]) * inside
        if sample:
            lengths[sample - 1] = (now - last) * step
        last = now


@compiled()
def surface_depths(
    start, along, near, far, cells, side, places, blur, evenly, numbers, weights, cdf, before, depths, lengths
):  # fmt: skip
    """Draw one ray's samples: `weigh_parts` and `place_samples`. → whether the ray meets a cell above 0."""
    step = (far - near) / f32(len(weights))
    filled = weigh_parts(start, along, near, step, cells, side, numbers, weights, before)
    place_samples(weights, before, near, step, places, blur, evenly, cdf, depths, lengths)
    return filled > 0 and step > 0


@compiled()
def surface_samples(
    origins, directions, low, high, unit, cells, places, parts, blur, evenly, depths, lengths, far, hit
):  # fmt: skip
    """Fill depths [S, R, D], lengths [S, R, D − 1], far [S, R] and hit [S, R]; see `sampling.samples_in`.

    origins, directions [S, R, 3]; low, high: the box's corners [3]; unit: of distances; cells [S, side³]; places
    [S, R, D] in the strata.
    """
    start, along = np.empty(3, f32), np.empty(3, f32)
    weights, cdf, before = np.empty(parts, f32), np.empty(parts + 1, f32), np.empty(parts + 1, f32)
    numbers = np.empty(parts, np.int32)
    side = round(cells.shape[1] ** (1 / 3))
    for s in range(origins.shape[0]):
        for r in range(origins.shape[1]):
            near, far[s, r] = into_box(origins[s, r], directions[s, r], low, high, unit, start, along)
            hit[s, r] = surface_depths(
                start, along, near, far[s, r], cells[s], side, places[s, r], blur, evenly,
                numbers, weights, cdf, before, depths[s, r], lengths[s, r],
            )  # fmt: skip


@compiled()
def ray_through(cam2world, intrinsics, pixel, size, origin, direction):
    """Fill origin and direction [3] of the ray through a pixel of a square image; see `cameras.rays_through`."""
    u, v = (f32(pixel % size) + HALF) / f32(size), (f32(pixel // size) + HALF) / f32(size)
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    x = (u - intrinsics[0, 2] - intrinsics[0, 1] * y) / intrinsics[0, 0]
    norm = ZERO
    for axis in range(3):
        origin[axis] = cam2world[axis, 3]
        direction[axis] = cam2world[axis, 0] * x + cam2world[axis, 1] * y + cam2world[axis, 2]
        norm += direction[axis] * direction[axis]
    for axis in range(3):
        direction[axis] /= math.sqrt(norm)


@compiled()
def neighbours(point, size, places, weights):
    """Fill the two texels beside each coordinate of a point [3]: places [3, 2], and their linear weights [3, 2], which
    are 0 beyond the edge. Coordinates are in [−1, 1] inside the box; size: texels a side."""
    for axis in range(3):
        # Points far away must not overflow an int.
        at = min(max((point[axis] + ONE) * f32(size / 2) - HALF, f32(-2)), f32(size + 1))
        low = math.floor(at)
        part = at - f32(low)
        places[axis, 0], places[axis, 1] = min(max(low, 0), size - 1), min(max(low + 1, 0), size - 1)
        weights[axis, 0] = ONE - part if 0 <= low < size else ZERO
        weights[axis, 1] = part if -1 <= low < size - 1 else ZERO


@compiled(fastmath=True)
def sample_and_combine(texels, points, columns, product, keeps, sampled, features):
    """Fill features [S, N, F] of points [S, N, 3]: Π (1 + f) − 1 over the planes where `product` is true, or their sum;
    and where `keeps` is true, sampled [S, N, P, F], each plane's own features.

    texels [S, P, K², F]; columns [P, 2]: the coordinates along width and height of each plane.
    """
    size, num_planes, width = round(math.sqrt(texels.shape[2])), texels.shape[1], np.uint64(texels.shape[3])
    places, weights = np.empty((3, 2), np.int64), np.empty((3, 2), f32)
    for s in range(points.shape[0]):
        for n in range(points.shape[1]):
            neighbours(points[s, n], size, places, weights)
            out = features[s, n]
            for k in range(width):
                out[k] = ONE if product else ZERO
            for plane in range(num_planes):
                x, y = columns[plane, 0], columns[plane, 1]
                table, found = texels[s, plane], sampled[s if keeps else 0, n if keeps else 0, plane]
                # Texels a, b above and c, d below the projection; bilinear weights are products of linear ones.
                top, bottom = places[y, 0] * size, places[y, 1] * size
                a, b = table[top + places[x, 0]], table[top + places[x, 1]]
                c, d = table[bottom + places[x, 0]], table[bottom + places[x, 1]]
                at_a, at_b = weights[y, 0] * weights[x, 0], weights[y, 0] * weights[x, 1]
                at_c, at_d = weights[y, 1] * weights[x, 0], weights[y, 1] * weights[x, 1]
                for k in range(width):
                    found[k] = at_a * a[k] + at_b * b[k] + at_c * c[k] + at_d * d[k]
                if product:
                    for k in range(width):
                        out[k] *= ONE + found[k]
                else:
                    for k in range(width):
                        out[k] += found[k]
            if product:
                for k in range(width):
                    out[k] -= ONE


@compiled(fastmath=True)
def scatter_gradient(gradient, sampled, points, columns, product, texels):
    """Add the gradient of features [S, N, ≥ F] (its first F numbers) to that of texels [S, P, K², F], which must be 0
    before; sampled, points, columns, product: see `sample_and_combine`."""
    size, num_planes, width = round(math.sqrt(texels.shape[2])), texels.shape[1], np.uint64(texels.shape[3])
    places, weights, own = np.empty((3, 2), np.int64), np.empty((3, 2), f32), np.empty(width, f32)
    for s in range(points.shape[0]):
        for n in range(points.shape[1]):
            neighbours(points[s, n], size, places, weights)
            for plane in range(num_planes):
                x, y = columns[plane, 0], columns[plane, 1]
                for k in range(width):
                    own[k] = gradient[s, n, k]
                if product:  # d/df_p of Π (1 + f) is the product of the others
                    for other in range(num_planes):
                        if other != plane:
                            said = sampled[s, n, other]
                            for k in range(width):
                                own[k] *= ONE + said[k]
                # Each of the four texels takes its bilinear share.
                table = texels[s, plane]
                for corner in range(4):
                    i, j = corner // 2, corner % 2
                    weight = weights[y, i] * weights[x, j]
                    row = table[places[y, i] * size + places[x, j]]
                    for k in range(width):
                        row[k] += weight * own[k]


@compiled()
def _back_through_ray(towards, back, colours, weights, after, slope, lengths, wanted, out):
    """Fill `out` [D, 1 + C], the gradient of a ray's error with respect to what the field's head says of its D samples.

    towards [C]: the error's derivative by each composited colour; back [C]: the background; colours [D, C]; weights,
    after (transmittance behind each interval), slope (of the density) [D]; lengths [D − 1]; wanted [D]: room.
    """
    # wanted: the error's derivative by the weight of each interval.
    for d in range(len(weights) - 1):
        wanted[d] = 0
        for c in range(len(towards)):
            wanted[d] += towards[c] * ((colours[d, c] + colours[d + 1, c]) * HALF - back[c])
    # More density in an interval raises its own weight and dims all intervals after it: going from the far end,
    # `behind` adds up what those lose.
    out[:] = 0
    behind = ZERO
    for d in range(len(weights) - 2, -1, -1):
        at_raw = (wanted[d] * after[d] - behind) * lengths[d] * slope[d] * HALF
        behind += wanted[d] * weights[d]
        out[d, 0] += at_raw
        out[d + 1, 0] += at_raw
        for c in range(len(towards)):
            out[d, 1 + c] += towards[c] * weights[d] * HALF
            out[d + 1, 1 + c] += towards[c] * weights[d] * HALF
    # Through the sigmoid, whose value is recovered from the colour.
    for d in range(len(weights)):
        for c in range(len(towards)):
            part = (colours[d, c] + f32(0.001)) / f32(1.002)
            out[d, 1 + c] *= f32(1.002) * part * (ONE - part)


@compiled()
def composite_error(heads, lengths, backgrounds, pixels, targets, weight, errors, gradient):
    """Render rays and propagate their error back: `quadrature`, `composite`, the mean squared error and its gradient.

    heads [S, R, D, 1 + C]: the field's raw density, and colours before the sigmoid; lengths [S, R, D − 1]; backgrounds
    [1 or h · w, C]; pixels [S, R]; targets [S, R, C] in [−1, 1]. Fills errors [S], each scene's mean times `weight`,
    and `gradient`, that of the errors' sum with respect to heads.
    """
    num_rays, samples, channels = heads.shape[1], heads.shape[2], heads.shape[3] - 1
    density, slope, weights = np.empty(samples, f32), np.empty(samples, f32), np.empty(samples, f32)
    after, wanted = np.empty(samples, f32), np.empty(samples, f32)
    colours, towards = np.empty((samples, channels), f32), np.empty(channels, f32)
    per_value = f32(weight / (num_rays * channels))
    for s in range(heads.shape[0]):
        total = 0.0
        for r in range(num_rays):
            head, back = heads[s, r], backgrounds[pixels[s, r] if len(backgrounds) > 1 else 0]
            for d in range(samples):
                for c in range(channels):
                    colours[d, c] = f32(1.002) / (ONE + f32(math.exp(-head[d, 1 + c]))) - f32(0.001)
            through, opacity = ONE, ZERO
            for d in range(samples - 1):
                # Softplus, without overflow of exp; slope is its derivative.
                raw = (head[d, 0] + head[d + 1, 0]) * HALF - ONE
                e = f32(math.exp(-abs(raw)))
                density[d] = max(raw, ZERO) + f32(math.log1p(e))
                slope[d] = (ONE if raw >= ZERO else e) / (ONE + e)
                kept = f32(math.exp(-density[d] * lengths[s, r, d]))
                weights[d] = through * (ONE - kept)
                through *= kept
                after[d] = through
                opacity += weights[d]
            # The error, and towards: its derivative by each composited colour in [0, 1].
            for c in range(channels):
                colour = (ONE - opacity) * back[c]
                for d in range(samples - 1):
                    colour += weights[d] * (colours[d, c] + colours[d + 1, c]) * HALF
                difference = TWO * colour - ONE - targets[s, r, c]
                total += difference * difference
                towards[c] = f32(4) * difference * per_value
            _back_through_ray(towards, back, colours, weights, after, slope, lengths[s, r], wanted, gradient[s, r])
        errors[s] = total * per_value
