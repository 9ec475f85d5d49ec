"""Decoding attention equals softmax over what each token may read, in Triton's interpreter and on a GPU."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.decode_attention import Norms, decode_attention, fused, reference
from mambabench.kernels.support import VARIABLE

SHAPES = [
    # heads, groups, width, tokens, start of each row, window
    (4, 2, 16, 1, (0, 5, 70), 0),
    (4, 1, 24, 3, (130, 0, 63), 0),
    (2, 2, 64, 5, (64, 1, 127), 0),
    (8, 2, 32, 16, (65,), 0),
    (4, 2, 16, 4, (100, 2, 7), 8),
    (6, 3, 16, 2, (90, 89, 17), 1),
    (4, 2, 16, 5, (128, 3, 80), 70),
]


@pytest.fixture
def interpreted(interpret, monkeypatch):
    """The kernels in Triton's interpreter, in place of those for a GPU; what they write to holds NaN before."""
    module = interpret(fused.MODULE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(math.nan))
    monkeypatch.setattr(fused, "kernel", lambda _, name: getattr(module, name))
    interpreter = importlib.import_module("triton.runtime.interpreter")
    dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        """The interpreter keeps bf16 as bits, and would multiply these."""
        if handle.dtype != module.tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), module.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    )
    return module


def inputs(heads, groups, width, count, starts, kind=torch.float32, device="cpu", seed=0, norms=False, slack=3):
    """What a call reads. Slots that no token may read hold NaN."""
    dice = torch.Generator().manual_seed(seed)
    batch, capacity = len(starts), max(starts) + count + slack

    def draw(*shape):
        return torch.randn(*shape, generator=dice)

    projected = draw(batch * count, (heads + 2 * groups) * width)
    keys, values = draw(2, batch, capacity, groups, width)
    for row, first in enumerate(starts):
        keys[row, first:], values[row, first:] = math.nan, math.nan
    angles = draw(capacity, width // 2).repeat(1, 2)
    rotary = torch.stack((angles.cos(), angles.sin()), dim=1)
    weights = Norms(1 + 0.3 * draw(width).to(device, kind), 1 + 0.3 * draw(width).to(device, kind), 1e-5)
    projected, keys, values, rotary = (t.to(device, kind) for t in (projected, keys, values, rotary))
    start = torch.tensor(starts, dtype=torch.int32, device=device)
    return [projected, keys, values, start, rotary], weights if norms else None


def exact(given, window, norms):
    """The reference in float64 on the same numbers, with new keys and values rounded as the caches hold them."""
    kept = [t.clone() for t in given[1:3]]
    reference.decode_attention(given[0], *kept, *given[3:], window, norms)
    wide = [t.double() if t.is_floating_point() else t for t in (given[0], *kept, *given[3:])]
    if norms is not None:
        norms = Norms(norms.query.double(), norms.key.double(), norms.eps)
    return reference.decode_attention(*wide, window, norms), kept


def check(way, given, window, norms, tolerance):
    """Output and caches; what was not a new token's slot is bit by bit what it was."""
    wanted, kept = exact(given, window, norms)
    before = [t.clone() for t in given[1:3]]
    got = way(*given, window, norms)
    assert got.dtype == given[0].dtype
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()
    batch, count = len(given[3]), given[0].shape[0] // len(given[3])
    for cache, old, new in zip(given[1:3], before, kept, strict=True):
        for row, first in enumerate(given[3].tolist()):
            fresh = slice(first, first + count)
            assert (cache[row, fresh] - new[row, fresh]).norm() <= tolerance * new[row, fresh].norm()
            old[row, fresh] = cache[row, fresh]
        assert torch.equal(cache.nan_to_num(7.5), old.nan_to_num(7.5))
    assert batch * count == got.shape[0]


@pytest.mark.parametrize(("heads", "groups", "width", "count", "starts", "window"), SHAPES)
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "normed"])
def test_in_the_interpreter_it_is_the_reference(
    interpreted, heads, groups, width, count, starts, window, norms
) -> None:
    given, weights = inputs(heads, groups, width, count, starts, norms=norms)
    check(fused.decode_attention, given, window, weights, 2e-6)


@pytest.mark.parametrize("processors", [1, 4, 1000])
def test_in_the_interpreter_the_parts_of_a_row_add_up(interpreted, monkeypatch, processors) -> None:
    monkeypatch.setattr(interpreted, "processors", lambda _: processors)
    given, _ = inputs(4, 2, 16, 3, (300, 0, 64, 129))
    check(fused.decode_attention, given, 0, None, 2e-6)


@pytest.mark.parametrize("form", [(1, 16, 1, 4), (8, 32, 2, 4), (16, 128, 3, 8)])
def test_in_the_interpreter_any_form_is_the_reference(interpreted, form) -> None:
    given, weights = inputs(4, 2, 16, 3, (300, 0, 64), norms=True)

    def way(*call):
        return interpreted.decode_attention(*call, interpreted.Form(*form))

    check(way, given, 0, weights, 2e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_in_the_interpreter_low_precision_is_within_its_rounding(interpreted, kind) -> None:
    given, _ = inputs(4, 2, 32, 4, (70, 0, 9), kind)
    check(fused.decode_attention, given, 0, None, 0.01)


def test_the_same_call_twice_gives_the_same(interpreted) -> None:
    given, _ = inputs(4, 2, 16, 3, (65, 0))
    assert torch.equal(fused.decode_attention(*given), fused.decode_attention(*given))


def test_what_was_taken_back_is_not_read(interpreted) -> None:
    given, _ = inputs(4, 2, 16, 5, (65, 3))
    fused.decode_attention(*given)
    other, _ = inputs(4, 2, 16, 2, (66, 1), seed=1)
    again = [other[0], *given[1:3], other[3], given[4]]
    clean = [t.clone() for t in again]
    for cache in clean[1:3]:
        cache[0, 66:], cache[1, 1:] = math.nan, math.nan
    assert torch.equal(fused.decode_attention(*again), fused.decode_attention(*clean))


@given(
    heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    count=st.integers(1, 6),
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    window=st.sampled_from([0, 1, 5, 64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_the_reference_is_softmax_over_what_a_token_may_read(heads, count, starts, window, seed) -> None:
    given, _ = inputs(*heads, 8, count, starts, torch.float64, seed=seed)
    y = reference.decode_attention(*given, window).view(len(starts), count, heads[0], 8)
    q = given[0].view(len(starts), count, -1, 8)[:, :, : heads[0]]
    for row, first in enumerate(starts):
        for t in range(count):
            low = max(0, first + t + 1 - window) if window else 0
            cos, sin = given[4][first + t]
            turned = q[row, t] * cos + torch.cat((-q[row, t, :, 4:], q[row, t, :, :4]), dim=1) * sin
            k, v = (cache[row, low : first + t + 1].transpose(0, 1) for cache in given[1:3])
            want = F.scaled_dot_product_attention(turned[None, :, None], k[None], v[None], enable_gqa=True)
            assert torch.allclose(y[row, t], want[0, :, 0], atol=1e-12)


def test_reasons_are_given_where_the_kernel_does_not_serve(monkeypatch) -> None:
    like, rotary = torch.zeros(1, 4), torch.zeros(1, 2, 4)

    def reason(*sizes, dtype=torch.float32, cache=torch.float32):
        return fused.supports(like.to(dtype), cache, *sizes, rotary).reason

    assert reason(4, 2, 16, 1) == "the tensors are on cpu"
    monkeypatch.setattr("mambabench.kernels.support.on_cuda", lambda _: True)
    assert reason(4, 2, 16, 1) == ""
    assert reason(4, 2, 16, 1, dtype=torch.float64) == "the kernel does not serve float64"
    assert reason(4, 2, 16, 1, cache=torch.bfloat16) == "the kernel serves caches of the projection's dtype"
    half = {"dtype": torch.bfloat16, "cache": torch.bfloat16}
    assert reason(4, 2, 16, 17, **half) == "the kernel serves up to 16 tokens and 128 queries of a group at a time"
    assert reason(32, 1, 16, 4, **half) == ""
    assert reason(32, 1, 16, 4) == "the kernel serves up to 16 tokens and 32 queries of a group at a time"
    assert reason(4, 2, 512, 1, **half) == "the kernel serves heads of an even width up to 256, not 512"
    assert reason(4, 2, 15, 1) == "the kernel serves heads of an even width up to 128, not 15"
    monkeypatch.setenv(VARIABLE, "reference")
    assert reason(4, 2, 16, 1) == "the reference was asked for"


def test_on_a_cpu_the_reference_runs() -> None:
    given, _ = inputs(4, 2, 16, 3, (5, 0))
    copies = [t.clone() for t in given]
    assert torch.equal(decode_attention(*given), reference.decode_attention(*copies))


def test_parts_fill_the_processors_and_no_more(interpreted) -> None:
    assert interpreted.splits(8, 2048, 132, 64) == 32
    assert interpreted.splits(8, 16384, 132, 64) == 32
    assert interpreted.splits(1, 16384, 132, 64) == 64
    assert interpreted.splits(8, 100, 132, 64) == 2
    assert interpreted.splits(256, 2048, 132, 64) == 1
    assert interpreted.splits(100, 2048, 132, 64) == 2
    assert interpreted.splits(1000, 2048, 132, 64) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "width", "count", "starts", "window"), SHAPES)
def test_on_a_gpu_fp32_is_the_reference(heads, groups, width, count, starts, window) -> None:
    given, weights = inputs(heads, groups, width, count, starts, device="cuda", norms=True)
    check(decode_attention, given, window, weights, 5e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 5, 9, 16])
@pytest.mark.parametrize(("batch", "longest"), [(1, 2048), (1, 16384), (5, 3000), (33, 700)])
def test_on_a_gpu_it_is_within_twice_the_error_of_pytorch(count, batch, longest) -> None:
    starts = tuple((longest * (row + 1)) // batch for row in range(batch))
    given, _ = inputs(32, 8, 128, count, starts, torch.bfloat16, "cuda", slack=100)
    wanted, _ = exact(given, 0, None)
    plain = reference.decode_attention(given[0], *(t.clone() for t in given[1:3]), *given[3:])
    assert fused.supports(given[0], torch.bfloat16, 32, 8, 128, count, given[4])
    ours = decode_attention(*given)
    assert not ours.isnan().any()
    assert (ours.double() - wanted).norm() <= 2 * (plain.double() - wanted).norm()
    assert (ours.double() - wanted).abs().max() <= 2 * (plain.double() - wanted).abs().max() + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_on_a_gpu_one_graph_serves_every_length(early, begin_early) -> None:
    begin_early(early)
    given, _ = inputs(8, 2, 64, 4, (900, 40, 0), torch.bfloat16, "cuda", slack=200)
    for cache in given[1:3]:
        cache.nan_to_num_(0.5)
    decode_attention(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(*given)
    for starts in ((0, 0, 0), (1, 1000, 64), (1096, 7, 63)):
        given[3].copy_(torch.tensor(starts, dtype=torch.int32))
        wanted, _ = exact(given, 0, None)
        graph.replay()
        assert (y.double() - wanted).norm() <= 0.01 * wanted.norm()
