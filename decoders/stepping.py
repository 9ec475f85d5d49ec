"""Drafts that are models themselves: another one of the plan, or some layers of the target.

A draft's first call of a round feeds the last two tokens of the text: the one before the last is often known already,
but not after a round in which every draft stood, and so the shapes never depend on what was accepted. That call settles
what stands before it, the others of the round stay revocable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..harness.interfaces import Artifact, Limits, MambabenchError, Prompt, Stepper, Unsupported
from ..kernels.rounds import DRAFT, Drawn, Inputs, aligned, drawn, greedy, streams
from .breakdown import REST, section
from .plugin import LayersConfig, ModelConfig
from .sampling import advance, kept, prefill
from .texts import Texts, padded

BLOCK = 256
"""Positions by which memory grows, so that it serves requests of about one length."""
PROBED = 64
"""Tokens, spread over the vocabulary, that two models must write alike."""


class Memory(NamedTuple):
    """A draft model at work on a batch."""

    model: Stepper
    state: Any
    limits: Limits
    context: int
    """Most tokens of a text."""
    stream: Tensor
    """int64 [B]."""
    real: Tensor
    """int32 [K + 1, B], the same for each row: all k drafts are real."""
    kept: Drawn | None
    """What drafts are drawn from, None at temperature 0."""


class SteppingDraft:
    """What both drafts share. Drafts are drawn as the target's tokens are: at temperature 0 the likeliest, above it
    from the draft's own distribution behind the same filters."""

    def model(self, target: Stepper) -> Stepper:
        """The draft's model, on the target's device and in its dtype."""
        raise Unsupported("this draft has no model")

    def open(self, target: Stepper, prompts: Sequence[Prompt], limits: Limits, k: int) -> Memory:
        model = self.model(target)
        if "rollback" not in model.traits:
            raise Unsupported("a draft's model must be of a backend that can roll back (trait `rollback`)")
        needed = _needed(prompts, limits)
        context = max(needed, min(-(-needed // BLOCK) * BLOCK, model.max_context))
        state = model.open(len(prompts), context, k + 1)
        stream = torch.zeros(len(prompts), dtype=torch.int64, device=model.device)
        drawn_from = None
        if limits.temperature > 0:
            like = torch.empty(
                0, dtype=torch.float64 if model.dtype == "float64" else torch.float32, device=model.device
            )
            drawn_from = Drawn.empty(k, len(prompts), model.vocab_size, limits.temperature, like)
        counts = torch.arange(k + 1, dtype=torch.int32, device=model.device).unsqueeze(1)
        real = counts.repeat(1, aligned(len(prompts)))[:, : len(prompts)]
        memory = Memory(model, state, limits, context, stream, real, drawn_from)
        _begin(memory, prompts, limits)
        return memory

    def again(self, state: Memory, prompts: Sequence[Prompt], limits: Limits) -> bool:
        # A prompt of one token leaves nothing to prefill, and so a row as it is.
        if _needed(prompts, limits) > state.context or min(len(prompt.ids) for prompt in prompts) == 1:
            return False
        _begin(state, prompts, limits)
        return True

    def records(self, state: Memory) -> bool:
        return getattr(state.model, "recording", lambda _: None)(state.state) is not None

    def follow(self, state: Memory, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = Inputs.empty(k, len(ids), ids.device)
        inputs.begin(ids, length)
        real, q, last = self._propose(state, inputs, k)
        if last is not None:
            greedy(last, inputs.tokens[k + 1])
        return inputs.drafts(k), real, q.dense(k) if q else None

    def follow_into(self, state: Memory, texts: Texts, k: int) -> tuple[Tensor, Drawn | None, Tensor | None]:
        """`follow`, with the drafts in the place of the next round's, and what is known of the distributions. At
        temperature 0 the last draft is still to be picked, of the logits that come with it."""
        return self._propose(state, texts.inputs, k)

    @staticmethod
    def _propose(state: Memory, inputs: Inputs, k: int) -> tuple[Tensor, Drawn | None, Tensor | None]:
        tokens, positions = inputs
        model, limits, last = state.model, state.limits, None
        for place in range(k):
            if place:
                given = inputs.ids(place + 1, 1), positions[place + 1]
                logits = advance(model, *given, state.state, settle=False, last=last)[:, 0]
            else:
                logits = model.advance(inputs.ids(0, 2), positions[0], state.state)[:, 1]
            if limits.temperature == 0:
                last = logits
                continue
            with section(REST):
                at = state.stream, positions[place + 1], DRAFT
                drawn(kept(logits, limits), limits.temperature, *at, state.kept, place, tokens[place + 2])
        return state.real[k], state.kept, last


def _needed(prompts: Sequence[Prompt], limits: Limits) -> int:
    return max(len(prompt.ids) for prompt in prompts) + limits.new_tokens


def _begin(memory: Memory, prompts: Sequence[Prompt], limits: Limits) -> None:
    """Runs all but the last token of prompts: a round begins one token before the text's last. The host waits for
    nothing, since the device is still at the target's prompts."""
    device, counts = memory.stream.device, [len(prompt.ids) - 1 for prompt in prompts]
    if any(counts):
        given = padded([prompt.ids[:-1] for prompt in prompts]), torch.tensor(counts, dtype=torch.int32)
        ids, lengths = (t.to(device, non_blocking=True) for t in given)
        prefill(memory.model, ids, lengths, memory.state, counts)
    numbers = streams(limits.seed, torch.tensor([prompt.sequence for prompt in prompts]))
    memory.stream.copy_(numbers, non_blocking=True)


class ModelDraft(SteppingDraft):
    """A model of the plan, of any backend that can roll back, with the target's vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._artifact: Artifact | None = None
        self._loaded: tuple[tuple[str, str], Stepper] | None = None

    def bind(self, models: Mapping[str, Artifact]) -> None:
        self._artifact = models[self.config.model]

    def model(self, target: Stepper) -> Stepper:
        """Loads it at the first call, and again where the target's device or dtype is another one."""
        if self._artifact is None:
            raise MambabenchError(f"draft model: nobody has said which model {self.config.model!r} is")
        place = (target.device, target.dtype)
        if self._loaded is None or self._loaded[0] != place:
            model = self._artifact.backend.load(self._artifact.path, *place)
            _check_vocabulary(self.config.model, model, target)
            self._loaded = place, model
        return self._loaded[1]


class LayersDraft(SteppingDraft):
    """Some layers of the target, between its own embeddings and head: no training, and no weights of its own."""

    def __init__(self, config: LayersConfig) -> None:
        self.config = config
        self._shrunk: tuple[Stepper, Stepper] | None = None

    def model(self, target: Stepper) -> Stepper:
        if "shrinks" not in target.traits:
            raise Unsupported("the draft `layers` needs a backend whose models can leave layers out (trait `shrinks`)")
        if self._shrunk is None or self._shrunk[0] is not target:
            layers: int = target.layers  # type: ignore[attr-defined]
            chosen = self.config.layers or spread(layers, self.config.count)
            if len(chosen) > layers:
                raise Unsupported(f"draft layers: {len(chosen)} layers of a model of {layers}")
            if max(chosen) >= layers:
                raise Unsupported(f"draft layers: there is no layer {max(chosen)} in a model of {layers}")
            self._shrunk = target, target.shrunk(chosen)  # type: ignore[attr-defined]
        return self._shrunk[1]


def spread(layers: int, count: int) -> tuple[int, ...]:
    """`count` of `layers` layers at even distances, the first and the last among them.

    >>> spread(32, 4)
    (0, 10, 21, 31)
    >>> spread(32, 1)
    (0,)
    """
    return tuple(round(place * (layers - 1) / max(count - 1, 1)) for place in range(count))


def _check_vocabulary(name: str, draft: Stepper, target: Stepper) -> None:
    if draft.vocab_size != target.vocab_size:
        raise Unsupported(
            f"draft model {name!r} has {draft.vocab_size} tokens and the target {target.vocab_size}: "
            "a draft must have the target's vocabulary"
        )
    for token in range(0, target.vocab_size, max(target.vocab_size // PROBED, 1)):
        one, other = (model.tokenizer.decode([token]) for model in (draft, target))
        if one != other:
            raise Unsupported(
                f"draft model {name!r} writes token {token} as {one!r} and the target as {other!r}: "
                "a draft must have the target's vocabulary"
            )
