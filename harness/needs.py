"""What a plan needs, before anything runs: data, GPU memory and GPU-hours, from the teacher's config.json alone.

These are estimates to choose a machine by. What they rest on is said beside them (`BASIS`); nothing here is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .interfaces import MambabenchError
from .parts import rows_at_a_time
from .plan import Plan
from .steps import TEACHER, Step, Steps

PEAK = 989e12
"""FLOP/s of an H100 or H200 in bf16, dense."""
UTILISATION = 0.4
"""Share of the peak that training reaches."""
BANDWIDTH = 4.8e12
"""Bytes per second of an H200's memory."""
DECODING = 0.6
"""Share of the bandwidth that decoding reaches."""
TRAINED, FROZEN, TEACHING = 16, 2, 2
"""Bytes a weight: fp32 weight, gradient and two moments of Adam; bf16 weight alone; bf16 weight of a teacher."""
GIB = 2.0**30
LEAST = 0.001
"""GPU-hours that are told as a number; less is nothing to choose a machine by."""
REMOVED = "removed"
"""The backend that puts nothing in the attention's place."""
BASIS = (
    f"Estimated for H200 GPUs at {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s, decoding at {DECODING:.0%} of "
    f"{BANDWIDTH / 1e12:.1f} TB/s; fp32 weights, gradients and Adam of what is trained, bf16 weights of what "
    "is not. Measuring is left out."
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder of the Llama family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def mixer(self) -> int:
        """Weights of one attention layer's projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def gate(self) -> int:
        """Weights that a Mamba mixer has more: those of its gate, by far the most of them."""
        return self.hidden * self.head_dim * self.heads

    @property
    def parameters(self) -> int:
        layer = self.mixer + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: all but the embedding."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def attention_flops(self, context: int, layers: int) -> float:
        """FLOPs a token of scores and weighted sums, forward, on average over a causal context."""
        return 2.0 * context * self.heads * self.head_dim * layers


def read_shape(folder: Path) -> Shape:
    """Reads config.json. Raises MambabenchError where it lacks a size."""
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise MambabenchError(f"{file}: no {error.args[0]}, so what the plan needs cannot be estimated") from None
    except (OSError, ValueError) as error:
        raise MambabenchError(f"{file}: cannot be read: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one step takes; None: not known before it runs."""

    label: str
    tokens: int | None = None
    memory: float | None = None
    """Bytes on one GPU."""
    hours: float | None = None
    """GPU-hours."""
    data: str = ""

    def row(self) -> tuple[str, str, str, str, str]:
        """For a table: label, tokens, GiB, GPU-hours, data."""
        return (
            self.label,
            "" if self.tokens is None else f"{self.tokens / 1e6:,.0f} M" if self.tokens >= 1e6 else f"{self.tokens:,}",
            "" if self.memory is None else f"{self.memory / GIB:,.1f}",
            "" if self.hours is None else hours_told(self.hours),
            self.data,
        )


def hours_told(hours: float) -> str:
    """To two digits where they say something."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}" if hours >= LEAST or not hours else f"< {LEAST}"


def needs(plan: Plan, steps: Steps) -> list[Need]:
    """What each step of a plan that makes data or trains takes, in order.

    Raises MambabenchError for a plan that trains its teacher, whose sizes only the trainer knows.
    """
    shape = _teacher(plan)
    return [
        _data(step, shape) if step.kind == "data" else _training(step, plan, shape)
        for step in steps
        if step.kind in ("data", "train")
    ]


def _teacher(plan: Plan) -> Shape:
    """From its folder, or from the options of the stage that draws it at random."""
    if plan.teacher.path is not None:
        return read_shape(Path(plan.teacher.path))
    made = plan.stages[plan.teacher.train[0]].config if plan.teacher.train else None
    if not getattr(made, "vocabulary", 0):
        raise MambabenchError(
            f"{plan.file}: what a plan needs is estimated from its teacher's config.json; this one trains its teacher"
        )
    options: Any = made
    return Shape(
        layers=options.layers,
        hidden=options.hidden,
        intermediate=options.intermediate,
        heads=options.heads,
        kv_heads=options.kv_heads or options.heads,
        head_dim=options.head_dim or options.hidden // options.heads,
        vocabulary=options.vocabulary,
        tied=bool(options.tied),
    )


def _asked(config: Mapping[str, Any], plan: Plan, shape: Shape) -> Shape:
    """The shape of the model that a divergence asks; one without a folder of its own is as large as the teacher."""
    named = plan.models.get(config.get("teacher") or "")
    return read_shape(Path(named.path)) if named and named.path else shape


def _data(step: Step, shape: Shape) -> Need:
    config, label = step.record["component"]["config"], step.labels[0]
    if "teacher" in step.inputs and "new_tokens" in config and {"documents", "pairs"} & config.keys():
        batch, new = int(config["batch"]), int(config["new_tokens"])
        unit = "pairs" if "pairs" in config else "documents"
        tokens = int(config[unit]) * new
        reading = shape.parameters * TEACHING / (BANDWIDTH * DECODING)
        computing = 2 * shape.multiplied * batch / (PEAK * UTILISATION)
        cache = 4 * shape.layers * shape.kv_heads * shape.head_dim * batch * (new + int(config.get("prompt_tokens", 0)))
        return Need(
            label=label,
            tokens=tokens,
            memory=shape.parameters * TEACHING + cache,
            hours=tokens / batch * max(reading, computing) / 3600,
            data=f"at most {config[unit]:,} {unit} of {new:,} new tokens, written by the teacher",
        )
    if config.get("name"):
        return Need(label=label, data=f"hf:{config['name']}, split {config.get('split', 'train')}")
    files = [entry["file"] for entry in step.record["data"].values() if "file" in entry]
    return Need(label=label, data=", ".join(files) or step.record["component"]["name"])


def _training(step: Step, plan: Plan, shape: Shape) -> Need:
    config: Mapping[str, Any] = step.record["component"]["config"]
    if "parent" not in step.inputs:
        return Need(label=step.labels[0], memory=FROZEN * shape.parameters, data="drawn at random")
    asked = _asked(config, plan, shape)
    own = plan.models[step.record["model"]].path if step.record["model"] != TEACHER else None
    shape = read_shape(Path(own)) if own else shape
    kept = _kept(plan, step.record["model"], shape.layers)
    converted = shape.layers - kept
    # A gate more than the attention has, or the attention less.
    more = -shape.mixer if (step.record["backend"] or {}).get("name") == REMOVED else shape.gate
    parameters = shape.parameters + converted * more
    multiplied = shape.multiplied + converted * more
    mixers = list(config.get("train", ())) == ["mixers"]
    trained = converted * (shape.mixer + more) if mixers else parameters
    taught = bool(config.get("kl")) or "reference" in config
    context = int(config.get("context", 2048))
    forward = 2 * multiplied + shape.attention_flops(context, kept)
    flops = (3 if config.get("checkpointing") else 2) * forward + 2 * min(trained, multiplied)
    if taught:
        flops += 2 * asked.multiplied + asked.attention_flops(context, asked.layers)
    tokens = int(config["tokens"]) if "tokens" in config else None
    ranks = step.needs.ranks
    windows = rows_at_a_time(int(config.get("batch", ranks)), int(config.get("accumulation", 1)), ranks)
    rows, again = windows * (1 if "tokens" in config else 2), bool(config.get("checkpointing"))
    taught_bytes = asked.parameters * TEACHING if taught and not config.get("precompute") else 0
    weights = trained * TRAINED + (parameters - trained) * FROZEN + taught_bytes
    return Need(
        label=step.labels[0],
        tokens=tokens,
        memory=weights / (ranks if config.get("parallel") == "fsdp" else 1)
        + _activations(shape, rows * context, int(config.get("slice") or 0), taught, again),
        hours=None if tokens is None else tokens * flops / (PEAK * UTILISATION) / 3600,
        data="" if tokens is not None else "as many tokens as its pairs have",
    )


def _activations(shape: Shape, tokens: int, positions: int, taught: bool, again: bool) -> float:
    """Bytes kept for backward in bf16: per layer some twelve vectors of the residual stream's width and four of the
    MLP's (or what enters it, if it is computed `again`), and the logits in fp32 with their gradient, of all tokens or
    of a slice of positions."""
    inside = 2.0 * tokens * (12 * shape.hidden + 4 * shape.intermediate)
    layers = inside + 2.0 * tokens * shape.layers * shape.hidden if again else inside * shape.layers
    return layers + 4.0 * min(tokens, positions or tokens) * shape.vocabulary * (3 if taught else 2)


def _kept(plan: Plan, model: str, layers: int) -> int:
    """Attention layers of a model of the plan."""
    if model == TEACHER:
        return layers
    selector = plan.models[model].selector
    config = selector.config if selector else None
    chosen = getattr(config, "layers", None)
    return len(chosen) if chosen is not None else round(getattr(config, "share", 1.0) * layers)
