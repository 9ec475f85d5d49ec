"""Stand-ins for mamba-ssm, causal-conv1d and our Triton kernels, which need a GPU: they hold what the real ones check,
and compute by their formulas."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mambabench.kernels import support, tuning
from mambabench.kernels.gated_norm import fused as norm_fused
from mambabench.kernels.scan import fused as scan_fused

CALLS: list[str] = []


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    CALLS.append("scan")
    batch, length, heads, width = x.shape
    assert B.shape == C.shape
    assert heads % B.shape[2] == 0
    assert dt.shape == (batch, length, heads)
    assert dt.dtype == A.dtype == torch.float32
    assert D is None or D.dtype == torch.float32
    assert x.dtype == B.dtype == C.dtype
    assert x.stride(-1) == B.stride(-1) == C.stride(-1) == 1
    assert not dt_softplus
    state = x.new_zeros(batch, heads, width, B.shape[3], dtype=torch.float32)
    if initial_states is not None:
        assert initial_states.shape == state.shape
        state = initial_states
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    before, outputs = torch.zeros(batch, dtype=torch.int32), []
    for t in range(length):
        same = (seq_idx[:, t] == before).view(-1, 1, 1, 1)
        before = seq_idx[:, t]
        state = (state * same) * torch.exp(dt[:, t] * A)[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t].float())[..., None] * B[:, t, :, None].float()
        y = (state * C[:, t, :, None].float()).sum(-1)
        outputs.append(y if D is None else y + D[:, None] * x[:, t].float())
    y = torch.stack(outputs, 1).to(x.dtype)
    return (y, state) if return_final_states else y


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    CALLS.append("selective_scan")
    batch, channels, length = u.shape
    assert delta.shape == u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert B.shape == C.shape == (batch, B.shape[1], A.shape[1], length)
    assert all(t.stride(-1) == 1 or length == 1 for t in (u, delta, B, C, D, delta_bias))
    assert z is None
    assert delta_softplus
    raw = delta.float() + delta_bias[:, None]
    # As the kernel has it, so that infinite and huge steps meet what they meet there.
    dt = torch.where(raw <= 20, torch.log1p(torch.exp(raw.clamp(max=20))), raw)
    B, C = (t.float().repeat_interleave(channels // t.shape[1], dim=1) for t in (B, C))
    state, outputs = u.new_zeros(batch, channels, A.shape[1], dtype=torch.float32), []
    for t in range(length):
        inputs = (dt[..., t] * u[..., t].float()).unsqueeze(-1) * B[..., t]
        state = torch.exp2(dt[..., t, None] * (A * 1.4426950408889634)) * state + inputs
        outputs.append((state * C[..., t]).sum(-1) + D * u[..., t].float())
    y = torch.stack(outputs, -1).to(u.dtype)
    return (y, state) if return_last_state else y


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    CALLS.append("conv")
    batch, channels, length = x.shape
    taps = weight.shape[1]
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert channels % 8 == x.stride(2) % 8 == x.stride(0) % 8 == x.data_ptr() % 16 == 0
    assert 2 <= taps <= 4
    assert bias.dtype == weight.dtype
    before = x.new_zeros(batch, channels, taps - 1)
    if initial_states is not None:
        assert initial_states.shape == before.shape
        assert initial_states.dtype == x.dtype
        assert initial_states.stride(1) == 1
        assert seq_idx is None
        before = initial_states
    joined, y = torch.cat((before, x), dim=2).float(), bias.float().view(1, -1, 1)
    for tap in range(taps):
        part = joined[..., tap : tap + length] * weight[:, tap, None].float()
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            assert seq_idx.is_contiguous()
            padded = F.pad(seq_idx, (taps - 1, 0), value=-1)
            part = part * (padded[:, tap : tap + length] == seq_idx).unsqueeze(1)
        y = y + part
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def gated_norm(y, z, weight, bias, width, eps):
    CALLS.append("gated_norm")
    gate = z.float() if bias is None else z.float() + bias
    gated = (y.float() * F.silu(gate)).unflatten(-1, (-1, width))
    scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return ((gated * scale).flatten(-2) * weight.float()).to(z.dtype)


STANDINS = {
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.ssd_combined": (mamba_chunk_scan_combined,),
    "mamba_ssm.ops.selective_scan_interface": (selective_scan_fn,),
    "causal_conv1d": (causal_conv1d_fn,),
    "mambabench.kernels.gated_norm.triton": (gated_norm,),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No reason was met and no package looked for yet, and none is afterwards."""
    monkeypatch.setattr(support, "_met", {})
    support.installed.cache_clear()
    yield
    support.installed.cache_clear()


@pytest.fixture
def standins(monkeypatch: pytest.MonkeyPatch, asked: None) -> list[str]:
    """Tensors count as being on CUDA, tf32 is allowed, and the packages are the stand-ins. Returns the calls of those,
    in order."""
    monkeypatch.setattr(support, "on_cuda", lambda tensor: True)
    monkeypatch.setattr(scan_fused, "may_round", lambda: True)
    monkeypatch.setattr(scan_fused, "TUNED", ())
    if importlib.util.find_spec("triton") is None:
        monkeypatch.setattr(norm_fused, "installed", lambda module: support.Support.yes())
    for name, functions in STANDINS.items():
        module = types.ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    CALLS.clear()
    return CALLS


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter learns to round to bf16, to multiply bf16, and that tensor cores cut fp32 off where they
    take tf32."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, bf16, convert = interpreter.InterpreterBuilder, interpreter.tl.bfloat16, interpreter._convert_float
    product = builder.create_dot

    def rounded(data, source, target, mode):  # type: ignore[no-untyped-def]
        if target == bf16:
            return torch.from_numpy(np.array(data, np.float32)).bfloat16().view(torch.uint16).numpy()
        if source == bf16:
            return (np.asarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return convert(data, source, target, mode)

    def dot(self, a, b, d, precision, imprecise):  # type: ignore[no-untyped-def]
        a, b = (self.cast_impl(t, interpreter.tl.float32) if t.dtype.scalar == bf16 else t for t in (a, b))
        if precision.name == "TF32":
            cut = ((t.data.view(np.uint32) & 0xFFFFE000).view(np.float32) for t in (a, b))
            a, b = (interpreter.TensorHandle(data, interpreter.tl.float32) for data in cut)
        return product(self, a, b, d, precision, imprecise)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(builder, "create_dot", dot)


@pytest.fixture
def timed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Sequence[Callable[[], object]]], float]], None]:
    """`timed_by(ms)`: a form's calls take as many milliseconds as `ms` says of them, whenever it is their turn. Nothing
    was chosen by another process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(tuning, "recorded", lambda calls, pool: calls)

    def by(ms: Callable[[Sequence[Callable[[], object]]], float]) -> None:
        def started_ms(graphs: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[list[float]]:
            times = [[ms(calls) for calls in graphs] for _ in range(rounds)]
            return [list(each) for each in zip(*times, strict=True)]

        monkeypatch.setattr(tuning, "started_ms", started_ms)

    return by


@pytest.fixture
def no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[types.ModuleType], None]:
    """`no_memory(room)`: forms of this room could be timed, if there were memory for it."""

    def full(like: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def take(room: types.ModuleType) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(room, "measurable", lambda *_: True)
        monkeypatch.setattr(torch, "zeros_like", full)

    return take
