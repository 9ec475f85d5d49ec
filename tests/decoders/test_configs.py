import pytest
from mambabench.harness.config import ConfigError, Structurer
from mambabench.harness.plugins import registry


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"draft": {"use": "ngram", "shortest": 0}}, "draft: shortest is 0; it must be at least 1"),
        ({"draft": {"use": "ngram", "shortest": 5}}, "draft: shortest is 5; .* at most longest \\(4\\)"),
        ({"look": 0}, "look is 0; it must be at least 1"),
        ({"draft": {"use": "layers", "layers": [2, 1]}}, r"draft: layers is \[2, 1\]; .* stand in their order"),
        ({"draft": "model"}, "draft.model: this key is missing"),
        ({"use": "scripted", "tokens": 5.0}, "tokens is 5.0; it must be more than 1 and less than k \\+ 1 \\(5\\)"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(table, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Structurer(registry()).choice("decoder", {"use": "speculative", **table})
