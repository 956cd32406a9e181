"""Adam by rows."""

from __future__ import annotations

import torch

from scaling.training.optim import BETAS, EPSILON, RowAdam


def gradients(steps: int) -> torch.Tensor:
    return torch.randn(steps, 3, 2, 4, generator=torch.Generator().manual_seed(0))


def test_all_rows_in_place_move_as_rows_one_by_one():
    together, apart = RowAdam(torch.ones(3, 2, 4)), RowAdam(torch.ones(3, 2, 4))
    rates = torch.tensor([0.1, 0.02, 0.3])
    table = together.table
    for gradient in gradients(5):
        together.step(torch.arange(3), gradient, rates)
        for row in range(3):
            apart.step(torch.tensor([row]), gradient[row : row + 1], rates[row : row + 1])
    assert together.table is table
    for ours, theirs in ((together.table, apart.table), (together.first, apart.first), (together.second, apart.second)):
        torch.testing.assert_close(ours, theirs)
    assert together.steps.tolist() == apart.steps.tolist() == [5, 5, 5]


def test_rows_that_always_go_together_move_as_rows():
    together, rows = RowAdam(torch.ones(3, 2, 4), together=True), RowAdam(torch.ones(3, 2, 4))
    for step, gradient in enumerate(gradients(5)):
        for optimiser in (together, rows):
            optimiser.step(torch.arange(3), gradient, 0.1 / (1 + step))
    torch.testing.assert_close(together.table, rows.table)


def test_a_row_moves_as_under_an_adam_of_its_own():
    ours = RowAdam(torch.ones(3, 2, 4))
    row = torch.ones(2, 4, requires_grad=True)
    theirs = torch.optim.Adam([row], lr=0.1, betas=BETAS, eps=EPSILON)
    for step, gradient in enumerate(gradients(6)):
        chosen = torch.tensor([1]) if step % 2 else torch.tensor([0, 1])
        ours.step(chosen, gradient[chosen], 0.1)
        row.grad = gradient[1]
        theirs.step()
    torch.testing.assert_close(ours.table[1], row.detach())
    assert ours.steps.tolist() == [3, 6, 0] and torch.equal(ours.table[2], torch.ones(2, 4))
