"""The convolution is its formula, and its window carries on where a row ends."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.conv import conv, conv_few, conv_loop, window_at
from mambabench.kernels.documents import Documents

Pair = tuple[torch.Tensor, torch.Tensor]


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_shifted_products_are_the_formula(
    seed: int, batch: int, length: int, channels: int, taps: int, carried: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, taps, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    window = lengths = None
    if carried:
        window = torch.randn(batch, taps - 1, channels, generator=generator, dtype=torch.float64)
        lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    want, want_window = conv_loop(u, weight, bias, window, lengths)
    got, got_window = conv(u, weight, bias, window, lengths)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if window is not None:
        few = conv_few(torch.cat((window, u), dim=1), weight, bias)
        torch.testing.assert_close(few, want, rtol=1e-12, atol=1e-12)
    assert got_window.shape == (batch, taps - 1, channels)
    assert torch.equal(got_window, want_window)


@given(st.integers(0, 1000), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_documents_are_convolved_as_if_alone(seed: int, sizes: list[int], taps: int, carried: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, weight, bias, window = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((1, sum(sizes), 3), (3, taps), (3,), (1, taps - 1, 3))
    )
    documents = Documents(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).unsqueeze(0))
    before = window if carried else None
    got, end = conv(u, weight, bias, before, documents=documents)
    loop, _ = conv_loop(u, weight, bias, before, documents=documents)
    want = [conv_loop(t, weight, bias, None if n else before)[0] for n, t in enumerate(u.split(sizes, dim=1))]
    torch.testing.assert_close(got, torch.cat(want, dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loop, got, rtol=1e-12, atol=1e-12)
    leaves = [t.clone().requires_grad_() for t in (u, weight, bias)]
    gradients = [
        torch.autograd.grad(way(*leaves, before, documents=documents)[0].sin().sum(), leaves)
        for way in (conv, conv_loop)
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    last = torch.tensor([u.shape[1]])
    assert torch.equal(end, window_at(u, taps, before, last))


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(0, 9), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_window_continues_each_row_at_its_own_length(seed: int, length: int, more: int, taps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(2, length + more, 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(3, taps, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    lengths = torch.tensor([length, max(1, length - 1)])
    whole, _ = conv(u, weight, bias)
    _, window = conv(u[:, :length], weight, bias, lengths=lengths)
    for row, at in enumerate(lengths.tolist()):
        if at < u.shape[1]:
            rest, _ = conv(u[row : row + 1, at:], weight, bias, window[row : row + 1])
            torch.testing.assert_close(rest, whole[row : row + 1, at:], rtol=1e-12, atol=1e-12)


def test_agrees_with_torch() -> None:
    u, weight, bias = torch.randn(2, 17, 6), torch.randn(6, 4), torch.randn(6)
    want = torch.nn.functional.conv1d(u.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=6)
    torch.testing.assert_close(conv(u, weight, bias)[0], want[..., :17].transpose(1, 2), rtol=1e-5, atol=1e-5)


def joined(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, window: torch.Tensor) -> Pair:
    """`conv_few` with the arguments and results of the others."""
    both = torch.cat((window, u), dim=1)
    return conv_few(both, weight.float(), bias.float()), both[:, -window.shape[1] :]


@pytest.mark.parametrize("way", [conv, conv_loop, joined])
def test_bf16_sums_are_rounded_once(way: Callable[..., Pair]) -> None:
    generator = torch.Generator().manual_seed(0)
    u, weight, bias, window = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((4, 50, 64), (64, 4), (64,), (4, 3, 64))
    )
    got, carried = way(u, weight, bias, window)
    exact, _ = conv_loop(u.double(), weight.double(), bias.double(), window.double())
    assert got.dtype == carried.dtype == torch.bfloat16
    assert (got == exact.bfloat16()).float().mean() > 0.999
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)
