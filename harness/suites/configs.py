"""Options of the built-in suites: plain data, so that plans are checked without the model stack."""

from __future__ import annotations

from dataclasses import dataclass

from ..interfaces import DataRef


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalConfig:
    tasks: tuple[str, ...]
    """Names of tasks: of the YAML files in the folder `data`, or lm-eval's own where `data` is not given."""
    data: DataRef | None = None
    batch: int = 16
    limit: int = 0
    """Items per task; 0 takes all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityConfig:
    data: DataRef
    context: int = 512
    """Longest window in tokens, of which the last is not run; a longer document is scored in several."""
    batch: int = 8
    limit: int = 0
    """Documents; 0 takes all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LosslessnessConfig:
    data: DataRef
    prompts: int = 16
    prompt_tokens: int = 16
    """Longest prompt; the prompts of a batch differ in length."""
    new_tokens: int = 64
    batch: tuple[int, ...] = (1, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedConfig:
    data: DataRef
    batch: tuple[int, ...] = (1,)
    prompt_tokens: int = 32
    new_tokens: int = 64
    pairs: int = 8
    """Blocks per batch size; in each, every arm answers the same prompts once."""
    warmup: int = 1
    """Blocks per batch size that are run first and only timed as a whole."""
    temperature: float = 0.0
