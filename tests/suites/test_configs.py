import pytest
from mambabench.harness.config import ConfigError, Structurer
from mambabench.harness.plugins import registry

LEAST = {
    "lm-eval": {"batch": 0, "limit": 0},
    "perplexity": {"context": 2, "batch": 1, "limit": 0},
    "losslessness": {"prompts": 1, "prompt_tokens": 1, "new_tokens": 1, "batch": [1]},
    "speed": {"batch": [1], "prompt_tokens": 1, "lengths": [1], "batch_tokens": 0, "new_tokens": 2, "pairs": 1}
    | {"warmup": 0, "temperature": 0},
}
CASES = [(suite, name, low) for suite, options in LEAST.items() for name, low in options.items()]


def choose(suite: str, **options: object) -> object:
    needed = {"tasks": ["a"]} if suite == "lm-eval" else {"data": "text"}
    return Structurer(registry()).choice("suite", {"use": suite, **needed, **options}).config


@pytest.mark.parametrize(("suite", "name", "low"), CASES)
def test_an_option_below_its_least_value_is_refused_before_anything_runs(suite, name, low):
    wrong = [4, low[0] - 1] if isinstance(low, list) else low - 1
    assert choose(suite, **{name: low})
    with pytest.raises(ConfigError) as error:
        choose(suite, **{name: wrong})
    assert f"{name} is " in str(error.value)
    assert "at least" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("suite", "name"), [("losslessness", "batch"), ("speed", "batch"), ("lm-eval", "tasks")])
def test_a_list_that_must_hold_something_may_not_be_empty(suite, name):
    with pytest.raises(ConfigError, match=name):
        choose(suite, **{name: []})


def test_large_batches_of_long_prompts_are_left_out_but_not_all():
    options = {"batch": [1, 4], "lengths": [16, 64]}
    assert choose("speed", **options).requests == ((1, 16, 0), (4, 16, 0), (1, 64, 0), (4, 64, 0))
    assert choose("speed", **options, batch_tokens=64).requests == ((1, 16, 0), (4, 16, 0), (1, 64, 0))
    with pytest.raises(ConfigError, match="batch_tokens is 15; the smallest batch of prompts has 16"):
        choose("speed", **options, batch_tokens=15)


def test_facts_call_requests_by_what_a_step_has_several_of():
    at = choose("speed", temperatures=[0, 0.5], batch=[2])
    assert at.requests == ((2, 32, 0), (2, 32, 0.5))
    assert [at.name(request) for request in at.requests] == ["batch 2, temperature 0", "batch 2, temperature 0.5"]
    both = choose("speed", lengths=[8, 16], temperatures=[1])
    assert both.name(both.requests[1]) == "batch 1, prompt 16, temperature 1"
    with pytest.raises(ConfigError, match="temperatures is"):
        choose("speed", temperatures=[0, -1])


@pytest.mark.parametrize(
    ("name", "template", "said"),
    [
        ("entry", "{key} has {value} {thing}", "it has {thing}; what it may have is {key}, {value}"),
        ("entry", "{key} has {}", "it has {}"),
        ("entry", "{key.upper} has {value}", "it has {key.upper}"),
        ("entry", "{key} has {value:>5}", "it has {value:>5}"),
        ("entry", "{key} has {{value}}", "it must have {value}"),
        ("entry", "{key has {value}", "braces do not match"),
        ("question", "What has {key}? {value}", "it has {value}"),
        ("shown", "{span} {0}", "it has {0}; what it may have is {span}"),
        ("shown", "They said", "it must have {span}"),
    ],
)
def test_a_template_with_other_places_is_refused(name, template, said):
    with pytest.raises(ConfigError) as error:
        Structurer(registry()).choice("suite", {"use": "recall", name: template})
    assert f"{name} is {template!r}; " in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
