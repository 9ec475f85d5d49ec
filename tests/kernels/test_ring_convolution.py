"""The convolution in front of steps over a ring is PyTorch's, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels.multistep import ring as room
from mambabench.kernels.multistep.ring import plain_convolve


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


def check_convolution(way, given, device):
    """Against PyTorch in fp64, rounded once; the window as it is."""
    made = [t.to(device, copy=True) if isinstance(t, torch.Tensor) else t for t in given]
    if device == "cuda":
        torch.cuda.synchronize()  # which a kernel that begins early does not wait for
    left = way(*made)
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    want = plain_convolve(*exact)
    assert torch.equal(made[4].cpu(), exact[4].to(made[4].dtype))
    for got, exactly in ((made[5], exact[5]), (left, want)):
        assert got.shape == exactly.shape
        torch.testing.assert_close(
            got.cpu(), exactly.to(got.dtype), rtol=2**-7 if got.element_size() == 2 else 1e-6, atol=1e-6
        )
    torch.testing.assert_close(made[6].cpu(), exact[6].float(), rtol=2e-6, atol=0)


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
