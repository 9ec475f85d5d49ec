"""Text that the teacher writes itself, which is what the paper's students learn from.

Document i is sampled with random numbers of sequence i, so that it depends neither on the batch nor on where a run
begins: another range of the same seed is a held-out part, and a killed run goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness.documents import Document, encode_document, leading_token, read_documents
from ..harness.interfaces import Decoder, Job, Limits, MambabenchError, Prompt, Stepper, Tokenizer, silent
from ..harness.plugins import make, registry
from .data_configs import PseudoLabelsConfig

WRITTEN = "documents.jsonl"
"""Documents so far, in the scratch folder; a last line without its end was cut by a kill."""


class PseudoLabels:
    """The source `pseudo-labels`."""

    def __init__(self, config: PseudoLabelsConfig) -> None:
        self.config = config

    def write(self, job: Job) -> None:
        """Writes `data.jsonl` with each document's text, ids (prompt and end token included) and prompt length."""
        if job.teacher is None:
            raise MambabenchError("pseudo-labels: needs a teacher")
        written = job.scratch / WRITTEN
        done = keep_whole_lines(written)
        if done < self.config.documents:
            model = job.teacher.backend.load(
                job.teacher.path, job.device, "float32" if job.device == "cpu" else "bfloat16"
            )
            prompts = self._prompts(job, model)
            # One bound for all, so that no document depends on those beside it.
            room = model.max_context - max(len(prompt.ids) for prompt in prompts)
            if room < 1:
                raise MambabenchError(
                    f"pseudo-labels: prompts of up to {model.max_context - room} tokens leave no room in a context of "
                    f"{model.max_context}; lower prompt_tokens"
                )
            with written.open("a", encoding="utf-8") as file:
                for first in range(done, self.config.documents, self.config.batch):
                    part = prompts[first : first + self.config.batch]
                    file.writelines(json.dumps(document) + "\n" for document in self._continue(model, part, room))
                    file.flush()
                    job.emit("progress", done=first + len(part), total=self.config.documents, unit="documents")
        shutil.copyfile(written, job.out / "data.jsonl")

    def _prompts(self, job: Job, model: Stepper) -> list[Prompt]:
        """Where each document begins: one of the documents of `prompts`, none of them twice, or the begin token."""
        tokenizer, config = model.tokenizer, self.config
        if config.prompts:
            path, wanted = job.data[config.prompts], config.first + config.documents
            found = (beginning(document, tokenizer, config.prompt_tokens) for document in read_documents(path))
            beginnings = list(itertools.islice(filter(None, found), wanted))
            if len(beginnings) < wanted:
                # To begin again would give held-out documents the prompts of those that were learnt.
                raise MambabenchError(
                    f"{path}: {len(beginnings)} prompts (no questions above prompt_tokens = {config.prompt_tokens}), "
                    f"where first + documents is {wanted}; lower documents, or raise prompt_tokens"
                )
            beginnings = beginnings[config.first :]
        else:
            begin = leading_token(tokenizer)
            if begin is None:
                raise MambabenchError(
                    f"{job.teacher.path if job.teacher else ''}: the tokenizer has no token to begin a text with; "
                    "name documents to continue as `prompts`"
                )
            beginnings = [[begin]] * config.documents
        return [Prompt(tuple(ids), sequence=i) for i, ids in enumerate(beginnings, config.first)]

    def _continue(self, model: Stepper, prompts: Sequence[Prompt], room: int) -> list[dict[str, Any]]:
        config, end = self.config, model.tokenizer.eos_token_id
        limits = Limits(
            new_tokens=min(config.new_tokens, room),
            stop_tokens=() if end is None else (end,),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        decoder: Decoder = make(registry().find("decoder", "standard"))
        answers = decoder.generate(model, prompts, limits, silent)
        documents = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [*prompt.ids, *answer.ids]
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            documents.append({"text": text, "ids": ids, "prompt": len(prompt.ids)})
        return documents


def beginning(document: Document, tokenizer: Tokenizer, longest: int) -> list[int]:
    """The first ids of a text, or the whole prompt of a question; none where that is too long, since a question that is
    cut, or lacks the words by which a chat template hands over, would not be answered."""
    if not document.asks:
        # Documents can be books, and no token is this long on average.
        shown = replace(document, text=document.text[: 64 * (longest + 4)])
        return encode_document(shown, tokenizer)[0][:longest]
    ids, context = encode_document(replace(document, whole=False), tokenizer)
    return ids[:context] if context <= longest else []


def keep_whole_lines(path: Path) -> int:
    """Cuts a last line that a kill left unfinished; returns how many lines there are."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    return data.count(b"\n")
