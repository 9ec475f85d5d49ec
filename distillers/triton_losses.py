"""Cross entropy, KL(teacher ‖ student) and their gradient in one Triton kernel: each row of logits is read twice, once
for the sums and once for the gradient, and nothing of their size is made but that gradient. Sums are in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    student,
    teacher,
    targets,
    parts,
    to_logits,
    rows,
    words,
    student_row,
    teacher_row,
    ce,
    kl,
    CE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    to_logits += row * words
    columns = tl.arange(0, BLOCK)
    low = -1e30
    top, total = tl.full((), low, tl.float32), tl.full((), 0.0, tl.float32)
    their_top, their_total = tl.full((), low, tl.float32), tl.full((), 0.0, tl.float32)
    apart = tl.full((), 0.0, tl.float32)
    if KL:
        teacher += row * teacher_row
    for start in range(0, words, BLOCK):
        inside = start + columns < words
        s = tl.load(student + start + columns, mask=inside, other=low).to(tl.float32)
        higher = tl.maximum(top, tl.max(s, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher), 0)
        top = higher
        if KL:
            t = tl.load(teacher + start + columns, mask=inside, other=low).to(tl.float32)
            higher = tl.maximum(their_top, tl.max(t, 0))
            e, shrink = tl.exp(t - higher), tl.exp(their_top - higher)
            their_total = their_total * shrink + tl.sum(e, 0)
            apart = apart * shrink + tl.sum(tl.where(inside, e * (t - s), 0.0), 0)
            their_top = higher
    whole = top + tl.log(total)
    target = tl.load(targets + row)
    real = target >= 0
    for_q = 0.0
    if CE:
        said = tl.load(student + tl.where(real, target, 0)).to(tl.float32)
        tl.store(parts + row, tl.where(real, whole - said, 0.0))
        for_q += tl.where(real, ce, 0.0)
        parts += rows
    their_whole = their_top
    if KL:
        their_whole += tl.log(their_total)
        tl.store(parts + row, apart / their_total + whole - their_whole)
        for_q += kl
    for start in range(0, words, BLOCK):
        inside = start + columns < words
        s = tl.load(student + start + columns, mask=inside, other=low).to(tl.float32)
        gradient = for_q * tl.exp(s - whole)
        if KL:
            t = tl.load(teacher + start + columns, mask=inside, other=low).to(tl.float32)
            gradient -= kl * tl.exp(t - their_whole)
        if CE:
            gradient -= tl.where(start + columns == target, ce, 0.0)
        tl.store(to_logits + start + columns, gradient.to(to_logits.dtype.element_ty), mask=inside)


def losses(student: Tensor, teacher: Tensor | None, targets: Tensor, ce: float, kl: float) -> tuple[Tensor, Tensor]:
    """The parts of each token, fp32 [parts, N], and the gradient [N, V] of ce times the cross entropy plus kl times the
    divergence; a part of weight 0 is left out. Logits [N, V] of any float dtype up to fp32, targets int64 [N]."""
    student = student if student.stride(-1) == 1 else student.contiguous()
    rows, words = student.shape
    there = student if teacher is None else teacher if teacher.stride(-1) == 1 else teacher.contiguous()
    parts = torch.empty(bool(ce) + bool(kl), rows, dtype=torch.float32, device=student.device)
    gradient = torch.empty(rows, words, dtype=student.dtype, device=student.device)
    if rows:
        with torch.cuda.device_of(student):
            _row[(rows,)](
                student,
                there,
                targets.contiguous(),
                parts,
                gradient,
                rows,
                words,
                student.stride(0),
                there.stride(0),
                ce,
                kl,
                CE=bool(ce),
                KL=bool(kl),
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return parts, gradient
