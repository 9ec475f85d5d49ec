"""Is greedy text the same whichever decoder makes it? In float64, token for token, at every batch size."""

from __future__ import annotations

import hashlib
from typing import Any

from .. import metrics
from ..interfaces import Answer, Bench, Decoder, Limits, MambabenchError, Prompt, Stepper, Subject, silent
from .configs import LosslessnessConfig
from .texts import check_room, pad, take_prompts


class Losslessness:
    """Prompts of different lengths are answered by the reference, all in one batch, and by the subject at each batch
    size. Without a reference the subject is held against itself. `equal` is 1 where the tokens are the same;
    `parallel_argmax` counts the tokens of the answer that one parallel run over the text would choose as well."""

    def __init__(self, config: LosslessnessConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        subject, reference = bench.subject, bench.reference or bench.subject
        model = subject.load("float64")
        plain = model if reference.artifact.path == subject.artifact.path else reference.load("float64")
        total = self.config.prompts * len(self.config.batch)
        bench.emit("progress", done=0, total=total, unit="texts")
        check_room("losslessness", model, self.config.prompt_tokens + self.config.new_tokens)
        shortest = max(self.config.prompt_tokens - 3, 1)
        lengths = range(self.config.prompt_tokens, shortest - 1, -1)
        texts = take_prompts(bench.data[self.config.data], model, self.config.prompts, lengths)
        prompts = [Prompt(ids, number) for number, ids in enumerate(texts)]
        end = model.tokenizer.eos_token_id
        limits = Limits(new_tokens=self.config.new_tokens, stop_tokens=() if end is None else (end,), seed=bench.seed)
        wanted = decoder_of(reference).generate(plain, prompts, limits, silent)
        rounds: list[dict[str, Any]] = []
        block = done = 0
        for batch in self.config.batch:
            for first in range(0, len(prompts), batch):
                chosen = prompts[first : first + batch]
                request = {"arm": "subject", "block": block, "batch": batch, "temperature": 0.0}
                request |= {"prompt_tokens": self.config.prompt_tokens, "new_tokens": self.config.new_tokens}
                request["content"] = self.config.data

                def emit(kind: str, /, *, of: dict[str, Any] = request, **fields: Any) -> None:
                    if kind == "round":
                        rounds.append(fields)
                        bench.emit(kind, **of, **fields)

                answers = decoder_of(subject).generate(model, chosen, limits, emit)
                for place, answer in enumerate(answers, first):
                    _emit_sample(bench, batch, prompts[place], "equal", float(answer.ids == wanted[place].ids), 1)
                if batch == self.config.batch[0]:
                    self._emit_parallel(bench, model, batch, chosen, answers)
                block += 1
                done += len(chosen)
                bench.emit("progress", done=done, total=total, unit="texts")
        self._emit_facts(bench, rounds)

    def _emit_parallel(
        self, bench: Bench, model: Stepper, batch: int, prompts: list[Prompt], answers: list[Answer]
    ) -> None:
        scores = model.score(*pad([p.ids + a.ids for p, a in zip(prompts, answers, strict=True)], model.device))
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            begin = len(prompt.ids) - 1
            chosen = int(scores.greedy[row, begin : begin + len(answer.ids)].sum())
            _emit_sample(bench, batch, prompt, "parallel_argmax", chosen, len(answer.ids))

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


def _emit_sample(bench: Bench, batch: int, prompt: Prompt, metric: str, value: float, weight: float) -> None:
    item = hashlib.sha256(repr((prompt.sequence, prompt.ids)).encode()).hexdigest()[:16]
    bench.emit("sample", task=f"batch {batch}", item=item, metric=metric, value=value, weight=weight, better="higher")
