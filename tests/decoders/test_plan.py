"""Drafts in a plan: another model of it by its name, and layers of the model itself."""

import json
import shutil

import pytest
import torch
from mambabench.harness.cli import main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(30))]
PLAN = """
schema = 1
name = "drafts"
[teacher]
path = "teacher"
[data]
text = "text.txt"
[models.pure]
use = "mamba2-hybrid"
keep = 0
[decoders.plain]
use = "standard"
[decoders.drafted]
use = "speculative"
draft = { use = "model", model = "pure" }
k = 3
adapt = true
window = 2
look = 2
[decoders.layers]
use = "speculative"
draft = { use = "layers", count = 2 }
[suites.same]
use = "losslessness"
data = "text"
prompts = 4
prompt_tokens = 8
new_tokens = 16
batch = [1, 3]
[suites.speed]
use = "speed"
data = "text"
prompt_tokens = 8
new_tokens = 24
pairs = 2
[[skip]]
steps = "*/layers/speed"
why = "one arm is enough"
[[skip]]
steps = "pure/*/speed"
why = "one model is enough"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random teacher that repeats itself, a text, and the plan."""
    folder = tmp_path_factory.mktemp("drafts")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        vocab_size=len(WORDS),
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "teacher")
    texts = [" ".join(f"w{(7 * line + 3 * place) % 30}" for place in range(20)) for line in range(12)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    (folder / "plan.toml").write_text(PLAN, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_plan_drafts_with_its_models_and_their_layers(folder, mambabench):
    done = mambabench("run", folder / "plan.toml", "--store", folder / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    measured = {}
    for outcome in (folder / "store" / "steps").glob("*/outcome.json"):
        labels = json.loads(outcome.with_name("step.json").read_text())["labels"]
        measured |= dict.fromkeys(labels, json.loads(outcome.read_text()))
    same = [outcome for label, outcome in measured.items() if "/same@" in label]
    assert len(same) == 4
    assert {outcome["state"] for outcome in measured.values()} == {"ok"}
    facts = [(fact["name"], fact["arm"]) for fact in measured["teacher/drafted/speed@seed0"]["facts"]]
    assert len(facts) == len(set(facts))
    told = {name for name, _ in facts}
    assert {f"adaptive K, {kind} time per token, batch 1" for kind in ("predicted", "measured")} <= told
    assert {f"cost of a round, K = {k}, batch 1" for k in (0, 1, 2)} <= told
    own = {fact["name"]: fact["value"] for fact in measured["pure/drafted/same@seed0"]["facts"]}
    assert own["rounds that reject a draft token"] == 0, "a model that drafts for itself is always right"


def test_a_draft_of_an_unknown_model_is_refused_while_planning(folder, mambabench):
    done = mambabench("plan", folder / "plan.toml", "--set", "decoders.drafted.draft.model=pur")
    assert done.returncode == 1
    assert "decoders.drafted.draft.model: unknown model 'pur'; did you mean 'pure'?" in done.stderr


@pytest.fixture
def run(capfd, monkeypatch):
    """`run(*arguments)` in this process, where the model stack is loaded already: exit code, output, errors."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        return done.value.code, *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), ["tokens/s"]),
        (("--draft", "ngram", "--k", "2", "--warmup"), ["tokens a round"]),
        (
            ("--draft", "teacher", "--k", "2"),
            ["3.00 tokens a round, 100% of 20 drafted tokens accepted (by position, of rounds: 100% 100%)"],
        ),
        (("--draft", "layers", "--option", "draft.count=1", "--option", "adapt=true", "--k", "2"), ["measured"]),
    ],
)
def test_generate_streams_text_and_tells_of_acceptance(folder, run, options, said):
    options = [folder / "teacher" if option == "teacher" else option for option in options]
    common = ("generate", folder / "teacher", "--prompt", "w1 w2", "--new-tokens", 31, "--dtype", "float64")
    _, plain, _ = run(*common)
    code, text, timing = run(*common, *options)
    assert (code, text) == (0, plain)
    assert text.startswith("w1 w2 w")
    assert "31 tokens, first after" in timing
    assert all(words in timing for words in said), timing


def test_several_prompts_are_continued_one_after_the_other(folder, run):
    sampled = ("--new-tokens", 9, "--dtype", "float64", "--temperature", 0.7)
    code, text, timing = run("generate", folder / "teacher", *sampled, "--prompt", "w1 w2", "--prompt", "w3")
    assert code == 0
    first, second = text.splitlines()
    assert first.startswith("w1 w2 w")
    assert second.startswith("w3 w")
    assert timing.count("[9 tokens, first after") == 2
    assert run("generate", folder / "teacher", *sampled, "--prompt", "w1 w2")[1].splitlines() == [first]


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--temperature", "nan", "nan is not"),
        ("--top-p", "nan", "nan is not"),
        ("--stop", "", "an empty text appears"),
        ("--stop", "caf\udce9", "not UTF-8"),
        ("--prompt", "caf\udce9", "not UTF-8"),
    ],
)
def test_values_that_no_range_refuses_are_refused(folder, run, option, value, why):
    code, _, told = run("generate", folder / "teacher", option, value)
    assert code == 2
    assert f"Invalid value for '{option}': {why}" in told


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--draft", "ngrm"), "--draft ngrm: neither the folder of a model nor a draft; did you mean 'ngram'?"),
        (("--option", "window=0", "--k", "2"), "window is 0; it must be at least 1"),
        (("--draft", "layers", "--option", "draft.layers=[9]"), "there is no layer 9 in a model of 4"),
        (("--draft", "layers", "--option", "draft=ngram"), "--option draft=ngram and --draft layers: say one of them"),
        (("--gpus", "99"), "device 'cuda:0': torch finds no such device here"),
        (
            ("--decoder", "standard", "--draft", "ngram"),
            "decoder standard: draft: unknown key; known: look; to draft, use --decoder speculative",
        ),
        (("--option", "adapt=true"), "decoder standard: adapt: unknown key; known: look; to draft, say --draft or --k"),
        (("--decoder", "standad"), "--decoder: unknown decoder 'standad'; did you mean 'standard'?"),
        (("--draft", "model"), "--draft model: give the folder of the model that drafts"),
        (
            ("--prompt", "w1 w2", "--new-tokens", "127"),
            "--new-tokens 127: the model has 128 positions, of which the prompt takes 3 and leaves 125",
        ),
        (("--draft", "ngram", "--k", "128"), "k = 128: the model has 128 positions, which one round would pass"),
        (("--draft", "builtin:teeny"), "unknown teacher 'teeny'; did you mean 'tiny'?"),
        (("--draft", "builtin:tiny"), "draft model 'builtin:tiny' has 142 tokens and the target 33"),
        (("--prompt", "w1 " * 128), "--prompt has 129 tokens; the model has 128 positions"),
    ],
)
def test_what_generate_cannot_do_is_one_line(folder, run, options, line):
    code, _, told = run("generate", folder / "teacher", *options)
    assert code == 1
    assert line in told


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"backend": null}', '{"backend": {"name": "teacher"}}'])
def test_an_artifact_that_is_no_model_is_one_line(folder, run, tmp_path, record):
    (tmp_path / "artifact.json").write_text(record, encoding="utf-8")
    for options in ((tmp_path,), (folder / "teacher", "--draft", tmp_path)):
        code, _, told = run("generate", *options)
        assert (code, told.count("\n")) == (1, 1), told
        assert told.startswith(f"mambabench: {tmp_path / 'artifact.json'}: ")


def test_what_is_wrong_with_a_folder_names_that_folder(folder, run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder / "teacher", broken, ignore=shutil.ignore_patterns("tokenizer*"))
    for options in ((broken,), (folder / "teacher", "--draft", broken)):
        code, _, told = run("generate", *options)
        assert code == 1
        assert f"mambabench: {broken}: no tokenizer can be loaded" in told


def test_a_model_with_its_own_loop_goes_on_where_the_prompt_ends(folder, run, tmp_path):
    config = {"cache": "dynamic"}
    shutil.copytree(folder / "teacher", tmp_path, dirs_exist_ok=True)
    record = {"backend": {"kind": "backend", "name": "hf", "revision": 1, "config": config}}
    (tmp_path / "artifact.json").write_text(json.dumps(record), encoding="utf-8")
    common = ("--prompt", "w1 w2", "--new-tokens", 9, "--dtype", "float64")
    code, text, told = run("generate", tmp_path, *common, "--profile", 2)
    assert text == run("generate", folder / "teacher", *common)[1]
    assert (code, told.splitlines()[-1]) == (
        1,
        "mambabench: --profile: the model decodes with its own loop, which cannot be taken apart",
    )


WHOLE = """
from mambabench import Component, hookimpl
from mambabench.decoders.plugin import StandardConfig

@hookimpl
def mambabench_components():
    return [Component(kind="decoder", name="whole", target=f"{__name__}:Whole", config=StandardConfig)]

class Whole:
    def __init__(self, config): ...
    def generate(self, model, prompts, limits, emit):
"""


def test_a_decoder_that_does_not_stream_goes_on_where_the_prompt_ends(folder, mambabench, tmp_path):
    plugin = tmp_path / "whole.py"
    plugin.write_text(
        WHOLE
        + """
        from mambabench.decoders.standard import StandardDecoder
        return StandardDecoder().generate(model, prompts, limits, emit)
""",
        encoding="utf-8",
    )
    asked = ("generate", folder / "teacher", "--prompt", "w1 w2", "--new-tokens", 4, "--decoder", "whole")
    done = mambabench("--plugin", plugin, *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w1 w2 w"), done.stdout


def test_a_decoder_that_returns_nothing_is_told_what_it_must(folder, mambabench, tmp_path):
    plugin = tmp_path / "whole.py"
    plugin.write_text(WHOLE + "        ...\n", encoding="utf-8")
    done = mambabench("--plugin", plugin, "generate", folder / "teacher", "--decoder", "whole")
    assert done.returncode == 1
    assert done.stderr == "mambabench: the decoder returned no answer: `generate` must return one for each prompt\n"
