"""Times products of a few rows with the weights of a decoding step, in every form that their kernel has, on one GPU:

    python tests/bench/bench_few_rows.py [--shapes qkv head …] [--rows 1 5 8 16] [--no-layers] [--json FILE]

Calls are made as a CUDA graph that goes over enough weights for none to be in the L2 cache. Before a form is timed its
output is held against fp32 arithmetic. Beside each time stands cuBLAS's for the bare product, without the norm, gate or
sum that is part of ours. Then a layer of Llama-3-8B at a context of 2,048: as it is with kernels of its own for each of
these, and with ours, begun early or not, in forms that were the fastest begun early or not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from mambabench.kernels.decode_attention.triton import decode_attention, form_for
from mambabench.kernels.few_rows import triton as room
from mambabench.kernels.pointwise.triton import swiglu_packed
from mambabench.kernels.rms_norm.triton import add_forward
from mambabench.kernels.tuning import graph_ms, side_by_side
from torch import Tensor

COLD = 300 << 20
"""Bytes of the weights of a graph, at least."""
CALLS = 16
EPS = 1e-5
TOLERANCE = 0.01
"""Relative, of bf16 outputs."""
CONTEXT = 2048
LAYERS = 4
EVERY = (*room.FORMS, *room.APART)
NAMES = ("qkv", "o", "gate_up", "down")
"""A layer's products."""


inputs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("inputs.py"))))
SHAPES = {name: shape for name, shape in inputs.PRODUCTS.items() if not name.startswith("tiny")}


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Median microseconds of one of `calls`, which a graph makes one after the other."""
    return statistics.median(graph_ms(calls, repeats)[2:]) * 1000 / len(calls)


def bandwidth() -> float:
    """GB/s of a copy by a kernel, read and written; a graph's own copies are slower."""
    one, two = torch.zeros(2, 1 << 28, dtype=torch.float32, device="cuda")
    return 2 * one.nbytes / graph_us([lambda: torch.add(one, 0, out=two)] * 2) / 1e3


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=scale)


class Case:
    """The buffers of one shape."""

    def __init__(self, shape: Any) -> None:
        self.shape, self.gated = shape, shape.kind == "gate"
        self.outs = shape.lines // 2 if self.gated else shape.lines
        self.bytes = shape.width * shape.lines * 2
        self.weights = [draw(shape.lines, shape.width, scale=0.02) for _ in range(max(2, 1 + COLD // self.bytes))]
        self.x, self.h = draw(32, shape.width), draw(32, self.outs)
        self.norm = None if shape.kind == "sum" else 1 + 0.3 * torch.randn(shape.width, device="cuda")
        self.counters = torch.zeros(1 << 14, dtype=torch.int32, device="cuda")

    def bare(self, rows: int, form: room.Form) -> float:
        """The same without the norm."""
        return graph_us([lambda w=w: self.call(w, rows, form, None) for w in self.rotated()])

    def call(
        self, weight: Tensor, rows: int, form: room.Form, squares: Tensor | None, warmup: bool = False,
        early: bool = False,
    ) -> Tensor:  # fmt: skip
        """Without squares there is no norm."""
        kind = torch.float32 if self.shape.kind == "head" else torch.bfloat16
        out = torch.empty(rows, self.outs, dtype=kind, device="cuda")
        norm, x = None if squares is None else self.norm, self.x[:rows]
        if norm is not None and form.apart:
            x, norm, squares = room.normed(x, None, norm, EPS, warmup, early)[1], None, None
        given: dict[str, Any] = {"norm": norm, "squares": squares, "eps": EPS, "gated": self.gated}
        if self.norm is None:
            blocks = triton.cdiv(self.outs, form.block)
            given = {"residual": self.h[:rows], "sums": torch.empty(rows, blocks, device="cuda")}
        room.launch(x, weight, out, form, counters=self.counters, warmup=warmup, early=early, **given)
        return out

    def squares(self, rows: int) -> Tensor | None:
        """In as many parts as the kernel before would leave."""
        if self.norm is None:
            return None
        return self.x[:rows].float().square().unflatten(1, (-1, 32)).sum(2)

    def wrong(self, form: room.Form, early: bool) -> str:
        """Why the form must not be timed; rows must not depend on how many there are."""
        weight, x = self.weights[0], self.x
        if self.norm is not None:
            x = (x.float() * (x.float().square().mean(1, keepdim=True) + EPS).rsqrt() * self.norm).bfloat16()
        whole = self.call(weight, 16, form, self.squares(16), early=early)
        wanted = x[:16].float() @ weight.float().T
        if self.gated:
            gate, up = wanted.chunk(2, dim=1)
            wanted = F.silu(gate) * up
        elif self.norm is None:
            wanted += self.h[:16].float()
        apart = float((whole.float() - wanted).norm() / wanted.norm())
        if not apart <= TOLERANCE:
            return f"{apart:.1e} from fp32"
        for rows in (1, 5):
            if not torch.equal(self.call(weight, rows, form, self.squares(rows), early=early), whole[:rows]):
                return f"{rows} rows differ from the same among 16"
        return ""

    def time(self, rows: int, form: room.Form, early: bool) -> float:
        squares = self.squares(rows)
        return graph_us([lambda w=w: self.call(w, rows, form, squares, early=early) for w in self.rotated()])

    def cublas(self, rows: int) -> float:
        x = self.x[:rows].clone()
        if self.shape.kind == "head":
            return graph_us([lambda w=w: torch.mm(x, w.T, out_dtype=torch.float32) for w in self.rotated()])
        return graph_us([lambda w=w: F.linear(x, w) for w in self.rotated()])

    def rotated(self) -> list[Tensor]:
        count = max(CALLS if self.bytes < COLD else 4, len(self.weights))
        return [self.weights[i % len(self.weights)] for i in range(count)]


def compile_forms(wanted: Sequence[tuple[Case, room.Form, int]]) -> None:
    """Side by side; in both ways to begin, and also without the norm."""
    with side_by_side(ignore_errors=True):
        for case, form, count in wanted:
            for early in (False, True):
                case.call(case.weights[0], count, form, case.squares(count), True, early)
            if case.norm is not None:
                case.call(case.weights[0], count, form, None, True)


def measure(name: str, case: Case, rows: Sequence[int], copy: float) -> dict[str, Any]:
    """Times forms for the first number of rows, and the best of them for all."""
    times: dict[tuple[int, room.Form, bool], float] = {}
    first = rows[0]

    def told(count: int, form: room.Form, early: bool) -> str:
        us = times[count, form, early]
        return f"{us:.1f} us {case.bytes / us / 1e3 / copy:.3f}"

    for form, early in itertools.product(room.FORMS if case.norm is None else EVERY, (False, True)):
        try:
            reason = case.wrong(form, early)
            if not reason:
                times[first, form, early] = case.time(first, form, early)
        except (RuntimeError, triton.TritonError) as error:
            reason = str(error).splitlines()[0]
        if reason:
            print(f"  {tuple(form)}{', begun early' if early else ''}: {reason}", flush=True)
    ranked = [sorted((f for _, f, e in times if e == early), key=lambda f: times[first, f, early]) for early in (0, 1)]
    print(f"{name} {case.shape.width} -> {case.shape.lines}, {case.bytes / 1e6:.1f} MB, M = {first}:", flush=True)
    for form in ranked[0]:
        line = f"  {tuple(form)[:5]}{' norm apart' if form.apart else ''}: {told(first, form, False)}"
        if (first, form, True) in times:
            line += f"; begun early {told(first, form, True)}"
        if case.norm is not None and form in ranked[0][:3]:
            line += f"; without the norm {case.bare(first, form):.1f} us"
        print(line, flush=True)
    results: dict[str, Any] = {"plain": {}}
    best = [forms[0] for forms in ranked]
    for count in rows:
        plain = results["plain"][count] = case.cublas(count)
        line = f"  M = {count}: cuBLAS {plain:.1f} us {case.bytes / plain / 1e3 / copy:.3f}"
        for form, early in zip(best, (False, True), strict=True):
            times[count, form, early] = case.time(count, form, early)
            line += f"; {'the fastest begun early' if early else 'the fastest'} {told(count, form, early)}"
        print(line, flush=True)
    results["best"] = best
    results["times"] = [{"rows": n, **form._asdict(), "early": e, "us": us} for (n, form, e), us in times.items()]
    return results


class Layers:
    """Some layers of Llama-3-8B, on a cache of `CONTEXT` positions."""

    def __init__(self, cases: dict[str, Case]) -> None:
        self.parts = [{name: cases[name].weights[0].clone() for name in NAMES} for _ in range(LAYERS)]
        self.caches = [draw(2, 1, CONTEXT + 64, 8, 128) for _ in range(LAYERS)]
        self.norm, self.rotary = cases["qkv"].norm, draw(CONTEXT + 64, 2, 128)
        self.start = torch.full((1,), CONTEXT, dtype=torch.int32, device="cuda")
        self.counters = torch.zeros(1 << 14, dtype=torch.int32, device="cuda")
        assert self.norm is not None
        self.rounded = self.norm.bfloat16()

    def separate(self, h: Tensor) -> None:
        added = h
        for weights, cache in zip(self.parts, self.caches, strict=True):
            h, x = add_forward(h, added, self.rounded, EPS)
            y = decode_attention(F.linear(x, weights["qkv"]), *cache, self.start, self.rotary, 0, None)
            h, x = add_forward(h, F.linear(y, weights["o"]), self.rounded, EPS)
            added = F.linear(swiglu_packed(F.linear(x, weights["gate_up"])), weights["down"])

    def ours(
        self, h: Tensor, forms: dict[str, room.Form], early: bool, attention: bool = True, asks: bool = True
    ) -> None:
        """`asks`: attention that begins early asks for its first tile."""
        squares = room.summed(h, None)[1]
        for weights, cache in zip(self.parts, self.caches, strict=True):
            projected = self._in(h, squares, weights["qkv"], forms["qkv"], early)
            if attention:
                form = form_for(cache[0], 4 * len(h), 0)._replace(asks=asks)
                y = decode_attention(projected, *cache, self.start, self.rotary, 0, None, form, early)
            else:
                y = projected[:, :4096].contiguous()
            h, squares = self._out(y, h, weights["o"], forms["o"], early)
            x = self._in(h, squares, weights["gate_up"], forms["gate_up"], early, gated=True)
            h, squares = self._out(x, h, weights["down"], forms["down"], early)

    def _in(
        self, h: Tensor, squares: Tensor, weight: Tensor, form: room.Form, early: bool, gated: bool = False
    ) -> Tensor:
        out = torch.empty(h.shape[0], weight.shape[0] // (2 if gated else 1), dtype=h.dtype, device=h.device)
        given: dict[str, Any] = {"norm": self.norm, "squares": squares, "eps": EPS}
        if form.apart:
            assert self.norm is not None
            h, given = room.normed(h, None, self.norm, EPS, early=early)[1], {}
        room.launch(h, weight, out, form, gated=gated, counters=self.counters, early=early, **given)
        return out

    def _out(self, x: Tensor, h: Tensor, weight: Tensor, form: room.Form, early: bool) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(h)
        sums = torch.empty(h.shape[0], triton.cdiv(h.shape[1], form.block), device="cuda")
        room.launch(x, weight, out, form, residual=h, sums=sums, counters=self.counters, early=early)
        return out, sums


def layers(cases: dict[str, Case], found: dict[str, dict[str, Any]], copy: float, rows: Sequence[int]) -> None:
    made = Layers(cases)
    late, begun = ({name: found[name]["best"][early] for name in NAMES} for early in (0, 1))
    read = sum(w.nbytes for w in made.parts[0].values()) + made.caches[0].nbytes
    print(f"a layer of Llama-3-8B, {read / 1e6:.0f} MB, {read / copy / 1e3:.1f} us at copy speed")
    for count in rows:
        h = draw(count, 4096)
        ways: dict[str, Callable[[], object]] = {
            "separate kernels": lambda h=h: made.separate(h),
            "ours": lambda h=h: made.ours(h, late, False),
            "ours, begun early": lambda h=h: made.ours(h, late, True),
            "ours, begun early, nothing asked for": lambda h=h: made.ours(h, late, True, asks=False),
            "ours, begun early, in forms that are the fastest so": lambda h=h: made.ours(h, begun, True),
            "ours, no attention": lambda h=h: made.ours(h, late, False, attention=False),
            "ours, no attention, begun early": lambda h=h: made.ours(h, late, True, attention=False),
        }
        for name, way in ways.items():
            us = graph_us([way] * 2) / LAYERS
            print(f"  M = {count}, {name}: {us:.1f} us, {read / us / 1e3 / copy:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5, 8, 16])
    parser.add_argument("--no-layers", action="store_true", help="time products only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    began, tiles = time.perf_counter(), sorted({16 if n <= 16 else 32 for n in args.rows})
    with torch.inference_mode():
        copy = bandwidth()
        print(f"{torch.cuda.get_device_name()}: copies {copy:.0f} GB/s; form: (block, columns, split, stages, warps)")
        cases = {name: Case(SHAPES[name]) for name in args.shapes}
        every = [(c, form) for c in cases.values() for form in (room.FORMS if c.norm is None else EVERY)]
        compile_forms([(case, form, count) for case, form in every for count in tiles])
        print(f"compiled after {time.perf_counter() - began:.1f} s", flush=True)
        found = {name: measure(name, case, args.rows, copy) for name, case in cases.items()}
        if not args.no_layers and set(NAMES) <= set(cases):
            layers(cases, found, copy, args.rows[:2])
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"copy": copy, "shapes": found}, indent=1))


if __name__ == "__main__":
    main()
