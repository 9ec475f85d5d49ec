import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.rounds import filters
from mambabench.kernels.rounds.filters import ordered, top_k_mask, top_p_mask

DTYPES = [torch.float32, torch.float64]
values = st.one_of(st.integers(-2, 2).map(float), st.floats(-40, 40, width=32), st.sampled_from([0.0, -0.0]))
rows = st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=4))


def best_first(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


@settings(deadline=None)
@given(rows, st.data(), st.sampled_from(DTYPES))
def test_top_k_keeps_the_k_largest_the_lowest_index_first(logits, data, dtype):
    k = data.draw(st.integers(1, len(logits[0])))
    kept = top_k_mask(torch.tensor(logits, dtype=dtype), k)
    for row, mask in zip(logits, kept, strict=True):
        assert mask.nonzero().flatten().tolist() == sorted(best_first(row)[:k])


@settings(deadline=None, max_examples=200)
@given(rows, st.sampled_from([0.0, 1e-9, 0.11, 0.37, 0.73, 0.97, 1 - 1e-9]), st.sampled_from(DTYPES), st.data())
def test_top_p_keeps_the_fewest_of_the_likeliest_that_reach_the_share(logits, top_p, dtype, data):
    tensor = torch.tensor(logits, dtype=dtype)
    weights = (tensor.double() - tensor.amax(-1, keepdim=True).double()).exp()
    bits, sort = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    masked = data.draw(st.booleans())
    if masked:
        weights = weights.where(top_k_mask(tensor, max(len(logits[0]) - 1, 1)), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "BITS", bits)
        patch.setattr(filters, "SORTED", 100 * sort)
        kept = top_p_mask(tensor, weights, top_p)
    for row, mask, of in zip(logits, kept.tolist(), weights.tolist(), strict=True):
        order = [token for token in best_first(row) if of[token] > 0]
        chosen = [token for token in order if mask[token]]
        assert chosen == order[: len(chosen)], "the likeliest, the lowest index first"
        assert chosen, "at least one"
        assert sum(mask) == len(chosen), "none of weight zero"
        need, slack = top_p * sum(of), 1e-12 * sum(of)
        assert sum(of[token] for token in chosen) >= need - slack, "enough"
        assert len(chosen) == 1 or sum(of[token] for token in chosen[:-1]) < need + slack, "no more than needed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordered_numbers_are_in_the_order_of_the_floats(dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([-torch.inf, -3.5, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, 1.0 + torch.finfo(dtype).eps, torch.inf])
    x = x.to(dtype)
    keys = ordered(x)
    assert ((keys[1:] > keys[:-1]) == (x[1:] > x[:-1])).all()
    assert keys[4] == keys[5]


@pytest.mark.parametrize("bits", [1, 4])
def test_a_large_vocabulary_gives_what_sorting_gives(bits, monkeypatch):
    monkeypatch.setattr(filters, "BITS", bits)
    monkeypatch.setattr(filters, "SORTED", 0)
    logits = 3 * torch.randn(4, 3, 5000, generator=torch.Generator().manual_seed(0))
    weights = (logits.double() - logits.amax(-1, keepdim=True)).exp()
    ranked, order = weights.sort(dim=-1, descending=True)
    kept = (ranked.cumsum(-1) - ranked) < 0.9 * weights.sum(-1, keepdim=True)
    wanted = torch.zeros_like(kept).scatter(-1, order, kept)
    assert torch.equal(top_p_mask(logits, weights, 0.9), wanted)
