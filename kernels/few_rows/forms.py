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

from ..tuning import fastest, measurable, settled, side_by_side
from . import reference
from .reference import Projection, Stream, Unscaled
from .triton import APART, FORMS, Form, launch, normed, summed, tile_of

MEASURED = 8 << 20
"""Bytes of weights from which on forms are timed."""
COLD = 160 << 20
"""Bytes of weights that do not fit in a cache."""
CALLS = 8
"""In a graph that is timed."""


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
        if not measurable(given.weight, MEASURED):
            return usual(kind)
        _best[kind] = settled(kind, forms_for(kind), partial(tune, given, kind), usual(kind))
    return _best[kind]


def forms_for(kind: Kind) -> list[Form | None]:
    """Separate kernels last: none of them begins early, so that they take longer in a layer than alone."""
    return [*FORMS, *(APART if kind.normed else ()), None]


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
    """Times every form on weights that take turns, so that they are not found in the cache, and separate kernels, with
    the sum that these leave to the norm behind.

    None begins early: the same product would come next, whose own programs are in each other's way as those of a
    layer's kernels are not."""
    weight, rows = given.weight, 1 if kind.tile == 16 else kind.tile
    different = [given, *(_copy(given) for _ in range(min(CALLS - 1, COLD // weight.nbytes)))]
    turns = [different[i % len(different)] for i in range(CALLS)]
    x = torch.zeros(rows, kind.width, dtype=kind.dtype, device=kind.device)
    stream = Stream(x, None, summed(x, None)[1]) if kind.normed else Stream(x.new_zeros(rows, given.lines))

    def run(turn: Projection, form: Form | None, warmup: bool = False) -> object:
        if form is None and kind.normed:
            return reference.project(turn, Stream(x, x), kind.out)
        if form is None:
            left = reference.add_projected(turn, x, stream)
            return summed(left.h, left.added)
        if kind.normed:
            return project(x, turn, stream, kind.out, form, warmup, early=False)
        return add_projected(x, turn, stream, form, warmup, early=False)

    forms = forms_for(kind)
    compile_forms(lambda form, warmup: run(given, form, warmup), [form for form in forms if form is not None])
    return fastest({form: [partial(run, turn, form) for turn in turns] for form in forms})


def _copy(given: Projection) -> Projection:
    """With what is made on first use, which would be a part of some form's time."""
    copied = Projection(given.weight.clone(), given.bias, given.norm, given.eps, given.gated)
    vars(copied).update(exact_norm=given.exact_norm, counters=given.counters)
    return copied


def compile_forms(call: Callable[[Form, bool], object], forms: Sequence[Form]) -> None:
    """Side by side. `call` makes a call with a form, or only compiles it."""
    with side_by_side(ignore_errors=True):
        for form in forms:
            call(form, True)
