"""Options of the built-in suites: plain data, so that plans are checked without the model stack."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..interfaces import DataRef, FileRef, ModelRef
from ..templates import check_template
from .recall_words import NAMES, NUMBERS, SPAN


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalConfig:
    tasks: tuple[str, ...] = ()
    """Names of tasks: of the YAML files in the folder `data`, or lm-eval's own where `data` is not given."""
    preset: Literal["", "bias", "paper-zero-shot", "paper-few-shot", "paper-generation"] = ""
    """A set of tasks with the numbers of examples and the metrics of their table."""
    data: DataRef | None = None
    local: FileRef = ""
    """A folder that stands for the hub: it has a sub-folder for each data set that tasks ask for."""
    shots: int | None = None
    """Examples in front of each item of `tasks`; as each task says where this is not given."""
    chat: bool = False
    """Items are asked in the tokenizer's chat template, examples as earlier turns."""
    system: str = ""
    """A system message, or text in front of everything without a chat template."""
    twins: bool = False
    """Multiple-choice tasks are also asked to write their answers, which are matched with the choices."""
    batch: int = 0
    """Rows of a batch; 0: as many as keep the device busy, fewer once memory has run out."""
    limit: int = 0
    """Items per task; 0 takes all."""

    def __post_init__(self) -> None:
        if not self.tasks and not self.preset:
            raise ValueError("tasks is empty; name at least one, or a preset")
        _at_least(self, batch=0, limit=0)
        if self.shots is not None:
            _at_least(self, shots=0)
            if not self.tasks:
                raise ValueError("shots is for tasks; a preset has its table's numbers of examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityConfig:
    data: DataRef
    context: int = 512
    """Longest window in tokens, of which the last is not run; a longer document is scored in several."""
    windows: Literal["disjoint", "sliding", "packed"] = "disjoint"
    """Of a document that is longer than `context`: one behind the other, or moved on by `stride`, so that every token
    but a document's first sees at least `context` - `stride`. `packed`: documents share windows."""
    stride: int = 0
    """Tokens between sliding windows; 0 is half of `context`."""
    batch: int = 8
    limit: int = 0
    """Documents; 0 takes all."""

    def __post_init__(self) -> None:
        _at_least(self, context=2, batch=1, limit=0, stride=0)
        if self.stride and self.windows != "sliding":
            raise ValueError(f"stride is {self.stride}; only sliding windows have one")
        if self.stride >= self.context:
            raise ValueError(f"stride is {self.stride}; it must be below context = {self.context}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceConfig:
    data: DataRef
    teacher: ModelRef = "teacher"
    """Whose distribution the model's is held against."""
    context: int = 512
    """Longest window in tokens, of which the last is not run; a longer document is read in several."""
    batch: int = 8
    limit: int = 0
    """Documents; 0 takes all."""

    def __post_init__(self) -> None:
        _at_least(self, context=2, batch=1, limit=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementConfig:
    data: DataRef
    teacher: ModelRef = "teacher"
    """Whose distribution and likeliest tokens the model's are held against."""
    context: int = 512
    """Longest window in tokens, of which the last is not run; a longer document is read in several."""
    depths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    """Where in a document one group of tokens ends and the next begins, in tokens behind its first."""
    batch: int = 8
    limit: int = 0
    """Documents; 0 takes all."""

    def __post_init__(self) -> None:
        _at_least(self, context=2, depths=1, batch=1, limit=0)
        if list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths is {list(self.depths)}; they must ascend")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencesConfig:
    data: DataRef
    """Preferences: lines of `prompt`, `chosen` and `rejected`."""
    context: int = 512
    """Longest text, prompt and answer, in tokens; what is longer is cut."""
    batch: int = 8
    """Pairs scored side by side."""
    limit: int = 0
    """Pairs; 0 takes all."""

    def __post_init__(self) -> None:
        _at_least(self, context=2, batch=1, limit=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallConfig:
    kinds: tuple[Literal["phone-book", "needle", "multi-key", "copying"], ...] = (
        *("phone-book", "needle", "multi-key", "copying"),
    )
    lengths: tuple[int, ...] = (128, 256, 512)
    """Of a text with its question and answer, in tokens; as much of it is filled as fits."""
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Where in a text the answer stands: 0 is the beginning, 1 the end."""
    items: int = 16
    """Texts per kind and length; each is asked about at every depth."""
    choices: int = 4
    """Of the likelihood form, the answer included."""
    entries: int = 4
    """Of a text of the kind `multi-key`."""
    span: int = 5
    """Words of the kind `copying`."""
    keys: tuple[str, ...] = ()
    """Whom questions are about. Empty: 1,600 names of people."""
    values: tuple[str, ...] = ()
    """What answers are. Empty: the numbers from 1000 to 9999."""
    words: tuple[str, ...] = ()
    """What is copied. Empty: 32 common words."""
    filler: tuple[str, ...] = ()
    """Sentences that say nothing. Empty: 15 simple ones."""
    entry: str = "The number of {key} is {value}"
    opening: str = ""
    """Before the entries of a book, or before an entry that stands alone."""
    separator: str = ". "
    """Between the entries of a book."""
    closing: str = "."
    """Behind them."""
    question: str = "The number of {key} is"
    shown: str = "They said: {span}."
    again: str = "They said:"
    """What asks for a copy. Empty: the copy follows at once, whatever `depths` says."""
    batch: int = 0
    """Items answered side by side; 0: as many as keep the device busy, fewer once memory has run out."""
    seed: int = 0
    """Of the items, which are the same for every model and seed of a plan."""

    def __post_init__(self) -> None:
        _at_least(self, lengths=8, depths=0, items=1, choices=2, entries=2, span=2, batch=0)
        if max(self.depths) > 1:
            raise ValueError(f"depths is {list(self.depths)}; they are from 0 to 1")
        for name, places in (("entry", ("key", "value")), ("question", ("key",)), ("shown", ("span",))):
            try:
                check_template(getattr(self, name), known=places, needed=places)
            except ValueError as error:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {error}") from None
        pools = {"keys": (self.keys_pool, self.entries), "values": (self.values_pool, max(self.choices, self.entries))}
        for name, (pool, least) in {**pools, "words": (self.words_pool, self.span)}.items():
            if len(set(pool)) < max(least, len(pool)):
                raise ValueError(f"{name} has {len(set(pool))} different words; it needs {max(least, len(pool))}")

    @property
    def keys_pool(self) -> tuple[str, ...]:
        return self.keys or NAMES

    @property
    def values_pool(self) -> tuple[str, ...]:
        return self.values or NUMBERS

    @property
    def words_pool(self) -> tuple[str, ...]:
        return self.words or SPAN


@dataclass(frozen=True, slots=True, kw_only=True)
class LosslessnessConfig:
    data: DataRef
    prompts: int = 16
    prompt_tokens: int = 16
    """Longest prompt; the prompts of a batch differ in length."""
    new_tokens: int = 64
    batch: tuple[int, ...] = (1, 4)
    dtype: Literal["", "float64", "float32", "bfloat16"] = ""
    """Of the models. Empty: `float64` on a CPU, what models are measured in elsewhere. Texts are equal in `float64`;
    below it, two right decoders differ where two tokens are about as likely, and near ties are excused."""
    temperature: float = 0.0
    """Above 0 texts are drawn, and what is held against plain decoding is their distribution."""
    draws: int = 256
    """How often each prompt is asked then, at least 10 times for each new token behind the first; a part of them at
    each batch size."""
    seed: int = 0
    """Of the random numbers of draws. With another one a nearly red result is looked at anew."""

    def __post_init__(self) -> None:
        _at_least(self, prompts=1, prompt_tokens=1, new_tokens=1, batch=1, temperature=0, draws=20, seed=0)
        if self.temperature and self.new_tokens < 2:
            raise ValueError(f"new_tokens is {self.new_tokens}; texts that are drawn need at least 2")
        if self.temperature and self.draws < (least := 10 * (self.new_tokens - 1)):
            # A text gives one token to compare, and rarer ones share a cell: nothing would be left to compare.
            raise ValueError(
                f"draws is {self.draws}; texts of {self.new_tokens} new_tokens need at least {least}, or be shorter"
            )


class Request(NamedTuple):
    """A kind of request whose speed is measured."""

    batch: int
    prompt_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedConfig:
    data: DataRef
    batch: tuple[int, ...] = (1,)
    prompt_tokens: int = 32
    lengths: tuple[int, ...] = ()
    """Several in place of `prompt_tokens`, each with each batch size."""
    batch_tokens: int = 0
    """Most tokens of all prompts of a batch: larger batches of longer prompts are left out. 0 takes all."""
    new_tokens: int = 64
    """At least 2: with one there is no time per further token."""
    pairs: int = 8
    """Blocks per kind of request; in each, every arm answers the same prompts once."""
    warmup: int = 2
    """Blocks per kind of request that are run first and only timed as a whole. On a GPU the second one records how
    prompts are read, which takes longer than reading them."""
    temperature: float = 0.0
    temperatures: tuple[float, ...] = ()
    """Several in place of `temperature`, each with each batch size and length."""
    profile: int = 0
    """Rounds of each arm and kind of request that are taken apart when its blocks are measured; means are facts."""

    def __post_init__(self) -> None:
        _at_least(self, batch=1, prompt_tokens=1, batch_tokens=0, new_tokens=2, pairs=1, warmup=0)
        _at_least(self, temperature=0, profile=0)
        if self.lengths:
            _at_least(self, lengths=1)
        if self.temperatures:
            _at_least(self, temperatures=0)
        if not self.requests:
            least = min(self.batch) * min(self.lengths or (self.prompt_tokens,))
            raise ValueError(f"batch_tokens is {self.batch_tokens}; the smallest batch of prompts has {least}")

    @property
    def requests(self) -> tuple[Request, ...]:
        """The kinds of requests, in the order in which they are measured."""
        most = self.batch_tokens or math.inf
        sizes = itertools.product(self.lengths or (self.prompt_tokens,), self.batch)
        kinds = itertools.product(self.temperatures or (self.temperature,), sizes)
        return tuple(Request(batch, length, at) for at, (length, batch) in kinds if batch * length <= most)

    def name(self, request: Request) -> str:
        """How facts call the requests that they are about."""
        name = f"batch {request.batch}"
        name += f", prompt {request.prompt_tokens}" if self.lengths else ""
        return name + (f", temperature {request.temperature:g}" if self.temperatures else "")


def _at_least(config: Any, **least: int) -> None:
    """Raises ValueError for an option below its least value; a list must not be empty, and all of it counts."""
    for name, low in least.items():
        value = getattr(config, name)
        if isinstance(value, tuple):
            if not value or not all(each >= low for each in value):
                raise ValueError(f"{name} is {list(value)}; it must hold numbers of at least {low}")
        elif not value >= low:
            raise ValueError(f"{name} is {value}; it must be at least {low}")
