"""What the host says of a batch is what a device would have found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mambabench.backends.packed import Packed
from mambabench.distillers.batches import counted, known, read
from mambabench.distillers.losses import IGNORED, shifted
from mambabench.distillers.windows import collate, pack
from mambabench.harness.interfaces import MambabenchError
from transformers import MambaConfig, MambaForCausalLM

documents = st.lists(st.integers(2, 20), min_size=1, max_size=12)


def windows_of(sizes, context):
    return pack([([number + 1] * size, [number + 1] * size) for number, size in enumerate(sizes)], context)


@given(documents, st.integers(2, 24))
def test_documents_and_what_counts_are_found_on_the_host(sizes, context):
    windows = windows_of(sizes, context)
    batch = collate([windows[row] for row in range(len(windows))])
    targets = shifted(batch["labels"]).flatten()
    assert torch.equal(targets[batch["counted"]], targets[targets != IGNORED])
    assert torch.equal(counted({}, targets), batch["counted"])
    length = batch["input_ids"].shape[1]
    positions = windows.positions[:, :length].long()
    if "position_ids" not in batch:
        assert torch.equal(positions, torch.arange(length).expand_as(positions))
        assert "cu_seq_lens_q" not in batch
        return
    assert torch.equal(batch["position_ids"], positions)
    offsets = batch["cu_seq_lens_q"]
    assert offsets.dtype == torch.int32
    assert offsets[-1] == positions.numel()
    assert offsets[:-1].tolist() == (positions.flatten() == 0).nonzero().flatten().tolist()
    assert batch["max_length_q"] == int(offsets.diff().max())
    assert batch["max_documents"] == int((positions == 0).sum(1).max())


def test_windows_of_one_document_each_say_nothing_of_documents():
    windows = windows_of([8, 8, 5], 8)
    batch = collate([windows[row] for row in range(3)])
    assert not {"position_ids", "cu_seq_lens_q", "max_length_q", "max_documents"} & set(batch)


def test_a_model_is_given_what_it_names_and_positions_always(hybrid):
    positions = torch.tensor([[0, 1, 0, 1]])
    batch = {"input_ids": positions, "labels": positions, **known(positions, positions)}

    class Other(torch.nn.Module):
        def forward(self, input_ids, **_):
            return input_ids

    assert set(read(Other(), batch)) == {"input_ids", "position_ids"}
    student = hybrid.backend.module(hybrid.path)
    assert set(read(student, batch)) == {"input_ids", "position_ids", "cu_seq_lens_q", "max_length_q", "max_documents"}
    with torch.no_grad():
        told = student(**read(student, batch)).logits
        found = student(input_ids=positions, position_ids=positions).logits
    assert torch.equal(told, found)


def test_a_scan_is_lengthened_for_the_documents_of_a_row_not_of_the_batch():
    """A row has a place for each of its documents but the first; not one for each of all rows."""
    positions = torch.arange(6).repeat(1, 2).repeat(8, 1)
    batch = known(positions, positions)
    told = [batch[name] for name in ("cu_seq_lens_q", "max_length_q")]
    assert Packed.known(positions, *told, batch["max_documents"]).spread.length == 13
    assert Packed.known(positions, *told).spread.length == 20


def test_a_model_that_would_mix_documents_is_refused():
    config = MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=1)
    model, ids = MambaForCausalLM(config), torch.tensor([[1, 2, 3, 4]])
    alone = {"input_ids": ids, **known(ids, torch.arange(4)[None])}
    assert set(read(model, alone)) == {"input_ids"}
    with pytest.raises(MambabenchError, match="MambaForCausalLM: takes no position_ids, by which documents"):
        read(model, {"input_ids": ids, **known(ids, torch.tensor([[0, 1, 0, 1]]))})
