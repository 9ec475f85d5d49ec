"""lm-eval's view of a model that steps: an `LM` object for `simple_evaluate`, likelihoods and texts by our contract.

Likelihoods are made in one of three ways, whichever runs the fewest tokens: whole texts by `score`; contexts once, for
all their continuations of one token; contexts once, copied, and each continuation behind its copy.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..documents import leading_token
from ..interfaces import Decoder, Emit, Limits, Prompt, Stepper, Unsupported, silent
from ..plugins import decoder_or_plain
from .prefixes import SharedPrefix, suffixes
from .texts import pad

log = logging.getLogger("mambabench")

Request = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's: the texts, the tokens of the context and of the continuation."""

WIDTH = 16
"""Tokens of continuations that are run in one call; calls of few different shapes keep recorded graphs few."""
WORTH = 1.5
"""By how much sharing contexts must cut the tokens to run before it is done."""


class StepperLM(TemplateLM):
    """A `Stepper` with a decoder: likelihoods by `score` or behind shared contexts, texts by the decoder."""

    def __init__(self, model: Stepper, decoder: Decoder | None, batch: int, seed: int, emit: Emit) -> None:
        super().__init__()
        # A model with a loop of its own scores texts and is not stepped.
        self._steps = "rollback" in model.traits
        self.model: Any = SharedPrefix(model) if self._steps else model
        self.tokenizer = model.tokenizer
        self.batch = batch
        self.seed = seed
        self.emit = emit
        self._decoder = decoder
        self._device = torch.device(model.device)
        self._encoded = functools.lru_cache(maxsize=256)(self._encode)

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
        return list(self._encoded(string, add_special_tokens is not False))

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

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Sums the log-probability of each continuation; contexts that are too long lose their beginning."""
        longest = self.max_length + 1
        texts = [(context + continuation)[-longest:] for _, context, continuation in requests]
        # A continuation that fills all positions is not scored at its first token, which nothing is left to predict.
        begins = [max(len(text) - len(of[2]), 1) for text, of in zip(texts, requests, strict=True)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (text, begin) in enumerate(zip(texts, begins, strict=True)):
            groups.setdefault(tuple(text[:begin]), []).append(i)
        whole, ends, shared = [], [], []
        for context, members in groups.items():
            lengths = [len(texts[i]) - begins[i] for i in members]
            several = self._steps and len(members) > 1
            if several and max(lengths) == 1:
                ends.append(context)
            elif several and self._shares(len(context), lengths):
                shared.append(context)
            else:
                whole += members
        results: dict[int, tuple[float, bool]] = {}

        def keep(found: Mapping[int, tuple[float, bool]]) -> None:
            results.update(found)
            self.emit("progress", done=len(results), total=len(requests), unit="requests")

        for chosen in self._batches(whole, lambda i: len(texts[i])):
            keep(self._score(chosen, texts, begins))
        for chosen in self._batches(range(len(ends)), lambda at: len(ends[at])):
            contexts = [ends[at] for at in chosen]
            keep(self._next_tokens(contexts, [groups[context] for context in contexts], texts))
        for rows in self._rows(shared, groups):
            if self._room(rows, texts):
                keep(self._continue(rows, texts))
            else:
                keep(self._score([i for _, i in rows], texts, begins))
        return [results[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context with the subject's decoder, or plainly where the subject has none. Greedy answers to
        the same request are made once."""
        decoder = decoder_or_plain(self._decoder)
        options = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        results: dict[int, str] = {}
        for option in sorted(set(options)):
            limits = generation_limits(json.loads(option), self.eot_token_id, self.seed)
            room = self.max_length - limits.new_tokens
            if room < 1:
                raise Unsupported(
                    f"lm-eval: {limits.new_tokens} new tokens do not fit a model of {self.max_length} positions"
                )
            members = [i for i, other in enumerate(options) if other == option]
            contexts = {
                i: tuple(self.tok_encode(requests[i].args[0])[-room:]) or (self.prefix_token_id,) for i in members
            }
            same: dict[Any, list[int]] = {}
            for i in members:
                same.setdefault(contexts[i] if limits.temperature == 0 else i, []).append(i)
            asked = [of[0] for of in same.values()]
            alike = {of[0]: of for of in same.values()}
            sizes = {i: len(contexts[i]) for i in asked}
            for chosen in self._batches(asked, sizes.__getitem__):
                prompts = [Prompt(contexts[i], i) for i in chosen]
                answers = decoder.generate(self.model, prompts, limits, silent)
                for i, answer in zip(chosen, answers, strict=True):
                    results.update(dict.fromkeys(alike[i], answer.text))
                self.emit("progress", done=len(results), total=len(requests), unit="requests")
        return [results[i] for i in range(len(requests))]

    def _encode(self, string: str, special: bool) -> tuple[int, ...]:
        ids = self.tokenizer.encode(string, add_special_tokens=special)
        begin = self.tokenizer.bos_token_id
        return tuple(ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids)

    def _score(
        self, chosen: Sequence[int], texts: Sequence[list[int]], begins: Sequence[int]
    ) -> dict[int, tuple[float, bool]]:
        ids, lengths = pad([texts[i] for i in chosen], self.model.device)
        scores = self.model.score(ids, lengths)
        places = torch.arange(1, ids.shape[1], device=ids.device)
        first = torch.tensor([begins[i] for i in chosen], device=ids.device)
        counted = (places >= first[:, None]) & (places < lengths[:, None])
        return _sums(chosen, scores.logprob, scores.greedy, counted)

    def _next_tokens(
        self, contexts: Sequence[Sequence[int]], members: Sequence[Sequence[int]], texts: Sequence[list[int]]
    ) -> dict[int, tuple[float, bool]]:
        """Continuations of one token: each context is run once, and only its last position's logits are made."""
        ids, lengths = pad(contexts, self.model.device)
        logits = self.model.prefill(ids, lengths, self.model.open(len(contexts), ids.shape[1], 1))
        best = logits.argmax(-1).tolist()
        logprobs = logits.log_softmax(-1)
        rows = [row for row, of in enumerate(members) for _ in of]
        tokens = [texts[i][-1] for of in members for i in of]
        values = logprobs[rows, tokens].double().tolist()
        owners = [i for of in members for i in of]
        return {
            i: (value, best[row] == token) for i, row, token, value in zip(owners, rows, tokens, values, strict=True)
        }

    def _continue(self, rows: Sequence[tuple[tuple[int, ...], int]], texts: Sequence[list[int]]) -> dict[int, Any]:
        """Longer continuations: each context but its last token is run once and copied to all its rows."""
        device, batch = self.model.device, max(self.batch, len(rows))
        contexts = list(dict.fromkeys(context for context, _ in rows))
        continuations = [texts[i][len(context) :] for context, i in rows]
        width = _padded(max(map(len, continuations)))
        # As many rows in every call, so that its shape is one of few; those left over repeat the first.
        ids, lengths = pad([context[:-1] for context in contexts], device)
        ids = torch.cat([ids, ids.new_zeros(batch - len(ids), ids.shape[1])])
        lengths = torch.cat([lengths, lengths.new_zeros(batch - len(lengths))])
        state = self.model.open(batch, ids.shape[1] + width, WIDTH)
        self.model.prefill(ids, lengths, state)
        place = {context: at for at, context in enumerate(contexts)}
        sources = torch.zeros(batch, dtype=torch.int64)
        sources[: len(rows)] = torch.tensor([place[context] for context, _ in rows])
        self.model.take(state, sources.to(device))
        start = lengths[sources.to(device)]
        run = torch.zeros(batch, width, dtype=torch.int64)
        run[: len(rows)] = suffixes([context for context, _ in rows], continuations, width)
        targets, sizes = pad(continuations, device)
        logprobs, greedy = [], []
        for first in range(0, width, WIDTH):
            part = slice(first, min(first + WIDTH, width))
            logits = self.model.advance(run[:, part].to(device).contiguous(), start + first, state)[: len(rows)]
            wanted = targets[:, part]
            logits = logits[:, : wanted.shape[1]]
            chosen = logits.gather(-1, wanted[..., None]).squeeze(-1)
            logprobs.append(chosen - logits.logsumexp(-1))
            greedy.append(logits.argmax(-1) == wanted)
        counted = torch.arange(targets.shape[1], device=device) < sizes[:, None]
        return _sums([i for _, i in rows], torch.cat(logprobs, 1), torch.cat(greedy, 1), counted)

    def _shares(self, context: int, lengths: Sequence[int]) -> bool:
        """Whether running a context once is worth it; its longest continuation must fit with its padding."""
        width = _padded(max(lengths))
        worth = WORTH * (context + len(lengths) * width) < len(lengths) * context + sum(lengths)
        return worth and context + width <= self.max_length

    def _room(self, rows: Sequence[tuple[tuple[int, ...], int]], texts: Sequence[list[int]]) -> bool:
        """Whether the padding of these rows still lies within the model's positions."""
        width = _padded(max(len(texts[i]) - len(context) for context, i in rows))
        return max(len(context) for context, _ in rows) + width <= self.max_length

    def _rows(
        self, contexts: Sequence[tuple[int, ...]], groups: Mapping[tuple[int, ...], Sequence[int]]
    ) -> Iterator[list[tuple[tuple[int, ...], int]]]:
        """Rows of batches, those of one context side by side and whole where a batch can hold them."""
        rows: list[tuple[tuple[int, ...], int]] = []
        for context in sorted(contexts, key=lambda of: (-len(of), of)):
            members = groups[context]
            if rows and len(rows) + len(members) > self.batch:
                yield rows
                rows = []
            for i in members:
                if len(rows) == self.batch:
                    yield rows
                    rows = []
                rows.append((context, i))
        if rows:
            yield rows

    def _batches(self, members: Iterable[int], length: Callable[[int], int]) -> Iterator[list[int]]:
        """Batches of similar length, the longest first, so that memory runs out at once or never."""
        ordered = sorted(members, key=lambda i: (-length(i), i))
        for first in range(0, len(ordered), self.batch):
            yield ordered[first : first + self.batch]


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


def _sums(
    members: Sequence[int], logprob: torch.Tensor, greedy: torch.Tensor, counted: torch.Tensor
) -> dict[int, tuple[float, bool]]:
    """By row of [B, T]: the sum of `logprob` where `counted`, and whether `greedy` holds at all of these places."""
    totals = logprob.double().masked_fill(~counted, 0.0).sum(1).tolist()
    exact = (greedy | ~counted).all(1).tolist()
    return {i: (total, of) for i, total, of in zip(members, totals, exact, strict=True)}


def _padded(tokens: int) -> int:
    """Tokens of continuations as they are run: half a call or whole ones."""
    return WIDTH // 2 if tokens <= WIDTH // 2 else -(-tokens // WIDTH) * WIDTH
