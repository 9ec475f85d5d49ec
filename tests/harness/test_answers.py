"""Where texts end."""

from pathlib import Path

import mambabench.distillers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mambabench.harness.answers import Pieces, ends, make_answer
from mambabench.harness.interfaces import Limits
from mambabench.harness.mockmodel import MockStepper

TINY = Path(mambabench.distillers.__file__).parent / "tiny" / "teacher"
STRINGS = ("\n", "She", " was", "ë", "?!")


def completes(new, strings, tokenizer):
    """The same by decoding all tokens."""

    def held(ids):
        forms = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)]
        return any(string in form for string in strings for form in forms)

    return held(new) and not held(new[:-1])


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.sampled_from(("a", "bc", "gfa", "dd")))
def test_the_token_that_completes_a_stop_string_ends_a_text(ids, string):
    tokenizer, limits = MockStepper().tokenizer, Limits(new_tokens=20, stop_strings=(string,))
    found = [count for count in range(1, len(ids) + 1) if ends(ids[:count], limits, tokenizer)]
    wanted = [count for count in range(1, len(ids) + 1) if completes(ids[:count], (string,), tokenizer)]
    assert found[:1] == wanted[:1]


@pytest.mark.parametrize("name", ["stories-260k", "books-28m"])
def test_stop_strings_end_real_texts_at_the_same_token(shared: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    text = "One day Zoë saw a big dog.\nShe was afraid: what was it?! It barked, she ran and it was over.\n\nShe"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for string in STRINGS:
        limits = Limits(new_tokens=len(ids) + 1, stop_strings=(string,))
        for first in range(0, len(ids), 7):
            new = ids[first:]
            counts = range(1, len(new) + 1)
            found = next((count for count in counts if ends(new[:count], limits, tokenizer)), None)
            assert found == next((count for count in counts if completes(new[:count], (string,), tokenizer)), None)


@pytest.mark.parametrize(("string", "said"), [(" small", ""), (" small boat", ""), (" boat", "small"), ("small", "")])
@pytest.mark.parametrize("name", ["stories-260k", "books-28m", "tiny"])
def test_a_stop_string_that_begins_with_a_space_ends_a_text_at_its_first_word(request, name, string, said):
    from transformers import AutoTokenizer

    folder = TINY if name == "tiny" else request.getfixturevalue("shared") / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ("the miller finds a", "the miller finds a small boat .")
    prompt, whole = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    new, limits = whole[len(prompt) :], Limits(new_tokens=20, stop_strings=(string,))
    count = next(count for count in range(1, len(new) + 1) if ends(new[:count], limits, tokenizer))
    answer, pieces = make_answer(new[:count], limits, tokenizer), Pieces(prompt, limits, tokenizer)
    shown = "".join(pieces.more(new[:some], finished=some == count) for some in range(1, count + 1))
    assert (answer.text.strip(), answer.finish, shown.strip()) == (said, "stop", said)


@pytest.mark.parametrize("name", ["stories-260k", "books-28m", "tiny"])
def test_behind_a_special_token_a_stop_string_that_begins_with_a_space_ends_a_text_too(request, name):
    from transformers import AutoTokenizer

    folder = TINY if name == "tiny" else request.getfixturevalue("shared") / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = tokenizer.all_special_ids[0]
    texts = ("the miller finds a", "the miller finds a small boat")
    prompt, whole = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    new, limits = [special, *whole[len(prompt) :]], Limits(new_tokens=20, stop_strings=(" small boat",))
    assert [ends(new[:count], limits, tokenizer) for count in (len(new) - 1, len(new))] == [False, True]
    answer = make_answer(new, limits, tokenizer)
    assert (answer.text, answer.finish) == ("", "stop")
