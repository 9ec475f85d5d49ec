"""The Mamba-2 mixer that takes the place of attention: state width = head width, one B and x per KV head.

Shapes are those of the released Mamba2InLlama layers: `in_proj` has rows z | x | B | C | dt, the convolution runs
over x | B | C, and the output norm is gated and per head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.conv import conv, conv_few
from ..kernels.multistep import multistep
from ..kernels.scan import scan
from ..kernels.scan.reference import compute_dtype
from .calls import Fill, MambaStep
from .config import HybridConfig
from .rope import rotate
from .state import MambaState

EXACT = ("A_log", "D", "dt_bias", "gate_bias")
"""Parameters that stay in fp32 in every precision below it."""
OPEN = 1.2784645427610738
"""SiLU of this is 1: a gate that lets everything through."""


class HeadNorm(nn.Module):
    """The scale of the gated norm; the norm itself is over each head alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def _uniform(tensor: Tensor, low: float, high: float, generator: torch.Generator | None = None) -> None:
    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)


class Mamba2(nn.Module):
    """H heads with state [P, N = P]; x and B have one row per KV head (G of them)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.inner, self.shared = self.heads * self.width, self.groups * self.width
        self.channels, self.chunk, self.eps = self.inner + 2 * self.shared, config.chunk, config.mamba_norm_eps
        self.in_proj = nn.Linear(config.hidden_size, self.inner + self.channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, config.d_conv, groups=self.channels)
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.dt_bias = nn.Parameter(torch.empty(self.heads, dtype=exact))
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=exact))
        self.D = nn.Parameter(torch.empty(self.heads, dtype=exact))
        self.gate_bias = nn.Parameter(torch.empty(self.inner, dtype=exact)) if config.mamba_gate_bias else None
        self.norm = HeadNorm(self.inner) if config.mamba_norm == "gated" else None
        self.active, self.turned = config.mamba_activation == "silu", config.mamba_rope
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)
        self._fixed_decay: Tensor | None = None
        self._taps: tuple[Tensor, Tensor]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mamba2:
        """What `.to(…)` and its like do; casts below fp32 leave the parameters in `EXACT` in fp32."""

        def cast(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            exact = compute_dtype(new)
            return new if new.dtype == exact else tensor.to(new.device, exact)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(cast, recurse=False)
        return self

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Everything new in a layer that takes the place of attention, as in the released recipe.

        z and dt rows and the convolution: uniform within 1 / sqrt(fan in); dt log-uniform in [0.001, 0.1] through the
        bias; A uniform in [1, 16] per head; D and the norm one. The x, B and C rows and `out_proj` are left alone.
        A gate that has a bias begins open: its rows are zero.
        """
        uniform = functools.partial(_uniform, generator=generator)
        bound = 1 / math.sqrt(self.in_proj.in_features)
        uniform(self.in_proj.weight[: self.inner], -bound, bound)
        uniform(self.in_proj.weight[self.inner + self.channels :], -bound, bound)
        bound = 1 / math.sqrt(self.conv1d.kernel_size[0])
        uniform(self.conv1d.weight, -bound, bound)
        uniform(self.conv_bias, -bound, bound)
        dt = torch.empty(self.heads, dtype=torch.float64)
        uniform(dt, math.log(1e-3), math.log(1e-1))
        dt = dt.exp().clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1
        decay = torch.empty(self.heads, dtype=torch.float64)
        uniform(decay, 1, 16)
        self.A_log.copy_(decay.log())
        self.D.fill_(1)
        if self.norm is not None:
            self.norm.weight.fill_(1)
        if self.gate_bias is not None:
            self.in_proj.weight[: self.inner] = 0
            self.gate_bias.fill_(OPEN)

    @torch.no_grad()
    def inherit(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """Q becomes C, K becomes B, V becomes x, O becomes `out_proj` (paper, section 3)."""
        rows = self.in_proj.weight[self.inner : self.inner + self.channels]
        for part, source in zip(rows.split((self.shared, self.shared, self.inner)), (v, k, q), strict=True):
            part.copy_(source)
        self.out_proj.weight.copy_(o)

    @torch.no_grad()
    def invent(self, generator: torch.Generator | None = None) -> None:
        """What `inherit` sets, uniform within 1 / sqrt(fan in) instead."""
        bound = 1 / math.sqrt(self.in_proj.in_features)
        _uniform(self.in_proj.weight[self.inner : self.inner + self.channels], -bound, bound, generator)
        bound = 1 / math.sqrt(self.inner)
        _uniform(self.out_proj.weight, -bound, bound, generator)

    @torch.no_grad()
    def pass_through(self) -> None:
        """Makes the convolution the identity: only the last tap, which is the token itself."""
        self.conv1d.weight.zero_()
        self.conv1d.weight[:, 0, -1] = 1
        self.conv_bias.zero_()

    @property
    def conv_bias(self) -> Tensor:
        """[(2 G + H) P]."""
        assert self.conv1d.bias is not None
        return self.conv1d.bias

    def _split(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [..., E] -> gate z [..., H P]; what a token leaves for later ones: [..., (2 G + H) P + H]."""
        return self.in_proj(h).split((self.inner, self.channels + self.heads), dim=-1)

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's inputs [..., (2 G + H) P] and the raw dt [..., H]."""
        return kept.split((self.channels, self.heads), dim=-1)

    def _dt(self, raw: Tensor) -> Tensor:
        kind = compute_dtype(raw)
        return F.softplus(raw.to(kind) + self.dt_bias.to(kind))

    def _heads(self, convolved: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution outputs -> x [B, L, G, P], B [B, L, G, N], C [B, L, H, N], after SiLU and rotation, if any."""
        heads = (F.silu(convolved) if self.active else convolved).view(*convolved.shape[:2], -1, self.width)
        x, b, c = heads.split((self.groups, self.groups, self.heads), dim=2)
        if self.turned and turn is not None:
            b, c = rotate(b, *turn), rotate(c, *turn)
        return x, b, c

    def _decay(self, kind: torch.dtype) -> Tensor:
        """A [H], negative."""
        return -torch.exp(self.A_log.to(kind)) if self._fixed_decay is None else self._fixed_decay

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        """The gated norm per head and the output projection. y [B, L, H, P] in the state's dtype, z [..., H P]."""
        gate = z.to(y.dtype) if self.gate_bias is None else z.to(y.dtype) + self.gate_bias.to(y.dtype)
        gated = y * F.silu(gate).view(y.shape)
        if self.norm is None:
            return self.out_proj(gated.reshape(z.shape).to(z.dtype))
        normed = F.rms_norm(gated, (self.width,), None, self.eps).view(z.shape) * self.norm.weight.to(y.dtype)
        return self.out_proj(normed.to(z.dtype))

    def _conv(self, u: Tensor, window: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return conv(u, self.conv1d.weight.squeeze(1), self.conv_bias, window, lengths)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, keep: Tensor | None) -> Tensor:
        """A whole sequence. h [B, L, E]; keep bool [B, L, 1] marks real tokens: padding enters neither the
        convolution nor the state, so that left padding is as if it were not there."""
        z, kept = self._split(h)
        u, raw = self._parts(kept)
        dt = self._dt(raw)
        if keep is not None:
            u, dt = u * keep, dt * keep
        x, b, c = self._heads(self._conv(u)[0], (cos, sin))
        y, _ = scan(x, dt, self._decay(dt.dtype), b, c, self.D, chunk=self.chunk)
        return self._out(y, z)

    def prefill(self, h: Tensor, cache: MambaState, fill: Fill) -> Tensor:
        """Prompts. h [n, L, E]; leaves the state and the convolution's window at each row's end. What is replayed
        stands before the prompt."""
        z, kept = self._split(h)
        window = state = None
        replayed = fill.replayed.shape[1]
        if not fill.fresh:
            old = cache.inputs[fill.rows.unsqueeze(1), fill.read]
            taken = old.shape[1] - replayed
            window, state = self._parts(old[:, :taken])[0], cache.state[fill.rows]
            kept = torch.cat((old[:, taken:], kept), dim=1)
        u, raw = self._parts(kept)
        dt = self._dt(raw)
        dt = torch.cat((dt[:, :replayed] * fill.replayed, dt[:, replayed:]), dim=1)
        lengths = fill.lengths + replayed
        convolved, window = self._conv(u, window, lengths)
        x, b, c = self._heads(convolved, fill.turn)
        y, cache.state[fill.rows] = scan(x, dt, self._decay(dt.dtype), b, c, self.D, state, lengths, self.chunk)
        cache.inputs[fill.rows.unsqueeze(1), fill.tail, : self.channels] = window
        return self._out(y[:, replayed:], z)

    def step(self, h: Tensor, cache: MambaState, call: MambaStep) -> Tensor:
        """T tokens a row. h [B * T, E]."""
        z, kept = self._split(h)
        ring = cache.inputs.view(-1, kept.shape[1])
        ring.index_copy_(0, call.new, kept)
        u, raw = self._parts(ring.index_select(0, call.read).view(call.batch, -1, kept.shape[1]))
        x, b, c = self._heads(conv_few(u, *self._taps), call.turn)
        dt = self._dt(raw[:, -x.shape[1] :])
        if call.live is not None:
            dt = dt * call.live
        decay = self._decay(dt.dtype)
        y = multistep(x, dt, decay, b, c[:, -call.count :], self.D, cache.state, call.mask, call.settle)
        return self._out(y, z)

    def fuse(self) -> None:
        """Gets ready for inference: the decay is computed once, the convolution's small weights are cast once."""
        kind = compute_dtype(self.A_log)
        self._fixed_decay = self._decay(kind).detach()
        self._taps = self.conv1d.weight.detach().squeeze(1).to(kind), self.conv_bias.detach().to(kind)
