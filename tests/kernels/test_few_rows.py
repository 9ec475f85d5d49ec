"""Products of few rows, with norm, gate or sum as parts of them, equal these steps one after the other, in Triton's
interpreter and on a GPU."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from mambabench.kernels.few_rows import Projection, Stream, Unscaled, add_projected, fused, project, reference
from mambabench.kernels.support import VARIABLE

EPS = 1e-5
FORMS = [
    (64, 64, 1, 3, 4),
    (128, 32, 1, 2, 8, True),
    (16, 32, 2, 4, 2),
    (32, 16, 4, 3, 4),
    (16, 256, 3, 1, 4, True),
]
SHAPES = [
    # rows, width, lines, residual
    (1, 64, 48),
    (5, 208, 72),
    (16, 96, 130),
    (17, 48, 16),
]


@pytest.fixture
def interpreted(interpret, monkeypatch):
    """The kernels in Triton's interpreter, in place of those for a GPU; what they write to holds NaN before."""
    module, forms = interpret("mambabench.kernels.few_rows.triton"), importlib.import_module(fused.MODULE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    for name in ("launch", "normed", "summed"):
        monkeypatch.setattr(forms, name, getattr(module, name))
    return forms


@pytest.fixture
def exact_products(monkeypatch):
    """The interpreter keeps bf16 as bits, and would multiply these."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype != language.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), language.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    )


def drawn(rows, width, lines, kind=torch.float32, device="cpu", seed=0, gated=False, bias=True):
    """A product behind a norm, one that adds to the stream, its input, and the stream."""
    dice = torch.Generator(device).manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=dice, device=device)).to(kind)

    scale = width**-0.5
    into = Projection(
        draw(2 * lines if gated else lines, width, scale=scale),
        draw(2 * lines if gated else lines) if bias else None,
        1 + 0.3 * draw(width),
        EPS,
        gated,
    )
    out = Projection(draw(lines, width, scale=scale), draw(lines) if bias else None)
    return into, Stream(draw(rows, width)), out, draw(rows, width), Stream(draw(rows, lines))


def doubled(given):
    """The same numbers in fp64."""
    if isinstance(given, Projection):
        parts = (None if t is None else t.double() for t in (given.weight, given.bias, given.norm))
        return Projection(*parts, given.eps, given.gated)
    return given.double() if isinstance(given, torch.Tensor) else Stream(given.h.double())


def near(one, two, tolerance):
    assert not one.isnan().any()
    assert (one.double() - two.double()).norm() <= tolerance * two.double().norm()


def check_project(way, into, stream, kind, tolerance):
    y, left = way(into, stream, kind)
    wanted, _ = reference.project(doubled(into), doubled(stream), torch.float64)
    assert y.dtype == kind
    near(y, wanted, tolerance)
    assert left.added is None
    assert torch.equal(left.h, stream.h)


def check_sum(whole, out, x, stream, tolerance):
    wanted = doubled(stream).h + F.linear(x.double(), *(doubled(out).weight, doubled(out).bias))
    assert whole.added is None
    near(whole.h, wanted, tolerance)
    near(whole.squares.sum(1), whole.h.double().square().sum(1), 1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_in_the_interpreter_any_form_is_the_reference(interpreted, form, shape, gated) -> None:
    into, stream, out, x, before = drawn(*shape, gated=gated)
    form = interpreted.Form(*form)

    def way(given, stream, kind):
        return interpreted.project(stream.h, given, stream, kind, form)

    check_project(way, into, stream, torch.float32, 2e-6)
    check_sum(interpreted.add_projected(x, out, before, form), out, x, before, 2e-6)
    assert not into.counters.any()
    assert not out.counters.any()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_in_the_interpreter_what_comes_out_is_divided(interpreted, form, shape) -> None:
    _, _, out, x, before = drawn(*shape)
    rows = Unscaled(x, x.square().unflatten(1, (-1, 8)).sum(2) + 3, EPS)
    whole = interpreted.add_projected(rows, out, before, interpreted.Form(*form))
    squares = rows.squares.double().sum(1, keepdim=True) / x.shape[1]
    check_sum(whole, out, x.double() / (squares + EPS).sqrt(), before, 2e-6)
    plain = reference.add_projected(out, rows, before)
    near(plain.h + plain.added, whole.h, 2e-6)


@pytest.mark.parametrize("form", [None, *FORMS[1:4]], ids=str)
def test_in_the_interpreter_low_precision_is_within_its_rounding(interpreted, exact_products, form) -> None:
    """The interpreter cuts bf16 off instead of rounding it."""
    into, stream, out, x, before = drawn(5, 208, 72, torch.bfloat16, gated=True)
    form = form and interpreted.Form(*form)

    def way(given, stream, kind):
        return interpreted.project(stream.h, given, stream, kind, form)

    check_project(way, into, stream, torch.bfloat16, 0.02)
    check_sum(interpreted.add_projected(x, out, before, form), out, x, before, 0.01)
    head = Projection(into.weight, None, into.norm, EPS)
    check_project(way, head, stream, torch.float32, 0.01)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_in_the_interpreter_a_row_does_not_depend_on_how_many_there_are(interpreted, form) -> None:
    into, stream, out, x, before = drawn(16, 96, 40, gated=True)
    form = interpreted.Form(*form)
    whole = interpreted.project(stream.h, into, stream, torch.float32, form)[0]
    summed = interpreted.add_projected(x, out, before, form)
    for rows in (1, 5, 8):
        part = Stream(stream.h[:rows])
        assert torch.equal(interpreted.project(part.h, into, part, torch.float32, form)[0], whole[:rows])
        few = interpreted.add_projected(x[:rows], out, Stream(before.h[:rows]), form)
        assert torch.equal(few.h, summed.h[:rows])
        assert torch.equal(few.squares, summed.squares[:rows])


def test_in_the_interpreter_layers_follow_each_other(interpreted) -> None:
    """What one product leaves of a row's squares is what the next one norms by; something still to be added is."""
    into, _, _, _, _ = drawn(3, 64, 48)
    _, _, out, x, stream = drawn(3, 80, 64, seed=1)
    ours = interpreted.add_projected(x, out, stream)
    plain = reference.add_projected(out, x, stream)
    wanted, whole = reference.project(into, plain, torch.float32)
    apart = interpreted.FORMS[0]._replace(apart=True)
    for given, form in itertools.product((ours, plain), (None, apart)):
        y, left = interpreted.project(given.h, into, given, torch.float32, form)
        near(y, wanted, 2e-6)
        near(left.h, whole.h, 1e-6)
        again, _ = interpreted.project(left.h, into, left, torch.float32)
        near(again, wanted, 2e-6)


def test_the_reference_is_norm_product_gate_and_sum() -> None:
    into, stream, out, x, before = drawn(5, 48, 32, torch.float64, gated=True)
    assert into.norm is not None
    normed = stream.h * (stream.h.square().mean(1, keepdim=True) + EPS).rsqrt() * into.norm
    gate, up = (normed @ into.weight.T + into.bias).chunk(2, dim=1)
    y, left = project(into, stream)
    torch.testing.assert_close(y, F.silu(gate) * up)
    assert left == Stream(stream.h)
    whole = add_projected(out, x, before)
    torch.testing.assert_close(whole.h + whole.added, before.h + x @ out.weight.T + out.bias)
    pending = Stream(stream.h - 1, torch.ones_like(stream.h))
    torch.testing.assert_close(project(into, pending)[0], y)
    torch.testing.assert_close(project(into, pending)[1].h, stream.h)


def test_logits_of_narrow_inputs_are_not_rounded() -> None:
    into, stream, _, _, _ = drawn(2, 48, 32, torch.bfloat16, bias=False)
    y, _ = project(into, stream, torch.float32)
    assert y.dtype == torch.float32
    normed = F.rms_norm(stream.h, into.norm.shape, into.norm, EPS)
    torch.testing.assert_close(y, normed.float() @ into.weight.float().T)


def test_reasons_are_given_where_the_kernel_does_not_serve(monkeypatch) -> None:
    def reason(rows=4, width=32, dtype=torch.bfloat16, kind=None, weight=None):
        given = Projection(torch.zeros(48, width, dtype=weight or dtype))
        return fused.supports(given, torch.zeros(rows, width, dtype=dtype), kind or dtype).reason

    assert reason() == "the tensors are on cpu"
    monkeypatch.setattr("mambabench.kernels.support.on_cuda", lambda _: True)
    assert reason() == ""
    assert reason(kind=torch.float32) == ""
    assert reason(32) == ""
    assert reason(33) == "the kernel serves up to 32 rows"
    assert reason(dtype=torch.float32) == "the kernel does not serve float32"
    assert reason(weight=torch.float32) == "the kernel multiplies weights and rows of one dtype"
    assert reason(width=24) == "the kernel serves contiguous rows of a multiple of 16 numbers"
    monkeypatch.setattr(importlib.import_module(fused.MODULE), "form_for", lambda *_: None)
    assert reason() == "cuBLAS is faster for 32 to 48"
    monkeypatch.setenv(VARIABLE, "reference")
    assert reason() == "the reference was asked for"


@pytest.fixture
def timed(interpreted, timed_by, monkeypatch):
    """Forms are timed by a table, in milliseconds; separate kernels take one. Each choice is a new process's."""
    times = {None: 1.0}
    monkeypatch.setattr(interpreted, "compile_forms", lambda *_: None)
    timed_by(lambda calls: times.get(calls[0].args[1], 2.0))
    return times


def test_the_first_form_is_chosen_that_is_as_fast_as_any(interpreted, timed) -> None:
    into, *_ = drawn(1, 64, 32)
    kind = interpreted.kind_of(into, 1, torch.float32)
    assert interpreted.tune(into, kind) is None
    slow, fast, other = (interpreted.FORMS[i] for i in (1, 3, 5))
    timed.update({slow: 0.9, fast: 0.505, other: 0.5})
    assert interpreted.tune(into, kind) == fast
    timed[None] = 0.499
    assert interpreted.tune(into, kind) == fast
    timed[None] = 0.49
    assert interpreted.tune(into, kind) is None


def test_all_processes_choose_alike_where_two_ways_are_as_fast(interpreted, timed, monkeypatch) -> None:
    monkeypatch.setattr(interpreted, "measurable", lambda *_: True)
    _, _, out, x, _ = drawn(1, 64, 32)
    first, second = interpreted.FORMS[:2]
    found = []
    for times in ({first: 1.03, second: 0.99}, {first: 0.99, second: 1.03}, {first: 1.03, second: 1.03}):
        timed.update(times)
        monkeypatch.setattr(interpreted, "_best", {})
        found.append(interpreted.form_for(out, len(x), x.dtype))
    assert found == [second] * 3


def test_the_usual_form_serves_a_process_without_memory_to_time_others(interpreted, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(interpreted, "measurable", lambda *_: True)
    monkeypatch.setattr(interpreted, "_best", {})
    _, _, out, x, _ = drawn(1, 64, 32)
    kind, asked = interpreted.kind_of(out, len(x), x.dtype), []

    def full(given):
        asked.append(given)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(interpreted, "_copy", full)
    for _ in range(2):
        assert interpreted.form_for(out, len(x), x.dtype) == interpreted.usual(kind)
    assert len(asked) == 1, "what a row gives depends on no later call's memory"


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "sum"])
def test_separate_kernels_are_timed_with_all_that_the_others_do(interpreted, timed, normed, monkeypatch) -> None:
    """A sum that is left to the norm behind it is a kernel of that one's."""
    into, _, out, *_ = drawn(1, 64, 32)
    given = into if normed else out
    ways = {}
    monkeypatch.setattr(interpreted, "fastest", ways.update)
    interpreted.tune(given, interpreted.kind_of(given, 1, torch.float32))
    made = ways[None][0]()
    if normed:
        assert made[0].shape == (1, 32)
    else:
        total, squares = made
        assert torch.equal(total, F.linear(torch.zeros(1, 64), out.weight, out.bias))
        near(squares.sum(1), total.double().square().sum(1), 1e-6)


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "sum"])
def test_what_is_made_once_for_weights_is_no_part_of_a_timed_call(interpreted, timed, normed, monkeypatch) -> None:
    """Else the form that is timed first would have it in its time."""
    into, _, out, *_ = drawn(1, 64, 32)
    given, ways, made = into if normed else out, {}, []
    monkeypatch.setattr(interpreted, "fastest", ways.update)
    interpreted.tune(given, interpreted.kind_of(given, 1, torch.float32))
    for call in ways[interpreted.FORMS[0]]:
        known = set(vars(call.args[0]))
        call()
        made.append(set(vars(call.args[0])) - known)
    assert made == [set()] * interpreted.CALLS


def test_one_form_serves_all_calls_of_up_to_sixteen_rows(interpreted) -> None:
    into, *_ = drawn(1, 64, 32)
    kinds = {interpreted.kind_of(into, rows, torch.float32) for rows in range(1, 33)}
    assert len(kinds) == 2


BENCHED = [(4096, 6144), (4096, 4096), (14336, 4096), (2560, 10576), (5120, 2560), (512, 1376)]


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "lines"), BENCHED)
@pytest.mark.parametrize("rows", [1, 5, 16, 32])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_on_a_gpu_it_is_as_near_to_fp64_as_separate_kernels(width, lines, rows, gated, monkeypatch) -> None:
    """In the form that needs no timing; every form is below."""
    monkeypatch.setattr(importlib.import_module(fused.MODULE), "MEASURED", 1 << 60)
    with torch.inference_mode():
        into, stream, out, x, before = drawn(rows, width, lines, torch.bfloat16, "cuda", gated=gated)
        exact, _ = reference.project(doubled(into), doubled(stream), torch.float64)
        apart = [(way(into, stream, torch.bfloat16)[0].double() - exact).norm() for way in (project, reference.project)]
        assert apart[0] <= 1.25 * apart[1]
        whole, plain = add_projected(out, x, before), reference.add_projected(out, x, before)
        exact = before.h.double() + F.linear(x.double(), out.weight.double(), out.bias.double())
        plain = plain.h + plain.added
        summed = whole.h if whole.added is None else whole.h + whole.added
        assert (summed.double() - exact).norm() <= 1.25 * (plain.double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_on_a_gpu_every_form_is_right_and_rows_do_not_depend_on_each_other(bias, early) -> None:
    forms = importlib.import_module(fused.MODULE)
    into, stream, out, x, before = drawn(16, 2560, 4096, torch.bfloat16, "cuda", gated=True, bias=bias)
    exact, _ = reference.project(doubled(into), doubled(stream), torch.float64)
    every = (*forms.FORMS, *forms.APART)

    def projected(stream, form, warmup=False):
        return forms.project(stream.h, into, stream, torch.bfloat16, form, warmup, early)[0]

    def added(x, stream, form, warmup=False):
        return forms.add_projected(x, out, stream, form, warmup, early)

    forms.compile_forms(lambda form, warm: projected(stream, form, warm), every)
    forms.compile_forms(lambda form, warm: added(x, before, form, warm), every)
    for form in every:
        whole, summed = projected(stream, form), added(x, before, form)
        near(whole, exact, 0.01)
        check_sum(summed, out, x, before, 0.01)
        for rows, _ in itertools.product((1, 5, 13), range(3)):
            assert torch.equal(projected(Stream(stream.h[:rows]), form), whole[:rows]), form
            few = added(x[:rows], Stream(before.h[:rows]), form)
            assert torch.equal(few.h, summed.h[:rows]), form
            assert torch.equal(few.squares, summed.squares[:rows]), form
        assert not into.counters.any()
        assert not out.counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True], ids=["norm inside", "norm apart"])
@pytest.mark.parametrize("split", [1, 4])
def test_on_a_gpu_kernels_that_begin_early_wait_for_what_they_read(split, apart) -> None:
    """A chain of products, each of which reads what the one before wrote, in a graph, in memory that it uses again."""
    forms = importlib.import_module(fused.MODULE)
    parts = [drawn(5, 2048, 2048, torch.bfloat16, "cuda", seed=i, bias=False) for i in range(6)]
    into_form = forms.FORMS[0]._replace(apart=apart)
    out_form = next(form for form in forms.FORMS if form.split == split)

    def chain(h, early):
        stream = Stream(h)
        for into, _, out, _, _ in parts * 3:
            y, stream = forms.project(stream.h, into, stream, h.dtype, into_form, early=early)
            stream = forms.add_projected(y, out, stream, out_form, early=early)
        return stream.h

    h = parts[0][1].h.clone()
    chain(h, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(h, True)
    for seed in range(20):
        h.copy_(torch.randn(h.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, chain(h, False))


@pytest.mark.gpu
def test_on_a_gpu_a_form_is_chosen_once_for_large_weights(monkeypatch) -> None:
    forms = importlib.import_module(fused.MODULE)
    monkeypatch.setattr(forms, "_best", {})
    with torch.inference_mode():
        into, stream, *_ = drawn(3, 4096, 4096, torch.bfloat16, "cuda")
        project(into, stream)
        assert list(forms._best) == [forms.kind_of(into, 1, torch.bfloat16)]
        monkeypatch.setattr(forms, "tune", None)
        project(into, Stream(stream.h[:1]))
