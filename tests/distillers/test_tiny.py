"""The tiny world: the same from a seed, nothing of test items in what is learnt, and readable by lm-eval and judges."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from mambabench.distillers.plugin import TinyConfig
from mambabench.distillers.tiny.instructions import KINDS, read_chat, solve
from mambabench.distillers.tiny.judge import share_right
from mambabench.distillers.tiny.language import (
    NAMES,
    OF_PART,
    SYLLABLES,
    VOCABULARY,
    WORDS,
    held_out,
    tokenizer,
    tokens_in,
)
from mambabench.distillers.tiny.writer import CHOICES, CONTEXT, TASKS, TRAINED, Writer
from mambabench.harness.documents import encode_document, read_documents, read_preferences
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry

ROOT = Path(__file__).resolve().parents[2]
PARTS = get_args(get_type_hints(TinyConfig)["part"])
HELD_OUT = [part for part in PARTS if part not in TRAINED]
NAME, SUM = re.compile(r"[a-z]{6}"), re.compile(r"(\d\d) \+ (\d\d)|larger of (\d\d) (\d\d)")
ITEMS = 100


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_in(text):
    return set(NAME.findall(text)) & set(NAMES)


def facts_of(text):
    """Things by name, and how often each fact is told."""
    facts = [fact.split() for fact in text.partition(" .")[0].removeprefix("note ").split(" , ")]
    (times,) = {len(fact) // 2 for fact in facts}
    assert all(fact == fact[:2] * times for fact in facts)
    for part in (slice(2), slice(-2, None)):
        assert len({name[part] for name, *_ in facts}) == len(facts)
    return {name: thing for name, thing, *_ in facts}, times


def seen_in(story):
    """Places by name, in the order in which its people were seen at them."""
    places = {}
    for seen in story.partition(" .")[0].split(" , "):
        name, place = seen.split()
        places.setdefault(name, []).append(place)
    return places


def sums_in(text):
    return {tuple(sorted(number for number in found if number)) for found in SUM.findall(text)}


def written(folder):
    return "".join(file.read_text() for file in sorted(folder.glob("*.jsonl")))


@pytest.fixture
def learnt(write_tiny):
    """So much of the parts to learn from that nearly every name and sum of theirs is in it."""
    return "".join(written(write_tiny(part=part, documents=8000)) for part in TRAINED)


def test_no_name_and_no_sum_of_a_held_out_part_is_ever_learnt_from(learnt, write_tiny):
    learnt_names, learnt_sums = names_in(learnt), sums_in(learnt)
    assert learnt_names <= set(OF_PART[False])
    assert len(learnt_names) > 0.99 * len(OF_PART[False])
    assert len(learnt_sums) > 1000
    for part in HELD_OUT:
        text = written(write_tiny(part=part))
        names, sums = names_in(text), sums_in(text)
        assert names, part
        assert sums or part not in ("unseen", "tasks"), part
        assert not names & learnt_names, part
        assert not sums & learnt_sums, part


@pytest.mark.parametrize(
    "name", ["plans/tiny", "plans/gpu/tiny-teacher", "examples/plans/chain", "examples/plans/recall"]
)
def test_plans_train_on_what_is_to_be_learnt_from_and_ask_about_what_is_held_out(name):
    plan = read_plan(ROOT / f"{name}.toml", registry())

    def parts(choices):
        used = {getattr(choice.config, "data", "") for choice in choices.values()} - {""}
        return {plan.data[name].source.config.part for name in used}

    assert parts(plan.stages) <= set(TRAINED)
    assert parts(plan.suites) <= set(HELD_OUT)


def test_parts_share_no_name_and_a_quarter_is_held_out():
    assert not set(OF_PART[True]) & set(OF_PART[False])
    assert len(OF_PART[True]) / len(NAMES) == pytest.approx(0.25, abs=0.05)
    assert held_out(12, 34) == held_out(34, 12)


def test_a_document_depends_on_part_index_and_seed_alone(write_tiny):
    few = lines(write_tiny(documents=3) / "data.jsonl")
    many = lines(write_tiny(documents=30) / "data.jsonl")
    assert many[:3] == few
    assert len({row["text"] for row in many}) == 30
    assert lines(write_tiny(documents=3, seed=1) / "data.jsonl") != few
    assert lines(write_tiny(documents=3, part="unseen") / "data.jsonl") != few


@pytest.mark.parametrize("part", ["train", "unseen"])
def test_all_that_a_document_asks_is_answered_by_what_stands_before(part):
    answered, told = 0, set()
    for index in range(300):
        text = Writer(part, index, 0).document()
        facts, times = facts_of(text)
        told.add(times)
        asked = re.findall(r"ask (\w+) (\w+) \.", text)
        answered += len(asked)
        assert all(facts[name] == thing for name, thing in asked)
        assert all(span == copy for span, copy in re.findall(r"copy ([\w ]+) \| ([\w ]+) \.", text))
        assert all(
            int(one) + int(other) == int(total) for one, other, total in re.findall(r"(\d+) \+ (\d+) is (\d+)", text)
        )
        for story in text.split("story ")[1:]:
            last = {name: places[-1] for name, places in seen_in(story).items()}
            asked = re.findall(r"where is (\w+) (\w+) \.", story)
            assert dict(asked) == last
            assert len(asked) == len(last)
        for first, answer in re.findall(r"\[INST\] (\w+ of [\w ]+) \[/INST\] ([\w ]+) </s>", text):
            assert " ".join(solve(read_chat([first]))) == answer
    assert answered > 600
    assert told == {1, 2}


def test_prompts_end_where_a_span_is_about_to_be_copied():
    words = tokenizer()
    for index in range(50):
        text = Writer("prompts", index, 0).prompt()
        ids = words.encode(text)
        start = words.decode(ids[:30], skip_special_tokens=True)
        assert text.startswith(start + " | " + start.partition(" copy ")[2] + " .")


def test_items_have_four_choices_of_which_one_follows_from_the_context(write_tiny):
    tasks = write_tiny(part="tasks", items=ITEMS)
    for name in TASKS:
        rows = lines(tasks / f"{name}.jsonl")
        assert len(rows) == ITEMS
        assert {row["label"] for row in rows} == set(range(CHOICES))
        for row in rows:
            assert len(set(row["choices"])) == CHOICES
            assert row["choices"][row["label"]] == row["answer"] == truth(name, row["context"])


def truth(name, context):
    """The answer, read from the context alone."""
    words = context.split()
    if name == "lookup":
        return facts_of(context)[0][words[-1]]
    if name == "copy":
        return " ".join(words[1:-1])
    if name == "arithmetic":
        return str(int(words[1]) + int(words[3]))
    if name == "story":
        return seen_in(context.removeprefix("story "))[words[-1]][-1]
    return " ".join(solve(read_chat([" ".join(words[1:-1])])))


def test_a_story_s_wrong_choices_are_where_the_person_was_before_and_where_the_others_are():
    guessed = 0
    for index in range(300):
        item = Writer("tasks/story", index, 0).story_end()
        seen = seen_in(item.context.removeprefix("story "))
        before, _ = seen.pop(item.context.split()[-1])
        assert set(item.wrong) == {before, *(places[-1] for places in seen.values())}
        guessed += item.answer == max((item.answer, *item.wrong), key=item.context.index)
    assert guessed / 300 == pytest.approx(1 / 3, abs=0.08)


def test_every_two_syllables_that_follow_each_other_in_a_name_do_so_in_names_to_learn_from():
    def pairs(names):
        return {(name[:2], name[2:4]) for name in names} | {(name[2:4], name[4:]) for name in names}

    assert pairs(OF_PART[False]) == {(one, other) for one in SYLLABLES for other in SYLLABLES if one != other}


def test_every_likelihood_task_has_a_generative_twin_over_the_same_items(write_tiny):
    tasks = write_tiny(part="tasks", items=5)
    for name in TASKS:
        choose, generate = (yaml.safe_load((tasks / f"tiny_{name}{end}.yaml").read_text()) for end in ("", "_generate"))
        assert choose["task"] == f"tiny_{name}"
        assert generate["task"] == f"tiny_{name}_generate"
        assert choose["dataset_kwargs"] == generate["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
        assert choose["doc_to_text"] == generate["doc_to_text"] == "{{context}}"


def test_every_instruction_has_three_wrong_answers_and_the_rules_tell_them():
    kinds = set()
    for index in range(300):
        writer = Writer("tasks/instruct", index, 0)
        item = writer.instruct()
        asked = item.context.removeprefix("[INST] ").removesuffix(" [/INST]")
        kinds.add(asked.split()[0])
        assert len(set(item.wrong) - {item.answer}) == CHOICES - 1
        assert share_right([asked], item.answer) == 1
        assert all(share_right([asked], wrong) < 1 for wrong in item.wrong)
    assert kinds == set(KINDS)


@pytest.mark.parametrize(
    "turns", [[""], ["last balomu"], ["larger of balomu kuzidi"], ["last of 1 2"], ["last of a b c", "x"]]
)
def test_what_is_no_instruction_is_refused(turns):
    with pytest.raises(ValueError, match="instruction of the tiny world"):
        read_chat(turns)


@pytest.mark.parametrize("part", ["preferences", "unseen-preferences"])
def test_preferences_prefer_the_right_answer(write_tiny, part):
    pairs = list(read_preferences(write_tiny(part=part, documents=200)))
    assert len({pair.item for pair in pairs}) > 190
    for pair in pairs:
        assert pair.chosen != pair.rejected
        name = next(name for name, begin in BEGINS.items() if pair.prompt.startswith(begin))
        assert pair.chosen.removesuffix(" .") == truth(name, pair.prompt)


BEGINS = {"lookup": "note", "copy": "copy", "story": "story", "instruct": "[INST]"}


def test_the_tokenizer_spells_everything_and_gives_texts_back(write_tiny):
    words = tokenizer()
    assert len(words) == len(VOCABULARY) == len(set(VOCABULARY))
    assert not set(NAMES) & set(VOCABULARY)
    for word in (*NAMES, *VOCABULARY[3:100], "27"):
        ids = words.encode(word, add_special_tokens=False)
        assert words.unk_token_id not in ids
        assert len(ids) == tokens_in(word) or word.startswith("##")
    for document in read_documents(write_tiny(documents=200)):
        ids, context = encode_document(document, words)
        assert context == 1
        assert words.unk_token_id not in ids
        assert len(ids) < CONTEXT
        assert words.decode(ids[1:]) == document.text
    assert words.encode("ask balomu")[0] == words.bos_token_id


def test_the_tokenizer_writes_chats_as_the_texts_have_them_and_as_fschat_does():
    conversation = pytest.importorskip("fastchat.conversation").get_conv_template("mistral")
    words = tokenizer()
    for role, text in zip((0, 1, 0), ("last of balomu kuzidi tirova", "tirova", "now first"), strict=True):
        conversation.append_message(conversation.roles[role], text)
    conversation.append_message(conversation.roles[1], None)
    messages = [
        {"role": "user", "content": "last of balomu kuzidi tirova"},
        {"role": "assistant", "content": "tirova"},
        {"role": "user", "content": "now first"},
    ]
    ids = words.encode(words.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assert ids == words.encode(conversation.get_prompt(), add_special_tokens=False)
    learnt = "[INST] last of balomu kuzidi tirova [/INST] tirova </s> [INST] now first [/INST]"
    assert ids == words.encode(learnt, add_special_tokens=False)


def test_the_tokenizer_that_is_written_is_the_one_that_is_made(write_tiny):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(write_tiny(documents=1) / "tokenizer")
    text = " ".join([*(word for kind in WORDS.values() for word in kind), *NAMES[:20]])
    assert words.encode(text) == tokenizer().encode(text)
    assert words.chat_template == tokenizer().chat_template
    assert (words.bos_token_id, words.eos_token_id) == (tokenizer().bos_token_id, tokenizer().eos_token_id)


def test_an_item_depends_on_its_task_number_and_seed_alone(write_tiny):
    few, many, others = (write_tiny(part="tasks", items=items, seed=seed) for items, seed in ((5, 0), (20, 0), (5, 1)))
    for name in TASKS:
        rows = [lines(folder / f"{name}.jsonl") for folder in (few, many, others)]
        assert rows[0] == rows[1][:5]
        assert rows[0] != rows[2]
        assert len({row["context"] for row in rows[1]}) == 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": "tasks", "documents": 9}, 'documents is set and part is "tasks", which has none'),
        ({"part": "chat", "documents": 9}, 'documents is set and part is "chat", which has none'),
        ({"part": "chat", "items": 9}, 'items is set and part is "chat", which has none'),
        ({"part": "unseen", "items": 9}, 'items is set and part is "unseen", which has none'),
        ({"documents": 0}, "documents is 0; it must be above 0"),
    ],
)
def test_an_option_that_a_part_does_not_have_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TinyConfig(**options)


def test_the_plug_in_describes_its_components_without_torch():
    code = "import sys; from mambabench.distillers import plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
