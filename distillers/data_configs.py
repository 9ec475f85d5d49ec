"""Options of the sources that bring data in from outside or have a teacher write them, and what of the outside decides
their result."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..harness.interfaces import DataRef, FileRef, MambabenchError
from .checks import counts, not_negative

ASK_S = 5.0
"""Seconds to wait for the hub's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    path: FileRef = ""
    """A .json, .jsonl, .txt (each also .xz) or .parquet file, or a folder: of such files, or as `save_to_disk` leaves
    it."""
    name: str = ""
    """A data set of the hub, `org/name`, instead of `path`."""
    subset: str = ""
    """Which of its configurations, where there are several."""
    split: str = "train"
    """Which of its splits; a single file has none."""
    revision: str = ""
    """A commit, branch or tag of the hub's repository; empty: what is in the local cache, or else the newest."""
    form: Literal["auto", "text", "completion", "chat", "preference"] = "auto"
    """What a row is; `auto`: by its columns."""
    text_column: str = ""
    """Empty, here and below: the usual names are tried."""
    prompt_column: str = ""
    input_column: str = ""
    """What an instruction is about; put behind the prompt."""
    completion_column: str = ""
    messages_column: str = ""
    system_column: str = ""
    chosen_column: str = ""
    rejected_column: str = ""
    chat: Literal["keep", "messages", "plain"] = "keep"
    """`messages`: prompts and answers become chats, which the teacher's chat template writes; `plain`: chats become
    texts with "User:" and "Assistant:", for models without a template."""
    turns: Literal["each", "first", "last"] = "each"
    """Of a chat: `each` answer is learnt, as a document of its own behind all that was said before, or the `first` or
    `last` alone."""
    learn: Literal["answers", "all"] = "answers"
    """Of chats, and of prompts with completions: the `answers`, or `all` tokens, those of prompts too. Then a chat is
    one document, up to its last answer, or its first."""
    first: int = 0
    """Rows left out at the beginning."""
    limit: int = 0
    """Rows taken; 0: all."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.name):
            raise ValueError("give either `path`, a file or folder, or `name`, a data set of the hub")
        if self.name and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.name):
            raise ValueError(f"{self.name!r} is no name of a data set; those of the hub look like org/name")
        if self.first < 0 or self.limit < 0:
            raise ValueError("first and limit count rows; they must not be below 0")

    def fingerprint(self) -> str:
        """The commit that `name` stands for; empty where it can be known neither from the cache nor from the hub."""
        return find_commit(self.name, self.revision) if self.name else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixConfig:
    data: tuple[DataRef, ...]
    """Data whose documents are put together."""
    seed: int = 0
    """Of the order in which they come."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty; it names the entries to put together")


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLabelsConfig:
    documents: int
    """How many documents the teacher writes."""
    first: int = 0
    """Number of the first one: another range of the same seed is a held-out part."""
    new_tokens: int = 256
    """Longest document, in new tokens."""
    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """1: off."""
    batch: int = 32
    """Documents written side by side; changes the speed and nothing else."""
    prompts: DataRef = ""
    """Data whose documents are continued, one each, so that there must be first + documents of them; of chats and other
    prompts with answers, the prompts are answered. Empty: every document begins with the begin token."""
    prompt_tokens: int = 32
    """Longest prompt, in tokens: texts are cut there, prompts with answers left out where they are longer."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_written(self, "documents", "new_tokens", "batch", "prompt_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePairsConfig:
    data: DataRef
    """Texts whose own continuations are chosen."""
    pairs: int
    """How many."""
    first: int = 0
    """Number of the first one; another range of the same data is a held-out part."""
    each: int = 16
    """Passages taken of a text at most, evenly spread."""
    prompt_tokens: int = 64
    new_tokens: int = 64
    """Tokens of both answers."""
    temperature: float = 1.0
    """At which the teacher writes the rejected answer."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """1: off."""
    batch: int = 32
    """Pairs written side by side; changes the speed and nothing else."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_written(self, "pairs", "each", "prompt_tokens", "new_tokens", "batch")


def _check_written(config: PseudoLabelsConfig | PreferencePairsConfig, *lengths: str) -> None:
    """Of what a teacher writes; of sampling, what `mambabench generate` refuses of its options of the same names."""
    counts(config, *lengths)
    not_negative(config, "first")
    if not 0 <= config.temperature < math.inf:
        raise ValueError(f"temperature is {config.temperature}; it must be a number, 0 (greedy) or above")
    if config.top_k < 0:
        raise ValueError(f"top_k is {config.top_k}; it must be 0 (off) or above")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p is {config.top_p}; it must be above 0 and at most 1 (off)")


def cached_snapshot(name: str, revision: str) -> Path | None:
    """The folder of a hub data set that is in the local cache whole, or None. Asks no network."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    whole = commit and snapshot.is_dir() and not any((folder / "blobs").glob("*.incomplete"))
    return snapshot if whole else None


@functools.lru_cache
def find_commit(name: str, revision: str) -> str:
    """The commit of a hub data set, from the cache or else from the hub; empty where neither knows it.

    Raises MambabenchError for a name that the hub knows not to be a data set.
    """
    snapshot = cached_snapshot(name, revision)
    if snapshot is not None:
        return snapshot.name
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        return HfApi().dataset_info(name, revision=revision or None, timeout=ASK_S).sha or ""
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise MambabenchError(f"hf:{name}: no such data set on the hub: {str(error).splitlines()[0]}") from None
    except (httpx.HTTPError, OSError):
        return ""
