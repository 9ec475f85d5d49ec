"""The losses in one pass equal those in PyTorch, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.distillers import losses as plain
from mambabench.distillers.losses import IGNORED, Distillation

LOSSES = [Distillation(ce=1.0, kl=0.1), Distillation(ce=0.5), Distillation(ce=0.0, kl=2.0)]


@pytest.fixture
def interpreted(interpret):
    """The kernel in Triton's interpreter."""
    return interpret("mambabench.distillers.triton_losses")


def logits(rows, words, kind=torch.float32, device="cpu"):
    dice = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(rows, words, generator=dice) for _ in range(2))
    targets = torch.randint(words, (rows,), generator=dice)
    targets[1] = IGNORED
    return student.to(device, kind), teacher.to(device, kind), targets.to(device)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("words", [7, 64, 150])
def test_in_the_interpreter_values_and_gradient_are_those_of_pytorch(interpreted, loss, words, monkeypatch):
    monkeypatch.setattr(interpreted, "BLOCK", 64)
    student, teacher, targets = logits(5, words)
    parts, gradient = interpreted.losses(student, teacher if loss.kl else None, targets, loss.ce, loss.kl)
    exact = loss.with_gradient(student.double(), teacher.double(), targets)
    torch.testing.assert_close(parts.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-5, atol=1e-6)
    assert gradient.dtype == student.dtype


def test_in_the_interpreter_rows_may_be_slices_of_wider_ones(interpreted):
    student, teacher, targets = logits(5, 90)
    loss = LOSSES[0]
    sliced = interpreted.losses(student[:, :70], teacher[:, 10:80], targets % 70, loss.ce, loss.kl)
    whole = loss.with_gradient(student[:, :70].contiguous(), teacher[:, 10:80].contiguous(), targets % 70)
    for one, two in zip(sliced, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("words", [8192, 50257])
def test_on_a_gpu_it_is_as_near_to_float64_as_pytorch(loss, words, kind, monkeypatch):
    student, teacher, targets = logits(33, words, kind, "cuda")
    exact = loss.with_gradient(student.double(), teacher.double(), targets)
    ours = loss.with_gradient(student, teacher, targets)
    monkeypatch.setattr(Distillation, "_in_one_pass", lambda self, logits: False)
    theirs = plain.Distillation.with_gradient(loss, student, teacher, targets)
    for one, two, truth in zip(ours, theirs, exact, strict=True):
        assert one.dtype == two.dtype
        assert (one.double() - truth).norm() <= 1.5 * (two.double() - truth).norm() + 1e-5 * truth.norm()
