"""Where a text ends and what its answer says, the same in every decoder, without torch."""

from __future__ import annotations

from collections.abc import Sequence

from .interfaces import Answer, Limits, Tokenizer


def ends(new: Sequence[int], limits: Limits, tokenizer: Tokenizer) -> bool:
    """Whether the last of the new tokens is a stop token or completes a stop string."""
    if new[-1] in limits.stop_tokens:
        return True
    if not limits.stop_strings:
        return False
    # A character is at most four byte tokens, so this many tokens hold the longest stop string and more.
    tail = new[-16 - 4 * max(map(len, limits.stop_strings)) :]
    forms = [tokenizer.decode(tail, skip_special_tokens=skip) for skip in (False, True)]
    return any(string in form for string in limits.stop_strings for form in forms)


def make_answer(new: Sequence[int], limits: Limits, tokenizer: Tokenizer) -> Answer:
    """The answer of at least one new token, none of which but the last ends the text."""
    stopped = new[-1] in limits.stop_tokens
    shown = new[:-1] if stopped else new
    text = tokenizer.decode(shown, skip_special_tokens=True)
    cuts = [at for string in limits.stop_strings if (at := _find(string, shown, text, tokenizer)) >= 0]
    return Answer(tuple(new), text[: min(cuts, default=len(text))], "stop" if stopped or cuts else "length")


def _find(string: str, shown: Sequence[int], text: str, tokenizer: Tokenizer) -> int:
    """Where a stop string begins in the text, or -1. One that holds special tokens is not in the text, which has none;
    it is the last that the tokens say, so what else it holds is counted from the end."""
    at = text.find(string)
    if at >= 0 or string not in tokenizer.decode(shown):
        return at
    tails = (shown[first:] for first in range(len(shown) - 1, -1, -1))
    tail, at = next((tail, at) for tail in tails if (at := tokenizer.decode(tail).find(string)) >= 0)
    return len(text) - len(tokenizer.decode(tail, skip_special_tokens=True)[at:])
