"""mambabench: how much of a Transformer can become Mamba, what that costs in quality, and what it buys in speed.

The names below are what plug-ins import. Nothing here imports torch.
"""

from .harness.hooks import hookimpl
from .harness.interfaces import (
    Answer,
    Artifact,
    Bench,
    Choice,
    ChoiceOf,
    Component,
    Cost,
    DataRef,
    FileRef,
    Job,
    Limits,
    MambabenchError,
    ModelRef,
    Needs,
    Prompt,
    Refusal,
    Review,
    Scores,
    Subject,
    Unsupported,
    Verdict,
)

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Artifact",
    "Bench",
    "Choice",
    "ChoiceOf",
    "Component",
    "Cost",
    "DataRef",
    "FileRef",
    "Job",
    "Limits",
    "MambabenchError",
    "ModelRef",
    "Needs",
    "Prompt",
    "Refusal",
    "Review",
    "Scores",
    "Subject",
    "Unsupported",
    "Verdict",
    "__version__",
    "hookimpl",
]
