"""The harness's own components: the built-in suites, judges and launchers."""

from __future__ import annotations

from collections.abc import Iterable

from .hooks import hookimpl
from .interfaces import Component
from .judges.configs import OpenAIConfig, RecordedConfig
from .launchers.configs import LocalConfig, RayConfig
from .suites.chat_configs import (
    AlpacaEvalConfig,
    AlpacaEvalQuestionsConfig,
    MtBenchConfig,
    MtBenchQuestionsConfig,
    ReasoningConfig,
    ReasoningQuestionsConfig,
)
from .suites.configs import (
    AgreementConfig,
    DivergenceConfig,
    LmEvalConfig,
    LosslessnessConfig,
    PerplexityConfig,
    PreferencesConfig,
    RecallConfig,
    SpeedConfig,
)


@hookimpl
def mambabench_components() -> Iterable[Component]:
    return (
        Component(
            kind="suite",
            name="lm-eval",
            target="mambabench.harness.suites.lm_eval:LmEval",
            config=LmEvalConfig,
            revision=2,
            requires=("lm-eval>=0.4.13",),
            traits=frozenset({"score"}),
            summary="Tasks of the LM evaluation harness, its own or from local YAML files",
        ),
        Component(
            kind="suite",
            name="perplexity",
            target="mambabench.harness.suites.perplexity:Perplexity",
            config=PerplexityConfig,
            traits=frozenset({"score"}),
            summary="Negative log-likelihood per token and per byte of given documents",
        ),
        Component(
            kind="suite",
            name="divergence",
            target="mambabench.harness.suites.divergence:Divergence",
            config=DivergenceConfig,
            traits=frozenset({"score"}),
            summary="KL(teacher || model) per token of given documents",
        ),
        Component(
            kind="suite",
            name="agreement",
            target="mambabench.harness.suites.agreement:Agreement",
            config=AgreementConfig,
            traits=frozenset({"score"}),
            summary="KL(teacher || model) and equal likeliest tokens, by depth in given documents",
        ),
        Component(
            kind="suite",
            name="preferences",
            target="mambabench.harness.suites.preferences:Preferences",
            config=PreferencesConfig,
            traits=frozenset({"score"}),
            summary="How often the chosen answer of a pair is the more likely one",
        ),
        Component(
            kind="suite",
            name="recall",
            target="mambabench.harness.suites.recall:Recall",
            config=RecallConfig,
            traits=frozenset({"score"}),
            summary="Phone book, needle, several keys, copying: chosen and written, by distance and length",
        ),
        Component(
            kind="suite",
            name="reasoning",
            target="mambabench.harness.suites.reasoning:Reasoning",
            config=ReasoningConfig,
            traits=frozenset({"generate"}),
            summary="GSM8K and CRUXEval by reasoning in a chat, as ZeroEval puts and scores them",
        ),
        Component(
            kind="suite",
            name="mt-bench",
            target="mambabench.harness.suites.mt_bench:MtBench",
            config=MtBenchConfig,
            traits=frozenset({"generate"}),
            summary="Answers in two turns, rated 1 to 10 by a judge, as FastChat does",
        ),
        Component(
            kind="suite",
            name="alpaca-eval",
            target="mambabench.harness.suites.alpaca_eval:AlpacaEval",
            config=AlpacaEvalConfig,
            requires=("alpaca-eval>=0.6.6",),
            traits=frozenset({"generate"}),
            summary="How often a judge prefers the answers to a reference's, at any length and at equal lengths",
        ),
        Component(
            kind="suite",
            name="losslessness",
            target="mambabench.harness.suites.losslessness:Losslessness",
            config=LosslessnessConfig,
            traits=frozenset({"pair"}),
            summary="Is greedy text that of plain decoding? In float64 token for token, below it but for near ties",
        ),
        Component(
            kind="suite",
            name="speed",
            target="mambabench.harness.suites.speed:Speed",
            config=SpeedConfig,
            traits=frozenset({"pair", "alone"}),
            summary="Latency of a decoder beside plain decoding, alternating on the same prompts",
        ),
        Component(
            kind="questions",
            name="reasoning",
            target="mambabench.harness.suites.reasoning:ReasoningQuestions",
            config=ReasoningQuestionsConfig,
            summary="What the suite reasoning has models answer",
        ),
        Component(
            kind="questions",
            name="mt-bench",
            target="mambabench.harness.suites.mt_bench:MtBenchQuestions",
            config=MtBenchQuestionsConfig,
            summary="What the suite mt-bench has models answer",
        ),
        Component(
            kind="questions",
            name="alpaca-eval",
            target="mambabench.harness.suites.alpaca_eval:AlpacaEvalQuestions",
            config=AlpacaEvalQuestionsConfig,
            summary="What the suite alpaca-eval has models answer",
        ),
        Component(
            kind="judge",
            name="openai",
            target="mambabench.harness.judges.client:OpenAIJudge",
            config=OpenAIConfig,
            requires=("openai>=2",),
            summary="A model behind any endpoint that speaks OpenAI's protocol",
        ),
        Component(
            kind="judge",
            name="recorded",
            target="mambabench.harness.judges.recording:RecordedJudge",
            config=RecordedConfig,
            summary="What a judge said in an earlier run",
        ),
        Component(
            kind="launcher",
            name="local",
            target="mambabench.harness.launchers.local:LocalLauncher",
            config=LocalConfig,
            summary="Child processes on this machine",
        ),
        Component(
            kind="launcher",
            name="ray",
            target="mambabench.harness.launchers.cluster:RayLauncher",
            config=RayConfig,
            requires=("ray>=2.50",),
            summary="Child processes on the machines of a Ray cluster, with the store in a folder that they share",
        ),
    )
