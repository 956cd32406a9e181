"""Optimisers of scenes and of the shared model, and learning-rate schedules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from scaling.config import Phase, Rates
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.optim import RowAdam, check_ownership, lr_factor, shared_optimiser
from scaling.training.random_streams import stream
from scaling.training.scene_step import SceneOptimiser, by_autograd


def gradients(num_steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Steps of a table of 3 rows: the rows of the batch, and their gradients [R, 2, 2]."""
    rows = [[0, 1], [1], [0, 2], [1, 2], [1]]
    return [
        (torch.tensor(rows[step % 5]), torch.randn(len(rows[step % 5]), 2, 2, generator=stream("gradient", step)))
        for step in range(num_steps)
    ]


def test_a_row_moves_as_under_an_adam_of_its_own():
    start = torch.randn(3, 2, 2, generator=stream("table"))
    table = start.clone()
    ours = RowAdam(table)
    alone = [nn.Parameter(row.clone()) for row in start]
    theirs = [torch.optim.Adam([row], lr=0.1) for row in alone]
    for rows, grad in gradients(12):
        ours.step(rows, grad, 0.1)
        for row, row_grad in zip(rows.tolist(), grad):
            alone[row].grad = row_grad
            theirs[row].step()
        torch.testing.assert_close(table, torch.stack([row.detach() for row in alone]), rtol=1e-6, atol=1e-6)
    assert ours.steps.tolist() == [5, 10, 4]


def test_dense_rows_move_as_under_one_adam():
    start = torch.randn(3, 2, 2, generator=stream("table"))
    table, whole = start.clone(), nn.Parameter(start.clone())
    ours, theirs = RowAdam(table, dense=True), torch.optim.Adam([whole], lr=0.1)
    for rows, grad in gradients(12):
        ours.step(rows, grad, 0.1)
        whole.grad = torch.zeros_like(start).index_copy(0, rows, grad)
        theirs.step()
        torch.testing.assert_close(table, whole.detach(), rtol=1e-6, atol=1e-6)
    rows, grad = torch.tensor([1]), torch.zeros(1, 2, 2)
    before = table.clone()
    ours.step(rows, grad, 0.1)
    assert (table != before).flatten(1).any(1).all(), "rows outside of the batch drift on"


def test_one_step_of_scenes():
    """Of rows 2 and 0 of 3, by a loss that only coefs are in: Adam's first step is the rate, against the gradient."""
    table = SceneParams(torch.zeros(3, 1, 1, 2, 2), torch.tensor([[1.0], [1.0], [1.0]]))
    optimiser = SceneOptimiser(table, Rates(micro_planes=0.5, coefs=0.25))

    def loss_of(params: SceneParams) -> tuple[torch.Tensor, str]:
        assert params.micro_planes[0, 0, 0, 0, 0] == 7.0, "seen otherwise than they are"
        return (params.coefs * torch.tensor([[1.0], [-2.0]])).sum(), "told"

    rows = torch.tensor([0, 2])
    told, gradients = optimiser.step(rows, partial(by_autograd, loss_of=loss_of), 1.0, lambda micro: micro + 7)
    assert told == "told" and gradients["coefs"].tolist() == [[1.0], [-2.0]]
    torch.testing.assert_close(table.coefs, torch.tensor([[0.75], [1.0], [1.25]]))
    assert "micro_planes" not in gradients and not table.micro_planes.any() and not table.coefs.requires_grad


def test_ownership_is_exact():
    module = nn.Linear(2, 2)
    check_ownership(module, torch.optim.Adam(module.parameters()))
    with pytest.raises(RuntimeError, match=r"no optimiser owns \['bias'\]"):
        check_ownership(module, torch.optim.Adam([module.weight]))
    with pytest.raises(RuntimeError, match=r"no optimiser owns \['bias', 'weight'\]"):
        check_ownership(module, None)
    stranger = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"owned but frozen \['not of this model'\]"):
        check_ownership(module, torch.optim.Adam([*module.parameters(), stranger]))
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"owned but frozen \['bias'\]"):
        check_ownership(module, torch.optim.Adam(module.parameters()))


def test_rates_choose_what_is_trained(tiny_settings):
    shared = SharedModel(tiny_settings)
    optimiser = shared_optimiser(shared, Rates(field=0.1, base_planes=0.2, micro_planes=0.3))
    trained = {name.split(".")[0] for name, parameter in shared.named_parameters() if parameter.requires_grad}
    assert trained == {"field", "base_planes"}
    assert [group["lr"] for group in optimiser.param_groups] == [0.1, 0.2]
    assert shared_optimiser(shared, Rates()) is None
    adapted = shared.adapt_decoder()
    shared_optimiser(shared, Rates(decoder=0.1))
    trained = [parameter for parameter in shared.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapted.parameters()}, "the adapted decoder, not the other"


@pytest.mark.parametrize(
    ("phase", "epoch", "progress", "by_hand"),
    [
        (Phase(), 7, 0.9, 1.0),
        (Phase(lr_decay=0.5), 2, 0.0, 0.25),
        (Phase(lr_milestones=[2, 4]), 1, 0.0, 1.0),
        (Phase(lr_milestones=[2, 4]), 2, 0.0, 0.3),
        (Phase(lr_milestones=[2, 4], lr_milestone_factor=0.1), 5, 0.0, 0.01),
        (Phase(lr_cosine_to=0.1), 0, 0.0, 1.0),
        (Phase(lr_cosine_to=0.1), 3, 0.5, 0.55),
        (Phase(lr_cosine_to=0.1), 3, 1 / 3, 0.1 + 0.9 * 0.75),
        (Phase(lr_cosine_to=0.1, lr_decay=0.5), 1, 0.5, 0.275),
    ],
)
def test_learning_rate_factors(phase, epoch, progress, by_hand):
    assert lr_factor(phase, epoch, progress) == pytest.approx(by_hand)
