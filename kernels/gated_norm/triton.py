"""The gated norm as two Triton kernels: y, z and the gradient are read once, and nothing else is kept for backward.

With g = y SiLU(a), a = z + bias, n = g / sqrt(mean(g^2) + eps) and out = weight n, the gradients for o of out are

    weight: sum over tokens of o n        g: (o weight - n mean(o weight n)) / sqrt(mean(g^2) + eps)
    y: g' SiLU(a)        z: g' y s (1 + a (1 - s)), s = sigmoid(a)        bias: sum over tokens of that

A program has ROWS tokens of one head; in backward it goes over every SPLITSth such block and leaves its part of the
sums in fp32, which are added up in one order whatever finishes first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..support import begun_early

ROWS = 16
WIDE = 1024
"""Wider heads are taken a token at a time."""
WARPS = 4
PROGRAMS = 2048
"""About as many in backward, heads included: enough to keep the memory of a large GPU busy."""


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    y_ptr, z_ptr, bias_ptr, first, head, count, y_stride, z_stride, WIDTH, ROWS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """y and a = z + bias of a block in fp32, where they stand, and what of it there is."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, P)
    there = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    rows = rows.to(tl.int64)[:, None]
    inside = head * WIDTH + columns
    y = tl.load(y_ptr + rows * y_stride + inside[None, :], mask=there, other=0.0).to(tl.float32)
    a = tl.load(z_ptr + rows * z_stride + inside[None, :], mask=there, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + inside, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    return y, a, rows, inside, there


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    y_ptr, z_ptr, weight_ptr, bias_ptr, out_ptr, count, y_stride, z_stride, out_stride, WIDTH, eps,
    ROWS: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    y, a, rows, inside, there = _load(y_ptr, z_ptr, bias_ptr, first, head, count, y_stride, z_stride, WIDTH, ROWS, P)
    g = y * a * tl.sigmoid(a)
    scale = 1 / tl.sqrt(tl.sum(g * g, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + inside, mask=tl.arange(0, P) < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * out_stride + inside[None, :], g * scale[:, None] * weight[None, :], mask=there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    y_ptr, z_ptr, weight_ptr, bias_ptr, grad_ptr, to_y_ptr, to_z_ptr, to_weight_ptr, to_bias_ptr,
    count, y_stride, z_stride, grad_stride, to_y_stride, to_z_stride, CHANNELS, WIDTH, eps, SPLITS,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    split = tl.program_id(0)
    columns = tl.arange(0, P)
    weight = tl.load(weight_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    to_weight = tl.zeros((P,), dtype=tl.float32)
    to_bias = tl.zeros((P,), dtype=tl.float32)
    for first in range(split * ROWS, count, SPLITS * ROWS):
        y, a, rows, inside, there = _load(
            y_ptr, z_ptr, bias_ptr, first, head, count, y_stride, z_stride, WIDTH, ROWS, P
        )  # fmt: skip
        grad = tl.load(grad_ptr + rows * grad_stride + inside[None, :], mask=there, other=0.0).to(tl.float32)
        s = tl.sigmoid(a)
        g = y * a * s
        scale = 1 / tl.sqrt(tl.sum(g * g, axis=1) / WIDTH + eps)
        n = g * scale[:, None]
        to_weight += tl.sum(grad * n, axis=0)
        inner = grad * weight[None, :]
        to_g = (inner - n * (tl.sum(inner * n, axis=1) / WIDTH)[:, None]) * scale[:, None]
        to_a = to_g * y * s * (1 + a * (1 - s))
        tl.store(to_y_ptr + rows * to_y_stride + inside[None, :], to_g * a * s, mask=there)
        tl.store(to_z_ptr + rows * to_z_stride + inside[None, :], to_a, mask=there)
        to_bias += tl.sum(to_a, axis=0)
    part = split * CHANNELS + head * WIDTH + columns
    tl.store(to_weight_ptr + part, to_weight, mask=columns < WIDTH)
    if to_bias_ptr is not None:
        tl.store(to_bias_ptr + part, to_bias, mask=columns < WIDTH)


def _block(width: int) -> dict[str, int]:
    """Tokens and padded width of a block, and the warps that hold it."""
    wide = width > WIDE
    return {"ROWS": 1 if wide else ROWS, "P": triton.next_power_of_2(width), "num_warps": 8 if wide else WARPS}


def _flat(t: Tensor) -> Tensor:
    """[..., C] -> [M, C] with numbers of a row side by side."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


class GatedNorm(torch.autograd.Function):
    """y [M, H P], z [M, H P], weight [H P], bias [H P] or None, P, eps -> [M, H P] in z's dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        block = _block(width)
        grid = triton.cdiv(y.shape[0], block["ROWS"]), y.shape[1] // width
        _forward[grid](
            y, z, weight, bias, out, y.shape[0], y.stride(0), z.stride(0), out.stride(0), width, eps,
            **block, **begun_early(y, rows=y.shape[0]),
        )  # fmt: skip
        ctx.save_for_backward(y, z, weight, bias)
        ctx.width, ctx.eps = width, eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        y, z, weight, bias = ctx.saved_tensors
        grad, (count, channels) = _flat(gradients[0]), y.shape
        heads = channels // ctx.width
        block = _block(ctx.width)
        splits = max(1, min(PROGRAMS // heads, triton.cdiv(count, block["ROWS"])))
        to_y, to_z = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
        sums = torch.empty(1 if bias is None else 2, splits, channels, dtype=torch.float32, device=y.device)
        _backward[(splits, heads)](
            y, z, weight, bias, grad, to_y, to_z, sums[0], None if bias is None else sums[1],
            count, y.stride(0), z.stride(0), grad.stride(0), to_y.stride(0), to_z.stride(0), channels, ctx.width,
            ctx.eps, splits, **block,
        )  # fmt: skip
        to_weight, *to_bias = sums.sum(1)
        return to_y, to_z, to_weight.to(weight), None if bias is None else to_bias[0].to(bias), None, None


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float) -> Tensor:
    """Shapes as in the reference's `gated_norm`. Computed in fp32, rounded to z's dtype once."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return GatedNorm.apply(_flat(y), _flat(z), weight, bias, width, eps).view(y.shape)
