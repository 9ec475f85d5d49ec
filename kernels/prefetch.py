"""Asking for memory before it is needed, in Triton kernels for Hopper and later."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ask_lines(  # type: ignore[no-untyped-def]
    lines, first, asked, end, number, count,
    STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The `number`-th of `count` programs has its share of the first COLUMNS numbers of lines first, first + 1, …
    brought to the L2 cache: of `asked` lines, and only of those before `end`. Numbers have 2 bytes; PIECE, which
    divides COLUMNS, is a multiple of 8 of them, as STRIDE is, from line to line. THREADS is what the program has."""
    PARTS: tl.constexpr = COLUMNS // PIECE
    for begin in tl.range(number, asked * PARTS, count * THREADS):
        at = begin + count * tl.arange(0, THREADS)
        line = first + at // PARTS
        wanted = (at < asked * PARTS) & (line < end)
        where = lines + line.to(tl.int64) * STRIDE + at % PARTS * PIECE
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [where, wanted.to(tl.int32), PIECE * 2],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
