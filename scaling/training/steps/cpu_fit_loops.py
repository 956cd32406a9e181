"""All steps of a scene's fit on random rays as one compiled loop: rays, samples, render, error, gradient, Adam.

A scene's planes, cells and activations then stay in the core's cache from step to step, and no step waits for Python.
Matrix products go to BLAS.
"""

# The loops are compiled for numpy arrays, whose types no annotation says.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from scaling.models.cpu_kernels import (
    composite_error,
    into_box,
    ray_through,
    sample_and_combine,
    scatter_gradient,
    surface_depths,
)
from scaling.models.cpu_render_loops import through_field
from scaling.storage.compiled import compiled
from scaling.training.optim import BETAS, EPSILON

f32 = np.float32
ZERO = f32(0)
FIRST, SECOND = BETAS


class Task(NamedTuple):
    """What all scenes of a fit share beside the model's World. weight: of the loss; base [M, P · K² · F_mac]: base
    planes; back: weights of the field's layers [out, in]."""

    weight: float
    base: Any
    back: Any


class Scene(NamedTuple):
    """A scene's rays and where it is. drawn [n]: latent pixels to draw from; cam2world [V, 4, 4]; intrinsics
    [V, 3, 3]; latents [V · size², C]; cells [CELLS³]."""

    drawn: Any
    cam2world: Any
    intrinsics: Any
    latents: Any
    cells: Any


class Moving(NamedTuple):
    """What moves, with Adam's moments: micro [P, K², ≥ F_mic], whose first `own` features count, and coefs [M]. scale
    [P, F_mic]: planes are seen as whole multiples of it between low and high; [0, 0]: as they are."""

    own: int
    micro: Any
    micro_first: Any
    micro_second: Any
    coefs: Any
    coefs_first: Any
    coefs_second: Any
    scale: Any
    low: Any
    high: Any


class Room(NamedTuple):
    """Memory that steps reuse: getting it from the system takes longer than filling it.

    texels, at_texels: fused planes [1, P, K², F] and their gradient; at_own [1, P, K², ≥ F_mic]: of micro planes alone;
    points [R, D, 3]; lengths [1, R, D − 1]; sampled [1, R · D, P, F]; features, at_features [R · D, F]; hidden,
    at_hidden: of each hidden layer [R · D, width]; heads, at_heads [R · D, 1 + C]; mixed, at_mixed [P · K² · F_mac]:
    the base planes' mixture and its gradient.
    """

    texels: Any
    at_texels: Any
    at_own: Any
    points: Any
    lengths: Any
    sampled: Any
    features: Any
    at_features: Any
    hidden: Any
    at_hidden: Any
    heads: Any
    at_heads: Any
    mixed: Any
    at_mixed: Any


@compiled()
def choose_rays(uniforms, scene, chosen, targets):
    """Fill chosen [n, R], the latent pixels of all rays of n steps, and targets [n, R, C]. uniforms [n, R, 1 + D]: the
    first number chooses. Apart from the steps, so that many reads from memory are under way at once."""
    count = len(scene.drawn)
    for step in range(chosen.shape[0]):
        for ray in range(chosen.shape[1]):
            # A number just below 1 times a large count may round up to the count.
            chosen[step, ray] = scene.drawn[min(int(uniforms[step, ray, 0] * f32(count)), count - 1)]
    for step in range(chosen.shape[0]):
        for ray in range(chosen.shape[1]):
            for channel in range(targets.shape[2]):
                targets[step, ray, channel] = scene.latents[chosen[step, ray], channel]


@compiled()
def draw_samples(uniforms, chosen, scene, world, points, lengths):
    """Fill points [R, D, 3] in the box's coordinates and lengths [R, D − 1] of a step's rays, through the latent pixels
    chosen [R]. uniforms [R, 1 + D]: all but the first number place the samples."""
    start, along, origin, direction = np.empty(3, f32), np.empty(3, f32), np.empty(3, f32), np.empty(3, f32)
    weights, cdf, before = np.empty(world.parts, f32), np.empty(world.parts + 1, f32), np.empty(world.parts + 1, f32)
    numbers, depths = np.empty(world.parts, np.int32), np.empty(points.shape[1], f32)
    side = round(len(scene.cells) ** (1 / 3))
    for ray in range(len(chosen)):
        view, pixel = chosen[ray] // world.size**2, chosen[ray] % world.size**2
        ray_through(scene.cam2world[view], scene.intrinsics[view], pixel, world.size, origin, direction)
        near, far = into_box(origin, direction, world.low, world.high, world.unit, start, along)
        surface_depths(
            start, along, near, far, scene.cells, side, uniforms[ray, 1:], world.blur, world.evenly,
            numbers, weights, cdf, before, depths, lengths[ray],
        )  # fmt: skip
        for sample in range(len(depths)):
            for axis in range(3):
                points[ray, sample, axis] = start[axis] + depths[sample] * along[axis]


@compiled(fastmath=True)
def fuse(moving, mixed, texels):
    """Fill texels [P, K², F]: micro planes, rounded where there are scales, beside the mixture of base planes [P · K² ·
    F_mac]."""
    planes, places, own = moving.micro.shape[0], moving.micro.shape[1], moving.own
    shared = texels.shape[2] - own
    for plane in range(planes):
        for place in range(places):
            texel, micro = texels[plane, place], moving.micro[plane, place]
            for k in range(np.uint64(own)):
                texel[k] = micro[k]
            if len(moving.scale):
                for k in range(np.uint64(own)):
                    scale = moving.scale[plane, k]
                    level = np.rint(micro[k] / scale)
                    texel[k] = min(max(level, moving.low), moving.high) * scale
            first = np.uint64((plane * places + place) * shared)
            for k in range(np.uint64(shared)):
                texel[np.uint64(own) + k] = mixed[first + k]


@compiled(fastmath=True)
def back_through_field(task, room):
    """Fill room.at_features from room.at_heads."""
    gradient = room.at_heads
    for layer in range(len(task.back) - 1, 0, -1):
        at_inputs, active = room.at_hidden[layer - 1], room.hidden[layer - 1]
        np.dot(gradient, task.back[layer], at_inputs)
        for row in range(len(active)):
            out, value = at_inputs[row], active[row]
            for k in range(np.uint64(len(out))):
                out[k] = out[k] if value[k] > ZERO else ZERO
        gradient = at_inputs
    np.dot(gradient, task.back[0], room.at_features)


# A part of its one caller: what was optimised on its own grows, and takes long, when it is optimised once more.
@compiled(inline="always")
def gradients(uniforms, chosen, targets, scene, world, task, moving, room, at_texels):
    """One step's render and error, and its gradient in at_texels [1, P, K², ≥ F_mic]. → the error.

    uniforms [R, 1 + D]; chosen [R]; targets [R, C].
    """
    rays, samples = room.points.shape[:2]
    points = room.points.reshape(1, rays * samples, 3)
    features = room.features.reshape(1, rays * samples, room.features.shape[1])
    heads = room.heads.reshape(1, rays, samples, room.heads.shape[1])
    pixels, error = (chosen % world.size**2).reshape(1, rays), np.empty(1, f32)
    fuse(moving, room.mixed, room.texels[0])
    draw_samples(uniforms, chosen, scene, world, room.points, room.lengths[0])
    sample_and_combine(room.texels, points, world.columns, world.product, True, room.sampled, features)
    through_field(world, room)
    composite_error(
        heads, room.lengths, world.backgrounds, pixels, targets.reshape(1, rays, targets.shape[1]), task.weight,
        error, room.at_heads.reshape(heads.shape),
    )  # fmt: skip
    back_through_field(task, room)
    at_texels[:] = ZERO
    at_features = room.at_features.reshape(features.shape)
    scatter_gradient(at_features, room.sampled, points, world.columns, world.product, at_texels)
    return error[0]


@compiled()
def gradient_of_coefs(at_texels, own, base, at_mixed):
    """The gradient in the coefs [M], of that in the texels [P, K², F] whose first `own` features are the scene's."""
    planes, places, width = at_texels.shape
    shared = width - own
    for plane in range(planes):
        for place in range(places):
            first = (plane * places + place) * shared
            for k in range(shared):
                at_mixed[first + k] = at_texels[plane, place, own + k]
    return np.dot(base, at_mixed)


@compiled(fastmath=True)
def adam(values, first, second, gradient, rate, count):
    """Adam's step number `count`, from 1: moves values [N]; first, second, gradient [N]."""
    from_first, from_second = f32(rate / (1 - FIRST**count)), f32(1 / math.sqrt(1 - SECOND**count))
    keep, new, keep_square, new_square = f32(FIRST), f32(1 - FIRST), f32(SECOND), f32(1 - SECOND)
    for k in range(np.uint64(len(values))):
        one = keep * first[k] + new * gradient[k]
        two = keep_square * second[k] + new_square * gradient[k] * gradient[k]
        first[k], second[k] = one, two
        values[k] -= from_first * one / (math.sqrt(two) * from_second + f32(EPSILON))


@compiled()
def fit_scene(uniforms, scene, world, task, moving, room, rates, before, moves, losses):
    """Take n steps of one scene; `moving` moves in place, losses [n] are filled.

    uniforms [n, R, 1 + D] in [0, 1); rates [n, 2]: learning rates of micro planes and coefs; before: the number of
    steps taken before.
    """
    num_steps, num_rays = uniforms.shape[:2]
    chosen = np.empty((num_steps, num_rays), np.int64)
    targets = np.empty((num_steps, num_rays, scene.latents.shape[1]), f32)
    choose_rays(uniforms, scene, chosen, targets)
    # Macro features lie behind micro features, so where coefs stand still the first ones are enough.
    at_texels = room.at_texels if moves[1] else room.at_own
    for step in range(num_steps):
        if len(moving.coefs) and (step == 0 or moves[1]):
            np.dot(moving.coefs, task.base, room.mixed)
        losses[step] = gradients(
            uniforms[step], chosen[step], targets[step], scene, world, task, moving, room, at_texels
        )  # fmt: skip
        count = before + step + 1
        if moves[0]:
            if moves[1]:
                room.at_own[:] = at_texels[..., : room.at_own.shape[3]]
            adam(
                moving.micro.ravel(), moving.micro_first.ravel(), moving.micro_second.ravel(), room.at_own.ravel(),
                rates[step, 0], count,
            )  # fmt: skip
        if moves[1]:
            at_coefs = gradient_of_coefs(at_texels[0], moving.own, task.base, room.at_mixed)
            adam(moving.coefs, moving.coefs_first, moving.coefs_second, at_coefs, rates[step, 1], count)
