"""The compiled loops of a CPU against the torch code that they stand for, gradients included; and how planes' features
become a point's."""

from __future__ import annotations

import pytest
import torch
from helpers.pixels import PIXELS
from torch import Tensor

from scaling.cameras import Rays
from scaling.config import Stage2Phase, make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.models import cpu_ops
from scaling.models.box import Box
from scaling.models.cells import CELLS
from scaling.models.rounding import best_scale
from scaling.models.sampling import samples_in, surface_depths
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, combine_planes, point_features, sample_planes, texels_together
from scaling.storage import compiled
from scaling.training.random_ray_batches import RayTable
from scaling.training.steps.autograd_fit import AutogradFit, Span
from scaling.training.steps.cpu_fit import CpuFit
from scaling.training.training_scene import encode_scene, prepare_scene

PLANE_AXES = ("xy", "xz", "zy")


def planes_and_points(size: int) -> tuple[Tensor, Tensor]:
    """Two scenes; points inside, outside, on corners, edges and texel centres of the box."""
    generator = torch.Generator().manual_seed(size)
    planes = torch.randn(2, 3, 4, size, size, generator=generator)
    inside = torch.rand(2, 40, 3, generator=generator) * 2 - 1
    around = torch.randn(2, 40, 3, generator=generator) * 1.5
    edges = torch.tensor([[-1.0, 1.0, 0.0], [1 - 1 / size, -1 + 1 / size, 1.0], [1.0 + 1 / size, 0, 9], [-99, 0.1, 0]])
    return planes, torch.cat([inside, around, edges.expand(2, 4, 3)], 1)


@pytest.mark.parametrize("combine", ["sum", "product"])
@pytest.mark.parametrize("size", [2, 5, 16])
def test_features_are_those_of_grid_sample(size, combine):
    planes, points = planes_and_points(size)
    expected = combine_planes(sample_planes(planes, points, PLANE_AXES), combine).transpose(1, 2)
    torch.testing.assert_close(point_features(planes, points, PLANE_AXES, combine), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_so_are_their_gradients(combine):
    planes, points = planes_and_points(7)
    weights = torch.randn(2, points.shape[1], 4, generator=torch.Generator().manual_seed(0))
    first, second = planes.clone().requires_grad_(), planes.clone().requires_grad_()
    (point_features(first, points, PLANE_AXES, combine) * weights).sum().backward()
    reference = combine_planes(sample_planes(second, points, PLANE_AXES), combine).transpose(1, 2)
    (reference * weights).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("jittered", [True, False])
def test_rays_are_sampled_where_the_reference_samples_them(jittered):
    """Two scenes of random densities, one of them empty but for a ball; rays from around, some of which miss the
    box."""
    generator = torch.Generator().manual_seed(0)
    box = Box(None, "box")
    box.corners.copy_(torch.tensor([[-0.5, -0.4, -0.3], [0.5, 0.6, 0.2]]))
    centres = box.centres()
    cells = torch.randint(0, 256, (2, CELLS**3), generator=generator, dtype=torch.uint8)
    cells[1] *= (centres.norm(dim=-1) < 0.6).byte()
    origins = torch.nn.functional.normalize(torch.randn(2, 200, 3, generator=generator), dim=-1) * 1.3
    towards = torch.randn(2, 200, 3, generator=generator) * 0.3 - origins
    rays = Rays(origins, torch.nn.functional.normalize(towards, dim=-1))
    jitter = torch.rand(2, 200, 9, generator=generator) if jittered else None
    found = samples_in(box, rays, cells, 9, jitter)
    parts = box.parts(rays, cells)
    depths, lengths = surface_depths(parts, 9, jitter)
    # A place on the border of two cells may be rounded to either, so a ray in a hundred differs.
    hit = found.hit & parts.hit
    assert (found.hit != parts.hit).sum() <= 4 and 0.3 < hit.float().mean() < 0.95
    torch.testing.assert_close(found.far, parts.far, rtol=1e-5, atol=1e-5)
    alike = ((found.depths - depths).abs().amax(-1) < 1e-4) & ((found.lengths - lengths).abs().amax(-1) < 1e-4)
    assert alike[hit].float().mean() > 0.98


def test_double_precision_and_points_with_gradients_take_the_reference():
    planes, points = planes_and_points(5)
    expected = point_features(planes, points, PLANE_AXES, "product")
    exact = point_features(planes.double(), points.double(), PLANE_AXES, "product")
    torch.testing.assert_close(expected, exact.float(), rtol=1e-4, atol=1e-4)
    moved = points.clone().requires_grad_()
    point_features(planes, moved, PLANE_AXES, "product").sum().backward()
    assert moved.grad.abs().sum() > 0


def test_features_of_three_planes_combine():
    """½, −½ and 3: their sum is 3, their product 1.5 · 0.5 · 4 − 1 = 2."""
    features = torch.tensor([0.5, -0.5, 3.0]).view(1, 3, 1, 1)
    assert combine_planes(features, "sum").item() == 3.0
    assert combine_planes(features, "product").item() == 2.0


def test_zero_planes_are_neutral():
    planes, points = planes_and_points(5)
    zero = torch.zeros_like(planes)
    assert point_features(zero, points, PLANE_AXES, "product").abs().max() == 0
    one = zero.clone()
    one[:, 1] = planes[:, 1]
    alone = point_features(one, points, PLANE_AXES, "product")
    torch.testing.assert_close(alone, point_features(one, points, PLANE_AXES, "sum"), rtol=1e-5, atol=1e-5)


SHAPES = {
    "product of micro and base planes": {"combine": "product", "field_layers": 2},
    "sum of micro and base planes": {"combine": "sum", "field_layers": 1},
    "micro planes alone": {"macro_features": 0, "num_base_planes": 0, "field_layers": 2},
    "base planes alone": {"micro_features": 0},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_of_loops_are_steps_by_autograd(tiny_values, shape):
    """Losses, planes and coefs after one and after several steps, also of planes that are rounded, of some scenes, and
    with coefs that stand still. After the first step, Adam's first moment is a tenth of the gradient."""
    torch.manual_seed(0)
    values = merge(PIXELS, {"representation": {"base_std": 0.5, "field_activation": "relu", **SHAPES[shape]}})
    shared = SharedModel(make_settings(merge(tiny_values, values))).requires_grad_(False)
    shared.field.head.weight.mul_(5)  # an untrained field shows next to nothing
    cars = [embedded_scene(scene_id, 16, 8) for scene_id in embedded_ids(3)]
    scenes = [encode_scene(shared, prepare_scene(shared, car)) for car in cars]
    # Every step asks for a step count of each scene, as with early stopping.
    phase = Stage2Phase(rays_per_item=20, loss={"latent": 0.7}, lr={"micro_planes": 1e-2, "coefs": 2e-2}, check_every=9)
    assert CpuFit.serves(shared, phase)
    table, cells = RayTable(shared, scenes), torch.stack([scene.cells * 5 for scene in scenes])
    micro, coefs = torch.randn(3, *shared.micro_shape) * 0.3, torch.randn(3, shared.coefs_mean.numel())
    given = [SceneParams(texels_together(micro), coefs.clone()) for _ in range(2)]
    loops, reference = (
        CpuFit(shared, phase, table, given[0], "int4"),
        AutogradFit(shared, phase, table, given[1], "int4"),
    )
    both = [key for key, values in (("micro_planes", micro), ("coefs", coefs)) if values.numel()]
    scale = best_scale(micro, "int4") if micro.numel() else None
    all_rows, step = torch.arange(3), 0
    for num_steps, moving, scales, rows in (
        (1, both, None, all_rows), (4, both, None, all_rows), (3, both[:1], None, all_rows),
        (3, both[:1], scale, all_rows), (2, both[:1], None, all_rows[:2]),
    ):  # fmt: skip
        uniforms = torch.rand(len(rows), num_steps, 20, 1 + shared.renderer.uniforms_per_ray)
        factors = [torch.linspace(1, 0.5, len(rows))] * num_steps
        span = Span(step, rows, moving, factors, uniforms, cells[rows], None if scales is None else scales[rows])
        step += num_steps
        for found, expected in zip(loops.take(span), reference.take(span), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        if step == 1:
            for moment, key in ((loops.moments[0][..., : loops.own], "micro_planes"), (loops.moments[2], "coefs")):
                if key in both:
                    expected = reference.optimiser.adams[key].first
                    expected = expected if key == "coefs" else expected.permute(0, 1, 3, 4, 2).flatten(2, 3)
                    assert expected.abs().max() > 1e-6
                    torch.testing.assert_close(torch.from_numpy(moment), expected, rtol=1e-3, atol=1e-7)
        for key in both:
            found, expected = getattr(given[0], key), getattr(given[1], key)
            assert (found - expected).abs().mean() < 1e-4, "Adam divides by the size of a gradient, however small"


def test_what_loops_cannot_do_is_left_to_autograd(tiny_values):
    phase = Stage2Phase(rays_per_item=20, lr={"micro_planes": 1e-2})
    for over in ({"field_activation": "softplus"}, {"combine": "sum"}):
        shared = SharedModel(make_settings(merge(tiny_values, merge(PIXELS, {"representation": over}))))
        assert CpuFit.serves(shared, phase) == (over == {"combine": "sum"})
        assert not CpuFit.serves(shared, phase.model_copy(update={"tv_weight": 1.0}))
        assert not cpu_ops.takes(shared.background.double())


def test_loops_are_compiled_where_nothing_may_be_written(monkeypatch):
    asked = []

    def njit(cache: bool = False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr(compiled, "njit", njit)
    assert compiled.compiled()(len) is len and asked == [True, False]


def test_shapes_that_do_not_fit_are_refused_before_a_loop_reads_them():
    planes, points = planes_and_points(5)
    for wrong in (planes[:1], planes[:, :2], planes[..., :3]):
        with pytest.raises(ValueError, match="planes of shape"):
            point_features(wrong, points, PLANE_AXES, "product")
    rays = Rays(torch.zeros(2, 3, 3), torch.ones(2, 3, 3))
    for cells in (torch.ones(2, 35**3, dtype=torch.uint8), torch.ones(1, CELLS**3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="cells of"):
            samples_in(Box(1.0), rays, cells, 4)
