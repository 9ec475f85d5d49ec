"""The convolution in front of steps over a ring is PyTorch's, in Triton's interpreter and on a GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mambabench.kernels.multistep import Rotation
from mambabench.kernels.multistep import ring as room
from mambabench.kernels.multistep.ring import plain_convolve
from mambabench.kernels.pointwise.reference import rotate


@pytest.fixture
def kernels(interpret, tensor_cores):
    return interpret(room.CONVOLUTION)


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_tokens_of_a_part_of_a_projection_lie_one_behind_the_other(batch, count):
    part = torch.zeros(batch * count, 11)[:, 2:7].unflatten(0, (batch, count))
    assert batch == count == 1 or room.between_tokens(part) == 11
    if count > 1:
        assert room.between_tokens(torch.zeros(batch, 5, count).mT) == 0
        assert room.between_tokens(torch.zeros(batch, count + 1, 5)[:, :-1]) == (0 if batch > 1 else 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "kept", "heads", "taps", "silu"),
    [(7, 5, 3, 4, True), (300, 260, 2, 2, False), (300, 7, 2, 2, True), (16, 16, 300, 1, True)],
)
def test_in_the_interpreter_the_convolution_is_pytorch_s(kernels, dtype, channels, kept, heads, taps, silu):
    batch, count, slots = 3, 5, 11
    dice = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=dice)

    u = normal(batch, count, channels + heads + 2).to(dtype)[..., 1:-1]
    weight, bias, dt_bias = normal(channels, taps), normal(channels), 6 * normal(heads)
    start = torch.tensor([0, 9, 1030], dtype=torch.int32)
    before = normal(batch, count + taps + 1, channels + heads).to(dtype)
    rings = torch.full((batch, slots, kept), 3.0, dtype=dtype), torch.full((batch, slots, heads), 3.0)
    check_convolution(kernels.convolve, (u, weight, bias, dt_bias, before, *rings, start, silu), "cpu")


def check_convolution(way, given, device, rotation=None):
    """Against PyTorch in fp64, rounded once, with a rotation before it too; the window as it is."""
    made = [t.to(device, copy=True) if isinstance(t, torch.Tensor) else t for t in given]
    turned = None if rotation is None else Rotation(rotation.table.to(device), rotation.unturned)
    if device == "cuda":
        torch.cuda.synchronize()  # which a kernel that begins early does not wait for
    left = way(*made, turned)
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    want = plain_convolve(*exact, None if rotation is None else Rotation(rotation.table.double(), rotation.unturned))
    assert torch.equal(made[4].cpu(), exact[4].to(made[4].dtype))
    for got, exactly, unturned in ((made[5], exact[5], rotation and rotation.unturned), (left, want, 0)):
        assert got.shape == exactly.shape
        relative = 2**-7 if got.element_size() == 2 else 1e-6
        allowed = 1e-6 + relative * (exactly.abs() if rotation is None else lengths(exactly, rotation, unturned))
        assert ((got.cpu() - exactly.to(got.dtype)).abs() <= allowed).all()
    torch.testing.assert_close(made[6].cpu(), exact[6].float(), rtol=2e-6, atol=0)


def lengths(outputs, rotation, unturned):
    """What roundings are relative to: of two numbers that are mixed, how long they are together."""
    x, others = outputs.abs().tensor_split((unturned,), dim=2)
    pairs = others.unflatten(2, (-1, 2, rotation.table.shape[2] // 2)).norm(dim=3, keepdim=True)
    return torch.cat((x, pairs.expand(-1, -1, -1, 2, -1).flatten(2)), dim=2)


def angles(capacity, size, dice):
    """[capacity, 2, N]: cos and sin of every position."""
    turn = (6.3 * torch.rand(capacity, size // 2, generator=dice)).repeat(1, 2)
    return torch.stack((turn.cos(), turn.sin()), dim=1)


def rotated_layer(width, size, groups, heads, taps, count, starts, silu, dtype, seed):
    """Arguments of `convolve` for so many groups of x, B and C, at capacity with the last row."""
    dice, (x, b, c), batch = torch.Generator().manual_seed(seed), groups, len(starts)
    kept, slots, capacity = x * width + b * size, count + 3, max(starts) + count
    channels = kept + c * size

    def normal(*shape):
        return torch.randn(shape, generator=dice)

    u, before = normal(batch, count, channels + heads), normal(batch, count + taps, channels + heads)
    rings = torch.full((batch, slots, kept), 3.0, dtype=dtype), torch.full((batch, slots, heads), 3.0)
    start = torch.tensor(starts, dtype=torch.int32)
    taken = normal(channels, taps), normal(channels), normal(heads)
    rotation = Rotation(angles(capacity, size, dice).to(dtype), x * width)
    return (u.to(dtype), *taken, before.to(dtype), *rings, start, silu), rotation


def test_plain_rotations_are_those_of_whole_sequences_by_position():
    """Of all that is kept and left but x, each group by itself."""
    starts, count = [4, 0], 3
    made, rotation = rotated_layer(5, 6, (2, 1, 3), 2, 4, count, starts, True, torch.float64, 0)
    bare = [t.clone() if isinstance(t, torch.Tensor) else t for t in made]
    left, want = plain_convolve(*made, rotation), plain_convolve(*bare)
    for row, start in enumerate(starts):
        cos, sin = rotation.table[start : start + count].unsqueeze(2).unbind(1)
        slots = torch.arange(start, start + count) % made[5].shape[1]
        x, b = bare[5][row, slots].tensor_split((10,), dim=1)
        torch.testing.assert_close(left[row], rotate(want[row].unflatten(1, (3, 6)), cos, sin).flatten(1))
        b = rotate(b.unflatten(1, (1, 6)), cos, sin).flatten(1)
        torch.testing.assert_close(made[5][row, slots], torch.cat((x, b), dim=1))
    for same in (4, 6):
        torch.testing.assert_close(made[same], bare[same], rtol=0, atol=0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 9),
    half=st.integers(1, 9),
    groups=st.tuples(*(st.integers(1, 4) for _ in range(3))),
    taps=st.integers(1, 5),
    count=st.integers(1, 6),
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    silu=st.booleans(),
    cut=st.sampled_from([(32, 1, True), (64, 1, False), (128, 4, True)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_in_the_interpreter_rotated_convolutions_are_pytorch_s(
    kernels, width, half, groups, taps, count, starts, silu, cut, dtype, seed
):
    given, rotation = rotated_layer(width, 2 * half, groups, 3, taps, count, starts, silu, dtype, seed)

    def way(*made):
        return kernels.convolve(*made, kernels.Cut(*cut))

    check_convolution(way, given, "cpu", rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_interpreter_many_tokens_are_rotated_in_parts(kernels, dtype):
    given, rotation = rotated_layer(4, 8, (1, 2, 1), 2, 3, 37, [1000, 3], True, dtype, 0)
    check_convolution(kernels.convolve, given, "cpu", rotation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_on_a_gpu_the_convolution_is_pytorch_s(dtype, count):
    kernels = pytest.importorskip(room.CONVOLUTION)
    dice = torch.Generator().manual_seed(0)
    channels, ring, heads, taps, batch = 700, 300, 12, 4, 3

    def normal(*shape):
        return torch.randn(shape, generator=dice)

    u, weight, bias = normal(batch, count, channels + heads).to(dtype), normal(channels, taps), normal(channels)
    kept, start = normal(batch, count + taps, channels + heads).to(dtype), torch.tensor([0, 9, 1030], dtype=torch.int32)
    empty = torch.zeros(batch, 11, ring, dtype=dtype), torch.zeros(batch, 11, heads)
    given = u, weight, bias, torch.linspace(-9, 9, heads), kept, *empty, start, True
    check_convolution(kernels.convolve, given, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 5, 37])
@pytest.mark.parametrize("sizes", [(64, 64, (4, 4, 8)), (128, 128, (8, 8, 32)), (7, 12, (3, 2, 5))], ids=str)
def test_on_a_gpu_rotated_convolutions_are_pytorch_s(dtype, count, sizes):
    kernels = pytest.importorskip(room.CONVOLUTION)
    given, rotation = rotated_layer(*sizes, 8, 4, count, [0, 9, 1030], True, dtype, 0)
    for cut in kernels.CUTS:
        check_convolution(lambda *made, cut=cut: kernels.convolve(*made, cut), given, "cuda", rotation)
