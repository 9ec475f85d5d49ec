"""The chunked scan is the recurrence, whatever the shapes, and agrees with an implementation that is not ours."""

import functools
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.documents import Documents
from mambabench.kernels.scan import scan, scan_loop


def inputs(seed: int, batch: int, length: int, groups: int, repeat: int, width: int, size: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = groups * repeat
    return {
        "x": normal(batch, length, groups, width),
        "dt": torch.nn.functional.softplus(normal(batch, length, heads)),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, heads, size),
        "D": normal(heads),
    }


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "batch": st.integers(1, 3),
        "length": st.integers(1, 23),
        "groups": st.integers(1, 3),
        "repeat": st.integers(1, 3),
        "width": st.integers(1, 5),
        "size": st.integers(1, 5),
    }
)


@given(shapes, st.integers(1, 9), st.booleans(), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_chunked_scan_is_the_recurrence(
    shape: dict, chunk: int, carried: bool, packed: bool, data: st.DataObject
) -> None:
    given_inputs = inputs(**shape)
    state = lengths = None
    if carried:
        heads = shape["groups"] * shape["repeat"]
        state = torch.randn(shape["batch"], heads, shape["width"], shape["size"], dtype=torch.float64)
        lengths = torch.tensor([data.draw(st.integers(0, shape["length"])) for _ in range(shape["batch"])])
    documents = None
    if packed:
        starts = [[data.draw(st.booleans()) for _ in range(shape["length"])] for _ in range(shape["batch"])]
        documents = Documents(torch.tensor(starts).cumsum(1, dtype=torch.int32))
    want, want_state = scan_loop(**given_inputs, state=state, lengths=lengths, documents=documents)
    got, got_state = scan(**given_inputs, state=state, lengths=lengths, chunk=chunk, documents=documents)
    assert got.shape == want.shape == (shape["batch"], shape["length"], heads_of(shape), shape["width"])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_state, want_state, rtol=1e-10, atol=1e-10)


def heads_of(shape: dict) -> int:
    return shape["groups"] * shape["repeat"]


def test_lengths_stop_the_state_where_the_text_ends() -> None:
    given_inputs = inputs(0, batch=2, length=9, groups=2, repeat=2, width=3, size=4)
    _, state = scan(**given_inputs, lengths=torch.tensor([5, 9]), chunk=4)
    cut = {name: t[:1, :5] if t.ndim > 1 else t for name, t in given_inputs.items()}
    torch.testing.assert_close(state[:1], scan(**cut)[1])


def test_two_halves_with_the_state_between_are_the_whole() -> None:
    given_inputs = inputs(1, batch=2, length=20, groups=1, repeat=3, width=4, size=2)
    whole, end = scan(**given_inputs, chunk=8)
    halves = [
        {name: t[:, part] if t.ndim > 1 else t for name, t in given_inputs.items()}
        for part in (slice(7), slice(7, None))
    ]
    first, state = scan(**halves[0], chunk=8)
    second, state = scan(**halves[1], state=state, chunk=8)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(state, end)


def test_documents_are_scanned_as_if_alone() -> None:
    given_inputs = inputs(0, batch=1, length=20, groups=2, repeat=2, width=3, size=4)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)]).unsqueeze(0)
    y, state = scan(**given_inputs, documents=Documents.of(positions), chunk=4)
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        alone = {name: t[:, part] if t.ndim > 1 else t for name, t in given_inputs.items()}
        want, end = scan_loop(**alone)
        torch.testing.assert_close(y[:, part], want)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_recurrence(packed: bool) -> None:
    given_inputs = inputs(2, batch=2, length=11, groups=2, repeat=2, width=3, size=3)
    documents = Documents(torch.tensor([[0] * 5 + [1] * 3 + [2] * 3, [0] * 8 + [1] * 3])) if packed else None
    gradients = []
    for way in (scan_loop, functools.partial(scan, chunk=4)):
        leaves = {name: t.clone().requires_grad_() for name, t in given_inputs.items()}
        y, state = way(**leaves, documents=documents)
        (y.square().sum() + state.square().sum()).backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for got, want in zip(*gradients, strict=True):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    given_inputs = {name: t.to(dtype) for name, t in inputs(3, 1, 40, 2, 2, 4, 4).items()}
    got, state = scan(**given_inputs, chunk=16)
    assert got.dtype == state.dtype == torch.float32
    want, want_state = scan_loop(**{name: t.double() for name, t in given_inputs.items()})
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), want_state, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_reach_the_state() -> None:
    given_inputs = {name: t.float() for name, t in inputs(5, 2, 30, 2, 2, 4, 4).items()}
    want = scan(**given_inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = scan(**given_inputs)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_agrees_with_the_reference_of_transformers() -> None:
    from transformers.models.mamba2 import modeling_mamba2

    oracle = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    given_inputs = {name: t.float() for name, t in inputs(4, 2, 37, 2, 3, 4, 5).items()}
    state = torch.randn(2, 6, 4, 5)
    got, got_state = scan(**given_inputs, state=state, chunk=8)
    x, b = (given_inputs[name].repeat_interleave(3, dim=2) for name in "xB")
    want, want_state = oracle(
        x, given_inputs["dt"], given_inputs["A"], b, given_inputs["C"], chunk_size=8, D=given_inputs["D"],
        initial_states=state, return_final_states=True,
    )  # fmt: skip
    torch.testing.assert_close(got, want.view_as(got), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_state, want_state, rtol=1e-4, atol=1e-4)
