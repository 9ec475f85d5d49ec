"""Times what a Mamba-2 layer does between its projections, by one kernel and by separate ones, on one GPU:

    python tests/bench/bench_fused_step.py [--batch 1 2 8 32] [--tokens 1 5 9] [--shape NAME …] [--alone] [--form N]

In CUDA graphs whose calls go over enough copies of all buffers that none is in the L2 cache: each form alone, then
layers with their projections, which is what decoding waits for. What a form makes is held against separate steps in
fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from mambabench.kernels.few_rows import Projection, Stream, Unscaled, add_projected, project
from mambabench.kernels.multistep import triton2_fused
from mambabench.kernels.multistep.forms import compiled
from mambabench.kernels.multistep.fused_step import Front, Gate, separate_step, tap_by_tap
from mambabench.kernels.multistep.ring import Plan, Ring
from mambabench.kernels.tuning import graph_ms
from torch import Tensor

SHAPES = {
    "Mamba2-2.7B": (80, 80, 1, 1, 64, 128, 2560, 5120),
    "Mamba2-130M": (24, 24, 1, 1, 64, 128, 768, 1536),
    "the paper's, 8B": (32, 8, 8, 32, 128, 128, 4096, 128),
}
"""H, groups of x, B and C, P, N, the stream's width, that of the norm."""
COLD = 200 << 20
"""Bytes that the buffers of a graph have together, at least."""
CALLS, TAPS, REPLAY = 32, 4, 16


class Layer:
    """Buffers of one copy of a layer; rows are at every stage between two writes of the checkpoint."""

    def __init__(self, shape: tuple[int, ...], batch: int, count: int) -> None:
        heads, x_groups, b_groups, c_groups, width, size, hidden, normed = shape
        self.plan = Plan(count, count, REPLAY, True)
        sizes = [x_groups * width, b_groups * size]
        channels, slots, inner = sum(sizes) + c_groups * size, REPLAY + count, heads * width
        entries = channels + heads

        def normal(*wanted: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(wanted, device="cuda", dtype=dtype)

        half = torch.bfloat16
        self.inner, self.batch = inner, batch
        self.kept, self.dt = (
            normal(batch, slots, sum(sizes), dtype=half),
            0.1 * torch.rand_like(normal(batch, slots, heads)),
        )
        x, B = self.kept.split(sizes, dim=2)
        self.ring = Ring(x.unflatten(2, (-1, width)), B.unflatten(2, (-1, size)), self.dt)
        window = normal(batch, count + TAPS - 1, entries, dtype=half)
        weight, bias = (t.bfloat16().float() for t in (normal(channels, TAPS), normal(channels)))
        taps = tap_by_tap(weight, bias, half)
        self.front = Front(weight, bias, normal(heads) - 3, window, self.kept, True, taps)
        self.gate = Gate(normal(inner, dtype=half), None, normed, 1e-5, left=normed == inner)
        self.A, self.D, self.state = -normal(heads).exp(), normal(heads), normal(batch, heads, width, size)
        self.start = (1 + torch.arange(batch, device="cuda") % (REPLAY - count + 1)).int()
        self.saved = torch.zeros_like(self.start)
        self.projected = normal(batch * count, inner + entries, dtype=half)
        self.into = Projection(
            normal(inner + entries, hidden, dtype=half) / hidden**0.5, None, normal(hidden, dtype=half), 1e-5
        )
        self.out = Projection(normal(hidden, inner, dtype=half) / inner**0.5)
        self.stream = Stream(normal(batch * count, hidden, dtype=half))

    def given(self, projected: Tensor) -> tuple[Any, ...]:
        u = projected[:, self.inner :].unflatten(0, (self.batch, -1))
        cursors = self.start, self.saved, self.plan, self.gate
        return u, projected[:, : self.inner], self.front, self.ring, self.A, self.D, self.state, *cursors

    def bytes(self) -> int:
        return self.state.nbytes + self.kept.nbytes + self.projected.nbytes + self.front.window.nbytes


def graph_us(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of one of `calls`, which a graph makes one after the other."""
    return statistics.median(graph_ms(calls, 9)[2:]) * 1000 / len(calls)


def check(layer: Layer, form: Any) -> str:
    """Empty if the first row comes out as near to fp64 as bf16 allows."""

    def first(exact: bool) -> tuple[Any, ...]:
        def part(t: Tensor) -> Tensor:
            return (
                t.to("cpu", torch.float64, copy=True)
                if exact and t.is_floating_point()
                else t.cpu()
                if exact
                else t.clone()
            )

        kept, dt = part(layer.kept[:1]), part(layer.dt[:1])
        x, B = kept.split([t.shape[2] * t.shape[3] for t in (layer.ring.x, layer.ring.B)], dim=2)
        ring = Ring(x.unflatten(2, layer.ring.x.shape[2:]), B.unflatten(2, layer.ring.B.shape[2:]), dt)
        front, gate = layer.front, layer.gate
        front = Front(
            *(part(t) for t in (front.weight, front.bias, front.dt_bias, front.window[:1])),
            kept,
            True,
            part(front.taps),
        )
        projected = part(layer.projected[: layer.plan.count])
        gate = Gate(part(gate.weight), None, gate.width, gate.eps)
        others = [part(t) for t in (layer.A, layer.D, layer.state[:1], layer.start[:1], layer.saved[:1])]
        u = projected[:, layer.inner :].unflatten(0, (1, -1))
        return u, projected[:, : layer.inner], front, ring, *others, layer.plan, gate

    want = separate_step(*first(True))
    made = triton2_fused.fused_step(*first(False), form)
    got = (made.divided() if isinstance(made, Unscaled) else made).cpu().double()
    off = float((got - want).norm() / want.norm())
    return "" if off < 2.0**-7 else f"off by {off:.1e}"


def step_us(layers: list[Layer], way: Callable[..., object]) -> float:
    turns = [layers[i % len(layers)] for i in range(max(CALLS, len(layers)))]
    return graph_us([lambda layer=layer: way(*layer.given(layer.projected)) for layer in turns])


def layer_us(layers: list[Layer], way: Callable[..., Tensor | Unscaled]) -> float:
    """With both projections, each layer behind the one before."""

    def chain() -> object:
        stream = layers[0].stream
        for layer in layers:
            projected, stream = project(layer.into, stream)
            stream = add_projected(layer.out, way(*layer.given(projected)), stream)
        return stream

    return graph_us([chain, chain]) / len(layers)


def measure(name: str, batch: int, count: int, args: argparse.Namespace) -> None:
    first = Layer(SHAPES[name], batch, count)
    layers = [first, *(Layer(SHAPES[name], batch, count) for _ in range(min(15, COLD // first.bytes())))]
    forms = triton2_fused.forms_for(first.state, first.plan, first.gate)
    forms = forms if args.form is None else [forms[args.form]]

    def run(form: Any, state: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> object:
        return triton2_fused.fused_step(*first.given(first.projected), form, warmup=warmup)

    compiled(forms, first.state, run)
    wrong = {form: check(first, form) for form in forms}
    ways = {form: lambda *given, form=form: triton2_fused.fused_step(*given, form) for form in forms}
    times = {form: step_us(layers, ways[form]) for form in forms if not wrong[form]}
    apart = step_us(layers, separate_step)
    line = f"{name}, batch {batch}, {count} tokens: separate {apart:.1f} us"
    if times:
        best = min(times, key=times.__getitem__)
        line += f", one {times[best]:.1f} us {tuple(best)}"
        if not args.alone and batch * count <= 32:
            line += (
                f"; a layer: separate {layer_us(layers, separate_step):.1f}, one {layer_us(layers, ways[best]):.1f} us"
            )
    print(line, flush=True)
    print("    " + ", ".join(f"{tuple(map(int, form))} {wrong[form] or f'{times[form]:.1f}'}" for form in forms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5, 9], help="K + 1")
    parser.add_argument("--shape", choices=[*SHAPES], nargs="+", default=[*SHAPES])
    parser.add_argument("--alone", action="store_true", help="no layers with their projections")
    parser.add_argument("--form", type=int, help="only the form of this number")
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for name in args.shape:
        for count in args.tokens:
            for batch in args.batch:
                measure(name, batch, count, args)


if __name__ == "__main__":
    main()
