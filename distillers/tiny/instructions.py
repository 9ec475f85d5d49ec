"""Instructions whose answers can be checked: what they ask, what is right, and how chats write them.

They name three words or two numbers; in a chat a later one may ask about the same words.

>>> " ".join(solve(read_chat(["last of balomu kuzidi tirova"])))
'tirova'
>>> " ".join(solve(read_chat(["last of balomu kuzidi tirova", "now reverse"])))
'tirova kuzidi balomu'
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from .language import END

LISTS = ("first", "second", "last", "reverse", "all")
"""Asked of three names."""
KINDS = (*LISTS, "larger")


@dataclass(frozen=True, slots=True)
class Instruction:
    kind: str
    given: tuple[str, ...]
    """The words it is about."""
    later: bool = False
    """It follows one that named them."""

    @property
    def names(self) -> bool:
        return self.kind != "larger"

    @property
    def words(self) -> list[str]:
        return ["now", self.kind] if self.later else [self.kind, "of", *self.given]

    def again(self, dice: random.Random) -> Instruction:
        """Another one about the same words."""
        kind = dice.choice([kind for kind in LISTS if kind != self.kind])
        return Instruction(kind, self.given, later=True)

    def wrong(self, dice: random.Random, names: Sequence[str]) -> Iterator[str]:
        """Three different wrong answers, of the right one's form."""
        right = " ".join(solve(self))
        if self.kind == "larger":
            low, high = sorted(self.given)
            others = {low, low[0] + high[1], high[0] + low[1], low[::-1], high[::-1], str(int(high) + 1)}
            found = sorted(others - {right})
        elif self.kind in ("reverse", "all"):
            found = [" ".join(order) for order in permutations(self.given) if " ".join(order) != right]
        else:
            found = [name for name in self.given if name != right]
            found += [name for name in dice.sample(names, 4) if name not in self.given][:1]
        yield from dice.sample(found, 3)


def solve(instruction: Instruction) -> list[str]:
    """The words of the right answer."""
    given = list(instruction.given)
    match instruction.kind:
        case "first":
            return given[:1]
        case "second":
            return given[1:2]
        case "last":
            return given[-1:]
        case "reverse":
            return given[::-1]
        case "all":
            return given
        case "larger":
            return [max(given, key=int)]
    raise ValueError(f"{instruction.kind!r} is no instruction of the tiny world")


def read_chat(turns: Sequence[str]) -> Instruction:
    """The last of a chat's instructions, from the texts of all. Raises ValueError for a text that is none."""
    kind, of, *given = turns[0].split() if len(turns[0].split()) > 2 else ["", "", ""]
    numbers = all(word.isdigit() for word in given)
    if of != "of" or kind not in KINDS or (kind == "larger") != numbers:
        raise ValueError(f"{turns[0]!r} is no instruction of the tiny world")
    if len(turns) == 1:
        return Instruction(kind, tuple(given))
    now, _, later = turns[-1].partition(" ")
    if now != "now" or later not in LISTS:
        raise ValueError(f"{turns[-1]!r} is no later instruction of the tiny world")
    return Instruction(later, tuple(given), later=True)


def chat_words(turns: Sequence[Instruction]) -> list[str]:
    """A chat with its answers, as the tokenizer's chat template has it but for spaces, which are not tokens."""
    return [word for turn in turns for word in ("[INST]", *turn.words, "[/INST]", *solve(turn), END)]
