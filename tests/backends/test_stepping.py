"""The stepping engine keeps its contract, generates what transformers generates, and scores what the model says."""

from pathlib import Path

import pytest
import torch
from mambabench import MambabenchError
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.conformance import check_backend
from mambabench.kernels.multistep import multistep
from transformers import LlamaForCausalLM

BF16 = 0.02
"""Tolerance in bf16, at which test_conformance finds every fault."""


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_a_hybrid_keeps_the_stepping_contract_for_a_thousand_rounds(half: Path) -> None:
    check_backend("mamba2-hybrid", half, rounds=1000)


def test_every_kind_of_artifact_keeps_the_stepping_contract(artifact: Path) -> None:
    check_backend("teacher", artifact, rounds=60, seed=1, batch=1, steps=2)
    check_backend("teacher", artifact, rounds=60, seed=2, batch=4, steps=9, context=30)


def test_fp32_keeps_it_within_rounding(half: Path) -> None:
    check_backend("mamba2-hybrid", half, rounds=60, dtype="float32", tolerance=1e-4)


def test_bf16_keeps_it_within_the_tolerance_at_which_faults_are_found(half: Path) -> None:
    check_backend("mamba2-hybrid", half, rounds=100, dtype="bfloat16", tolerance=BF16)


@pytest.mark.parametrize("taps", [1, 2, 6])
def test_any_number_of_taps_keeps_the_stepping_contract(taps: int, llama: Path, tmp_path: Path) -> None:
    backend = Mamba2HybridBackend(Mamba2HybridConfig(d_conv=taps, chunk=8))
    backend.convert(llama, [2], tmp_path / "artifact", seed=0)
    check_backend(backend, tmp_path / "artifact", rounds=60, seed=4)


def test_shapes_need_not_depend_on_data(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host never looks: all cache slots are read and the longest replay is made every time."""
    monkeypatch.setattr(
        HybridStepper, "_check", lambda self, count, start, state, settle: (state.capacity, state.steps, False)
    )
    check_backend("mamba2-hybrid", half, rounds=100, seed=3)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_a_gpu_keeps_the_stepping_contract(
    dtype: str, tolerance: float, half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    check_backend(hybrid_backend, half, rounds=100, device="cuda:0", dtype=dtype, tolerance=tolerance)


def test_a_backend_that_cannot_take_back_is_only_driven_forward(
    half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    class Forward(Mamba2HybridBackend):
        def load(self, artifact: Path, device: str, dtype: str) -> HybridStepper:
            model = super().load(artifact, device, dtype)
            model.traits = frozenset()
            whole = model.advance

            def advance(ids, start, state, settle=True):
                assert settle
                assert torch.equal(start, state.end)
                return whole(ids, start, state)

            model.advance = advance
            return model

    check_backend(Forward(hybrid_backend.options), half, rounds=60)


@pytest.mark.parametrize("real", [False, True], ids=["random", "real"])
def test_greedy_text_is_that_of_transformers(
    real: bool, llama: Path, request: pytest.FixtureRequest, teacher_backend: TeacherBackend
) -> None:
    folder = request.getfixturevalue("shared") / "models" / "stories-260k" if real else llama
    want = LlamaForCausalLM.from_pretrained(folder)
    text = torch.tensor([[0, 9, 8, 7]]) if not real else torch.tensor([[1, 403, 407, 261, 378]])
    out = want.generate(text, max_new_tokens=40, do_sample=False, eos_token_id=None)
    model = teacher_backend.load(folder, "cpu", "float32")
    with torch.inference_mode():
        state = model.open(1, text.shape[1] + 40, 1)
        token = model.prefill(text, ints(text.shape[1]), state).argmax(-1, keepdim=True)
        got = [token]
        for position in range(text.shape[1], text.shape[1] + 39):
            token = model.advance(token, ints(position), state)[:, -1].argmax(-1, keepdim=True)
            got.append(token)
    assert torch.equal(torch.cat((text, *got), dim=1), out)


def test_scores_are_the_model_s_log_probabilities(
    half: Path, hybrid_backend: Mamba2HybridBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambabench.backends.stepper.HEAD_SLICE", 61 * 2 * 4)
    ids = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(0))
    model = hybrid_backend.load(half, "cpu", "float32")
    logits = hybrid_backend.module(half)(input_ids=ids).logits[:, :-1]
    ids[0, 5] = logits[0, 4].argmax()
    logits = hybrid_backend.module(half)(input_ids=ids).logits[:, :-1]
    scores = model.score(ids, ints(19, 19))
    torch.testing.assert_close(scores.logprob, logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0])
    assert torch.equal(scores.greedy, logits.argmax(-1) == ids[:, 1:])
    assert scores.greedy[0, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_sees_what_the_first_run_of_a_token_saw(
    dtype: str, half: Path, hybrid_backend: Mamba2HybridBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(x, dt, A, B, *rest):
        seen.append((x, dt, B))
        return multistep(x, dt, A, B, *rest)

    monkeypatch.setattr("mambabench.backends.mamba2.multistep", spy)
    model, text = hybrid_backend.load(half, "cpu", dtype), torch.arange(10).repeat(2, 1)
    state = model.open(2, 10, 4)
    model.prefill(text[:, :6], ints(6, 5), state)
    model.advance(text[:, 6:], ints(6, 5), state)
    first, seen = seen[0], []
    model.advance(text[:, :1], ints(10, 9), state)
    for old, new in zip(first, seen[0], strict=True):
        torch.testing.assert_close(new[:, :4], old[:, -4:], rtol=1e-6, atol=0)


def test_a_call_outside_the_contract_is_refused(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model = hybrid_backend.load(half, "cpu", "float32")
    state = model.open(2, 10, 4)
    text = torch.zeros(2, 8, dtype=torch.int64)
    model.prefill(text, ints(8, 5), state)
    for start, count, settle, message in (
        (ints(7, 5), 1, True, "start 7 of row 0 is not between its settled position 8 and its end 8"),
        (ints(8, 6), 1, True, "start 6 of row 1 is not between its settled position 5 and its end 5"),
        (ints(8, 5), 5, True, "5 tokens at 8 of row 0, settled up to 8, are more than the 4 steps"),
    ):
        with pytest.raises(MambabenchError, match=message):
            model.advance(text[:, :count], start, state, settle)
    model.advance(text[:, :4], ints(8, 5), state)
    model.advance(text[:, :2], ints(12, 9), state)
    with pytest.raises(MambabenchError, match="15 positions do not fit in the 14 that"):
        model.advance(text[:, :1], ints(14, 11), state)
    with pytest.raises(MambabenchError, match="16 positions do not fit in the 14 that"):
        model.prefill(text, ints(2, 1), state, ints(14, 11))
    with pytest.raises(MambabenchError, match="start must lie between"):
        model.prefill(text, ints(1, 1), state, ints(3, 11))


def test_weights_are_held_once(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model = hybrid_backend.load(half, "cpu", "float32")
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in model.model.modules()
        for tensor in (*module._parameters.values(), *(getattr(module, "_fused", None) or ()))
        if isinstance(tensor, torch.Tensor) and tensor.ndim
    }
    assert sum(storages.values()) - 4 * 2 * 4 <= hybrid_backend.describe(half)["weight_bytes"]


def test_bf16_logits_are_not_rounded(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model = hybrid_backend.load(half, "cpu", "bfloat16")
    assert model.model.model.layers[0].mamba.A_log.dtype == torch.float32
    state = model.open(1, 10, 2)
    logits = model.prefill(torch.arange(6).unsqueeze(0), ints(6), state)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).any()
    assert model.advance(torch.tensor([[1, 2]]), ints(6), state).dtype == torch.float32


def test_the_cost_counts_each_weight_once(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model = hybrid_backend.load(half, "cpu", "float32")
    cost = model.cost(batch=2, context=10, steps=3)
    assert cost.weight_bytes == hybrid_backend.describe(half)["weight_bytes"]
    assert cost.kv_bytes == 2 * 2 * 13 * 2 * 2 * 8 * 4
    assert cost.flops > 2 * 6 * cost.weight_bytes / 4
    assert model.cost(2, 1000, 3).state_bytes == cost.state_bytes
