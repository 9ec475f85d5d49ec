"""What a round of decoding does beside running models: picks, draws, look-ups and its end (`nox -s kernels`)."""

import itertools
from typing import Any

import pytest
import torch
from mambabench.kernels.rounds import (
    ACCEPT,
    TOKEN,
    Drawn,
    Inputs,
    Ring,
    Rows,
    draw,
    drawn,
    finish,
    finish_greedy,
    finish_rejected,
    greedy,
    keep,
    match,
    reject,
    softmax,
    streams,
    uniform,
)
from torch import Tensor

K, CONTEXT, PLACES, RING = 4, 2048, 1 << 14, 4
"""Drafts, length of texts, room for what benchmarks put behind them, rounds that the host has not read."""
LONGEST, SHORTEST = 4, 1
"""Tokens that a look-up matches."""
BATCHES = (1, 32)
sized = pytest.mark.parametrize(
    ("batch", "words"), [(3, 50), *(pytest.param(batch, 128_256, marks=pytest.mark.gpu) for batch in BATCHES)]
)


def texts(batch: int, words: int, device: torch.device) -> Rows:
    """Of `CONTEXT` random tokens, that do not stop; random drafts follow."""
    length, zeros = torch.full((batch,), CONTEXT, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    ids = torch.randint(words, (batch, PLACES), device=device)
    inputs = Inputs.empty(K, batch, device)
    inputs.begin(ids, length)
    inputs.drafts(K).random_(words)
    stream = streams(0, torch.arange(batch, device=device))
    return Rows(ids, length, zeros + PLACES - K - 1, zeros == 0, zeros[:1] - 1, stream, inputs)


def ring(batch: int, device: torch.device) -> Ring:
    shape = RING, batch, K + 3
    mirror = torch.zeros(shape, dtype=torch.int64, pin_memory=True) if device.type == "cuda" else None
    slots = torch.zeros(shape, dtype=torch.int64, device=device)
    return Ring(slots, torch.zeros(batch, dtype=torch.int64, device=device), mirror)


def some(likely: Tensor) -> Tensor:
    """Drafts, of which some are the likely tokens."""
    return torch.where(torch.rand(likely.shape, device=likely.device) < 0.7, likely, likely + 1)


def standing(drafts: Tensor, tokens: Tensor) -> list[int]:
    """How many of each row's drafts are the tokens, until the first that is not."""
    pairs = [zip(*both, strict=True) for both in zip(drafts.tolist(), tokens.tolist(), strict=True)]
    return [sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], row)) for row in pairs]


@sized
@pytest.mark.parametrize("form", ["ours", "pytorch"])
def test_pick(cold, device: torch.device, batch: int, words: int, form: str) -> None:
    def make() -> tuple[Tensor]:
        return (torch.randn(batch, K + 1, words, device=device),)

    found = cold(
        make, greedy if form == "ours" else lambda t: torch.argmax(t, dim=-1), moved=4 * batch * (K + 1) * words
    )
    (logits,) = cold.inputs(make)
    assert torch.equal(logits.gather(-1, found.unsqueeze(-1)).squeeze(-1), logits.amax(-1))


@sized
def test_draw(cold, device: torch.device, batch: int, words: int) -> None:
    before = torch.full((batch,), CONTEXT, device=device)
    stream = streams(0, torch.arange(batch, device=device))

    def make() -> tuple[Tensor]:
        return (3 * torch.randn(batch, K + 1, words, device=device),)

    found = cold(make, lambda t: drawn(t, 0.8, stream, before, TOKEN), moved=4 * batch * (K + 1) * words)
    (logits,) = cold.inputs(make)
    position = before.unsqueeze(1) + torch.arange(1, K + 2, device=device)
    assert torch.equal(found, draw(softmax(logits, 0.8), uniform(stream, position, TOKEN)))


@sized
def test_filters(cold, device: torch.device, batch: int, words: int) -> None:
    def make() -> tuple[Tensor]:
        return (3 * torch.randn(batch, K + 1, words, device=device),)

    found = cold(make, lambda t: keep(t, 0.8, 20, 0.9), moved=2 * 4 * batch * (K + 1) * words)
    (logits,) = cold.inputs(make)
    best = logits.topk(20).values
    last = (softmax(best, 0.8).cumsum(-1) < 0.9).sum(-1, keepdim=True)
    assert torch.equal(found.isfinite(), logits >= best.gather(-1, last))


@sized
def test_look_up(cold, device: torch.device, batch: int, words: int) -> None:
    """The last tokens stand once before, in the first half of a text."""

    def make() -> tuple[Tensor, ...]:
        ids = torch.randint(words, (batch, CONTEXT + K + 1), device=device)
        ids[:, 1000 : 1000 + LONGEST] = ids[:, CONTEXT - LONGEST : CONTEXT]
        return ids, torch.full((batch,), CONTEXT, device=device)

    found, real = cold(make, lambda ids, length: match(ids, length, K, LONGEST, SHORTEST), moved=8 * batch * CONTEXT)
    assert real.tolist() == [K] * batch
    for row, drafts in zip(cold.inputs(make)[0].tolist(), found.tolist(), strict=True):
        ends = [at for at in range(LONGEST, CONTEXT) if row[at - LONGEST : at] == row[CONTEXT - LONGEST : CONTEXT]]
        assert drafts == row[ends[-1] : ends[-1] + K]


@sized
def test_end_of_round(cold, device: torch.device, batch: int, words: int) -> None:
    def make() -> tuple[Any, ...]:
        rows = texts(batch, words, device)
        tokens = torch.randint(words, (batch, K + 1), device=device)
        rows.inputs.drafts(K).copy_(some(tokens[:, :K]))
        return tokens, rows, ring(batch, device), torch.full((batch,), K, dtype=torch.int32, device=device)

    def run(tokens: Tensor, rows: Rows, ring: Ring, real: Tensor) -> Tensor:
        finish(tokens, rows.inputs.drafts(K), real, rows, ring)
        return rows.length

    found = cold(make, run)
    tokens, rows, *_ = cold.inputs(make)
    accepted = standing(rows.inputs.drafts(K), tokens[:, :K])
    assert found.tolist() == [CONTEXT + 1 + count for count in accepted]


@sized
def test_end_of_greedy_round(cold, device: torch.device, batch: int, words: int) -> None:
    def make() -> tuple[Any, ...]:
        rows, logits = texts(batch, words, device), torch.randn(batch, K + 1, words, device=device)
        rows.inputs.drafts(K).copy_(some(logits[:, :K].argmax(-1)))
        return logits, rows, ring(batch, device), torch.full((batch,), K, dtype=torch.int32, device=device)

    def run(logits: Tensor, rows: Rows, ring: Ring, real: Tensor) -> Tensor:
        finish_greedy(logits, rows.inputs.drafts(K), real, rows, ring)
        return rows.length

    found = cold(make, run, moved=4 * batch * (K + 1) * words)
    logits, rows, *_ = cold.inputs(make)
    accepted = standing(rows.inputs.drafts(K), logits[:, :K].argmax(-1))
    assert found.tolist() == [CONTEXT + 1 + count for count in accepted]


@sized
def test_end_of_drawn_round(cold, device: torch.device, batch: int, words: int) -> None:
    def make() -> tuple[Any, ...]:
        rows, target = texts(batch, words, device), 2 * torch.randn(batch, K + 1, words, device=device)
        kept = Drawn.empty(K, batch, words, 0.8, target)
        for place in range(K):
            logits = target[:, place] + torch.randn(batch, words, device=device)
            drafts = drawn(logits, 0.8, rows.stream, rows.inputs.positions[place + 1], TOKEN, kept, place)
            rows.inputs.drafts(K)[:, place] = drafts
        return target, kept, rows, ring(batch, device), torch.full((batch,), K, dtype=torch.int32, device=device)

    def run(target: Tensor, kept: Drawn, rows: Rows, ring: Ring, real: Tensor) -> Tensor:
        finish_rejected(target, kept, rows.inputs.drafts(K), real, rows, ring)
        return rows.length

    found = cold(make, run, moved=4 * batch * (2 * K + 1) * words)
    target, kept, rows, _, real = cold.inputs(make)
    position = rows.length.unsqueeze(1) + torch.arange(K + 1, device=device)
    numbers = [uniform(rows.stream, position, purpose) for purpose in (ACCEPT, TOKEN)]
    accepted, _ = reject(softmax(target, 0.8), kept.dense(K), rows.inputs.drafts(K), real, *numbers)
    assert torch.equal(found, CONTEXT + 1 + accepted)
