"""Stepping over rings of what goes into the state keeps the contract as stepping over rings of projections does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambabench.backends import mamba2
from mambabench.backends import state as states
from mambabench.backends.checkpoint import read_config
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig, TeacherConfig
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.conformance import check_backend
from mambabench.harness.interfaces import MambabenchError
from mambabench.kernels import support
from mambabench.kernels.multistep import fused_step, selective_ring
from mambabench.kernels.support import Support


@pytest.fixture
def mamba_backend() -> MambaBackend:
    return MambaBackend(MambaConfig())


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep such rings on a CPU too, where PyTorch reads them."""
    for name in ("ring_supports", "selective_ring_supports"):
        monkeypatch.setattr(states, name, lambda *given: Support.yes())


@pytest.fixture(params=["mamba", "mamba2", "both", "mamba, rotated", "mamba2, rotated"])
def artifact(
    request: pytest.FixtureRequest,
    half: Path,
    llama: Path,
    mamba_backend: MambaBackend,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two of four layers are Mamba-1, Mamba-2, or one is Mamba-1 and two are Mamba-2."""
    if request.param == "mamba2":
        return half
    out = tmp_path_factory.mktemp(request.param) / "artifact"
    rope = "kept" if "rotated" in request.param else "dropped"
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, rope=rope))
    if not request.param.startswith("mamba2"):
        backend = MambaBackend(MambaConfig(rope=rope))
    parent, keep = (half, [3]) if request.param == "both" else (llama, [1, 3])
    backend.convert(parent, keep, out, seed=0)
    return out


@pytest.mark.parametrize("replay", [0, 5, 17])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)], ids=["fp64", "fp32"])
def test_rings_keep_the_stepping_contract(
    rings: None,
    dtype: str,
    tolerance: float,
    replay: int,
    artifact: Path,
    mamba_backend: MambaBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the checkpoint is written in every round that settles, or in some."""
    monkeypatch.setenv(states.VARIABLE, str(replay))
    check_backend(mamba_backend, artifact, rounds=100, dtype=dtype, tolerance=tolerance)


def test_a_length_of_rings_that_is_no_number_is_told(rings: None, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(states.VARIABLE, "16 tokens")
    with pytest.raises(MambabenchError, match="MAMBABENCH_REPLAY=16 tokens: a number of tokens is wanted"):
        TeacherBackend(TeacherConfig()).load(half, "cpu", "float32").open(1, 4, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("replay", [0, 7, 15])
def test_on_a_gpu_the_kernels_keep_it(
    replay: int,
    artifact: Path,
    mamba_backend: MambaBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(states.VARIABLE, str(replay))
    check_backend(mamba_backend, artifact, rounds=100, device="cuda:0", dtype="float32", tolerance=1e-4)
    used = support.record()
    for operation in ("enter", "fused_step", "selective_ring_multistep"):
        assert operation not in used or used[operation]["fused"]


@pytest.mark.parametrize(
    "options",
    [
        {"d_conv": 1},
        {"d_conv": 6, "activation": "none", "norm": "none"},
        {"d_conv": 1, "rope": "kept"},
        {"rope": "kept", "gate": "open", "activation": "none", "conv": "identity"},
    ],
    ids=str,
)
def test_any_mamba2_layer_keeps_it_over_rings(rings: None, options: dict, llama: Path, tmp_path: Path) -> None:
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, **options))
    backend.convert(llama, [2], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=60, seed=4, batch=3, steps=5)


@pytest.mark.parametrize(
    "options",
    [
        {"d_conv": 1, "dt_bias": "twice"},
        {"d_conv": 6, "activation": "none", "sub_block_order": "released"},
        {"gate": "open"},
        {"rope": "kept"},
        {"d_conv": 1, "rope": "kept", "sub_block_order": "released"},
    ],
    ids=str,
)
def test_any_mamba_layer_keeps_it_over_rings(
    rings: None, options: dict, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """With sub-blocks narrower than heads."""
    backend = MambaBackend(MambaConfig(**options))
    backend.convert(make_llama(head_dim=32), [2], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=60, seed=4, batch=3, steps=5)


@pytest.mark.parametrize(("rope", "replay"), [("dropped", 0), ("dropped", 5), ("kept", 5)])
def test_in_the_interpreter_the_mamba_kernel_keeps_it(
    rings: None,
    rope: str,
    replay: int,
    llama: Path,
    tmp_path: Path,
    interpret: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, backend, ran = interpret(selective_ring.MODULE), MambaBackend(MambaConfig(rope=rope)), []

    def kernel(_: str, name: str) -> Callable[..., torch.Tensor]:
        ran.append(name)
        return getattr(module, name)

    monkeypatch.setattr(selective_ring, "kernel", kernel)
    monkeypatch.setattr(selective_ring, "supports", lambda *_: Support.yes())
    monkeypatch.setenv(states.VARIABLE, str(replay))
    backend.convert(llama, [0, 1, 3], tmp_path / "artifact", seed=0)
    check = {"rounds": 20, "batch": 2, "steps": 3, "context": 10, "dtype": "float32", "tolerance": 1e-4}
    check_backend(backend, tmp_path / "artifact", **check)
    assert set(ran) == {"selective_ring_multistep"}


@pytest.mark.parametrize(("model", "replay"), [("hybrid", 5), ("hybrid, rotated", 5), ("mamba-ssm", 0)])
def test_in_the_interpreter_one_kernel_of_a_mamba2_layer_keeps_it(
    rings: None,
    model: str,
    replay: int,
    llama: Path,
    make_native: Callable[..., tuple[Path, object, object]],
    tmp_path: Path,
    interpret: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the norm inside, and divided by the product behind."""
    module, ran = interpret(fused_step.MODULE), []

    def kernel(_: str, name: str) -> Callable[..., torch.Tensor]:
        ran.append(name)
        return getattr(module, name)

    monkeypatch.setattr(fused_step, "kernel", kernel)
    monkeypatch.setattr(fused_step, "supports", lambda *_: Support.yes())
    monkeypatch.setattr(mamba2, "divides", lambda *_: True)
    monkeypatch.setenv(states.VARIABLE, str(replay))
    rope = "kept" if model == "hybrid, rotated" else "dropped"
    backend, folder, keep = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, rope=rope)), llama, [0, 1, 3]
    if model == "mamba-ssm":
        backend, folder, keep = TeacherBackend(TeacherConfig()), make_native(headdim=16, d_state=8)[0], []
    backend.convert(folder, keep, tmp_path / "artifact", seed=0)
    check = {"rounds": 3, "batch": 2, "steps": 2, "context": 6, "dtype": "float32", "tolerance": 1e-4}
    check_backend(backend, tmp_path / "artifact", **check)
    assert set(ran) == {"fused_step"}


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("kinds", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float64", "float64")], ids=str)
def test_a_gate_without_a_norm_is_that_of_prompts(biased: bool, kinds: tuple[str, str], half: Path) -> None:
    """To the bit, where separate kernels or PyTorch make the steps, which may leave y unrounded."""
    config = read_config(half)
    config.mamba_norm, config.mamba_gate_bias = "none", biased
    layer = mamba2.Mamba2(config)
    dice = torch.Generator().manual_seed(0)
    y, z = (torch.randn(2, 3, layer.inner, generator=dice).to(getattr(torch, kind)) for kind in kinds)
    if layer.gate_bias is not None:
        layer.gate_bias.data = torch.randn(layer.inner, generator=dice)
    found = fused_step.gated(y.flatten(0, 1), z.flatten(0, 1), fused_step.Gate(None, layer.gate_bias))
    assert found.dtype == z.dtype
    assert torch.equal(found.view(z.shape), layer._gated(y.unflatten(2, (layer.heads, -1)), z))


@pytest.mark.gpu
@pytest.mark.parametrize("rope", ["dropped", "kept"])
def test_on_a_gpu_separate_kernels_of_a_mamba2_layer_keep_it(
    rope: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As calls of many rows have them."""
    monkeypatch.setattr(fused_step, "supports", lambda *_: Support.no("separate kernels were asked for"))
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, rope=rope))
    backend.convert(llama, [1, 3], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=50, device="cuda:0", dtype="float32", tolerance=1e-4)
    used = support.record()
    assert all(used[operation]["fused"] for operation in ("ring_multistep", "convolve", "gated_norm"))


def test_what_is_held_counts_the_rings(rings: None, artifact: Path, mamba_backend: MambaBackend) -> None:
    model: HybridStepper = mamba_backend.load(artifact, "cpu", "bfloat16")
    state = model.open(3, 17, 5)
    layers = [layer for layer in state.layers if isinstance(layer, states.MambaState)]
    assert layers
    assert all(layer.by_kernel for layer in layers)
    assert model.cost(3, 17, 5).held_state_bytes == sum(t.nbytes for layer in layers for t in layer.tensors())


SHAPES = {
    "8B": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "1B": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "heads that share nothing": {"num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 64},
}


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 17])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_memory_of_rings_is_bounded_unless_a_longer_one_is_asked_for(
    rings: None, shape: dict, steps: int, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(half)
    for name, value in shape.items():
        setattr(config, name, value)
    like, layers = torch.empty(0, dtype=torch.bfloat16), config.mixers.count("mamba2")
    width, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    channels = width * (heads + 2 * groups)
    plain = 4 * heads * width**2 + 2 * channels * (config.d_conv - 1)
    replay = states.replayable(config, like, steps)
    held = states.held_bytes(config, like, steps) / layers / plain
    assert replay >= steps
    assert replay == steps or held <= 1.12
    if shape is SHAPES["8B"]:
        assert held <= 1.12 or steps > 9
        assert replay == max(16, steps)
    monkeypatch.setenv(states.VARIABLE, "24")
    assert states.replayable(config, like, steps) == 24


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_memory_of_mamba_rings_is_bounded_too(
    rings: None, steps: int, llama: Path, mamba_backend: MambaBackend, tmp_path: Path
) -> None:
    """Plain decoding keeps the state and the window of the convolution, which runs over all channels."""
    mamba_backend.convert(llama, [1], tmp_path / "artifact", seed=0)
    config = read_config(tmp_path / "artifact")
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 32, 8, 128
    like, layers = torch.empty(0, dtype=torch.bfloat16), config.mixers.count("mamba")
    plain = 32 * 128 * (4 * 16 + 2 * (config.d_conv - 1))
    assert states.replayable(config, like, steps) == max(4, steps)
    assert states.held_bytes(config, like, steps) / layers / plain <= 2.2
