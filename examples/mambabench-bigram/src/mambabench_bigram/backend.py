"""A model that knows one token of context: its logits after token t are row t of a table.

The table is filled by asking the teacher once for every token of the vocabulary, so there is nothing to train.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from mambabench import Cost, Scores, Unsupported
from mambabench.harness.plugins import make, registry
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .plugin import BigramConfig

if TYPE_CHECKING:
    from mambabench.harness.interfaces import Backend, Stepper, Tokenizer
    from torch import nn

LARGEST = 16384
"""Tokens of the largest vocabulary that is taken: a table of 1 GiB in fp32."""


class Bigram:
    """The backend `bigram`: an artifact holds `bigram.safetensors`, `bigram.json` and the teacher's tokenizer."""

    def __init__(self, config: BigramConfig) -> None:
        self.config = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Asks the parent, a model that the backend `teacher` reads, for its logits after each token alone."""
        if keep:
            raise Unsupported(f"a bigram model has no attention layers to keep: write keep = 0, not {list(keep)}")
        reader: Backend = make(registry().find("backend", "teacher"))
        vocabulary = int(reader.describe(parent)["vocab_size"])
        if vocabulary > LARGEST:
            raise Unsupported(f"a bigram table of {vocabulary} x {vocabulary} is too large (at most {LARGEST} tokens)")
        model = reader.load(parent, "cpu", "float32")
        table = torch.cat([_after(model, tokens) for tokens in torch.arange(vocabulary).split(self.config.batch)])
        out.mkdir(parents=True, exist_ok=True)
        save_file({"logits": table.contiguous()}, out / "bigram.safetensors")
        (out / "bigram.json").write_text(json.dumps({"max_context": model.max_context}), encoding="utf-8")
        self.tokenizer(parent).save_pretrained(out)  # type: ignore[attr-defined]

    def describe(self, artifact: Path) -> Mapping[str, Any]:
        with safe_open(artifact / "bigram.safetensors", "pt") as file:
            vocabulary = file.get_slice("logits").get_shape()[0]
        return {
            "layers": 1,
            "attention_layers": [],
            "parameters": vocabulary * vocabulary,
            "weight_bytes": (artifact / "bigram.safetensors").stat().st_size,
            "vocab_size": vocabulary,
            **_sizes(artifact),
        }

    def load(self, artifact: Path, device: str, dtype: str) -> BigramStepper:
        table = load_file(artifact / "bigram.safetensors", device)["logits"].to(getattr(torch, dtype))
        return BigramStepper(table, self.tokenizer(artifact), _sizes(artifact)["max_context"])

    def module(self, artifact: Path) -> nn.Module:
        self._refuse_training()

    def save(self, module: nn.Module, out: Path, like: Path) -> None:
        self._refuse_training()

    def tokenizer(self, artifact: Path) -> Tokenizer:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(artifact)

    def _refuse_training(self) -> NoReturn:
        raise Unsupported("a bigram model is counted, not trained: leave `train` out")


@dataclass(slots=True)
class BigramState:
    """Which positions of each row are settled and where it ends; logits need the last token only."""

    steps: int
    room: int
    settled: Tensor
    end: Tensor


class BigramStepper:
    """Looks up rows of the table, and holds callers to the contract of positions."""

    traits = frozenset({"rollback"})

    def __init__(self, table: Tensor, tokenizer: Tokenizer, max_context: int) -> None:
        self.table = table
        self.tokenizer = tokenizer
        self.vocab_size = table.shape[1]
        self.max_context = max_context
        self.device = str(table.device)
        self.dtype = str(table.dtype).removeprefix("torch.")

    def open(self, batch: int, context: int, steps: int) -> BigramState:
        empty = torch.zeros(batch, dtype=torch.int32, device=self.device)
        return BigramState(steps, context + steps, empty, empty.clone())

    def prefill(self, ids: Tensor, lengths: Tensor, state: BigramState, start: Tensor | None = None) -> Tensor:
        """ids int64 [B, L], lengths int32 [B] -> logits [B, V] after each row's last token."""
        begin = torch.zeros_like(state.end) if start is None else start.to(state.end)
        end = torch.where(lengths.to(state.end) > 0, begin + lengths.to(state.end), state.end)
        if bool((end > state.room).any()):
            raise ValueError(f"a row of {int(end.max())} tokens does not fit into {state.room} positions")
        state.settled, state.end = torch.where(lengths.to(end) > 0, end, state.settled), end
        last = (lengths.long() - 1).clamp(min=0)[:, None]
        return self._logits(ids.gather(1, last)[:, 0])

    def advance(self, ids: Tensor, start: Tensor, state: BigramState, settle: bool = True) -> Tensor:
        """ids int64 [B, T], start int32 [B] -> logits [B, T, V]."""
        end = start.to(state.end) + ids.shape[1]
        if bool(((start < state.settled) | (start > state.end)).any()):
            raise ValueError(f"start {start.tolist()} lies outside {state.settled.tolist()} … {state.end.tolist()}")
        settled = start.to(state.settled).clone() if settle else state.settled
        if bool((end - settled > state.steps).any()) or bool((end > state.room).any()):
            raise ValueError(f"{ids.shape[1]} tokens at {start.tolist()} do not fit into {state.steps} revocable steps")
        state.settled, state.end = settled, end
        return self._logits(ids)

    def take(self, state: BigramState, rows: Tensor) -> None:
        state.settled, state.end = state.settled[rows], state.end[rows]

    def score(self, ids: Tensor, lengths: Tensor) -> Scores:
        """ids int64 [B, L] -> log-probability (nat) and is-argmax of each next token, [B, L - 1]."""
        logits = self._logits(ids[:, :-1])
        following = ids[:, 1:, None]
        best = logits.amax(-1, keepdim=True)
        # Of equal logits the lowest index wins; argmax makes no such promise.
        tokens = torch.arange(self.vocab_size, device=logits.device)
        first = torch.where(logits == best, tokens, self.vocab_size).amin(-1)
        return Scores(logits.log_softmax(-1).gather(2, following)[..., 0], first == ids[:, 1:])

    def cost(self, batch: int, context: int, steps: int) -> Cost:
        row = self.vocab_size * self.table.element_size()
        return Cost(
            weight_bytes=batch * steps * row,
            kv_bytes=0,
            state_bytes=0,
            flops=0,
            held_weight_bytes=self.table.nbytes,
            held_kv_bytes=0,
            held_state_bytes=0,
        )

    def _logits(self, ids: Tensor) -> Tensor:
        rows = self.table[ids]
        return rows if rows.dtype is torch.float64 else rows.float()


def _after(model: Stepper, tokens: Tensor) -> Tensor:
    """tokens int64 [B] -> logits fp32 [B, V] of what follows each of them as the first token of a text."""
    with torch.no_grad():
        lengths = torch.ones(len(tokens), dtype=torch.int32)
        return model.prefill(tokens[:, None], lengths, model.open(len(tokens), 1, 1))


def _sizes(artifact: Path) -> dict[str, int]:
    sizes: dict[str, int] = json.loads((artifact / "bigram.json").read_text(encoding="utf-8"))
    return sizes
