"""The stand-in language: the same from a seed, held out where it says so, and readable by lm-eval."""

import json
import subprocess
import sys

import pytest
import yaml
from mambabench.distillers.standin import (
    CHOICES,
    VOCABULARY,
    WORDS,
    Writer,
    fragments,
    held_out,
    tokenizer,
)
from mambabench.harness.documents import encode_document, read_documents


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(text):
    """The fact lists (names and things in turn) and the spans of a text, copies included."""
    facts, spans = [], []
    for section in text.split(" . "):
        words = section.replace(" .", "").split()
        if words[0] == "note":
            facts.append([word for fact in " ".join(words[1:]).split(" , ") for word in fact.split()[:2]])
        elif words[0] == "copy":
            spans += [part.split() for part in " ".join(words[1:]).split("|") if part.strip()]
    return facts, spans


def in_part(text, held):
    facts, spans = content(text)
    return all(held_out(f) == held for words in facts for f in fragments(words, stride=2)) and all(
        held_out(f) == held for words in spans for f in fragments(words)
    )


def test_a_document_depends_on_part_index_and_seed_alone(write_standin):
    few = lines(write_standin(documents=3) / "data.jsonl")
    many = lines(write_standin(documents=30) / "data.jsonl")
    assert many[:3] == few
    assert len({row["text"] for row in many}) == 30
    assert lines(write_standin(documents=3, seed=1) / "data.jsonl") != few
    assert lines(write_standin(documents=3, part="unseen") / "data.jsonl") != few


def test_training_and_held_out_documents_have_no_fragment_in_common(write_standin):
    assert all(in_part(row["text"], held=False) for row in lines(write_standin(documents=300) / "data.jsonl"))
    for part in ("unseen", "prompts"):
        assert all(
            in_part(row["text"], held=True) for row in lines(write_standin(documents=100, part=part) / "data.jsonl")
        )


def test_no_held_out_item_can_be_answered_from_training_text(write_standin):
    training = "\n".join(row["text"] for row in lines(write_standin(documents=2000) / "data.jsonl"))
    tasks = write_standin(part="tasks", items=100)
    for row in lines(tasks / "lookup.jsonl"):
        (facts,), _ = content(row["context"])
        for name, thing, other, another in fragments(facts, stride=2):
            assert f"{name} {thing} , {other} {another}" not in training
    for row in lines(tasks / "copy.jsonl"):
        assert all(" ".join(fragment) not in training for fragment in fragments(row["answer"].split()))


@pytest.mark.parametrize("part", ["train", "unseen"])
def test_every_question_and_copy_is_answered_by_the_text_before_it(part):
    for index in range(200):
        text = " ".join(Writer(part, index, 0).document())
        (facts,), spans = content(text)
        known = dict(zip(facts[::2], facts[1::2], strict=True))
        asked = [section.replace(" .", "").split()[1:] for section in text.split(" . ") if section.startswith("ask")]
        assert sorted(asked) == sorted(map(list, known.items()))
        assert len(spans) == 2
        assert spans[0] == spans[1]


def test_prompts_end_where_a_span_is_about_to_be_copied():
    for index in range(50):
        words = ["<s>", *Writer("prompts", index, 0).prompt()]
        assert len(set(words[18:23])) == 5
        assert [words[17], words[23], *words[24:29]] == ["copy", "|", *words[18:23]]


def test_items_have_four_choices_of_which_one_follows_from_the_context(write_standin):
    tasks = write_standin(part="tasks", items=60)
    labels = set()
    for name in ("lookup", "copy"):
        rows = lines(tasks / f"{name}.jsonl")
        assert len(rows) == 60
        for row in rows:
            assert len(set(row["choices"])) == CHOICES
            assert row["choices"][row["label"]] == row["answer"]
            labels.add(row["label"])
            (facts,), spans = content(row["context"])
            if name == "copy":
                assert row["answer"].split() == spans[0]
                continue
            name = row["context"].split()[-1]
            assert dict(zip(facts[::2], facts[1::2], strict=True))[name] == row["answer"]
            assert set(row["choices"]) == set(facts[1::2])
    assert labels == set(range(CHOICES))


def test_every_likelihood_task_has_a_generative_twin_over_the_same_items(write_standin):
    tasks = write_standin(part="tasks", items=5)
    for name in ("lookup", "copy"):
        choose, generate = (
            yaml.safe_load((tasks / f"standin_{name}{end}.yaml").read_text()) for end in ("", "_generate")
        )
        assert choose["task"] == f"standin_{name}"
        assert generate["task"] == f"standin_{name}_generate"
        assert choose["dataset_kwargs"] == generate["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
        assert choose["doc_to_text"] == generate["doc_to_text"] == "{{context}}"


def test_the_tokenizer_knows_every_word_and_gives_texts_back(write_standin):
    words = tokenizer()
    assert len(words) == len(VOCABULARY) == len(set(VOCABULARY)) <= 128
    folder = write_standin(documents=20, part="unseen")
    for document in read_documents(folder):
        ids, context = encode_document(document, words)
        assert context == 1
        assert words.unk_token_id not in ids
        assert words.decode(ids, skip_special_tokens=True) == document.text
    assert words.encode("ask anna")[0] == words.bos_token_id
    assert words.decode(words.encode("ask", add_special_tokens=False)) == "ask"


def test_the_tokenizer_that_is_written_is_the_one_that_is_made(write_standin):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(write_standin(documents=1) / "tokenizer")
    text = " ".join(word for kind in WORDS.values() for word in kind)
    assert words.encode(text) == tokenizer().encode(text)
    assert (words.bos_token_id, words.eos_token_id) == (tokenizer().bos_token_id, tokenizer().eos_token_id)


def test_the_plug_in_describes_its_components_without_torch():
    code = "import sys; from mambabench.distillers import plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
