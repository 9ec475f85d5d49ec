"""The paper's recipes: accepted as they stand, with the published hyper-parameters, and what they need."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.keys import Fingerprints
from mambabench.harness.needs import GIB, Shape, hours_told, needs, read_shape
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from mambabench.harness.steps import expand
from mambabench.harness.suites.mt_bench import PROMPTS

PAPER = Path(__file__).resolve().parents[2] / "plans" / "paper"
PLANS = ("zephyr-7b", "llama3-8b", "llama3.1-8b", "llama3.2-3b")
LLAMA3 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path):
    """A teacher's folder with nothing but its config."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(LLAMA3))
    return tmp_path / "teacher"


@pytest.fixture
def larger(tmp_path):
    """The same of 70 billion parameters."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "config.json").write_text(json.dumps(LLAMA3 | shape))
    return tmp_path / "larger"


@pytest.fixture
def planned(folder, larger):
    def make(file, *overrides):
        large = [f"models.llama-70b.path={larger}"] if file.stem.startswith("llama3.") else []
        return read_plan(file, registry(), [f"teacher.path={folder}", *large, *overrides])

    return make


@pytest.fixture
def expanded(planned, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def make(file, *overrides):
        plan = planned(file, *overrides)
        return plan, expand(plan, registry(), Fingerprints(tmp_path / "cache"), {})

    return make


@pytest.mark.parametrize("name", PLANS)
def test_the_plans_of_the_paper_have_its_hyper_parameters(expanded, name):
    plan, steps = expanded(PAPER / f"{name}.toml")
    tune, prefer = (plan.stages[stage].config for stage in ("tune", "prefer"))
    assert (tune.lr, tune.batch, tune.context, tune.warmup, tune.train) == (2e-5, 64, 2048, 0.01, ("all",))
    # The code's divergence is summed over the positions of a window.
    assert (tune.ce, tune.kl) == ((0.0, tune.context) if name.startswith("llama3.") else (1.0, 0.0))
    assert (prefer.lr, prefer.batch, prefer.context, prefer.warmup) == (5e-7, 32, 1024, 0.1)
    assert (prefer.beta, prefer.epochs, prefer.reference) in ((0.01, 1.0, "start"), (0.1, 3.0, "start"))
    assert (tune.beta2, prefer.beta2) == (0.999, 0.999)
    assert plan.data["instructions"].source.config.learn == "all"
    trained = {label.partition("/")[2] for step in steps if step.kind == "train" for label in step.labels}
    assert trained == {f"{stage}@seed0" for stage in plan.stages}


@pytest.mark.parametrize(
    ("name", "warmups"),
    [
        ("zephyr-7b", {"align": 188}),
        ("llama3-8b", {"align": 188, "align-on": 63}),
        ("llama3.1-8b", {}),
        ("llama3.2-3b", {}),
    ],
)
def test_the_first_stage_is_that_of_the_code_which_later_models_skip(planned, name, warmups):
    plan = planned(PAPER / f"{name}.toml")
    first = {stage: choice.config for stage, choice in plan.stages.items() if choice.name == "progressive"}
    for align in first.values():
        assert (align.lr, align.batch, align.clip, align.ce, align.train) == (8e-5, 64, 0.1, 1.0, ("mixers",))
        assert (align.kl, align.beta2) == (pytest.approx(0.1 * align.context), 0.98)
    found = {stage: align.warmup * align.tokens / (align.batch * align.context) for stage, align in first.items()}
    assert {stage: round(steps) for stage, steps in found.items()} == warmups


@pytest.mark.parametrize("name", ["zephyr-7b", "llama3-8b"])
def test_held_out_answers_are_to_other_prompts_and_there_are_enough(planned, name):
    plan = planned(PAPER / f"{name}.toml")
    learnt, held_out = (plan.data[entry].source.config for entry in ("text", "unseen"))
    assert held_out.first == learnt.documents
    ultrachat, ultrafeedback = 207_865, 61_135
    assert held_out.first + held_out.documents < 0.95 * (ultrachat + ultrafeedback)


@pytest.mark.parametrize("name", PLANS[1:])
def test_preferences_are_of_the_three_sets_of_the_code(planned, name):
    plan = planned(PAPER / f"{name}.toml")
    sets = [plan.data[entry].source.config for entry in plan.data["pairs"].source.config.data]
    assert {(pairs.name, pairs.split) for pairs in sets} == {
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
        ("HuggingFaceH4/orca_dpo_pairs", "train_prefs"),
        ("JunxiongWang/llama3-ultrafeedback-armorm", "train_prefs"),
    }


@pytest.mark.parametrize("name", ["llama3.1-8b", "llama3.2-3b"])
def test_their_second_stage_asks_the_larger_model_that_the_paper_asked(expanded, larger, name):
    plan, steps = expanded(PAPER / f"{name}.toml")
    told = {label: step for step in steps for label in step.labels}
    assert read_shape(larger).parameters == 70_553_706_496
    assert told["mamba2-50/tune@seed0"].record["models"].keys() == {"llama-70b"}
    assert not told["mamba2-50-dpo/prefer@seed0"].record["models"]
    assert not any(step.kind == "measure" and step.record["model"] == "llama-70b" for step in steps)
    own = next(need for need in needs(plan, steps) if need.label == "mamba2-50/tune@seed0")
    same = expanded(PAPER / f"{name}.toml", 'stages.tune.teacher=""')
    alone = next(need for need in needs(*same) if need.label == "mamba2-50/tune@seed0")
    assert own.memory - alone.memory == pytest.approx(2 * (70.55e9 - 8.03e9), rel=1e-3)
    # A forward pass of the larger model costs two and a half times what a training step of the student costs.
    assert 2.5 < own.hours / alone.hours < 3.5


def test_a_shape_without_weights_says_what_it_needs(expanded, tmp_path):
    gpu = PAPER.parent / "gpu"
    loaded = registry()
    plan = read_plan(gpu / "shape-8b.toml", loaded, [])
    made, _, stage = needs(plan, expand(plan, loaded, Fingerprints(tmp_path / "cache"), {}))
    assert made.memory == 2 * 8_030_261_248
    assert stage.tokens == 81_920
    assert 60 < stage.memory / GIB < 130


def test_a_model_without_attention_needs_less(expanded):
    def found(*overrides):
        told = needs(*expanded(PAPER / "zephyr-7b.toml", *overrides))
        return next(need for need in told if need.label == "mamba-50/tune@seed0")

    traded, gone = found(), found("models.mamba-50.use=removed", "models.mamba-50.train=['tune']")
    layers, mixer, gate = 16, 41_943_040, 16_777_216
    assert traded.memory - gone.memory == pytest.approx(16 * layers * (mixer + gate))


def test_each_stage_of_a_chain_is_trained_once(expanded):
    _, steps = expanded(PAPER / "zephyr-7b.toml")
    shared = [step.labels for step in steps if step.kind == "train" and len(step.labels) == 2]
    assert ("mamba-50/tune@seed0", "mamba-50-dpo/tune@seed0") in shared
    assert len([step for step in steps if step.kind == "train"]) == 2 + 3 + 3


def test_sizes_are_those_of_known_models(folder):
    shape = read_shape(folder)
    assert shape.parameters == 8_030_261_248
    assert shape.mixer == 41_943_040
    assert Shape(28, 3072, 8192, 24, 8, 128, 128256, True).parameters == 3_212_749_824


def test_a_real_teacher_has_as_many_parameters_as_its_config_says(shared):
    for name in ("books-28m", "stories-260k"):
        file = (shared / "models" / name / "model.safetensors").read_bytes()
        header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
        header.pop("__metadata__", None)
        weights = 0
        for tensor in header.values():
            size = 1
            for length in tensor["shape"]:
                size *= length
            weights += size
        assert read_shape(shared / "models" / name).parameters == weights


def test_hours_too_few_to_choose_a_machine_by_are_no_number():
    told = [hours_told(hours) for hours in (0.0, 3.8e-6, 0.0042, 1.25, 1234.5)]
    assert told == ["0", "< 0.001", "0.0042", "1.2", "1,234"]


def test_needs_follow_tokens_weights_and_what_is_trained(expanded):
    def found(*overrides):
        return {need.label: need for need in needs(*expanded(PAPER / "llama3-8b.toml", *overrides))}

    once, twice = found(), found("stages.tune.tokens=40_000_000_000")
    tune, align, prefer = (once[f"mamba2-50{label}@seed0"] for label in ("/tune", "/align-on", "-dpo/prefer"))
    assert twice[tune.label].hours == pytest.approx(2 * tune.hours)
    # Six FLOPs for each weight but the embedding's and each token, a tenth more for gates and attention, at 40 %.
    least = 6 * 7.5e9 * 20e9 / (989e12 * 0.4) / 3600
    assert least < tune.hours < 1.1 * least
    assert 16 * 8.03e9 / GIB < tune.memory / GIB < 190
    assert align.memory < tune.memory
    assert align.hours / align.tokens > 0.6 * tune.hours / tune.tokens
    assert prefer.tokens is None
    assert prefer.memory > tune.memory
    assert once["data/text"].tokens == 250_000 * 1024
    assert once["data/instructions"].data == "hf:JunxiongWang/sftdataset, split train"


def test_less_is_held_with_slices_and_smaller_parts(expanded):
    def memory(*overrides):
        plan, steps = expanded(PAPER / "llama3-8b.toml", *overrides)
        return next(need.memory for need in needs(plan, steps) if need.label == "mamba2-50/tune@seed0")

    assert memory() < memory("stages.tune.slice=0") < memory("stages.tune.slice=0", "stages.tune.accumulation=32")
    large = "stages.tune.accumulation=8"
    whole = memory(large)
    assert memory(large, "stages.tune.checkpointing=true") < whole
    shared = (large, "limits.train_gpus=2")
    assert memory(*shared, "stages.tune.parallel=fsdp") < 0.55 * whole < memory(*shared) < whole


@pytest.mark.parametrize("name", PLANS)
def test_several_gpus_share_each_stage_a_row_at_a_time(expanded, name):
    def memory(*overrides):
        return {need.label: need.memory for need in needs(*expanded(PAPER / f"{name}.toml", *overrides))}

    alone = memory()
    for gpus in (2, 8, 32):
        assert memory(f"limits.train_gpus={gpus}") == alone
    with pytest.raises(
        MambabenchError, match=r"stages\.(align|tune)\.batch: expected a multiple of limits.train_gpus = 3, got 64"
    ):
        expanded(PAPER / f"{name}.toml", "limits.train_gpus=3")


@pytest.mark.parametrize("name", PLANS)
def test_what_is_computed_differently_is_the_same_step(expanded, name):
    """As the documentation has it: options that save memory are given to all stages that take them."""
    _, steps = expanded(PAPER / f"{name}.toml")
    plan, same = expanded(
        PAPER / f"{name}.toml",
        *("limits.train_gpus=8", "stages.*.parallel=fsdp", "stages.*.checkpointing=true", "stages.*.precompute=true"),
        *("stages.*.accumulation=2", "stages.*.slice=1_024"),
    )
    assert [step.key for step in steps] == [step.key for step in same]
    for stage in plan.stages.values():
        config = stage.config
        assert (config.parallel, config.checkpointing, config.accumulation, config.slice) == ("fsdp", True, 2, 1024)
    assert plan.stages["prefer"].config.precompute


def test_what_cannot_be_estimated_is_said(folder, expanded):
    (folder / "config.json").write_text(json.dumps({key: LLAMA3[key] for key in LLAMA3 if key != "vocab_size"}))
    with pytest.raises(MambabenchError, match=r"config.json: no vocab_size"):
        needs(*expanded(PAPER / "llama3-8b.toml"))
    plan, steps = expanded(PAPER / "llama3-8b.toml")
    with pytest.raises(MambabenchError, match="this one trains its teacher"):
        needs(replace(plan, teacher=replace(plan.teacher, path=None)), steps)


def test_the_command_prints_what_a_plan_needs(mambabench, folder, tmp_path):
    arguments = ["plan", PAPER / "llama3.2-3b.toml", "--needs", "--set", f"teacher.path={folder}"]
    arguments += ["--set", f"models.llama-70b.path={folder}"]
    told = mambabench(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[0].split() == ["step", "tokens", "GiB", "a", "GPU", "GPU-hours", "data"]
    assert any(line.startswith("mamba2-50/tune@seed0") and "20,000 M" in line for line in lines)
    assert "GPU-hours in all. Estimated for H200" in lines[-1]


@pytest.mark.parametrize("name", PLANS)
def test_every_table_of_quality_has_a_suite(expanded, name):
    plan, steps = expanded(PAPER / f"{name}.toml")
    suites = {suite.name for suite in plan.suites.values()}
    assert {"lm-eval", "reasoning", "mt-bench", "alpaca-eval", "perplexity"} <= suites
    presets = {getattr(suite.config, "preset", None) for suite in plan.suites.values()}
    assert {"paper-zero-shot", "paper-few-shot", "paper-generation"} <= presets
    assert ("recall" in suites) is name.startswith("llama3.")
    judged = [step for step in steps if step.kind == "judge"]
    assert len(judged) == 4 * (1 + len([model for model in plan.models if model != "llama-70b"]))


def test_what_a_plan_lacks_on_this_machine_is_listed(mambabench, folder, tmp_path):
    questions = tmp_path / "mt_bench"
    questions.mkdir()
    (questions / "question.jsonl").write_text("")
    prompts = [{"name": name, "system_prompt": "", "prompt_template": "Rate it."} for name in PROMPTS]
    (questions / "judge_prompts.jsonl").write_text(json.dumps(prompts))
    told = mambabench(
        *("plan", PAPER / "llama3-8b.toml", "--set", f"teacher.path={folder}"),
        *("--set", f"suites.mt-bench.data={questions}"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
        OPENAI_API_KEY="",
    )
    assert told.returncode == 0, told.stderr
    missing = [line for line in told.stdout.splitlines() if line.startswith("missing: ")]
    assert len(missing) == 4
    for suite, line in zip(("gsm8k", "crux"), missing, strict=False):
        assert f"suites.{suite}.data: there is no file" in line
        assert f"suites.{suite}.prompt: there is no file" in line
    assert "judge 'gpt-4' needs its key in the environment variable OPENAI_API_KEY" in missing[2]
    assert "suites.alpaca-eval.data: there is no file" in missing[3]
    assert "gpt4_1106_preview.json (" in missing[3]
