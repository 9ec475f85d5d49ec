"""What a model can look up in the text before it: found among choices, and written by itself, by distance and length.

A state of fixed size must forget, and a model that still ranks the right answer first may no longer write it, so every
item is asked in both forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..interfaces import Bench, Decoder, Limits, Prompt, Stepper, silent
from ..plugins import decoder_or_plain
from .configs import RecallConfig
from .recall_items import AFTER, Item, make_items, matches
from .texts import check_room, pad

CHOICE, GENERATE = "choice", "generate"


class Recall:
    """Emits two samples for each item: `choice`, whether the answer is likelier than every wrong choice (as a sum over
    its tokens), and `generate`, whether greedy text begins with it. Both have `length`, `depth`, `distance` and the
    form's `chance`; `generate` also has what was written."""

    def __init__(self, config: RecallConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        model = bench.subject.load()
        check_room("recall", model, max(self.config.lengths))
        decoder = decoder_or_plain(bench.subject.decoder)
        bench.emit("progress", done=0, total=0, unit="questions")
        items = list(make_items(self.config, model.tokenizer))
        done = 0
        for chosen in self._batches(items):
            right = choose(model, chosen)
            texts = write(model, decoder, chosen)
            for item, best, text in zip(chosen, right, texts, strict=True):
                shared = {
                    "task": item.kind,
                    "item": item.item,
                    "cluster": item.cluster,
                    "length": item.length,
                    "depth": item.depth,
                    "distance": item.distance,
                }
                bench.emit("sample", metric=CHOICE, value=float(best), chance=1 / len(item.choices), **shared)
                said = {"answer": item.answer, "text": text}
                value = float(matches(text, item.answer))
                bench.emit("sample", metric=GENERATE, value=value, chance=item.chance, **said, **shared)
            done += len(chosen)
            bench.emit("progress", done=done, total=len(items), unit="questions")

    def _batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Items of similar length side by side, the longest first, so that memory runs out at once or never."""
        ordered = sorted(items, key=lambda item: -len(item.ids))
        for first in range(0, len(ordered), self.config.batch):
            yield ordered[first : first + self.config.batch]


def choose(model: Stepper, items: Sequence[Item]) -> list[bool]:
    """Whether the first choice of each item is the likeliest; a tie is none."""
    values: list[list[float]] = [[] for _ in items]
    # One choice of every item at a time: as many rows as items, whatever the number of choices.
    for place in range(max(len(item.choice_ids) for item in items)):
        rows = [row for row, item in enumerate(items) if place < len(item.choice_ids)]
        texts = [(*items[row].ids, *items[row].choice_ids[place]) for row in rows]
        scores = model.score(*pad(texts, model.device))
        for number, row in enumerate(rows):
            part = scores.logprob[number, len(items[row].ids) - 1 : len(texts[number]) - 1]
            values[row].append(float(part.double().sum()))
    return [of[0] > max(of[1:]) for of in values]


def write(model: Stepper, decoder: Decoder, items: Sequence[Item]) -> list[str]:
    """What follows each prompt: as many tokens as the longest answer has, and a few more to see where it ends."""
    end = model.tokenizer.eos_token_id
    stop = () if end is None else (end,)
    longest = max(len(item.choice_ids[0]) for item in items)
    room = model.max_context - max(len(item.ids) for item in items)
    limits = Limits(new_tokens=min(longest + AFTER, room), stop_tokens=stop)
    answers = decoder.generate(model, [Prompt(item.ids, row) for row, item in enumerate(items)], limits, silent)
    return [answer.text for answer in answers]
