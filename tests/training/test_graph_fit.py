"""Steps as CUDA graphs against eager steps. Without a GPU: what a graph would hold, and what happens without one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.config import Stage2Phase, make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.models import cpu_ops
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, texels_together
from scaling.training.random_ray_batches import RayTable
from scaling.training.steps import graph_fit
from scaling.training.steps.autograd_fit import AutogradFit, Span
from scaling.training.steps.graph_fit import GraphFit
from scaling.training.training_scene import ready_scene

PHASE = Stage2Phase(rays_per_item=20, lr={"micro_planes": 1e-2, "coefs": 2e-2}, check_every=9)
STEPS = 4


class NothingThatWaits(TorchDispatchMode):
    """Refuses operations whose result the CPU must know before it can go on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


class Eager:
    """Stands for a graph: its replay calls the function. off: what its losses are multiplied by."""

    made = 0
    off = 1.0

    def __init__(self, function, inputs) -> None:
        Eager.made += 1
        self.function = function

    def replay(self, inputs):
        with NothingThatWaits():
            losses, gradients = self.function(*inputs)
        return losses * self.off, gradients


def fits(tiny_values, device: str) -> tuple[SharedModel, RayTable, torch.Tensor, list[SceneParams]]:
    torch.manual_seed(0)
    values = {"representation": {"base_std": 0.5}, "precision": "float32"}
    shared = SharedModel(make_settings(merge(tiny_values, values))).requires_grad_(False).to(device)
    scenes = [ready_scene(shared, embedded_scene(scene_id, 16, 8)) for scene_id in embedded_ids(3)]
    micro, coefs = torch.randn(3, *shared.micro_shape) * 0.3, torch.randn(3, shared.coefs_mean.numel())
    given = [SceneParams(texels_together(micro.to(device)), coefs.clone().to(device)) for _ in range(2)]
    return shared, RayTable(shared, scenes), torch.stack([scene.cells for scene in scenes]), given


def both(tiny_values, device: str) -> tuple[SceneParams, SceneParams]:
    """Params after steps that move all, then coefs no more, then two scenes: by graphs, and eagerly."""
    shared, table, cells, given = fits(tiny_values, device)
    by_graph, eager = (
        GraphFit(shared, PHASE, table, given[0], "int4"),
        AutogradFit(shared, PHASE, table, given[1], "int4"),
    )
    first, names = 0, ["micro_planes", "coefs"]
    for moving, rows in ((names, [0, 1, 2]), (names[:1], [0, 1, 2]), (names[:1], [0, 2])):
        at = torch.tensor(rows, device=device)
        uniforms = torch.rand(len(rows), STEPS, 20, 1 + shared.renderer.uniforms_per_ray).to(device)
        span = Span(first, at, moving, [torch.ones(len(rows), device=device)] * STEPS, uniforms, cells[at], None)
        for found, expected in zip(by_graph.take(span), eager.take(span), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        first += STEPS
    return given[0], given[1]


def same(one: SceneParams, other: SceneParams) -> None:
    for name in ("micro_planes", "coefs"):
        assert (getattr(one, name) - getattr(other, name)).abs().mean() < 1e-4, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_take_the_eager_steps(tiny_values, recwarn):
    same(*both(tiny_values, "cuda"))
    assert not [warning for warning in recwarn if "CUDA graphs" in str(warning.message)]


def test_a_step_holds_nothing_that_waits_and_each_shape_has_its_graph(tiny_values, monkeypatch):
    monkeypatch.setattr(graph_fit, "Graph", Eager)
    monkeypatch.setattr(cpu_ops, "takes", lambda *_: False)  # the loops of a CPU, which no GPU runs
    monkeypatch.setattr(Eager, "made", 0)
    same(*both(tiny_values, "cpu"))
    assert Eager.made == 3


@pytest.mark.parametrize("off", [None, 1.1])
def test_without_a_graph_steps_are_eager_and_one_line_says_so(tiny_values, monkeypatch, off):
    """Where a capture fails, and where a replay computes something else."""

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph_fit, "Graph", Eager if off else fails)
    monkeypatch.setattr(Eager, "off", off or 1.0)
    with pytest.warns(UserWarning, match="without CUDA graphs, which is slower") as told:
        same(*both(tiny_values, "cpu"))
    assert len(told) == 1
