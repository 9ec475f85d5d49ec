"""What the two Mamba mixers that take the place of attention have in common: projections, their initialisation from
attention, the convolution, the gate, and which parameters stay exact.

`in_proj` has rows z | x | B | C | dt, as the released layers have them. x and B have one row per KV head (G of them,
width P), z and C one per head (H). What differs is how dt is made, what the convolution runs over, and the scan.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.conv import conv, conv_few
from ..kernels.documents import Documents
from ..kernels.scan.reference import compute_dtype
from .config import HybridConfig
from .norm import RMSNorm

EXACT = ("A_log", "D", "dt_bias", "gate_bias")
"""Parameters that stay in fp32 in every precision below it."""
OPEN = 1.2784645427610738
"""SiLU of this is 1: a gate that lets everything through."""


def uniform(tensor: Tensor, low: float, high: float, generator: torch.Generator | None = None) -> None:
    """Fills `tensor` in place."""
    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)


class Mamba(nn.Module, ABC):
    """H heads of width P; x and B have one row per KV head (G of them)."""

    def __init__(
        self,
        config: HybridConfig,
        dt_rows: int,
        convolved: int,
        steps: int,
        decays: tuple[int, ...],
        inner: int = 0,
        channels: int = 0,
    ) -> None:
        """`dt_rows` of the input projection are for dt, which has `steps` entries a token; the convolution runs over
        `convolved` channels; `decays` is the shape of A. `inner` rows are for z and `channels` for x, B and C, if not
        those of attention."""
        super().__init__()
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.inner, self.shared = inner or self.heads * self.width, self.groups * self.width
        self.channels = channels or self.inner + 2 * self.shared
        self.in_proj = nn.Linear(config.hidden_size, self.inner + self.channels + dt_rows, bias=config.attention_bias)
        self.conv1d = nn.Conv1d(convolved, convolved, config.d_conv, groups=convolved)
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.dt_bias = nn.Parameter(torch.empty(steps, dtype=exact))
        self.A_log = nn.Parameter(torch.empty(decays, dtype=exact))
        self.D = nn.Parameter(torch.empty(steps, dtype=exact))
        self.gate_bias = nn.Parameter(torch.empty(self.inner, dtype=exact)) if config.mamba_gate_bias else None
        self.active, self.turned = config.mamba_activation == "silu", config.mamba_rope
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=bool(config.attention_out_bias))
        self.b_norm = RMSNorm(self.width, config.rms_norm_eps) if config.qk_norm else None
        self.c_norm = RMSNorm(self.width, config.rms_norm_eps) if config.qk_norm else None
        self._fixed_decay: Tensor | None = None
        self._taps: tuple[Tensor, Tensor]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
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
        bias; A as the mixer has it; D one. The x, B and C rows and `out_proj` are left alone. A gate that has a bias
        begins open: its rows are zero. Biases of projections begin at zero, norms of B and C at one.
        """
        fill = functools.partial(uniform, generator=generator)
        bound = 1 / math.sqrt(self.in_proj.in_features)
        fill(self.in_proj.weight[: self.inner], -bound, bound)
        fill(self.in_proj.weight[self.inner + self.channels :], -bound, bound)
        bound = 1 / math.sqrt(self.conv1d.kernel_size[0])
        fill(self.conv1d.weight, -bound, bound)
        fill(self.conv_bias, -bound, bound)
        dt = torch.empty(self.dt_bias.shape, dtype=torch.float64)
        fill(dt, math.log(1e-3), math.log(1e-1))
        dt = dt.exp().clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1
        self._initialise_decay(generator)
        self.D.fill_(1)
        if self.gate_bias is not None:
            self.in_proj.weight[: self.inner] = 0
            self.gate_bias.fill_(OPEN)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                linear.bias.zero_()
        for norm in (self.b_norm, self.c_norm):
            if norm is not None:
                norm.weight.fill_(1)

    @abstractmethod
    def _initialise_decay(self, generator: torch.Generator | None) -> None:
        """Fills A_log, and what else only this mixer has."""

    @torch.no_grad()
    def inherit(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """Q becomes C, K becomes B, V becomes x, O becomes `out_proj` (paper, section 3)."""
        rows = self.in_proj.weight[self.inner : self.inner + self.channels]
        for part, source in zip(rows.split((self.shared, self.shared, self.inner)), (v, k, q), strict=True):
            part.copy_(source)
        self.out_proj.weight.copy_(o)

    @torch.no_grad()
    def inherit_rest(self, attention: Mapping[str, Tensor]) -> None:
        """What some families have beside the four weights, by its name in `attention`: the biases of V, K, Q and O
        become those of x, B, C and `out_proj` (z and dt have none: zero), the norms of K and Q become those of B and C.
        They stand where they stood, right behind the projection; the convolution and SiLU come after them.
        """
        if self.in_proj.bias is not None:
            rows = self.in_proj.bias[self.inner : self.inner + self.channels]
            for part, name in zip(rows.split((self.shared, self.shared, self.inner)), "vkq", strict=True):
                part.copy_(attention[f"{name}_proj.bias"])
        if self.out_proj.bias is not None:
            self.out_proj.bias.copy_(attention["o_proj.bias"])
        if self.b_norm is not None and self.c_norm is not None:
            self.b_norm.weight.copy_(attention["k_norm.weight"])
            self.c_norm.weight.copy_(attention["q_norm.weight"])

    @torch.no_grad()
    def invent(self, generator: torch.Generator | None = None) -> None:
        """What `inherit` sets, uniform within 1 / sqrt(fan in) instead."""
        bound = 1 / math.sqrt(self.in_proj.in_features)
        uniform(self.in_proj.weight[self.inner : self.inner + self.channels], -bound, bound, generator)
        bound = 1 / math.sqrt(self.inner)
        uniform(self.out_proj.weight, -bound, bound, generator)

    @torch.no_grad()
    def pass_through(self) -> None:
        """Makes the convolution the identity: only the last tap, which is the token itself."""
        self.conv1d.weight.zero_()
        self.conv1d.weight[:, 0, -1] = 1
        self.conv_bias.zero_()

    @torch.no_grad()
    def drop_skip(self) -> None:
        """Takes a token's own x out of the output, but for what the scan has of it."""
        self.D.zero_()

    @property
    def conv_bias(self) -> Tensor:
        """Of every channel of the convolution."""
        assert self.conv1d.bias is not None
        return self.conv1d.bias

    def _decay(self, kind: torch.dtype) -> Tensor:
        """A, negative."""
        return -torch.exp(self.A_log.to(kind)) if self._fixed_decay is None else self._fixed_decay

    def _normed(self, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Projections to B [..., G P] and C [..., H P], behind the teacher's norms of each head if it had them."""
        if self.b_norm is None or self.c_norm is None:
            return b, c
        b, c = (
            norm(part.unflatten(-1, (-1, self.width))).flatten(-2)
            for norm, part in ((self.b_norm, b), (self.c_norm, c))
        )
        return b, c

    def _conv(
        self,
        u: Tensor,
        window: Tensor | None = None,
        lengths: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The convolution and SiLU, if there is one, and the window that continues it."""
        return conv(u, self.conv1d.weight.squeeze(1), self.conv_bias, window, lengths, documents, self.active)

    def _conv_few(self, joined: Tensor) -> Tensor:
        """The same for a few tokens behind their window."""
        convolved = conv_few(joined, *self._taps)
        return F.silu(convolved) if self.active else convolved

    def ends(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weights and biases of what projects into the mixing and out of it."""
        return (self.in_proj.weight, self.in_proj.bias), (self.out_proj.weight, self.out_proj.bias)

    def fuse(self) -> None:
        """Gets ready for inference: the decay is computed once, the convolution's small weights are cast once."""
        kind = compute_dtype(self.A_log)
        self._fixed_decay = self._decay(kind).detach()
        self._taps = self.conv1d.weight.detach().squeeze(1).to(kind), self.conv_bias.detach().to(kind)
