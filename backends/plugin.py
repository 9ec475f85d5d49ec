"""The backends that ship with mambabench, described without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..harness.hooks import hookimpl
from ..harness.interfaces import Component, DataRef, ModelRef


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """The teacher has no options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerConfig:
    """Options of new layers of either kind; the defaults are what the released recipe does."""

    d_conv: int = 4
    """Taps of the convolution."""
    init: Literal["attention", "random"] = "attention"
    """Where x, B, C and the output projection begin: at the parent's V, K, Q and O, or at random weights."""
    gate: Literal["random", "open"] = "random"
    """`open`: z begins at a learnt bias that lets everything through. Such a model cannot be exported."""
    conv: Literal["random", "identity"] = "random"
    """`identity`: the convolution begins as one that passes each token on as it is."""
    activation: Literal["silu", "none"] = "silu"
    """Behind the convolution: of x, and of B and C where that runs over them (Mamba-2)."""
    rope: Literal["dropped", "kept"] = "dropped"
    """`kept`: B and C are rotated by their positions, as the attention's K and Q were."""
    q_scale: Literal["one", "attention"] = "one"
    """`attention`: the rows of C that come from Q are divided by the square root of the head's width."""
    skip: Literal["one", "none"] = "one"
    """`none`: D, the weight of a token's own x beside the scan, begins at zero. Attention has no such path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2HybridConfig(MixerConfig):
    """Options of new Mamba-2 layers."""

    chunk: int = 64
    """Tokens of a block of the parallel scan; changes speed and rounding alone. No effect where mamba-ssm's scan
    serves, on a GPU: its blocks have 128."""
    norm: Literal["gated", "none"] = "gated"
    """Of the scan's output, per head, behind the gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig(MixerConfig):
    """Options of new Mamba-1 layers; the released recipe has two slips that the defaults have not: dt's bias is added
    once, and a head's sub-blocks are paired with those of the KV head that it attended to."""

    dt_bias: Literal["once", "twice"] = "once"
    """How often the bias of dt is added; the released code adds it twice."""
    sub_block_order: Literal["aligned", "released"] = "aligned"
    """Which sub-blocks of heads read which of the KV heads: those that the attention paired, or the released order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitFidelityConfig:
    data: DataRef
    teacher: ModelRef = "teacher"
    """Whose attention and logits a model is held against."""
    documents: int = 32
    context: int = 256
    """Tokens that are read of a document."""
    batch: int = 8

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("context", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedConfig:
    """Where nothing is put in the attention's place, there is nothing to choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrunkConfig:
    """Which layers stay is said by `keep`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfConfig:
    """A model of transformers is taken as it is."""

    cache: Literal["dynamic", "static"] = "dynamic"
    """Of its generate: one that grows, or one that is taken whole, for which transformers compiles the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaSsmConfig:
    """A model of mamba-ssm has no options: it is taken as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandConfig:
    """A command's options are click's."""


@hookimpl
def mambabench_components() -> list[Component]:
    """The components of this room."""
    return [
        Component(
            kind="backend",
            name="teacher",
            target="mambabench.backends.hybrid:TeacherBackend",
            config=TeacherConfig,
            traits=frozenset({"rollback"}),
            summary="a Llama, Mistral, Qwen2 or Qwen3 folder as it is",
        ),
        Component(
            kind="backend",
            name="hf",
            target="mambabench.backends.hf:HfBackend",
            config=HfConfig,
            traits=frozenset({"generate"}),
            summary="any causal model of transformers as it is, with its own generate",
        ),
        Component(
            kind="backend",
            name="mamba-ssm",
            target="mambabench.backends.peer_mamba:MambaSsmBackend",
            config=MambaSsmConfig,
            requires=("mamba-ssm>=2.2",),
            traits=frozenset({"generate"}),
            summary="a model of mamba-ssm with its own generate and CUDA graphs",
        ),
        Component(
            kind="backend",
            name="mamba2-hybrid",
            target="mambabench.backends.hybrid:Mamba2HybridBackend",
            config=Mamba2HybridConfig,
            traits=frozenset({"rollback"}),
            summary="attention traded for Mamba-2, initialised from it",
        ),
        Component(
            kind="backend",
            name="mamba",
            target="mambabench.backends.hybrid:MambaBackend",
            config=MambaConfig,
            traits=frozenset({"rollback"}),
            summary="attention traded for Mamba-1, initialised from it",
        ),
        Component(
            kind="backend",
            name="removed",
            target="mambabench.backends.hybrid:RemovedBackend",
            config=RemovedConfig,
            traits=frozenset({"rollback"}),
            summary="attention taken away, nothing in its place: only the layer's MLP is left",
        ),
        Component(
            kind="backend",
            name="shrunk",
            target="mambabench.backends.shrunk:ShrunkBackend",
            config=ShrunkConfig,
            traits=frozenset({"rollback"}),
            summary="only the layers of `keep`, between the parent's embeddings and head: a draft to be trained",
        ),
        Component(
            kind="suite",
            name="init-fidelity",
            target="mambabench.backends.fidelity:InitFidelity",
            config=InitFidelityConfig,
            traits=frozenset({"score"}),
            summary="How near converted layers are to the attention that they replace, and the logits to the teacher's",
        ),
        Component(
            kind="command",
            name="export",
            target="mambabench.backends.cli:export",
            config=CommandConfig,
            summary="Write a model in the format of released MambaInLlama checkpoints",
        ),
        Component(
            kind="command",
            name="kernels",
            target="mambabench.backends.cli:kernels",
            config=CommandConfig,
            summary="Which kernels there are for the GPUs of this machine, and why not",
        ),
    ]
