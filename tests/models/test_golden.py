"""Our renderer against numbers from an independent implementation of the paper's settings (tests/models/golden.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scaling.cameras import Rays, look_at_origin, pixel_rays
from scaling.models.autoencoders.normalised import denormalise, normalise
from scaling.models.box import Box
from scaling.models.field import Field
from scaling.models.renderer import Renderer, composite, quadrature
from scaling.models.sampling import importance_depths
from scaling.models.triplanes import fuse_planes, sample_planes, total_variation

PUBLISHED_AXES = ("xy", "xz", "zx")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "golden.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]).float() for key in file}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=tolerance, atol=tolerance)


def test_cameras_and_rays(golden):
    close(look_at_origin(golden["cam_azimuth"], golden["cam_elevation"], golden["cam_radius"]), golden["cam2world"])
    rays = pixel_rays(golden["cam2world"], golden["intrinsics"], 8, 8)
    close(rays.origins, golden["ray_origins_8"])
    close(rays.directions, golden["ray_directions_8"])


@pytest.mark.parametrize("side", ["2", "1.5"])
def test_plane_features(golden, side):
    ours = sample_planes(golden["point_planes"], golden["points"] * (2 / float(side)), PUBLISHED_AXES)
    close(ours.transpose(2, 3), golden[f"point_features_box{side}"])


def test_quadrature(golden):
    depths, raw = golden["march_depths"][..., 0], golden["march_densities"][..., 0]
    colours, depth, opacity, weights = quadrature(depths, raw, golden["march_colors"])
    close(composite(colours, opacity, golden["render_bg"]), golden["march_out"])
    close(weights, golden["march_weights"])
    close(depth, golden["march_out_depth"])


def test_importance_sampling(golden):
    depths, weights = golden["march_depths"][..., 0], golden["march_weights"][..., 0]
    close(importance_depths(depths, weights, torch.full((2, 5, 16), 0.5)), golden["importance_z_half"])
    close(importance_depths(depths, weights, golden["importance_u"].reshape(2, 5, 16)), golden["importance_z_u"])


def test_end_to_end_with_gradients(golden):
    field = Field(32, 64, 4)
    names = {"hidden": "mlp0", "head": "mlp2"}
    with torch.no_grad():
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                getattr(getattr(field, ours), part).copy_(golden[f"render_{theirs}.{part}"])
    planes = golden["render_planes"].requires_grad_()
    # Published depths are linspace + half a step of a 48-sample ladder that includes both ends.
    step = (2.1 - 0.5) / 47
    renderer = Renderer(PUBLISHED_AXES, Box(2.0), 0.5, 0.5 + 48 * step, samples=48, importance_samples=48)
    rays = pixel_rays(golden["render_cam2world"], golden["render_intrinsics"], 16, 16)
    out = renderer(planes, field, Rays(rays.origins, rays.directions), golden["render_bg"])
    close(out.colours.transpose(1, 2), golden["render_image"])
    close(out.depth, golden["render_depth"], 1e-4)
    target = golden["render_target"].reshape(2, 4, 256).transpose(1, 2)
    loss = (out.colours.clamp(-1, 1) - target).square().mean()
    close(loss.detach(), golden["render_loss"])
    loss.backward()
    gradients = {"planes": planes.grad}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            gradients[f"{theirs}.{part}"] = getattr(getattr(field, ours), part).grad
    for name, ours in gradients.items():
        theirs = golden[f"render_grad_{name}"]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


def test_fusion(golden):
    index = golden["fuse_index"].long()
    ours = fuse_planes(golden["fuse_micro_planes"][index], golden["fuse_coefs"][index], golden["fuse_base_planes"])
    theirs = golden["fuse_tri_planes"].clone()
    theirs[:, :, 10:] -= golden["fuse_bias"][index]  # the published bias is never trained; ours has none
    close(ours, theirs)


def test_total_variation(golden):
    close(total_variation(golden["tv_in"]) * golden["tv_in"].shape[0], golden["tv_2_2"])


def test_normalisation(golden):
    close(normalise(golden["normalise_z"], 0.02), golden["normalise_norm"])
    close(denormalise(golden["normalise_y"], 0.02), golden["normalise_denorm"], 1e-4)
