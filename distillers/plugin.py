"""Names the distillers, layer selectors and data sources that come with mambabench; imports nothing of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Literal

from ..harness.hooks import hookimpl
from ..harness.interfaces import Component, DataRef, ModelRef
from .checks import below_one, not_negative, positive, share_of_steps
from .data_configs import DatasetConfig, MixConfig, PreferencePairsConfig, PseudoLabelsConfig
from .random_configs import RandomMambaConfig, RandomTeacherConfig, RandomTokensConfig
from .train_speed_config import TrainSpeedConfig

HOW = {"decides": False}
"""Marks options of stages that say how a result is computed. They are no part of a key: a stage that ran out of memory
goes on with others from where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformConfig:
    share: float
    """Share of the layers that keep attention, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListConfig:
    layers: tuple[int, ...]
    """Indices of the layers that keep attention, counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndsConfig:
    count: int = 2
    """Layers at even distances, the first and the last among them."""

    def __post_init__(self) -> None:
        positive(self, "count")


@dataclass(frozen=True, slots=True, kw_only=True)
class KlGuidedConfig:
    share: float
    """Share of the layers that keep attention, 0 to 1."""
    model: ModelRef
    """A model of the plan that keeps no attention, trained or not: the one whose layers are restored for a trial."""
    data: DataRef
    """Text on which the model is held against the teacher."""
    tokens: int = 50_000
    """Tokens of that text."""
    context: int = 128
    """Longest window, in tokens."""
    batch: int = 16
    """Windows run side by side; changes the speed and nothing else."""
    greedy: bool = False
    """Restores the best layer for good and measures the others anew, until there are enough, instead of taking those
    that gain most alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")
        positive(self, "tokens", "context", "batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    part: Literal["train", "unseen", "prompts", "preferences", "unseen-preferences", "tasks", "chat"] = "train"
    """`train`; `unseen`: held-out documents, to be scored; `prompts`: the same with a beginning of 30 tokens from which
    there is much to continue; `preferences`: questions of the training part with a right and a wrong answer;
    `unseen-preferences`: held-out ones; `tasks`: lm-eval tasks over held-out items; `chat`: ten held-out questions of
    two turns, for `mt-bench` and `alpaca-eval`."""
    documents: int = 8000
    """Documents or pairs written (not for `tasks` and `chat`), of at most 128 tokens each."""
    items: int = 200
    """Items of each task (only for `tasks`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "documents", "items")
        taken = {"tasks": "items", "chat": ""}.get(self.part, "documents")
        for option in fields(self):
            idle = option.name in ("documents", "items") and option.name != taken
            if idle and getattr(self, option.name) != option.default:
                raise ValueError(f'{option.name} is set and part is "{self.part}", which has none')


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyTeacherConfig:
    """The weights have no options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyJudgeConfig:
    """The rules have no options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTeacherConfig:
    data: DataRef
    """Text that brings a tokenizer of its own (`tokenizer/` beside `data.jsonl`)."""
    tokens: int
    """Training tokens, counted with every repetition."""
    layers: int = 4
    hidden: int = 64
    """Width of the residual stream."""
    heads: int = 2
    kv_heads: int = 2
    intermediate: int = 128
    """Width of the MLP."""
    context: int = 128
    """Longest window and longest text of the model, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    init: float = 0.1
    """Standard deviation of the weights to begin with; a narrow model learns sooner from larger ones than the 0.02
    that is usual for wide ones."""
    batch: int = 16
    """Windows per optimiser step."""
    lr: float = 3e-3
    """Peak of the learning rate."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it falls by a cosine to 0 afterwards."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        positive(
            self, "tokens", "layers", "hidden", "heads", "kv_heads", "intermediate", "context", "batch", "lr", "clip"
        )
        share_of_steps(self, "warmup")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """What the stages that train a given model share."""

    data: DataRef
    context: int
    batch: int = 16
    accumulation: int = field(default=1, metadata=HOW)
    """Parts in which each GPU computes its share of a batch, to save memory; the result is the same. A GPU that has
    fewer rows computes them one by one."""
    lr: float
    """Peak of the learning rate."""
    warmup: float
    """Share of the steps in which the learning rate rises; it falls by a cosine to 0 afterwards."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 0.0
    beta2: float = 0.98
    """Adam's memory of squared gradients (that of gradients is 0.9): the higher, the longer. 0.98, the default of all
    stages, is the paper's of the first one, and right for hundreds of steps; its `sft` and `dpo` have 0.999."""
    checkpointing: bool = field(default=False, metadata=HOW)
    """Keeps only what enters each layer for the way back, and computes the rest again: far less memory, a third more
    time, the same result."""
    parallel: Literal["ddp", "fsdp"] = field(default="ddp", metadata=HOW)
    """How several GPUs share a stage (`limits.train_gpus`): each holds all weights, or, with FSDP2, a part of them."""
    slice: int = field(default=0, metadata=HOW)
    """Positions whose logits are held at a time, to save memory with a large vocabulary; the result is the same.
    0: those of all positions."""
    train: tuple[str, ...] = ("all",)
    """What is trained: `mixers` (the Mamba mixers), `all`, or globs over names of parameters (`*.layers.3.mlp.*`)."""

    def __post_init__(self) -> None:
        positive(self, "context", "batch", "accumulation", "lr", "clip")
        if self.batch % self.accumulation:
            raise ValueError(f"accumulation is {self.accumulation}, which does not divide batch = {self.batch}")
        share_of_steps(self, "warmup")
        below_one(self, "beta2")
        not_negative(self, "slice", "weight_decay")
        if not self.train:
            raise ValueError("train is empty; it must name what is trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig(StageConfig):
    """What the stages that train towards a teacher share; defaults are those of `progressive`."""

    data: DataRef
    """Text to learn from; the paper uses text that the teacher wrote (`pseudo-labels`)."""
    tokens: int
    """Training tokens, counted with every repetition."""
    context: int = 128
    """Longest window, in tokens."""
    batch: int = 16
    """Windows per optimiser step."""
    lr: float = 3e-3
    warmup: float = 0.05
    ce: float = 1.0
    """Weight of the cross entropy, per token."""
    kl: float = 0.1
    """Weight of the divergence from the teacher, per token. (The paper's 0.1 is per sequence: some 200 per token.)"""
    teacher: ModelRef = ""
    """The model that the divergence asks, where that is not the plan's teacher: one of the plan, of the same
    vocabulary. The attention that layers are aligned with, or run until they join, is the teacher's in any case."""
    kl_kind: Literal["forward", "reverse", "js"] = "forward"
    """KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence."""
    js_beta: float = 0.5
    """Weight of the teacher in the mixture of `js`: towards 0 it behaves as `forward`, towards 1 as `reverse`."""
    temperature: float = 1.0
    """Softens both distributions of the divergence, whose gradient is scaled back by its square."""
    slice: int = field(default=0, metadata=HOW)
    """Positions whose logits are held at a time, to save memory with a large vocabulary; the result is the same.
    0: those of all positions, on a GPU as many as half a gigabyte holds."""
    train: tuple[str, ...] = ("mixers",)

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        positive(self, "tokens", "temperature")
        not_negative(self, "ce", "kl")
        if not 0 < self.js_beta < 1:
            raise ValueError(f"js_beta is {self.js_beta}; it must be between 0 and 1")
        if not self.ce and not self.kl:
            raise ValueError("ce and kl are both 0; one of them must be above 0")
        if self.teacher and not self.kl:
            raise ValueError("teacher is named and kl is 0, so that nobody asks it")
        for option in fields(self):
            idle = option.name in ("kl_kind", "js_beta", "temperature") and not self.kl
            if idle and getattr(self, option.name) != option.default:
                raise ValueError(f"{option.name} is set and kl is 0, so that there is no divergence")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressiveConfig(DistillationConfig):
    align_tokens: int = 0
    """Tokens of a first phase in which each mixer learns the output of the attention that it replaces. 0: none."""
    schedule: Literal["together", "stepwise", "interleaved"] = "together"
    """Converted layers train together, or join one set after the other, first to last or every other one first; the
    steps are split evenly, with a learning rate that rises and falls in each part."""
    sets: tuple[tuple[int, ...], ...] = ()
    """Sets of layers that join together, in order; empty: each layer alone."""

    def __post_init__(self) -> None:
        DistillationConfig.__post_init__(self)
        not_negative(self, "align_tokens")
        if self.sets and self.schedule == "together":
            raise ValueError('sets needs schedule = "stepwise"')
        if self.sets and self.schedule == "interleaved":
            raise ValueError('sets gives an order of its own; say schedule = "stepwise"')


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(DistillationConfig):
    lr: float = 5e-4
    kl: float = 0.0
    """Weight of the divergence from the teacher, per token."""
    train: tuple[str, ...] = ("all",)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(StageConfig):
    data: DataRef
    """Preferences: lines of `prompt`, `chosen` and `rejected`."""
    epochs: float = 1.0
    """How often each pair is seen."""
    beta: float = 0.1
    """How dearly leaving the reference is paid for; rewards are beta times log-ratios to it."""
    reference: Literal["start", "teacher"] = "start"
    """The student before this stage, as the released code has it, or the teacher, as the paper's equation 4."""
    precompute: bool = field(default=False, metadata=HOW)
    """Asks the reference once for all pairs before the training, in place of keeping it in memory."""
    context: int = 512
    """Longest text, prompt and answer, in tokens; what is longer is cut."""
    batch: int = 16
    """Pairs per optimiser step."""
    lr: float = 5e-5
    """Peak of the learning rate. (The paper has 5e-7 for 7 billion parameters.)"""
    warmup: float = 0.1

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        positive(self, "epochs", "beta")


@hookimpl
def mambabench_components() -> Iterable[Component]:
    room = "mambabench.distillers"
    yield Component(
        kind="distiller",
        name="train-teacher",
        target=f"{room}.train_teacher:TrainTeacher",
        config=TrainTeacherConfig,
        requires=("accelerate>=1.1",),
        traits=frozenset({"from-scratch", "ranks"}),
        summary="trains a small Llama from scratch, to be the teacher",
    )
    yield Component(
        kind="distiller",
        name="random-teacher",
        target=f"{room}.random_teacher:RandomTeacher",
        config=RandomTeacherConfig,
        traits=frozenset({"from-scratch"}),
        summary="a teacher of any shape with random weights, for measuring speed and memory",
    )
    yield Component(
        kind="distiller",
        name="random-mamba",
        target=f"{room}.random_mamba:RandomMamba",
        config=RandomMambaConfig,
        traits=frozenset({"from-scratch"}),
        summary="a model of mamba-ssm of any shape with random weights, for measuring speed and memory",
    )
    yield Component(
        kind="distiller",
        name="progressive",
        target=f"{room}.progressive:Progressive",
        config=ProgressiveConfig,
        requires=("accelerate>=1.1",),
        traits=frozenset({"ranks"}),
        summary="trains the new Mamba mixers on cross entropy and KL to the teacher, all else frozen",
    )
    yield Component(
        kind="distiller",
        name="sft",
        target=f"{room}.sft:Sft",
        config=SftConfig,
        requires=("accelerate>=1.1",),
        traits=frozenset({"ranks"}),
        summary="trains all weights on cross entropy, KL to the teacher, or both",
    )
    yield Component(
        kind="distiller",
        name="dpo",
        target=f"{room}.dpo:Dpo",
        config=DpoConfig,
        requires=("accelerate>=1.1",),
        traits=frozenset({"ranks"}),
        summary="trains all weights on preferences, against the student before or the teacher",
    )
    yield Component(
        kind="selector",
        name="uniform",
        target=f"{room}.selectors:Uniform",
        config=UniformConfig,
        summary="keeps attention in evenly spread layers, the last one first",
    )
    yield Component(
        kind="selector",
        name="list",
        target=f"{room}.selectors:Listed",
        config=ListConfig,
        summary="keeps attention in the layers given",
    )
    yield Component(
        kind="selector",
        name="ends",
        target=f"{room}.selectors:Ends",
        config=EndsConfig,
        summary="the first and the last layer, and others at even distances: for drafts, which have few",
    )
    yield Component(
        kind="selector",
        name="kl-guided",
        target=f"{room}.kl_guided:KlGuided",
        config=KlGuidedConfig,
        traits=frozenset({"gpu"}),
        summary="keeps attention where restoring it brings a converted model nearest to the teacher",
    )
    yield Component(
        kind="suite",
        name="train-speed",
        target=f"{room}.train_speed:TrainSpeed",
        config=TrainSpeedConfig,
        requires=("accelerate>=1.1",),
        traits=frozenset({"score", "alone"}),
        summary="Time and memory of an optimiser step beside the teacher's",
    )
    yield Component(
        kind="source",
        name="tiny",
        target=f"{room}.tiny.source:Tiny",
        config=TinyConfig,
        summary="the tiny world: texts, preferences, lm-eval tasks and chats in a small language with known truth",
        revision=2,
    )
    yield Component(
        kind="teacher",
        name="tiny",
        target=f"{room}.tiny.weights:folder",
        config=TinyTeacherConfig,
        summary="a Llama of 0.7M parameters that knows the tiny world, trained by plans/gpu/tiny-teacher.toml",
    )
    yield Component(
        kind="judge",
        name="tiny",
        target=f"{room}.tiny.judge:TinyJudge",
        config=TinyJudgeConfig,
        summary="knows the right answers of the tiny world; judges by rule, without a model",
    )
    yield Component(
        kind="source",
        name="dataset",
        target=f"{room}.dataset:DatasetSource",
        config=DatasetConfig,
        summary="texts, prompts with answers, chats or preferences from files, folders or the Hugging Face hub",
    )
    yield Component(
        kind="source",
        name="mix",
        target=f"{room}.dataset:Mix",
        config=MixConfig,
        summary="several data as one, shuffled",
    )
    yield Component(
        kind="source",
        name="random-tokens",
        target=f"{room}.random_teacher:RandomTokens",
        config=RandomTokensConfig,
        traits=frozenset({"teacher"}),
        summary="documents of random tokens, for measuring speed and memory",
    )
    yield Component(
        kind="source",
        name="pseudo-labels",
        target=f"{room}.pseudo_labels:PseudoLabels",
        config=PseudoLabelsConfig,
        traits=frozenset({"teacher"}),
        summary="text that the teacher writes itself",
    )
    yield Component(
        kind="source",
        name="preference-pairs",
        target=f"{room}.preference_pairs:PreferencePairs",
        config=PreferencePairsConfig,
        traits=frozenset({"teacher"}),
        summary="passages of a text with its own continuation, preferred to one that the teacher writes",
    )
