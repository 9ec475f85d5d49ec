"""Times the decoding step of Mamba layers over a ring beside mamba-ssm's kernels, on one GPU:

    python tests/bench/bench_multistep.py [--batch 1 16 64] [--tokens 9] [--shape NAME …] [--peers update] [--json FILE]

One process times all arms, each as a CUDA graph whose calls go over enough copies of all buffers that none is in the
L2 cache. Every row has K drafts, of which 0 to K are accepted with equal chances, and stands somewhere between two
writes of its checkpoint: what a call replays and writes is simulated for as many rounds as a graph has calls. Before
a form is timed, what it makes is held against fp64. The fastest are also timed where each call writes its checkpoint,
with as much to replay as there can be, and where none does.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mambabench.kernels.multistep import forms, triton1, triton2, triton_convolve
from mambabench.kernels.multistep.ring import Plan, Ring, plain_ring_multistep
from mambabench.kernels.multistep.selective_ring import Channels, Projected, plain_selective_ring_multistep
from mambabench.kernels.scan.fused import TUNED
from mambabench.kernels.support import EARLY
from mambabench.kernels.tuning import compile_side_by_side, graph_ms, side_by_side
from torch import Tensor

inputs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("inputs.py"))))
SHAPES, SELECTIVE = (
    {name: shape for name, shape in shapes.items() if name != "tiny"} for shapes in (inputs.MAMBA2, inputs.MAMBA1)
)
STATES, TAPS = inputs.STATES, inputs.TAPS
COLD = 400 << 20
"""Bytes that the buffers of a graph have together, at least."""
CALLS = 64
FASTEST = 6
"""Forms that are also timed written and not written."""
CHUNKS = 16, 64, 256


def graph_us(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Median microseconds of one of `calls`, which a graph makes one after the other."""
    return statistics.median(graph_ms(calls, repeats)[2:]) * 1000 / len(calls)


def rotated(calls: Callable[[int], Callable[[], object]], copies: int) -> list[Callable[[], object]]:
    """At least CALLS calls, the i-th on the buffers i mod `copies`."""
    made = [calls(i) for i in range(copies)]
    return [made[i % copies] for i in range(max(CALLS, copies))]


def bandwidths() -> tuple[float, float]:
    """GB/s of a copy, reads and writes counted, and of reading alone."""
    one, two = (torch.zeros(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    whole, other, out = one.view(torch.float32), two.view(torch.float32), torch.zeros((), device="cuda")
    copy = 2 * one.nbytes / graph_us([lambda: torch.add(whole, 0, out=other)] * 4) / 1e3
    return copy, one.nbytes / graph_us([lambda: torch.sum(whole, 0, out=out)] * 4) / 1e3


Rounds = list[tuple[Tensor, Tensor]]
"""start and saved of each."""


def layers(kind: Callable[..., Any], shape: Any, batch: int, plan: Plan) -> list[Any]:
    """As many copies of a layer's buffers as a graph needs."""
    first = kind(shape, batch, plan)
    return [first, *(kind(shape, batch, plan) for _ in range(max(1, COLD // first.state.nbytes)))]


def exactly(t: Tensor) -> Tensor:
    """A copy in fp64 on the CPU."""
    return t.to("cpu", torch.float64, copy=True)


def check(layer: Any, plan: Plan, form: Any, pieces: int, start: Tensor, saved: Tensor) -> str:
    """Empty if y and the state are as near to fp64 as they should be."""
    one = slice(0, 1)
    given, C = Ring(*(t[one] for t in layer.ring.parts())), layer.C[one]
    state, at = layer.state[one].clone(), (start[one], saved[one])
    torch.cuda.synchronize()  # which a kernel that begins early does not wait for
    y = triton2.ring_multistep(given, C, layer.A, layer.D, state, *at, plan, form, pieces)
    exact = Ring(*(exactly(t) for t in given.parts()))
    others = [exactly(t) for t in (C, layer.A, layer.D, layer.state[one])]
    want = plain_ring_multistep(exact, *others, *(t.cpu() for t in at), plan)
    errors = [float((exactly(a) - b).norm() / b.norm()) for a, b in ((y, want), (state, others[-1]))]
    return (
        "" if errors[0] < 2.0**-8 and errors[1] < 4e-7 else f"y is off by {errors[0]:.1e}, the state by {errors[1]:.1e}"
    )


def compile_all(layer: Any, plan: Plan, arms: list[tuple[Any, int]]) -> None:
    """Side by side."""

    def run(arm: tuple[Any, int], state: Tensor, start: Tensor, saved: Tensor, warmup: bool) -> Tensor:
        given = layer.ring, layer.C, layer.A, layer.D, state, start, saved, plan
        return triton2.ring_multistep(*given, *arm, warmup=warmup)

    forms.compiled(arms, layer.state, run)


def time_ours(made: list[Any], plan: Plan, rounds: Rounds, form: Any, pieces: int) -> float:
    """Microseconds of a call, the mean over the rounds."""

    def call(i: int) -> Callable[[], object]:
        layer, (start, saved) = made[i % len(made)], rounds[i]
        given = layer.ring, layer.C, layer.A, layer.D, layer.state, start, saved, plan, form, pieces
        return lambda: triton2.ring_multistep(*given)

    return graph_us([call(i) for i in range(len(rounds))], 15 if made[0].batch == 1 else 7)


def replaying(rounds: Rounds, replayed: int) -> Rounds:
    """The same, with as many replayed tokens in all rows."""
    return [(start, start - replayed) for start, _ in rounds]


def time_convolutions(made: list[Any], start: Tensor) -> dict[triton_convolve.Cut, float]:
    """Microseconds of the convolution in front of the step, however it is cut up."""
    given = [layer.convolution(start) for layer in made]
    with side_by_side(ignore_errors=False):
        for cut in triton_convolve.CUTS:
            triton_convolve.convolve(*given[0], cut, warmup=True)

    def call(cut: triton_convolve.Cut, i: int) -> Callable[[], object]:
        return lambda: triton_convolve.convolve(*given[i], cut)

    return {cut: graph_us(rotated(functools.partial(call, cut), len(made)), 8) for cut in triton_convolve.CUTS}


def time_update(made: list[Any]) -> float:
    """Microseconds of mamba-ssm's single-token update."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def call(i: int) -> Callable[[], object]:
        layer = made[i]
        heads, x_groups, b_groups, c_groups, width, size = layer.shape[:6]
        groups = max(b_groups, c_groups)
        x = layer.ring.x[:, 0].repeat_interleave(heads // x_groups, 1).contiguous()
        B = layer.ring.B[:, 0].repeat_interleave(groups // b_groups, 1).contiguous()
        C = layer.C[:, 0].repeat_interleave(groups // c_groups, 1).contiguous()
        dt = layer.u[:, 0, :heads].clone().unsqueeze(-1).expand(-1, -1, width)
        A = layer.A.view(-1, 1, 1).expand(-1, width, size)
        D, bias = (t.unsqueeze(-1).expand(-1, width) for t in (layer.D, layer.dt_bias))
        given = layer.state, x, dt, A, B, C, D, None, bias, True
        return lambda: selective_state_update(*given)

    return graph_us(rotated(call, len(made)))


def time_scan(made: list[Any]) -> float:
    """Microseconds of mamba-ssm's chunk scan over the new tokens, from a state to a state; its best chunk length."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def time(chunk: int) -> float:
        def call(i: int) -> Callable[[], object]:
            layer = made[i]
            heads, x_groups, b_groups, c_groups, _, _ = layer.shape[:6]
            groups = max(b_groups, c_groups)
            x = layer.ring.x[:, : layer.plan.count].repeat_interleave(heads // x_groups, 2).contiguous()
            B = layer.ring.B[:, : layer.plan.count].repeat_interleave(groups // b_groups, 2).contiguous()
            C = layer.C.repeat_interleave(groups // c_groups, 2).contiguous()
            dt = layer.ring.dt[:, : layer.plan.count].contiguous()
            more = {"D": layer.D, "initial_states": layer.state, "return_final_states": True}
            return lambda: mamba_chunk_scan_combined(x, dt, layer.A, B, C, chunk, **more)

        return graph_us(rotated(call, len(made)))

    compile_side_by_side(TUNED)
    return min(time(chunk) for chunk in CHUNKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=9, help="K + 1")
    parser.add_argument("--replay", type=int, nargs="+", default=[], help="default: K + 1, the engine's, 16, 24, 48")
    parser.add_argument("--shape", choices=[*SHAPES, *SELECTIVE], nargs="+", default=[*SHAPES, *SELECTIVE])
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 2], help="of the checkpoint where it meets C")
    parser.add_argument("--form", type=int, nargs="+", help="only the forms of these numbers")
    parser.add_argument("--peers", choices=["update", "scan"], nargs="*", default=["update", "scan"])
    parser.add_argument("--late", action="store_true", help="no kernel begins before the one before has ended")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.late:
        os.environ[EARLY] = "off"
    copy, read = bandwidths()
    print(f"{torch.cuda.get_device_name()}: copy {copy:,.0f} GB/s, read {read:,.0f} GB/s")
    rows = []
    for name in args.shape:
        for batch in args.batch:
            rows += (measure if name in SHAPES else measure_selective)(name, batch, args, copy)
    if args.json:
        args.json.write_text(json.dumps({"copy": copy, "read": read, "rows": rows}, indent=1))


def measure(name: str, batch: int, args: argparse.Namespace, copy: float) -> list[dict[str, Any]]:
    """All arms of one shape and batch, printed as they come."""
    count, shape, found = args.tokens, SHAPES[name], []
    peers = {"update": 0.0, "scan": 0.0}
    if args.peers:
        made = layers(inputs.Mamba2, shape, batch, Plan(count, count, count, True))
        ways = {"update": time_update, "scan": time_scan}
        peers |= {peer: ways[peer](made) for peer in args.peers}
        del made
    print(f"\n{name}, batch {batch}, {count} tokens: update {peers['update']:.1f} us, scan {peers['scan']:.1f} us")
    for replay in args.replay or sorted({max(count, each) for each in (inputs.REPLAYED[name], 16, 24, 48)} | {count}):
        plan = Plan(count, count, replay, True)
        made = layers(inputs.Mamba2, shape, batch, plan)
        rounds = inputs.turns(plan, batch, max(CALLS, len(made)), "cuda")
        replayed, written = inputs.means(plan, rounds)
        bytes_moved = made[0].step_bytes(replayed, written)
        first = made[0]
        tried = triton2.forms_for(first.ring, first.state, plan)
        tried = tried if args.form is None else [tried[i] for i in args.form]
        compile_all(first, plan, list(itertools.product(tried, args.pieces)))
        cuts = time_convolutions(made, rounds[0][0])
        convolution = min(cuts.values())
        for pieces in args.pieces:
            times = {}
            for form in tried:
                wrong = check(first, plan, form, pieces, *rounds[0])
                if wrong:
                    print(f"  replay {replay}, {form}, {pieces} pieces: {wrong}")
                else:
                    times[form] = time_ours(made, plan, rounds, form, pieces)
            if not times:
                continue
            best = min(times, key=times.__getitem__)
            time = times[best]
            apart = {
                form: [time_ours(made, plan, replaying(rounds, r), form, pieces) for r in (replay, replay - count)]
                for form in sorted(times, key=times.__getitem__)[:FASTEST]
            }
            found.append(
                {
                    "shape": name, "batch": batch, "tokens": count, "replay": replay, "pieces": pieces, **peers,
                    "us": time, "form": best, "forms": {str(tuple(f)): t for f, t in times.items()},
                    "bytes": bytes_moved, "floor_us": bytes_moved / copy / 1e3, "convolution": convolution,
                    "replayed": replayed, "written": written, "apart": {str(tuple(f)): t for f, t in apart.items()},
                    "convolutions": {str(tuple(cut)): t for cut, t in cuts.items()},
                }
            )  # fmt: skip
            against = ", ".join(f"{time / t:.2f} {peer}s" for peer, t in peers.items() if t)
            print(
                f"  replay {replay:2} ({replayed:4.1f} replayed, {written:.0%} written), "
                f"{'tf32' if pieces == 1 else f'{pieces} bf16'}: {time:6.1f} us, {against}; "
                f"{bytes_moved / 1e6:.1f} MB at {bytes_moved / time / 1e3 / copy:.0%} of the copy bandwidth; "
                f"{tuple(best)}; convolution {convolution:.1f} us",
                flush=True,
            )
            print("      " + ", ".join(f"{shortly(f)} {t:.1f}" for f, t in times.items()))
            print("      written / not: " + ", ".join(f"{shortly(f)} {a:.1f} / {b:.1f}" for f, (a, b) in apart.items()))
        print("      convolution: " + ", ".join(f"{shortly(cut)} {t:.1f}" for cut, t in cuts.items()))
        del made
    return found


def shortly(form: Any) -> str:
    """The numbers of a form, and the names of what it does."""
    pairs = form._asdict().items()
    numbers = "x".join(str(value) for _, value in pairs if not isinstance(value, bool))
    return " ".join([numbers, *(name for name, value in pairs if value is True)])


def run_selective(
    made: Any, plan: Plan, form: Any, state: Tensor, start: Tensor, saved: Tensor, warmup: bool = False
) -> Tensor:
    given = made.new, made.layer, made.ring, state, start, saved, plan, form
    return triton1.selective_ring_multistep(*given, warmup=warmup)


def check_selective(made: Any, plan: Plan, form: Any, start: Tensor, saved: Tensor) -> str:
    """Empty if y and the state are as near to fp64 as they should be."""
    new, layer, at = Projected(*(t[:1] for t in made.new.parts())), made.layer, (start[:1], saved[:1])
    state, ring = made.state[:1].clone(), made.ring[:1].clone()
    exact = Projected(*(exactly(t) for t in new.parts()))
    exact_layer = Channels(*(exactly(t) for t in made.parameters()), silu=True, repeat=layer.repeat, span=layer.span)
    exact_ring, exact_state = exactly(ring), exactly(state)
    torch.cuda.synchronize()
    y = triton1.selective_ring_multistep(new, layer, ring, state, *at, plan, form)
    want = plain_selective_ring_multistep(exact, exact_layer, exact_ring, exact_state, *(t.cpu() for t in at), plan)
    errors = [float((exactly(a) - b).norm() / b.norm()) for a, b in ((y, want), (state, exact_state))]
    return (
        "" if errors[0] < 2.0**-8 and errors[1] < 1e-6 else f"y is off by {errors[0]:.1e}, the state by {errors[1]:.1e}"
    )


def time_selective_update(made: list[Any], convolved: bool) -> float:
    """Microseconds of mamba-ssm's single-token update with its gate; of causal-conv1d's update in front of it."""
    from causal_conv1d import causal_conv1d_update
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def call(i: int) -> Callable[[], object]:
        layer, new = made[i].layer, made[i].new
        channels, _, _, c_groups, _, _ = made[i].shape
        wide = made[i].batch, c_groups, channels // c_groups
        x, z, dt = (torch.randn(made[i].batch, channels, device="cuda").bfloat16() for _ in range(3))
        if convolved:
            window = torch.zeros(made[i].batch, channels, TAPS - 1, device="cuda", dtype=x.dtype)
            taps = layer.weight.bfloat16(), layer.bias.bfloat16()
            return lambda: causal_conv1d_update(x, window, *taps, "silu")
        C = new.C[:, 0].reshape(wide[0], c_groups, STATES).contiguous()
        heads = [t.view(wide) for t in (x, dt, z)]
        A, state = layer.A.view(*wide[1:], STATES), made[i].state.view(*wide, STATES)
        D, bias = (t.view(wide[1:]) for t in (layer.D, layer.dt_bias))
        given = state, heads[0], heads[1], A, C, C, D, heads[2], bias, True
        return lambda: selective_state_update(*given)

    return graph_us(rotated(call, len(made)))


def measure_selective(name: str, batch: int, args: argparse.Namespace, copy: float) -> list[dict[str, Any]]:
    """All arms of one shape and batch, printed as they come."""
    count, shape, found, peers = args.tokens, SELECTIVE[name], [], {"update": 0.0, "conv": 0.0}
    for replay in args.replay or [count, 16]:
        plan = Plan(count, count, replay, True)
        made = layers(inputs.Mamba1, shape, batch, plan)
        first = made[0]
        if not found and args.peers:
            peers = {"update": time_selective_update(made, False), "conv": time_selective_update(made, True)}
        if not found:
            print(f"\n{name}, batch {batch}: update {peers['update']:.1f} us, its convolution {peers['conv']:.1f} us")
        rounds = inputs.turns(plan, batch, max(CALLS, len(made)), "cuda")
        replayed, written = inputs.means(plan, rounds)
        tried = triton1.forms_for(first.state)
        forms.compiled(tried, first.state, functools.partial(run_selective, first, plan))
        times = {}
        for form in tried if args.form is None else [tried[i] for i in args.form]:
            wrong = check_selective(first, plan, form, *rounds[0])
            if wrong:
                print(f"  replay {replay}, {form}: {wrong}")
                continue
            turns = zip(itertools.cycle(made), rounds)
            times[form] = graph_us(
                [functools.partial(run_selective, one, plan, form, one.state, *pair) for one, pair in turns]
            )
        if not times:
            continue
        time, bytes_moved = min(times.values()), first.step_bytes(replayed, written)
        found.append(
            {
                "shape": name, "batch": batch, "tokens": count, "replay": replay, **peers, "us": time,
                "forms": {str(tuple(f)): t for f, t in times.items()}, "bytes": bytes_moved,
                "floor_us": bytes_moved / copy / 1e3, "replayed": replayed, "written": written,
            }
        )  # fmt: skip
        against = f"{time / peers['update']:.2f} updates, " if peers["update"] else ""
        print(
            f"  replay {replay:2} ({replayed:4.1f} replayed, {written:.0%} written): {time:6.1f} us with convolution "
            f"and gate, {against}{bytes_moved / 1e6:.1f} MB, {bytes_moved / time / 1e3 / copy:.0%} of copy speed",
            flush=True,
        )
        print("      " + ", ".join(f"{tuple(f)} {t:.1f}" for f, t in times.items()))
    return found


if __name__ == "__main__":
    main()
