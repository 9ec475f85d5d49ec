"""Options of judges: mistakes are told at planning, and only what decides a reply is part of a key."""

import pytest
from mambabench.harness.config import plain
from mambabench.harness.judges.configs import OpenAIConfig, RecordedConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "https://me:secret@host/v1"}, "holds a secret"),
        ({"options": "{"}, "options is not JSON"),
        ({"options": "[]"}, "not a JSON object"),
        ({"options": '{"model": "x"}'}, "sets 'model'"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0.0}, "timeout is 0"),
        ({"allow_failed": 2.0}, "allow_failed is 2"),
    ],
)
def test_a_mistake_is_told_with_its_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenAIConfig(**{"model": "rule", **options})


def test_a_recording_has_a_path() -> None:
    with pytest.raises(ValueError, match="path is empty"):
        RecordedConfig(path="")


def test_where_and_how_fast_a_judge_is_asked_is_no_part_of_a_key() -> None:
    one = OpenAIConfig(model="rule")
    other = OpenAIConfig(model="rule", base_url="http://host:8000/v1", key_env="KEY", concurrency=32, timeout=9.0)
    assert plain(one, defaults=False) == plain(other, defaults=False) == {"model": "rule"}
    assert plain(other)["base_url"] == "http://host:8000/v1"
    assert "asks_again" in plain(OpenAIConfig(model="rule", asks_again=5), defaults=False)
