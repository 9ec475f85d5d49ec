"""The decoding step of a Mamba-2 layer over a ring of its inputs, by Triton kernels where they serve.

A layer keeps a checkpoint of its state and, in a ring, what the tokens since then put into it: x and B behind the
convolution, and dt. Position p lies in slot p mod S. `convolve` puts new tokens there, `ring_multistep` goes on from
the checkpoint to the outputs of those. docs/decoding-kernels.md says why the ring holds what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv.reference import conv_few
from ..pointwise.reference import rotate
from ..support import Support, chosen, installed, kernel, served
from .reference import multistep, visible

MODULE = f"{__package__}.triton2"
CONVOLUTION = f"{__package__}.triton_convolve"
DTYPES = (torch.bfloat16, torch.float32)
WIDEST = 256
"""Of states and heads, and the most tokens of a replay: tiles of the kernel are held in registers."""
LONGEST = 64
"""Tokens of a call."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Views of what B rows keep of S tokens each. Every group serves an equal number of the H heads side by side."""

    x: Tensor
    """[B, S, G, P]."""
    B: Tensor
    """[B, S, G', N]."""
    dt: Tensor
    """[B, S, H], after softplus, fp32 or fp64."""

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What makes the state."""
        return self.x, self.B, self.dt

    def rows(self, rows: Tensor) -> Ring:
        """A copy of these rows."""
        return Ring(self.x[rows], self.B[rows], self.dt[rows])


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of calls, which are the same for every layer and call of an engine."""

    count: int
    """T new tokens a row."""
    steps: int
    """Tokens that a row may go beyond its settled position."""
    replay: int
    """Tokens that a row may go beyond its checkpoint before new ones, at least `steps`. With no more than that each
    call that settles writes the checkpoint, with more only some do: the ring has `replay + steps` slots or more."""
    settle: bool

    def due(self, start: Tensor, saved: Tensor) -> Tensor:
        """The rows [B] whose checkpoint this call moves to `start`: another round might not fit behind it."""
        replayed = start - saved
        return (replayed > 0) & (replayed + self.steps > self.replay) & self.settle


@dataclass(frozen=True, slots=True)
class Rotation:
    """Turns B and C behind the convolution, as Llama turns queries and keys: a number of the first half of a group with
    that of the second."""

    table: Tensor
    """[capacity, 2, N]: cos and sin of every position, whose halves are alike. A call goes no further than these."""
    unturned: int
    """Channels in front of those of B and C, which are x's."""


def ring_supports(like: Tensor, width: int, steps: int) -> Support:
    """Whether layers with states up to `width` wide keep a ring for the kernel, in the dtype and on the device of
    `like`."""
    support = served(like, DTYPES)
    if not support:
        return support
    if width > WIDEST or steps > LONGEST:
        return Support.no(f"the kernel has states of up to {WIDEST} and calls of up to {LONGEST} tokens")
    return installed("triton")


def supports(ring: Ring, C: Tensor, state: Tensor, plan: Plan) -> Support:
    """Whether `ring_multistep` runs as a kernel."""
    support = served(ring.x, DTYPES)
    if not support:
        return support
    if ring.B.dtype != ring.x.dtype or C.dtype != ring.x.dtype:
        return Support.no("the kernel takes x, B and C in one dtype")
    if state.dtype != torch.float32 or ring.dt.dtype != torch.float32 or not state.is_contiguous():
        return Support.no("the kernel takes a contiguous state and dt in fp32")
    if max(*state.shape[2:], plan.replay) > WIDEST or plan.count > LONGEST:
        return Support.no(f"the kernel has states and replays of up to {WIDEST} and calls of up to {LONGEST} tokens")
    if any(t.stride(3) != 1 or t.stride(2) != t.shape[3] for t in (ring.x, ring.B, C)) or ring.dt.stride(2) != 1:
        return Support.no("the kernel takes a token's numbers side by side")
    return installed("triton")


def ring_multistep(
    ring: Ring, C: Tensor, A: Tensor, D: Tensor, state: Tensor, start: Tensor, saved: Tensor, plan: Plan
) -> Tensor:
    """T tokens from `start` int32 [B], which are in the ring already.

    C [B, T, G'', N], of which each group serves an equal number of heads side by side, as those of x and B do; A [H]
    (negative), D [H], state [B, H, P, N]: the checkpoint at `saved` int32 [B], moved to `start` in the rows that are
    `plan.due`, of which the caller takes note behind its last layer. saved <= start <= saved + plan.replay.
    Returns y [B, T, H, P] in x's dtype, or better in plain PyTorch.
    """
    if chosen("ring_multistep", supports(ring, C, state, plan)):
        y: Tensor = kernel(MODULE, "ring_multistep")(ring, C, A, D, state, start, saved, plan)
        return y
    return plain_ring_multistep(ring, C, A, D, state, start, saved, plan)


def plain_ring_multistep(
    ring: Ring, C: Tensor, A: Tensor, D: Tensor, state: Tensor, start: Tensor, saved: Tensor, plan: Plan
) -> Tensor:
    """The same in PyTorch, on a copy of what it reads."""
    heads, device = state.shape[1], state.device
    x, B, dt = _taken(ring, start, saved, plan.replay, plan.count)
    groups = x.shape[2] if x.shape[2] == B.shape[2] else heads
    x, B, C = (t.repeat_interleave(n // t.shape[2], 2) for t, n in ((x, groups), (B, groups), (C, heads)))
    mask, moved = visible(plan.replay, plan.count, state.dtype, device), state.clone()
    y = multistep(x, dt, A, B, C, D, moved, mask, plan.settle)
    torch.where(plan.due(start, saved).view(-1, 1, 1, 1), moved, state, out=state)
    return y


def folded(ring: Ring, A: Tensor, state: Tensor, start: Tensor, saved: Tensor, longest: int) -> Tensor:
    """The state [B, H, P, N] at `start` [B] of rows whose checkpoint `state` is at most `longest` tokens behind."""
    if not longest:
        return state
    x, B, dt = _taken(ring, start, saved, longest, 0)
    heads, dt = state.shape[1], dt.to(state.dtype)
    x, B = (t.to(state.dtype).repeat_interleave(heads // t.shape[2], 2) for t in (x, B))
    decays = torch.cumsum(dt * A.to(dt.dtype), dim=1)
    weights = torch.exp(decays[:, -1:] - decays) * dt
    added = torch.einsum("brhp,brhn->bhpn", weights.unsqueeze(-1) * x, B)
    return torch.addcmul(added, state, torch.exp(decays[:, -1, :, None, None]))


def _taken(ring: Ring, start: Tensor, saved: Tensor, before: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, B and dt of the `before` tokens ahead of `start` and the `count` from there on: 0 for what went into the
    checkpoint."""
    slots, device = ring.dt.shape[1], start.device
    positions = start.long().unsqueeze(1) + torch.arange(-before, count, device=device)
    gone = positions < saved.unsqueeze(1)
    taken = torch.arange(start.shape[0], device=device).unsqueeze(1), positions % slots
    x, B, dt = (t[taken].masked_fill(gone.view(*gone.shape, *(1,) * (t.dim() - 2)), 0) for t in ring.parts())
    return x, B, dt


def between_tokens(t: Tensor) -> int:
    """The stride from token to token of t [B, T, E], rows of which lie one behind the other. 0 where they do not, or
    where the numbers of a token are apart. That of a dimension of one says nothing."""
    batch, count = t.shape[:2]
    stride = t.stride(1) if count > 1 else t.stride(0)
    even = min(batch, count) == 1 or t.stride(0) == count * stride
    return stride if even and t.stride(2) == 1 else 0


def convolve_supports(
    u: Tensor, weight: Tensor, window: Tensor, ring: Tensor, dt: Tensor, rotation: Rotation | None = None
) -> Support:
    """Whether `convolve` runs as a kernel."""
    support = served(u, DTYPES)
    if not support:
        return support
    if window.dtype != u.dtype or ring.dtype != u.dtype or dt.dtype != torch.float32:
        return Support.no("the kernel takes the convolution's inputs and outputs in one dtype, dt in fp32")
    if not all(t.is_contiguous() for t in (weight, window, ring, dt)):
        return Support.no("the kernel takes contiguous rings")
    if not between_tokens(u):
        return Support.no("the kernel takes tokens one behind the other")
    if rotation is not None and (rotation.table.dtype != u.dtype or not rotation.table.is_contiguous()):
        return Support.no("the kernel takes contiguous cos and sin in the inputs' dtype")
    return installed("triton")


def convolve(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    window: Tensor,
    ring: Tensor,
    dt: Tensor,
    start: Tensor,
    silu: bool,
    rotation: Rotation | None = None,
) -> Tensor:
    """Puts T new tokens at `start` int32 [B] into the rings. Returns what these do not keep of the convolution's
    outputs, those of the last E - E' channels [B, T, E - E'].

    u [B, T, E + H]: the convolution's inputs, and dt before its bias dt_bias [H] and softplus; weight [E, W] and bias
    [E] fp32 or better; window [B, S', E + H]: earlier u, S' >= T + W - 1, of which the W - 1 before `start` are read
    and to which u is added; ring [B, S, E'] gets the outputs of the first E' channels, dt [B, S, H] the step sizes.
    With a `rotation` outputs are rotated as the positions of their tokens say.
    """
    given = u, weight, bias, dt_bias, window, ring, dt, start, silu, rotation
    if chosen("convolve", convolve_supports(u, weight, window, ring, dt, rotation)):
        left: Tensor = kernel(CONVOLUTION, "convolve")(*given)
        return left
    return plain_convolve(*given)


def plain_convolve(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    window: Tensor,
    ring: Tensor,
    dt: Tensor,
    start: Tensor,
    silu: bool,
    rotation: Rotation | None = None,
) -> Tensor:
    """The same in PyTorch, which rounds as the convolution of whole sequences does in PyTorch: twice."""
    (batch, count), (channels, taps) = u.shape[:2], weight.shape
    rows = torch.arange(batch, device=u.device).unsqueeze(1)
    positions = start.long().unsqueeze(1) + torch.arange(1 - taps, count, device=u.device)
    new = positions[:, taps - 1 :]
    joined = torch.cat((window[rows, positions[:, : taps - 1] % window.shape[1]], u), dim=1)[..., :channels]
    convolved = conv_few(joined, weight, bias)
    convolved = F.silu(convolved) if silu else convolved
    if rotation is not None:
        x, others = convolved.tensor_split((rotation.unturned,), dim=2)
        convolved = torch.cat((x, turned(others, rotation.table, new)), dim=2)
    kept, left = convolved.tensor_split((ring.shape[2],), dim=2)
    ring[rows, new % ring.shape[1]] = kept
    dt[rows, new % dt.shape[1]] = F.softplus(u[..., channels:].to(dt.dtype) + dt_bias.to(dt.dtype))
    window[rows, new % window.shape[1]] = u
    return left


def turned(numbers: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """[B, T, n N], rotated by N as the `table` [capacity, 2, N] says for positions int64 [B, T]."""
    cos, sin = table[positions.clamp(max=len(table) - 1)].unsqueeze(3).unbind(2)
    return rotate(numbers.unflatten(2, (-1, table.shape[2])), cos, sin).flatten(2)
