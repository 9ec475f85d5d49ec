"""lm-eval's view of a model that steps: an `LM` object for `simple_evaluate`, likelihoods and texts by our contract."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..documents import Encoder, leading_token
from ..interfaces import Decoder, Emit, Limits, Prompt, Stepper, Unsupported, silent
from ..plugins import decoder_or_plain
from .batches import Batches
from .likelihoods import Likelihoods
from .prefixes import SharedPrefix

Request = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's: the texts, the tokens of the context and of the continuation."""


class StepperLM(TemplateLM):
    """A `Stepper` with a decoder: likelihoods by `score` or behind shared contexts, texts by the decoder."""

    def __init__(self, model: Stepper, decoder: Decoder | None, batch: int, seed: int, emit: Emit) -> None:
        """`batch` as in `Batches`."""
        super().__init__()
        self.model: Any = SharedPrefix(model) if "rollback" in model.traits else model
        self.tokenizer = model.tokenizer
        self.seed = seed
        self.emit = emit
        self._decoder = decoder
        self._likelihoods = Likelihoods(self.model, batch, self._progress)
        self._batches = Batches(model, batch)
        self._encoder = Encoder(model.tokenizer)
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise Unsupported("lm-eval needs a tokenizer with an end-of-text token")
        return end

    @property
    def prefix_token_id(self) -> int:
        lead = leading_token(self.tokenizer)
        return self.eot_token_id if lead is None else lead

    @property
    def max_length(self) -> int:
        return int(self.model.max_context)

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Writes a chat by the tokenizer's own template; a system message that it refuses is left out, as in HFLM.

        Raises `Unsupported` for a tokenizer without a template.
        """
        apply: Any = getattr(self.tokenizer, "apply_chat_template", None)
        if apply is None or not getattr(self.tokenizer, "chat_template", None):
            raise Unsupported("lm-eval: the tokenizer has no chat template; leave out `chat = true`")
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(apply(chat_history, **options))
        except TemplateError:
            return str(apply([message for message in chat_history if message["role"] != "system"], **options))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = add_special_tokens is not False
        known = self._encoded.get(string) if special else None
        return list(known or self._encode([string], special)[0])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sums the log-probability of each text in windows that run at most `max_context` tokens. A text stands behind
        one leading token; lm-eval's HFLM puts the tokenizer's beginning-of-text behind that token and scores it too."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((("", text), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval has it, with all texts tokenized beforehand."""
        pairs = [request.args for request in requests]
        texts = (text for context, continuation in pairs for text in (context.rstrip(), context + continuation))
        with self._known(texts):
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._likelihoods.of([(context, continuation) for _, context, continuation in requests])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continues each context with the subject's decoder, or plainly where the subject has none. Greedy answers to
        the same request are made once."""
        options = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        with self._known(request.args[0] for request in requests):
            encoded = [self.tok_encode(request.args[0]) for request in requests]
        results: dict[int, str] = {}
        for option in sorted(set(options)):
            limits = generation_limits(json.loads(option), self.eot_token_id, self.seed)
            room = self.max_length - limits.new_tokens
            if room < 1:
                raise Unsupported(
                    f"lm-eval: {limits.new_tokens} new tokens do not fit a model of {self.max_length} positions"
                )
            alike: dict[Any, list[Prompt]] = {}
            for i, (ids, other) in enumerate(zip(encoded, options, strict=True)):
                if other == option:
                    prompt = Prompt(tuple(ids[-room:]) or (self.prefix_token_id,), i)
                    alike.setdefault(prompt.ids if limits.temperature == 0 else i, []).append(prompt)
            self._write(list(alike.values()), limits, results, len(requests))
        return [results[i] for i in range(len(requests))]

    def _write(self, asked: Sequence[list[Prompt]], limits: Limits, results: dict[int, str], total: int) -> None:
        """Adds to the results what the first of each list is answered, for all of the list."""
        decoder = decoder_or_plain(self._decoder, self.model.device)

        def write(chosen: Sequence[list[Prompt]]) -> None:
            answers = decoder.generate(self.model, [prompts[0] for prompts in chosen], limits, silent)
            for prompts, answer in zip(chosen, answers, strict=True):
                results.update((prompt.sequence, answer.text) for prompt in prompts)
            self._progress(len(results), total)

        self._batches.run(asked, lambda prompts: len(prompts[0].ids) + limits.new_tokens, write)

    @contextmanager
    def _known(self, strings: Iterable[str]) -> Iterator[None]:
        """`tok_encode` need not tokenize these meanwhile: many at once take a fraction of the time."""
        texts = list(set(strings))
        self._encoded = dict(zip(texts, self._encode(texts, True), strict=True))
        try:
            yield
        finally:
            self._encoded = {}

    def _encode(self, strings: Sequence[str], special: bool) -> list[list[int]]:
        begin = self.tokenizer.bos_token_id
        encoded = self._encoder(strings, special)
        return [ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids for ids in encoded]

    def _progress(self, done: int, total: int) -> None:
        self.emit("progress", done=done, total=total, unit="requests")


def generation_limits(options: Mapping[str, Any], eos: int, seed: int) -> Limits:
    """A task's `generation_kwargs` as limits, read by lm-eval's own rules: a temperature above 0 samples unless
    `do_sample` is false, and `do_sample` without a temperature samples at 1. Top-k is off unless the task sets it;
    transformers would use 50."""
    read = normalize_gen_kwargs(dict(options))
    temperature = float(read.get("temperature", 1.0)) if read["do_sample"] else 0.0
    filters: Mapping[str, Any] = read if temperature > 0 else {}
    return Limits(
        new_tokens=read["max_gen_toks"],
        stop_tokens=(eos,),
        stop_strings=tuple(string for string in read["until"] if string),
        temperature=temperature,
        top_k=int(filters.get("top_k") or 0),
        top_p=float(filters.get("top_p") or 1.0),
        seed=seed,
    )
