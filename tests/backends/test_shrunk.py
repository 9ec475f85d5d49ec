"""A few layers of a model, as a model of its own."""

import pytest
import torch
from mambabench.backends.plugin import ShrunkConfig
from mambabench.backends.shrunk import ShrunkBackend
from mambabench.harness.interfaces import Unsupported

LAYERS = [0, 3]


@pytest.fixture(scope="module")
def shrunk():
    return ShrunkBackend(ShrunkConfig())


def test_what_stays_is_as_it_was_under_a_new_number(half, shrunk, tmp_path):
    shrunk.convert(half, LAYERS[::-1], tmp_path / "draft", seed=0)
    few, whole = shrunk.module(tmp_path / "draft"), shrunk.module(half)
    assert few.config.mixers == ["mamba2", "attention"]
    before = whole.state_dict()
    for name, tensor in few.state_dict().items():
        for place, layer in reversed(list(enumerate(LAYERS))):
            name = name.replace(f"model.layers.{place}.", f"model.layers.{layer}.")
        assert torch.equal(tensor, before[name])
    assert shrunk.describe(tmp_path / "draft")["attention_layers"] == [1]
    assert shrunk.tokenizer(tmp_path / "draft").decode([5]) == shrunk.tokenizer(half).decode([5])


def test_it_says_what_the_layers_of_the_model_itself_say(artifact, shrunk, tmp_path):
    shrunk.convert(artifact, LAYERS, tmp_path / "draft", seed=0)
    own = shrunk.load(artifact, "cpu", "float64").shrunk(LAYERS)
    ids, lengths = torch.arange(3, 17).view(2, 7), torch.tensor([7, 7], dtype=torch.int32)
    few = shrunk.load(tmp_path / "draft", "cpu", "float64")
    said = few.prefill(ids, lengths, few.open(2, 8, 1))
    assert torch.equal(said, own.prefill(ids, lengths, own.open(2, 8, 1)))


@pytest.mark.parametrize("layers", [[], [4], [-1, 0]])
def test_layers_that_are_not_there_are_refused(half, shrunk, tmp_path, layers):
    with pytest.raises(Unsupported, match="of a model of 4 cannot be"):
        shrunk.convert(half, layers, tmp_path / "draft", seed=0)
