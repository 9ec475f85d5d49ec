"""Attention that keeps documents apart without a mask equals attention with one."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.backends import attention, model
from mambabench.backends.checkpoint import load
from mambabench.backends.hybrid import Mamba2HybridBackend
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.packed import Packed
from mambabench.backends.plugin import Mamba2HybridConfig
from torch import Tensor


def varlen_loop(q, k, v, begins, ends, longest, longest_too, window_size, enable_gqa=True) -> Tensor:
    """What torch's kernel computes, one document after the other."""
    assert begins is ends
    assert longest == longest_too >= int(begins.diff().max())
    assert window_size[1] == 0
    parts = []
    for first, last in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        size = last - first
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            mask = mask.triu(-window_size[0])
        heads = (t[first:last].transpose(0, 1)[None] for t in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turns the way without a mask on and off, whatever the device."""

    def switch(on: bool) -> None:
        for module in (attention, model):
            monkeypatch.setattr(module, "needs_no_mask", lambda h, width: on)

    monkeypatch.setattr(attention, "varlen_attn", varlen_loop)
    return switch


@pytest.fixture(scope="module")
def mixed(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    out = tmp_path_factory.mktemp("ragged") / "artifact"
    Mamba2HybridBackend(Mamba2HybridConfig(chunk=8)).convert(make_llama(), [0, 1, 3], out, seed=0)
    return load(out, torch.float64)


def positions_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(size) for size in row]) for row in rows])


def offsets_of(rows: list[list[int]]) -> Tensor:
    return F.pad(torch.tensor([size for row in rows for size in row]).cumsum(0, dtype=torch.int32), (1, 0))


ROWS = [[5, 1, 9], [15], [8, 7]]


@pytest.mark.parametrize("window", [0, 4])
def test_logits_and_gradients_are_those_with_a_mask(mixed, ragged, window) -> None:
    ids = torch.randint(0, 61, (3, 15), generator=torch.Generator().manual_seed(0))
    mixed.model.layers[1].mixer.window = window
    results = []
    said = {"cu_seq_lens_q": offsets_of(ROWS), "max_length_q": 15}
    for on, told in ((False, {}), (True, {}), (True, said), (True, {**said, "max_documents": 3})):
        ragged(on)
        mixed.zero_grad()
        logits = mixed(input_ids=ids, position_ids=positions_of(ROWS), **told).logits
        logits.sin().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in mixed.parameters() if p.grad is not None)])
    mixed.model.layers[1].mixer.window = 0
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [0, 4])
def test_padding_at_the_right_and_windows_alone_need_no_mask_either(mixed, ragged, monkeypatch, window) -> None:
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    real = torch.arange(12) < torch.tensor([[12], [7]])
    mixed.model.layers[1].mixer.window = window
    results = []
    for on in (False, True):
        ragged(on)
        if on:
            monkeypatch.setattr(model, "attention_mask_of", None)
        with torch.no_grad():
            results.append(mixed(input_ids=ids, attention_mask=real.long()).logits[real])
    mixed.model.layers[1].mixer.window = 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_padding_at_the_left_still_has_a_mask(mixed, ragged) -> None:
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) >= torch.tensor([[0], [5]])).long()
    ragged(True)
    with torch.no_grad():
        got = mixed(input_ids=ids, attention_mask=mask).logits[1, 5:]
        want = mixed(input_ids=ids[1:, 5:]).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None)
def test_documents_know_where_they_begin_whether_told_or_not(rows: list[list[int]]) -> None:
    length = max(map(sum, rows))
    rows = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    positions, offsets = positions_of(rows), offsets_of(rows)
    told, found = Packed.known(positions, offsets, max(map(max, rows))), Packed.of(positions)
    assert torch.equal(told.offsets, offsets)
    if found is None:
        assert all(len(row) == 1 for row in rows)
    else:
        assert torch.equal(found.offsets, offsets)
        assert torch.equal(found.index, told.index)
        assert found.offsets.dtype == told.offsets.dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("groups", [2, 8])
def test_the_kernel_in_bf16_is_near_attention_with_a_mask_in_fp32(window, groups) -> None:
    rows = [[300, 1, 211], [512]]
    dice = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (
        torch.randn(2, 512, heads, 64, device="cuda", generator=dice).bfloat16() for heads in (8, groups, groups, 8)
    )
    documents = Packed.of(positions_of(rows).cuda())
    mask = model.attention_mask_of(512, q.device, None, documents)
    if window:
        mask = attention.within(window, 512, q.device, mask)
    results = []
    for kind in (torch.bfloat16, torch.float32):
        leaves = [t.to(kind).requires_grad_() for t in (q, k, v)]
        if kind == torch.bfloat16:
            y = attention.ragged_attention(*leaves, documents, window)
        else:
            heads = (t.transpose(1, 2) for t in leaves)
            y = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        results.append([y, *torch.autograd.grad(y, leaves, upstream.to(kind))])
    for ours, exact in zip(*results, strict=True):
        assert (ours.float() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.gpu
def test_a_step_on_packed_windows_makes_no_mask_and_waits_for_nothing(mixed, monkeypatch) -> None:
    monkeypatch.setattr(model, "attention_mask_of", None)
    config = copy.deepcopy(mixed.config)
    config.mixers = ["attention"] * 4
    net = HybridForCausalLM(config).to("cuda", torch.bfloat16)
    ids, positions, offsets = (t.cuda() for t in (torch.randint(0, 61, (3, 15)), positions_of(ROWS), offsets_of(ROWS)))
    net.model.layers[1].mixer.window = 4
    for _ in range(2):
        net(input_ids=ids, position_ids=positions, cu_seq_lens_q=offsets, max_length_q=15).logits.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(input_ids=ids, position_ids=positions, cu_seq_lens_q=offsets, max_length_q=15).logits.sum().backward()
        net(input_ids=ids).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
