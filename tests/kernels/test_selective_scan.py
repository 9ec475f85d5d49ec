"""The scan of Mamba-1 by chunks is the recurrence, gradients and documents included."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.documents import Documents
from mambabench.kernels.selective_scan import selective_scan, selective_scan_loop


def inputs(seed: int, batch: int, length: int, groups: int, repeat: int, size: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = groups * repeat
    return {
        "x": normal(batch, length, channels),
        "raw": normal(batch, length, channels),
        "A": -normal(channels, size).exp(),
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, groups, size),
        "D": normal(channels),
        "bias": normal(channels),
    }


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "batch": st.integers(1, 3),
        "length": st.integers(1, 19),
        "groups": st.integers(1, 3),
        "repeat": st.integers(1, 4),
        "size": st.integers(1, 5),
    }
)


@given(shapes, st.integers(1, 9), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_chunked_scan_and_its_gradients_are_the_recurrence(
    shape: dict, chunk: int, carried: bool, padded: bool, packed: bool
) -> None:
    given_inputs = inputs(**shape)
    generator = torch.Generator().manual_seed(shape["seed"])
    at = shape["batch"], shape["length"]
    if carried:
        channels = shape["groups"] * shape["repeat"]
        given_inputs["state"] = torch.randn(at[0], channels, shape["size"], generator=generator, dtype=torch.float64)
    keep = torch.rand(at, generator=generator) < 0.7 if padded else None
    documents = Documents((torch.rand(at, generator=generator) < 0.3).cumsum(1, dtype=torch.int32)) if packed else None
    results = []
    for way, extra in ((selective_scan_loop, {}), (selective_scan, {"chunk": chunk})):
        leaves = {name: t.clone().requires_grad_() for name, t in given_inputs.items()}
        y, state = way(**leaves, keep=keep, documents=documents, **extra)
        (y.sin().sum() + state.square().sum()).backward()
        results.append([y, state, *(leaf.grad for leaf in leaves.values())])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_documents_are_scanned_as_if_alone() -> None:
    given_inputs = inputs(0, batch=1, length=20, groups=2, repeat=3, size=4)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)]).unsqueeze(0)
    y, state = selective_scan(**given_inputs, documents=Documents.of(positions), chunk=8)
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        alone = {name: t[:, part] if t.ndim > 2 else t for name, t in given_inputs.items()}
        want, end = selective_scan_loop(**alone)
        torch.testing.assert_close(y[:, part], want)
    torch.testing.assert_close(state, end)


def test_two_halves_with_the_state_between_are_the_whole() -> None:
    given_inputs = inputs(1, batch=2, length=20, groups=1, repeat=3, size=2)
    whole, end = selective_scan(**given_inputs, chunk=8)
    halves = [
        {name: t[:, part] if t.ndim > 2 else t for name, t in given_inputs.items()}
        for part in (slice(7), slice(7, None))
    ]
    first, state = selective_scan(**halves[0], chunk=8)
    second, state = selective_scan(**halves[1], state=state, chunk=8)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_fp32_under_autocast_too(dtype: torch.dtype) -> None:
    given_inputs = {name: t.to(dtype) for name, t in inputs(3, 1, 40, 2, 2, 4).items()}
    got, state = selective_scan(**given_inputs, chunk=16)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = selective_scan(**given_inputs, chunk=16)
    assert got.dtype == state.dtype == torch.float32
    assert torch.equal(got, again)
    want, want_state = selective_scan_loop(**{name: t.double() for name, t in given_inputs.items()})
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), want_state, rtol=1e-4, atol=1e-4)


def test_memory_kept_for_backward_is_not_that_of_the_states() -> None:
    given_inputs = inputs(4, batch=1, length=256, groups=1, repeat=32, size=16)
    leaves = {name: t.requires_grad_() for name, t in given_inputs.items()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        selective_scan(**leaves, chunk=32)
    assert sum(kept.values()) < 256 * 32 * 16 * 8 / 2


def test_agrees_with_the_reference_of_transformers() -> None:
    from transformers.models.mamba import modeling_mamba

    oracle = inspect.unwrap(modeling_mamba.mamba_selective_scan)
    given_inputs = {name: t.float() for name, t in inputs(4, 2, 37, 1, 6, 5).items()}
    got, got_state = selective_scan(**given_inputs, chunk=8)
    x, raw, b, c = (given_inputs[name].flatten(2).transpose(1, 2) for name in ("x", "raw", "B", "C"))
    want, want_state = oracle(
        x, raw, given_inputs["A"], b, c, D=given_inputs["D"], delta_bias=given_inputs["bias"], delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_state, want_state, rtol=1e-4, atol=1e-4)
