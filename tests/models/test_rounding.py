"""Planes rounded as they will be stored, in a fit's last steps and in a library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaling.config import make_settings, merge
from scaling.library.scene_row import pack_scene, unpack_scene
from scaling.models.rounding import LEVELS, best_scale, rounded, to_levels
from scaling.models.triplanes import SceneParams
from scaling.training.fit_frozen import fit_scenes
from scaling.training.fit_random_rays import Rounding

DTYPES = list(LEVELS)


def planes_on_levels(dtype: str, seed: int = 0) -> Tensor:
    """Two planes of three channels, whole numbers times a scale of each; most of the levels, or few of them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = LEVELS[dtype]
    most = torch.tensor([high, max(1, high // 2), 1, high, 2, high]).view(2, 3, 1, 1)
    levels = (torch.rand(2, 3, 9, 9, generator=generator) * 2 - 1) * most
    if dtype != "int8":  # of which the lowest level is not used
        levels[0, 0, 0, 0] = low
    return levels.round() * torch.tensor([0.3, 0.007, 11.0, 1.0, 0.1, 1 / 3]).view(2, 3, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_rounded_already_stays_as_it_is(dtype):
    planes = planes_on_levels(dtype)
    again = rounded(planes, best_scale(planes, dtype), dtype)
    tolerance = 0.5 / 127 if dtype == "int8" else 1e-6  # int8 is scaled by its largest value alone
    assert ((again - planes).abs() <= tolerance * planes.abs().amax((2, 3), keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_stay_in_their_range(dtype):
    planes = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) ** 3
    levels = to_levels(planes, best_scale(planes, dtype), dtype)
    assert levels.min() >= LEVELS[dtype][0] and levels.max() <= LEVELS[dtype][1]


def test_fewer_levels_lose_more():
    planes = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = [(rounded(planes, best_scale(planes, dtype), dtype) - planes).square().mean() for dtype in DTYPES]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.1 and errors[-1] < 1e-3


def test_a_fit_rounds_from_its_step_on():
    micro = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    params, rows = SceneParams(micro.clone(), torch.zeros(2, 1)), torch.arange(2)
    rounding = Rounding(params, "int4", first=10)
    assert rounding.scale_at(9, rows) is None
    rounding.finish()
    assert torch.equal(params.micro_planes, micro), "no step was taken with rounded planes"
    torch.testing.assert_close(rounding.scale_at(10, rows), best_scale(micro, "int4"))
    found = rounded(micro, best_scale(micro, "int4"), "int4")
    rounding.finish()
    assert torch.equal(params.micro_planes, found)
    floats = Rounding(params, "float16", first=0)
    assert floats.scale_at(5, rows) is None


@pytest.mark.parametrize("dtype", ["int3", "int4", "int6"])
def test_what_a_fit_ends_with_is_what_a_library_stores(tiny_values, tiny_scenes, dtype):
    from scaling.models.shared_model import SharedModel

    settings = make_settings(merge(tiny_values, {"stage2": {"micro_dtype": dtype, "rgb": {"num_epochs": 0}}}))
    torch.manual_seed(0)
    shared = SharedModel(settings).requires_grad_(False)
    for fitted in fit_scenes(shared, tiny_scenes[:2], settings):
        assert fitted.params.micro_planes.abs().max() > 0
        back = unpack_scene(vars(pack_scene(fitted.params, dtype)))
        torch.testing.assert_close(back.micro_planes, fitted.params.micro_planes, rtol=0, atol=1e-6)
        assert torch.equal(back.hull, fitted.params.hull)
