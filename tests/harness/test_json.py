"""`--json`: one document on standard output and nothing else there, of the rows that the table has."""

import json
import math

import numpy as np
import pytest
from mambabench.harness.compare import compare, exit_code
from mambabench.harness.environment import machine_facts
from mambabench.harness.keys import Fingerprints
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from mambabench.harness.results import Results
from mambabench.harness.steps import expand
from mambabench.harness.store import Store

MORE = """
[models.same]
like = "half"
[suites.tasks]
use = "perplexity"
data = "text"
[[skip]]
steps = "same/*"
why = "as half"
"""
MISSING = """
[data.questions]
use = "tiny"
part = "chat"
[decoders.plain]
use = "standard"
[suites.chat]
use = "mt-bench"
data = "none.jsonl"
judge = "tiny"
[suites.judged]
use = "mt-bench"
data = "questions"
template = "mistral"
judge = { use = "openai", model = "one", key_env = "NO_KEY" }
"""


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def told(mambabench):
    """Runs a command with `--json` and reads what it printed; the exit code is the table's."""

    def run(*words):
        done, table = mambabench(*words, "--json"), mambabench(*words)
        assert done.stdout, done.stderr
        assert done.returncode == table.returncode
        assert done.stderr == table.stderr
        return json.loads(done.stdout, parse_constant=refuse), table

    return run


@pytest.fixture
def sides(stores, tmp_path):
    """Two stores: the head lost answers, its measurement of speed crashed, and a label is neither's."""
    made = []
    for name, chance in (("base", 0.9), ("head", 0.5)):
        asked = ["half/-/tasks@seed0", "half/lookup/speed@seed0"]
        builder = stores.Builder(tmp_path / name, asked=asked, began=1e6 if name == "base" else 2e6)
        builder.model("half", keep=0.5)
        subject = builder.step("half/align@seed0", "train", artifact="weights")
        rng = np.random.default_rng(0)
        samples = stores.samples(rng, "a/b", items=400, chance=chance) + stores.samples(rng, "one", items=1)
        builder.step(asked[0], records={"sample": samples}, subject=subject)
        state = "ok" if name == "base" else "crashed"
        builder.step(asked[1], subject=subject, state=state, reason="signal 11", traits=("pair",))
        builder.planned("half/-/recall@seed0")
        made.append(builder.write())
    return made


def test_compare_tells_all_that_its_table_does_as_numbers_in_the_same_order(told, sides):
    document, table = told("compare", *sides)
    comparisons = compare(*(Results.read([side]) for side in sides))
    assert (document["verdict"], document["exit_code"], table.returncode) == ("fail", 10, exit_code(comparisons))
    assert document["counts"] == {"fail": 1, "not comparable": 1, "inconclusive": 1, "pass": 0}
    assert document["unasked"] == ["half/-/recall@seed0"]
    assert (document["base"], document["head"]) == tuple(map(str, sides))
    assert [(one["label"], one["metric"]) for one in document["comparisons"]] == [
        (one.label, one.metric) for one in comparisons
    ]
    for one, comparison in zip(document["comparisons"], comparisons, strict=True):
        for name in ("base", "head", "difference", "low", "high", "margin", "detectable"):
            value = getattr(comparison, name)
            assert one[name] == (value if math.isfinite(value) else None)
        for name in ("verdict", "reason", "unit", "better", "relative"):
            assert one[name] == getattr(comparison, name)
    tasks, single, speed = document["comparisons"]
    names = ("model", "decoder", "suite", "seed", "task", "metric")
    assert [tasks[name] for name in names] == ["half", None, "tasks", 0, "a/b", "a/b/acc"]
    assert [speed[name] for name in names] == ["half", "lookup", "speed", 0, None, "*"]
    assert tasks["high"] < 0
    assert single["low"] is None, "a single item has no error"


def test_a_request_that_names_a_file_is_no_task(told, stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    timed = []
    for place, content in enumerate(("texts/one", "texts/two")):
        bursts, _ = stores.bursts(np.random.default_rng(place), {"subject": 0.002, "reference": 0.002})
        timed += [{**row, "content": content, "block": 8 * place + row["block"]} for row in bursts]
    builder.step("half/lookup/speed@seed0", records={"burst": timed}, traits=("pair",))
    store = builder.write()
    document, _ = told("compare", store, store)
    assert any("texts/one" in one["metric"] for one in document["comparisons"])
    assert {one["task"] for one in document["comparisons"]} == {None}


def test_warnings_of_compare_stay_beside_the_document(told, sides, tmp_path):
    gates = tmp_path / "gates.toml"
    gates.write_text('[[gate]]\nlabels = "tuna/*"\nmargin = 1\n')
    _, table = told("compare", *sides, "--gates", gates)
    assert "gate.0 fits nothing that was compared" in table.stderr


def test_what_is_wrong_leaves_no_document(mambabench):
    for words in (("show", "none"), ("plan", "none.toml"), ("compare", "none", "none")):
        done = mambabench(*words, "--json")
        assert (done.returncode, done.stdout) == (1, "")


def test_show_tells_every_label_of_a_store(told, sides):
    document, table = told("show", sides[1])
    rows = [line.split(maxsplit=2) for line in table.stdout.splitlines()[1:]]
    assert [[one["label"], one["state"], *filter(None, [one["reason"]])] for one in document["steps"]] == rows
    walls = {one["label"]: one["wall_s"] for one in document["steps"]}
    assert walls["half/-/tasks@seed0"] == 3.0
    assert walls["half/-/recall@seed0"] is None
    assert document["steps"][1]["decoder"] is None
    assert document["steps"][1]["seed"] == 0


def test_show_tells_facts_details_and_the_log_of_a_label(told, stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    facts = [{"name": "weights", "value": 2_850_400, "unit": "byte"}, {"name": "energy", "value": 1 / 3, "unit": "J"}]
    builder.step("half/-/tasks@seed0", facts=facts)
    key = builder.step("half/-/recall@seed0", state="crashed", reason="signal 11")
    (builder.store.partial(key) / "log.txt").write_text("one\ntwo\n")
    builder.skip("half/lookup/speed@seed0", "too slow")
    store = builder.write()
    (one,) = told("show", store, "half/-/tasks")[0]["steps"]
    assert one["facts"] == [{"unit": "byte", "arm": "", **facts[0]}, {"unit": "J", "arm": "", **facts[1]}]
    assert (one["detail"]["threads"], one["wall_s"], one["log"]) == (1, 3.0, [])
    assert one["folder"].startswith(str(store))
    (one,) = told("show", store, "half/-/recall")[0]["steps"]
    assert (one["state"], one["reason"], one["log"]) == ("crashed", "signal 11", ["one", "two"])
    (one,) = told("show", store, "half/lookup/speed")[0]["steps"]
    assert (one["state"], one["reason"], one["key"], one["wall_s"]) == ("skipped", "too slow", None, None)


def test_plan_tells_how_each_label_stands_and_what_follows(told, small_plan, tmp_path):
    file, store = tmp_path / "plan.toml", Store.create(tmp_path / "store")
    file.write_text(small_plan + MORE)
    loaded = registry(())
    steps = expand(read_plan(file, loaded), loaded, Fingerprints(tmp_path / "cache.json"), machine_facts(()))
    keys = {label: step.key for step in steps for label in step.labels}
    for label, state in (("teacher/convert", "ok"), ("data/text", "error")):
        step = steps.steps[keys[label]]
        store.prepare(step.key, step.to_json())
        record = {"state": state, "reason": "a bug" if state == "error" else "", "attempt": 1, "wall_s": 1.0}
        (store.finish if state == "ok" else store.fail)(step.key, record)
    document, table = told("plan", file, "--store", store.path)
    found = {one["label"]: (one["follows"], one["state"], one["reason"]) for one in document["steps"]}
    assert found == {
        "teacher/convert": ("done", "ok", ""),
        "half/select@seed0": ("to run", "absent", ""),
        "half/convert@seed0": ("to run", "absent", ""),
        "data/text": ("failed", "error", "a bug"),
        "half/align@seed0": ("blocked", "absent", ""),
        "same/select@seed0": ("to run", "absent", ""),
        "same/convert@seed0": ("to run", "absent", ""),
        "same/align@seed0": ("blocked", "absent", ""),
        "teacher/-/tasks@seed0": ("blocked", "absent", ""),
        "half/-/tasks@seed0": ("blocked", "absent", ""),
        "same/-/tasks@seed0": ("skipped", "skipped", "as half"),
    }
    assert document["counts"] == {"done": 1, "to run": 2, "failed": 1, "blocked": 3}
    assert {one["label"]: one["key"] for one in document["steps"] if one["key"]} == keys
    same = {one["label"]: one["same_as"] for one in document["steps"] if one["same_as"]}
    assert same == {f"same/{of}@seed0": f"half/{of}@seed0" for of in ("select", "convert", "align")}
    shown = [line.split()[1:] for line in table.stdout.splitlines()[1:] if line and line[0] in "✓·✗-"]
    assert [words[0] for words in shown] == list(found)
    (align,) = (words for words in shown if words[0] == "half/align@seed0")
    assert align[2:] == ["blocked"]


def test_plan_tells_what_is_missing(told, small_plan, tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(small_plan + MORE.replace("[[skip]]", f"{MISSING}[[skip]]"))
    document, table = told("plan", file, "--store", tmp_path / "store")
    lines = [line for line in table.stdout.splitlines() if line.startswith("missing: ")]
    assert {"file", "key"} <= {word for line in lines for word in line.split()}
    assert lines == [
        f"missing: {text} ({count} step{'s' * (count != 1)})" for text, count in document["missing"].items()
    ]
    assert {text for one in document["steps"] for text in one["missing"]} == set(document["missing"])


def test_plan_tells_needs_in_bytes_and_hours(told, small_plan, tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(small_plan + MORE)
    document, _ = told("plan", file, "--needs")
    (align,) = (one for one in document["steps"] if one["label"] == "half/align@seed0")
    assert align["tokens"] == 1000
    assert align["memory_bytes"] > 1e6
    assert document["gpu_hours"] == sum(one["gpu_hours"] or 0 for one in document["steps"])


def test_env_list_and_plugins_tell_what_their_tables_do(told, mambabench, tmp_path):
    facts, table = told("env")
    assert [line.split()[0] for line in table.stdout.splitlines()[1:]] == list(facts)
    components, table = told("list", "decoder", "--options")
    names = [line.split()[1] for line in table.stdout.splitlines()[1:] if line[0] != " "]
    assert [one["name"] for one in components["components"]] == names
    assert {one["kind"] for one in components["components"]} == {"decoder"}
    assert any(one["options"].get("k") for one in components["components"])
    gone = tmp_path / "gone.py"
    gone.write_text("import nothing_of_this_name\n")
    found = json.loads(mambabench("--plugin", gone, "plugins", "--json").stdout)
    assert all(one["seconds"] >= 0 and one["components"] > 0 for one in found["plugins"])
    (broken,) = found["broken"]
    assert (broken["distribution"], broken["phase"]) == ("gone.py", "import")
    assert "ModuleNotFoundError" in broken["traceback"]
