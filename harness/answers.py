"""Where a text ends and what its answer says, the same in every decoder, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .interfaces import Answer, Limits, Tokenizer


def ends(new: Sequence[int], limits: Limits, tokenizer: Tokenizer) -> bool:
    """Whether the last of the new tokens is a stop token or completes a stop string."""
    if new[-1] in limits.stop_tokens:
        return True
    known: Any = tokenizer
    if not limits.stop_strings or not _may_complete(new[-1], limits.stop_strings, known):
        return False
    # A character is at most four byte tokens, so this many tokens hold the longest stop string and more.
    tail = new[-16 - 4 * max(map(len, limits.stop_strings)) :]
    forms = [_told(tail, tokenizer, skip) for skip in (False, True)]
    return any(string in form for string in limits.stop_strings for form in forms)


@lru_cache(maxsize=1 << 16)
def _may_complete(token: int, strings: tuple[str, ...], tokenizer: Tokenizer) -> bool:
    """Whether a token can be the last of one of the strings: its text has the string's last character, or only a part
    of a character. Most tokens cannot, and need not be decoded again for every row and text that they end."""
    # Behind another token, since some tokenizers leave out the space before a text's first word.
    forms = [tokenizer.decode([token, token], skip_special_tokens=skip) for skip in (False, True)]
    return any(last in form for last in {REPLACEMENT, *(string[-1:] for string in strings)} for form in forms)


def make_answer(new: Sequence[int], limits: Limits, tokenizer: Tokenizer) -> Answer:
    """The answer of at least one new token, none of which but the last ends the text."""
    stopped = new[-1] in limits.stop_tokens
    shown = new[:-1] if stopped else new
    text = tokenizer.decode(shown, skip_special_tokens=True)
    told = _told(shown, tokenizer, True) if limits.stop_strings else text
    cuts = [at for string in limits.stop_strings if (at := _find(string, shown, told, tokenizer)) >= 0]
    end = min(cuts, default=len(told)) - (len(told) - len(text))
    return Answer(tuple(new), text[: max(end, 0)], "stop" if stopped or cuts else "length")


def _find(string: str, shown: Sequence[int], text: str, tokenizer: Tokenizer) -> int:
    """Where a stop string begins in the text, or -1. One that holds special tokens is not in the text, which has none;
    it is the last that the tokens say, so what else it holds is counted from the end."""
    at = text.find(string)
    if at >= 0 or string not in _told(shown, tokenizer, False):
        return at
    tails = (shown[first:] for first in range(len(shown) - 1, -1, -1))
    tail, at = next((tail, at) for tail in tails if (at := _told(tail, tokenizer, False).find(string)) >= 0)
    return max(len(text) - len(_told(tail, tokenizer, True)[at:]), 0)


def _told(ids: Sequence[int], tokenizer: Tokenizer, skip: bool) -> str:
    """What tokens say behind others: with the space before a first word, of which a stop string may begin."""
    known: Any = tokenizer
    return (_space(ids[0], known) if ids else "") + tokenizer.decode(ids, skip_special_tokens=skip)


@lru_cache(maxsize=1 << 16)
def _space(token: int, tokenizer: Tokenizer) -> str:
    return gap((token,), (token,), tokenizer)


def gap(prompt: Sequence[int], new: Sequence[int], tokenizer: Tokenizer) -> str:
    """The space between a prompt and the text of what follows, which some tokenizers leave out before a first word."""
    seen = prompt[-SEEN:]
    before, alone, both = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (seen, new, [*seen, *new]))
    space = both.removeprefix(before).removesuffix(alone)
    return space if space.isspace() else ""


class Pieces:
    """The text of a growing answer, a piece at a time, as far as no later token can change it.

    What may be the beginning of a stop string waits, and so does a character of which bytes are missing. All pieces
    together are the answer's text, for a tokenizer whose text of more tokens begins with that of fewer. Where it leaves
    out the space before a text's first word, the first piece has it, so that it continues the prompt.
    """

    def __init__(self, prompt: Sequence[int], limits: Limits, tokenizer: Tokenizer) -> None:
        self._before, self._limits, self._tokenizer = prompt, limits, tokenizer
        self._given = ""

    def more(self, new: Sequence[int], finished: bool) -> str:
        """What can be shown now that the answer has these new tokens; with `finished`, all that is left of it."""
        if finished:
            return self._next(make_answer(new, self._limits, self._tokenizer).text, new)
        text = self._text(new).rstrip(REPLACEMENT)
        strings = self._limits.stop_strings
        forms = [_told(new, self._tokenizer, skip).rstrip(REPLACEMENT) for skip in (False, True)] if strings else []
        waiting = max((_begun(string, form) for string in strings for form in forms), default=0)
        return self._next(text[: max(len(text) - waiting, 0)], new)

    def _next(self, text: str, new: Sequence[int]) -> str:
        if not text.startswith(self._given) or len(text) == len(self._given):
            return ""
        piece = text[len(self._given) :]
        if not self._given:
            piece = gap(self._before, new, self._tokenizer) + piece
        self._given = text
        return piece

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


SEEN = 8
"""Tokens of the prompt that say whether a space follows them."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _begun(string: str, text: str) -> int:
    """How many characters at the text's end may be the beginning of a stop string."""
    return next((count for count in range(len(string) - 1, 0, -1) if text.endswith(string[:count])), 0)
