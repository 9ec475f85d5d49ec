"""The losses equal their closed forms, and their sums do not depend on how a batch is cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench.distillers.losses import IGNORED, cross_entropy, forward_kl, shifted


def test_shifted_targets_are_what_comes_next():
    assert shifted(torch.tensor([[5, 6, IGNORED, 7]])).tolist() == [[6, IGNORED, 7, IGNORED]]


def test_cross_entropy_of_uniform_logits_is_the_log_of_the_vocabulary_per_token():
    targets = torch.tensor([[1, 2, IGNORED], [0, IGNORED, IGNORED]])
    assert cross_entropy(torch.zeros(2, 3, 8, dtype=torch.float64), targets).item() == pytest.approx(3 * math.log(8))


def test_cross_entropy_equals_its_definition():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2, 3, IGNORED], [6, IGNORED, 5, 4, 3]])
    expected = sum(
        torch.logsumexp(logits[b, t], 0) - logits[b, t, targets[b, t]]
        for b in range(2)
        for t in range(5)
        if targets[b, t] != IGNORED
    )
    assert cross_entropy(logits, targets).item() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_kl_of_two_outcomes_equals_the_closed_form(temperature):
    teacher, student = (torch.tensor([[row]], dtype=torch.float64) for row in ([1.0, -0.5], [0.2, 0.4]))
    p, q = 1 / (1 + math.exp(-1.5 / temperature)), 1 / (1 + math.exp(0.2 / temperature))
    expected = temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert forward_kl(student, teacher, torch.tensor([[0]]), temperature).item() == pytest.approx(expected, rel=1e-12)


def test_forward_kl_is_not_the_reverse_one():
    a, b = torch.tensor([[[2.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]])
    there, back = (forward_kl(x, y, torch.tensor([[0]])).item() for x, y in ((a, b), (b, a)))
    assert abs(there - back) > 0.01


@given(seed=st.integers(0, 2**32), temperature=st.floats(0.3, 5))
def test_forward_kl_is_zero_for_equal_logits_and_positive_otherwise(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(1, 3, 6, dtype=torch.float64, generator=generator)
    student = torch.randn(1, 3, 6, dtype=torch.float64, generator=generator)
    targets = torch.tensor([[1, IGNORED, 2]])
    assert forward_kl(teacher, teacher + 3, targets, temperature).item() == pytest.approx(0, abs=1e-12)
    assert forward_kl(student, teacher, targets, temperature).item() > 0


def test_positions_without_a_target_do_not_count():
    student, teacher = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    targets = torch.tensor([[1, IGNORED, 2, IGNORED]])
    for change in (student, teacher):
        before = forward_kl(student, teacher, targets), cross_entropy(student, targets)
        change[0, 1] += torch.randn(6)
        assert (forward_kl(student, teacher, targets), cross_entropy(student, targets)) == before


def test_the_gradient_of_the_softened_kl_keeps_its_size():
    """Near equal logits KL_τ is quadratic in their difference over τ, so that τ² makes it the same at any τ."""
    student = (torch.randn(1, 1, 5, dtype=torch.float64) * 1e-3).requires_grad_()
    norms = []
    for temperature in (1.0, 4.0):
        (gradient,) = torch.autograd.grad(
            forward_kl(student, torch.zeros(1, 1, 5).double(), torch.tensor([[0]]), temperature), student
        )
        norms.append(gradient.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_low_precision_logits_are_summed_in_fp32():
    logits = torch.randn(1, 4, 9).bfloat16()
    assert cross_entropy(logits, torch.tensor([[1, 2, 3, 4]])).dtype == torch.float32
    assert forward_kl(logits, logits, torch.tensor([[1, 2, 3, 4]])).dtype == torch.float32
