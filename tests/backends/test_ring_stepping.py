"""Stepping over rings of what goes into the state keeps the contract as stepping over rings of projections does."""

from pathlib import Path

import pytest
import torch
from mambabench.backends import state as states
from mambabench.backends.checkpoint import read_config
from mambabench.backends.hybrid import Mamba2HybridBackend
from mambabench.backends.plugin import Mamba2HybridConfig
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.conformance import check_backend
from mambabench.kernels.support import Support


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep such rings on a CPU too, where PyTorch reads them."""
    monkeypatch.setattr(states, "ring_supports", lambda *given: Support.yes())


@pytest.mark.parametrize("replay", [0, 5, 17])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.02)], ids=["fp64", "fp32", "bf16"]
)
def test_rings_of_inputs_of_the_state_keep_the_stepping_contract(
    rings: None,
    dtype: str,
    tolerance: float,
    replay: int,
    half: Path,
    hybrid_backend: Mamba2HybridBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the checkpoint is written in every round that settles, or in some."""
    monkeypatch.setenv(states.VARIABLE, str(replay))
    check_backend(hybrid_backend, half, rounds=150, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("options", [{"d_conv": 1}, {"d_conv": 6, "activation": "none", "norm": "none"}], ids=str)
def test_any_layer_keeps_it_over_rings(rings: None, options: dict, llama: Path, tmp_path: Path) -> None:
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, **options))
    backend.convert(llama, [2], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=60, seed=4, batch=3, steps=5)


def test_what_is_held_counts_the_rings(rings: None, half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model: HybridStepper = hybrid_backend.load(half, "cpu", "bfloat16")
    state = model.open(3, 17, 5)
    assert model.config.mixers.count("mamba2") == sum(isinstance(layer, states.MambaState) for layer in state.layers)
    held = sum(t.nbytes for layer in state.layers if isinstance(layer, states.MambaState) for t in layer.tensors())
    assert any(isinstance(layer, states.MambaState) and layer.ring for layer in state.layers)
    assert model.cost(3, 17, 5).held_state_bytes == held


SHAPES = {
    "8B": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "1B": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "heads that share nothing": {"num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 64},
}


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("steps", [1, 2, 5, 9, 17])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_memory_of_rings_is_bounded_unless_a_longer_one_is_asked_for(
    rings: None, shape: dict, steps: int, batch: int, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(half)
    for name, value in shape.items():
        setattr(config, name, value)
    like, layers = torch.empty(0, dtype=torch.bfloat16), config.mixers.count("mamba2")
    width, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    channels = width * (heads + 2 * groups)
    plain = 4 * heads * width**2 + 2 * channels * (config.d_conv - 1)
    replay = states.replayable(config, like, batch, steps)
    held = states.held_bytes(config, like, batch, steps) / layers / plain
    assert replay >= steps
    assert replay == steps or held <= 1.12
    if shape is SHAPES["8B"]:
        assert held <= 1.12 or steps > 9
        assert replay == (max(16, steps) if batch == 1 else {9: 25, 17: 17}.get(steps, 32))
    monkeypatch.setenv(states.VARIABLE, "24")
    assert states.replayable(config, like, batch, steps) == 24
