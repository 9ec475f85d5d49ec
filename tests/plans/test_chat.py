"""A plan of chat benchmarks on recordings, from the plan to the printed table: no model is run and no judge asked."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
from mambabench.harness.keys import Fingerprints
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from mambabench.harness.steps import expand

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plans" / "chat.toml"
PUBLISHED = {
    "gsm8k: gsm8k exact_match %": (67.70, 0.005),
    "gsm8k: gsm8k no_answer %": (1.36, 0.005),
    "crux exact_match %": (25.50, 0.005),
    "crux no_answer %": (3.75, 0.005),
    "mt_bench turn 1": (7.7375, 1e-9),
    "mt_bench turn 2": (6.8875, 1e-9),
    "mt_bench no_verdict %": (0.0, 0.0),
    "alpaca_eval win_rate %": (3.4019714381366457, 1e-6),
    "alpaca_eval win_rate % s.e.": (0.5389981250162534, 1e-6),
    "alpaca_eval lc_win_rate %": (5.437453620377121, 0.2),
}
"""Of MambaInLlama_0_50_v1, mamba_0_5_dpo_ep3 and gemma-2b-it. ZeroEval has two decimals, and the fit was made anew."""


@pytest.fixture(scope="module")
def row(mambabench, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    data, alpaca = shared / "data", shared / "data" / "chat" / "alpaca_eval"
    frame = pd.read_csv(alpaca / "df_gamed_equivalent.csv")
    frame = frame.rename(columns={"variant": "model", "preference_equivalent": "preference"})
    frame.assign(not_gamed_baseline=False).to_csv(folder / "gamed.csv", index=False)
    options = {
        "teacher.path": shared / "models" / "stories-260k",
        "suites.gsm8k.answers": data / "zeroeval" / "gsm_MambaInLlama_0_50_v1.json.xz",
        "suites.gsm8k.data": data / "eval" / "gsm8k_test.jsonl.xz",
        "suites.crux.answers": data / "zeroeval" / "crux_MambaInLlama_0_50_v1.json.xz",
        "suites.crux.data": data / "eval" / "cruxeval.jsonl.xz",
        "suites.written": f'{{ use = "reasoning", task = "gsm8k", data = "{data}/eval/gsm8k_test.jsonl.xz", '
        'template = "one_shot", limit = 3, new_tokens = 8 }',
        "suites.mt-bench": f'{{ use = "mt-bench", data = "{data}/chat/mt_bench", '
        f'judgments = "{data}/chat/mt_bench/gpt-4_single.two_models.jsonl", recorded_as = "mamba_0_5_dpo_ep3" }}',
        "suites.alpaca-eval": f'{{ use = "alpaca-eval", data = "{alpaca}/reference_gpt4_1106_preview.json.xz", '
        f'judgments = "{alpaca}/gemma-2b-it/annotations.json.xz", gamed = "{folder}/gamed.csv" }}',
    }
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    done = mambabench("run", EXAMPLE, "--store", folder / "store", *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    mambabench("report", folder / "store", "--to", "csv")
    with (folder / "store" / "report" / "csv" / "quality.csv").open() as file:
        (row,) = csv.DictReader(file)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("column", PUBLISHED)
def test_recordings_are_reported_with_the_published_figures(row, column):
    value, margin = PUBLISHED[column]
    assert float(row[column]) == pytest.approx(value, abs=margin)


@pytest.mark.slow
def test_both_win_rates_have_errors_of_their_own(row):
    errors = [float(row[f"alpaca_eval {name} % s.e."]) for name in ("lc_win_rate", "win_rate")]
    assert 0 < errors[0] < errors[1]


@pytest.mark.slow
def test_a_win_rate_is_no_accuracy_and_a_model_without_answers_scores_nothing(row):
    assert float(row["written: gsm8k no_answer %"]) > 0
    accuracies = [float(row[f"{name} %"]) for name in ("gsm8k: gsm8k exact_match", "crux exact_match")]
    accuracies.append(float(row["written: gsm8k exact_match %"]))
    assert float(row["average %"]) == pytest.approx(sum(accuracies) / 3, abs=1e-6)


@pytest.mark.slow
def test_suites_that_differ_in_the_judge_share_answers_and_need_it_for_judging_alone(mambabench, shared, tmp_path):
    suite = (
        '{{ use = "mt-bench", data = "{data}", template = "zero_shot", limit = 1, new_tokens = 4, '
        'judge = {{ use = "openai", model = "{model}", key_env = "NO_KEY" }} }}'
    )
    data = shared / "data" / "chat" / "mt_bench"
    suites = [f"{name} = {suite.format(data=data, model=name)}" for name in ("one", "two")]
    plan = tmp_path / "judges.toml"
    plan.write_text(
        f'schema = 1\nname = "judges"\nteacher.path = "{shared}/models/stories-260k"\n'
        'decoders.plain.use = "standard"\n[suites]\n' + "\n".join(suites) + "\n"
    )
    told = mambabench("plan", plan, NO_KEY="").stdout
    assert told.count("to run; the judge 'one' needs its key in the environment variable NO_KEY") == 1
    done = mambabench("run", plan, "--store", tmp_path / "store", NO_KEY="")
    assert "the judge 'two' needs its key in the environment variable NO_KEY" in done.stdout + done.stderr
    assert "4 steps: 2 ok, 2 unsupported" in done.stdout
    steps = [json.loads(file.read_text()) for file in (tmp_path / "store" / "partial").glob("*/step.json")]
    assert [step["kind"] for step in steps] == ["judge", "judge"]
    assert len({step["inputs"]["answers"] for step in steps}) == 1


def test_the_code_that_scores_answers_decides_nothing_of_those_that_are_kept(tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "gsm.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'teacher.path = "teacher"\ndecoders.plain.use = "standard"\n'
        '[suites.gsm]\nuse = "reasoning"\ntask = "gsm8k"\ndata = "gsm.jsonl"\n'
    )
    edited = [""]
    monkeypatch.setattr(
        Fingerprints, "code", lambda self, modules: str([f"{each}{each in edited}" for each in modules])
    )

    def answer():
        loaded = registry()
        steps = expand(read_plan(plan, loaded), loaded, Fingerprints(tmp_path / "cache"), {})
        return next(step for step in steps if step.kind == "answer")

    before = answer()
    for module, kept in (
        ("mambabench.harness.suites.reasoning", True),
        ("mambabench.harness.answering", False),
        ("mambabench.decoders.standard", False),
        ("mambabench.kernels", False),
    ):
        edited[:] = [module]
        after = answer()
        assert after.key != before.key
        assert (after.record["answers"] == before.record["answers"]) is kept
