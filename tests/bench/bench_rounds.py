"""Takes rounds of decoding apart on one GPU, with random weights: where the time of a round goes, and tokens a second.

    python tests/bench/bench_rounds.py [--shape 28m 8b] [--batch 1 32] [--k 4] [--temperature 0 1] [--mixers NAME …]
        [--rotated | --neutral] [--json FILE]

Decoders: plain; a draft of some of the model's own layers, and n-grams, with scripted acceptance of `--accepted` tokens
a round, since drafts of random weights say nothing. Rejected tokens are replayed, or taken back by snapshots of the
state. Times are means of 30 rounds. `--tiny` runs small shapes anywhere, `--mixers` have the layers' mixers in turn,
with `--rotated` B and C are turned by their positions; with `--neutral` layers are those of `plans/gpu/drafts.toml`:
turned, without SiLU and norm, their gate biased.

`--rollbacks` measures in their place what the target does in a round, by how it takes rejected tokens back: by replay,
by snapshots, and for the record by re-decoding: a round runs on a copy of the recurrent states, and then the tokens
that stand are run from the states themselves, by a call of their own. Every row keeps the nearest whole number of
tokens to `--accepted`; a batch whose rows differ would have to pad that call. Below stands what the matrix products
alone take of a step and of a round, one after the other by cuBLAS.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mambabench.backends.config import HybridConfig
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.state import KVCache, State
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
from mambabench.kernels.tuning import graph_ms
from torch import Tensor, nn

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
ROOM = 40
"""Rounds for which there is room behind the context."""
EXACT = ("A_log", "D", "dt_bias", "gate_bias")
"""Weights that are fp32 whatever the model's dtype."""
ROTATED = {"mamba_rope": True}
NEUTRAL = ROTATED | {"mamba_activation": "none", "mamba_norm": "none", "mamba_gate_bias": True}


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


@torch.inference_mode()
def rollbacks(model: HybridStepper, texts: Tensor, context: int, k: int, kept: int) -> list[dict[str, Any]]:
    """Seconds of the target's work of a round and the bytes of states that it needs, by strategy; texts int64 [B, L]
    go on behind the context, and each round keeps so many of its K + 1 tokens. `off` is the largest difference of
    logits from those of replay: all do the same."""
    batch, room = len(texts), texts.shape[1] - context
    lengths = torch.full((batch,), context, dtype=torch.int32, device=model.device)
    rows: list[dict[str, Any]] = []
    wanted: Tensor | None = None
    for name in ("plain step", "replay", "snapshots", "re-decoding"):
        count, stays = (1, 1) if name == "plain step" else (k + 1, kept)
        given = {"rollback": "snapshot"} if name == "snapshots" else {}
        state = model.open(batch, context + room, count, **given)
        model.prefill(texts[:, :context], lengths, state)
        checkpoint = None
        if name == "re-decoding":
            checkpoint = model.open(batch, context + room, count)
            for to, of in zip(checkpoint.tensors(), state.tensors(), strict=True):
                to.copy_(of)
        logits = torch.zeros(batch, count, model.vocab_size, device=model.device)
        work = _round(model, texts, lengths.clone(), count, stays, logits, state, checkpoint)
        seconds = _of_a_round(model, state, work, room // (k + 1) - 4)
        cost = model.cost(batch, context, count, *given.values())
        held = cost.held_state_bytes
        if name == "re-decoding":
            held = 2 * rows[0]["state bytes"]
        off = None if name == "plain step" else 0.0 if wanted is None else float((logits - wanted).abs().max())
        wanted = logits if name == "replay" else wanted
        rows.append({"rollback": name, "seconds": seconds, "state bytes": held, "off": off})
    return rows


def compare_rollbacks(
    model: HybridStepper, name: str, batch: int, context: int, k: int, kept: int
) -> list[dict[str, Any]]:
    """Prints the strategies below each other, over a plain step."""
    shape = batch, context + ROOM * (k + 1)
    texts = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    rows = rollbacks(model, texts, context, k, kept)
    print(f"{name}, batch {batch}, context {context}, K = {k}, {kept} tokens a round: work of the target")
    print(f"{'':12} {'ms':>8} {'steps':>6} {'state MB':>9} {'of plain':>8} {'logits off':>10}")
    for row in rows:
        seconds, held = (row[of] / rows[0][of] for of in ("seconds", "state bytes"))
        off = "" if row["off"] is None else f"{row['off']:.2g}"
        print(f"{row['rollback']:12} {1e3 * row['seconds']:8.3f} {seconds:6.3f}", end=" ")
        print(f"{row['state bytes'] / 1e6:9.1f} {held:8.2f} {off:>10}", flush=True)
    step, whole = (products(model, batch * count) for count in (1, k + 1))
    print(f"products alone {1e3 * step:.3f} ms, of a round {1e3 * whole:.3f} ms: {whole / step:.3f} steps", flush=True)
    sizes = {"shape": name, "batch": batch, "context": context, "k": k, "kept": kept}
    return [sizes | {"products": {"step": step, "round": whole}} | row for row in rows]


def weights_of(model: HybridStepper) -> list[Tensor]:
    """Of a call's matrix products, as it has them; those of the step sizes of Mamba-1 are left out."""
    pairs = [pair for layer in model.model.model.layers for pair in (layer._mixing, layer._inner) if pair]
    return [*(end.weight for pair in pairs for end in pair), model.model.lm_head.weight]


@torch.inference_mode()
def products(model: HybridStepper, rows: int, repeats: int = 9) -> float:
    """Seconds of the bare matrix products of a call with so many tokens in all."""
    calls = []
    for weight in weights_of(model):
        x = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
        calls.append(partial(F.linear, x, weight))
    if weight.is_cuda:
        return statistics.median(graph_ms(calls, repeats)) / 1e3
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def _round(
    model: HybridStepper,
    texts: Tensor,
    start: Tensor,
    count: int,
    stays: int,
    logits: Tensor,
    state: State,
    checkpoint: State | None,
) -> Callable[[], None]:
    """What the target does from `start` [B] on; nothing of it waits for the host."""
    ahead = torch.arange(count, device=start.device)

    def work() -> None:
        ids = texts.gather(1, start.long().unsqueeze(1) + ahead)
        if checkpoint is not None:
            torch._foreach_copy_(recurrent(state), recurrent(checkpoint))
        logits.copy_(model.advance(ids, start, state))
        if checkpoint is not None:
            model.advance(ids[:, :stays].contiguous(), start, checkpoint)
        start.add_(stays)

    return work


def recurrent(state: State) -> list[Tensor]:
    """All that calls change but keys and values: of those what lies behind the start is no longer read."""
    layers = [layer for layer in state.layers if not isinstance(layer, KVCache)]
    return [*state.cursors, *(tensor for layer in layers for tensor in layer.tensors())]


def _of_a_round(model: HybridStepper, state: State, work: Callable[[], None], rounds: int) -> float:
    """Mean seconds, recorded where the model records."""
    recording = model.recording(state)
    if recording is None:
        work()
        began = time.perf_counter()
        for _ in range(rounds):
            work()
        return (time.perf_counter() - began) / rounds
    for _ in range(2):
        with recording.unrecorded():
            work()
    play = recording.record(work)
    play()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(rounds):
        play()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / rounds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", default=["28m", "8b"], choices=SHAPES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--accepted", type=float, default=3.0)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--mixers", nargs="+", choices=["mamba2", "mamba", "attention"], help="of the layers, in turn")
    kinds = parser.add_mutually_exclusive_group()
    for flag, kind in (("--rotated", ROTATED), ("--neutral", NEUTRAL)):
        kinds.add_argument(flag, action="store_const", const=kind, dest="kind", default={})
    parser.add_argument("--rollbacks", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in given.shape:
        shape = SHAPES[name] | (TINY | {"mixers": SHAPES[name]["mixers"][:4]} if given.tiny else {})
        if given.mixers:
            layers = len(shape["mixers"])
            shape |= {"mixers": (given.mixers * layers)[:layers]}
        model = build(shape | given.kind, device)
        for batch in given.batch:
            context = 24 if given.tiny else given.context
            if given.rollbacks:
                rows += compare_rollbacks(model, name, batch, context, given.k, round(given.accepted))
                continue
            ids = torch.randint(shape["vocab_size"], (batch, context)).tolist()
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
