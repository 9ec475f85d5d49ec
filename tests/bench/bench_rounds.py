"""Takes rounds of decoding apart on one GPU, with random weights: where the time of a round goes, and tokens a second.

    python tests/bench/bench_rounds.py [--shape 28m 8b] [--batch 1 32] [--k 4] [--temperature 0 1] [--json FILE]

Decoders: plain; a draft of some of the model's own layers, and n-grams, with scripted acceptance of `--accepted` tokens
a round, since drafts of random weights say nothing. Rejected tokens are replayed, or taken back by snapshots of the
state. Times are means of 30 rounds. `--tiny` runs small shapes anywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mambabench.backends.config import HybridConfig
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.stepper import HybridStepper
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import LayersConfig
from mambabench.decoders.scripted import acceptance
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.stepping import LayersDraft
from mambabench.harness.cli.generate import shares
from mambabench.harness.interfaces import Limits, Prompt
from mambabench.harness.mockmodel import MockTokenizer
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "mixers": ["mamba2", "attention"] * 16,
    },
    "28m": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
        "mixers": ["mamba2", "attention"] * 4,
    },
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
EXACT = ("A_log", "D", "dt_bias", "gate_bias")
"""Weights that are fp32 whatever the model's dtype."""


def build(shape: dict[str, Any], device: str) -> HybridStepper:
    """A model of random bf16 weights that are made on the device."""
    with torch.device("meta"):
        model = HybridForCausalLM(HybridConfig(**shape, max_position_embeddings=32_768))
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                kind = torch.float32 if name in EXACT else torch.bfloat16
                made = torch.empty(weight.shape, dtype=kind, device=device)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    model.tie_weights()
    dice = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.uniform_(0, 2.5, generator=dice)
        elif name.endswith("dt_bias"):
            weight.uniform_(-6, -3, generator=dice)
        elif weight.dim() == 1:
            weight.fill_(1)
        else:
            weight.normal_(0, 0.02, generator=dice)
    return HybridStepper(model, MockTokenizer("a" * (shape["vocab_size"] - 1)))


def decoders(k: int, accepted: float, layers: int) -> Iterator[tuple[str, StandardDecoder | SpeculativeDecoder]]:
    rate = acceptance(accepted, k)
    yield "plain", StandardDecoder()
    yield "layers, scripted", SpeculativeDecoder(LayersDraft(LayersConfig(count=layers)), k, script=rate)
    snapshots = SpeculativeDecoder(LayersDraft(LayersConfig(count=layers)), k, script=rate, rollback="snapshot")
    yield "layers, scripted, snapshots", snapshots
    yield "n-grams, scripted", SpeculativeDecoder(NgramDraft(), k, script=rate)
    yield "layers", SpeculativeDecoder(LayersDraft(LayersConfig(count=layers)), k)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", default=["28m", "8b"], choices=SHAPES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--accepted", type=float, default=3.0)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in given.shape:
        shape = SHAPES[name] | (TINY | {"mixers": SHAPES[name]["mixers"][:4]} if given.tiny else {})
        model = build(shape, device)
        for batch in given.batch:
            ids = torch.randint(shape["vocab_size"], (batch, 24 if given.tiny else given.context)).tolist()
            prompts = [Prompt(tuple(row), number) for number, row in enumerate(ids)]
            for temperature in given.temperature:
                limits = Limits(new_tokens=24 if given.tiny else 160, temperature=temperature)
                for what, decoder in decoders(given.k, given.accepted, 2 if name == "8b" else 1):
                    began = time.perf_counter()
                    figures = decoder.profile(model, prompts, limits, 30)
                    sizes = (batch, len(ids[0]) + limits.new_tokens, 1 if what == "plain" else given.k + 1)
                    cost = model.cost(*sizes, "snapshot" if "snapshots" in what else "replay")
                    row = {"shape": name, "batch": batch, "temperature": temperature, "decoder": what}
                    rows.append(row | {title: value for title, (value, _) in figures.items()})
                    tokens = 1.0 if what == "plain" else given.accepted
                    speed = f", {tokens / figures['whole'][0]:.0f} tokens/s a row" if what != "layers" else ""
                    print(f"{name}, batch {batch}, temperature {temperature:g}, {what}{speed}", end=" ")
                    print(f"({time.perf_counter() - began:.1f} s to measure)")
                    share = figures["not in draft or target, share"][0]
                    print("\n".join(shares(figures)), f"\n[not in draft or target {share:.1%}]", end=" ")
                    print(
                        f"[state {cost.held_state_bytes / 1e6:.1f} MB, of a round {cost.state_bytes / 1e6:.1f} MB]\n",
                        flush=True,
                    )
        del model
        gc.collect()
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
