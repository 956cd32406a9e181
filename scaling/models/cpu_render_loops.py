"""Whole views and cells of one scene as compiled loops: rays, samples, field, quadrature, without gradients.

Rays that meet no cell above 0 cost next to nothing; the others go through the field a hundred at a time, so that
their numbers stay in the core's cache. Matrix products go to BLAS. The torch code of `SharedModel.render_planes` and
`Renderer` stays the reference; tests compare the two.
"""

# The loops are compiled for numpy arrays, whose types no annotation says.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from scaling.models.cpu_kernels import HALF, ONE, TWO, ZERO, into_box, place_samples, sample_and_combine, weigh_parts
from scaling.storage.compiled import compiled

f32 = np.float32


class World(NamedTuple):
    """What all scenes share. low, high: corners of the box [3]; unit: of distances; parts, blur, evenly: see
    `sampling.surface_depths`; columns [P, 2]: see `triplanes.axis_columns`; product: how planes combine; backgrounds [1
    or h · w, C]; size: of latents; forward: weights of the field's layers [in, out]; biases [1, out]."""

    low: Any
    high: Any
    unit: Any
    parts: int
    blur: int
    evenly: Any
    columns: Any
    product: bool
    backgrounds: Any
    size: int
    forward: Any
    biases: Any


class Chunk(NamedTuple):
    """Memory for R rays of D samples on their way through the field.

    ray [R]: their numbers; depths [R, D]; lengths [R, D − 1]; points [1, R · D, 3]; sampled [1, 1, P, F]: without
    meaning; features [R · D, F]; hidden: of each hidden layer [R · D, width]; heads [R · D, 1 + C].
    """

    ray: Any
    depths: Any
    lengths: Any
    points: Any
    sampled: Any
    features: Any
    hidden: Any
    heads: Any


@compiled(fastmath=True)
def through_field(world, room):
    """Fill room.hidden and room.heads from room.features."""
    inputs, last = room.features, len(world.forward) - 1
    for layer in range(last):
        outputs, bias = room.hidden[layer], world.biases[layer]
        np.dot(inputs, world.forward[layer], outputs)
        for row in range(len(outputs)):
            out = outputs[row]
            for k in range(np.uint64(len(out))):
                out[k] = max(out[k] + bias[0, k], ZERO)
        inputs = outputs
    np.dot(inputs, world.forward[last], room.heads)
    for row in range(len(room.heads)):
        for k in range(room.heads.shape[1]):
            room.heads[row, k] += world.biases[last][0, k]


@compiled()
def query(texels, world, chunk):
    """Fill chunk.heads from chunk.points, through texels [1, P, K², F] and the field."""
    features = chunk.features.reshape(1, *chunk.features.shape)
    sample_and_combine(texels, chunk.points, world.columns, world.product, False, chunk.sampled, features)
    through_field(world, chunk)


@compiled()
def composite(heads, depths, lengths, background, colours):
    """Fill colours [C] in [−1, 1] of a ray: `quadrature` and `composite`. heads [D, 1 + C]; depths [D]; lengths
    [D − 1]; background [C] in [0, 1]. → its depth and its opacity."""
    through, opacity, depth = ONE, ZERO, ZERO
    colours[:] = ZERO
    for d in range(len(depths) - 1):
        raw = (heads[d, 0] + heads[d + 1, 0]) * HALF - ONE
        density = max(raw, ZERO) + f32(math.log1p(math.exp(-abs(raw))))  # softplus, without overflow of exp
        lost = -f32(math.expm1(-density * lengths[d]))
        weight = through * lost
        through *= ONE - lost
        opacity += weight
        depth += weight * (depths[d] + depths[d + 1]) * HALF
        # An interval's colour is the mean of its ends; ends become colours once, in `shade`.
        for c in range(len(colours)):
            colours[c] += weight * (heads[d, 1 + c] + heads[d + 1, 1 + c]) * HALF
    for c in range(len(colours)):
        colours[c] = TWO * (colours[c] + (ONE - opacity) * background[c]) - ONE
    last = depths[len(depths) - 1]
    return (last if opacity < f32(1e-8) else min(max(depth / opacity, depths[0]), last)), opacity


@compiled()
def shade(count, texels, world, chunk, colours, depths, opacities):
    """Render the first `count` rays of the chunk; what lies behind them in its memory is of earlier chunks."""
    query(texels, world, chunk)
    samples, channels = chunk.depths.shape[1], colours.shape[1]
    for n in range(count):
        heads, ray = chunk.heads[n * samples : (n + 1) * samples], chunk.ray[n]
        for d in range(samples):
            for c in range(channels):
                heads[d, 1 + c] = f32(1.002) / (ONE + f32(math.exp(-heads[d, 1 + c]))) - f32(0.001)
        background = world.backgrounds[ray % len(world.backgrounds)]
        depth, opacities[ray] = composite(heads, chunk.depths[n], chunk.lengths[n], background, colours[ray])
        depths[ray] = depth * world.unit


@compiled()
def render_rays(origins, directions, cells, texels, world, chunk, colours, depths, opacities):
    """Fill colours [R, C] in [−1, 1], depths [R] in world units, opacities [R] of rays (origins, directions [R, 3]) of
    whole views, through a scene's cells [side³] and texels [1, P, K², F]."""
    start, along = np.empty(3, f32), np.empty(3, f32)
    weights, cdf, before = np.empty(world.parts, f32), np.empty(world.parts + 1, f32), np.empty(world.parts + 1, f32)
    numbers, samples = np.empty(world.parts, np.int32), chunk.depths.shape[1]
    places, side, count = np.full(samples, HALF), round(len(cells) ** (1 / 3)), 0
    for ray in range(len(origins)):
        near, far = into_box(origins[ray], directions[ray], world.low, world.high, world.unit, start, along)
        step = (far - near) / f32(world.parts)
        if step > 0 and weigh_parts(start, along, near, step, cells, side, numbers, weights, before):
            found = chunk.depths[count]
            place_samples(
                weights, before, near, step, places, world.blur, world.evenly, cdf, found, chunk.lengths[count]
            )
            for sample in range(samples):
                for axis in range(3):
                    chunk.points[0, count * samples + sample, axis] = start[axis] + found[sample] * along[axis]
            chunk.ray[count] = ray
            count += 1
        else:
            background = world.backgrounds[ray % len(world.backgrounds)]
            for c in range(len(background)):
                colours[ray, c] = TWO * background[c] - ONE
            depths[ray], opacities[ray] = far * world.unit, ZERO
        if count == len(chunk.ray) or (count and ray == len(origins) - 1):
            shade(count, texels, world, chunk, colours, depths, opacities)
            count = 0


@compiled()
def fill_cells(cells, texels, world, chunk):
    """Fill the cells [side³] above 0 of a scene with 1 + the density at their centres, at most 255."""
    side, count = round(len(cells) ** (1 / 3)), 0
    chosen = np.flatnonzero(cells)
    most = chunk.points.shape[1]
    for first in range(0, len(chosen), most):
        count = min(most, len(chosen) - first)
        for n in range(count):
            place = chosen[first + n]
            for axis in range(2, -1, -1):
                chunk.points[0, n, axis] = f32(2 * (place % side) + 1) / f32(side) - ONE
                place //= side
        query(texels, world, chunk)
        for n in range(count):
            raw = chunk.heads[n, 0] - ONE
            density = max(raw, ZERO) + f32(math.log1p(math.exp(-abs(raw))))
            cells[chosen[first + n]] = np.uint8(min(ONE + density, f32(255)))
