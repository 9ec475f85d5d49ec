"""How processes share a batch: evenly, in parts that are never larger than those of one process alone."""

from hypothesis import given
from hypothesis import strategies as st
from mambabench.harness.parts import rows_at_a_time

few = st.integers(1, 24)


@given(few, few, few)
def test_ranks_and_their_parts_make_up_the_batch_in_parts_no_larger_than_alone(rows, parts, ranks):
    batch, accumulation = rows * ranks * parts, parts
    for shared in (batch, rows * ranks):
        size = rows_at_a_time(shared, accumulation, ranks)
        assert 1 <= size <= max(1, shared // accumulation)
        assert shared % (size * ranks) == 0
        assert size <= rows_at_a_time(shared, accumulation, 1)


@given(few, few, few)
def test_a_share_that_can_be_split_into_so_many_parts_is(rows, parts, ranks):
    assert rows_at_a_time(rows * parts * ranks, parts, ranks) == rows


@given(few, few)
def test_fewer_rows_than_parts_are_computed_one_by_one(rows, ranks):
    assert rows_at_a_time(rows * ranks, rows * ranks, ranks) == 1
