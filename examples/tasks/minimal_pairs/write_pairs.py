"""Writes the pairs of the task `minimal_pairs`, in the manner of BLiMP: two sentences that differ in one word, of which
the grammar allows the first alone. A model is right where it finds that one likelier.

    python examples/tasks/minimal_pairs/write_pairs.py         # writes the .jsonl files beside this one

The words are those of children's stories, so that models with a few hundred thousand parameters know them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

PAIRS = 64
"""Of each phenomenon."""
NOUNS = ("dog", "cat", "bird", "boy", "girl", "bear", "frog", "duck")
PLACES = ("tree", "house", "river", "park", "hill", "door")
VERBS = (("likes", "like"), ("sees", "see"), ("wants", "want"), ("finds", "find"), ("has", "have"))
THINGS = ("the ball", "a red hat", "some cake", "the big box", "a toy")
PEOPLE = (("Lily", "her"), ("Mom", "her"), ("Anna", "her"), ("Tim", "him"), ("Dad", "him"), ("Ben", "him"))
PAST = (("went", "goed"), ("saw", "seed"), ("made", "maked"), ("found", "finded"), ("ate", "eated"), ("ran", "runned"))

Pair = tuple[str, str]


def agreement() -> Iterator[Pair]:
    """A verb agrees with its subject."""
    for noun, (one, many), thing in itertools.product(NOUNS, VERBS, THINGS):
        yield f"The {noun} {one} {thing}.", f"The {noun} {many} {thing}."
        yield f"The {noun}s {many} {thing}.", f"The {noun}s {one} {thing}."


def attraction() -> Iterator[Pair]:
    """It does so across a noun of the other number."""
    for noun, place, (one, many), thing in itertools.product(NOUNS, PLACES, VERBS, THINGS):
        yield f"The {noun} near the {place}s {one} {thing}.", f"The {noun} near the {place}s {many} {thing}."
        yield f"The {noun}s near the {place} {many} {thing}.", f"The {noun}s near the {place} {one} {thing}."


def reflexive() -> Iterator[Pair]:
    """A reflexive pronoun agrees with whom it is about."""
    for (name, own), verb, place in itertools.product(PEOPLE, ("saw", "hurt", "hid", "washed"), PLACES):
        other = "him" if own == "her" else "her"
        yield f"{name} {verb} {own}self near the {place}.", f"{name} {verb} {other}self near the {place}."


def past() -> Iterator[Pair]:
    """Irregular verbs have their own past."""
    ends = {"went": "to the {}", "saw": "the {}", "made": "a {}", "found": "the {}", "ate": "near the {}"}
    for (name, _), (right, wrong), place in itertools.product(PEOPLE, PAST, PLACES):
        end = ends.get(right, "to the {}").format(place)
        yield f"One day, {name} {right} {end}.", f"One day, {name} {wrong} {end}."


PHENOMENA = {each.__name__: each for each in (agreement, attraction, reflexive, past)}


def lines(phenomenon: str) -> str:
    """Pairs as JSON lines, drawn by a seed that no run changes."""
    pairs = random.Random(phenomenon).sample(list(PHENOMENA[phenomenon]()), PAIRS)
    return "".join(json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n" for good, bad in pairs)


if __name__ == "__main__":
    for name in PHENOMENA:
        Path(__file__).with_name(f"{name}.jsonl").write_text(lines(name), encoding="utf-8")
