"""A local plug-in file for the core's tests: components of each kind that a plan needs, none of which imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mambabench import Choice, ChoiceOf, Component, DataRef, FileRef, ModelRef, hookimpl


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBackend:
    width: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ToySelector:
    depth: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTrial:
    model: ModelRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ToySource:
    part: Literal["train", "test"] = "train"
    prompts: DataRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyStage:
    data: DataRef
    lr: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    mask: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTogether(ToyStage):
    batch: int = 12
    parts: int = field(default=1, metadata={"decides": False})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyDraft:
    model: ModelRef | None = None
    text: DataRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyDecoder:
    k: int = 4
    draft: Annotated[Choice, ChoiceOf("draft")] = Choice("draft", "toy-draft", ToyDraft())


@dataclass(frozen=True, slots=True, kw_only=True)
class ToySuite:
    data: DataRef | None = None
    items: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyQuiz:
    questions: int = 10
    lacks: str = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyQuestions:
    data: FileRef
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyJudge:
    name: str

    def lacks(self) -> str:
        return "the judge is not at home" if self.name == "away" else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyAnswered:
    data: FileRef
    limit: int = 0
    recorded: bool = False
    judge: Annotated[Choice, ChoiceOf("judge")]

    def questions(self) -> Choice | None:
        return (
            None if self.recorded else Choice("questions", "toy-asks", ToyQuestions(data=self.data, limit=self.limit))
        )


def make(config: object) -> object:
    return config


def component(kind: str, name: str, config: type, *traits: str, **more: object) -> Component:
    target = f"{__name__}:make"
    return Component(kind=kind, name=name, target=target, config=config, traits=frozenset(traits), **more)


COMPONENTS = [
    component("backend", "toy", ToyBackend),
    component("selector", "toy-selector", ToySelector),
    component("selector", "toy-trial", ToyTrial, "gpu"),
    component("source", "toy-source", ToySource),
    component("source", "toy-teacher-source", ToySource, "teacher"),
    component("distiller", "toy-stage", ToyStage),
    component("distiller", "toy-scratch", ToyStage, "from-scratch"),
    component("distiller", "toy-together", ToyTogether, "ranks"),
    component("draft", "toy-draft", ToyDraft),
    component("decoder", "toy-plain", Nothing, "lossless"),
    component("decoder", "toy-lossless", ToyDecoder, "lossless"),
    component("decoder", "toy-lossy", ToyDecoder),
    component("suite", "toy-score", ToySuite, "score"),
    component("suite", "toy-generate", ToySuite, "generate"),
    component("suite", "toy-pair", ToySuite, "pair"),
    component("suite", "toy-speed", ToySuite, "pair", "alone"),
    component("suite", "toy-quiz", ToyQuiz, "score"),
    component("suite", "toy-answered", ToyAnswered, "generate"),
    component("questions", "toy-asks", ToyQuestions),
    component("judge", "toy-judge", ToyJudge),
    component("suite", "toy-needy", ToySuite, "score", requires=("no-such-package>=1",)),
]


@hookimpl
def mambabench_components() -> list[Component]:
    return COMPONENTS
