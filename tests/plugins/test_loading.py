"""What a user sees of plug-ins, good and broken, that came in by pip."""

import re
from pathlib import Path

import pytest

from .conftest import EXAMPLES, Run

PHASES = {
    "import-error": ("import", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
    "unknown-hook": ("register", "mambabench_componets"),
    "raising-hook": ("components", "RuntimeError: the components are out of order"),
    "wrong-api": ("api", "99"),
    "malformed-target": ("validate", "a decoder, somewhere"),
    "name-clash": ("clash", "standard"),
}
PLAN = """
schema = 1
[teacher]
train = ["teach"]
[data]
text = { use = "tiny", documents = 40 }
[stages.teach]
use = "train-teacher"
data = "text"
tokens = 1000
[decoders.only]
use = "DECODER"
[suites.perplexity]
use = "perplexity"
data = "text"
"""


def plan(tmp_path: Path, decoder: str) -> Path:
    file = tmp_path / "plan.toml"
    file.write_text(PLAN.replace("DECODER", decoder))
    return file


def row(listing: str, package: str) -> str:
    """The line of a package in the table, which ends before the tracebacks."""
    table = listing.partition("\n\n")[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"mambabench-{package} ")]
    return line


def test_a_working_plug_in_is_listed_with_version_state_and_load_time(mambabench: Run, example: Path) -> None:
    done = mambabench("plugins", on=[example])
    assert done.returncode == 0, done.stderr
    assert re.search(r"mambabench-bigram 1\.0\.0 +bigram +ok +\d+ ms", row(done.stdout, "bigram"))
    assert "imports torch" not in row(done.stdout, "bigram")


def test_its_components_are_listed_beside_the_built_in_ones(mambabench: Run, example: Path) -> None:
    lines = [line.split()[:3] for line in mambabench("list", on=[example]).stdout.splitlines()]
    for kind, name in (("backend", "bigram"), ("decoder", "no-repeat"), ("suite", "distinct"), ("table", "variety")):
        assert [kind, name, "mambabench-bigram"] in lines
    assert ["decoder", "standard", "mambabench"] in lines


@pytest.fixture(scope="module")
def listing(mambabench: Run, broken: Path) -> str:
    """What `mambabench plugins --traceback` says where all broken packages are installed."""
    done = mambabench("plugins", "--traceback", on=[broken])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PHASES)
def test_a_broken_plug_in_is_listed_with_phase_and_error(listing: str, package: str) -> None:
    phase, error = PHASES[package]
    assert f"broken ({phase})" in row(listing, package)
    assert error in row(listing, package)


def test_broken_plug_ins_stop_nothing_else(listing: str) -> None:
    assert re.search(r"^mambabench \S+ +harness +ok", listing, re.MULTILINE)


def test_the_traceback_of_a_broken_plug_in_is_shown_on_request(listing: str) -> None:
    assert "import a_module_that_nobody_has" in listing


def test_a_plug_in_that_imports_torch_is_marked(listing: str) -> None:
    assert "ok" in row(listing, "imports-torch").split()
    assert "imports torch" in row(listing, "imports-torch")


def test_a_plan_that_needs_a_broken_plug_in_fails_with_its_traceback(
    mambabench: Run, broken: Path, tmp_path: Path
) -> None:
    allowed = "mambabench-import-error"
    done = mambabench("plan", plan(tmp_path, "unreachable"), on=[broken], MAMBABENCH_PLUGINS=allowed)
    assert done.returncode == 1
    assert "unknown decoder 'unreachable'" in done.stderr
    assert "mambabench-import-error 0.0.1" in done.stderr
    assert "import a_module_that_nobody_has" in done.stderr


def test_any_other_plan_is_only_warned(mambabench: Run, broken: Path, tmp_path: Path) -> None:
    allowed = "mambabench-import-error,mambabench-raising-hook"
    done = mambabench("plan", plan(tmp_path, "standard"), on=[broken], MAMBABENCH_PLUGINS=allowed)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert "mambabench-import-error 0.0.1" in warnings[0]
    assert "Traceback" not in done.stderr


def test_a_name_clash_is_an_error_that_names_both(mambabench: Run, broken: Path, tmp_path: Path) -> None:
    allowed = "mambabench-name-clash"
    done = mambabench("plan", plan(tmp_path, "standard"), on=[broken], MAMBABENCH_PLUGINS=allowed)
    assert done.returncode == 1
    assert re.search(r"two plug-ins bring .*'standard': mambabench and mambabench-name-clash", done.stderr)


def test_a_plug_in_file_is_loaded_for_one_command(mambabench: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    source = EXAMPLES / "broken" / "missing-target" / "mambabench_missing_target.py"
    file.write_text(source.read_text().replace('"absent"', '"mine"'))
    assert re.search(r"^decoder +mine ", mambabench("--plugin", file, "list").stdout, re.MULTILINE)
    assert not re.search(r"^decoder +mine ", mambabench("list").stdout, re.MULTILINE)


def test_a_plug_in_file_that_is_not_there_is_one_error_line(mambabench: Run, tmp_path: Path) -> None:
    done = mambabench("--plugin", tmp_path / "nowhere.py", "list")
    assert done.returncode == 1
    assert done.stderr.startswith("mambabench: ")
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere.py" in done.stderr


def loaded(listing: str) -> set[str]:
    """The distributions in a list of plug-ins."""
    return {line.split()[0] for line in listing.splitlines()[1:]}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MAMBABENCH_PLUGINS": "off"}, {"mambabench"}),
        ({"MAMBABENCH_PLUGINS": "Mambabench_Bigram"}, {"mambabench", "mambabench-bigram"}),
        ({"MAMBABENCH_PLUGINS": "another"}, {"mambabench"}),
        ({"MAMBABENCH_PLUGINS_BLOCK": "mambabench-bigram"}, {"mambabench"}),
        ({}, {"mambabench", "mambabench-bigram"}),
    ],
    ids=["off", "allowed", "not-allowed", "blocked", "default"],
)
def test_the_environment_says_which_plug_ins_load(
    mambabench: Run, example: Path, environment: dict[str, str], expected: set[str]
) -> None:
    assert loaded(mambabench("plugins", on=[example], **environment).stdout) == expected


def test_strict_mode_makes_a_broken_plug_in_an_error(mambabench: Run, broken: Path, example: Path) -> None:
    done = mambabench("plugins", on=[broken], MAMBABENCH_PLUGINS_STRICT="1", MAMBABENCH_PLUGINS="mambabench-wrong-api")
    assert done.returncode == 1
    assert "mambabench-wrong-api" in done.stderr
    assert mambabench("plugins", on=[example], MAMBABENCH_PLUGINS_STRICT="1").returncode == 0
