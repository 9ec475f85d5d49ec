"""The indices of one call of the stepping engine: made once, read by every layer of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..kernels.decode_attention import serves
from ..kernels.multistep import Plan, visible
from .config import HybridConfig
from .state import State


@dataclass(slots=True)
class AttentionStep:
    """T tokens a row, for attention layers."""

    batch: int
    start: Tensor
    """int32 [B], on the device."""
    rotary: Tensor
    """[capacity, 2, P]: cos and sin of every position."""
    indices: AttentionIndices | None
    """None where the kernel runs, which makes its own."""


@dataclass(slots=True)
class AttentionIndices:
    """What PyTorch's attention needs beside."""

    slots: Tensor
    """int64 [B * T], of the caches, flat over B x S."""
    live: int
    """No row's positions reach beyond this many cache slots."""
    mask: Tensor | None
    """bool [B, 1, R * T, live]: the cache slots that a query may read, repeated for the R heads of a group. None where
    each query reads them all."""
    cos: Tensor
    sin: Tensor


@dataclass(eq=False)
class MambaStep:
    """T tokens a row and the R before them, for Mamba layers. Those from `saved` on are replayed; earlier ones are
    among them because rows differ, or because R must not depend on data. Kernels need no more than the positions;
    indices for PyTorch are made when the first layer asks for them."""

    batch: int
    count: int
    """T."""
    start: Tensor
    """int32 [B], on the device."""
    saved: Tensor
    """int32 [B], where the checkpoints stand before the call."""
    settle: bool
    plan: Plan
    """The same for layers whose ring holds what goes into the state."""
    state: State
    longest: int
    """R."""
    window: int
    """W - 1, of the convolution."""
    turned: bool

    @cached_property
    def _positions(self) -> Tensor:
        """int64 [B, W - 1 + R + T]."""
        first = -self.window - self.longest
        return self.start.long().unsqueeze(1) + torch.arange(first, self.count, device=self.start.device)

    @cached_property
    def read(self) -> Tensor:
        """int64 [B * (W - 1 + R + T)], ring slots of the convolution's window, the R tokens and the new ones, flat over
        B x S."""
        rows = torch.arange(self.batch, device=self.start.device).unsqueeze(1)
        return (rows * self.state.ring + self._positions % self.state.ring).flatten()

    @cached_property
    def new(self) -> Tensor:
        """int64 [B * T], the same of the new tokens."""
        return self.read.view(self.batch, -1)[:, self.window + self.longest :].flatten()

    @cached_property
    def live(self) -> Tensor | None:
        """[B, R + T, 1], 0 for a token before `saved`, else 1; in the dtype of the state. None where R = 0."""
        if not self.longest:
            return None
        counted = self._positions[:, self.window :] >= self.saved.unsqueeze(1)
        return counted.to(self.state.exact).unsqueeze(-1)

    @cached_property
    def mask(self) -> Tensor:
        """`visible(R, T)`."""
        return visible(self.longest, self.count, self.state.exact, self.start.device)

    @cached_property
    def turn(self) -> tuple[Tensor, Tensor] | None:
        """cos and sin [B, R + T, 1, P], where B and C are rotated."""
        return _turn(self.state, self._positions[:, self.window :]) if self.turned else None


@dataclass(slots=True)
class Fill:
    """Prompts of up to L tokens in the n rows that have any."""

    rows: Tensor
    """int64 [n]."""
    lengths: Tensor
    """int64 [n], at least 1."""
    start: Tensor
    """int64 [n], where they begin."""
    saved: Tensor
    """int64 [n], where the checkpoints stand before the call."""
    fresh: bool
    """Every row begins anew: nothing of the state is read."""
    into: Tensor | slice
    """The same as `rows`; a slice where those are all."""
    end: Tensor
    """int64 [n], positions reached."""
    flat: tuple[Tensor, Tensor] | None
    """int64 [M] row and token of every real token, both indices into the n x L block. None if fresh: what lies behind a
    row's end is never read."""
    positions: Tensor
    """int64 [n, L]."""
    live: int
    """No row's positions reach beyond this many cache slots; 0 if fresh."""
    mask: Tensor | None
    """bool [n, 1, L, live], None if fresh."""
    cos: Tensor
    sin: Tensor
    read: Tensor
    """int64 [n, W - 1 + R], ring slots of the convolution's window and of the R tokens before `start`."""
    longest: int
    """R."""
    real: Tensor
    """bool [n, R + L]: neither before `saved` nor padding."""
    counted: Tensor
    """[n, R + L, 1], the same as 0 or 1, in the dtype of states."""
    tail: tuple[Tensor, Tensor]
    """int64 [n, 1] and [n, W - 1]: rows and ring slots of the convolution's window at the end."""
    taken: tuple[Tensor, Tensor]
    """int64 [n, 1] and [n, W - 1]: where in the n x L block fresh prompts have that window."""
    absent: Tensor
    """bool [n, W - 1, 1]: what of it stands before the beginning."""
    sliding: Tensor | None = None
    """bool [n or 1, 1, L, live (fresh: L)], what layers with a sliding window read. None where that is `mask`."""
    turn: tuple[Tensor, Tensor] | None = None
    """cos and sin [n, R + L, 1, P], where B and C are rotated."""

    def window(self, u: Tensor) -> Tensor:
        """The convolution's window at the end of fresh prompts: u [n, L, E] -> [n, W - 1, E]."""
        return u[self.taken].masked_fill_(self.absent, 0)


def attention_step(
    config: HybridConfig, state: State, start: Tensor, count: int, live: int, even: bool, window: int = 0
) -> AttentionStep:
    """`count` tokens at `start` [B]; `even` says that all rows start at one position. With a window each token reads
    the last `window` slots up to its own."""
    heads, groups, rotary = config.num_attention_heads, config.num_key_value_heads, state.rotary
    if serves(rotary, rotary.dtype, heads, groups, config.head_dim, count, rotary):
        return AttentionStep(start.shape[0], start, rotary, None)
    indices = _attention_indices(heads // groups, state, start, count, live, even, window)
    return AttentionStep(start.shape[0], start, rotary, indices)


def _attention_indices(
    repeat: int, state: State, start: Tensor, count: int, live: int, even: bool, window: int
) -> AttentionIndices:
    batch, device = start.shape[0], start.device
    positions = start.long().unsqueeze(1) + torch.arange(count, device=device)
    rows = torch.arange(batch, device=device).unsqueeze(1)
    mask = None
    narrow = 0 < window < live
    if count > 1 or not even or narrow:
        slots = torch.arange(live, device=device)
        mask = slots <= positions.unsqueeze(-1)
        if narrow:
            mask &= slots > positions.unsqueeze(-1) - window
        mask = mask.repeat(1, repeat, 1).unsqueeze(1)
    cos, sin = state.rotary.index_select(0, positions.flatten()).unsqueeze(2).unbind(1)
    return AttentionIndices((rows * state.capacity + positions).flatten(), live, mask, cos, sin)


def mamba_step(config: HybridConfig, state: State, start: Tensor, count: int, longest: int, settle: bool) -> MambaStep:
    """`count` tokens at `start` [B] after the `longest` tokens before them."""
    return MambaStep(
        batch=start.shape[0],
        count=count,
        start=start,
        saved=state.base,
        settle=settle,
        plan=state.plan(count, settle),
        state=state,
        longest=longest,
        window=config.d_conv - 1,
        turned=config.mamba_rope,
    )


def fill(
    config: HybridConfig, state: State, ids: Tensor, rows: Tensor | None, lengths: Tensor, start: Tensor | None
) -> Fill:
    """Prompts ids [n, L] of `lengths` [n] tokens for `rows` [n] (None: all), from `start` [n] on or from the beginning,
    where the host does not wait for the device."""
    device, window, into = ids.device, config.d_conv - 1, slice(None) if rows is None else rows
    each = torch.arange(ids.shape[0], device=device)
    rows = each if rows is None else rows
    first = torch.zeros_like(lengths) if start is None else start
    saved, end = state.saved[into].long(), first + lengths
    tokens = torch.arange(ids.shape[1], device=device)
    positions, given = first.unsqueeze(1) + tokens, tokens < lengths.unsqueeze(1)
    live, longest, mask, flat = 0, 0, None, None
    if start is not None:
        live = int(end.max())
        longest = 0 if state.snapshots else int((start - saved).max())
        mask = (torch.arange(live, device=device) <= positions.unsqueeze(-1)).unsqueeze(1)
        row, token = given.nonzero(as_tuple=True)
        flat = row, token
    sliding, reach = None, config.sliding_window or 0
    slots = torch.arange(live or ids.shape[1], device=device)
    if "sliding" in config.calls and reach < slots.shape[0]:
        queries = (tokens if start is None else positions).unsqueeze(-1)
        sliding = ((slots <= queries) & (slots > queries - reach)).view(-1, 1, *queries.shape[-2:-1], slots.shape[0])
    before = first.unsqueeze(1) + torch.arange(-window - longest, 0, device=device)
    last = torch.arange(-window, 0, device=device)
    taken = lengths.unsqueeze(1) + last
    real = torch.cat((before[:, window:] >= saved.unsqueeze(1), given), dim=1) if longest else given
    cos, sin = state.rotary[positions.clamp(max=state.capacity - 1)].unsqueeze(3).unbind(2)
    return Fill(
        rows=rows,
        lengths=lengths,
        start=first,
        saved=saved,
        fresh=start is None,
        into=into,
        end=end,
        flat=flat,
        positions=positions,
        live=live,
        mask=mask,
        sliding=sliding,
        cos=cos,
        sin=sin,
        read=before % state.ring,
        longest=longest,
        real=real,
        counted=real.to(state.exact).unsqueeze(-1),
        tail=(rows.unsqueeze(1), (end.unsqueeze(1) + last) % state.ring),
        taken=(each.unsqueeze(1), taken.clamp(min=0)),
        absent=(taken < 0).unsqueeze(-1),
        turn=_turn(state, torch.cat((before[:, window:], positions), dim=1)) if config.mamba_rope else None,
    )


def newest(turn: tuple[Tensor, Tensor] | None, count: int) -> tuple[Tensor, Tensor] | None:
    """cos and sin of the last `count` of their tokens."""
    return None if turn is None else (turn[0][:, -count:], turn[1][:, -count:])


def _turn(state: State, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, 1, P] of positions [B, L]; those outside of a row stand for tokens that nothing reads."""
    cos, sin = state.rotary[positions.clamp(0, state.capacity - 1)].unsqueeze(3).unbind(2)
    return cos, sin
