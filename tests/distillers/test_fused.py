"""Head and loss over slices equal the plain form, in value and in gradient, and hold no large tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench.distillers.fused import plain_head, summed_losses, token_losses, without_head
from mambabench.distillers.losses import IGNORED, Distillation, Divergence, token_cross_entropy
from mambabench.harness.interfaces import MambabenchError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM


def distillation(student, teacher, targets):
    return torch.stack((token_cross_entropy(student, targets), Divergence()(student, teacher)))


def inputs(count, width, words, kind=torch.float64, seed=0):
    dice = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=kind, generator=dice)

    targets = torch.randint(words, (count,), generator=dice)
    return targets, random(count, width), random(words, width), random(count, width + 1), random(words, width + 1)


@given(count=st.integers(1, 20), size=st.integers(1, 24), seed=st.integers(0, 1000))
def test_slices_equal_the_plain_form_in_value_and_gradient(count, size, seed):
    targets, hidden, head, told, their_head = inputs(count, 3, 7, seed=seed)
    upstream = torch.randn(2, count, dtype=torch.float64)
    results = []
    for sliced in (False, True):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if sliced:
            value = token_losses(distillation, targets, *leaves, told, their_head, size=size)
        else:
            value = distillation(leaves[0] @ leaves[1].T, told @ their_head.T, targets)
        results.append((value, *torch.autograd.grad(value, leaves, upstream)))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_the_gradient_in_float64_is_that_of_finite_differences():
    targets, hidden, head, told, their_head = inputs(4, 2, 5)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: token_losses(distillation, targets, h, w, told, their_head, 3), leaves)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    targets, hidden, head, told, their_head = inputs(4, 2, 5)
    token_losses(distillation, targets, hidden.requires_grad_(), head, told, their_head, 2).sum().backward()
    assert head.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("size", [2, 7])
def test_under_autocast_products_are_those_of_a_linear_layer(size):
    targets, hidden, head, _, _ = inputs(7, 8, 16, torch.float32)

    def ce(student, teacher, targets):
        return token_cross_entropy(student, targets).unsqueeze(0)

    results = []
    for sliced in (False, True):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if sliced:
                value = token_losses(ce, targets, *leaves, size=size)
            else:
                value = ce(torch.nn.functional.linear(*leaves), None, targets)
        results.append((value, *torch.autograd.grad(value.sum(), leaves)))
    for plain, ours in zip(*results, strict=True):
        assert ours.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=2e-2)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_no_tensor_is_larger_than_a_slice_of_logits_at_a_vocabulary_of_32k():
    words, width, count, size = 32768, 4, 96, 8
    targets, hidden, head, told, their_head = inputs(count, width, words, torch.float32)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    with Largest() as largest:
        token_losses(distillation, targets, *leaves, told, their_head, size).sum().backward()
    assert largest.numbers == size * words
    with Largest() as largest:
        distillation(leaves[0] @ leaves[1].T, told @ their_head.T, targets).sum().backward()
    assert largest.numbers == count * words


def test_a_model_without_its_head_gives_hidden_states_and_gets_it_back(hybrid):
    model, ids = hybrid.backend.module(hybrid.path), torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with without_head(model) as weight:
            hidden = model(input_ids=ids).logits
        assert hidden.shape == (2, 6, 16)
        torch.testing.assert_close(hidden @ weight.T, logits)
        assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize(
    ("family", "fields", "plain"),
    [
        ("llama", {}, True),
        ("gemma2", {}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("granite", {}, True),
        ("cohere", {}, False),
    ],
)
def test_a_head_is_plain_where_its_products_are_the_logits(family, fields, plain):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    config = AutoConfig.for_model(
        family, num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=1.0, **sizes, **fields
    )
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(5)[None]
    given = []
    model.lm_head.register_forward_hook(lambda head, hidden, logits: given.append(logits))
    logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(given[0], logits) == plain
    assert (plain_head(model) is not None) == plain


def test_a_model_whose_head_is_unknown_is_refused():
    with pytest.raises(MambabenchError, match="slice = 0"), without_head(torch.nn.Linear(2, 2)):
        pass


LOSSES = [
    Distillation(ce=1.0, kl=0.1),
    Distillation(ce=0.5),
    Distillation(ce=0.0, kl=2.0),
    Distillation(ce=1.0, kl=0.3, divergence=Divergence(temperature=2.0)),
    Distillation(ce=1.0, kl=0.3, divergence=Divergence(kind="reverse")),
    Distillation(ce=0.7, kl=0.3, divergence=Divergence(kind="js", beta=0.2, temperature=1.5)),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("size", [1, 4, 11])
def test_sums_with_the_gradient_made_ahead_equal_the_plain_form(loss, size):
    targets, hidden, head, told, their_head = inputs(11, 3, 7)
    targets[4] = IGNORED
    leaves = hidden.requires_grad_(), head.requires_grad_()
    plain = loss(leaves[0] @ leaves[1].T, told @ their_head.T, targets).sum(1)
    want = sum(weight * part for weight, part in zip(loss.weights.values(), plain, strict=True))
    total, sums = summed_losses(loss, targets, *leaves, told, their_head, size)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, plain, rtol=1e-12, atol=0)
    assert not sums.requires_grad
    for ours, theirs in zip(
        torch.autograd.grad(total * 0.37, leaves), torch.autograd.grad(want * 0.37, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_gradient_made_ahead_is_that_of_finite_differences():
    targets, hidden, head, told, their_head = inputs(4, 2, 5)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    loss = Distillation(ce=1.0, kl=0.4, divergence=Divergence(temperature=2.0))
    assert torch.autograd.gradcheck(lambda h, w: summed_losses(loss, targets, h, w, told, their_head, 3)[0], leaves)


def test_the_gradient_made_ahead_is_only_of_what_is_trained():
    targets, hidden, head, told, their_head = inputs(4, 2, 5)
    loss = Distillation(ce=1.0, kl=0.4)
    total, _ = summed_losses(loss, targets, hidden.requires_grad_(), head, told, their_head, 2)
    total.backward()
    assert head.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        again, _ = summed_losses(loss, targets, hidden, head, told, their_head, 2)
    torch.testing.assert_close(again, total.detach(), rtol=1e-12, atol=0)


def test_sums_hold_no_tensor_larger_than_a_slice_of_logits():
    words, width, count, size = 32768, 4, 96, 8
    targets, hidden, head, told, their_head = inputs(count, width, words, torch.float32)
    with Largest() as largest:
        loss = Distillation(ce=1.0, kl=0.4)
        summed_losses(loss, targets, hidden.requires_grad_(), head.requires_grad_(), told, their_head, size)[
            0
        ].backward()
    assert largest.numbers == size * words


def test_sums_under_autocast_are_near_those_in_float32():
    targets, hidden, head, told, their_head = inputs(64, 16, 32, torch.float32)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    results = []
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            total, sums = summed_losses(Distillation(ce=1.0, kl=0.5), targets, *leaves, told, their_head, 24)
        assert total.dtype == sums.dtype == torch.float32
        results.append((total, *torch.autograd.grad(total, leaves)))
    for exact, rounded in zip(*results, strict=True):
        assert (rounded - exact).norm() < 2e-2 * exact.norm()
