"""What a model can look up in the text before it: found among choices, and written by itself, by distance and length.

A state of fixed size must forget, and a model that still ranks the right answer first may no longer write it, so every
item is asked in both forms.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..interfaces import Bench, Decoder, Limits, Prompt, Stepper, silent
from ..plugins import decoder_or_plain
from .batches import Batches
from .configs import RecallConfig
from .likelihoods import Likelihoods
from .recall_items import AFTER, Item, make_items, matches
from .texts import check_room

CHOICE, GENERATE = "choice", "generate"


class Recall:
    """Emits two samples for each item: `choice`, whether the answer is likelier than every wrong choice (as a sum over
    its tokens), and `generate`, whether greedy text begins with it. Both have `length`, `depth`, `distance` and the
    form's `chance`; `generate` also has what was written."""

    def __init__(self, config: RecallConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        model = bench.subject.load()
        check_room("recall: the longest of lengths", model, max(self.config.lengths))
        decoder = decoder_or_plain(bench.subject.decoder, model.device)
        bench.emit("progress", done=0, total=0, unit="questions")
        items = list(make_items(self.config, model.tokenizer))
        likelihoods, done = Likelihoods(model, self.config.batch), 0

        def ask(chosen: Sequence[Item]) -> None:
            nonlocal done
            right = choose(likelihoods, chosen)
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

        Batches(model, self.config.batch).run(items, lambda item: len(item.ids), ask)


def choose(likelihoods: Likelihoods, items: Sequence[Item]) -> list[bool]:
    """Whether the first choice of each item is the likeliest; a tie is none."""
    sums = iter(likelihoods.of([(item.ids, choice) for item in items for choice in item.choice_ids]))
    values = [[next(sums)[0] for _ in item.choices] for item in items]
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
