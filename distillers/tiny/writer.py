"""Writes the tiny world's documents and items, each from its own random numbers.

    note balo tea balo tea , miru salt miru salt .           facts: a name and a thing, each told twice
    ask miru salt .                                          a question, answered from the facts
    copy balo kuzi temu | balo kuzi temu .                   names and their copy
    add 27 + 48 is 75 .                                      a sum
    story balo the miller goes to the river . … where is balo | river .
    [INST] last of balo kuzi temu [/INST] temu</s>           an instruction whose answer can be checked

Names, and numbers that are added, are of one part alone: training or held out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .instructions import KINDS, Instruction, chat_words, solve
from .language import HIGH, LOW, OF_PART, WORDS, held_out, tokens_in

CHOICES = 4
CONTEXT = 128
"""Tokens of the longest document, with its begin and end."""
TRAINED = ("train", "preferences")
"""Parts from which models learn."""


@dataclass(frozen=True, slots=True)
class Item:
    """A beginning, the answer that follows from it, and wrong ones."""

    context: str
    answer: str
    wrong: tuple[str, ...]


class Writer:
    """Writes one document or item of a part; it depends on part, index and seed alone."""

    def __init__(self, part: str, index: int, seed: int) -> None:
        self.random = random.Random(f"{seed}/{part}/{index}")
        self.held = part not in TRAINED
        self.names = OF_PART[self.held]

    def document(self) -> str:
        """Facts, then in random order a question about each and up to three other sections, as many as fit."""
        dice = self.random
        pairs = self.facts(dice.randint(2, 8))
        others: list[Callable[[], list[str]]] = [self.copy_section, self.sum_section, self.story, self.chat]
        sections = [["ask", *fact, "."] for fact in told(pairs)]
        sections += [make() for make in dice.choices(others, (2, 3, 3, 3), k=dice.randint(1, 3))]
        dice.shuffle(sections)
        return fit([noted(pairs), *sections])

    def prompt(self) -> str:
        """A document whose first 32 tokens, with the begin token, are three facts and a span of four names that is
        about to be copied: a continuation has something to copy, to look up, and to choose freely."""
        pairs = self.facts(3)
        sections = [noted(pairs), copied(self.span(4)), *(["ask", *fact, "."] for fact in told(pairs)), self.story()]
        return fit(sections)

    def facts(self, count: int) -> list[str]:
        """`count` facts about different things: name, thing, name, thing, …"""
        things = self.random.sample(WORDS["things"], count)
        return [word for fact in zip(self.span(count), things, strict=True) for word in fact]

    def span(self, count: int) -> list[str]:
        """`count` names of which no two begin or end alike."""
        names: list[str] = []
        while len(names) < count:
            name = self.random.choice(self.names)
            if not any(name[:2] == other[:2] or name[2:] == other[2:] for other in names):
                names.append(name)
        return names

    def numbers(self) -> tuple[int, int]:
        """Two different numbers whose sum is below 100."""
        while True:
            one, other = self.random.sample(range(LOW, HIGH + 1), 2)
            if one + other < 100 and held_out(one, other) == self.held:
                return one, other

    def copy_section(self) -> list[str]:
        return copied(self.span(self.random.randint(2, 6)))

    def sum_section(self) -> list[str]:
        one, other = self.numbers()
        return ["add", str(one), "+", str(other), "is", str(one + other), "."]

    def chat(self) -> list[str]:
        """An instruction with its answer, now and then with a second one about the same names."""
        first = self.instruction()
        turns = [first]
        if first.names and self.random.random() < 0.4:
            turns.append(first.again(self.random))
        return chat_words(turns)

    def instruction(self) -> Instruction:
        kind = self.random.choice(KINDS)
        if kind == "larger":
            return Instruction(kind, tuple(map(str, self.numbers())))
        return Instruction(kind, tuple(self.span(3)))

    def story(self) -> list[str]:
        """Two people go somewhere, one does something else, and one of them is looked for."""
        people, places = self.span(2), self.random.sample(WORDS["places"], 2)
        words = ["story"]
        for name, place in zip(people, places, strict=True):
            words += [name, "the", self._skewed("jobs"), "goes", "to", "the", place, "."]
        words += [self.random.choice(people), self._skewed("verbs"), "a"]
        words += [self._skewed("adjectives"), self._skewed("objects"), "."]
        at = self.random.randrange(2)
        return [*words, "where", "is", people[at], "|", places[at], "."]

    def lookup(self) -> Item:
        """Eight facts and the beginning of a question; the choices are things of the facts."""
        pairs = self.facts(8)
        name, answer = self.random.choice(list(told(pairs)))
        wrong = self.random.sample([thing for thing in pairs[1::2] if thing != answer], CHOICES - 1)
        return Item(" ".join([*noted(pairs), "ask", name]), answer, tuple(wrong))

    def copy(self) -> Item:
        """Six names to be copied; wrong choices have two of them exchanged."""
        span = self.span(6)
        wrong = dict.fromkeys(" ".join(exchanged(span, self.random)) for _ in range(CHOICES * 8))
        return Item(" ".join(["copy", *span, "|"]), " ".join(span), tuple(wrong)[: CHOICES - 1])

    def arithmetic(self) -> Item:
        """A sum; wrong choices are one off, ten off, or both."""
        one, other = self.numbers()
        right = one + other
        near = [right + step for step in (-11, -10, -9, -1, 1, 9, 10, 11) if 10 <= right + step < 100]
        wrong = self.random.sample(near, CHOICES - 1)
        return Item(f"add {one} + {other} is", str(right), tuple(map(str, wrong)))

    def story_end(self) -> Item:
        """A story up to the place that is asked for; the other one's place is among the choices."""
        *words, answer, _ = self.story()
        (other,) = (word for word in words if word in WORDS["places"] and word != answer)
        others = [place for place in WORDS["places"] if place not in (answer, other)]
        return Item(" ".join(words), answer, (other, *self.random.sample(others, CHOICES - 2)))

    def instruct(self) -> Item:
        """An instruction in a chat."""
        instruction = self.instruction()
        text = " ".join(["[INST]", *instruction.words, "[/INST]"])
        return Item(text, " ".join(solve(instruction)), tuple(instruction.wrong(self.random, self.names)))

    def preference(self) -> dict[str, str]:
        """An item of a random task, its answer, and a wrong one."""
        make = self.random.choice((self.lookup, self.copy, self.story_end, self.instruct, self.instruct))
        item = make()
        ending = "" if item.context.startswith("[INST]") else " ."
        wrong = self.random.choice(item.wrong)
        return {"prompt": item.context + " ", "chosen": item.answer + ending, "rejected": wrong + ending}

    def _skewed(self, kind: str) -> str:
        """A word of a kind, each half as likely as the one before."""
        (word,) = self.random.choices(WORDS[kind], [2.0**-place for place in range(len(WORDS[kind]))])
        return word


TASKS: dict[str, Callable[[Writer], Item]] = {
    "lookup": Writer.lookup,
    "copy": Writer.copy,
    "arithmetic": Writer.arithmetic,
    "story": Writer.story_end,
    "instruct": Writer.instruct,
}
"""Tasks by name, each with what writes its items."""


def told(pairs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names with their things."""
    return zip(pairs[::2], pairs[1::2], strict=True)


def noted(pairs: Sequence[str]) -> list[str]:
    """Facts as a section: `note balo tea balo tea , miru salt miru salt .`"""
    words = [word for fact in told(pairs) for word in (*fact, *fact, ",")]
    return ["note", *words[:-1], "."]


def copied(span: Sequence[str]) -> list[str]:
    return ["copy", *span, "|", *span, "."]


def exchanged(span: Sequence[str], dice: random.Random) -> list[str]:
    """The span with two of its places exchanged."""
    one, other = dice.sample(range(len(span)), 2)
    changed = list(span)
    changed[one], changed[other] = span[other], span[one]
    return changed


def fit(sections: Sequence[Sequence[str]]) -> str:
    """Sections as a text, as many from the front as fit between the begin and the end token."""
    words: list[str] = []
    left = CONTEXT - 2
    for section in sections:
        left -= sum(map(tokens_in, section))
        if left < 0:
            break
        words += section
    return " ".join(words)
