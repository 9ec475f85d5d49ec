"""What decoders, drafts and those who ask them say to each other: the part of `interfaces` that is about text.

Its names are those of `interfaces`, from where they are imported. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from .interfaces import Artifact, Emit, Stepper


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to continue. Random numbers are keyed by `sequence`, never by the place in a batch."""

    ids: tuple[int, ...]
    sequence: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop and how to sample. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    """Each ends the text where it appears, in what the tokens decode to with special tokens or without."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a decoder made of one prompt."""

    ids: tuple[int, ...]
    """New tokens; a stop token that ended the text is the last of them."""
    text: str
    """Decoded without special tokens, cut before the first stop string or stop token."""
    finish: Literal["length", "stop"]


Rollback = Literal["replay", "snapshot"]
"""How recurrent layers take tokens back: a checkpoint and the inputs since then, or a state for every token."""
OnText = Callable[[int, str], None]
"""Called with a row and a piece of its text that later tokens cannot change; the pieces add up to the answer's text."""


class Decoder(Protocol):
    """May have `bind(models)`, as a `Draft` may; `profile(model, prompts, limits, count)`: where the time of one of its
    rounds goes, a mapping of names to figures with their units, means of `count` rounds; and `costs(model, prompts,
    limits)`: seconds of a round of K drafts, 0 of plain decoding, by K, where the host does nothing but start rounds.
    """

    def generate(self, model: Stepper, prompts: Sequence[Prompt], limits: Limits, emit: Emit) -> list[Answer]:
        """Continues all prompts as one batch. Emits, as they happen, `burst` (row, burst, at_s since the call, tokens)
        and, when it drafts, `round` (row, round, drafted, accepted; before truncation). Tokens of several rounds that
        become known at once are one burst.

        With the trait `streams` it takes one more argument, `on_text: OnText | None = None`.
        """


class Draft(Protocol):
    """Proposes tokens for a speculative decoder. One that need not see the texts on the host is a `DeviceDraft`.

    A draft whose options name models (`ModelRef`) has a method `bind(models: Mapping[str, Artifact])`, which is called
    once, before `open`, with what the names stand for.
    """

    def open(self, target: Stepper, prompts: Sequence[Prompt], limits: Limits, k: int) -> Any:
        """Prepares state for a batch."""

    def propose(self, state: Any, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """texts: each row's prompt and emitted tokens. Returns ids int64 [B, K], how many are real int32 [B] (the
        others may be any token), and the distributions that they were drawn from, with the filters of the limits,
        [B, K, V] (None: the draft is deterministic, or the temperature is 0)."""


class DeviceDraft(Protocol):
    """A draft that reads the texts where they are, on the target's device, so that nobody waits for the host.

    It may have `records(state) -> bool`: whether `follow` can become part of a recorded round, that is, launches the
    same work at every call, on the same memory; and `again(state, prompts, limits) -> bool`, which makes what `open`
    returned serve another request of as many rows that is sampled alike, or says that it cannot.
    """

    def open(self, target: Stepper, prompts: Sequence[Prompt], limits: Limits, k: int) -> Any:
        """Prepares state for a batch, for up to k tokens a round. No row ever has more than its prompt and
        `limits.new_tokens` tokens."""

    def follow(self, state: Any, ids: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids int64 [B, S]: row b's text is the first length[b] (int64 [B]) of them, at least its prompt and one token.
        Proposes k tokens for each row, and returns what `propose` does. Texts only grow between calls, by no more than
        the last call's k tokens and one, or k where it was asked for the bonus token's place too; a finished text stays
        as it is, and the same call twice gives the same answer.
        """


@runtime_checkable
class Binds(Protocol):
    """A decoder or draft that works with models which its options name."""

    def bind(self, models: Mapping[str, Artifact]) -> None: ...
