"""Rollback by a state for every token: the contract of replay, more memory, the same text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.backends import state as states
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig
from mambabench.backends.state import KVCache, MambaState
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.conformance import check_backend
from mambabench.kernels.support import Support

BACKENDS = {
    "mamba2": lambda **options: Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, **options)),
    "mamba": lambda **options: MambaBackend(MambaConfig(**options)),
}


class Snapshots(HybridStepper):
    """Keeps a state for every token, whoever opens it."""

    def open(self, batch, context, steps, rollback="snapshot"):
        return super().open(batch, context, steps, rollback)


def snapshots(backend: Mamba2HybridBackend | MambaBackend) -> Mamba2HybridBackend | MambaBackend:
    """The backend, whose models keep snapshots."""
    load = backend.load

    def loading(artifact: Path, device: str, dtype: str) -> HybridStepper:
        model = load(artifact, device, dtype)
        return Snapshots(model.model, model.tokenizer)

    backend.load = loading
    return backend


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"d_conv": 1}, {"d_conv": 6, "activation": "none"}, {"rope": "kept"}], ids=str)
def test_snapshots_keep_the_stepping_contract(kind: str, options: dict, llama: Path, tmp_path: Path) -> None:
    backend = BACKENDS[kind](**options)
    backend.convert(llama, [2], tmp_path / "artifact", seed=0)
    check_backend(snapshots(backend), tmp_path / "artifact", rounds=60, seed=3)


@pytest.mark.parametrize("rope", ["dropped", "kept"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_they_keep_it_where_a_kernel_reads_rings(
    kind: str, rope: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ring_supports", "selective_ring_supports"):
        monkeypatch.setattr(states, name, lambda *given: Support.yes())
    backend = BACKENDS[kind](rope=rope)
    backend.convert(llama, [2], tmp_path / "artifact", seed=0)
    check_backend(snapshots(backend), tmp_path / "artifact", rounds=60, seed=5)
    model = backend.load(tmp_path / "artifact", "cpu", "float32")
    layers = model.open(2, 9, 4).layers
    held = sum(t.nbytes for layer in layers if not isinstance(layer, KVCache) for t in layer.tensors())
    assert model.cost(2, 9, 4, "snapshot").held_state_bytes == held


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path]) -> dict[str, HybridStepper]:
    found = {}
    for kind, make in BACKENDS.items():
        folder = tmp_path_factory.mktemp(kind) / "artifact"
        backend = make()
        backend.convert(make_llama(), [1], folder, seed=0)
        found[kind] = backend.load(folder, "cpu", "float64")
    return found


@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from(list(BACKENDS)), st.integers(1, 5), st.integers(0, 100))
def test_both_strategies_give_the_same_logits(models, data, kind: str, steps: int, seed: int) -> None:
    """Over rounds of drafts, settled or not, of which any number stands."""
    model, dice = models[kind], torch.Generator().manual_seed(seed)
    states = [model.open(2, 60, steps, rollback) for rollback in ("replay", "snapshot")]
    start = torch.tensor([3, 1], dtype=torch.int32)
    prompts = torch.randint(model.vocab_size, (2, 3), generator=dice)
    for state in states:
        model.prefill(prompts, start, state)
    settled, end = start.clone(), start.clone()
    for _ in range(8):
        settle = data.draw(st.booleans())
        rows = zip(settled.tolist(), end.tolist(), strict=True)
        start = torch.tensor([data.draw(st.integers(low, high)) for low, high in rows], dtype=torch.int32)
        if settle:
            settled = start.clone()
        room = steps - int((start - settled).max())
        if room == 0:
            continue
        count = data.draw(st.integers(1, room))
        ids = torch.randint(model.vocab_size, (2, count), generator=dice)
        one, two = (model.advance(ids, start, state, settle) for state in states)
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
        end = start + count
    more = torch.tensor([2, 0], dtype=torch.int32)
    one, two = (model.prefill(prompts[:, :2], more, state, end) for state in states)
    torch.testing.assert_close(one[0], two[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", BACKENDS)
def test_each_strategy_tells_the_memory_that_it_takes(models, kind: str) -> None:
    model = models[kind]
    for rollback in ("replay", "snapshot"):
        layers = model.open(3, 17, 5, rollback).layers
        held = sum(t.nbytes for layer in layers if not isinstance(layer, KVCache) for t in layer.tensors())
        assert model.cost(3, 17, 5, rollback).held_state_bytes == held
    states = [layer.state for layer in model.open(3, 17, 5, "snapshot").layers if isinstance(layer, MambaState)]
    assert {state.shape[1] for state in states} == {6}
    replay, snapshot = (model.cost(3, 17, 5, rollback) for rollback in ("replay", "snapshot"))
    assert snapshot.held_state_bytes > 1.5 * replay.held_state_bytes
    assert snapshot.state_bytes > replay.state_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("rope", ["dropped", "kept"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_on_a_gpu_snapshots_keep_it(kind: str, rope: str, llama: Path, tmp_path: Path) -> None:
    backend = BACKENDS[kind](rope=rope)
    backend.convert(llama, [2], tmp_path / "artifact", seed=0)
    check = {"rounds": 60, "device": "cuda:0", "dtype": "float32", "tolerance": 1e-4}
    check_backend(snapshots(backend), tmp_path / "artifact", **check)
