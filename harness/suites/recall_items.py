"""Questions whose answers stand in the text before them, made by code from a seed and a list of words.

Nothing is taken from a training text, and what is asked is drawn anew for every item, so that it can only be known from
the text. How long a text is, and where in it the answer stands, is counted in tokens of the model's tokenizer.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..documents import leading_token
from ..interfaces import MambabenchError, Tokenizer, Unsupported
from .configs import RecallConfig
from .recall_words import FILLER

AFTER = 2
"""Tokens that are left behind an answer, so that it is seen where it ends."""
PUNCTUATION = ".,;:!?|\"'”’…"


@dataclass(frozen=True, slots=True)
class Item:
    """One question."""

    kind: str
    length: int
    """Room that was asked for, in tokens, answer included."""
    depth: float
    """Where the answer stands: 0 is the text's beginning, 1 its end."""
    cluster: str
    """Items on one text have the same."""
    prompt: str
    ids: tuple[int, ...]
    """Of the prompt, behind a leading token."""
    answer: str
    choices: tuple[str, ...]
    """The answer first."""
    choice_ids: tuple[tuple[int, ...], ...]
    distance: int
    """Tokens from where the answer stands to where it is asked for."""
    chance: float
    """Of an answer that is picked among what the text offers."""
    item: str = field(init=False)

    def __post_init__(self) -> None:
        told = hashlib.sha256(f"{self.prompt}\0{self.answer}".encode()).hexdigest()[:16]
        object.__setattr__(self, "item", told)


@dataclass(frozen=True, slots=True)
class Question:
    """A text with a question, before it is counted."""

    prompt: str
    before: str
    """The prompt up to where the answer stands."""
    answer: str
    wrong: tuple[str, ...]
    chance: float


def matches(text: str, answer: str) -> bool:
    """Whether a text begins with the words of an answer, punctuation behind them aside.

    >>> matches(" 4152. Then", "4152"), matches("41523", "4152"), matches("fox owl", "fox owl elk")
    (True, False, False)
    """
    wanted = answer.split()
    return [word.rstrip(PUNCTUATION) for word in text.split()[: len(wanted)]] == wanted


def make_items(config: RecallConfig, tokenizer: Tokenizer) -> Iterator[Item]:
    """The items of each kind and length, text by text; of one text those of all depths.

    Raises MambabenchError for a length that is too short and `Unsupported` for a tokenizer without the words.
    """
    _check_words(config, tokenizer)
    for kind in config.kinds:
        for length in config.lengths:
            for number in range(config.items):
                yield from _of_text(config, kind, length, number, tokenizer)


def _of_text(config: RecallConfig, kind: str, length: int, number: int, tokenizer: Tokenizer) -> Iterator[Item]:
    lead = leading_token(tokenizer)
    begin = () if lead is None else (lead,)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    # A copy that is asked for by nothing follows what it copies.
    depths = (1.0,) if kind == "copying" and not config.again else config.depths
    cluster = f"{kind}/{length}/{config.seed}/{number}"

    def questions(size: int) -> list[Question]:
        return [MAKERS[kind](config, random.Random(cluster), size, depth) for depth in depths]

    def fits(size: int) -> bool:
        return all(
            len(begin) + len(encode(f"{asked.prompt} {of}")) + AFTER <= length
            for asked in questions(size)
            for of in (asked.answer, *asked.wrong)
        )

    size = _largest(fits, most=length)
    if size < 0:
        least = max(len(begin) + len(encode(f"{of.prompt} {of.answer}")) + AFTER for of in questions(0))
        raise MambabenchError(f"recall: a {kind} does not fit {length} tokens; lengths of about {least} would do")
    seen = set()
    for depth, asked in zip(depths, questions(size), strict=True):
        # A text may be too short for every depth to be a place of its own.
        if (asked.prompt, asked.before) in seen:
            continue
        seen.add((asked.prompt, asked.before))
        ids = encode(asked.prompt)
        choices = (asked.answer, *asked.wrong)
        whole = [encode(f"{asked.prompt} {choice}") for choice in choices]
        if any(of[: len(ids)] != ids for of in whole):
            raise Unsupported("recall: the tokenizer joins a question with the word behind it")
        yield Item(
            kind=kind,
            length=length,
            depth=depth,
            cluster=cluster,
            prompt=asked.prompt,
            ids=(*begin, *ids),
            answer=asked.answer,
            choices=choices,
            choice_ids=tuple(tuple(of[len(ids) :]) for of in whole),
            distance=len(ids) - len(encode(asked.before.rstrip())),
            chance=asked.chance,
        )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest size that fits, which all smaller ones do; -1 if none does."""
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _phone_book(config: RecallConfig, dice: random.Random, size: int, depth: float) -> Question:
    """Many entries one behind the other, and filler where names or values run out."""
    most = min(len(config.keys_pool), len(config.values_pool), config.choices + size)
    pairs = _pairs(config, dice, min(len(config.keys_pool), len(config.values_pool)))[:most]
    at = round(depth * (most - 1))
    filler = _filler(config, random.Random(dice.random()), max(0, config.choices + size - most))
    before = config.opening + config.separator.join(_told(config, *pair) for pair in pairs[:at])
    book = [config.opening + config.separator.join(_told(config, *pair) for pair in pairs) + config.closing]
    before += (config.separator if at else "") + _until_value(config, *pairs[at])
    others = [value for place, (_, value) in enumerate(pairs) if place != at]
    return _asked(config, dice, [*book, *filler], before, pairs[at], others, 1 / most)


def _needle(config: RecallConfig, dice: random.Random, size: int, depth: float) -> Question:
    """One entry in filler. What else could be the answer stands nowhere in the text."""
    asked, *others = _pairs(config, dice, config.choices)
    wrong = [value for _, value in others]
    return _in_filler(config, dice, asked, _filler(config, dice, size), depth, wrong, 1 / len(config.values_pool))


def _multi_key(config: RecallConfig, dice: random.Random, size: int, depth: float) -> Question:
    """Several entries in filler, of which one is asked for; the others stand anywhere."""
    asked, *others = _pairs(config, dice, config.entries)
    units = _filler(config, dice, size)
    for pair in others:
        units.insert(dice.randint(0, len(units)), _alone(config, *pair))
    wrong = [value for _, value in others]
    return _in_filler(config, dice, asked, units, depth, wrong, 1 / config.entries)


def _copying(config: RecallConfig, dice: random.Random, size: int, depth: float) -> Question:
    """A span of words in filler that is begun again; wrong choices have two words exchanged."""
    words = dice.sample(config.words_pool, config.span)
    span = " ".join(words)
    wrong: list[str] = []
    while len(wrong) < min(config.choices, math.comb(config.span, 2) + 1) - 1:
        one, two = dice.sample(range(config.span), 2)
        changed = list(words)
        changed[one], changed[two] = words[two], words[one]
        if (text := " ".join(changed)) not in wrong:
            wrong.append(text)
    filler = _filler(config, dice, size)
    at = round(depth * size)
    before = " ".join([*filler[:at], config.shown.partition("{span}")[0].rstrip()])
    prompt = " ".join(
        part for part in (*filler[:at], config.shown.format(span=span), *filler[at:], config.again) if part
    )
    return Question(prompt, before, span, tuple(wrong), 1 / math.factorial(config.span))


MAKERS: dict[str, Callable[[RecallConfig, random.Random, int, float], Question]] = {
    "phone-book": _phone_book,
    "needle": _needle,
    "multi-key": _multi_key,
    "copying": _copying,
}


def _in_filler(
    config: RecallConfig,
    dice: random.Random,
    pair: tuple[str, str],
    units: Sequence[str],
    depth: float,
    wrong: Sequence[str],
    chance: float,
) -> Question:
    """An entry among other units of a text."""
    at = round(depth * len(units))
    before = " ".join([*units[:at], config.opening + _until_value(config, *pair)])
    return _asked(config, dice, [*units[:at], _alone(config, *pair), *units[at:]], before, pair, wrong, chance)


def _asked(
    config: RecallConfig,
    dice: random.Random,
    units: Sequence[str],
    before: str,
    pair: tuple[str, str],
    others: Sequence[str],
    chance: float,
) -> Question:
    key, value = pair
    wrong = tuple(dice.sample(list(others), min(config.choices - 1, len(others))))
    return Question(" ".join([*units, config.question.format(key=key)]), before, value, wrong, chance)


def _pairs(config: RecallConfig, dice: random.Random, count: int) -> list[tuple[str, str]]:
    """Different keys with different values."""
    return list(zip(dice.sample(config.keys_pool, count), dice.sample(config.values_pool, count), strict=True))


def _filler(config: RecallConfig, dice: random.Random, count: int) -> list[str]:
    return [dice.choice(config.filler or FILLER) for _ in range(count)]


def _told(config: RecallConfig, key: str, value: str) -> str:
    return config.entry.format(key=key, value=value)


def _alone(config: RecallConfig, key: str, value: str) -> str:
    """An entry that is no part of a book."""
    return config.opening + _told(config, key, value) + config.closing


def _until_value(config: RecallConfig, key: str, value: str) -> str:
    """An entry up to where its value stands for the first time."""
    head, _, _ = config.entry.partition("{value}")
    return head.format(key=key, value=value)


def _check_words(config: RecallConfig, tokenizer: Tokenizer) -> None:
    """Raises `Unsupported` for words that the tokenizer reads as unknown."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    frame = [config.opening, config.closing, config.separator, config.question.format(key="")]
    frame += [config.entry.format(key="", value=""), config.shown.format(span=""), config.again]
    words = (*config.keys_pool, *config.values_pool, *config.words_pool, *(config.filler or FILLER), *frame)
    for word in words if unknown is not None else ():
        if unknown in tokenizer.encode(word, add_special_tokens=False):
            raise Unsupported(
                f"recall: the tokenizer has no word for {word!r}; the options keys, values, words, filler and the "
                "templates name others"
            )
