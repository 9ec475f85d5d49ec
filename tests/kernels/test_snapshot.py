"""A state for every token: what the recurrence makes, and what is left when tokens are taken back."""

import pytest
import torch
from mambabench.kernels.multistep import Ring, selective_multistep_loop, snapshot
from mambabench.kernels.multistep.snapshot import (
    selective_snapshot_multistep,
    snapshot_multistep,
    snapshot_ring_multistep,
)
from mambabench.kernels.scan.reference import scan_loop

SHAPES = {"even": (4, 2, 8, 8), "odd": (3, 1, 5, 7), "own groups": (2, 2, 16, 4)}
"""H, G, P, N."""


def layer(shape, batch, count, dtype=torch.float64, seed=0, device="cpu"):
    heads, groups, width, size = shape
    dice = torch.Generator().manual_seed(seed)

    def some(*sizes, kind=dtype):
        return torch.randn(sizes, generator=dice, dtype=torch.float64).to(device, kind)

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x, B, C = some(batch, count, groups, width), some(batch, count, groups, size), some(batch, count, heads, size)
    dt, A, D = some(batch, count, heads, kind=exact).exp(), -some(heads, kind=exact).exp(), some(heads, kind=exact)
    return x, dt, A, B, C, D


def scanned(x, dt, A, B, C, D, state):
    heads = C.shape[2]
    x, B = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (x, B))
    return scan_loop(x, dt, A, B, C, D, state)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_may_go_from_any_call_on(shape):
    heads, _, width, size = shape
    x, dt, A, B, C, D = given = layer(shape, 2, 9)
    states = torch.full((2, 6, heads, width, size), torch.nan, dtype=torch.float64)
    start = torch.tensor([3, 5], dtype=torch.int32)
    first = torch.randn(2, heads, width, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states[torch.arange(2), start % 6] = first
    want, _ = scanned(*given, first)
    junk = layer(shape, 2, 5, seed=7)
    at = 0
    for kept, tried in ((2, 5), (0, 3), (3, 4), (4, 4)):
        snapshot_multistep(*(t[:, :tried] if t.dim() > 1 else t for t in junk), states, start + at)
        part = slice(at, at + kept)
        if kept:
            y = snapshot_multistep(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, states, start + at)
            torch.testing.assert_close(y, want[:, part])
        at += kept
    _, last = scanned(*given, first)
    torch.testing.assert_close(states[torch.arange(2), (start + 9) % 6], last)


def test_of_mamba_1_too():
    dice = torch.Generator().manual_seed(0)
    channels, groups, size, count = 12, 3, 4, 6

    def some(*sizes):
        return torch.randn(sizes, generator=dice, dtype=torch.float64)

    x, dt, A, D = some(2, count, channels), some(2, count, channels).exp(), -some(channels, size).exp(), some(channels)
    B, C, first = some(2, count, groups, size), some(2, count, groups, size), some(2, channels, size)
    states, start = torch.full((2, 5, channels, size), torch.nan, dtype=torch.float64), torch.tensor([4, 0])
    states[torch.arange(2), start % 5] = first
    want = selective_multistep_loop(x, dt, A, B, C, D, first, settle=False)
    made = []
    for part, at in ((slice(0, 4), 0), (slice(1, 4), 1), (slice(4, 6), 4)):
        y = selective_snapshot_multistep(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, states, start + at)
        made.append(y)
    torch.testing.assert_close(made[0], want[:, :4])
    torch.testing.assert_close(made[1], want[:, 1:4])
    torch.testing.assert_close(made[2], want[:, 4:])


def check_kernel(way, shape, dtype, count, device="cpu"):
    heads, _, width, size = shape
    x, dt, A, B, C, D = layer(shape, 3, count, dtype, device=device)
    dice = torch.Generator().manual_seed(2)
    states = torch.randn(3, count + 3, heads, width, size, generator=dice).to(device)
    start = torch.tensor([0, 7, 4], dtype=torch.int32, device=device)
    slots = count + 2
    ring = Ring(*(torch.full((3, slots, *t.shape[2:]), torch.nan, dtype=t.dtype, device=device) for t in (x, B, dt)))
    taken = torch.arange(3).unsqueeze(1), (start.cpu().unsqueeze(1) + torch.arange(count)) % slots
    for part, t in zip(ring.parts(), (x, B, dt), strict=True):
        part[taken] = t
    exact = states.double()
    want = snapshot_multistep(*(t.double() for t in (x, dt, A, B, C, D)), exact, start)
    y = way(ring, C, A, D, states, start)
    assert y.shape == want.shape
    assert (y.double() - want).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * want.norm()
    assert (states.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("count", [1, 5])
def test_in_the_interpreter_the_kernel_is_the_recurrence(interpret, shape, dtype, count):
    module = interpret(snapshot.MODULE)

    def way(ring, C, A, D, states, start):
        return module.snapshot_multistep(*(ring.x, ring.B, ring.dt), C, A, D, states, start)

    check_kernel(way, shape, dtype, count)
    check_kernel(snapshot_ring_multistep, shape, dtype, count)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (32, 8, 128, 128), (80, 1, 64, 128)])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_on_a_gpu_the_kernel_is_the_recurrence(shape, dtype, count):
    check_kernel(snapshot_ring_multistep, shape, dtype, count, "cuda")
