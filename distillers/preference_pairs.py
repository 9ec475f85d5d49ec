"""Preferences out of plain text: how a passage goes on against how the teacher would go on.

For models that were trained on text alone there are no judged answers; that a writer's own words are better than a
model's sample is a preference that any text holds. The idea is that of self-play fine-tuning (Chen et al. 2024,
arXiv 2401.01335), there with answers of the model itself to prompts of a data set.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..harness.documents import encode_many, leading_token, read_documents
from ..harness.interfaces import Decoder, Job, Limits, MambabenchError, Prompt, Stepper, Tokenizer, silent
from ..harness.plugins import make, registry
from .data_configs import PreferencePairsConfig
from .pseudo_labels import WRITTEN, keep_whole_lines

TORN = "\ufffd"
"""What half a character decodes to, where a piece of bytes was cut."""


class Passage(NamedTuple):
    """Tokens of a text, and those that follow."""

    prompt: Sequence[int]
    chosen: Sequence[int]


class PreferencePairs:
    """The source `preference-pairs`."""

    def __init__(self, config: PreferencePairsConfig) -> None:
        self.config = config

    def write(self, job: Job) -> None:
        """Writes `data.jsonl`, a preference a line. Passage i is sampled with random numbers of sequence i, so a killed
        run goes on where it was; the few pairs that are alike are left out."""
        if job.teacher is None:
            raise MambabenchError("preference-pairs: needs a teacher")
        config, written = self.config, job.scratch / WRITTEN
        done = keep_whole_lines(written)
        if done < config.pairs:
            model = job.teacher.backend.load(
                job.teacher.path, job.device, "float32" if job.device == "cpu" else "bfloat16"
            )
            longest = 1 + config.prompt_tokens + config.new_tokens
            if longest > model.max_context:
                raise MambabenchError(
                    f"preference-pairs: prompt and answer take {longest} positions, the teacher has {model.max_context}"
                )
            found = self._passages(job.data[config.data], model.tokenizer)
            with written.open("a", encoding="utf-8") as file:
                for first in range(done, config.pairs, config.batch):
                    part = found[first : first + config.batch]
                    file.writelines(json.dumps(pair) + "\n" for pair in self._against(model, part, first))
                    file.flush()
                    job.emit("progress", done=first + len(part), total=config.pairs, unit="pairs")
        pairs = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
        kept = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
        (job.out / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept), encoding="utf-8")
        job.emit("fact", name="pairs", value=len(kept), unit="pairs")
        job.emit("fact", name="pairs_left_out", value=len(pairs) - len(kept), unit="pairs")

    def _passages(self, path: Path, tokenizer: Tokenizer) -> list[Passage]:
        """As many as are asked for, those before `first` left out."""
        config = self.config
        all_ = (
            passage
            for ids, context in encode_many(read_documents(path), tokenizer)
            for passage in spread(ids[context:], config.prompt_tokens, config.new_tokens, config.each)
            if all(TORN not in tokenizer.decode(part) for part in passage)
        )
        wanted = config.first + config.pairs
        found = list(itertools.islice(all_, wanted))
        if len(found) < wanted:
            raise MambabenchError(
                f"{path}: {len(found)} passages of {config.prompt_tokens + config.new_tokens} tokens with each = "
                f"{config.each}, where first + pairs is {wanted}; raise each, or lower pairs"
            )
        return found[config.first :]

    def _against(self, model: Stepper, passages: Sequence[Passage], first: int) -> Iterator[dict[str, Any]]:
        config, lead = self.config, leading_token(model.tokenizer)
        begin = [] if lead is None else [lead]
        prompts = [
            Prompt((*begin, *passage.prompt), sequence=config.first + first + number)
            for number, passage in enumerate(passages)
        ]
        limits = Limits(
            new_tokens=config.new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        decoder: Decoder = make(registry().find("decoder", "standard"))
        for passage, answer in zip(passages, decoder.generate(model, prompts, limits, silent), strict=True):
            prompt, chosen, rejected = (
                model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (*passage, answer.ids)
            )
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected.rstrip(TORN), "cut": True}


def spread(ids: Sequence[int], prompt: int, new: int, most: int) -> Iterator[Passage]:
    """At most `most` passages of a text, evenly spread, none over another.

    >>> [passage.prompt[0] for passage in spread(range(100), 4, 6, 3)]
    [0, 33, 66]
    >>> len(list(spread(range(100), 4, 6, 50))), list(spread(range(9), 4, 6, 50))
    (10, [])
    """
    count = min(most, len(ids) // (prompt + new))
    for number in range(count):
        at = number * len(ids) // count
        yield Passage(ids[at : at + prompt], ids[at + prompt : at + prompt + new])
