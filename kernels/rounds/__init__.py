"""What a decoding round does beside running models: picks, random numbers, look-ups, and the texts' bookkeeping."""

from torch import Tensor

from ..support import chosen, kernel
from . import fused, reference
from .reference import ACCEPT, DRAFT, TOKEN, WHOLE, Drawn, Inputs, Ring, Rows, aligned, draw, reject, softmax, streams

__all__ = [
    "ACCEPT",
    "DRAFT",
    "MARK",
    "TOKEN",
    "WHOLE",
    "Drawn",
    "Inputs",
    "Ring",
    "Rows",
    "aligned",
    "draw",
    "drawn",
    "finish",
    "finish_greedy",
    "finish_rejected",
    "greedy",
    "keep",
    "mark",
    "match",
    "reject",
    "softmax",
    "streams",
    "uniform",
]

MARK = "_mark_"
"""What the names of `mark`'s kernels begin with."""


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The index of the largest of logits [..., V], the lowest of equal ones: int64 [...], written into `out` if given
    (contiguous)."""
    if chosen("greedy", fused.supports_logits(logits)):
        tokens: Tensor = kernel(fused.MODULE, "greedy")(logits, out)
        return tokens
    return reference.greedy(logits, out)


def match(
    ids: Tensor, length: Tensor, k: int, longest: int, shortest: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.match`: looks the ends of texts ids int64 [B, S], length int64 [B], up in themselves -> drafts int64
    [B, k], written into `out` if given, and how many are real, int32 [B]."""
    if chosen("match", fused.supports_integers(ids)):
        found: tuple[Tensor, Tensor] = kernel(fused.MODULE, "match")(ids, length, k, longest, shortest, out)
        return found
    return reference.match(ids, length, k, longest, shortest, out)


def finish(
    tokens: Tensor,
    drafts: Tensor,
    real: Tensor,
    rows: Rows,
    ring: Ring,
    chance: float | None = None,
    accepted: Tensor | None = None,
) -> None:
    """`reference.finish`: the end of a round of tokens int64 [B, K + 1] and drafts int64 [B, K]."""
    if chosen("finish", fused.supports_integers(tokens)):
        kernel(fused.MODULE, "finish")(tokens, drafts, real, rows, ring, chance, accepted)
    else:
        reference.finish(tokens, drafts, real, rows, ring, chance, accepted)


def finish_greedy(
    logits: Tensor, drafts: Tensor, real: Tensor, rows: Rows, ring: Ring, chance: float | None = None
) -> None:
    """The end of a round of the likeliest tokens of logits [B, K + 1, V]."""
    if chosen("finish", fused.supports_logits(logits)):
        kernel(fused.MODULE, "finish_greedy")(logits, drafts, real, rows, ring, chance)
    else:
        reference.finish(greedy(logits), drafts, real, rows, ring, chance)


def uniform(stream: Tensor, position: Tensor, purpose: int) -> Tensor:
    """A random number in [0, 1) for each position int64 [B] or [B, T] of the texts with the keys stream int64 [B]:
    fp64, of the shape of position. Keyed by all three, and nothing else."""
    if chosen("uniform", fused.supports_integers(position)):
        numbers: Tensor = kernel(fused.MODULE, "uniform")(stream, position.contiguous(), purpose)
        return numbers
    return reference.uniform(stream.view(-1, *[1] * (position.dim() - 1)), position, purpose)


def drawn(
    logits: Tensor,
    temperature: float,
    stream: Tensor,
    before: Tensor,
    purpose: int,
    kept: Drawn | None = None,
    place: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Tokens drawn from softmax(logits / temperature): int64 [B] or [B, T] of logits [B, V] or [B, T, V], written into
    `out` if given (contiguous).

    stream int64 [B]; before int [B], the position before the first token's; the purpose is the random numbers'. `kept`
    gets what it must know of logits [B, V] at this place.
    """
    if chosen("drawn", fused.supports_logits(logits)):
        tokens: Tensor = kernel(fused.DRAWING, "drawn")(logits, temperature, stream, before, purpose, kept, place, out)
        return tokens
    return reference.drawn(logits, temperature, stream, before, purpose, kept, place, out)


def finish_rejected(
    target: Tensor, kept: Drawn, drafts: Tensor, real: Tensor, rows: Rows, ring: Ring, chance: float | None = None
) -> None:
    """The end of a round in which drafts int64 [B, J], drawn from `kept`, are judged as `reject` does, against logits
    target [B, K + 1, V] of the same temperature; real int [B], J <= K + 1. With a `chance` that verdict is thrown away,
    and each draft stands as `reference.finish` says."""
    if chosen("finish_rejected", fused.supports_logits(target)):
        kernel(fused.DRAWING, "finish_rejected")(target, kept, drafts, real, rows, ring, chance)
    else:
        reference.finish_rejected(target, kept, drafts, real, rows, ring, chance)


def keep(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """`reference.keep`: logits [..., V] with -inf in place of what top-k (0: off) and then top-p (1: off) leave out."""
    filters = 0 < top_k < logits.shape[-1] or top_p < 1
    if filters and chosen("keep", fused.supports_logits(logits)):
        left: Tensor = kernel(fused.KEEPING, "keep")(logits, temperature, top_k, top_p)
        return left
    return reference.keep(logits, temperature, top_k, top_p)


def mark(tensor: Tensor, name: str) -> None:
    """A kernel that does nothing, for a profiler to see what ran after it: `draft`, `target` or `rest`. tensor int32
    [1], on a GPU."""
    kernel(fused.MODULE, "mark")(tensor, name)
