"""Everything that a plug-in and the harness say to each other: components, protocols, records.

Importing this module imports neither torch nor any other part of the model stack, so that plug-ins can be listed and
plans checked in milliseconds. Tensors appear in annotations only. Whatever crosses a hook is a frozen dataclass; a new
field with a default is the compatible way to grow.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

from .decoding import Answer as Answer
from .decoding import Binds as Binds
from .decoding import Decoder as Decoder
from .decoding import DeviceDraft as DeviceDraft
from .decoding import Draft as Draft
from .decoding import Limits as Limits
from .decoding import OnText as OnText
from .decoding import Prompt as Prompt
from .decoding import Rollback as Rollback
from .verdicts import VERDICTS as VERDICTS
from .verdicts import Comparison as Comparison
from .verdicts import Verdict as Verdict

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor, nn

    from .results import Results

API = 1
"""Version of this contract. Raised only when something is removed or changes its meaning."""

KINDS = (
    *("backend", "teacher", "distiller", "decoder", "draft", "selector", "source"),
    *("suite", "questions", "judge", "table", "renderer", "launcher", "command"),
)


class MambabenchError(Exception):
    """An error of the user's input or surroundings: printed as one line, without a traceback."""


class Unsupported(MambabenchError):
    """Raised by a component that cannot do what the step asks; the step becomes *unsupported* with this reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One pluggable thing of any kind, described as data: nothing of it is imported before it is used."""

    kind: str
    """One of `KINDS`."""
    name: str
    """Unique within its kind; what `use = "…"` in a plan names."""
    target: str
    """`"package.module:factory"`. `factory(config)` makes an object of the kind's protocol, in the process that
    uses it. For a command, the target is a click command itself and is not called; a teacher's gives the folder of a
    transformers model that comes with the plug-in, and imports no torch."""
    config: type
    """A frozen dataclass. Plans are checked against it; unknown keys are errors. Fields annotated `DataRef` or
    `ModelRef` name an entry of the plan's `[data]` or `[models]` and become inputs of the step, as do files and folders
    in fields annotated `FileRef`, seen from the plan's folder, unless an entry of `[data]` has that name, or that of
    its first part; fields annotated `Annotated[Choice, ChoiceOf(kind)]` name a component of another kind. Where the
    result depends on something else outside of the plan, a method `fingerprint()` returns a text that stands for it in
    keys. Where it is plain beforehand that something of this machine is missing, a method `lacks()` says what, else "".
    A method `check_files(files)` checks beforehand those of the files that it names that are there, by what stands in
    the config: it raises `Unsupported` for what they lack and `MambabenchError` for what is wrong in them. A suite that
    scores answers has a method `questions()`: the `Choice` of kind `questions` that has a model answer in a step of its
    own, or None for recorded answers."""
    revision: int = 1
    """Raised when results made by older versions stop being comparable."""
    api: int = API
    requires: tuple[str, ...] = ()
    """Requirements such as `"lm-eval>=0.4.9"`, checked from package metadata, without an import."""
    traits: frozenset[str] = frozenset()
    """What the planner may rely on. Suites: exactly one of `score`, `generate`, `pair`; `alone` for a quiet machine.
    Decoders: `lossless`; `streams` if `generate` takes `on_text`. Backends: `rollback`, `generate`. Distillers:
    `from-scratch` if they need no parent, `ranks` if several processes may run one stage together, which share its
    option `batch` evenly.
    Selectors: `gpu` if they run models."""
    summary: str = ""
    """One line for `mambabench list`."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Marks a config field as the name of an entry in a section of the plan, or as the path of a file or folder."""

    section: Literal["data", "models", "files"]


@dataclass(frozen=True, slots=True)
class ChoiceOf:
    """Marks a config field as a component of `kind`, written `"name"` or `{ use = "name", option = … }`."""

    kind: str


DataRef = Annotated[str, Reference("data")]
ModelRef = Annotated[str, Reference("models")]
FileRef = Annotated[str, Reference("files")]


@dataclass(frozen=True, slots=True)
class Choice:
    """A component chosen in a plan, with its checked options."""

    kind: str
    name: str
    config: Any


CHECKPOINT_S = 30.0
"""Seconds between checkpoints, about: what a killed training loses at most."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a step takes from the machine. `timeout_s` is wall time from the child's start, in seconds."""

    gpus: int = 0
    alone: bool = False
    timeout_s: float = 3600.0
    ranks: int = 1
    """Processes that do the step together, each with a GPU of its own where there are any."""
    checkpoint_s: float = CHECKPOINT_S
    """Seconds between checkpoints of a training."""
    light: bool = False
    """Mostly waits for others, such as a judge: takes no place of a step that computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What hooks see of a step."""

    key: str
    kind: str
    labels: tuple[str, ...]
    component: str
    needs: Needs


@dataclass(frozen=True, slots=True)
class Host:
    """What hooks see of the machine that would run a step."""

    cpus: int
    gpus: tuple[str, ...]
    """Names of the GPUs that the run may use."""
    platform: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a step cannot run here; its state becomes *unsupported* with this reason."""

    reason: str


DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""What a model is loaded in on each kind of device, unless a suite asks for another dtype."""

MISSING = "missing"
"""Name of the fact that a step did without a task, its `arm`, and why: its value. Averages over tasks then lack it."""

STATES = ("ok", "unsupported", "out-of-memory", "timeout", "crashed", "error", "cancelled", "blocked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt at a step ended. Only `ok` is final."""

    state: str
    """One of `STATES`."""
    reason: str = ""
    attempt: int = 1
    wall_s: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Device, threads, overheads in seconds, peak memory in bytes, and the facts that the component emitted."""


class Emit(Protocol):
    """The only way to a record. Each call is on disk before it returns.

    Kinds that the harness knows, with their fields (docs/records.md has the details):
    `sample`   task, item, metric, value, weight=1.0, cluster=item, better="higher"
    `burst`    arm, block, row, burst, at_s, tokens, and whatever describes the request
    `round`    arm, block, row, round, drafted, accepted
    `fact`     name, value, unit="", arm=""
    `loss`     step, tokens, loss, and the loss's parts
    `progress` done, total, unit
    """

    def __call__(self, kind: str, /, **fields: Any) -> None: ...


def silent(kind: str, /, **fields: Any) -> None:
    """An `Emit` for calls whose records nobody asked for."""


class Scores(NamedTuple):
    """What the model says of given text; entry t is about token t + 1."""

    logprob: Tensor
    """fp32 (fp64 for an fp64 model) [B, L - 1], natural log."""
    greedy: Tensor
    """bool [B, L - 1]: the token is the argmax (lowest index on a tie)."""
    gap: Tensor | None = None
    """Like `logprob`: by how much the token's logit is below the largest one. None: unknown."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Least traffic and arithmetic of one `advance`, for rooflines, and the memory that is held, for tables."""

    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    flops: int
    held_weight_bytes: int | None = None
    """Weights as they are loaded, embedding included. None here and below: unknown."""
    held_kv_bytes: int | None = None
    """KV caches that `open` takes when called with the same arguments."""
    held_state_bytes: int | None = None
    """Recurrent states that it takes, with what is kept to roll them back."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the harness uses."""

    eos_token_id: int | None
    bos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


class Recording(Protocol):
    """Lets a decoder record whole rounds as CUDA graphs. Recorded work reads and writes the memory it was recorded on:
    that of a state, which outlives requests, and what the decoder keeps beside it."""

    kept: dict[Hashable, Any]
    """The decoder's: what it put there for an earlier request on the same memory is there again."""

    def unrecorded(self) -> AbstractContextManager[None]:
        """Calls are launched kernel by kernel meanwhile: so runs first what is then recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records work that does not wait for the device, without running it; returns what starts it."""


class Stepper(Protocol):
    """A model as decoders see it: steps of any number of tokens, and positions that belong to the caller. With the
    trait `shrinks` it has `layers`, their number, and `shrunk(layers)`, a `Stepper` of these alone on the same weights.
    It may have `recording(state) -> Recording | None`. With the trait `snapshots` its `open` and `cost` take one more
    argument, `rollback: Rollback = "replay"`, and the contract is the same. With the trait `picks` its `advance` takes
    one more, `last: Tensor | None`, logits [B, V] whose likeliest tokens it first puts into ids[:, -1] (contiguous).
    With the trait `counts` its `prefill` takes one more, `counts: Sequence[int] | None`, the lengths where the host
    knows them, for which it then need not wait.
    With the trait `ends` its `score` takes one more, `begins: Tensor | None`, int32 [B]: only of the tokens from
    begins[b] on are scores asked for, and entries of those before are undefined.

    Positions are absolute. `start[b]` is the number of tokens of row b before this call; everything at or after it is
    forgotten first. With `settle`, everything before `start` becomes permanent, otherwise it stays revocable. Always
    settled <= start <= end and start + T - settled <= steps. The same call twice gives the same result.
    `ids[:, 0]` of an `advance` is the last emitted token, which no model has run yet: for K drafts T = K + 1.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_context: int
    device: str
    dtype: str
    traits: frozenset[str]

    def open(self, batch: int, context: int, steps: int) -> Any:
        """Takes all memory: `context + steps` positions a row. Returns an opaque state, every row empty."""

    def prefill(self, ids: Tensor, lengths: Tensor, state: Any, start: Tensor | None = None) -> Tensor:
        """Runs prompts. ids int64 [B, L] right-padded, lengths int32 [B] (0: the row is left as it is).

        With `start` (int32 [B]) a row continues there, else it begins anew. Everything is settled afterwards.
        Returns logits [B, V] at each row's last token (fp32; fp64 for an fp64 model); rows of length 0 are undefined.
        """

    def advance(self, ids: Tensor, start: Tensor, state: Any, settle: bool = True) -> Tensor:
        """Runs ids int64 [B, T] at positions start[b] … start[b] + T - 1. Returns logits [B, T, V], as above."""

    def take(self, state: Any, rows: Tensor) -> None:
        """Row b becomes a copy of row rows[b] (int64 [B])."""

    def score(self, ids: Tensor, lengths: Tensor) -> Scores:
        """Scores text in parallel. ids int64 [B, L] right-padded; entries at or after lengths[b] - 1 are undefined.

        L is at most `max_context` + 1: nothing follows the last token of a text, so it is scored but not run.
        """

    def cost(self, batch: int, context: int, steps: int) -> Cost:
        """Least bytes and FLOPs of one `advance` of `steps` tokens a row at `context` tokens, and the bytes held."""


class Backend(Protocol):
    """A family of models. An artifact is a folder that only its backend reads and writes.

    A backend may also have `frozen(artifact, device)`, a quicker `module` for models that trainings only ask: on a GPU
    in bf16; and `kernels()`, which says of each operation that this process ran whether fused kernels ever ran it
    (`fused`), and the `reasons` where they did not.
    """

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Makes an artifact from a parent (a teacher or another student): the layers in `keep` keep attention, every
        other attention layer becomes this backend's mixer. Raises `Unsupported` for a parent it cannot take."""

    def describe(self, artifact: Path) -> Mapping[str, Any]:
        """Reads sizes without loading weights: `layers`, `attention_layers` (indices), `parameters`, `weight_bytes`,
        `vocab_size`, `max_context`."""

    def load(self, artifact: Path, device: str, dtype: str) -> Stepper:
        """Loads for decoding and scoring. dtype: `float64`, `float32`, `bfloat16`."""

    def module(self, artifact: Path) -> nn.Module:
        """Loads for training, fp32, on CPU: `module(input_ids, labels=…)` as a transformers causal model."""

    def save(self, module: nn.Module, out: Path, like: Path) -> None:
        """Writes a trained module as an artifact; tokenizer and side files come from the artifact `like`."""

    def tokenizer(self, artifact: Path) -> Tokenizer:
        """Loads the tokenizer alone."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model on disk with the backend that understands it."""

    name: str
    """The model's name in the plan."""
    path: Path
    backend: Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The surroundings of a step that makes something: a selection, data, or a trained model."""

    seed: int
    device: str
    """`cpu`, or `cuda:0` (the child sees only its leased GPUs); of several ranks, each has its own."""
    data: Mapping[str, Path]
    """What each `DataRef` and `FileRef` of the config resolved to: a file, or the folder that a source wrote. Keyed by
    what stands in the config."""
    models: Mapping[str, Artifact]
    """What each `ModelRef` resolved to, keyed by the name."""
    teacher: Artifact | None
    parent: Artifact | None
    """The model to train or to select layers of; None for a distiller with the trait `from-scratch`."""
    backend: Backend | None
    """The backend of the model that is made; for a source, the teacher's."""
    scratch: Path
    """Survives a killed child: checkpoints belong here."""
    out: Path
    """Renamed into place when the step ends well."""
    emit: Emit
    cache: Path | None = None
    """Where steps keep what others can use (`harness.cache`), named after all that decides it; may be emptied."""
    checkpoint_s: float = CHECKPOINT_S
    """What a killed training may lose."""


class Distiller(Protocol):
    def train(self, job: Job) -> None:
        """Trains `job.parent` (or a new model) and writes the artifact to `job.out` through `job.backend.save`."""


class Selector(Protocol):
    def select(self, job: Job) -> Sequence[int]:
        """Chooses the layers of `job.parent` that keep attention; returns their indices, ascending."""


class Source(Protocol):
    def write(self, job: Job) -> None:
        """Makes data in `job.out`: `data.jsonl` with one document a line (docs/records.md), or a folder of its own
        kind, such as lm-eval tasks. `job.teacher` is set for sources with the trait `teacher`."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under measurement, with the decoder that drives it (None for suites that only score)."""

    artifact: Artifact
    decoder_name: str
    decoder: Decoder | None
    device: str
    dtype: str
    """The dtype for this device; a suite may load another."""

    def load(self, dtype: str = "") -> Stepper:
        """Loads the model, in `dtype` or the default one."""
        return self.artifact.backend.load(self.artifact.path, self.device, dtype or self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The surroundings of a measuring step."""

    subject: Subject
    reference: Subject | None
    """For suites with the trait `pair`: the same model with the plan's first decoder, unless that is the subject."""
    data: Mapping[str, Path]
    seed: int
    scratch: Path
    emit: Emit
    models: Mapping[str, Artifact] = field(default_factory=dict)
    """What each `ModelRef` of the suite's config resolved to, keyed by the name."""
    cache: Path | None = None
    """As a job's: what is kept there serves other steps of the store, and may be deleted."""
    answers: str = ""
    """Stands for all that decides what the subject answers, the questions apart: a name in the cache for answers that
    several steps ask for. Empty: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """The surroundings of a judging step: stored answers are scored, without the model that gave them."""

    model: str
    """Its name in the plan."""
    answers: Path | None
    """The records of the step in which it answered (`events.jsonl`); None where the config names recorded answers."""
    data: Mapping[str, Path]
    seed: int
    scratch: Path
    emit: Emit
    cache: Path | None = None


class Suite(Protocol):
    """One whose config has `questions()` has `judge(review)` in place of `run`."""

    def run(self, bench: Bench) -> None:
        """Measures; every record goes through `bench.emit`."""


class AnsweredSuite(Protocol):
    def judge(self, review: Review) -> None:
        """Scores answers that are stored; every record goes through `review.emit`."""


class Questions(Protocol):
    def answer(self, bench: Bench) -> None:
        """Has the subject answer; each answer is a record of kind `answer`."""


class Table(Protocol):
    title: str
    note: str

    def frame(self, results: Results) -> DataFrame | None:
        """Makes one table of a report, or None where the results have nothing for it. Imports no torch."""


class Renderer(Protocol):
    def render(self, report: Any, out: Path) -> Path:
        """Writes a `reports.build.Report` into folder `out`; returns the file to open."""


@runtime_checkable
class Handle(Protocol):
    """A child process of a launcher. It may have an attribute `why` that says in words what ended it, where that was
    neither its own doing nor a signal to it."""

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""

    def kill(self) -> None:
        """Ends the child and everything that it started."""


class Launcher(Protocol):
    def prepare(self, modules: Iterable[str]) -> None:
        """Gets ready to start children that will import `modules`."""

    def start(self, command: Sequence[str], needs: Needs, env: Mapping[str, str], log: Path) -> Handle | None:
        """Starts a child with its output in `log`, or returns None while what it needs is taken. A launcher may have
        an attribute `waiting` that says in words what of another run it waits for; the runner shows it once a step.
        """

    def close(self) -> None:
        """Ends every child."""
