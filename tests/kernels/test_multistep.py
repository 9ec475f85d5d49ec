"""Steps from a checkpoint and a ring are the recurrence over the text that was kept, after any roll-back."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.multistep import indices, multistep, multistep_loop
from mambabench.kernels.scan import scan, scan_loop

Rings = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tokens(generator: torch.Generator, batch: int, count: int, groups: int, heads: int, width: int, size: int) -> dict:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, count, *shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(groups, width),
        "dt": torch.nn.functional.softplus(normal(heads)),
        "B": normal(groups, size),
        "C": normal(heads, size),
    }


def empty(batch: int, slots: int, groups: int, heads: int, width: int, size: int) -> Rings:
    return tuple(
        torch.full((batch, slots, *shape), float("nan"), dtype=torch.float64)
        for shape in ((groups, width), (heads,), (groups, size))
    )


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


@given(st.integers(0, 1000), st.integers(1, 3), sizes, st.integers(1, 6), st.integers(0, 3), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_one_call_is_the_loop(
    seed: int, batch: int, shape: tuple[int, ...], count: int, spare: int, settle: bool, data: st.DataObject
) -> None:
    groups, repeat, width, size = shape
    heads = groups * repeat
    generator = torch.Generator().manual_seed(seed)
    replayed = [data.draw(st.integers(0, 6)) for _ in range(batch)]
    settled = torch.tensor([data.draw(st.integers(0, 40)) for _ in range(batch)], dtype=torch.int32)
    start = settled + torch.tensor(replayed, dtype=torch.int32)
    slots = max(replayed) + count + spare
    state = torch.randn(batch, heads, width, size, generator=generator, dtype=torch.float64)
    ring = empty(batch, slots, groups, heads, width, size)
    old = tokens(generator, batch, slots, groups, heads, width, size)
    for store, name in zip(ring, ("x", "dt", "B"), strict=True):
        store.copy_(old[name])
    new = tokens(generator, batch, count, groups, heads, width, size)
    A, D = -torch.randn(heads, generator=generator).exp().double(), torch.randn(heads, generator=generator).double()
    one_state, one_ring = state.clone(), tuple(t.clone() for t in ring)
    want = multistep_loop(new["x"], new["dt"], A, new["B"], new["C"], D, state, ring, settled, start, settle)
    at = indices(settled, start, count, slots, dtype=torch.float64)
    got = multistep(new["x"], new["dt"], A, new["B"], new["C"], D, one_state, one_ring, at, settle)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one_state, state, rtol=1e-10, atol=1e-10)
    for one, other in zip(one_ring, ring, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("longest", [None, 5], ids=["exact replay", "fixed replay"])
@pytest.mark.parametrize("seed", range(2))
def test_random_rounds_are_the_recurrence_over_what_was_kept(seed: int, longest: int | None) -> None:
    """150 rounds, any acceptance. Where only live slots are replayed, the ring starts as NaN: an early read shows."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, groups, heads, width, size, steps = 2, 2, 4, 3, 2, 5
    A, D = -torch.rand(heads, generator=generator).double() * 0.2, torch.randn(heads).double()
    state = torch.zeros(batch, heads, width, size, dtype=torch.float64)
    ring = empty(batch, 2 * steps, groups, heads, width, size)
    if longest is not None:
        for store in ring:
            store.zero_()
    kept: list[dict[str, torch.Tensor]] = [
        {name: t[0, :0] for name, t in tokens(generator, 1, 0, groups, heads, width, size).items()}
        for _ in range(batch)
    ]
    settled = torch.zeros(batch, dtype=torch.int32)
    for _ in range(150):
        settle = dice.random() < 0.6
        ends = [len(text["x"]) for text in kept]
        start = torch.tensor([dice.randint(low, end) for low, end in zip(settled.tolist(), ends, strict=True)]).int()
        room = steps if settle else steps - int((start - settled).max())
        if room < 1:
            continue
        count = dice.randint(1, room)
        new = tokens(generator, batch, count, groups, heads, width, size)
        at = indices(settled, start, count, 2 * steps, longest, torch.float64)
        y = multistep(new["x"], new["dt"], A, new["B"], new["C"], D, state, ring, at, settle)
        for row in range(batch):
            kept[row] = {name: torch.cat((kept[row][name][: start[row]], new[name][row])) for name in new}
            whole = {name: t.unsqueeze(0) for name, t in kept[row].items()}
            want, _ = scan(whole["x"], whole["dt"], A, whole["B"], whole["C"], D)
            torch.testing.assert_close(y[row], want[0, -count:], rtol=1e-9, atol=1e-9)
        if settle:
            settled = start


def test_values_are_rounded_to_the_ring_before_use() -> None:
    """A replay makes the very state that the first run of the tokens saw."""
    generator = torch.Generator().manual_seed(0)
    new = tokens(generator, 1, 4, 2, 4, 8, 8)
    A, D = -torch.ones(4), torch.zeros(4)
    ring = (torch.zeros(1, 12, 2, 8).bfloat16(), torch.zeros(1, 12, 4), torch.zeros(1, 12, 2, 8).bfloat16())
    state = torch.zeros(1, 4, 8, 8)
    zero = torch.zeros(1, dtype=torch.int32)
    x, b = new["x"].bfloat16().float(), new["B"].bfloat16().float()
    dt, c = new["dt"].float(), new["C"].float()
    y = multistep(new["x"].float(), dt, A, new["B"].float(), c, D, state, ring, indices(zero, zero, 4, 12), True)
    want, end = scan_loop(x, dt, A, b, c, D)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    later = indices(zero, zero + 4, 1, 12)
    multistep(x[:, :1], dt[:, :1], A, b[:, :1], c[:, :1], D, state, ring, later, True)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)
