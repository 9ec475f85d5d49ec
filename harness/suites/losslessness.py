"""Is text the same whichever decoder makes it, at every batch size?

Greedy text in float64 token for token. Below it two right runs choose differently where two tokens are about as likely,
so there every token of a text is held against the plain model's logits for that text: it is the likeliest, or less far
from it than two plain runs of different shape are from each other (`near_ties`). Sampled text by its distribution
(`draws`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from .. import metrics
from ..interfaces import Answer, Bench, Decoder, Emit, Limits, MambabenchError, Prompt, Stepper, Subject, silent
from . import draws
from .configs import LosslessnessConfig
from .near_ties import gaps, noise
from .texts import check_room, check_whole, pad, take_prompts

EXACT = "float64"
NOISE = 8
"""So many times the texts that are checked are measured for the noise. It is a maximum: of no more texts, one of the
checked tokens would pass it by chance in every thirtieth check of a right decoder (bfloat16, 12,000 tokens, two batch
sizes)."""
PLAIN = "plain"
"""The task of samples of the reference's own text."""


class Losslessness:
    """Prompts of different lengths are answered by the reference, all in one batch, and by the subject at each batch
    size. Without a reference the subject is held against itself. `equal` is 1 where the tokens are the same;
    `parallel_argmax` counts the tokens of the answer that one parallel run over the text would choose as well.

    Below float64 also `excused`, the tokens that run would not choose although they are within the noise, and
    `beyond_noise`, those that are not; both of the reference's own text too, as the task `plain`.

    Above temperature 0 each prompt is asked many times, and `chi_square_tokens` and `chi_square_likelihood` compare
    what was drawn (`draws`); their weight are the degrees of freedom.
    """

    def __init__(self, config: LosslessnessConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        subject, reference, config = bench.subject, bench.reference or bench.subject, self.config
        dtype = config.dtype or (EXACT if subject.device == "cpu" else subject.dtype)
        model = subject.load(dtype)
        plain = model if reference.artifact.path == subject.artifact.path else reference.load(dtype)
        total = config.prompts * (config.draws if config.temperature else len(config.batch))
        bench.emit("progress", done=0, total=total, unit="texts")
        check_room("losslessness: prompt_tokens + new_tokens", model, config.prompt_tokens + config.new_tokens)
        shortest = max(config.prompt_tokens - 3, 1)
        lengths = range(config.prompt_tokens, shortest - 1, -1)
        texts = take_prompts(bench.data[config.data], model, config.prompts, lengths)
        prompts = [Prompt(ids, number) for number, ids in enumerate(texts)]
        if config.temperature:
            self._draw(bench, model, plain, texts)
            return
        end = model.tokenizer.eos_token_id
        limits = Limits(new_tokens=config.new_tokens, stop_tokens=() if end is None else (end,), seed=bench.seed)
        wanted = decoder_of(reference).generate(plain, prompts, limits, silent)
        allowed = None if dtype == EXACT else self._noise(bench, plain, lengths)
        _emit_loops(bench, PLAIN, prompts, wanted)
        if allowed is not None:
            _emit_near_ties(bench, plain, PLAIN, prompts, wanted, allowed)
        rounds: list[dict[str, Any]] = []
        block = done = 0
        for batch in config.batch:
            answers: list[Answer] = []
            for first in range(0, len(prompts), batch):
                chosen = prompts[first : first + batch]
                answers += decoder_of(subject).generate(
                    model, chosen, limits, self._rounds(bench, block, batch, rounds)
                )
                block += 1
                done += len(chosen)
                bench.emit("progress", done=done, total=total, unit="texts")
            task = f"batch {batch}"
            for prompt, answer, want in zip(prompts, answers, wanted, strict=True):
                _emit_sample(bench, task, prompt, "equal", float(answer.ids == want.ids), 1)
            _emit_loops(bench, task, prompts, answers)
            if batch == config.batch[0]:
                _emit_parallel(bench, model, task, prompts, answers)
            if allowed is not None:
                _emit_near_ties(bench, plain, task, prompts, answers, allowed)
        self._emit_facts(bench, rounds)

    def _draw(self, bench: Bench, model: Stepper, plain: Stepper, texts: Sequence[tuple[int, ...]]) -> None:
        """Both arms draw from each prompt, with random numbers of their own."""
        config, subject, reference = self.config, bench.subject, bench.reference or bench.subject
        rounds: list[dict[str, Any]] = []
        blocks = itertools.count()

        def ask(chosen: Sequence[Prompt]) -> list[Answer]:
            emit = self._rounds(bench, next(blocks), len(chosen), rounds)
            return decoder_of(subject).generate(model, chosen, limits[1], emit)

        def ask_plain(chosen: Sequence[Prompt]) -> list[Answer]:
            return decoder_of(reference).generate(plain, chosen, limits[0], silent)

        first = 2 * (bench.seed + config.seed)
        limits = [
            Limits(new_tokens=config.new_tokens, temperature=config.temperature, seed=first + arm) for arm in range(2)
        ]
        for number, ids in enumerate(texts):
            prompts = draws.requests(ids, number, config.draws)
            answers = draws.in_batches(ask, prompts, config.batch)
            wanted = draws.in_batches(ask_plain, prompts, [max(config.batch)])
            for arm, of in ((subject, answers), (reference, wanted)):
                check_whole("losslessness", arm.decoder_name, of, config.new_tokens)
            task = f"temperature {config.temperature:g}"
            likely = (draws.likelihoods(plain, ids, of, max(config.batch)) for of in (answers, wanted))
            for metric, (value, freedom) in (
                ("chi_square_tokens", draws.of_tokens(answers, wanted, config.new_tokens)),
                ("chi_square_likelihood", draws.of_likelihoods(*likely)),
            ):
                if freedom:
                    _emit_sample(bench, task, prompts[0], metric, value, freedom, "lower")
            _emit_loops(bench, task, prompts, answers)
            bench.emit("progress", done=(number + 1) * config.draws, total=len(texts) * config.draws, unit="texts")
        self._emit_facts(bench, rounds)

    def _rounds(self, bench: Bench, block: int, batch: int, rounds: list[dict[str, Any]]) -> Emit:
        """Passes on what a request tells of its rounds, and notes it; the rest is for nobody."""
        config = self.config
        request = {"arm": "subject", "block": block, "batch": batch, "temperature": config.temperature}
        request |= {"prompt_tokens": config.prompt_tokens, "new_tokens": config.new_tokens, "content": config.data}

        def emit(kind: str, /, **fields: Any) -> None:
            if kind == "round":
                rounds.append(fields)
                bench.emit(kind, **request, **fields)

        return emit

    def _noise(self, bench: Bench, plain: Stepper, lengths: Sequence[int]) -> float:
        """Of the data's own text, which no model chose, behind prompts of the same lengths."""
        config = self.config
        whole = [length + config.new_tokens for length in lengths]
        texts = take_prompts(bench.data[config.data], plain, NOISE * config.prompts, whole)
        allowed = noise(plain, texts, [len(text) - config.new_tokens for text in texts])
        bench.emit("fact", name="noise", value=allowed, unit="logit")
        return allowed

    def _emit_facts(self, bench: Bench, rounds: list[dict[str, Any]]) -> None:
        if not rounds:
            return
        drafted, accepted = [r["drafted"] for r in rounds], [r["accepted"] for r in rounds]
        for name, value, unit in (
            ("mean accepted length", metrics.mean_accepted_length(accepted), "tokens/round"),
            ("rounds that accept a draft token", metrics.share_accepting(accepted), "share"),
            ("rounds that reject a draft token", metrics.share_rejecting(drafted, accepted), "share"),
        ):
            bench.emit("fact", name=name, value=value, unit=unit, arm="subject")


def decoder_of(subject: Subject) -> Decoder:
    """The decoder of an arm; a suite that generates cannot do without."""
    if subject.decoder is None:
        raise MambabenchError(f"model {subject.artifact.name!r} came without a decoder")
    return subject.decoder


def _emit_parallel(
    bench: Bench, model: Stepper, task: str, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> None:
    scores = model.score(*pad([p.ids + a.ids for p, a in zip(prompts, answers, strict=True)], model.device))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        begin = len(prompt.ids) - 1
        chosen = int(scores.greedy[row, begin : begin + len(answer.ids)].sum())
        _emit_sample(bench, task, prompt, "parallel_argmax", chosen, len(answer.ids))


def _emit_near_ties(
    bench: Bench, plain: Stepper, task: str, prompts: Sequence[Prompt], answers: Sequence[Answer], allowed: float
) -> None:
    texts = [prompt.ids + answer.ids for prompt, answer in zip(prompts, answers, strict=True)]
    found = gaps(plain, texts, [len(prompt.ids) for prompt in prompts])
    for prompt, of in zip(prompts, found, strict=True):
        beyond = sum(not gap <= allowed for gap in of)
        excused = sum(0 < gap <= allowed for gap in of)
        _emit_sample(bench, task, prompt, "excused", excused, len(of), "lower")
        _emit_sample(bench, task, prompt, "beyond_noise", beyond, len(of), "lower")


def _emit_loops(bench: Bench, task: str, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        distinct, runs = metrics.distinct_ngrams(answer.ids)
        if runs:
            _emit_sample(bench, task, prompt, "distinct_4grams", distinct, runs)


def _emit_sample(
    bench: Bench, task: str, prompt: Prompt, metric: str, value: float, weight: float, better: str = "higher"
) -> None:
    item = hashlib.sha256(repr((prompt.sequence, prompt.ids)).encode()).hexdigest()[:16]
    bench.emit("sample", task=task, item=item, metric=metric, value=value, weight=weight, better=better)
