"""The positions that layers share move as the plan says, in PyTorch, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels.multistep import Plan, cursors, move


def ints(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def moved(way, plan, device="cpu"):
    """Rows whose replay is empty, has room for a round, just has none, and is full."""
    start = ints(7, 7, 8, 12, device=device)
    settled, saved, end = ints(7, 5, 6, 9, device=device), ints(7, 4, 4, 4, device=device), start.clone()
    way(start, settled, saved, end, plan)
    return [t.tolist() for t in (start, settled, saved, end)]


def test_a_checkpoint_moves_when_another_round_might_not_fit():
    start = [7, 7, 8, 12]
    assert moved(move, Plan(3, 5, 8, True)) == [start, start, [7, 4, 8, 12], [10, 10, 11, 15]]
    assert moved(move, Plan(3, 5, 5, True)) == [start, start, start, [10, 10, 11, 15]]
    assert moved(move, Plan(2, 5, 8, False)) == [start, [7, 5, 6, 9], [7, 4, 4, 4], [9, 9, 10, 14]]


PLANS = [Plan(3, 5, 8, True), Plan(3, 5, 5, True), Plan(2, 5, 8, False)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_in_the_interpreter_the_kernel_moves_the_same(interpret, plan):
    assert moved(interpret(cursors.MODULE).move, plan) == moved(move, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_on_a_gpu_the_kernel_moves_the_same(plan):
    assert cursors.supports(ints(1, device="cuda"))
    assert moved(move, plan, "cuda") == moved(move, plan)
