"""Times the reading of prompts on one GPU, with random weights, as a graph and kernel by kernel.

    python tests/bench/bench_prefill.py [--shape mamba2-2.7b 8b 28m] [--batch 1] [--tokens 128 512 1920] [--profile]

Medians in milliseconds: until the host has launched a prompt, and until its logits are there. `first` is the first use
of a length, which loads and tunes kernels, `recording` the second, `memory` what graphs hold beside weights and states
in MiB. Both ways must give the same bits. `--profile` lists the kernels of the longest prompt. `--tiny` runs small
shapes anywhere, kernel by kernel.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mambabench.backends.state import State
from mambabench.backends.stepper import HybridStepper
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

rounds = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bench_rounds.py"))))
SHAPES: dict[str, dict[str, Any]] = {
    "mamba2-2.7b": {
        "hidden_size": 2560,
        "intermediate_size": 0,
        "num_attention_heads": 80,
        "head_dim": 64,
        "vocab_size": 50_288,
        "tie_word_embeddings": True,
        "mixers": ["mamba2"] * 64,
        "mamba_heads": 80,
        "mamba_head_dim": 64,
    },
    **rounds.SHAPES,
}
TINY = rounds.TINY | {"head_dim": 16}
STEPS, TIMES = 5, 10


def synchronize(model: HybridStepper) -> None:
    if model.device != "cpu":
        torch.cuda.synchronize()


def timed(model: HybridStepper, run: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Milliseconds until the host has launched it, until it has ended, and the logits."""
    synchronize(model)
    began = time.perf_counter()
    logits = run()
    launched = time.perf_counter()
    synchronize(model)
    return 1e3 * (launched - began), 1e3 * (time.perf_counter() - began), logits


def measure(model: HybridStepper, batch: int, tokens: int) -> tuple[dict[str, float], Callable[[], Tensor]]:
    """One row of the table, and what reads such a prompt once more."""
    ids = torch.randint(model.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    lengths, counts = torch.full((batch,), tokens, dtype=torch.int32, device=model.device), [tokens] * batch
    state: State = model.open(batch, tokens + 64, STEPS)

    def read() -> Tensor:
        return model.prefill(ids, lengths, state, counts=counts)

    row: dict[str, float] = {"batch": batch, "tokens": tokens, "first": timed(model, read)[1]}
    held = torch.cuda.memory_reserved() if model.graphs else 0
    if model.graphs:
        row["recording"] = timed(model, read)[1]
    found = {}
    for way in ("graph", "kernels") if model.graphs else ("kernels",):
        with nullcontext() if way == "graph" or state.graphs is None else state.graphs.unrecorded():
            timed(model, read)
            launched, ended, logits = zip(*(timed(model, read) for _ in range(TIMES)), strict=True)
        row |= {f"{way}, host": statistics.median(launched), way: statistics.median(ended)}
        found[way] = logits[-1]
        assert not logits[-1].isnan().any()
    if model.graphs:
        row["memory"] = (torch.cuda.memory_reserved() - held) / 2**20
        assert torch.equal(found["graph"], found["kernels"]), f"{batch} x {tokens}: other logits by the graph"
    return row, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["mamba2-2.7b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 1920])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    for name in given.shape:
        shape = SHAPES[name]
        small = TINY | {"mixers": shape["mixers"][:2]}
        model = rounds.build(shape | (small if given.tiny else {}), "cpu" if given.tiny else "cuda")
        for batch in given.batch:
            for tokens in [24] if given.tiny else given.tokens:
                row, read = measure(model, batch, tokens)
                print(f"{name:12}", *(f"{what} {value:.4g}" for what, value in row.items()), sep="  ", flush=True)
        print(name, *(f"{what} {value:.4g}" for what, (value, _) in model.facts().items()), sep="  ")
        if given.profile:
            activities = [ProfilerActivity.CPU, *([] if given.tiny else [ProfilerActivity.CUDA])]
            with profile(activities=activities) as seen:
                timed(model, read)
            order = "self_cpu_time_total" if given.tiny else "self_cuda_time_total"
            print(seen.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
        del model, read


if __name__ == "__main__":
    main()
