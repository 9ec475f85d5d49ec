"""What a stepping engine keeps between calls, and the indices that one call shares between its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.multistep import Indices
from ..kernels.scan.reference import compute_dtype
from .config import HybridConfig


@dataclass(slots=True)
class KVCache:
    """Keys (rotated) and values of an attention layer, [B, S, G, P] each; position p lies in slot p."""

    keys: Tensor
    values: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]


@dataclass(slots=True)
class MambaState:
    """A Mamba-2 layer: the state at `settled`, and rings of what is needed to go on from any later position."""

    state: Tensor
    """fp32 or fp64 [B, H, P, N]."""
    x: Tensor
    """[B, S, G, P] after the convolution."""
    dt: Tensor
    """fp32 or fp64 [B, S, H] after softplus."""
    b: Tensor
    """[B, S, G, N] after the convolution."""
    inputs: Tensor
    """[B, S, E], the convolution's own inputs."""

    def tensors(self) -> list[Tensor]:
        return [self.state, self.x, self.dt, self.b, self.inputs]

    @property
    def ring(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.dt, self.b


@dataclass(slots=True)
class State:
    """All rows of a batch. `settled` and `end` are int32 [B] on the device, shared by all layers."""

    layers: list[KVCache | MambaState]
    settled: Tensor
    end: Tensor
    steps: int
    capacity: int
    """Positions a row can hold."""
    ring: int
    """Slots of every ring."""
    exact: torch.dtype
    """Of recurrent states."""

    def tensors(self) -> list[Tensor]:
        return [self.settled, self.end, *(t for layer in self.layers for t in layer.tensors())]


@dataclass(slots=True)
class Advance:
    """Indices of one `advance` of T tokens a row, made once and read by every layer."""

    slots: Tensor
    """int64 [B * T], of the caches, flat over B x S."""
    window: Tensor
    """int64 [B * (W - 1)], flat ring slots of the convolution's inputs just before `start`."""
    ring: Indices
    settle: bool
    live: int
    """No row's positions reach beyond this many cache slots."""
    mask: Tensor | None
    """bool [B, 1, R * T, live]: the cache slots that a query may read, repeated for the R heads of a group. None where
    each query reads them all."""
    cos: Tensor
    sin: Tensor


@dataclass(slots=True)
class Fill:
    """Indices of one `prefill` of L tokens in the n rows that have any."""

    rows: Tensor
    """int64 [n]."""
    lengths: Tensor
    """int64 [n], at least 1."""
    start: Tensor
    """int64 [n]."""
    fresh: bool
    """Every row begins anew: nothing of the state is read."""
    flat: tuple[Tensor, Tensor]
    """int64 [M] row and token of every real token, both indices into the n x L block."""
    positions: Tensor
    """int64 [n, L]."""
    window: Tensor
    """int64 [n, W - 1], ring slots of the convolution's inputs just before `start`."""
    tail: Tensor
    """int64 [n, W - 1], the same just before the new end."""
    ring: Indices
    """What is replayed first, of rings cut down to the n rows."""
    live: int
    mask: Tensor | None
    """bool [n, 1, L, live], None if fresh."""
    cos: Tensor
    sin: Tensor


def open_state(
    config: HybridConfig, batch: int, context: int, steps: int, dtype: torch.dtype, device: torch.device
) -> State:
    """Empty rows of `context + steps` positions, with rings for two rounds and the convolution's window.

    Two rounds because a call that settles replays up to `steps` tokens of the last round and writes as many new ones,
    which must not lie in slots that it reads.
    """
    ring = 2 * steps + config.d_conv - 1
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    exact = compute_dtype(torch.empty(0, dtype=dtype))

    def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(batch, *shape, dtype=kind, device=device)

    layers: list[KVCache | MambaState] = []
    for mixer in config.mixers:
        if mixer == "attention":
            layers.append(KVCache(*(zeros(context + steps, groups, width) for _ in range(2))))
        else:
            layers.append(
                MambaState(
                    state=zeros(heads, width, width, kind=exact),
                    x=zeros(ring, groups, width),
                    dt=zeros(ring, heads, kind=exact),
                    b=zeros(ring, groups, width),
                    inputs=zeros(ring, (2 * groups + heads) * width),
                )
            )
    cursor = zeros(kind=torch.int32)
    return State(layers, cursor, cursor.clone(), steps, context + steps, ring, exact)
