"""In bf16 a model is as near to its exact logits whichever way and by whichever kernels it runs.

On a GPU kernels round at other places than our own form, so that their logits differ by about as much as either differs
from the exact ones. Each way is held to these, which are those in fp64 of the same weights, and to the error of the
plainest way, which is full recomputation by our own form.
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mambabench.backends import graphs
from mambabench.backends import state as states
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend, RemovedBackend, TeacherBackend
from mambabench.backends.mixers import MAMBAS
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig, RemovedConfig, TeacherConfig
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.interfaces import Rollback
from mambabench.kernels import support
from mambabench.kernels.support import Support
from torch import Tensor

ROWS, LENGTH, STEPS = 24, 40, 5
FURTHER = 1.25
"""At most, of root mean squares over thousands of logits; a checkpoint that moves where it must not makes it 1.8."""
BF16 = 0.03
"""Error of bf16 in these models, of the root mean square of their logits: at least 0.014 and at most 0.02 on a CPU."""
OPTIONS = {"gate": "open", "rope": "kept", "q_scale": "attention", "norm": "none"}
MODELS = {
    "attention": [(TeacherBackend(TeacherConfig()), range(4))],
    "mamba2": [(Mamba2HybridBackend(Mamba2HybridConfig(chunk=8)), [1, 3])],
    "mamba2 with options": [(Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, **OPTIONS)), [1, 3])],
    "mamba": [(MambaBackend(MambaConfig()), [1, 3])],
    "mamba with options": [(MambaBackend(MambaConfig(gate="open", rope="kept", q_scale="attention")), [1, 3])],
    "mamba2 and mamba": [
        (Mamba2HybridBackend(Mamba2HybridConfig(chunk=8)), [1, 3]),
        (MambaBackend(MambaConfig()), [3]),
    ],
    "removed": [(RemovedBackend(RemovedConfig()), [1, 3])],
    "mamba-ssm": [(TeacherBackend(TeacherConfig()), [])],
}


class Way(NamedTuple):
    device: str = "cuda:0"
    graphs: str = ""
    replay: str = "0"
    """Tokens between checkpoints, at least."""
    early: bool = True
    rings: bool = False
    """On a CPU too, layers keep rings of what goes into the state."""


WAYS = {
    "cpu": Way("cpu"),
    "cpu, rings": Way("cpu", replay="7", rings=True),
    "eager": Way(graphs="off"),
    "graphs": Way(),
    "graphs, longer rings": Way(replay="7"),
    "graphs, kernels one after the other": Way(early=False),
}
RINGS = MODELS.keys() - {"attention", "removed"}
"""Models whose layers kernels read rings of."""
CASES = [
    pytest.param(model, way, id=f"{model}-{name}", marks=[pytest.mark.gpu] if way.device != "cpu" else [])
    for model, (name, way) in itertools.product(MODELS, WAYS.items())
    if not way.rings or model in RINGS
]


@pytest.fixture
def model(
    request: pytest.FixtureRequest, llama: Path, make_native: Callable[..., tuple[Path, object, object]], tmp_path: Path
) -> tuple[TeacherBackend, Path]:
    """With weights that bf16 has, so that rounding them is no part of the error."""
    folder = make_native(headdim=16, d_state=32)[0] if request.param == "mamba-ssm" else llama
    for number, (backend, keep) in enumerate(MODELS[request.param]):
        backend.convert(folder, keep, tmp_path / str(number), seed=0)
        folder = tmp_path / str(number)
    module = backend.module(folder)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    backend.save(module, tmp_path / "rounded", like=folder)
    return backend, tmp_path / "rounded"


def whole(model: HybridStepper, ids: Tensor) -> Tensor:
    """Logits [B, L, V] of every prompt."""
    lengths = torch.ones(len(ids), dtype=torch.int32, device=ids.device)
    opened = (model.open(len(ids), ids.shape[1], 1) for _ in range(ids.shape[1]))
    return torch.stack([model.prefill(ids[:, : t + 1], lengths * (t + 1), s) for t, s in enumerate(opened)], dim=1)


def driven(model: HybridStepper, ids: Tensor, seed: int, rollback: Rollback) -> dict[str, Tensor]:
    """Logits [B, L, V] by steps and at the ends of prompts that go on, NaN where there are none: rows of several
    lengths, after rounds that were taken back."""
    dice = random.Random(seed)
    end = (torch.arange(len(ids), dtype=torch.int32) % 8 + 3).to(ids.device)
    every = torch.arange(len(ids), device=ids.device)
    found = {
        name: torch.full((*ids.shape, model.vocab_size), torch.nan, device=ids.device)
        for name in ("stepped", "resumed")
    }
    state = model.open(len(ids), ids.shape[1], STEPS, rollback)
    model.prefill(ids[:, :12], end, state)
    while (count := min(dice.randint(1, STEPS), ids.shape[1] - int(end.max()))) > 0:
        columns = end.long().unsqueeze(1) + torch.arange(count, device=ids.device)
        right = ids.gather(1, columns)
        wrong = (right + 1) % model.vocab_size
        taken_back = dice.choice(("nothing", "round", "draft"))
        if taken_back == "round":
            model.advance(wrong, end, state)
        elif taken_back == "draft":
            for t in range(count):
                model.advance(wrong[:, t : t + 1], end + t, state, settle=t == 0)
        if dice.random() < 0.4:
            logits = model.prefill(right, torch.full_like(end, count), state, end)
            found["resumed"][every, columns[:, -1]] = logits
        else:
            found["stepped"][every.unsqueeze(1), columns] = model.advance(right, end, state)
        end = end + count
    return found


def logprobs(model: HybridStepper, ids: Tensor) -> Tensor:
    lengths = torch.full((len(ids),), ids.shape[1], dtype=torch.int32, device=ids.device)
    return model.score(ids, lengths).logprob


@pytest.mark.parametrize(("model", "way"), CASES, indirect=["model"])
def test_no_way_to_run_it_is_further_from_the_exact_logits_than_our_own_form(
    model: tuple[TeacherBackend, Path],
    way: Way,
    begin_early: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(graphs.VARIABLE, way.graphs)
    monkeypatch.setenv(states.VARIABLE, way.replay)
    begin_early(way.early)
    if way.rings:
        for name in ("ring_supports", "selective_ring_supports"):
            monkeypatch.setattr(states, name, lambda *given: Support.yes())
    (backend, artifact), device = model, way.device
    ids = torch.randint(61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = backend.module(artifact).double()(input_ids=ids).logits.to(device)
    said = exact[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].to(device))[..., 0]
    ids = ids.to(device)
    with support.reference_only():
        plain = backend.load(artifact, device, "bfloat16")
        own, own_said = whole(plain, ids), logprobs(plain, ids)
    fused = backend.load(artifact, device, "bfloat16")
    kept: list[Rollback] = ["replay", "snapshot"] if MAMBAS.keys() & set(fused.config.mixers) else ["replay"]
    rounds = {rollback: [driven(fused, ids, seed, rollback) for seed in range(8)] for rollback in kept}

    def errors(logits: Tensor) -> tuple[float, float]:
        """Of these logits, and of our own form's at the same places."""
        there = ~logits.isnan()
        assert there.any(-1).sum() >= 200
        truth = exact.expand_as(logits)[there]
        return tuple(float((t.expand_as(logits)[there] - truth).norm() / truth.norm()) for t in (logits, own))

    found = {
        f"{name}, {rollback}": errors(torch.stack([each[name] for each in rounds[rollback]]))
        for rollback, name in itertools.product(kept, ("stepped", "resumed"))
    }
    found["whole"] = errors(whole(fused, ids))
    found["scored"] = tuple(float((t - said).square().mean().sqrt()) for t in (logprobs(fused, ids), own_said))
    assert found["whole"][1] < BF16
    assert {n: f"{e:.1e}, ours {plainly:.1e}" for n, (e, plainly) in found.items() if e > FURTHER * plainly} == {}
