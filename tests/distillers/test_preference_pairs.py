import json
import random

import pytest
from mambabench.distillers.data_configs import PreferencePairsConfig
from mambabench.distillers.preference_pairs import TORN, PreferencePairs
from mambabench.distillers.pseudo_labels import WRITTEN
from mambabench.distillers.tiny.language import WORDS
from mambabench.harness.documents import Document, encode_ended, read_documents, read_preferences
from mambabench.harness.interfaces import MambabenchError


@pytest.fixture
def write(make_job, tmp_path, teacher):
    # Words that are one token each: no passage ends inside one.
    text, words, dice = tmp_path / "text.jsonl", WORDS["things"] + WORDS["places"], random.Random(0)
    text.write_text("".join(json.dumps({"text": " ".join(dice.choices(words, k=40))}) + "\n" for _ in range(12)))

    def run(name="pairs", scratch=None, **options):
        job = make_job(name, data={"text": text}, teacher=teacher, backend=teacher.backend)
        if scratch:
            (job.scratch / WRITTEN).write_text(scratch)
        given = {"pairs": 10, "each": 2, "prompt_tokens": 6, "new_tokens": 5, "batch": 4, **options}
        PreferencePairs(PreferencePairsConfig(data="text", **given)).write(job)
        return job, (job.out / "data.jsonl").read_text().splitlines()

    run.text = text
    return run


def test_the_chosen_continuation_is_the_texts_own_and_the_rejected_one_the_teachers(write, teacher):
    job, lines = write()
    words = teacher.backend.tokenizer(teacher.path)
    texts = [words.encode(document.text, add_special_tokens=False) for document in read_documents(write.text)]
    pairs = list(read_preferences(job.out))
    assert len(pairs) == len(lines) == 10 - job.emit.facts["pairs_left_out"] == job.emit.facts["pairs"]
    for pair in pairs:
        prompt, chosen, rejected = (
            words.encode(text, add_special_tokens=False) for text in (pair.prompt, pair.chosen, pair.rejected)
        )
        assert (len(prompt), len(chosen)) == (6, 5)
        assert len(rejected) <= 5
        assert chosen != rejected
        whole = [*prompt, *chosen]
        assert any(whole == text[at : at + 11] for text in texts for at in range(len(text)))
        for document in pair.documents():
            assert encode_ended(document, words)[0][-1] != words.eos_token_id
    assert any(pair.rejected != other.rejected for pair in pairs for other in pairs)


def test_another_range_is_held_out_and_the_batch_changes_nothing(write):
    _, whole = write("whole")
    _, wide = write("wide", batch=10)
    _, later = write("later", first=4, pairs=6)
    assert wide == whole
    assert later == [line for line in whole if line in later]
    assert not set(later) & set(whole[:3])


def test_a_killed_run_goes_on_where_it_was(write):
    job, whole = write("whole", temperature=0.7)
    lines = (job.scratch / WRITTEN).read_text().splitlines(keepends=True)
    # Made up, so that lines that are written anew would show.
    kept = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "cut": True}) + "\n"
    _, resumed = write("resumed", temperature=0.7, scratch=kept + "".join(lines[1:3]) + lines[3][:9])
    assert resumed[0] == kept.strip()
    assert resumed[1:] == whole[-len(resumed) + 1 :]


def test_too_few_passages_are_counted(write):
    with pytest.raises(MambabenchError, match=r"passages of 11 tokens with each = 2, where first \+ pairs is 500"):
        write(pairs=500)
    with pytest.raises(MambabenchError, match="prompt and answer take 136 positions, the teacher has 128"):
        write(prompt_tokens=130)


def test_books_show_only_their_beginning_to_be_continued(teacher):
    from mambabench.distillers.pseudo_labels import beginning

    words = teacher.backend.tokenizer(teacher.path)
    text = "ask coal tea . " * 3000
    expected = [words.bos_token_id, *words.encode(text, add_special_tokens=False)][:9]
    assert beginning(Document(text), words, 9) == expected
    assert TORN not in words.decode(expected)
