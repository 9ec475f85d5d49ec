"""Times attention of a decoding step over its live cache, in every form that its kernel has, on one GPU:

    python tests/bench/bench_decode_attention.py [--batch 1 8 32] [--context 2048 16384] [--tokens 1 5 16] [--json FILE]

Heads are Llama-3-8B's. Calls are made as a CUDA graph that goes over enough caches for none to be in the L2 cache.
Before a form is timed its output is held against the reference. Beside each time stands what reading the live cache
takes at the measured bandwidth, and PyTorch's attention over the same part of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mambabench.kernels.decode_attention import reference
from mambabench.kernels.decode_attention import triton as room
from mambabench.kernels.tuning import graph_ms
from torch import Tensor

HEADS, GROUPS, WIDTH = 32, 8, 128
COLD = 400 << 20
"""Bytes that the caches of a graph have together, at least."""
CALLS = 32
MOST = 16 << 30
"""Bytes that all caches may have."""
TOLERANCE = 0.01
"""Relative, of bf16 outputs."""


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 12) -> float:
    """Median microseconds of one of `calls`, which a graph makes one after the other."""
    return statistics.median(graph_ms(calls, repeats)[2:]) * 1000 / len(calls)


def bandwidth() -> float:
    """GB/s of reading."""
    whole, out = torch.zeros(1 << 28, device="cuda"), torch.zeros((), device="cuda")
    return whole.nbytes / graph_us([lambda: torch.sum(whole, 0, out=out)] * 4) / 1e3


class Case:
    """The buffers of one batch, context and number of tokens."""

    def __init__(self, batch: int, context: int, count: int) -> None:
        dice = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=dice)

        self.live = 2 * batch * (context + count) * GROUPS * WIDTH * 2
        copies = max(2, min(-(-COLD // self.live), MOST // self.live))
        self.caches = [draw(2, batch, context + count + 64, GROUPS, WIDTH) for _ in range(copies)]
        self.projected = draw(batch * count, (HEADS + 2 * GROUPS) * WIDTH)
        self.queries = draw(batch, GROUPS, HEADS // GROUPS * count, WIDTH)
        self.rotary = draw(context + count + 64, 2, WIDTH)
        self.start = torch.full((batch,), context, dtype=torch.int32, device="cuda")

    def ours(self, cache: Tensor, form: room.Form) -> Tensor:
        return room.decode_attention(self.projected, *cache, self.start, self.rotary, 0, None, form)

    def wrong(self, form: room.Form) -> str:
        """Why the form must not be timed."""
        cache = self.caches[0]
        wanted = reference.decode_attention(self.projected, *cache.clone(), self.start, self.rotary).double()
        apart = float((self.ours(cache, form).double() - wanted).norm() / wanted.norm())
        return "" if apart <= TOLERANCE else f"{apart:.1e} from the reference"

    def time(self, form: room.Form) -> float:
        return graph_us([lambda cache=c: self.ours(cache, form) for c in self._rotated()])

    def plain(self) -> float:
        """PyTorch's attention over the live part, without rotation or writing."""
        reached = int(self.start[0])

        def call(cache: Tensor) -> Tensor:
            keys, values = (t[:, :reached].transpose(1, 2) for t in cache)
            return F.scaled_dot_product_attention(self.queries, keys, values)

        return graph_us([lambda cache=c: call(cache) for c in self._rotated()])

    def _rotated(self) -> list[Tensor]:
        count = max(CALLS, len(self.caches)) if self.live < COLD else 2 * len(self.caches)
        return [self.caches[i % len(self.caches)] for i in range(count)]


def forms(case: Case, count: int) -> list[room.Form]:
    """The one that is chosen, first, and those near it."""
    chosen = room.form_for(case.caches[0][0], HEADS // GROUPS * count, 0)
    parts = sorted({p for p in (chosen.parts // 2, chosen.parts, 2 * chosen.parts, 4 * chosen.parts) if 1 <= p <= 64})
    found = [room.Form(*sizes) for sizes in itertools.product(parts, (32, 64, 128), (2, 3, 4), (4, 8))]
    return [chosen, *(form for form in found if form != chosen)]


def measure(batch: int, context: int, count: int, read: float, every: bool) -> dict[str, Any]:
    case = Case(batch, context, count)
    times: dict[room.Form, float] = {}
    for form in forms(case, count) if every else forms(case, count)[:1]:
        try:
            reason = case.wrong(form)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if reason:
            print(f"  {tuple(form)}: {reason}")
        else:
            times[form] = case.time(form)
    floor, plain, ranked = case.live / read / 1e3, case.plain(), sorted(times, key=times.__getitem__)
    chosen = next(iter(times), None)
    print(
        f"batch {batch}, {context} positions, {count} tokens: "
        + (f"{times[chosen]:.1f} us as {tuple(chosen)}, " if chosen else "no form is right, ")
        + f"floor {floor:.1f} us ({case.live / 1e6:.1f} MB), PyTorch {plain:.1f} us; best "
        + ", ".join(f"{tuple(form)} {times[form]:.1f}" for form in ranked[:4]),
        flush=True,
    )
    return {
        "batch": batch, "context": context, "tokens": count, "bytes": case.live, "floor_us": floor, "plain_us": plain,
        "forms": [{**form._asdict(), "us": times[form]} for form in ranked],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5, 16])
    parser.add_argument("--chosen", action="store_true", help="time only the form that is chosen")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    read = bandwidth()
    print(f"{torch.cuda.get_device_name()}: reading {read:.0f} GB/s; forms are (parts, tile, stages, warps)")
    with torch.inference_mode():
        cases = itertools.product(args.batch, args.context, args.tokens)
        rows = [measure(*case, read, not args.chosen) for case in cases]
    if args.json:
        args.json.write_text(json.dumps({"read": read, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
