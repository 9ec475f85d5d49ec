"""The conformance check finds what is wrong with a backend, and only that."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambabench import Scores, Unsupported
from mambabench.backends.hybrid import Mamba2HybridBackend
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.state import MambaState, State
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.conformance import check_backend
from mambabench.harness.mockmodel import MockStepper

Fault = Callable[[HybridStepper], None]


def faulty(backend: Mamba2HybridBackend, fault: Fault) -> Mamba2HybridBackend:
    """The backend with a fault in every model that it loads."""

    class Faulty(Mamba2HybridBackend):
        def load(self, artifact: Path, device: str, dtype: str) -> HybridStepper:
            model = super().load(artifact, device, dtype)
            fault(model)
            return model

    return Faulty(backend.options)


def mamba_layers(state: State) -> list[MambaState]:
    return [layer for layer in state.layers if isinstance(layer, MambaState)]


def break_checkpoint(model: HybridStepper) -> None:
    """Settles without moving the checkpoint."""
    whole = model.advance

    def advance(ids, start, state, settle=True):
        before = [layer.state.clone() for layer in mamba_layers(state)]
        logits = whole(ids, start, state, settle)
        for layer, old in zip(mamba_layers(state), before, strict=True):
            layer.state = old
        return logits

    model.advance = advance


def break_unsettled(model: HybridStepper) -> None:
    """Moves the checkpoint where it was told not to settle."""
    whole = model.advance

    def advance(ids, start, state, settle=True):
        cursor = state.settled.clone()
        logits = whole(ids, start, state, True)
        if not settle:
            state.settled = cursor
        return logits

    model.advance = advance


def break_window(model: HybridStepper) -> None:
    """Starts the convolution at the inputs before the end, wherever a call starts."""
    whole = model._advance

    def advance(count, start, state, settle):
        calls = whole(count, start, state, settle)
        call = calls["mamba2"]
        slots = call.read.view(call.batch, -1)
        before = slots.shape[1] - count
        rows = torch.arange(call.batch).unsqueeze(1) * state.ring
        slots[:, :before] = rows + (state.end.long().unsqueeze(1) + torch.arange(-before, 0)) % state.ring
        return calls

    model._advance = advance


def break_ring(model: HybridStepper) -> None:
    """Has too few slots for a round and the convolution's window, so that needed ones are written over."""
    whole = model.open

    def open_small(batch, context, steps):
        state = whole(batch, context, steps)
        state.ring = steps + 1
        for layer in mamba_layers(state):
            layer.inputs = layer.inputs[:, : state.ring].clone()
        return state

    model.open = open_small


def break_rows(model: HybridStepper) -> None:
    """Copies rows without what may still be replayed."""

    @torch.inference_mode()
    def take(state, rows):
        rings = [layer.inputs for layer in mamba_layers(state)]
        for tensor in state.tensors():
            if not any(tensor is ring for ring in rings):
                tensor.copy_(tensor[rows])

    model.take = take


def break_untouched(model: HybridStepper) -> None:
    """Lets prompts of other rows fade a row that has none."""
    whole = model.prefill

    @torch.inference_mode()
    def prefill(ids, lengths, state, start=None, counts=None):
        for layer in mamba_layers(state):
            layer.state[lengths == 0] *= 0.99
        return whole(ids, lengths, state, start, counts)

    model.prefill = prefill


@pytest.mark.parametrize(
    "fault", [break_checkpoint, break_unsettled, break_window, break_ring, break_rows, break_untouched]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("bfloat16", 0.02)], ids=["float64", "bfloat16"])
def test_a_fault_of_stepping_is_found(
    dtype: str, tolerance: float, fault: Fault, half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    with pytest.raises(AssertionError, match=r"round \d+ \(.*\): .*logits are .* apart|^prefill against|^advance of"):
        check_backend(faulty(hybrid_backend, fault), half, rounds=200, dtype=dtype, tolerance=tolerance)


def pick_behind_the_call(model: HybridStepper) -> None:
    """Puts the likeliest tokens in when the others have run."""
    whole = model.advance

    def advance(ids, start, state, settle=True, last=None):
        logits = whole(ids.clone(), start, state, settle, last=None)
        if last is not None:
            ids[:, -1] = last.argmax(1)
        return logits

    model.advance = advance


def pick_the_last_of_equal_ones(model: HybridStepper) -> None:
    whole = model.advance

    def advance(ids, start, state, settle=True, last=None):
        if last is not None:
            ids[:, -1] = last.shape[1] - 1 - last.flip(1).argmax(1)
        return whole(ids, start, state, settle)

    model.advance = advance


@pytest.mark.parametrize(
    ("fault", "message"),
    [(pick_behind_the_call, "with a pick against the same tokens"), (pick_the_last_of_equal_ones, "not the likeliest")],
)
def test_a_pick_that_is_not_what_runs_is_found(
    fault: Fault, message: str, half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_backend(faulty(hybrid_backend, fault), half, rounds=20)


def call_likely_greedy(model: HybridStepper) -> None:
    """Calls every likely token greedy."""
    whole = model.score

    def score(ids, lengths):
        scores = whole(ids, lengths)
        return scores._replace(greedy=scores.logprob > -1.5)

    model.score = score


def call_none_greedy(model: HybridStepper) -> None:
    """Calls no token greedy."""
    whole = model.score
    model.score = lambda ids, lengths: whole(ids, lengths)._replace(greedy=torch.zeros(len(ids), ids.shape[1] - 1) > 0)


@pytest.mark.parametrize("fault", [call_likely_greedy, call_none_greedy])
def test_tokens_wrongly_called_greedy_are_found(fault: Fault, half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    with pytest.raises(AssertionError, match=r"score: greedy is (True|False) for token \d+ after \["):
        check_backend(faulty(hybrid_backend, fault), half, rounds=1)


class LastIndex(MockStepper):
    """Of equal logits, calls the last one the largest."""

    def score(self, ids: torch.Tensor, lengths: torch.Tensor) -> Scores:
        scores = super().score(ids, lengths)
        for row, length in enumerate(lengths.tolist()):
            text = ids[row, :length].tolist()
            for t in range(length - 1):
                logits = self.logits(text[: t + 1])
                scores.greedy[row, t] = text[t + 1] == int((logits == logits.max()).nonzero()[0][-1])
        return scores


class Toy:
    """A backend, for decoding alone, whose largest logits often tie."""

    def __init__(self, model: type[MockStepper]) -> None:
        self.model = model

    def describe(self, artifact: Path) -> dict[str, object]:
        sizes = {"layers": 1, "attention_layers": [], "parameters": 1, "weight_bytes": 1}
        return sizes | {"vocab_size": 8, "max_context": 4096}

    def load(self, artifact: Path, device: str, dtype: str) -> MockStepper:
        return self.model(levels=3)

    def module(self, artifact: Path) -> torch.nn.Module:
        raise Unsupported("a toy is not trained")


def test_of_equal_logits_only_the_lowest_index_may_be_greedy(tmp_path: Path) -> None:
    check_backend(Toy(MockStepper), tmp_path, rounds=5)
    with pytest.raises(AssertionError, match="score: greedy is"):
        check_backend(Toy(LastIndex), tmp_path, rounds=5)


class Scaled(Mamba2HybridBackend):
    """Trains another model than it decodes with."""

    def module(self, artifact: Path) -> HybridForCausalLM:
        model = super().module(artifact)
        model.lm_head.weight = torch.nn.Parameter(3 * model.lm_head.weight)
        return model


class Rounded(Mamba2HybridBackend):
    """Trains in low precision."""

    def module(self, artifact: Path) -> HybridForCausalLM:
        return super().module(artifact).bfloat16()


class Unshifted(Mamba2HybridBackend):
    """Asks for the token that it has just read."""

    def module(self, artifact: Path) -> HybridForCausalLM:
        model = super().module(artifact)
        whole = model.forward

        def forward(input_ids, labels=None):
            out = whole(input_ids=input_ids)
            if labels is not None:
                out.loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
            return out

        model.forward = forward
        return model


class Frozen(Mamba2HybridBackend):
    """Trains nothing."""

    def module(self, artifact: Path) -> HybridForCausalLM:
        return super().module(artifact).requires_grad_(False)


class Forgetful(Mamba2HybridBackend):
    """Saves what it had before training."""

    def save(self, module: torch.nn.Module, out: Path, like: Path) -> None:
        super().save(super().module(like), out, like)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (Scaled, "module against the loaded model: logits are .* apart"),
        (Rounded, r"module: parameters are \[\('bfloat16', 'cpu'\), \('float32', 'cpu'\)\], not float32 on cpu"),
        (Unshifted, "module: the loss is .*, its logits give"),
        (Frozen, "module: the loss reaches no parameter"),
        (Forgetful, "save, then load: logits are .* apart"),
    ],
)
def test_a_module_that_is_not_the_model_is_found(
    spoilt: type[Mamba2HybridBackend], message: str, half: Path, hybrid_backend: Mamba2HybridBackend
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_backend(spoilt(hybrid_backend.options), half, rounds=1)
