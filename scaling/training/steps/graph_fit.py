"""Steps of a fit on random rays on a GPU: losses and gradients are one CUDA graph, which is captured once and replayed.

A step of `AutogradFit` launches more than a hundred small kernels, and the GPU waits for Python between them. A graph
launches them all at once. Its inputs and outputs have places of their own in memory: inputs are copied there before a
replay. Shapes must not change, so there is a graph for each number of scenes that move and each choice of what moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scaling.config import Stage2Phase
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.random_ray_batches import RayTable
from scaling.training.steps.autograd_fit import AutogradFit

LEAST_STEPS = 50  # of a fit: warm-up, capture and comparison take about as long as ten eager steps
WARM_UP = 3  # steps before a capture: libraries choose their kernels and take memory in the first ones
# A replay computes what the eager step does, in another order at most where gradients are added up.
RELATIVE, ABSOLUTE = 1e-2, 1e-5  # by how much


class GraphFit(AutogradFit):
    """Takes the steps of `AutogradFit` as CUDA graphs. Where a graph cannot be captured, or its first replay differs,
    one line says so, and all steps are taken eagerly."""

    def __init__(
        self, shared: SharedModel, phase: Stage2Phase, table: RayTable, params: SceneParams, micro_dtype: str
    ) -> None:
        super().__init__(shared, phase, table, params, micro_dtype)
        self.graphs: dict[tuple[Any, ...], Graph] = {}
        self.trusted = True

    @staticmethod
    def serves(shared: SharedModel, phase: Stage2Phase, steps: int) -> bool:
        """Whether the model is on a GPU, a capture pays, and all scenes move to the end: with early stopping nearly
        every number of scenes would need a graph, and its memory."""
        return shared.device.type == "cuda" and steps >= LEAST_STEPS and not phase.check_every

    def gradients(
        self, values: SceneParams, moving: Sequence[str], rows: Tensor, uniforms: Tensor, cells: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the parent class. What is returned is valid until the next call."""
        if not self.trusted:
            return super().gradients(values, moving, rows, uniforms, cells)
        inputs = [values.micro_planes, values.coefs, rows, uniforms, *([] if cells is None else [cells])]
        key = (tuple(moving), *(tuple(tensor.shape) for tensor in inputs))
        if key not in self.graphs:
            eager = super().gradients

            def step(micro: Tensor, coefs: Tensor, rows: Tensor, uniforms: Tensor, *grid: Tensor) -> Any:
                return eager(SceneParams(micro, coefs), moving, rows, uniforms, grid[0] if grid else None)

            graph = _captured(step, inputs)
            if graph is None:
                self.trusted = False
                return eager(values, moving, rows, uniforms, cells)
            self.graphs[key] = graph
        return self.graphs[key].replay(inputs)


class Graph:
    """A captured function of tensors. Raises RuntimeError where it cannot be captured."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.inputs = [tensor.detach().clone() for tensor in inputs]
        apart = torch.cuda.Stream()
        apart.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(apart):
            for _ in range(WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(apart)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may make the next batch ready meanwhile: only this one must do nothing that a graph cannot hold.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """What the function returns for these inputs; the next replay writes over it."""
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.outputs


def _captured(step: Callable[..., Any], inputs: Sequence[Tensor]) -> Graph | None:
    """The step as a graph whose first replay agrees with the eager step; None, with a warning, where there is none."""
    try:
        graph = Graph(step, inputs)
        losses, gradients = graph.replay(inputs)
        expected_losses, expected = step(*inputs)
        torch.testing.assert_close(losses, expected_losses, rtol=RELATIVE, atol=ABSOLUTE)
        for name, gradient in expected.items():
            apart = (gradients[name] - gradient).abs().mean()
            if not apart <= RELATIVE * gradient.abs().mean() + ABSOLUTE:
                raise AssertionError(f"the gradients in {name} differ by {apart.item():.2g} in the mean")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"steps are taken without CUDA graphs, which is slower: {reason}", stacklevel=2)
        return None
    return graph
