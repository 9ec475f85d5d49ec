"""The Mamba-1 mixer that takes the place of attention: states of up to 16 numbers, a step size for every channel.

Heads are cut into sub-blocks as wide as the state, each a group with its own B and C (MambaInLlama has 256 of them in
a layer of 32 heads of 128). Sub-block s of head h is paired with sub-block s of the KV head that the head attended
to, so that a layer begins as linear attention whatever the ratio of heads. The convolution runs over x alone, and
behind the scan there is a gate and no norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.conv import window_at
from ..kernels.documents import Documents
from ..kernels.gated_norm import silu_gated
from ..kernels.multistep import Channels, Projected, selective_multistep, selective_ring_multistep
from ..kernels.multistep.snapshot import selective_snapshot_multistep
from ..kernels.scan.reference import compute_dtype
from ..kernels.selective_scan import selective_scan, step_sizes
from .calls import Fill, MambaStep, newest
from .config import HybridConfig
from .mamba import Mamba, uniform
from .rope import rotate
from .state import MambaState


class Mamba1(Mamba):
    """D = H P channels with N = min(16, P) states each, in K = D / N groups of N channels.

    dt has `rank` rows of the input projection, from which `dt_proj` makes one per channel. Its bias is `dt_bias`, apart
    from it because it stays exact, and is added once.
    """

    def __init__(self, config: HybridConfig) -> None:
        inner = config.num_attention_heads * config.head_dim
        rank, size = -(-config.hidden_size // 16), config.d_state
        super().__init__(config, dt_rows=rank, convolved=inner, steps=inner, decays=(inner, size))
        self.rank, self.size = rank, size
        self.twice = config.mamba_dt_bias == "twice"
        self.block = size if config.mamba_sub_blocks == "released" else self.width
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self._channels: Channels

    def fuse(self) -> None:
        """Gets ready for inference, the kernel's parameters too."""
        super().fuse()
        weight, bias = self._taps
        self._channels = Channels(
            A=self._decay(compute_dtype(self.A_log)),
            D=self.D.detach(),
            dt_bias=self.step_bias.detach(),
            weight=weight,
            bias=bias,
            silu=self.active,
            gate_bias=None if self.gate_bias is None else self.gate_bias.detach(),
            repeat=self.heads // self.groups,
            span=self.block,
        )

    def _initialise_decay(self, generator: torch.Generator | None) -> None:
        """A = -1 … -N in every channel (S4D-real), `dt_proj` uniform within 1 / sqrt(rank)."""
        self.A_log.copy_(torch.arange(1, self.size + 1, dtype=torch.float64).log().expand_as(self.A_log))
        bound = self.rank**-0.5
        uniform(self.dt_proj.weight, -bound, bound, generator)

    def _project(
        self, projected: Tensor, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `in_proj` made -> gate z [B, L, D], C [B, L, D], x and B [B, L, G P], raw dt [B, L, D]. B and C are
        rotated by `turn`, if they are at all."""
        z, x, b, c, low = projected.split((self.inner, self.shared, self.shared, self.inner, self.rank), dim=-1)
        b, c = self._normed(b, c)
        if self.turned and turn is not None:
            b, c = (rotate(t.unflatten(2, (-1, self.width)), *turn).flatten(2) for t in (b, c))
        return z, c, x, b, self.dt_proj(low)

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a token leaves for later ones: x and B [..., G P], raw dt [..., D]."""
        return kept.split((self.shared, self.shared, self.inner), dim=-1)

    def _repeat(self, t: Tensor) -> Tensor:
        """[B, L, G P] -> [B, L, H P]: head h reads KV head h // (H / G). In the released order it is sub-block i of all
        heads that reads sub-block i // (H / G) of all KV heads, which pairs most with others than the attention did."""
        if self.heads == self.groups:
            return t
        each = t.view(*t.shape[:2], self.shared // self.block, 1, self.block)
        return each.expand(-1, -1, -1, self.heads // self.groups, -1).reshape(*t.shape[:2], self.inner)

    def _grouped(self, t: Tensor) -> Tensor:
        """B or C [B, L, n P] of n heads -> [B, L, K, N], repeated to all heads if need be."""
        whole = t if t.shape[2] == self.inner else self._repeat(t)
        return whole.view(*t.shape[:2], -1, self.size)

    @property
    def step_bias(self) -> Tensor:
        """What is added to the raw dt."""
        return 2 * self.dt_bias if self.twice else self.dt_bias

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """What the output projection gets. y [B, L, D], z [..., D]."""
        return silu_gated(y.reshape(z.shape), z, self.gate_bias).to(z.dtype)

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
        z, c, x, b, raw = self._project(self.in_proj(h), (cos, sin))
        if keep is not None:
            x = x * keep
        x = self._conv(self._repeat(x), documents=documents)[0]
        b, c = self._grouped(b), self._grouped(c)
        real = None if keep is None else keep.squeeze(-1)
        decay = self._decay(self.A_log.dtype)
        y, _ = selective_scan(x, raw, decay, b, c, self.D, self.step_bias, keep=real, documents=documents)
        return self.out_proj(self._gated(y, z))

    def prefill(self, h: Tensor, cache: MambaState, fill: Fill) -> Tensor:
        """Prompts. h [n, L, E]; leaves the state and the convolution's window at each row's end. What is replayed
        stands before the prompt."""
        z, c, x, b, raw = self._project(self.in_proj(h), newest(fill.turn, h.shape[1]))
        window = state = None
        replayed = fill.longest
        if not fill.fresh:
            old = cache.inputs[fill.rows.unsqueeze(1), fill.read]
            taken = old.shape[1] - replayed
            window, state = self._parts(old[:, :taken])[0], cache.at(fill.rows, fill.start)
            x, b, raw = (
                torch.cat(parts, dim=1) for parts in zip(self._parts(old[:, taken:]), (x, b, raw), strict=True)
            )
            c = F.pad(c, (0, 0, replayed, 0))
        taps, lengths = self.conv1d.kernel_size[0], fill.lengths
        end = fill.window(x) if fill.fresh else window_at(x, taps, window, lengths + replayed)
        cache.inputs[*fill.tail, : self.shared] = end
        before = None if window is None else self._repeat(window)
        x = self._conv(self._repeat(x), before)[0]
        b, c = self._grouped(b), self._grouped(c)
        decay = self._decay(self.A_log.dtype)
        y, state = selective_scan(x, raw, decay, b, c, self.D, self.step_bias, state, fill.real)
        cache.put(fill.rows, fill.into, fill.end, state)
        return self.out_proj(self._gated(y[:, replayed:], z))

    def mix(self, projected: Tensor, cache: MambaState, call: MambaStep) -> Tensor:
        """T tokens a row, between the two projections: [B * T, …] -> [B * T, D]."""
        if cache.by_kernel:
            return self._mix_by_kernel(projected, cache, call)
        z, c, *left = self._project(projected.unflatten(0, (call.batch, call.count)), newest(call.turn, call.count))
        kept = torch.cat(left, dim=2).flatten(0, 1)
        ring = cache.inputs.view(-1, kept.shape[1])
        ring.index_copy_(0, call.new, kept)
        x, b, raw = self._parts(ring.index_select(0, call.read).view(call.batch, -1, kept.shape[1]))
        x = self._conv_few(self._repeat(x))
        dt = step_sizes(raw[:, -x.shape[1] :], self.step_bias, None)
        if call.live is not None:
            dt = dt * call.live
        b, c = self._grouped(b[:, -x.shape[1] :]), self._grouped(c)
        given = x, dt, self._decay(dt.dtype), b, c, self.D, cache.state
        if cache.snapshots:
            y = selective_snapshot_multistep(*given, call.start)
        else:
            y = selective_multistep(*given, call.settle)
        return self._gated(y, z).flatten(0, 1)

    def _mix_by_kernel(self, projected: Tensor, cache: MambaState, call: MambaStep) -> Tensor:
        """The same, with the convolution, the gate and the rotation."""
        z, c, x, b, raw = self._project(projected.unflatten(0, (call.batch, call.count)), None)
        ring, new = cache.inputs, Projected(x, b, c, raw, z, call.state.rotary if self.turned else None)
        y = selective_ring_multistep(new, self._channels, ring, cache.state, call.start, call.saved, call.plan)
        return y.to(z.dtype).flatten(0, 1)
