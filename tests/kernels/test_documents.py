"""Documents of a packed batch, from the positions that a collator gives."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench.kernels.documents import Documents

sizes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=3)


def packed(rows: list[list[int]]) -> torch.Tensor:
    """Positions of documents of these sizes; shorter rows end with one more document."""
    length = max(map(sum, rows)) + 1
    return torch.stack([torch.cat([torch.arange(n) for n in (*row, length - sum(row))]) for row in rows])


@given(sizes)
def test_a_position_that_does_not_go_on_starts_a_document(rows: list[list[int]]) -> None:
    positions = packed(rows)
    documents = Documents.of(positions)
    assert documents is not None
    want = torch.stack([(row == 0).cumsum(0) - 1 for row in positions])
    assert torch.equal(documents.index.long(), want)
    assert torch.equal(documents.starts, (positions == 0) & (torch.arange(positions.shape[1]) > 0))


@given(sizes, st.integers(1, 4))
def test_a_token_knows_whether_an_earlier_one_is_of_its_document(rows: list[list[int]], distance: int) -> None:
    positions = packed(rows)
    documents = Documents.of(positions)
    first = documents.index == 0
    assert torch.equal(documents.before(distance).squeeze(-1), (positions >= distance) | first)


def test_one_document_a_row_needs_no_telling_apart() -> None:
    assert Documents.of(torch.arange(9).expand(2, -1)) is None
    assert Documents.of(torch.arange(9).expand(2, -1) + torch.tensor([[3], [0]])) is None


def test_padding_starts_no_document() -> None:
    positions = torch.tensor([[1, 1, 0, 1, 2, 1], [0, 1, 2, 3, 0, 1]])
    keep = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    assert Documents.of(positions[:1], keep[:1]) is None
    assert Documents.of(positions, keep).index.tolist() == [[0] * 6, [0, 0, 0, 0, 1, 1]]


def test_padding_between_documents_hides_no_start_and_makes_none_within_one() -> None:
    keep = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1]]).bool()
    restarted = torch.tensor([[1, 0, 1, 1, 1, 0, 1, 2, 0]])
    documents = Documents.of(restarted, keep)
    assert documents is not None
    assert documents.index.tolist() == [[0] * 5 + [1] * 3 + [2]]
    for counted in ((keep.long().cumsum(1) - 1).clamp(min=0), torch.arange(9).unsqueeze(0)):
        assert Documents.of(counted, keep) is None


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 2))
def test_spread_rows_have_a_place_in_front_of_every_document_but_the_first(rows: list[list[int]], known: int) -> None:
    length = max(sum(row) for row in rows)
    rows = [[*row[:-1], row[-1] + length - sum(row)] for row in rows]
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in rows])
    most = max(len(row) for row in rows) - 1
    index = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    for documents in (Documents.of(positions), Documents(index), Documents(index, most + known)):
        if documents is None:
            assert most == 0
            continue
        spread = documents.spread
        assert spread.length >= length + most
        laid = torch.full((len(rows) * spread.length,), -1)
        laid[spread.places] = positions.flatten()
        for row, places, breaks in zip(rows, laid.view(len(rows), -1), spread.breaks, strict=True):
            want = torch.cat([torch.cat((torch.tensor([-2]), torch.arange(size))) for size in row])[1:]
            assert places.masked_fill(breaks, -2)[: len(want)].tolist() == want.tolist()
            assert not breaks[len(want) :].any()
            assert (places[len(want) :] == -1).all()
