"""Steps from a checkpoint are the recurrence over the text that was kept, after any roll-back."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.multistep import multistep, multistep_loop, visible
from mambabench.kernels.scan import scan


def tokens(generator: torch.Generator, batch: int, count: int, groups: int, heads: int, width: int, size: int) -> dict:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, count, *shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(groups, width),
        "dt": torch.nn.functional.softplus(normal(heads)),
        "B": normal(groups, size),
        "C": normal(heads, size),
    }


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


@given(st.integers(0, 1000), st.integers(1, 3), sizes, st.integers(0, 6), st.integers(1, 6), st.booleans())
@settings(max_examples=80, deadline=None)
def test_one_call_is_the_loop(
    seed: int, batch: int, shape: tuple[int, ...], replayed: int, count: int, settle: bool
) -> None:
    groups, repeat, width, size = shape
    heads = groups * repeat
    generator = torch.Generator().manual_seed(seed)
    given_tokens = tokens(generator, batch, replayed + count, groups, heads, width, size)
    x, dt, B, C = (given_tokens[name] for name in ("x", "dt", "B", "C"))
    A, D = -torch.randn(heads, generator=generator).exp().double(), torch.randn(heads, generator=generator).double()
    state = torch.randn(batch, heads, width, size, generator=generator, dtype=torch.float64)
    one_state = state.clone()
    want = multistep_loop(x, dt, A, B, C[:, replayed:], D, state, settle)
    got = multistep(x, dt, A, B, C[:, replayed:], D, one_state, visible(replayed, count, torch.float64), settle)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one_state, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("longest", [None, 5], ids=["exact replay", "fixed replay"])
@pytest.mark.parametrize("seed", range(2))
def test_random_rounds_are_the_recurrence_over_what_was_kept(seed: int, longest: int | None) -> None:
    """150 rounds, any acceptance. Rows that replay less, or a fixed number, are led by tokens without effect."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, shape, steps = 2, (2, 4, 3, 2), 5
    A, D = -torch.rand(4, generator=generator).double() * 0.2, torch.randn(4, generator=generator).double()
    state = torch.zeros(batch, 4, 3, 2, dtype=torch.float64)
    kept = [tokens(generator, 1, 0, *shape) for _ in range(batch)]
    settled = [0] * batch
    for _ in range(150):
        settle = dice.random() < 0.6
        starts = [dice.randint(low, text["x"].shape[1]) for low, text in zip(settled, kept, strict=True)]
        replayed = [start - low for start, low in zip(starts, settled, strict=True)]
        room = steps if settle else steps - max(replayed)
        if room < 1:
            continue
        count, most = dice.randint(1, room), max(replayed) if longest is None else longest
        new = tokens(generator, batch, count, *shape)
        rows = []
        for row, text in enumerate(kept):
            nothing = tokens(generator, 1, most - replayed[row], *shape)
            nothing["dt"].zero_()
            old = {name: t[:, settled[row] : starts[row]] for name, t in text.items()}
            rows.append({name: torch.cat((nothing[name], old[name], new[name][row : row + 1]), 1) for name in new})
            kept[row] = {name: torch.cat((text[name][:, : starts[row]], new[name][row : row + 1]), 1) for name in new}
        x, dt, B, C = (torch.cat([row[name] for row in rows]) for name in ("x", "dt", "B", "C"))
        y = multistep(x, dt, A, B, C[:, most:], D, state, visible(most, count, torch.float64), settle)
        for row, text in enumerate(kept):
            want, _ = scan(text["x"], text["dt"], A, text["B"], text["C"], D)
            torch.testing.assert_close(y[row], want[0, -count:], rtol=1e-9, atol=1e-9)
        if settle:
            settled = starts


def test_low_precision_inputs_are_computed_in_the_state_s() -> None:
    generator = torch.Generator().manual_seed(0)
    low = {name: t.bfloat16() for name, t in tokens(generator, 1, 7, 2, 4, 8, 8).items()}
    high = {name: t.float() for name, t in low.items()}
    A, D, mask, states = -torch.ones(4), torch.ones(4), visible(4, 3, torch.float32), torch.ones(2, 1, 4, 8, 8)
    ys = [
        multistep(t["x"], t["dt"], A, t["B"], t["C"][:, 4:], D, state, mask, True)
        for t, state in zip((low, high), states, strict=True)
    ]
    assert ys[0].dtype == torch.float32
    assert torch.equal(*ys)
    assert torch.equal(*states)
