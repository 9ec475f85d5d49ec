"""Causal grouped-query attention with rotary positions: over a sequence, over a prompt, and a few tokens at a time."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from ..kernels.decode_attention import Norms, decode_attention
from .calls import AttentionStep, Fill
from .config import HybridConfig
from .norm import RMSNorm
from .packed import Packed
from .rope import rotate
from .state import KVCache

Weights = tuple[Tensor, Tensor | None]
"""Of a product, and its bias."""
SHARING: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""What lets query heads share keys in attention over ragged documents; torch 2.11 and before do so without being asked
(their flash kernels always have, forward and backward)."""


class Attention(nn.Module):
    """Names and shapes of the projections are Llama's. H heads of width P read G key and value heads, R = H / G."""

    def __init__(self, config: HybridConfig, window: int = 0) -> None:
        super().__init__()
        self.window = window
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.groups * self.width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.groups * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, hidden, bias=bool(config.attention_out_bias))
        self.q_norm = RMSNorm(self.width, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.width, config.rms_norm_eps) if config.qk_norm else None
        self._fused: Weights | None = None

    def fuse(self) -> None:
        """Lays the three projections out in one storage, for one matrix product instead of three."""
        self._fused = fuse_linears(self.q_proj, self.k_proj, self.v_proj)

    def project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [..., E], cos and sin [..., 1, P] -> rotated queries [..., H, P], rotated keys and values [..., G, P].

        Norms of queries and keys, where the model has them, are over each head and stand before the rotation.
        """
        if self._fused is None:
            heads = (part(h).unflatten(-1, (-1, self.width)) for part in (self.q_proj, self.k_proj, self.v_proj))
            queries, keys, values = heads
            if self.q_norm is not None and self.k_norm is not None:
                queries, keys = self.q_norm(queries), self.k_norm(keys)
            return rotate(queries, cos, sin), rotate(keys, cos, sin), values
        return self._turned(F.linear(h, *self._fused), cos, sin)

    def _turned(self, projected: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of what the fused projection made, [..., (H + 2 G) P]."""
        projected = projected.unflatten(-1, (-1, self.width))
        turned, values = projected.split((self.heads + self.groups, self.groups), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = turned.split((self.heads, self.groups), dim=-2)
            turned = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=-2)
        queries, keys = rotate(turned, cos, sin).split((self.heads, self.groups), dim=-2)
        return queries, keys, values

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        documents: Packed | None = None,
    ) -> Tensor:
        """A whole sequence. h [B, L, E]; mask bool [B, 1, L, L] has documents in it. None: causal, within documents if
        there are some, which asks for `needs_no_mask`. Other mixers read keep.

        A sliding window is applied here: entry [t, s] is read only if t - s < window.
        """
        sliding = bool(self.window) and self.window < h.shape[1]
        if mask is None and (sliding or documents is not None) and needs_no_mask(h, self.width):
            q, k, v = self.project(h, cos, sin)
            return self.o_proj(ragged_attention(q, k, v, documents, self.window if sliding else 0).flatten(2))
        if sliding:
            mask = within(self.window, h.shape[1], h.device, mask)
        q, k, v = (t.transpose(1, 2) for t in self.project(h, cos, sin))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def prefill(self, h: Tensor, cache: KVCache, fill: Fill) -> Tensor:
        """Prompts. h [n, L, E]; writes their keys and values."""
        q, k, v = self.project(h, fill.cos, fill.sin)
        if fill.flat is None:
            part = slice(min(h.shape[1], cache.keys.shape[1]))
            cache.keys[fill.into, part], cache.values[fill.into, part] = k[:, part], v[:, part]
        else:
            where = fill.rows[fill.flat[0]], fill.positions[fill.flat]
            cache.keys[where], cache.values[where] = k[fill.flat], v[fill.flat]
            k, v = (t[fill.rows, : fill.live] for t in (cache.keys, cache.values))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = fill.sliding if self.window and fill.sliding is not None else fill.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def mix(self, projected: Tensor, cache: KVCache, call: AttentionStep) -> Tensor:
        """T tokens a row, between the two projections: [B * T, (H + 2 G) P] -> [B * T, H P]. The heads of a group are
        rows of one query matrix: no key is repeated."""
        if call.indices is None:
            return decode_attention(
                projected, cache.keys, cache.values, call.start, call.rotary, self.window, self._norms()
            )
        indices = call.indices
        q, k, v = self._turned(projected, indices.cos, indices.sin)
        for store, new in ((cache.keys, k), (cache.values, v)):
            store.view(-1, *new.shape[1:]).index_copy_(0, indices.slots, new)
        q = q.view(call.batch, -1, self.groups, self.heads // self.groups, self.width).permute(0, 2, 3, 1, 4)
        k, v = (t[:, : indices.live].transpose(1, 2) for t in (cache.keys, cache.values))
        y = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=indices.mask)
        y = y.reshape(call.batch, self.heads, -1, self.width).transpose(1, 2)
        return y.reshape(projected.shape[0], -1)

    def ends(self) -> tuple[Weights, Weights]:
        """What projects into the mixing and out of it, once that is laid out for inference."""
        assert self._fused is not None
        return self._fused, (self.o_proj.weight, self.o_proj.bias)

    def _norms(self) -> Norms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return Norms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)


def needs_no_mask(h: Tensor, width: int) -> bool:
    """Whether attention over h, with heads of this width, can keep documents apart without a mask [B, 1, L, L]."""
    return h.is_cuda and product_dtype(h) in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def product_dtype(h: Tensor) -> torch.dtype:
    """In which matrix products with h run: autocast's dtype, or its own."""
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, documents: Packed | None, window: int) -> Tensor:
    """Causal attention within documents (None: rows), over the last `window` tokens if that is not 0, by torch's flash
    kernels for ragged sequences. q [B, L, H, P], k and v [B, L, G, P] -> [B, L, H, P], in bf16 or fp16."""
    batch, length = q.shape[:2]
    if documents is None:
        offsets, longest = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length, length
    else:
        offsets, longest = documents.offsets, documents.longest
    kind = product_dtype(q)
    q, k, v = (t.to(kind).flatten(0, 1) for t in (q, k, v))
    sides = (window - 1 if window else -1, 0)
    y: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=sides, **SHARING)
    attended: Tensor = y.unflatten(0, (batch, length))
    return attended


def within(window: int, length: int, device: torch.device, mask: Tensor | None) -> Tensor:
    """bool [B or 1, 1, length, length]: what `mask` [B, 1, length, length] (None: causal) leaves of the last `window`
    tokens of each."""
    band = torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
    return band[None, None] if mask is None else mask & band


def fuse_linears(*linears: nn.Linear) -> Weights:
    """One weight (and bias) whose rows are those of `linears`, which become views of it."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    row = 0
    for linear in linears:
        rows = slice(row, row + linear.out_features)
        linear.weight = nn.Parameter(weight[rows], requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias[rows], requires_grad=False)
        row = rows.stop
    return weight, bias
