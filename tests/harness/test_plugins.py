"""The plug-in core, with local files; tests/plugins does the same through installed packages."""

import textwrap

import pytest
from mambabench import MambabenchError
from mambabench.harness import plugins
from mambabench.harness.interfaces import Comparison, Host, Needs, Outcome, StepView

HEAD = """
from dataclasses import dataclass
from mambabench import Component, Refusal, Verdict, hookimpl

@dataclass(frozen=True)
class Config:
    size: int = 1

@dataclass
class Loose:
    size: int = 1

def part(**changes):
    return Component(**{"kind": "decoder", "name": "mine", "target": "mine:make", "config": Config, **changes})
"""

STEP = StepView(key="k", kind="measure", labels=("a/b/c",), component="suite:x", needs=Needs())


@pytest.fixture
def local(tmp_path):
    def write(body, name="mine.py"):
        file = tmp_path / name
        file.write_text(HEAD + textwrap.dedent(body))
        return file

    return write


def components(text):
    return f"""
@hookimpl
def mambabench_components():
    return [{text}]
"""


def only_broken(registry):
    (broken,) = registry.broken
    return broken


def test_a_local_file_brings_its_components(local):
    registry = plugins.load([local(components("part()"))])
    assert registry.find("decoder", "mine").name == "mine"
    assert registry.owner(registry.find("decoder", "mine")) == "mine.py"
    assert not registry.broken


@pytest.mark.parametrize(
    ("body", "phase", "error"),
    [
        ("raise RuntimeError('out of order')", "import", "RuntimeError: out of order"),
        ("import no_such_module", "import", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "import", "SystemExit: 3"),
        ("@hookimpl\ndef mambabench_unknown():\n    return 1", "register", "unknown hook 'mambabench_unknown'"),
        ("@hookimpl\ndef mambabench_components(more):\n    return []", "register", "more"),
        (components("1 / 0"), "components", "ZeroDivisionError"),
        (components("part(api=99)"), "api", "decoder 'mine' speaks API 99, this is API 1"),
        (components("part(kind='decodr')"), "validate", "unknown kind 'decodr'"),
        (components("part(target='mine')"), "validate", "target of decoder 'mine'"),
        (components("part(config=Loose)"), "validate", "must be a frozen dataclass"),
        (components("part(kind='suite')"), "validate", "exactly one of the traits"),
        (components("'mine'"), "validate", "Component objects"),
        (components("part(name='standard')"), "clash", "brought by both mambabench and mine.py"),
        (components("part(), part()"), "clash", "brought by both mine.py and mine.py"),
    ],
)
def test_a_broken_plug_in_leaves_a_record_and_nothing_else(local, body, phase, error):
    before = plugins.load()
    registry = plugins.load([local(body)])
    broken = only_broken(registry)
    assert broken.phase == phase
    assert error in broken.traceback
    assert len(registry.plugins) == len(before.plugins)
    assert not registry.manager.has_plugin("mine.py:mine")


def test_a_clash_of_names_is_an_error_that_names_both(local):
    one = local(components("part()"), "one.py")
    two = local(components("part()"), "two.py")
    registry = plugins.load([one, two])
    with pytest.raises(MambabenchError, match=r"decoder named 'mine': one.py and two.py"):
        registry.find("decoder", "mine")


def test_strict_mode_makes_a_broken_plug_in_an_error(local, monkeypatch):
    monkeypatch.setenv("MAMBABENCH_PLUGINS_STRICT", "1")
    with pytest.raises(MambabenchError, match="out of order"):
        plugins.load([local("raise RuntimeError('out of order')")])


def test_an_absent_local_file_is_one_line(tmp_path):
    with pytest.raises(MambabenchError, match=r"--plugin .*none.py: no such file"):
        plugins.load([tmp_path / "none.py"])


def test_every_hook_answers_and_an_exception_in_one_is_recorded(local):
    good = local(
        """
        @hookimpl
        def mambabench_refuse(step, host):
            return Refusal(f"{step.kind} needs more than {host.cpus} cores")

        @hookimpl
        def mambabench_environment():
            return {"room": "cold"}

        @hookimpl
        def mambabench_verdict(comparison):
            return Verdict("fail", "never good enough")

        seen = []

        @hookimpl
        def mambabench_step_started(step):
            seen.append(step.key)

        @hookimpl
        def mambabench_step_finished(step, outcome):
            seen.append(outcome.state)
        """,
        "good.py",
    )
    bad = local(
        """
        @hookimpl
        def mambabench_refuse(step, host):
            raise ValueError("oh")

        @hookimpl
        def mambabench_step_started():
            raise ValueError("no")
        """,
        "bad.py",
    )
    registry = plugins.load([good, bad])
    host = Host(cpus=2, gpus=(), platform="x")
    assert [refusal.reason for refusal in registry.refusals(STEP, host)] == ["measure needs more than 2 cores"]
    registry.started(STEP)
    registry.finished(STEP, Outcome(state="ok"))
    assert registry.manager.get_plugin("good.py:good").seen == ["k", "ok"]
    assert registry.environment() == {"room": "cold"}
    comparison = Comparison(
        label="a", metric="acc", base=1, head=1, difference=0, low=0, high=0, margin=0.01, unit="", verdict="pass"
    )
    assert registry.verdicts(comparison)[0].reason == "never good enough"
    assert [(f.hook, f.error) for f in registry.failures] == [
        ("mambabench_refuse", "ValueError: oh"),
        ("mambabench_step_started", "ValueError: no"),
    ]


def test_requirements_are_read_from_metadata():
    assert plugins.missing(["pluggy>=1", "no-such-package"]) == ["no-such-package (not installed)"]
    (lacking,) = plugins.missing(["pluggy>=99"])
    assert lacking.startswith("pluggy>=99 (")


def test_a_component_is_made_with_its_default_config(local):
    file = local(components("part(target=__name__ + ':make')") + "\ndef make(config):\n    return config.size\n")
    registry = plugins.load([file])
    assert plugins.make(registry.find("decoder", "mine")) == 1


def test_an_unknown_name_is_told_what_is_like_it_or_holds_it_and_no_more_than_can_be_read():
    labels = [f"{model}/plain/{suite}" for model in ("half", "teacher") for suite in "abcdefghijklmnop"]
    assert plugins.suggest("haf/plain/a", labels) == "; did you mean 'half/plain/a'?"
    assert plugins.suggest("half", labels) == f"; known: {', '.join(labels[:16])}"
    told = plugins.suggest("x", labels)
    assert told.startswith("; known: half/plain/a, ")
    assert told.endswith(" and 12 more")
    assert plugins.suggest("x", []) == ""
