"""How often a model finds the better of two answers the more likely one: what training on preferences is to raise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..documents import Preference, encode_many, read_preferences
from ..interfaces import Bench, MambabenchError, Stepper
from .configs import PreferencesConfig
from .texts import check_room, pad


class Preferences:
    """Emits for each pair whether the chosen answer has the higher log-probability (a tie is half), as a sum over its
    tokens, which is what `dpo` trains, and per token; and by how much, in nat (`margin`, of the sums)."""

    def __init__(self, config: PreferencesConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        config, path = self.config, bench.data[self.config.data]
        model = bench.subject.load()
        check_room(f"preferences: context = {config.context}", model, config.context - 1)
        pairs = list(itertools.islice(read_preferences(path), config.limit or None))
        encoded = list(encode_many([each for pair in pairs for each in pair.documents()], model.tokenizer, ended=True))
        texts = [(ids[: config.context], min(context, config.context)) for ids, context in encoded]
        kept = [place for place in range(len(pairs)) if all(len(ids) > begin for ids, begin in _both(texts, place))]
        if not kept:
            raise MambabenchError(f"{path}: no pair whose answers begin within context = {config.context} tokens")
        # Pairs of similar length side by side.
        kept.sort(key=lambda place: max(len(ids) for ids, _ in _both(texts, place)))
        for first in range(0, len(kept), config.batch):
            bench.emit("progress", done=first, total=len(kept), unit="pairs")
            places = kept[first : first + config.batch]
            flat = [text for place in places for text in _both(texts, place)]
            values = log_probabilities(model, flat)
            for number, place in enumerate(places):
                self._emit(bench, pairs[place], flat[2 * number : 2 * number + 2], values[2 * number : 2 * number + 2])
        bench.emit("fact", name="pairs_dropped", value=len(pairs) - len(kept), unit="pairs")
        bench.emit("progress", done=len(kept), total=len(kept), unit="pairs")

    def _emit(
        self, bench: Bench, pair: Preference, texts: Sequence[tuple[Sequence[int], int]], values: Sequence[float]
    ) -> None:
        chosen, rejected = values
        mean_chosen, mean_rejected = (
            value / (len(ids) - begin) for value, (ids, begin) in zip(values, texts, strict=True)
        )
        for metric, value in (
            ("prefers_chosen", 0.5 * (1 + (chosen > rejected) - (chosen < rejected))),
            ("prefers_chosen_per_token", 0.5 * (1 + (mean_chosen > mean_rejected) - (mean_chosen < mean_rejected))),
            ("margin", chosen - rejected),
        ):
            bench.emit("sample", task=self.config.data, item=pair.item, metric=metric, value=value)


def log_probabilities(model: Stepper, texts: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """Of each text's tokens from place `begin` on, given those before them, nat."""
    scores = model.score(*pad([ids for ids, _ in texts], model.device))
    return [
        float(scores.logprob[row, begin - 1 : len(ids) - 1].double().sum()) for row, (ids, begin) in enumerate(texts)
    ]


def _both(
    texts: Sequence[tuple[Sequence[int], int]], place: int
) -> tuple[tuple[Sequence[int], int], tuple[Sequence[int], int]]:
    """The chosen and the rejected text of a pair."""
    return texts[2 * place], texts[2 * place + 1]
