"""What a stepping engine keeps between calls."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..harness.interfaces import MambabenchError
from ..kernels.entry import Cursors
from ..kernels.multistep import Plan, Ring, ring_supports, selective_ring_supports
from ..kernels.scan.reference import compute_dtype
from ..kernels.support import chosen
from .config import REMOVED, HybridConfig
from .graphs import Graphs
from .rope import Rope

VARIABLE = "MAMBABENCH_REPLAY"
"""So many tokens, at least those of a round, may stand between a checkpoint and where a call starts, whatever memory
that takes."""
WORTH = {"mamba": 4, "mamba2": 16}
"""Tokens of a replay beyond which fewer writes of the checkpoint save no time: those of Mamba-1 are replayed one after
the other, of Mamba-2 the kernel makes as many as fast as one."""
SHARE = {"mamba": 2.2, "mamba2": 1.12}
"""What a layer may hold, over plain decoding: a state, and the convolution's window."""


@dataclass(slots=True)
class KVCache:
    """Keys (rotated) and values of an attention layer, [B, S, G, P] each; position p lies in slot p."""

    keys: Tensor
    values: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]


@dataclass(slots=True)
class StateRing:
    """Position p lies in slot p mod S, S = replay + steps."""

    convolved: Tensor
    """[B, S, E']: x and B behind the convolution, and B behind its rotation, if any."""
    dt: Tensor
    """[B, S, H], behind softplus."""
    views: Ring
    """The same, by head."""

    def tensors(self) -> list[Tensor]:
        return [self.convolved, self.dt]


@dataclass(slots=True)
class MambaState:
    """A Mamba layer: the state at `saved`, and a ring of what is needed to go on from any later position.

    The ring holds what the input projection made of each token, so that a replay makes from it what the first run of
    the token made. Position p lies in slot p mod S.
    """

    state: Tensor
    """fp32 or fp64: Mamba-2 [B, H, P, N], Mamba-1 [B, D, N]."""
    inputs: Tensor
    """Mamba-2 [B, S, E + H]: the convolution's E inputs and the raw dt. Mamba-1 [B, S, 2 G P + D]: x, B behind its
    rotation, if any, raw dt."""

    snapshots: bool = False
    """Whether there is a state for each position since `settled`, as `kernels.multistep.snapshot` keeps them."""
    by_kernel: bool = False
    """Whether the layer's kernel makes its steps."""
    ring: StateRing | None = None
    """What went into the state of a Mamba-2 layer, which its kernel reads instead."""

    def tensors(self) -> list[Tensor]:
        return [self.state, self.inputs, *(self.ring.tensors() if self.ring else ())]

    def at(self, rows: Tensor, start: Tensor) -> Tensor:
        """What rows int64 [n] go on from at `start` int64 [n]: with a checkpoint, that."""
        return self.state[rows, start % self.state.shape[1]] if self.snapshots else self.state[rows]

    def put(self, rows: Tensor, into: Tensor | slice, end: Tensor, state: Tensor) -> None:
        """Settles rows int64 [n] at `end` int64 [n]; `into` is `rows`, or a slice for all of them."""
        if self.snapshots:
            self.state[rows, end % self.state.shape[1]] = state
        else:
            self.state[into] = state


@dataclass(slots=True)
class NoState:
    """A layer without a mixer keeps nothing."""

    def tensors(self) -> list[Tensor]:
        return []


LayerState = KVCache | MambaState | NoState


@dataclass(slots=True, weakref_slot=True, eq=False)
class State:
    """All rows of a batch. `settled`, `saved`, `base` and `end` are int32 [B] on the device, shared by all layers."""

    layers: list[LayerState]
    settled: Tensor
    saved: Tensor
    """Where the checkpoints of Mamba layers stand, at `settled` or before."""
    base: Tensor
    """Where they stood before the last call."""
    end: Tensor
    steps: int
    replay: int
    """`replayable`: end - saved is never more."""
    capacity: int
    """Positions a row can hold."""
    ring: int
    """`input_slots`."""
    exact: torch.dtype
    """Of recurrent states."""
    rotary: Tensor
    """[capacity, 2, P]: cos and sin of every position."""
    snapshots: bool = False
    """`MambaState.snapshots` of all layers."""
    graphs: Graphs | None = None
    """Calls recorded on this memory."""

    @property
    def cursors(self) -> Cursors:
        return Cursors(self.settled, self.saved, self.base, self.end)

    def tensors(self) -> list[Tensor]:
        """All that belongs to rows."""
        return [*self.cursors, *(t for layer in self.layers for t in layer.tensors())]

    def plan(self, count: int, settle: bool) -> Plan:
        """Of a call of `count` tokens a row."""
        return Plan(count, self.steps, self.replay, settle)


def recurrent(config: HybridConfig, mixer: str) -> tuple[tuple[int, ...], int]:
    """The shape of a row's state in a Mamba layer, and the numbers that a token has in its ring."""
    if mixer == "mamba":
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return (heads * width, config.d_state), (2 * groups + heads) * width
    shape = config.mamba2
    return (shape.heads, shape.width, shape.states), sum(shape.parts) + shape.heads


def steps_by_kernel(config: HybridConfig, mixer: str, like: Tensor, steps: int) -> bool:
    """Whether Mamba layers of this kind and dtype and on this device make steps by their kernel."""
    if mixer == "mamba":
        support = selective_ring_supports(like, config.d_state, steps)
        return chosen("selective_ring_multistep", support)
    widest = max(config.mamba2.width, config.mamba2.states)
    return chosen("ring_multistep", ring_supports(like, widest, steps))


def replayable(config: HybridConfig, like: Tensor, steps: int) -> int:
    """Tokens that a row may go beyond its checkpoints, at least `steps`: as many as are worth their memory where
    kernels replay them, of every layer."""
    kinds = WORTH.keys() & set(config.mixers)
    if not kinds or not all(steps_by_kernel(config, kind, like, steps) for kind in kinds):
        return steps
    asked = os.environ.get(VARIABLE)
    if asked and not asked.isdecimal():
        raise MambabenchError(f"{VARIABLE}={asked}: a number of tokens is wanted")
    return max(steps, int(asked) if asked else min(_worth(config, kind, like, steps) for kind in kinds))


def _worth(config: HybridConfig, mixer: str, like: Tensor, steps: int) -> int:
    """Tokens of a replay that a layer has room for and use of."""
    state, token = recurrent(config, mixer)
    exact = math.prod(state) * compute_dtype(like).itemsize
    window, size = config.d_conv - 1, like.element_size()
    if mixer == "mamba":
        inner = config.num_attention_heads * config.head_dim
        plain, kept, slot = exact + window * inner * size, exact + window * token * size, token * size
    else:
        plain = exact + window * (token - config.mamba2.heads) * size
        kept, slot = exact + (steps + window) * token * size, _ring_bytes(config, like)
    return min(WORTH[mixer], int((SHARE[mixer] * plain - kept) / slot) - steps)


def _ring_bytes(config: HybridConfig, like: Tensor) -> int:
    """Of a token in the ring of a Mamba-2 layer."""
    shape = config.mamba2
    return sum(shape.parts[:2]) * like.element_size() + shape.heads * compute_dtype(like).itemsize


def input_slots(config: HybridConfig, like: Tensor, steps: int) -> int:
    """Slots of the rings of projections: for a replay, a round of new tokens, which must not lie in slots that the
    same call reads, and the convolution's window. Where all layers have rings of what goes into the state, only the
    window is read of them."""
    mixers = config.mixers
    fewer = "mamba2" in mixers and "mamba" not in mixers and steps_by_kernel(config, "mamba2", like, steps)
    return (0 if fewer else replayable(config, like, steps)) + steps + config.d_conv - 1


def held_bytes(config: HybridConfig, like: Tensor, steps: int, snapshots: bool = False) -> int:
    """What a row has in its Mamba layers."""
    total, slots = 0, input_slots(config, like, steps)
    if snapshots:
        for mixer in WORTH.keys() & set(config.mixers):
            state, token = recurrent(config, mixer)
            each = (steps + 1) * math.prod(state) * compute_dtype(like).itemsize
            each += (steps + config.d_conv - 1) * token * like.element_size()
            if mixer == "mamba2" and steps_by_kernel(config, mixer, like, steps):
                each += steps * _ring_bytes(config, like)
            total += config.mixers.count(mixer) * each
        return total
    for mixer in config.mixers:
        if mixer in WORTH:
            state, token = recurrent(config, mixer)
            total += math.prod(state) * compute_dtype(like).itemsize + slots * token * like.element_size()
        if mixer == "mamba2" and steps_by_kernel(config, mixer, like, steps):
            total += (replayable(config, like, steps) + steps) * _ring_bytes(config, like)
    return total


def _state_ring(config: HybridConfig, batch: int, slots: int, like: Tensor) -> StateRing:
    shape = config.mamba2
    convolved = like.new_zeros(batch, slots, sum(shape.parts[:2]))
    dt = like.new_zeros(batch, slots, shape.heads, dtype=compute_dtype(like))
    x, B = convolved.split(shape.parts[:2], dim=2)
    return StateRing(convolved, dt, Ring(x.unflatten(2, (-1, shape.width)), B.unflatten(2, (-1, shape.states)), dt))


def open_state(
    config: HybridConfig, rope: Rope, batch: int, capacity: int, steps: int, like: Tensor, snapshots: bool = False
) -> State:
    """Empty rows of `capacity` positions, in the dtype and on the device of `like`."""
    ring, replay = input_slots(config, like, steps), replayable(config, like, steps)
    if snapshots:
        ring, replay = steps + config.d_conv - 1, steps
    groups, width = config.num_key_value_heads, config.head_dim
    exact = compute_dtype(like)
    layers: list[LayerState] = []
    for mixer in config.mixers:
        if mixer == "attention":
            layers.append(KVCache(*(like.new_zeros(batch, capacity, groups, width) for _ in range(2))))
        elif mixer == REMOVED:
            layers.append(NoState())
        else:
            shape, slot = recurrent(config, mixer)
            by_kernel = steps_by_kernel(config, mixer, like, steps) and (mixer == "mamba2" or not snapshots)
            kept = (steps + 1, *shape) if snapshots else shape
            state, inputs = like.new_zeros(batch, *kept, dtype=exact), like.new_zeros(batch, ring, slot)
            inner = None
            if by_kernel and mixer == "mamba2":
                inner = _state_ring(config, batch, steps if snapshots else replay + steps, like)
            layers.append(MambaState(state, inputs, snapshots, by_kernel, inner))
    cursor = like.new_zeros(batch, dtype=torch.int32)
    cos, sin = rope(torch.arange(capacity, device=like.device).unsqueeze(0), like)
    rotary = torch.stack((cos[0, :, 0], sin[0, :, 0]), dim=1)
    cursors = cursor, cursor.clone(), cursor.clone(), cursor.clone()
    return State(layers, *cursors, steps, replay, capacity, ring, exact, rotary, snapshots)


def _empty(tensors: Sequence[Tensor]) -> None:
    """Zeros in all of them, by a kernel for each dtype: a small model's first token waits for as many launches."""
    for dtype in {tensor.dtype for tensor in tensors}:
        torch._foreach_zero_([tensor for tensor in tensors if tensor.dtype is dtype])


class Kept:
    """States that were given up, with what was recorded on them: the next request of the same sizes takes one over."""

    _all: ClassVar[weakref.WeakSet[Kept]] = weakref.WeakSet()
    """Of every model in this process."""

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._free: list[State] = []
        self._all.add(self)

    def take(self, sizes: tuple[int, int, int, bool], make: Callable[[], State]) -> State:
        """An empty state of so many rows, positions and steps, with snapshots or without, one that was kept or a new
        one. It is kept again once nobody has it."""
        found = [
            state for state in self._free if (len(state.end), state.capacity, state.steps, state.snapshots) == sizes
        ]
        if found:
            whole = found[-1]
            self._free = [state for state in self._free if state is not whole]
            _empty(whole.tensors())
        else:
            whole = self._make(make)
        lent = replace(whole)
        weakref.finalize(lent, self._give_back, whole).atexit = False
        return lent

    def clear(self) -> None:
        """Gives their memory back to the device."""
        self._free = []

    def _make(self, make: Callable[[], State]) -> State:
        try:
            return make()
        except torch.OutOfMemoryError:
            if not any(kept._free for kept in self._all):
                raise
        # Not before here: while the error is handled, its traceback holds what was made before it. Rounds that were
        # recorded on a state hold one of their draft's, which is given up with them.
        while any(kept._free for kept in self._all):
            for kept in self._all:
                kept.clear()
        torch.cuda.empty_cache()
        return make()

    def _give_back(self, state: State) -> None:
        self._free = [*self._free, state][-self._most :]
