"""Writes the tiny world's documents and items, each from its own random numbers.

    note balomu tea , niropu salt .                          facts: a name and a thing
    note balomu tea balomu tea , niropu salt niropu salt .   the same, each told twice
    ask niropu salt .                                        a question, answered from the facts
    copy balomu kuzidi tirova | balomu kuzidi tirova .       names and their copy
    add 27 + 48 is 75 .                                      a sum
    story balomu river , kuzidi field , balomu cave . the miller finds a small boat . where is balomu cave . …
    [INST] last of balomu kuzidi tirova [/INST] tirova</s>   an instruction whose answer can be checked

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
"""Parts from which models learn; names and sums of all others are held out."""


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
        """Facts, told once or twice, then in random order a question about each and up to three other sections, as many
        as fit."""
        dice = self.random
        pairs = self.facts(dice.randint(2, 8))
        others: list[Callable[[], list[str]]] = [self.copy_section, self.sum_section, self.story, self.chat]
        sections = [["ask", *fact, "."] for fact in told(pairs)]
        sections += [make() for make in dice.choices(others, (5, 3, 3, 3), k=dice.randint(1, 3))]
        dice.shuffle(sections)
        return fit([noted(pairs, times=dice.randint(1, 2)), *sections])

    def prompt(self) -> str:
        """A document whose first 30 tokens, with the begin token, are two facts and a span of three names that is about
        to be copied: a continuation has something to copy, to look up, and to choose freely."""
        pairs = self.facts(2)
        sections = [noted(pairs), copied(self.span(3)), *(["ask", *fact, "."] for fact in told(pairs)), self.story()]
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
            if not any(name[:2] == other[:2] or name[-2:] == other[-2:] for other in names):
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
        """People are seen at places, and each is looked for."""
        seen = self.seen(self.random.randint(2, 6))
        people = list(dict(told(seen)).items())
        self.random.shuffle(people)
        return [*self.scene(seen), *(word for last in people for word in ("where", "is", *last, "."))]

    def seen(self, count: int) -> list[str]:
        """Where which of three people is seen, `count` times: name, place, name, place, …; nobody more than twice."""
        people = self.random.sample(self.span(3) * 2, count)
        return [word for pair in zip(people, self.random.sample(WORDS["places"], count), strict=True) for word in pair]

    def scene(self, seen: Sequence[str]) -> list[str]:
        """A story up to its questions: who is seen where, and what somebody does meanwhile."""
        words = ["story", *(word for pair in told(seen) for word in (*pair, ","))]
        words[-1:] = [".", "the", self._skewed("jobs"), self._skewed("verbs")]
        return [*words, "a", self._skewed("adjectives"), self._skewed("objects"), "."]

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
        """Three people, each seen twice, and the question where one is now; wrong choices are where that one was
        before, and where the others are."""
        seen = self.seen(6)
        name, answer = self.random.choice(list(dict(told(seen)).items()))
        before = next(place for person, place in told(seen) if person == name)
        others = [place for person, place in dict(told(seen)).items() if person != name]
        return Item(" ".join([*self.scene(seen), "where", "is", name]), answer, (before, *others))

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


def noted(pairs: Sequence[str], times: int = 2) -> list[str]:
    """Facts as a section, each told so many times: `note balomu tea balomu tea , niropu salt niropu salt .`"""
    words = [word for fact in told(pairs) for word in (*fact * times, ",")]
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
