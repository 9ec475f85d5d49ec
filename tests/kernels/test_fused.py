"""The kernels of mamba-ssm and causal-conv1d are our operations: results, states and gradients against the reference in
fp64. On CPU stand-ins take their place, so that what goes in and comes out is tested everywhere."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from mambabench.kernels import support
from mambabench.kernels.conv import conv, conv_loop
from mambabench.kernels.documents import Documents
from mambabench.kernels.gated_norm import gated_norm
from mambabench.kernels.gated_norm.reference import gated_norm as gated_norm_reference
from mambabench.kernels.scan import scan
from mambabench.kernels.scan.reference import scan as scan_reference
from mambabench.kernels.selective_scan import selective_scan
from mambabench.kernels.selective_scan.reference import selective_scan as selective_reference
from torch import Tensor


def relative(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Bounds:
    """Of ‖got - exact‖ / ‖exact‖: results, gradients of inputs, and gradients that are sums over all tokens, whose
    terms cancel."""

    result: float
    gradient: float
    summed: float


@dataclass(frozen=True)
class Where:
    device: str
    dtype: torch.dtype
    length: int

    def bounds(self, rounding: str) -> Bounds:
        """bf16 keeps 8 bits, and what enters a matrix product is rounded too. fp32 is exact, but on a GPU for matrix
        products in `tf32`, which keep 10 bits and cut off the others, and for `fast` exponentials, whose errors every
        step of a recurrence adds to."""
        if self.dtype == torch.bfloat16:
            return Bounds(4e-3, 6e-3, 6e-3)
        if self.device == "cuda" and rounding:
            return {"tf32": Bounds(2e-3, 4e-3, 4e-3), "fast": Bounds(1e-4, 1e-3, 1e-3)}[rounding]
        return Bounds(1e-5, 1e-4, 1e-4)


@pytest.fixture(
    params=[
        pytest.param(Where("cpu", torch.float32, 11), id="cpu-fp32"),
        pytest.param(Where("cpu", torch.bfloat16, 11), id="cpu-bf16"),
        pytest.param(Where("cuda", torch.float32, 300), id="cuda-fp32", marks=pytest.mark.gpu),
        pytest.param(Where("cuda", torch.bfloat16, 300), id="cuda-bf16", marks=pytest.mark.gpu),
    ]
)
def where(request: pytest.FixtureRequest) -> Iterator[Where]:
    place: Where = request.param
    if place.device == "cpu":
        request.getfixturevalue("standins")
        yield place
        return
    pytest.importorskip("mamba_ssm")
    pytest.importorskip("causal_conv1d")
    request.getfixturevalue("asked")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield place
    torch.set_float32_matmul_precision(before)


def draw(seed: int, where: Where, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Normal numbers in the dtype of `where`, but fp32 where the name says that it is a weight or a step."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t if name in EXACT else t.to(where.dtype) for name, t in drawn.items()}


EXACT = ("dt", "A", "D", "bias", "state", "weight")
SUMMED = ("A", "D", "bias", "weight")


def both(
    where: Where, fused: Callable[..., tuple], exact: Callable[..., tuple], inputs: dict[str, Tensor], kept: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients of the fused way on its device and of the other in fp64 on CPU, for one gradient of the
    results; those named in `kept` have none."""
    found = []
    for way, place, kind in ((fused, where.device, None), (exact, "cpu", torch.float64)):
        leaves = {n: t.to(place, kind, copy=True).requires_grad_(n not in kept) for n, t in inputs.items()}
        results = dict(zip(("y", "state"), way(**leaves), strict=False))
        generator = torch.Generator().manual_seed(99)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator).to(where.dtype).to(t)).sum()
            for t in results.values()
            if t.requires_grad and t.is_floating_point()
        )
        loss.backward()
        gradients = {f"d{n}": t.grad for n, t in leaves.items() if n not in kept}
        found.append({name: t.detach().cpu() for name, t in (results | gradients).items()})
    return found[0], found[1]


def agree(where: Where, got: dict[str, Tensor], want: dict[str, Tensor], rounding: str = "") -> None:
    bounds = where.bounds(rounding)
    errors = {name: relative(got[name], want[name]) for name in want}
    limits = {
        name: bounds.summed if name[1:] in SUMMED else bounds.gradient if name.startswith("d") else bounds.result
        for name in want
    }
    assert all(torch.isfinite(t).all() for t in got.values())
    assert {n: f"{e:.1e} > {limits[n]:.0e}" for n, e in errors.items() if not e <= limits[n]} == {}


def packed(batch: int, length: int, device: str) -> Documents:
    """A document of one token, one across the kernels' chunks, and rows that differ in number."""
    starts = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        starts[row, [3, 4, length // 2 + row] if row == 0 else [length // 3 + row]] = True
    return Documents(starts.cumsum(1, dtype=torch.int32).to(device))


TUNED = {(torch.bfloat16, "plain", 1), (torch.bfloat16, "packed", 4), (torch.bfloat16, "carried", 2)}
TUNED |= {(torch.float32, "plain", 4)}
"""What of the scan runs on a GPU, where every dtype and every case is a tuning of fifteen kernels, of a minute when
nothing is compiled. What goes in and comes out for the others is what the stand-ins see."""


@pytest.mark.parametrize("repeat", [1, 2, 4])
@pytest.mark.parametrize("case", ["plain", "packed", "carried", "packed and carried"])
def test_scan(repeat: int, case: str, where: Where) -> None:
    if where.device == "cuda" and (where.dtype, case, repeat) not in TUNED:
        pytest.skip("kernels are tuned for a few cases only")
    batch, length, groups, width = 2, where.length, 2, 64 if where.device == "cuda" else 8
    heads = groups * repeat
    inputs = draw(
        repeat,
        where,
        {
            "x": (batch, length, groups, width),
            "dt": (batch, length, heads),
            "A": (heads,),
            "B": (batch, length, groups, width),
            "C": (batch, length, heads, width),
            "D": (heads,),
        }
        | ({"state": (batch, heads, width, width)} if "carried" in case else {}),
    )
    inputs["dt"] = torch.nn.functional.softplus(inputs["dt"] - 2)
    inputs["A"] = -inputs["A"].exp()
    lengths = torch.tensor([length - 4, length]) if case == "carried" else None

    def extra(device: str) -> dict:
        documents = packed(batch, length, device) if "packed" in case else None
        return {"documents": documents, "lengths": None if lengths is None else lengths.to(device)}

    def trimmed(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs behind the end of a row mean nothing."""
        y, state = result
        if lengths is None:
            return y, state
        real = torch.arange(length, device=y.device) < lengths.to(y.device).unsqueeze(1)
        return y * real[..., None, None], state

    got, want = both(
        where,
        lambda **leaves: trimmed(scan(**leaves, **extra(where.device))),
        lambda **leaves: trimmed(scan_reference(**leaves, **extra("cpu"))),
        inputs,
        set(),
    )
    assert got["y"].dtype == where.dtype
    assert got["state"].dtype == torch.float32
    assert support.reasons() == {}
    agree(where, got, want, "tf32")


@pytest.mark.parametrize("repeat", [1, 4])
@pytest.mark.parametrize("case", ["plain", "packed", "padded", "packed and padded"])
def test_selective_scan(repeat: int, case: str, where: Where) -> None:
    batch, length, groups, size = 2, where.length, 4, 16 if where.device == "cuda" else 4
    channels = groups * repeat * 4
    inputs = draw(
        repeat,
        where,
        {
            "x": (batch, length, channels),
            "raw": (batch, length, channels),
            "A": (channels, size),
            "B": (batch, length, groups, size),
            "C": (batch, length, groups, size),
            "D": (channels,),
            "bias": (channels,),
        },
    )
    inputs["A"] = -inputs["A"].exp()
    keep = torch.ones(batch, length, dtype=torch.bool)
    if "padded" in case:
        keep[0, :2] = keep[1, -3:] = False

    def run(way: Callable, device: str, leaves: dict) -> tuple[Tensor, Tensor]:
        documents = packed(batch, length, device) if "packed" in case else None
        real = keep.to(device)
        y, state = way(**leaves, keep=real if "padded" in case else None, documents=documents)
        return y * real.unsqueeze(-1), state.detach()

    got, want = both(
        where,
        lambda **leaves: run(selective_scan, where.device, leaves),
        lambda **leaves: run(selective_reference, "cpu", leaves),
        inputs,
        set(),
    )
    assert got["y"].dtype == where.dtype
    assert got["state"].dtype == torch.float32
    assert support.reasons() == {}
    agree(where, got, want, "fast")


def test_the_last_state_of_mamba1_says_that_it_has_no_gradient(where: Where) -> None:
    shapes = {"x": (1, 4, 8), "raw": (1, 4, 8), "A": (8, 4), "B": (1, 4, 2, 4), "C": (1, 4, 2, 4), "D": (8,)}
    inputs = {n: t.to(where.device) for n, t in draw(0, where, shapes | {"bias": (8,)}).items()}
    inputs["x"].requires_grad_()
    _, state = selective_scan(**inputs)
    with pytest.raises(RuntimeError, match=r"no gradient of its last state; run it in .*reference_only"):
        state.sum().backward()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("case", ["plain", "packed", "carried", "sliced", "ragged"])
def test_conv(taps: int, silu: bool, case: str, where: Where) -> None:
    batch, length, channels = 2, where.length, 64
    inputs = draw(taps, where, {"u": (batch, length, channels + 4), "weight": (channels, taps), "bias": (channels,)})
    if case == "carried":
        inputs |= draw(1, where, {"window": (batch, taps - 1, channels)})
    lengths = torch.tensor([length - 5, 1]) if case in ("carried", "ragged") else None

    def run(way: Callable, device: str, u: Tensor, **leaves: Tensor) -> tuple[Tensor, Tensor]:
        # A slice whose rows are not aligned, or one whose beginning is not.
        u = u[..., 2 : channels + 2] if case == "sliced" else u[..., :channels].contiguous()
        documents = packed(batch, length, device) if case == "packed" else None
        return way(u, **leaves, documents=documents, lengths=None if lengths is None else lengths.to(device))

    def exact(u: Tensor, **leaves: Tensor) -> tuple[Tensor, Tensor]:
        y, end = run(conv_loop, "cpu", u, **leaves)
        return (torch.nn.functional.silu(y) if silu else y), end

    got, want = both(
        where,
        lambda u, **leaves: run(lambda *a, **k: conv(*a, **k, silu=silu), where.device, u, **leaves),
        exact,
        inputs,
        {"window"},
    )
    assert got["y"].dtype == where.dtype
    assert torch.equal(got["state"].double(), want["state"])
    assert support.reasons() == {}
    agree(where, got, want)


def test_a_convolution_shorter_than_its_window_keeps_what_was_before(where: Where) -> None:
    inputs = draw(0, where, {"u": (2, 1, 8), "weight": (8, 4), "bias": (8,), "window": (2, 3, 8)})
    u, weight, bias, window = (t.to(where.device) for t in inputs.values())
    for before in (None, window):
        got, want = conv(u, weight, bias, before), conv_loop(u, weight, bias, before)
        assert relative(got[0].cpu(), want[0].cpu()) < 5e-3
        assert torch.equal(got[1], want[1])
    assert support.reasons() == {}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("low_gate", [False, True])
def test_gated_norm(low_gate: bool, biased: bool, where: Where) -> None:
    heads, width = 3, 64 if where.device == "cuda" else 8
    shape = (2, where.length, heads * width)
    shapes = {"y": shape, "z": (*shape[:2], shape[2] + 8), "weight": shape[2:]} | (
        {"bias": shape[2:]} if biased else {}
    )
    inputs = draw(0, where, shapes)
    if low_gate:
        inputs["z"] = inputs["z"].bfloat16()

    def run(way: Callable, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        return (way(y, z[..., 8:], weight, bias, width, 1e-5),)

    got, want = both(
        where,
        lambda **leaves: run(gated_norm, **leaves),
        lambda **leaves: run(gated_norm_reference, **leaves),
        inputs,
        set(),
    )
    assert got["y"].dtype == inputs["z"].dtype
    assert support.reasons() == {}
    agree(Where(where.device, torch.bfloat16, where.length) if low_gate else where, got, want)


@pytest.mark.gpu
def test_low_precision_scan_is_as_good_as_its_inputs_allow() -> None:
    """The reference on a GPU with the same inputs is what training would have without the kernels."""
    pytest.importorskip("mamba_ssm")
    place = Where("cuda", torch.bfloat16, 300)
    shapes = {"x": (2, 300, 2, 64), "dt": (2, 300, 8), "A": (8,), "B": (2, 300, 2, 64), "C": (2, 300, 8, 64)}
    inputs = draw(7, place, shapes | {"D": (8,)})
    inputs["dt"], inputs["A"] = torch.nn.functional.softplus(inputs["dt"] - 2), -inputs["A"].exp()
    with support.reference_only():
        got, want = both(place, scan, scan_reference, inputs, set())
    assert "the reference was asked for" in support.reasons()["scan"]
    agree(Where("cuda", torch.float32, 300), {n: got[n] for n in ("y", "state")}, {n: want[n] for n in ("y", "state")})
