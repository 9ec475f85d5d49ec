"""Items of recall say where their answers stand, and both forms score as their definitions do."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from mambabench.decoders.standard import StandardDecoder
from mambabench.distillers.tiny import language
from mambabench.harness.interfaces import Limits, MambabenchError, Unsupported
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.configs import RecallConfig
from mambabench.harness.suites.likelihoods import Likelihoods
from mambabench.harness.suites.recall import Recall, choose, write
from mambabench.harness.suites.recall_items import make_items, matches

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .:,"
KINDS = ("phone-book", "needle", "multi-key", "copying")
SMALL = {"lengths": (300, 500), "items": 3, "span": 3}
TINY = {
    "keys": tuple(language.OF_PART[True][:8]),
    "values": tuple(language.WORDS["things"]),
    "words": tuple(language.OF_PART[True][-12:]),
    "filler": ("the baker sees a grey boat .", "the miller wants a small lamp ."),
    "entry": "{key} {value} {key} {value}",
    "opening": "note ",
    "separator": " , ",
    "closing": " .",
    "question": "ask {key}",
    "shown": "copy {span} |",
    "again": "",
}


def letters():
    return MockStepper(letters=LETTERS, sharpness=2.0)


@pytest.fixture(params=["letters", "words", "stories-260k", "books-28m"])
def spoken(request):
    """A tokenizer and options whose words it has."""
    if request.param == "letters":
        return letters().tokenizer, SMALL
    if request.param == "words":
        return language.tokenizer(), {**TINY, "lengths": (48, 64), "items": 3}
    from transformers import AutoTokenizer

    folder = request.getfixturevalue("shared") / "models" / request.param
    return AutoTokenizer.from_pretrained(folder), {"lengths": (160, 320), "items": 3}


def test_every_item_fits_and_asks_for_what_its_text_tells(spoken):
    tokenizer, options = spoken
    config = RecallConfig(**options)
    items = list(make_items(config, tokenizer))
    texts = 3 * len(config.lengths)
    counts = dict.fromkeys(KINDS, 3 * texts) | ({} if config.again else {"copying": texts})
    assert {kind: sum(item.kind == kind for item in items) for kind in KINDS} == counts
    assert len({item.item for item in items}) == len(items)
    for item in items:
        assert len(item.ids) + max(map(len, item.choice_ids)) <= item.length
        # Room for one more entry or sentence is not left.
        assert item.kind == "phone-book" or len(item.ids) > item.length - 40 * (1 + (tokenizer.eos_token_id == 0))
        lead, *prompt = item.ids
        assert lead == (tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
        assert len(set(item.choices)) == len(item.choices) == config.choices
        told = tokenizer.decode(prompt[len(prompt) - item.distance :])
        assert told.strip().startswith(item.answer)
        for choice, ids in zip(item.choices, item.choice_ids, strict=True):
            assert tokenizer.decode([*prompt, *ids]).removeprefix(tokenizer.decode(prompt)).strip() == choice


def test_the_text_tells_the_answer_once_and_wrong_choices_as_its_kind_says():
    for item in make_items(RecallConfig(**SMALL), letters().tokenizer):
        answer, *wrong = item.choices
        assert item.prompt.count(answer) == 1
        inside = [choice in item.prompt for choice in wrong]
        assert inside == [item.kind in ("phone-book", "multi-key")] * 3
        entries = item.prompt.count(" is ") if item.kind == "phone-book" else {"multi-key": 4}.get(item.kind, 1)
        assert item.chance == {"needle": 1 / 9000, "copying": 1 / 6}.get(item.kind, 1 / entries)


def test_depth_moves_the_answer_and_nothing_else():
    by_text = {}
    for item in make_items(RecallConfig(**SMALL), letters().tokenizer):
        by_text.setdefault((item.kind, item.cluster), []).append(item)
    for (kind, _), items in by_text.items():
        first, middle, last = (item.distance for item in items)
        assert first > middle > last
        assert first > 0.6 * items[0].length
        if kind == "phone-book":
            assert len({item.prompt.rpartition(". ")[0] for item in items}) == 1
        else:
            assert len({"".join(sorted(item.prompt)) for item in items}) == 1


def test_a_text_without_filler_is_asked_once():
    config = RecallConfig(**TINY, kinds=("needle",), lengths=(20,), items=2)
    items = list(make_items(config, language.tokenizer()))
    assert len(items) == len({item.cluster for item in items}) == 2


def test_items_depend_on_their_seed_alone():
    tokenizer = letters().tokenizer
    random.seed(1)
    one = list(make_items(RecallConfig(**SMALL), tokenizer))
    random.seed(2)
    assert one == list(make_items(RecallConfig(**SMALL), tokenizer))
    # More texts or other lengths change none of those that were there.
    more = set(make_items(RecallConfig(**{**SMALL, "items": 4, "lengths": (500, 400, 300)}), tokenizer))
    assert set(one) < more
    other = list(make_items(RecallConfig(**SMALL, seed=1), tokenizer))
    assert not {item.item for item in one} & {item.item for item in other}
    assert len({item.item for item in one}) == len(one)


def test_where_names_run_out_a_book_is_followed_by_filler():
    config = RecallConfig(**TINY, kinds=("phone-book",), lengths=(100,), items=1, depths=(0.0,))
    (item,) = make_items(config, language.tokenizer())
    assert item.prompt.count(",") == 7
    assert "grey boat ." in item.prompt
    assert item.chance == 1 / 8


def by_hand(model, item):
    """Log-likelihood of every choice, token by token, and greedy text."""
    values = []
    for ids in item.choice_ids:
        total, text = 0.0, list(item.ids)
        for token in ids:
            logits = model.logits(text)
            total += logits[token] - math.log(np.exp(logits).sum())
            text.append(token)
        values.append(total)
    text = list(item.ids)
    for _ in range(len(item.choice_ids[0]) + 2):
        text.append(int(np.argmax(model.logits(text))))
        if text[-1] == model.tokenizer.eos_token_id:
            text.pop()
            break
    return values, model.tokenizer.decode(text[len(item.ids) :])


def test_both_forms_are_those_of_the_definition():
    model = letters()
    config = RecallConfig(kinds=("needle", "multi-key"), lengths=(180, 240), items=2)
    items = list(make_items(config, model.tokenizer))
    right, texts = choose(Likelihoods(model, 0), items), write(model, StandardDecoder(), items)
    assert any(right)
    assert not all(right)
    for item, found, text in zip(items, right, texts, strict=True):
        values, greedy = by_hand(model, item)
        assert found == (values[0] > max(values[1:]))
        assert text == greedy


class Knowing(StandardDecoder):
    """Writes the answers that are given to it, one by one."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def generate(self, model, prompts, limits, emit, on_text=None):
        assert isinstance(limits, Limits)
        return [SimpleNamespace(text=next(self.answers)) for _ in prompts]


def test_records_are_those_of_the_items(measure):
    config = RecallConfig(**SMALL, kinds=("needle",), batch=4)
    items = sorted(make_items(config, letters().tokenizer), key=lambda item: -len(item.ids))
    told = [f" {item.answer}. So" if place % 3 else " 12." for place, item in enumerate(items)]
    records = measure(Recall(config), make=letters, decoder=Knowing(told))
    written = [record for record in records if record.get("metric") == "generate"]
    assert [record["value"] for record in written] == [float(place % 3 > 0) for place in range(len(items))]
    for record, item, text in zip(written, items, told, strict=True):
        assert (record["item"], record["cluster"]) == (item.item, item.cluster)
        assert (record["length"], record["depth"], record["distance"]) == (item.length, item.depth, item.distance)
        assert (record["answer"], record["text"], record["chance"]) == (item.answer, text, 1 / 9000)
    chosen = [record for record in records if record.get("metric") == "choice"]
    assert [record["item"] for record in chosen] == [record["item"] for record in written]
    assert {record["chance"] for record in chosen} == {0.25}


def test_a_model_of_noise_is_at_chance(measure):
    config = RecallConfig(kinds=("needle",), lengths=(90,), items=150, depths=(0.0, 1.0))
    records = measure(Recall(config), make=letters)
    chosen = [record["value"] for record in records if record.get("metric") == "choice"]
    assert abs(np.mean(chosen) - 0.25) < 3 * math.sqrt(0.25 * 0.75 / len(chosen))


def test_answers_are_matched_by_words():
    assert matches("fox owl elk . the", "fox owl elk")
    assert matches("  4152\n", "4152")
    assert matches(" Arthur Harding!” she said", "Arthur Harding")
    assert not matches("fox elk owl", "fox owl elk")
    assert not matches("", "4152")


def test_what_cannot_be_asked_is_refused(measure):
    with pytest.raises(Unsupported, match="no word for 'Anna Baker'"):
        list(make_items(RecallConfig(), language.tokenizer()))
    with pytest.raises(MambabenchError, match="a phone-book does not fit 20 tokens"):
        list(make_items(RecallConfig(lengths=(20,)), letters().tokenizer))
    with pytest.raises(Unsupported, match="needs 5000 positions, the model has 4096"):
        measure(Recall(RecallConfig(lengths=(5000,))), make=letters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (0.5, 1.5)}, "from 0 to 1"),
        ({"entry": "{key}:"}, "must have {value}"),
        ({"question": "who?"}, "must have {key}"),
        ({"values": ("a", "b")}, "values has 2 different words; it needs 4"),
        ({"words": ("a", "a", "b", "c", "d", "e")}, "words has 5 different words; it needs 6"),
        ({"items": 0}, "at least 1"),
    ],
)
def test_options_that_ask_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**options)
