"""Rounds on the device: the text of the CPU, and no wait for the host."""

import pytest
import torch
from mambabench.backends.graphs import VARIABLE
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.play import Rounds
from mambabench.decoders.plugin import LayersConfig, StandardConfig
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.stepping import LayersDraft
from mambabench.harness.interfaces import Limits, Prompt, silent

from .hybrids import hybrid

pytestmark = pytest.mark.gpu

MIXERS = "a2a2"
SIZES = {
    "letters": "abcdefghijklmnopqrstuvwxyz",
    "hidden_size": 64,
    "intermediate_size": 96,
    "initializer_range": 0.3,
    "chunk": 64,
}
PROMPTS = [Prompt(tuple(range(1, 2 + 3 * row)), row) for row in range(4)]


def drafts():
    return {"none": None, "ngram": NgramDraft(), "layers": LayersDraft(LayersConfig())}


@pytest.mark.parametrize("draft", drafts())
@pytest.mark.parametrize("limits", [{}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9}])
def test_the_text_is_that_of_the_cpu(draft, limits):
    limits = Limits(new_tokens=40, stop_tokens=(3,), **limits)

    def decoder(look):
        of = drafts()[draft]
        return StandardDecoder(StandardConfig(look=look)) if of is None else SpeculativeDecoder(of, 3, look=look)

    here = decoder(1).generate(hybrid(MIXERS, "cpu", torch.float64, **SIZES), PROMPTS, limits, silent)
    there = decoder(4).generate(hybrid(MIXERS, "cuda", torch.float64, **SIZES), PROMPTS, limits, silent)
    assert there == here


@pytest.mark.parametrize("steady", [True, False])
def test_many_rows_draw_of_many_tokens_as_on_the_cpu_in_one_request_after_the_other(steady):
    """Products of more rows than kernels for a few serve, and vocabularies of several parts."""
    sizes = SIZES | {"letters": "".join(map(chr, range(0x4E00, 0x4E00 + 8191)))}
    prompts = [Prompt(tuple(range(1 + row, 4 + row + row % 5)), row) for row in range(64)]

    def texts(device):
        model = hybrid(MIXERS, device, torch.float64, **sizes)
        decoder = SpeculativeDecoder(LayersDraft(LayersConfig()), 4, look=4, steady=steady)
        asked = (Limits(new_tokens=9, temperature=1.0, seed=seed) for seed in range(4))
        return [decoder.generate(model, prompts, limits, silent) for limits in asked]

    assert texts("cuda") == texts("cpu")


@pytest.mark.parametrize("draft", drafts())
@pytest.mark.parametrize("limits", [{}, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("way", ["", "off"], ids=["recorded", "eager"])
def test_a_round_does_not_wait_for_the_host(draft, limits, way, monkeypatch):
    monkeypatch.setenv(VARIABLE, way)
    model, of = hybrid(MIXERS, "cuda", torch.bfloat16, **SIZES), drafts()[draft]
    limits = Limits(new_tokens=60, stop_tokens=(3,), **limits)
    rounds = Rounds(model, PROMPTS, limits, 4 if of else 1, draft=of, look=6)
    rounds.prefill()
    if of is not None:
        rounds.open_draft()
    rounds.first()
    for _ in range(3):
        rounds.play(3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            rounds.play(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(rounds.board.results.read(6)) == 6
    assert bool(rounds.board.recorded) == (way != "off")


@pytest.mark.parametrize("draft", drafts())
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_costs_of_rounds_are_measured_without_changing_a_text(draft, temperature):
    model, of = hybrid(MIXERS, "cuda", torch.bfloat16, **SIZES), drafts()[draft]
    decoder = StandardDecoder() if of is None else SpeculativeDecoder(of, 3)
    limits = Limits(new_tokens=40, temperature=temperature)
    before = decoder.generate(model, PROMPTS, limits, silent)
    ((k, seconds),) = decoder.costs(model, PROMPTS, limits).items()
    assert k == (0 if of is None else 3)
    assert 1e-5 < seconds < 0.1
    assert decoder.generate(model, PROMPTS, limits, silent) == before
