"""What a step of distillation is made of, at the 8B shape of Llama 3 and 8,192 tokens (`nox -s kernels`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mambabench.backends.attention import ragged_attention
from mambabench.backends.packed import Packed
from mambabench.distillers.losses import Distillation
from mambabench.kernels.pointwise import swiglu
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(group="training")]

TOKENS, HIDDEN, INTERMEDIATE, HEADS, GROUPS, HEAD, WORDS, SLICE = 8192, 4096, 14_336, 32, 8, 128, 128_256, 2048
ITEM = 2
"""Bytes of a bf16 number."""


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(("rows", "words"), [(TOKENS, INTERMEDIATE), (SLICE, WORDS)], ids=["up", "head"])
def test_product(cold, rows: int, words: int) -> None:
    def make() -> Callable[[], object]:
        x, weight = numbers(rows, HIDDEN), numbers(words, HIDDEN)
        return lambda: x @ weight.T

    cold(make, flops=2 * rows * words * HIDDEN)


def test_copy(cold) -> None:
    def make() -> Callable[[], object]:
        x = numbers(TOKENS, INTERMEDIATE)
        return lambda: x.clone()

    cold(make, moved=2 * TOKENS * INTERMEDIATE * ITEM)


@pytest.mark.parametrize("form", ["kernel", "pytorch"])
@pytest.mark.parametrize("way", ["forward", "both"])
def test_swiglu(cold, form: str, way: str) -> None:
    def make() -> Callable[[], object]:
        gate, up, back = (numbers(TOKENS, INTERMEDIATE).requires_grad_(way == "both") for _ in range(3))
        gated: Callable[[Tensor, Tensor], Tensor] = swiglu if form == "kernel" else lambda g, u: F.silu(g) * u
        if way == "forward":
            return lambda: gated(gate, up)
        return lambda: torch.autograd.grad(gated(gate, up), (gate, up), back.detach())

    cold(make, moved=(3 if way == "forward" else 8) * TOKENS * INTERMEDIATE * ITEM)


@pytest.mark.parametrize("length", [2048, 16_384])
@pytest.mark.parametrize("form", ["rows", "ragged"])
@pytest.mark.parametrize("way", ["forward", "both"])
def test_causal_attention(cold, length: int, form: str, way: str) -> None:
    rows = max(1, TOKENS // length)
    positions = torch.arange(length, device="cuda").expand(rows, length)
    offsets = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * length
    documents = Packed.known(positions, offsets, length)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if form == "ragged":
            return ragged_attention(q, k, v, documents, 0)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

    def make() -> Callable[[], object]:
        q, k, v = (
            numbers(rows, length, heads, HEAD).requires_grad_(way == "both") for heads in (HEADS, GROUPS, GROUPS)
        )
        back = numbers(rows, length, HEADS, HEAD)
        if way == "forward":
            return lambda: attend(q, k, v)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(attend(*leaves), leaves, back)

    products = 2 if way == "forward" else 6
    cold(make, flops=products * rows * length * (length + 1) * HEADS * HEAD)


@pytest.mark.parametrize("form", ["kernel", "pytorch"])
def test_cross_entropy_and_divergence_with_gradient(cold, monkeypatch: Any, form: str) -> None:
    if form == "pytorch":
        monkeypatch.setattr(Distillation, "_in_one_pass", lambda self, logits: False)
    loss = Distillation(ce=1.0, kl=0.1)

    def make() -> Callable[[], object]:
        student, teacher = numbers(SLICE, WORDS), numbers(SLICE, WORDS)
        targets = torch.randint(WORDS, (SLICE,), device="cuda")
        return lambda: loss.with_gradient(student, teacher, targets)

    cold(make, moved=5 * SLICE * WORDS * ITEM)
