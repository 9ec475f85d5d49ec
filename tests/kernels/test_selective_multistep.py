"""Steps of a Mamba-1 layer from a checkpoint are the recurrence over the text that was kept."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.multistep import selective_multistep, selective_multistep_loop
from mambabench.kernels.selective_scan import selective_scan_loop, step_sizes


def tokens(generator: torch.Generator, batch: int, count: int, groups: int, channels: int, size: int) -> dict:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, count, *shape, generator=generator, dtype=torch.float64)

    return {"x": normal(channels), "raw": normal(channels), "B": normal(groups, size), "C": normal(groups, size)}


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))


@given(st.integers(0, 1000), st.integers(1, 3), sizes, st.integers(0, 6), st.integers(1, 6), st.booleans())
@settings(max_examples=80, deadline=None)
def test_one_call_is_the_loop_and_the_loop_is_the_scan(
    seed: int, batch: int, shape: tuple[int, ...], replayed: int, count: int, settle: bool
) -> None:
    groups, repeat, size = shape
    channels = groups * repeat
    generator = torch.Generator().manual_seed(seed)
    text = tokens(generator, batch, replayed + count, groups, channels, size)
    x, raw, B, C = (text[name] for name in ("x", "raw", "B", "C"))
    A, D = -torch.randn(channels, size, generator=generator).exp().double(), torch.randn(channels).double()
    state = torch.randn(batch, channels, size, generator=generator, dtype=torch.float64)
    dt, states = step_sizes(raw, None, None), [state.clone(), state.clone()]
    want, _ = selective_scan_loop(x, raw, A, B, C, D, state=state)
    end = state
    if settle and replayed:
        end = selective_scan_loop(*(t[:, :replayed] for t in (x, raw)), A, B[:, :replayed], C, state=state)[1]
    for way, now in zip((selective_multistep_loop, selective_multistep), states, strict=True):
        got = way(x, dt, A, B, C[:, replayed:], D, now, settle)
        torch.testing.assert_close(got, want[:, replayed:], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(now, end, rtol=1e-10, atol=1e-10)


def test_tokens_without_effect_may_lead_the_replay() -> None:
    generator = torch.Generator().manual_seed(0)
    text = tokens(generator, 2, 9, 2, 6, 4)
    dt, A, D = step_sizes(text["raw"], None, None), -torch.rand(6, 4).double(), torch.randn(6).double()
    dt[0, :3] = 0
    states = torch.randn(2, 6, 4, dtype=torch.float64).repeat(2, 1, 1, 1)
    whole = selective_multistep(text["x"], dt, A, text["B"], text["C"][:, 5:], D, states[0], True)
    rest = {name: t[:1, 3:] for name, t in text.items()}
    alone = selective_multistep(rest["x"], dt[:1, 3:], A, rest["B"], rest["C"][:, 2:], D, states[1, :1], True)
    torch.testing.assert_close(whole[:1], alone)
    torch.testing.assert_close(states[0, :1], states[1, :1])


def test_low_precision_inputs_are_computed_in_the_state_s() -> None:
    generator = torch.Generator().manual_seed(0)
    low = {name: t.bfloat16() for name, t in tokens(generator, 1, 7, 2, 8, 8).items()}
    A, D, states = -torch.ones(8, 8), torch.ones(8), torch.ones(2, 1, 8, 8)
    ys = []
    for text, state in zip((low, {name: t.float() for name, t in low.items()}), states, strict=True):
        dt = step_sizes(text["raw"], None, None)
        ys.append(selective_multistep(text["x"], dt, A, text["B"], text["C"][:, 4:], D, state, True))
    assert ys[0].dtype == torch.float32
    assert torch.equal(*ys)
    assert torch.equal(*states)
