"""Times what a Mamba-2 layer does between its projections, by one kernel and by separate ones, on one GPU:

    python tests/bench/bench_fused_step.py [--batch 1 2 8 32] [--tokens 1 5 9] [--shape NAME …] [--alone] [--form N]
        [--rotated]

In CUDA graphs whose calls go over enough copies of all buffers that none is in the L2 cache: each form alone, then
layers with their projections, which is what decoding waits for. What a form makes is held against separate steps in
fp64 before it is timed. `--rotated` has B and C turned by their positions; 2.7B and 130M have no such layers.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mambabench.kernels.few_rows import Projection, Stream, Unscaled, add_projected, project
from mambabench.kernels.multistep import Plan, triton2_fused
from mambabench.kernels.multistep.forms import compiled
from mambabench.kernels.multistep.fused_step import separate_step
from mambabench.kernels.tuning import graph_ms
from torch import Tensor

inputs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("inputs.py"))))
SHAPES = {
    "Mamba2-2.7B": (inputs.MAMBA2["Mamba2-2.7B"], 2560),
    "Mamba2-130M": (inputs.Shape2(24, 24, 1, 1, 64, 128, 1536), 768),
    "Mamba2-paper": (inputs.MAMBA2["Mamba2-paper"], 4096),
    "Mamba2-28M": (inputs.MAMBA2["Mamba2-28M"], 512),
}
"""Layers, and the stream's width."""
COLD = 200 << 20
"""Bytes that the buffers of a graph have together, at least."""
CALLS, REPLAY = 32, 16


class Layer:
    """Buffers of one copy of a layer with its projections; rows and copies are at every stage between two writes of the
    checkpoint."""

    def __init__(self, name: str, batch: int, count: int, rotated: bool, stage: int = 0) -> None:
        shape, hidden = SHAPES[name]
        self.count, self.made = count, inputs.Mamba2(shape, batch, Plan(count, count, REPLAY, True), rotated=rotated)
        start = (1 + (stage + torch.arange(batch, device="cuda")) % REPLAY).int()
        self.turn = inputs.Turn(start, torch.zeros_like(start))
        self.inner, self.lines = len(self.made.norm), len(self.made.norm) + self.made.u.shape[2]

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

        self.into = Projection(normal(self.lines, hidden) / hidden**0.5, None, normal(hidden), 1e-5)
        self.out = Projection(normal(hidden, self.inner) / self.inner**0.5)
        self.stream = Stream(normal(batch * count, hidden))

    def given(self, projected: Tensor | None = None) -> tuple[Any, ...]:
        """Arguments of `fused_step`, with what a projection made, if given."""
        u, z, *others = self.made.fused_step(self.turn)
        if projected is not None:
            z, u = projected[:, : self.inner], projected[:, self.inner :].unflatten(0, u.shape[:2])
        return u, z, *others

    def bytes(self) -> int:
        made = self.made
        return made.state.nbytes + made.whole.nbytes + made.window.nbytes + 2 * self.lines * len(self.stream.h)


def graph_us(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of one of `calls`, which a graph makes one after the other."""
    return statistics.median(graph_ms(calls, 9)[2:]) * 1000 / len(calls)


def check(layer: Layer, form: Any) -> str:
    """Empty if the first row comes out as near to fp64 as bf16 allows."""
    first = inputs.Turn(*(at[:1] for at in layer.turn))
    want = separate_step(*layer.made.row(0).fused_step(first))
    made = triton2_fused.fused_step(*layer.given(), form)
    got = made.divided() if isinstance(made, Unscaled) else made
    off = float((got[: layer.count] - want).norm() / want.norm())
    return "" if off < 2.0**-7 else f"off by {off:.1e}"


def step_us(layers: list[Layer], way: Callable[..., object]) -> float:
    turns = [layers[i % len(layers)] for i in range(max(CALLS, len(layers)))]
    return graph_us([lambda layer=layer: way(*layer.given()) for layer in turns])


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
    first = Layer(name, batch, count, args.rotated)
    others = range(1, min(CALLS // 2, 1 + COLD // first.bytes()))
    layers = [first, *(Layer(name, batch, count, args.rotated, stage) for stage in others)]
    *_, state, _, _, plan, gate = first.given()
    forms = triton2_fused.forms_for(state, plan, gate)
    forms = forms if args.form is None else [forms[args.form]]

    def run(form: Any, state: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> object:
        return triton2_fused.fused_step(*first.given(), form, warmup=warmup)

    compiled(forms, state, run)
    wrong = {form: check(first, form) for form in forms}
    ways = {form: lambda *given, form=form: triton2_fused.fused_step(*given, form) for form in forms}
    times = {form: step_us(layers, ways[form]) for form in forms if not wrong[form]}
    apart = step_us(layers, separate_step)
    turned = ", rotated" if args.rotated else ""
    line = f"{name}{turned}, batch {batch}, {count} tokens: separate {apart:.1f} us"
    if times:
        best = min(times, key=times.__getitem__)
        line += f", one {times[best]:.1f} us {tuple(best)}"
        if not args.alone and batch * count <= 32:
            line += (
                f"; a layer: separate {layer_us(layers, separate_step):.1f}, one {layer_us(layers, ways[best]):.1f} us"
            )
    u, z, front, ring, *_ = first.given()
    chosen = triton2_fused.form_for(u, z, front, ring, state, plan, gate)
    print(f"{line}; chosen is {'separate' if chosen is None else tuple(chosen)}", flush=True)
    print("    " + ", ".join(f"{tuple(map(int, form))} {wrong[form] or f'{times[form]:.1f}'}" for form in forms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5, 9], help="K + 1")
    parser.add_argument("--shape", choices=[*SHAPES], nargs="+", default=[*SHAPES])
    parser.add_argument("--alone", action="store_true", help="no layers with their projections")
    parser.add_argument("--form", type=int, help="only the form of this number")
    parser.add_argument("--rotated", action="store_true", help="B and C are rotated")
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for name in args.shape:
        for count in args.tokens:
            for batch in args.batch:
                measure(name, batch, count, args)


if __name__ == "__main__":
    main()
