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
import runpy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from mambabench.kernels.decode_attention import reference
from mambabench.kernels.decode_attention import triton as room
from mambabench.kernels.tuning import graph_ms
from torch import Tensor

inputs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("inputs.py"))))
SHAPE = "Llama-3-8B"
HEADS, GROUPS, WIDTH = inputs.HEADS[SHAPE]
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
        torch.manual_seed(0)
        self.live = inputs.live_bytes(SHAPE, batch, context, count)
        copies = max(2, min(-(-COLD // self.live), MOST // self.live))
        self.given = [inputs.attention(SHAPE, batch, context, count) for _ in range(copies)]
        self.queries = torch.randn(
            batch, GROUPS, HEADS // GROUPS * count, WIDTH, device=self.given[0].keys.device, dtype=torch.bfloat16
        )

    def ours(self, given: Any, form: room.Form) -> Tensor:
        return room.decode_attention(*given, 0, None, form)

    def wrong(self, form: room.Form) -> str:
        """Why the form must not be timed."""
        given = self.given[0]
        copy = given._replace(keys=given.keys.clone(), values=given.values.clone())
        wanted = reference.decode_attention(*copy).double()
        apart = float((self.ours(given, form).double() - wanted).norm() / wanted.norm())
        return "" if apart <= TOLERANCE else f"{apart:.1e} from the reference"

    def time(self, form: room.Form) -> float:
        return graph_us([lambda given=g: self.ours(given, form) for g in self._rotated()])

    def plain(self) -> float:
        """PyTorch's attention over the live part, without rotation or writing."""
        reached = int(self.given[0].start[0])

        def call(given: Any) -> Tensor:
            keys, values = (t[:, :reached].transpose(1, 2) for t in (given.keys, given.values))
            return F.scaled_dot_product_attention(self.queries, keys, values)

        return graph_us([lambda given=g: call(given) for g in self._rotated()])

    def _rotated(self) -> list[Any]:
        count = max(CALLS, len(self.given)) if self.live < COLD else 2 * len(self.given)
        return [self.given[i % len(self.given)] for i in range(count)]


def forms(case: Case, count: int) -> list[room.Form]:
    """The one that is chosen, first, and those near it."""
    chosen = room.form_for(case.given[0].keys, HEADS // GROUPS * count, 0)
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
