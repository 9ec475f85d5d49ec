"""What a step of distillation is made of, at the 8B shape of Llama 3 and 8,192 tokens (`nox -s kernels`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from mambabench.backends.attention import ragged_attention
from mambabench.backends.packed import Packed
from mambabench.distillers.losses import Distillation
from mambabench.kernels.pointwise import swiglu
from torch import Tensor


class Sizes(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head: int
    words: int
    slice: int
    """Tokens whose losses are made at a time."""


TINY, LLAMA = Sizes(24, 8, 24, 4, 2, 8, 50, 12), Sizes(8192, 4096, 14_336, 32, 8, 128, 128_256, 2048)
sized = pytest.mark.parametrize(
    "at", [pytest.param(TINY, id="tiny"), pytest.param(LLAMA, id="8b", marks=pytest.mark.gpu)]
)
ITEM = 2
"""Bytes of a bf16 number."""


@pytest.fixture
def numbers(device: torch.device) -> Callable[..., Tensor]:
    """Random ones of the given shape."""
    return lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)


@sized
@pytest.mark.parametrize("which", ["up", "head"])
def test_product(cold, numbers, assert_near, at: Sizes, which: str) -> None:
    rows, words = (at.tokens, at.intermediate) if which == "up" else (at.slice, at.words)

    def make() -> tuple[Tensor, ...]:
        return numbers(rows, at.hidden), numbers(words, at.hidden)

    found = cold(make, F.linear, flops=2 * rows * words * at.hidden)
    x, weight = cold.inputs(make)
    assert_near(found[:64], x[:64].float() @ weight.float().T)


@sized
def test_copy(cold, numbers, at: Sizes) -> None:
    def make() -> tuple[Tensor]:
        return (numbers(at.tokens, at.intermediate),)

    found = cold(make, torch.clone, moved=2 * at.tokens * at.intermediate * ITEM)
    assert torch.equal(found, *cold.inputs(make))


@sized
@pytest.mark.parametrize("form", ["kernel", "pytorch"])
@pytest.mark.parametrize("way", ["forward", "both"])
def test_swiglu(cold, numbers, assert_near, at: Sizes, form: str, way: str) -> None:
    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    gated = swiglu if form == "kernel" else plain

    def make() -> tuple[Tensor, ...]:
        back = numbers(at.tokens, at.intermediate)
        return *(numbers(at.tokens, at.intermediate).requires_grad_(way == "both") for _ in range(2)), back

    def run(gate: Tensor, up: Tensor, back: Tensor, gated: Callable[..., Tensor] = gated) -> Any:
        y = gated(gate, up)
        return y if way == "forward" else torch.autograd.grad(y, (gate, up), back)

    found = cold(make, run, moved=(3 if way == "forward" else 8) * at.tokens * at.intermediate * ITEM)
    gate, up, back = cold.inputs(make)
    assert_near(found, run(gate.detach().float().requires_grad_(), up.float(), back.float(), plain))


ATTENTION = [
    pytest.param(TINY, 8, "rows", id="tiny"),
    *(
        pytest.param(LLAMA, length, form, id=f"8b-{length}-{form}", marks=pytest.mark.gpu)
        for length in (2048, 16_384)
        for form in ("rows", "ragged")
    ),
]


@pytest.mark.parametrize(("at", "length", "form"), ATTENTION)
@pytest.mark.parametrize("way", ["forward", "both"])
def test_causal_attention(
    cold, numbers, assert_near, device: torch.device, at: Sizes, length: int, form: str, way: str
) -> None:
    rows = max(1, at.tokens // length)
    positions = torch.arange(length, device=device).expand(rows, length)
    offsets = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
    documents = Packed.known(positions, offsets, length)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if form == "ragged":
            return ragged_attention(q, k, v, documents, 0)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

    def make() -> tuple[Tensor, ...]:
        back = numbers(rows, length, at.heads, at.head)
        many = at.heads, at.groups, at.groups
        return *(numbers(rows, length, heads, at.head).requires_grad_(way == "both") for heads in many), back

    def run(q: Tensor, k: Tensor, v: Tensor, back: Tensor) -> Any:
        y = attend(q, k, v)
        return y if way == "forward" else torch.autograd.grad(y, (q, k, v), back)

    products = 2 if way == "forward" else 6
    found = cold(make, run, flops=products * rows * length * (length + 1) * at.heads * at.head)
    *given, back = (t[:1].float() for t in cold.inputs(make))
    first = [t.detach()[:, :128].requires_grad_() for t in given]
    q, k, v = (t.transpose(1, 2) for t in first)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    if way == "forward":
        assert_near(found[:1, :128], wanted)
    elif length <= 128:
        assert_near([t[:1] for t in found], torch.autograd.grad(wanted, first, back))
    else:
        assert all(t.isfinite().all() and t.count_nonzero() for t in found)


@sized
@pytest.mark.parametrize("form", ["kernel", "pytorch"])
def test_cross_entropy_and_divergence_with_gradient(
    cold, numbers, assert_near, device: torch.device, monkeypatch: pytest.MonkeyPatch, at: Sizes, form: str
) -> None:
    if form == "pytorch":
        monkeypatch.setattr(Distillation, "_in_one_pass", lambda self, logits: False)
    loss = Distillation(ce=1.0, kl=0.1)

    def make() -> tuple[Tensor, ...]:
        targets = torch.randint(at.words, (at.slice,), device=device)
        return numbers(at.slice, at.words), numbers(at.slice, at.words), targets

    found = cold(make, loss.with_gradient, moved=5 * at.slice * at.words * ITEM)
    student, teacher, targets = (t[:64] for t in cold.inputs(make))
    leaf = student.float().requires_grad_()
    losses = loss(leaf, teacher.float(), targets)
    weights = torch.tensor([1.0, 0.1], device=device)[:, None].expand_as(losses)
    (gradient,) = torch.autograd.grad(losses, leaf, weights)
    assert_near([found[0][:, :64], found[1][:64]], [losses, gradient])
