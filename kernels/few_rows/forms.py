"""Calls of this room's kernels, and which form of them is the fastest for given sizes.

The choice is made for a shape of weights and up to 16 or 32 rows, not for each number of rows: what a row gives must
not depend on what else is in a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..tuning import graph_ms, side_by_side
from . import reference
from .reference import Projection, Stream, Unscaled
from .triton import APART, FORMS, Form, launch, normed, summed, tile_of

MEASURED = 8 << 20
"""Bytes of weights from which on forms are timed."""
COLD = 160 << 20
"""Bytes of weights that do not fit in a cache."""
CALLS = 8
"""In a graph that is timed."""
MARGIN = 1.015
"""A form that is listed before others is taken though they are faster by this: so that processes agree."""


class Kind(NamedTuple):
    """What a form is chosen for."""

    width: int
    lines: int
    gated: bool
    normed: bool
    biased: bool
    dtype: torch.dtype
    out: torch.dtype
    tile: int
    device: torch.device


_best: dict[Kind, Form | None] = {}
"""None where separate kernels are faster."""


def kind_of(given: Projection, rows: int, out: torch.dtype) -> Kind:
    weight, biased = given.weight, given.bias is not None
    sizes = weight.shape[1], weight.shape[0], given.gated, given.norm is not None, biased
    return Kind(*sizes, weight.dtype, out, tile_of(rows), weight.device)


def faster(x: Tensor, given: Projection, out: torch.dtype) -> bool:
    """Whether a kernel of this room is the fastest way to the product with x [M, K]."""
    return form_for(given, x.shape[0], out) is not None


def form_for(given: Projection, rows: int, out: torch.dtype) -> Form | None:
    """The fastest where that matters and can be measured now, else one that keeps a GPU busy; None where separate
    kernels are faster."""
    kind = kind_of(given, rows, out)
    if kind not in _best:
        weight = given.weight
        if weight.nbytes < MEASURED or not weight.is_cuda or torch.cuda.is_current_stream_capturing():
            return usual(kind)
        _best[kind] = tune(given, kind)
    return _best[kind]


def usual(kind: Kind) -> Form:
    """Blocks of lines so small that every processor of a large GPU has one, if there are as many."""
    block = next((size for size in (64, 32) if kind.lines >= 128 * size), 16)
    return Form(block, 128, 1, 4, 4)


def project(
    x: Tensor,
    given: Projection,
    stream: Stream,
    out: torch.dtype,
    form: Form | None = None,
    warmup: bool = False,
    early: bool | None = None,
) -> tuple[Tensor, Stream]:
    """Shapes as in the room's `project`; x is the stream's h. With `warmup` the kernel is only compiled. `early` as in
    `support.begun_early`."""
    form = form or form_for(given, len(x), out)
    assert form is not None
    assert given.exact_norm is not None
    y = torch.empty(len(x), given.lines, dtype=out, device=x.device)
    rest: dict[str, Any] = {"gated": given.gated, "bias": given.bias, "counters": given.counters}
    rest |= {"warmup": warmup, "early": early}
    h, squares = x, stream.squares
    if form.apart:
        h, rows = normed(x, stream.added, given.exact_norm, given.eps, warmup, early)
        launch(rows, given.weight, y, form, **rest)
        return y, Stream(h, None, squares if stream.added is None else None)
    if stream.added is not None or squares is None:
        h, squares = summed(x, stream.added)
    launch(h, given.weight, y, form, norm=given.exact_norm, squares=squares, eps=given.eps, **rest)
    return y, Stream(h, None, squares)


def add_projected(
    x: Tensor | Unscaled,
    given: Projection,
    stream: Stream,
    form: Form | None = None,
    warmup: bool = False,
    early: bool | None = None,
) -> Stream:
    """Shapes as in the room's `add_projected`."""
    assert stream.added is None
    squares, eps = (x.squares, x.eps) if isinstance(x, Unscaled) else (None, 0.0)
    x = x.x if isinstance(x, Unscaled) else x
    form = form or form_for(given, len(x), x.dtype)
    assert form is not None
    h = torch.empty_like(stream.h)
    sums = torch.empty(len(h), triton.cdiv(given.lines, form.block), dtype=torch.float32, device=h.device)
    launch(
        x, given.weight, h, form, squares=squares, eps=eps, bias=given.bias, residual=stream.h, sums=sums,
        counters=given.counters, warmup=warmup, early=early,
    )  # fmt: skip
    return Stream(h, None, sums)


def tune(given: Projection, kind: Kind) -> Form | None:
    """Times every form on weights that take turns, so that they are not found in the cache, and separate kernels.

    None begins early: the same product would come next, whose own programs are in each other's way as those of a
    layer's kernels are not."""
    weight, rows = given.weight, 1 if kind.tile == 16 else kind.tile
    different = [given, *(_copy(given) for _ in range(min(CALLS - 1, COLD // weight.nbytes)))]
    turns = [different[i % len(different)] for i in range(CALLS)]
    x = torch.zeros(rows, kind.width, dtype=kind.dtype, device=kind.device)
    stream = Stream(x, None, summed(x, None)[1]) if kind.normed else Stream(x.new_zeros(rows, given.lines))

    def ours(turn: Projection, form: Form, warmup: bool = False) -> object:
        if kind.normed:
            return project(x, turn, stream, kind.out, form, warmup, early=False)
        return add_projected(x, turn, stream, form, warmup, early=False)

    def separate(turn: Projection) -> object:
        if kind.normed:
            return reference.project(turn, Stream(x, x), kind.out)
        return reference.add_projected(turn, x, stream)

    def time(form: Form) -> float:
        try:
            return milliseconds([partial(ours, turn, form) for turn in turns])
        except triton.TritonError:
            return float("inf")

    def best(forms: Sequence[Form]) -> tuple[Form, float]:
        compile_forms(lambda form, warmup: ours(given, form, warmup), forms)
        times = {form: time(form) for form in forms}
        return next((form, ms) for form, ms in times.items() if ms <= MARGIN * min(times.values()))

    found, ms = best((*FORMS, *APART) if kind.normed else FORMS)
    return found if ms <= milliseconds([partial(separate, turn) for turn in turns]) else None


def _copy(given: Projection) -> Projection:
    return Projection(given.weight.clone(), given.bias, given.norm, given.eps, given.gated)


def compile_forms(call: Callable[[Form, bool], object], forms: Sequence[Form]) -> None:
    """Side by side. `call` makes a call with a form, or only compiles it."""
    with side_by_side(ignore_errors=True):
        for form in forms:
            call(form, True)


def milliseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of `calls` one after the other; the best of three times."""
    return min(graph_ms(calls, repeats=3))
