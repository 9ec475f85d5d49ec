"""The losses equal their closed forms, and their sums do not depend on how a batch is cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench.distillers.losses import (
    IGNORED,
    Divergence,
    alignment,
    cross_entropy,
    dpo,
    sequence_logprob,
    shifted,
    token_cross_entropy,
)

MEASURES = [
    Divergence(),
    Divergence(kind="reverse"),
    Divergence(kind="js", beta=0.5),
    Divergence(kind="js", beta=0.2, temperature=2.0),
]


def divergence(student, teacher, targets, measure):
    counted = targets != IGNORED
    return measure(student[counted], teacher[counted]).sum()


def forward_kl(student, teacher, targets, temperature=1.0):
    return divergence(student, teacher, targets, Divergence(temperature=temperature))


def exact(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


def test_reverse_kl_is_forward_kl_with_the_two_exchanged():
    a, b = exact(5, 7), exact(5, 7, seed=1)
    for temperature in (1.0, 2.0):
        there = Divergence(kind="reverse", temperature=temperature)(a, b)
        torch.testing.assert_close(there, Divergence(temperature=temperature)(b, a), rtol=1e-12, atol=0)


def test_jensen_shannon_of_disjoint_outcomes_is_the_entropy_of_beta():
    """p and q on different outcomes: β log(1 / β) + (1 - β) log(1 / (1 - β))."""
    p, q = torch.tensor([[0.0, -1e4]]).double(), torch.tensor([[-1e4, 0.0]]).double()
    for beta in (0.1, 0.5, 0.7):
        expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert Divergence(kind="js", beta=beta)(q, p).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("js", 0.5), ("js", 0.1), ("js", 0.9)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_equal_those_of_trl(kind, beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = exact(2, 4, 9), exact(2, 4, 9, seed=1)
    targets = torch.tensor([[1, IGNORED, 3, 4], [IGNORED, 2, 2, 0]])
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student, teacher, targets, beta=beta, temperature=temperature, num_items_in_batch=1
    )
    ours = divergence(student, teacher, targets, Divergence(kind=kind, beta=beta, temperature=temperature))
    assert ours.item() == pytest.approx(temperature**2 * theirs.item(), rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_gradients_of_divergences_are_right(measure):
    student = exact(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: measure(logits, exact(3, 5, seed=1)), (student,))


def test_the_gradients_of_likelihoods_and_preferences_are_right():
    logits, targets = exact(2, 4, 5).requires_grad_(), torch.tensor([[0, IGNORED, 4, 1], [2, 2, IGNORED, IGNORED]])
    assert torch.autograd.gradcheck(lambda x: token_cross_entropy(x[0], targets[0]), (logits,))
    assert torch.autograd.gradcheck(lambda x: sequence_logprob(x, targets), (logits,))
    chosen, rejected = exact(3).requires_grad_(), exact(3, seed=1).requires_grad_()
    reference = exact(3, seed=2), exact(3, seed=3)
    assert torch.autograd.gradcheck(lambda c, r: dpo(c, r, *reference, beta=0.3).loss, (chosen, rejected))


def test_the_log_probability_of_a_sequence_is_the_sum_over_its_targets():
    logits, targets = exact(2, 3, 5), torch.tensor([[0, IGNORED, 4], [IGNORED, IGNORED, 3]])
    said = logits.log_softmax(-1)
    assert sequence_logprob(logits, targets).tolist() == pytest.approx(
        [float(said[0, 0, 0] + said[0, 2, 4]), float(said[1, 2, 3])], rel=1e-12
    )


def test_dpo_equals_its_closed_form_and_starts_at_log_2():
    equal = dpo(torch.tensor([-3.0]), torch.tensor([-5.0]), torch.tensor([-3.0]), torch.tensor([-5.0]), beta=0.1)
    assert equal.loss.item() == pytest.approx(math.log(2))
    chosen, rejected, ref_chosen, ref_rejected = (exact(4, seed=seed) for seed in range(4))
    told = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.4)
    margin = 0.4 * ((chosen - rejected) - (ref_chosen - ref_rejected))
    torch.testing.assert_close(told.loss, torch.log1p(torch.exp(-margin)), rtol=1e-12, atol=0)
    torch.testing.assert_close(told.chosen_reward - told.rejected_reward, margin, rtol=1e-12, atol=1e-15)


def test_alignment_is_the_relative_squared_error_of_each_token():
    attention = exact(4, 6)
    assert alignment(attention, attention).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(alignment(1.5 * attention, attention), torch.full((4,), 0.25).double())
    assert torch.autograd.gradcheck(lambda mixer: alignment(mixer, attention), (exact(4, 6, seed=1).requires_grad_(),))
