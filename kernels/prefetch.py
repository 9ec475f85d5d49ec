"""Asking for memory before it is needed, in Triton kernels for Hopper and later."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ask_lines(  # type: ignore[no-untyped-def]
    lines, first, step, asked, end, number, count,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The `number`-th of `count` programs has its share of lines first, first + step, … brought to the L2 cache: of
    `asked` of them, and only of those before `end`. WIDTH and PIECE, which divides it, are in numbers of 2 bytes, a
    multiple of 8; THREADS is what the program has."""
    PARTS: tl.constexpr = WIDTH // PIECE
    for begin in tl.range(number, asked * PARTS, count * THREADS):
        at = begin + count * tl.arange(0, THREADS)
        line = first + at // PARTS * step
        wanted = (at < asked * PARTS) & (line < end)
        where = lines + line.to(tl.int64) * WIDTH + at % PARTS * PIECE
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [where, wanted.to(tl.int32), PIECE * 2],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
