"""The plans for one GPU: accepted as they stand, and run whole on a tiny stand-in of their teacher."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from mambabench.distillers.plugin import TinyConfig
from mambabench.distillers.tiny.language import OF_PART, WORDS, tokenizer
from mambabench.distillers.tiny.source import Tiny
from mambabench.harness.documents import read_documents
from mambabench.harness.interfaces import Job, silent
from mambabench.harness.keys import Fingerprints
from mambabench.harness.needs import needs
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from mambabench.harness.steps import expand
from transformers import LlamaConfig, LlamaForCausalLM

PLANS = Path(__file__).resolve().parents[2] / "plans" / "gpu"
TOKENS = {
    "ladder": {3_000_000, 16_000_000},
    "ablations": {16_000_000},
    "chain": {16_000_000},
    "two": {8_000_000},
}
WRITTEN = {
    "ladder": {"data/written": 128 * 1023},
    "ablations": {"data/written": 128 * 1023, "data/pairs": 4096 * 64},
    "chain": {"data/written": 128 * 1023, "data/pairs": 4096 * 64},
    "two": {},
}
"""Tokens that the teacher writes."""
LAYERS = 8
SMALL = (
    "seeds=[0]",
    "stages.*.tokens=900",
    "stages.*.context=64",
    "stages.*.batch=2",
    "data.written.documents=4",
    "data.written.new_tokens=16",
    "suites.*.context=64",
)
SMALL_PAIRS = ("data.pairs*.pairs=6", "data.pairs*.prompt_tokens=8", "data.pairs*.new_tokens=8")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Overrides that give a plan a teacher of eight small layers and text of its language."""
    folder = tmp_path_factory.mktemp("given")
    for name, part in (("train", "train"), ("val", "unseen")):
        out = folder / name
        out.mkdir()
        job = Job(
            seed=0,
            device="cpu",
            data={},
            models={},
            teacher=None,
            parent=None,
            backend=None,
            scratch=out,
            out=out,
            emit=silent,
        )
        Tiny(TinyConfig(part=part, documents=40)).write(job)
        text = "\n<|endoftext|>\n".join(document.text for document in read_documents(out) if document.text)
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    words = tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    model.save_pretrained(folder / "teacher")
    words.save_pretrained(folder / "teacher")
    return [
        f"teacher.path={folder / 'teacher'}",
        f"data.text.path={folder / 'train.txt.xz'}",
        f"data.val.path={folder / 'val.txt.xz'}",
    ]


@pytest.mark.parametrize("name", TOKENS)
def test_plans_are_accepted_with_their_tokens(given, tmp_path, name):
    loaded = registry()
    plan = read_plan(PLANS / f"{name}.toml", loaded, [*given, "seeds=[0, 1, 2]"])
    steps = expand(plan, loaded, Fingerprints(tmp_path / "cache"), {})
    tokens = {stage.config.tokens for stage in plan.stages.values() if stage.name != "dpo"}
    assert tokens == TOKENS[name]
    assert max(tokens) <= 100_000_000
    assert {step.kind for step in steps} == {"data", "select", "convert", "train", "measure"}
    assert not any(step.lacking for step in steps)
    written = {need.label: need.tokens for need in needs(plan, steps) if need.label.startswith("data/")}
    assert WRITTEN[name].items() <= written.items()


def test_each_hybrid_has_a_draft_that_learns_from_it(given, tmp_path):
    loaded = registry()
    steps = expand(read_plan(PLANS / "drafts.toml", loaded, given), loaded, Fingerprints(tmp_path / "cache"), {})
    by_label = {label: step for step in steps for label in step.labels}
    for model in ("half", "quarter", "none"):
        hybrid, draft = by_label[f"{model}/hybrid@seed0"], by_label[f"draft-{model}/follow@seed0"]
        assert {entry["step"] for entry in draft.record["models"].values()} == {hybrid.key}
        timed = by_label[f"{model}/own/speed@seed0"]
        assert {entry["step"] for entry in timed.record["models"].values()} == {draft.key}


@pytest.mark.slow
def test_every_draft_is_shown_with_its_acceptance_and_the_check_of_its_text(tables, given):
    small = (
        "stages.*.tokens=900",
        "stages.*.context=64",
        "stages.*.batch=2",
        "suites.perplexity.context=64",
        "suites.*.prompt_tokens=8",
        "suites.losslessness.prompts=4",
        "suites.losslessness.new_tokens=12",
        "suites.losslessness.batch=[1, 4]",
        "suites.drawn.prompts=1",
        "suites.drawn.draws=40",
        "suites.drawn.new_tokens=3",
        "suites.drawn.batch=[20]",
        "suites.speed.new_tokens=24",
        "suites.speed.pairs=1",
        "suites.speed.profile=2",
        # The others are as these.
        'skip=[{steps="[!h]*/*", why="one is enough"}, {steps="half/[!o]*/drawn", why="one is enough"}]',
    )
    found = tables("drafts", *given, *small)
    drafting = ("lookup", "layers", "own", "adaptive")
    rows = {(row["decoder"], float(row["temperature"])): row for row in found["speculation"]}
    assert {row["model"] for row in rows.values()} == {"half"}
    assert set(rows) == {(decoder, at) for decoder in drafting for at in (0, 1)}
    checked = {which: row for which, row in rows.items() if row["lossless"] == "yes"}
    assert set(checked) == {*((decoder, 0) for decoder in drafting), ("own", 1)}
    for row in checked.values():
        assert all(row[name] for name in ("speed-up", "accepted length", "by position %", "distinct 4-grams %"))
    for which in (("lookup", 0), ("own", 0), ("own", 1)):
        assert float(checked[which]["predicted"]) > 0
        assert float(checked[which]["of predicted"]) > 0
    at_once = rows["own", 0]["by position %"].split()
    assert len(at_once) == 4
    wanted = {"model": "half", "decoder": "own", "suite": "speed"}
    own = [row for row in found["acceptance"] if wanted.items() <= row.items()]
    assert [float(row["temperature"]) for row in own] == [0, 1]
    assert all(row["4th %"] for row in own)


@pytest.mark.slow
def test_the_ladder_has_a_row_for_each_share_and_what_was_trained(tables, given):
    found = tables("ladder", *given, *SMALL)
    rows = {row["model"]: row for row in found["distillation"]}
    frozen, whole = (
        [f"{model}{end}" for model in ("teacher-on", "half", "quarter", "eighth", "none")] for end in ("", "-all")
    )
    assert list(rows) == ["teacher", frozen[0], "probe", *frozen[1:], *whole]
    for row, count in zip(("half", "quarter", "eighth", "none"), (4, 2, 1, 0), strict=True):
        assert len((rows[row]["layers"] or "").split()) == count
    figures = ("val perplexity", "val perplexity / teacher's", "val KL nat", "written KL nat")
    assert all(row[figure] for row in rows.values() for figure in figures)
    for models in (frozen, whole):
        control, *others = (rows[model] for model in models)
        assert not control["val perplexity / trained on"]
        for row in others:
            ratio = float(row["val perplexity"]) / float(control["val perplexity"])
            assert float(row["val perplexity / trained on"]) == pytest.approx(ratio)
            assert row["training tokens M"] == control["training tokens M"]
    assert {rows[model]["trained %"] for model in whole} == {"100.0"}
    assert all(0 < float(rows[model]["trained %"]) < 100 for model in frozen)


@pytest.mark.slow
def test_every_arm_of_the_ablations_runs(tables, given):
    found = tables("ablations", *given, *SMALL, *SMALL_PAIRS)
    assert len(found["distillation"]) == 25


@pytest.mark.slow
def test_each_stage_of_the_chain_has_a_row(tables, given):
    found = tables("chain", *given, *SMALL, *SMALL_PAIRS)
    assert [row["model"] for row in found["quality"]] == ["teacher", "aligned", "tuned", "preferred"]
    assert all(row["pairs-val prefers_chosen %"] for row in found["quality"])


@pytest.mark.slow
def test_what_hybrids_still_look_up_is_shown_in_both_forms(tables, given, tmp_path):
    passages = tmp_path / "hub" / "EleutherAI" / "lambada_openai"
    passages.mkdir(parents=True)
    text = "the small sailor sees the miller . the baker wants a boat . the baker sees the small sailor"
    (passages / "test.jsonl").write_text(json.dumps({"text": text}) + "\n")
    small = (
        "seeds=[0]",
        "stages.hybrid.tokens=900",
        "stages.hybrid.context=64",
        "stages.hybrid.batch=2",
        "suites.perplexity.context=64",
        f"suites.twins.local={passages.parents[1]}",
        "suites.recall.items=2",
        "suites.recall.lengths=[48]",
        f"suites.recall.keys={json.dumps(OF_PART[True])}",
        f"suites.recall.values={json.dumps(WORDS['things'])}",
        f"suites.recall.words={json.dumps(WORDS['places'])}",
        'suites.recall.filler=["the miller sees a boat .", "the small baker wants a lamp ."]',
        'suites.recall.entry="{key} {value}"',
        'suites.recall.question="ask {key}"',
        'suites.recall.closing=" ."',
        'suites.recall.shown="copy {span} |"',
        'suites.recall.again="copy"',
    )
    found = tables("recall", *given, *small)
    models = ["teacher", "all", "half", "quarter", "none"]
    assert [row["model"] for row in found["recall"]] == 3 * models
    for row in found["recall"]:
        assert row["chosen %"]
        assert row["written %"]
    twins = {(row["model"], row["metric"]) for row in found["differences"] if row["task"] == "lambada_words"}
    assert {(model, metric) for model in models[1:] for metric in ("acc", "generated", "gap")} <= twins
