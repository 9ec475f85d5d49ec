"""Attention, products and norms of a decoding step, beside PyTorch's (`nox -s kernels`)."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mambabench.kernels.decode_attention import decode_attention
from mambabench.kernels.few_rows import Projection, Stream, add_projected, project
from mambabench.kernels.gated_norm import gated_norm
from mambabench.kernels.pointwise import rotate
from mambabench.kernels.rms_norm import add_rms_norm, rms_norm
from torch import Tensor

pytestmark = pytest.mark.usefixtures("without_gradients")

EPS = 1e-5


def sizes(names: str, tiny: list[Any], *real: Any) -> pytest.MarkDecorator:
    """The tiny ones, and on a GPU all combinations of the others."""
    on_gpu = [pytest.param(*each, marks=pytest.mark.gpu) for each in itertools.product(*real)]
    return pytest.mark.parametrize(names, [*tiny, *on_gpu])


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(std=scale)


def attended(given: Any, count: int, causal: bool) -> Tensor:
    """Of the first row, in fp32: [T, H P]."""
    groups, width = given.keys.shape[2:]
    first = int(given.start[0])
    heads = given.projected.shape[1] // width - 2 * groups
    new = given.projected[:count].float().view(count, -1, width).split((heads, groups, groups), dim=1)
    cos, sin = given.rotary[first : first + count].float().unsqueeze(2).unbind(1)
    q, k = (rotate(t, cos, sin) for t in new[:2])
    keys, values = (t[0, :first].float() for t in (given.keys, given.values))
    keys, values = torch.cat((keys, k.bfloat16().float())), torch.cat((values, new[2]))
    seen = torch.arange(first + count, device=q.device) <= first + torch.arange(count, device=q.device).unsqueeze(1)
    q, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys, values))
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen if causal else None, enable_gqa=True)
    return y[0].transpose(0, 1).flatten(1)


@sizes("shape, batch, context, count", [("tiny", 2, 40, 3)], ["Llama-3-8B"], [1, 32], [2048, 16_384], [1, 5, 16])
@pytest.mark.parametrize("form", ["ours", "sdpa"])
def test_decode_attention(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int, context: int, count: int,
    form: str,
) -> None:  # fmt: skip
    """PyTorch's is of a cache that has the new tokens already, and of queries as the cache has heads: it neither turns
    nor writes, and each token reads all others."""

    def make() -> Any:
        return inputs.attention(shape, batch, context, count, device)

    def packed() -> tuple[Tensor, ...]:
        given = make()
        groups, width = given.keys.shape[2:]
        at = slice(context, context + count)
        q, k, v = given.projected.view(batch, count, -1, width).tensor_split((-2 * groups, -groups), dim=2)
        cos, sin = given.rotary[at].unsqueeze(2).unbind(1)
        given.keys[:, at], given.values[:, at] = rotate(k, cos, sin), v
        q = rotate(q, cos, sin).transpose(1, 2).reshape(batch, groups, -1, width)
        return q, *(t[:, : context + count].transpose(1, 2) for t in (given.keys, given.values))

    moved = inputs.live_bytes(shape, batch, context, count)
    if form == "ours":
        found = cold(make, lambda *given: decode_attention(*given), moved=moved)[:count]
    else:
        y = cold(packed, F.scaled_dot_product_attention, moved=moved)[0]
        found = y.unflatten(1, (-1, count)).flatten(0, 1).transpose(0, 1).flatten(1)
    assert_near(found, attended(cold.inputs(make), count, form == "ours"), within=2.0**-6)


@sizes(
    "product, rows",
    [(f"tiny-{kind}", 3) for kind in ("norm", "gate", "sum", "head")],
    ["qkv", "o", "gate_up", "down", "head"],
    [1, 5, 16],
)
@pytest.mark.parametrize("form", ["ours", "cublas"])
def test_product_of_few_rows(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, product: str, rows: int, form: str
) -> None:
    """cuBLAS's is the bare product, without the norm, gate or sum that is part of ours."""
    width, lines, kind = inputs.PRODUCTS[product]
    wide = torch.float32 if kind == "head" else torch.bfloat16

    def make() -> tuple[Any, ...]:
        weight, x = normal(device, lines, width, scale=width**-0.5), normal(device, rows, width)
        if kind == "sum":
            return Projection(weight), x, Stream(normal(device, rows, lines))
        norm = (1 + 0.3 * torch.randn(width, device=device)).bfloat16()
        squares = x.float().square().unflatten(1, (-1, 32)).sum(2)
        return Projection(weight, None, norm, EPS, kind == "gate"), x, Stream(x, None, squares)

    def ours(given: Projection, x: Tensor, stream: Stream) -> Tensor:
        if kind != "sum":
            return project(given, stream, wide)[0]
        h, added, _ = add_projected(given, x, stream)
        return h if added is None else h + added

    def bare(given: Projection, x: Tensor, stream: Stream) -> Tensor:
        if wide == torch.float32 and x.is_cuda:
            return torch.mm(x, given.weight.T, out_dtype=wide)
        return F.linear(x, given.weight).to(wide)

    found = cold(make, ours if form == "ours" else bare, moved=2 * width * lines)
    given, x, stream = cold.inputs(make)
    x = x.float()
    if form == "ours" and given.norm is not None:
        x = (F.rms_norm(x, (width,), None, EPS) * given.norm).bfloat16().float()
    wanted = x @ given.weight.float().T
    if form == "ours" and kind == "gate":
        wanted = F.silu(wanted[:, : lines // 2]) * wanted[:, lines // 2 :]
    elif form == "ours" and kind == "sum":
        wanted += stream.h
    assert_near(found, wanted)


@sizes("channels, width, rows", [(16, 8, 3)], [4096, 5120], [128], [1, 160, 8192])
@pytest.mark.parametrize("form", ["ours", "pytorch"])
def test_gated_norm(cold, device: torch.device, assert_near, channels: int, width: int, rows: int, form: str) -> None:
    def make() -> tuple[Tensor, ...]:
        return normal(device, rows, channels), normal(device, rows, channels), torch.randn(channels, device=device)

    def ours(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_norm(y, z, weight, None, width, EPS)

    def plain(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        gated = (y.float() * F.silu(z.float())).unflatten(1, (-1, width))
        return (F.rms_norm(gated, (width,), None, EPS).flatten(1) * weight).to(z.dtype)

    found = cold(make, ours if form == "ours" else plain, moved=3 * 2 * rows * channels)
    y, z, weight = (t.double() for t in cold.inputs(make))
    assert_near(found, plain(y, z, weight))


@sizes("width, rows", [(16, 3)], [4096], [1, 160, 8192])
@pytest.mark.parametrize("form", ["ours", "pytorch"])
def test_rms_norm(cold, device: torch.device, assert_near, width: int, rows: int, form: str) -> None:
    """From fp32 to bf16."""

    def make() -> tuple[Tensor, ...]:
        return torch.randn(rows, width, device=device), torch.randn(width, device=device)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS, torch.bfloat16)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, EPS).bfloat16()

    found = cold(make, ours if form == "ours" else plain, moved=(4 + 2) * rows * width)
    x, weight = cold.inputs(make)
    assert_near(found, x * (x.square().mean(1, keepdim=True) + EPS).rsqrt() * weight)


@sizes("width, rows", [(16, 3)], [4096], [1, 160])
@pytest.mark.parametrize("form", ["ours", "pytorch"])
def test_sum_and_its_norm(cold, device: torch.device, assert_near, width: int, rows: int, form: str) -> None:
    def make() -> tuple[Tensor, ...]:
        return *(normal(device, rows, width) for _ in range(2)), normal(device, width)

    def ours(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return add_rms_norm(x, added, weight, EPS)

    def plain(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        h = x + added
        return h, F.rms_norm(h, (width,), weight, EPS)

    found = cold(make, ours if form == "ours" else plain, moved=4 * 2 * rows * width)
    x, added, weight = cold.inputs(make)
    h = (x + added).float()
    assert_near(found, (h, h * (h.square().mean(1, keepdim=True) + EPS).rsqrt() * weight))
