"""Times products of a few rows with the weights of a decoding step, in every form that their kernel has, on one GPU:

    python tests/bench/bench_few_rows.py [--shapes qkv head …] [--rows 1 5 8 16] [--no-layers] [--json FILE]

Calls are made as a CUDA graph that goes over enough weights for none to be in the L2 cache. Before a form is timed its
output is held against fp32 arithmetic. Beside each time stands cuBLAS's for the bare product, without the norm, gate or
sum that is part of ours. Then a layer of Llama-3-8B at a context of 2,048: as it is with kernels of its own for each of
these, and with ours, begun early or not, with weights asked for ahead or not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from mambabench.kernels.decode_attention.triton import decode_attention
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
EARLY = (-1, 0, 512, 1024)
"""Columns that a program asks for while the kernel before ends."""


@dataclass(frozen=True)
class Shape:
    width: int
    lines: int
    """Of the weights."""
    kind: str
    """norm, gate (with a norm), sum, or head (norm, fp32 out)."""


SHAPES = {
    "qkv": Shape(4096, 6144, "norm"),
    "o": Shape(4096, 4096, "sum"),
    "gate_up": Shape(4096, 28672, "gate"),
    "down": Shape(14336, 4096, "sum"),
    "head": Shape(4096, 128256, "head"),
    "in_proj": Shape(2560, 10576, "norm"),
    "out_proj": Shape(5120, 2560, "sum"),
}


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

    def __init__(self, shape: Shape) -> None:
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

    def call(self, weight: Tensor, rows: int, form: room.Form, squares: Tensor | None, warmup: bool = False) -> Tensor:
        """Without squares there is no norm."""
        kind = torch.float32 if self.shape.kind == "head" else torch.bfloat16
        out = torch.empty(rows, self.outs, dtype=kind, device="cuda")
        norm, x = None if squares is None else self.norm, self.x[:rows]
        if norm is not None and form.apart:
            x, norm, squares = room.normed(x, None, norm, EPS, form.early >= 0, warmup)[1], None, None
        given: dict[str, Any] = {"norm": norm, "squares": squares, "eps": EPS, "gated": self.gated}
        if self.norm is None:
            blocks = triton.cdiv(self.outs, form.block)
            given = {"residual": self.h[:rows], "sums": torch.empty(rows, blocks, device="cuda")}
        room.launch(x, weight, out, form, counters=self.counters, warmup=warmup, **given)
        return out

    def squares(self, rows: int) -> Tensor | None:
        """In as many parts as the kernel before would leave."""
        if self.norm is None:
            return None
        return self.x[:rows].float().square().unflatten(1, (-1, 32)).sum(2)

    def wrong(self, form: room.Form) -> str:
        """Why the form must not be timed; rows must not depend on how many there are."""
        weight, x = self.weights[0], self.x
        if self.norm is not None:
            x = (x.float() * (x.float().square().mean(1, keepdim=True) + EPS).rsqrt() * self.norm).bfloat16()
        whole = self.call(weight, 16, form, self.squares(16))
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
            if not torch.equal(self.call(weight, rows, form, self.squares(rows)), whole[:rows]):
                return f"{rows} rows differ from the same among 16"
        return ""

    def time(self, rows: int, form: room.Form) -> float:
        squares = self.squares(rows)
        return graph_us([lambda w=w: self.call(w, rows, form, squares) for w in self.rotated()])

    def cublas(self, rows: int) -> float:
        x = self.x[:rows].clone()
        if self.shape.kind == "head":
            return graph_us([lambda w=w: torch.mm(x, w.T, out_dtype=torch.float32) for w in self.rotated()])
        return graph_us([lambda w=w: F.linear(x, w) for w in self.rotated()])

    def rotated(self) -> list[Tensor]:
        count = max(CALLS if self.bytes < COLD else 4, len(self.weights))
        return [self.weights[i % len(self.weights)] for i in range(count)]


def compile_forms(wanted: Sequence[tuple[Case, room.Form, int]], bare: Sequence[room.Form] = ()) -> None:
    """Side by side; those in `bare` also without the norm."""
    with side_by_side(ignore_errors=True):
        for case, form, count in wanted:
            case.call(case.weights[0], count, form, case.squares(count), warmup=True)
            if form in bare:
                case.call(case.weights[0], count, form, None, warmup=True)


def measure(name: str, case: Case, rows: Sequence[int], copy: float) -> dict[str, Any]:
    """Times forms for the first number of rows, and the best of them for all."""
    times: dict[tuple[int, room.Form], float] = {}
    first, best = rows[0], room.FORMS[0]

    def told(count: int, form: room.Form) -> str:
        us = times[count, form]
        return f"{us:.1f} us {case.bytes / us / 1e3 / copy:.3f}"

    def attempt(form: room.Form) -> None:
        try:
            reason = case.wrong(form)
            if not reason:
                times[first, form] = case.time(first, form)
        except (RuntimeError, triton.TritonError) as error:
            reason = str(error).splitlines()[0]
        if reason:
            print(f"  {tuple(form)}: {reason}", flush=True)

    for form in room.FORMS if case.norm is None else (*room.FORMS, *room.APART):
        attempt(form)
    ranked = sorted((f for _, f in times), key=lambda f: times[first, f])
    early = [form._replace(early=early) for form in ranked[:2] for early in EARLY[1:]]
    compile_forms([(case, form, first) for form in [*early, *ranked[:3]]], ranked[:3])
    for form in early:
        attempt(form)
    print(f"{name} {case.shape.width} -> {case.shape.lines}, {case.bytes / 1e6:.1f} MB, M = {first}:", flush=True)
    for form in ranked:
        also = [told(first, f) for f in (form._replace(early=e) for e in EARLY[1:]) if (first, f) in times]
        line = f"  {tuple(form)[:5]}{' norm apart' if form.apart else ''}: {told(first, form)}"
        if case.norm is not None and form in ranked[:3]:
            line += f"; without the norm {case.bare(first, form):.1f} us"
        print(line + (f"; begun early {', '.join(also)}" if also else ""), flush=True)
    results: dict[str, Any] = {"plain": {}}
    if ranked:
        best = ranked[0]
    for count in rows:
        plain = results["plain"][count] = case.cublas(count)
        line = f"  M = {count}: cuBLAS {plain:.1f} us {case.bytes / plain / 1e3 / copy:.3f}"
        for form in (best, *(best._replace(early=early) for early in EARLY[1:3])):
            if (first, form) in times:
                times[count, form] = case.time(count, form)
                line += f"; {form.early} {told(count, form)}"
        print(line, flush=True)
    results["best"] = best
    results["times"] = [{"rows": n, **form._asdict(), "us": us} for (n, form), us in times.items()]
    return results


WAYS = (
    (-1, 0, 0), (-1, 8, 0), (-1, 16, 0), (-1, 24, 0), (-1, 0, 4), (-1, 0, 8), (-1, 16, 8),
    (0, 0, 0), (0, 16, 0), (0, 16, 4), (512, 0, 0), (512, 16, 0), (1024, 16, 0),
)  # fmt: skip


def asked(weight: Tensor, megabytes: int) -> room.Ahead | None:
    """About so much of the first columns of a weight."""
    columns = (megabytes << 20) // (weight.shape[0] * 2) // 64 * 64
    return room.Ahead(weight, min(columns, weight.shape[1])) if columns else None


class Layers:
    """Some layers of Llama-3-8B, on a cache of `CONTEXT` positions."""

    def __init__(self, cases: dict[str, Case], forms: dict[str, room.Form]) -> None:
        self.forms = forms
        self.parts = [
            {name: cases[name].weights[0].clone() for name in ("qkv", "o", "gate_up", "down")} for _ in range(LAYERS)
        ]
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

    def ours(self, h: Tensor, early: int, gap: int = 0, ahead: int = 0, attention: bool = True) -> None:
        """`gap`: megabytes of o_proj's weights asked for before attention; `ahead`: of each product's by the one right
        before it."""
        squares = room.summed(h, None)[1]
        for index, (weights, cache) in enumerate(zip(self.parts, self.caches, strict=True)):
            after = self.parts[(index + 1) % LAYERS]
            projected = self._in(h, squares, weights, "qkv", early, asked(weights["o"], gap))
            if attention:
                y = decode_attention(projected, *cache, self.start, self.rotary, 0, None)
            else:
                y = projected[:, :4096].contiguous()
            h, squares = self._out(y, h, weights, "o", early, asked(weights["gate_up"], ahead))
            x = self._in(h, squares, weights, "gate_up", early, asked(weights["down"], ahead))
            h, squares = self._out(x, h, weights, "down", early, asked(after["qkv"], ahead))

    def _in(
        self, h: Tensor, squares: Tensor, weights: dict[str, Tensor], name: str, early: int, ahead: room.Ahead | None
    ) -> Tensor:
        weight, gated = weights[name], name == "gate_up"
        out = torch.empty(h.shape[0], weight.shape[0] // (2 if gated else 1), dtype=h.dtype, device=h.device)
        form, counters = self.forms[name]._replace(early=early), self.counters
        given: dict[str, Any] = {"norm": self.norm, "squares": squares, "eps": EPS}
        if form.apart:
            assert self.norm is not None
            h, given = room.normed(h, None, self.norm, EPS, early >= 0)[1], {}
        room.launch(h, weight, out, form, gated=gated, counters=counters, ahead=ahead, **given)
        return out

    def _out(
        self, x: Tensor, h: Tensor, weights: dict[str, Tensor], name: str, early: int, ahead: room.Ahead | None
    ) -> tuple[Tensor, Tensor]:
        form, out = self.forms[name]._replace(early=early), torch.empty_like(h)
        sums = torch.empty(h.shape[0], triton.cdiv(h.shape[1], form.block), device="cuda")
        room.launch(x, weights[name], out, form, residual=h, sums=sums, counters=self.counters, ahead=ahead)
        return out, sums


def layers(cases: dict[str, Case], found: dict[str, dict[str, Any]], copy: float, rows: Sequence[int]) -> None:
    made = Layers(cases, {name: found[name]["best"] for name in ("qkv", "o", "gate_up", "down")})
    read = sum(w.nbytes for w in made.parts[0].values()) + made.caches[0].nbytes
    print(f"a layer of Llama-3-8B, {read / 1e6:.0f} MB, {read / copy / 1e3:.1f} us at copy speed")
    for count in rows:
        h = draw(count, 4096)
        ways: dict[str, Callable[[], object]] = {"separate kernels": lambda h=h: made.separate(h)}
        for early, gap, ahead in WAYS:
            name = f"ours, early {early}, {gap} MB of o and {ahead} MB of others ahead"
            ways[name] = lambda h=h, e=early, g=gap, a=ahead: made.ours(h, e, g, a)
        for early in EARLY:
            ways[f"ours, early {early}, no attention"] = lambda h=h, e=early: made.ours(h, e, attention=False)
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
        every = [
            (c, form) for c in cases.values() for form in (*room.FORMS, *(room.APART if c.norm is not None else ()))
        ]
        compile_forms([(case, form, count) for case, form in every for count in tiles])
        print(f"compiled after {time.perf_counter() - began:.1f} s", flush=True)
        found = {name: measure(name, case, args.rows, copy) for name, case in cases.items()}
        if not args.no_layers and {"qkv", "o", "gate_up", "down"} <= set(cases):
            layers(cases, found, copy, args.rows[:2])
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"copy": copy, "shapes": found}, indent=1))


if __name__ == "__main__":
    main()
