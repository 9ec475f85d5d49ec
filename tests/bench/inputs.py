"""What kernels of decoding are given, at named shapes: for the benchmarks and the scripts beside this file."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mambabench.kernels.multistep import Channels, Plan, Projected, Ring, Rotation
from mambabench.kernels.multistep.fused_step import Front, Gate, tap_by_tap
from torch import Tensor

TAPS = 4
"""Of convolutions."""
STATES = 16
"""Of a channel of Mamba-1."""
POSITIONS = 4096
"""That rotations have angles for."""


class Shape2(NamedTuple):
    """Of a Mamba-2 layer. Groups serve equal numbers of heads side by side."""

    heads: int
    x_groups: int
    b_groups: int
    c_groups: int
    width: int
    size: int
    """States of a number of a head."""
    normed: int
    """Numbers that the gated norm takes together."""


class Shape1(NamedTuple):
    """Of a Mamba-1 layer."""

    channels: int
    sources: int
    """Channels of x."""
    groups: int
    """Of B."""
    c_groups: int
    span: int
    """Channels side by side that share no x."""
    repeat: int
    """Channels that share one."""


MAMBA2 = {
    "Mamba2-2.7B": Shape2(80, 80, 1, 1, 64, 128, 5120),
    "Mamba2-paper": Shape2(32, 8, 8, 32, 128, 128, 128),
    "Mamba2-28M": Shape2(8, 4, 4, 8, 64, 64, 64),
    "tiny": Shape2(4, 2, 2, 4, 8, 16, 16),
}
REPLAYED = {"Mamba2-2.7B": 11, "Mamba2-paper": 16, "Mamba2-28M": 9, "tiny": 16}
"""Tokens that the engine replays at most where a round has 9: its rings are as long as memory allows, up to 16."""
MAMBA1 = {
    "Mamba1-2.8B": Shape1(5120, 5120, 1, 1, 5120, 1),
    "Mamba1-paper": Shape1(4096, 1024, 64, 256, 128, 4),
    "tiny": Shape1(32, 16, 2, 4, 8, 2),
}
"""The paper's are layers of its 8B hybrids, 28M is one of a hybrid of a Llama of that size."""


class Turn(NamedTuple):
    """Where each row stands in a round, int32 [B]."""

    start: Tensor
    saved: Tensor


def turns(plan: Plan, batch: int, rounds: int, device: torch.device | str = "cpu") -> list[Turn]:
    """Successive rounds, long after the first: of `plan.count - 1` drafts 0 to all are accepted, with equal chances."""
    dice = torch.Generator().manual_seed(0)
    start = torch.zeros(batch, dtype=torch.int32)
    saved, made = start, []
    for _ in range(50 + rounds):
        saved = torch.where(plan.due(start, saved), start, saved)
        start = start + torch.randint(1, plan.count + 1, (batch,), generator=dice, dtype=torch.int32)
        made.append(Turn(start.to(device), saved.to(device)))
    return made[50:]


def means(plan: Plan, rounds: list[Turn]) -> tuple[float, float]:
    """Tokens that a row replays, and the share of rows that write their checkpoint."""
    replayed = torch.stack([turn.start - turn.saved for turn in rounds]).float().mean()
    return float(replayed), float(torch.stack([plan.due(*turn) for turn in rounds]).float().mean())


class Mamba2:
    """Buffers of a Mamba-2 layer, and T new tokens: in the ring already, and in front of the convolution, whose B and C
    may be `rotated`."""

    def __init__(
        self, shape: Shape2, batch: int, plan: Plan, device: torch.device | str = "cuda", rotated: bool = False
    ) -> None:
        heads, x_groups, b_groups, c_groups, width, size, _ = shape
        self.shape, self.batch, self.plan = shape, batch, plan
        slots, inner, kept = plan.replay + plan.steps, heads * width, x_groups * width + b_groups * size
        channels = kept + c_groups * size

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device, dtype=torch.bfloat16)

        self.whole, self.C = normal(batch, slots, kept), normal(batch, plan.count, c_groups, size)
        self.dt = 0.1 * torch.rand(batch, slots, heads, device=device)
        self.A, self.D = -torch.rand(heads, device=device) - 0.5, torch.ones(heads, device=device)
        self.dt_bias = torch.rand(heads, device=device) - 4
        self.state = torch.randn(batch, heads, width, size, device=device)
        projected = normal(batch, plan.count, inner + channels + heads)
        self.z, self.u = projected[..., :inner], projected[..., inner:]
        self.window = normal(batch, plan.count + TAPS - 1, channels + heads)
        self.weight, self.bias = normal(channels, TAPS).float(), torch.zeros(channels, device=device)
        self.taps = tap_by_tap(self.weight, self.bias, self.u.dtype)
        self.norm = normal(inner)
        angles = 6.3 * torch.rand(POSITIONS if rotated else 0, size // 2, device=device).repeat(1, 2)
        self.rotary = torch.stack((angles.cos(), angles.sin()), dim=1).bfloat16()

    @property
    def rotation(self) -> Rotation | None:
        return Rotation(self.rotary, self.shape.x_groups * self.shape.width) if len(self.rotary) else None

    @property
    def ring(self) -> Ring:
        shape = self.shape
        x, B = self.whole.tensor_split((shape.x_groups * shape.width,), dim=2)
        return Ring(x.unflatten(2, (-1, shape.width)), B.unflatten(2, (-1, shape.size)), self.dt)

    def row(self, row: int) -> Mamba2:
        """A copy of one row in fp64."""
        one, some = copy.copy(self), slice(row, row + 1)
        for name in ("whole", "C", "dt", "state", "z", "u", "window"):
            setattr(one, name, getattr(self, name)[some].double())
        for name in ("A", "D", "dt_bias", "weight", "bias", "taps", "norm", "rotary"):
            setattr(one, name, getattr(self, name).double())
        return one

    def step(self, turn: Turn) -> tuple[object, ...]:
        """Arguments of `ring_multistep`."""
        return self.ring, self.C, self.A, self.D, self.state, *turn, self.plan

    def fused_step(self, turn: Turn) -> tuple[object, ...]:
        """Arguments of `fused_step`, of which the division of a norm over all heads is left to the product behind."""
        front = Front(self.weight, self.bias, self.dt_bias, self.window, self.whole, True, self.taps, self.rotation)
        gate = Gate(self.norm, None, self.shape.normed, 1e-5, left=self.shape.normed == len(self.norm))
        given = self.u, self.z.flatten(0, 1), front, self.ring
        return *given, self.A, self.D, self.state, *turn, self.plan, gate

    def convolution(self, start: Tensor) -> tuple[object, ...]:
        """Arguments of `convolve`."""
        rings = self.window, self.whole, self.dt
        return self.u, self.weight, self.bias, self.dt_bias, *rings, start, True, self.rotation

    def state_bytes(self, written: float) -> float:
        """The checkpoint read, and written in a part of the rows."""
        return self.state.nbytes * (1 + written)

    def token_bytes(self, tokens: float) -> float:
        """x, B and dt in the ring."""
        return self.batch * tokens * (2 * self.whole.shape[2] + 4 * self.shape.heads)

    def step_bytes(self, replayed: float, written: float) -> float:
        """The checkpoint; x, B and dt of all tokens; C and y of new ones."""
        new = self.C.nbytes + self.z.numel() * 2
        return self.state_bytes(written) + self.token_bytes(replayed + self.plan.count) + new

    def convolution_bytes(self) -> float:
        """Inputs read and kept, those before them read; x, B, dt and C."""
        before = 2 * self.batch * (TAPS - 1) * len(self.weight)
        return 2 * 2 * self.u.numel() + before + self.token_bytes(self.plan.count) + self.C.nbytes

    def fused_step_bytes(self, replayed: float, written: float) -> float:
        """Those of both, without what one hands to the other; the gate."""
        handed = 2 * self.C.nbytes + self.token_bytes(self.plan.count)
        return self.step_bytes(replayed, written) + self.convolution_bytes() - handed + 2 * self.z.numel()

    def tokens(self, turn: Turn, row: int) -> tuple[Tensor, ...]:
        """x, dt, B of one row's tokens from its checkpoint to the last, and C of new ones, as fp64 of every head."""
        start, saved = (int(at[row]) for at in turn)
        slots = torch.arange(saved, start + self.plan.count, device=self.state.device) % self.ring.dt.shape[1]
        x, B, dt = (t[row : row + 1, slots].double() for t in self.ring.parts())
        heads = self.shape.heads
        x, B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (x, B, self.C[row : row + 1].double()))
        return x, dt, B, C


class Mamba1:
    """Buffers of a Mamba-1 layer, and T new tokens as its projections made them."""

    def __init__(self, shape: Shape1, batch: int, plan: Plan, device: torch.device | str = "cuda") -> None:
        channels, sources, groups, c_groups, span, repeat = shape
        self.shape, self.batch, self.plan = shape, batch, plan
        slots, widths = plan.replay + plan.steps + TAPS - 1, (sources, groups * STATES, channels)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device)

        self.ring = normal(batch, slots, sum(widths)).bfloat16()
        given = normal(batch, plan.count, sum(widths) + c_groups * STATES + channels).bfloat16()
        x, B, dt, C, z = given.split((*widths, c_groups * STATES, channels), dim=2)
        self.new = Projected(x, B, C, dt, z)
        decay, ones = -normal(channels, STATES).exp(), torch.ones(channels, device=device)
        taps = normal(channels, TAPS), normal(channels)
        self.layer = Channels(decay, ones, normal(channels) - 3, *taps, silu=True, repeat=repeat, span=span)
        self.state = normal(batch, channels, STATES)

    def step(self, turn: Turn) -> tuple[object, ...]:
        """Arguments of `selective_ring_multistep`."""
        return self.new, self.layer, self.ring, self.state, *turn, self.plan

    def parameters(self) -> tuple[Tensor, ...]:
        layer = self.layer
        return layer.A, layer.D, layer.dt_bias, layer.weight, layer.bias

    def step_bytes(self, replayed: float, written: float) -> float:
        """Parameters and checkpoint read, this written in a part of the rows; what the ring keeps of all tokens read,
        of new ones written too; C, z and y of new ones."""
        kept = 2 * self.ring.shape[2] * (replayed + 2 * self.plan.count)
        new = 2 * self.plan.count * (self.new.C.shape[2] + 2 * self.shape.channels)
        fixed = sum(t.nbytes for t in self.parameters())
        return fixed + self.state.nbytes * (1 + written) + self.batch * (kept + new)

    def tokens(self, turn: Turn, row: int) -> tuple[Tensor, ...]:
        """x, dt, B of one row's tokens from its checkpoint to the last, and C of new ones, as fp64 behind convolution
        and softplus, of every channel."""
        start, saved = (int(at[row]) for at in turn)
        slots = torch.arange(saved - TAPS + 1, start, device=self.state.device) % self.ring.shape[1]
        new = torch.cat((self.new.x, self.new.B, self.new.dt), dim=2)
        both = torch.cat((self.ring[row, slots], new[row])).double()
        x, B, dt = both.split((self.shape.sources, self.shape.groups * STATES, self.shape.channels), dim=1)
        dt_bias, weight, bias = (t.double() for t in self.parameters()[2:])
        source = self.layer.source()
        x = F.silu((x[:, source].unfold(0, TAPS, 1) * weight).sum(2) + bias)
        B = B[TAPS - 1 :].unflatten(1, (-1, STATES))[:, source // (self.shape.sources // self.shape.groups)]
        C = self.new.C[row].double().unflatten(1, (-1, STATES))
        return x[None], F.softplus(dt[TAPS - 1 :] + dt_bias)[None], B[None], C[None]


class Attention(NamedTuple):
    """Of a decoding step: arguments of `decode_attention`."""

    projected: Tensor
    keys: Tensor
    values: Tensor
    start: Tensor
    rotary: Tensor


HEADS = {"Llama-3-8B": (32, 8, 128), "tiny": (4, 2, 8)}
"""Of queries, of keys, and their width."""
ROOM = 64
"""Positions behind the new tokens."""


def attention(shape: str, batch: int, context: int, count: int, device: torch.device | str = "cuda") -> Attention:
    """`count` new tokens a row, behind `context` others."""
    heads, groups, width = HEADS[shape]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=torch.bfloat16)

    slots = context + count + ROOM
    caches = normal(2, batch, slots, groups, width)
    angles = torch.rand(slots, width // 2, device=device).repeat(1, 2)
    rotary = torch.stack((angles.cos(), angles.sin()), dim=1).bfloat16()
    start = torch.full((batch,), context, dtype=torch.int32, device=device)
    return Attention(normal(batch * count, (heads + 2 * groups) * width), *caches, start, rotary)


def live_bytes(shape: str, batch: int, context: int, count: int) -> int:
    """Of keys and values that a step reads."""
    _, groups, width = HEADS[shape]
    return 2 * 2 * batch * (context + count) * groups * width


class Product(NamedTuple):
    """Of a few rows with large weights."""

    width: int
    lines: int
    """Of the weights."""
    kind: str
    """norm, gate (with a norm), sum, or head (norm, fp32 out)."""


PRODUCTS = {
    "qkv": Product(4096, 6144, "norm"),
    "o": Product(4096, 4096, "sum"),
    "gate_up": Product(4096, 28_672, "gate"),
    "down": Product(14_336, 4096, "sum"),
    "head": Product(4096, 128_256, "head"),
    "in_proj": Product(2560, 10_576, "norm"),
    "out_proj": Product(5120, 2560, "sum"),
    **{f"tiny-{kind}": Product(32, 64, kind) for kind in ("norm", "gate", "sum", "head")},
}
"""Those of Llama-3-8B, then of Mamba2-2.7B."""
