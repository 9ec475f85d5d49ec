"""Speculative decoding whose acceptance is chance at a set rate: how fast would it be if drafts were so good?

Draft and model do all their work, and their verdict is thrown away. The text means nothing, so the decoder is not
lossless, and a speed of it is one of scripted acceptance wherever it is shown.
"""

from __future__ import annotations

from .plugin import ScriptedConfig
from .speculative import SpeculativeDecoder


def scripted(config: ScriptedConfig) -> SpeculativeDecoder:
    """Makes the decoder that a plan describes."""
    from ..harness.plugins import build

    rate = acceptance(config.tokens, config.k)
    draft = build(config.draft)
    return SpeculativeDecoder(draft, config.k, look=config.look, script=rate, rollback=config.rollback)


def acceptance(tokens: float, k: int) -> float:
    """The chance a that a draft stands, if those before it do, with which rounds of k drafts have so many tokens:
    1 + a + … + a^k. 1 < tokens < k + 1.

    >>> round(acceptance(3.0, 4), 4)
    0.7374
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**place for place in range(k + 1)) < tokens:
            low = middle
        else:
            high = middle
    return (low + high) / 2
