"""A model trained elsewhere, in its own architecture, is a row beside the teacher and its hybrids."""

import csv
import json
import random

import pytest

PLAN = """
schema = 1
name = "baselines"
[teacher]
path = "llama"
[data]
text = "text.txt"
[models.half]
use = "mamba2-hybrid"
keep = [1]
[models.falcon]
use = "hf"
path = "falcon"
[decoders.plain]
use = "standard"
[decoders.lookup]
use = "speculative"
draft = "ngram"
k = 2
[suites.perplexity]
use = "perplexity"
data = "text"
context = 32
[suites.losslessness]
use = "losslessness"
data = "text"
prompts = 2
prompt_tokens = 4
new_tokens = 8
batch = [2]
"""
WORDS = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(58))]


@pytest.fixture(scope="module")
def store(mambabench, tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, FalconMambaConfig, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("baselines")
    torch.manual_seed(0)
    common = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
    for name, config in {
        "llama": LlamaConfig(intermediate_size=48, num_attention_heads=4, max_position_embeddings=128, **common),
        "falcon": FalconMambaConfig(state_size=4, **common),
    }.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.save_pretrained(folder / name)
    dice = random.Random(0)
    documents = [" ".join(dice.choice(WORDS[3:]) for _ in range(40)) for _ in range(8)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    (folder / "plan.toml").write_text(PLAN)
    done = mambabench("run", folder / "plan.toml", "--store", folder / "store")
    assert "unsupported" in done.stdout, done.stdout + done.stderr
    mambabench("report", folder / "store", "--to", "csv")
    return folder / "store"


def outcomes(store):
    """Label -> state and reason."""
    found = {}
    for path in store.glob("*/*/step.json"):
        outcome = path.with_name("outcome.json")
        if outcome.is_file():
            read = json.loads(outcome.read_text())
            found |= dict.fromkeys(json.loads(path.read_text())["labels"], (read["state"], read["reason"]))
    return found


@pytest.mark.slow
def test_the_row_has_its_perplexity(store):
    with (store / "report" / "csv" / "quality.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["teacher", "half", "falcon"]
    column = next(name for name in rows["falcon"] if name.endswith("perplexity"))
    assert 20 < float(rows["falcon"][column].split()[0]) < 200


@pytest.mark.slow
def test_speculation_over_it_is_unsupported_and_over_the_others_is_not(store):
    found = outcomes(store)
    assert found["falcon/-/perplexity@seed0"][0] == "ok"
    state, reason = found["falcon/lookup/losslessness@seed0"]
    assert state == "unsupported"
    assert "roll back" in reason
    for model in ("teacher", "half"):
        assert found[f"{model}/lookup/losslessness@seed0"][0] == "ok"
