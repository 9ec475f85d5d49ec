"""The built-in tables and renderers, and the command `report`."""

from __future__ import annotations

from collections.abc import Iterable

from ..harness.hooks import hookimpl
from ..harness.interfaces import Component
from .options import NoOptions

TABLES = (
    ("quality", "quality:Quality", "Each metric of each model beside its teacher's, with errors and recovery"),
    ("aggregates", "aggregates:Aggregates", "Metrics of lm-eval that are no mean over items, with errors"),
    ("differences", "differences:Differences", "Every metric less its teacher's, paired by item, with intervals"),
    ("recall", "recall:Recall", "What models look up in the text before them, chosen and written, and how far back"),
    ("recall-distance", "recall:RecallDistance", "The same by length of the text and place of the answer"),
    ("agreement", "agreement:Agreement", "KL to the teacher and equal likeliest tokens, by depth in the text"),
    ("distillation", "distillation:Distillation", "Distance from the teacher and what training took, a row per model"),
    ("speculation", "speculation:Speculation", "Decoders that draft: acceptance, speed-up, prediction and checks"),
    ("speed", "speed:Speed", "Latency, throughput, speed-up and memory per decoder"),
    ("training-speed", "training_speed:TrainingSpeed", "Time, memory and arithmetic of training steps"),
    ("acceptance", "acceptance:Acceptance", "Accepted lengths of speculative decoding, by position"),
    ("acceptance-map", "acceptance_map:AcceptanceMap", "Speed-up at scripted acceptance, by K, batch and prompt"),
    ("rounds", "rounds:Rounds", "Where the time of a decoding round goes: draft, target, picks, gaps, the host"),
    ("losslessness", "losslessness:Losslessness", "Texts and tokens that are those of plain decoding"),
    ("init-fidelity", "fidelity:Fidelity", "How near converted models are to their teacher, before and after training"),
    ("init-fidelity-layers", "fidelity:FidelityLayers", "The same of each converted layer"),
    ("cost", "cost:Cost", "What each stage of training took"),
    ("answers", "judging:Answers", "What models answered in chats: how many, how long, how many cut short"),
    ("judges", "judging:Judging", "Requests, failures, tokens and cost of each judge"),
    ("steps", "cost:Steps", "Every label with its state"),
)
RENDERERS = (
    ("md", "markdown:Markdown", "One Markdown file with pictures beside it"),
    ("html", "html:Html", "One page without scripts, light and dark"),
    ("csv", "csv:Csv", "One file per table, in full precision"),
)


@hookimpl
def mambabench_components() -> Iterable[Component]:
    for kind, components in (("table", TABLES), ("renderer", RENDERERS)):
        for name, target, summary in components:
            yield Component(
                kind=kind, name=name, target=f"mambabench.reports.{target}", config=NoOptions, summary=summary
            )
    yield Component(
        kind="command",
        name="report",
        target="mambabench.reports.cli:report",
        config=NoOptions,
        summary="Print the tables of stores and write them as md, csv and html",
    )
