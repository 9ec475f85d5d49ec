"""Batches hold what they may, and memory that runs out makes them smaller."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.batches import MOST, TOKENS, Batches


@given(st.lists(st.integers(1, 3000), max_size=200), st.integers(0, 20))
def test_every_text_is_run_once_the_longest_first_and_none_beyond_the_room(lengths, batch):
    seen = []

    def work(chosen):
        sizes = [size for _, size in chosen]
        if batch:
            assert len(chosen) <= batch
        else:
            assert len(chosen) <= MOST
            assert len(chosen) * max(sizes) <= TOKENS["cpu"] or len(chosen) == 1
        seen.extend(chosen)

    Batches(MockStepper(), batch).run(enumerate(lengths), lambda member: member[1], work)
    assert sorted(seen) == list(enumerate(lengths))
    assert [size for _, size in seen] == sorted(lengths, reverse=True)


def test_a_batch_for_which_memory_does_not_suffice_is_halved():
    sizes = []

    def work(chosen):
        if len(chosen) > 9:
            raise torch.OutOfMemoryError
        sizes.append(len(chosen))

    batches = Batches(MockStepper(), 0)
    batches.run([8] * 40, int, work)
    assert sizes == [8] * 5
    with pytest.raises(torch.OutOfMemoryError):
        Batches(MockStepper(), 16).run([8] * 40, int, work)


def test_a_text_that_does_not_fit_alone_is_out_of_memory():
    def work(chosen):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Batches(MockStepper(), 0).run([8, 7, 9], int, work)
