"""The Mamba-2 mixer that takes the place of attention: state width = head width, one B and x per KV head.

Shapes are those of the released Mamba2InLlama layers: `in_proj` has rows z | x | B | C | dt, the convolution runs
over x | B | C, and the output norm is gated and per head. With sizes of its own (`config.mamba2`) it is the layer of
mamba-ssm: an x per head, B and C for groups of heads, the norm over a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.documents import Documents
from ..kernels.few_rows import Projection, Unscaled, divides
from ..kernels.multistep import Rotation, convolve, folded, multistep
from ..kernels.multistep.fused_step import Front, Gate, fused_step, gated, tap_by_tap
from ..kernels.multistep.snapshot import snapshot_multistep, snapshot_ring_multistep
from ..kernels.scan import scan
from ..kernels.scan.reference import compute_dtype
from .calls import Fill, MambaStep, newest
from .config import HybridConfig
from .mamba import Mamba, uniform
from .rope import rotate
from .state import MambaState, StateRing


class HeadNorm(nn.Module):
    """The scale of the gated norm; the norm itself is over each head alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Mamba2(Mamba):
    """H heads with state [P, N] and one dt each; the convolution runs over the E channels of x | B | C."""

    def __init__(self, config: HybridConfig) -> None:
        self.shape = shape = config.mamba2
        heads, channels = shape.heads, sum(shape.parts)
        super().__init__(config, heads, channels, heads, (heads,), inner=shape.inner, channels=channels)
        self.heads = heads
        self.chunk, self.eps = config.chunk, config.mamba_norm_eps
        self.norm = HeadNorm(self.inner) if config.mamba_norm == "gated" else None

    def _initialise_decay(self, generator: torch.Generator | None) -> None:
        """A uniform in [1, 16] per head, the norm one."""
        decay = torch.empty(self.heads, dtype=torch.float64)
        uniform(decay, 1, 16, generator)
        self.A_log.copy_(decay.log())
        if self.norm is not None:
            self.norm.weight.fill_(1)

    def fuse(self) -> None:
        super().fuse()
        self._tap_by_tap = tap_by_tap(*self._taps, self.conv1d.weight.dtype)
        self._behind = Projection(self.out_proj.weight, self.out_proj.bias)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """What `in_proj` made -> gate z [..., H P]; what a token leaves for later ones: [..., E + H]."""
        z, kept = projected.split((self.inner, self.channels + self.heads), dim=-1)
        if self.b_norm is None:
            return z, kept
        u, raw = self._parts(kept)
        return z, torch.cat((self._inputs(u), raw), dim=-1)

    def _inputs(self, u: Tensor) -> Tensor:
        """The convolution's inputs, in which B and C have their norms, where the teacher had them."""
        if self.b_norm is None:
            return u
        x, b, c = u.split((self.shared, self.shared, self.inner), dim=-1)
        return torch.cat((x, *self._normed(b, c)), dim=-1)

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's inputs [..., E] and the raw dt [..., H]."""
        return kept.split((self.channels, self.heads), dim=-1)

    def _dt(self, raw: Tensor) -> Tensor:
        return F.softplus(raw + self.dt_bias.to(compute_dtype(raw)))

    def _heads(self, convolved: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution outputs -> x [B, L, G, P], B [B, L, G', N], C [B, L, G'', N], after rotation, if any."""
        widths = self.shape.width, self.shape.states, self.shape.states
        parts = zip(convolved.split(self.shape.parts, dim=2), widths, strict=True)
        x, b, c = (part.unflatten(2, (-1, width)) for part, width in parts)
        if self.turned and turn is not None:
            b, c = rotate(b, *turn), rotate(c, *turn)
        return x, b, c

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """The gated norm per head or group, which the output projection gets. y [B, L, H, P], z [..., H P]."""
        return gated(y.reshape(z.shape), z, self._gate())

    def _gate(self, left: bool = False) -> Gate:
        if self.norm is None:
            return Gate(None, self.gate_bias)
        return Gate(self.norm.weight, self.gate_bias, self.shape.normed, self.eps, left)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """A whole sequence. h [B, L, E]; keep bool [B, L, 1] marks real tokens: padding enters neither the
        convolution nor the state, so that left padding is as if it were not there; nor does another document."""
        z, u, raw = self.in_proj(h).split((self.inner, self.channels, self.heads), dim=-1)
        u, dt = self._inputs(u), self._dt(raw)
        if keep is not None:
            u, dt = u * keep, dt * keep
        x, b, c = self._heads(self._conv(u, documents=documents)[0], (cos, sin))
        y, _ = scan(x, dt, self._decay(dt.dtype), b, c, self.D, chunk=self.chunk, documents=documents)
        return self.out_proj(self._gated(y, z))

    def prefill(self, h: Tensor, cache: MambaState, fill: Fill) -> Tensor:
        """Prompts. h [n, L, E]; leaves the state and the convolution's window at each row's end. What is replayed
        stands before the prompt."""
        z, kept = self._split(self.in_proj(h))
        window = state = None
        replayed = 0 if cache.ring is not None else fill.longest
        if not fill.fresh:
            old = cache.inputs[fill.rows.unsqueeze(1), fill.read[:, fill.longest - replayed :]]
            taken = old.shape[1] - replayed
            window, state = self._parts(old[:, :taken])[0], cache.at(fill.rows, fill.start)
            kept = torch.cat((old[:, taken:], kept), dim=1)
            if cache.ring is not None:
                ring, decay = cache.ring.views.rows(fill.rows), self._decay(state.dtype)
                state = folded(ring, decay, state, fill.start, fill.saved, fill.longest)
        u, raw = self._parts(kept)
        dt = self._dt(raw) * fill.counted[:, fill.longest - replayed :]
        convolved, end = self._conv(u, window, None if fill.fresh else fill.lengths + replayed)
        x, b, c = self._heads(convolved, newest(fill.turn, convolved.shape[1]))
        y, state = scan(x, dt, self._decay(dt.dtype), b, c, self.D, state, chunk=self.chunk)
        cache.put(fill.rows, fill.into, fill.end, state)
        cache.inputs[*fill.tail, : self.channels] = fill.window(u) if fill.fresh else end
        return self.out_proj(self._gated(y[:, replayed:], z))

    def mix(self, projected: Tensor, cache: MambaState, call: MambaStep) -> Tensor | Unscaled:
        """T tokens a row, between the two projections: [B * T, …] -> [B * T, H P]."""
        z, kept = self._split(projected)
        if cache.ring is not None:
            return self._step_by_kernel(z, kept, cache, cache.ring, call)
        ring = cache.inputs.view(-1, kept.shape[1])
        ring.index_copy_(0, call.new, kept)
        u, raw = self._parts(ring.index_select(0, call.read).view(call.batch, -1, kept.shape[1]))
        x, b, c = self._heads(self._conv_few(u), call.turn)
        dt = self._dt(raw[:, -x.shape[1] :])
        if call.live is not None:
            dt = dt * call.live
        given = x, dt, self._decay(dt.dtype), b, c[:, -call.count :], self.D, cache.state
        y = snapshot_multistep(*given, call.start) if cache.snapshots else multistep(*given, call.mask, call.settle)
        return self._gated(y, z)

    def _step_by_kernel(
        self, z: Tensor, kept: Tensor, cache: MambaState, ring: StateRing, call: MambaStep
    ) -> Tensor | Unscaled:
        """The same over a ring of what goes into the state: the convolution is not made again."""
        new, decay = kept.unflatten(0, (call.batch, call.count)), self._decay(ring.dt.dtype)
        weight, bias = self._taps
        rotation = Rotation(call.state.rotary, self.shape.parts[0]) if self.turned else None
        if cache.snapshots:
            made = cache.inputs, ring.convolved, ring.dt
            c = convolve(new, weight, bias, self.dt_bias, *made, call.start, self.active, rotation)
            c = c.unflatten(2, (-1, self.shape.states))
            return self._gated(snapshot_ring_multistep(ring.views, c, decay, self.D, cache.state, call.start), z)
        window = cache.inputs, ring.convolved, self.active, self._tap_by_tap, rotation
        whole = self.norm is not None and self.shape.normed == self.inner
        gate = self._gate(left=whole and divides(self._behind, z.new_empty(z.shape)))
        given = new, z, Front(weight, bias, self.dt_bias, *window), ring.views, decay, self.D, cache.state
        return fused_step(*given, call.start, call.saved, call.plan, gate)
