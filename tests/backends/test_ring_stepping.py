"""Stepping over rings of what goes into the state keeps the contract as stepping over rings of projections does."""

from pathlib import Path

import pytest
from mambabench.backends import state as states
from mambabench.backends.hybrid import Mamba2HybridBackend
from mambabench.backends.plugin import Mamba2HybridConfig
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.conformance import check_backend
from mambabench.kernels.support import Support


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep such rings on a CPU too, where PyTorch reads them."""
    monkeypatch.setattr(states, "ring_supports", lambda *given: Support.yes())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.02)], ids=["fp64", "fp32", "bf16"]
)
def test_rings_of_inputs_of_the_state_keep_the_stepping_contract(
    rings: None, dtype: str, tolerance: float, half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    check_backend(hybrid_backend, half, rounds=150, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("options", [{"d_conv": 1}, {"d_conv": 6, "activation": "none", "norm": "none"}], ids=str)
def test_any_layer_keeps_it_over_rings(rings: None, options: dict, llama: Path, tmp_path: Path) -> None:
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, **options))
    backend.convert(llama, [2], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=60, seed=4, batch=3, steps=5)


def test_what_is_held_counts_the_rings(rings: None, half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model: HybridStepper = hybrid_backend.load(half, "cpu", "bfloat16")
    state = model.open(3, 17, 5)
    held = sum(t.nbytes for layer in state.layers if isinstance(layer, states.MambaState) for t in layer.tensors())
    assert any(isinstance(layer, states.MambaState) and layer.ring for layer in state.layers)
    assert model.cost(3, 17, 5).held_state_bytes == held
