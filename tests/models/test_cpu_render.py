"""Whole views and cells by compiled loops against the torch code that they stand for."""

from __future__ import annotations

import pytest
import torch
from helpers.pixels import PIXELS

from scaling.config import make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.models import cpu_render
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.evaluate import render_views
from scaling.training.training_scene import prepare_scene

SHAPES = {
    "product": {"combine": "product", "field_layers": 2},
    "sum": {"combine": "sum", "field_layers": 1},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops_render_what_torch_renders(tiny_values, shape, monkeypatch):
    """Colours, depths and opacities of four whole views, through cells that the loops filled, too."""
    torch.manual_seed(0)
    values = merge(PIXELS, {"representation": {"base_std": 0.5, "field_activation": "relu", **SHAPES[shape]}})
    shared = SharedModel(make_settings(merge(tiny_values, values))).requires_grad_(False)
    shared.field.head.weight.mul_(20)  # an untrained field shows next to nothing
    shared.field.head.bias[0] = 10
    car = embedded_scene(embedded_ids(1)[0], 16, 8)
    micro, coefs = 5 * torch.randn(1, *shared.micro_shape), torch.randn(1, shared.coefs_mean.numel())
    hull = prepare_scene(shared, car).hull
    params = SceneParams(micro, coefs, hull[None])
    calls = []
    whole_views = cpu_render.render_whole_views
    monkeypatch.setattr(cpu_render, "render_whole_views", lambda *args: calls.append(0) or whole_views(*args))
    found, cells = render_views(shared, params, car.cam2world[:4], car.intrinsics[:4]), shared.cells_of(params)
    assert len(calls) == 1
    monkeypatch.setattr(cpu_render, "serves", lambda *_: False)
    expected, expected_cells = (
        render_views(shared, params, car.cam2world[:4], car.intrinsics[:4]),
        shared.cells_of(params),
    )
    assert len(calls) == 1 and 0.1 < expected["opacity"].mean() < 0.9 and expected_cells.unique().numel() > 5
    # Whole numbers: a density just below one may become either.
    assert ((cells.int() - expected_cells.int()).abs() <= 1).all() and (cells == expected_cells).float().mean() > 0.999
    for name, values in expected.items():
        # A cell that differs by one moves the samples of the rays through it.
        alike = torch.isclose(found[name], values, rtol=1e-3, atol=1e-3)
        assert alike.float().mean() > 0.99, name
        assert (found[name] - values).abs().mean() < 1e-4, name


def test_gradients_are_left_to_torch(tiny_values):
    shared = SharedModel(
        make_settings(merge(tiny_values, merge(PIXELS, {"representation": {"field_activation": "relu"}})))
    )
    planes = torch.zeros(1)
    assert not cpu_render.serves(shared, planes)
    with torch.no_grad():
        assert cpu_render.serves(shared, planes)
    shared.requires_grad_(False)
    assert cpu_render.serves(shared, planes) and not cpu_render.serves(shared, planes.requires_grad_())
    assert not cpu_render.serves(shared, planes.double())
