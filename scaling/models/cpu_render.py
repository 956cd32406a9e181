"""Whole views and cells of scenes by the loops of cpu_render_loops.py, on torch tensors, without gradients."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from scaling.cameras import Rays
from scaling.models.box import STEPS
from scaling.models.cpu_ops import as_numpy, takes
from scaling.models.cpu_render_loops import Chunk, World, fill_cells, render_rays
from scaling.models.renderer import RenderOutput
from scaling.models.sampling import BLUR, EVENLY
from scaling.models.triplanes import axis_columns

if TYPE_CHECKING:
    from scaling.models.shared_model import SharedModel

RAYS = 128  # that go through the field together: their numbers fit into a core's cache


def takes_model(shared: SharedModel) -> bool:
    """Whether the loops of a CPU take a model: samples in hulls, a field with ReLU, single precision on a CPU."""
    hulls = shared.settings.rendering.sampled == "hull"
    relu = shared.settings.representation.field_activation == "relu"
    return hulls and relu and takes(shared.background, shared.base_planes)


def serves(shared: SharedModel, *tensors: Tensor) -> bool:
    """Whether these loops take a model and tensors: `takes_model`, one pass of samples, and no gradient wanted."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *shared.parameters()))
    one_pass = not shared.settings.rendering.importance_samples
    return one_pass and not wanted and takes_model(shared) and takes(*tensors)


def world_of(shared: SharedModel) -> World:
    """The part of a model that all its scenes share, as the loops take it."""
    renderer, field = shared.renderer, shared.field
    low, high = map(as_numpy, renderer.box.bounds)
    layers = (field.hidden, *field.more, field.head)
    return World(
        low, high, np.float32(float(renderer.box.unit)), STEPS, BLUR, np.float32(EVENLY),
        columns=np.array(axis_columns(renderer.plane_axes)),
        product=renderer.combine == "product",
        backgrounds=as_numpy(shared.background.view(-1, shared.background.shape[-1])),
        size=shared.latent_size,
        forward=tuple(as_numpy(layer.weight.T) for layer in layers),
        biases=tuple(as_numpy(layer.bias[None]) for layer in layers),
    )  # fmt: skip


@functools.cache
def _libraries() -> ThreadpoolController:
    # Numba takes BLAS from SciPy, at the first product: a library that is not loaded yet would keep its threads.
    importlib.import_module("scipy.linalg.cython_blas")
    return ThreadpoolController()  # looking for a process' libraries takes milliseconds


def one_blas_thread() -> ThreadpoolController:
    """Context manager in which BLAS uses one thread. Products of the loops are so small that more threads would wait
    for one another more than they compute."""
    return _libraries().limit(limits=1, user_api="blas")


def render_whole_views(shared: SharedModel, planes: Tensor, rays: Rays, cells: Tensor) -> RenderOutput:
    """As `SharedModel.render_planes`, of tri-planes [S, P, F, K, K], rays [S, R] of whole views and cells [S,
    CELLS³]."""
    world, chunk = world_of(shared), _chunk(shared)
    count = rays.origins.shape[:2]
    colours, depth, opacity = torch.empty(*count, shared.background.shape[-1]), torch.empty(count), torch.empty(count)
    texels = _texels(planes)
    with one_blas_thread():
        for s in range(len(planes)):
            render_rays(
                as_numpy(rays.origins[s]), as_numpy(rays.directions[s]), as_numpy(cells[s]), texels[s : s + 1],
                world, chunk, colours[s].numpy(), depth[s].numpy(), opacity[s].numpy(),
            )  # fmt: skip
    return RenderOutput(colours, depth, opacity)


def filled_cells(shared: SharedModel, planes: Tensor, hull: Tensor) -> Tensor:
    """As `SharedModel.cells`, of tri-planes [S, P, F, K, K] in hulls [S, CELLS³]."""
    world, chunk, texels = world_of(shared), _chunk(shared), _texels(planes)
    cells = hull.to(torch.uint8)  # a copy, as hulls are bool
    with one_blas_thread():
        for s in range(len(planes)):
            fill_cells(cells[s].numpy(), texels[s : s + 1], world, chunk)
    return cells


def _texels(planes: Tensor) -> np.ndarray:
    return as_numpy(planes.permute(0, 1, 3, 4, 2).flatten(2, 3))


def _chunk(shared: SharedModel) -> Chunk:
    samples, field = shared.renderer.samples, shared.field
    points, width = RAYS * samples, field.hidden.in_features

    def new(*sizes: int) -> np.ndarray:
        return np.zeros(sizes, np.float32)

    return Chunk(
        ray=np.zeros(RAYS, np.int64),
        depths=new(RAYS, samples),
        lengths=new(RAYS, samples - 1),
        points=new(1, points, 3),
        sampled=new(1, 1, len(shared.renderer.plane_axes), width),
        features=new(points, width),
        hidden=tuple(new(points, layer.out_features) for layer in (field.hidden, *field.more)),
        heads=new(points, field.head.out_features),
    )
