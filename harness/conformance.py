"""Does a backend keep the stepping contract? `check_backend("name", artifact)` is the one line that a test needs.

It drives the backend through random rounds (any acceptance, calls without drafts, repeated calls, rounds of a target
and of a draft, ragged rows, copied rows, prompts that go on) and holds every call against full recomputation of the
text that the rows stand for. Scores, picks and, where the backend trains, modules and what is saved of them are held to
the same logits. Needs torch.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .interfaces import Backend, Stepper, Unsupported
from .plugins import make, registry

DESCRIBED = {"layers", "attention_layers", "parameters", "weight_bytes", "vocab_size", "max_context"}
TRAINED = 1e-4
"""Tolerance between a module and the model loaded for decoding, both in fp32."""


def check_backend(
    backend: str | Backend,
    artifact: Path,
    *,
    rounds: int = 1000,
    seed: int = 0,
    batch: int = 3,
    steps: int = 6,
    context: int = 40,
    device: str = "cpu",
    dtype: str = "float64",
    tolerance: float = 1e-9,
) -> None:
    """Raises AssertionError that says which property failed at which round.

    `backend` is a registered name (with its default options) or an object. Logits may be `tolerance` x max(1, largest
    logit) apart. Below fp32 that serves where steps round as whole sequences do; where these have kernels of their own,
    the two differ by about as much as either differs from the exact logits, and only that can be bounded. A backend
    without the trait `rollback` is only driven with start = end; one that raises `Unsupported` from `module` or `save`
    is not held to them.
    """
    made: Backend = make(registry().find("backend", backend)) if isinstance(backend, str) else backend
    described = made.describe(artifact)
    assert set(described) >= DESCRIBED, f"describe: lacks {sorted(DESCRIBED - set(described))}"
    model = made.load(artifact, device, dtype)
    assert model.vocab_size == described["vocab_size"], "load and describe name different vocabularies"
    assert model.dtype == dtype, f"load: asked for {dtype}, got {model.dtype}"
    shape = _Shape(batch, min(context, model.max_context - steps), steps)
    _check_attributes(model, shape)
    _check_greedy(model, shape, seed, tolerance)
    _check_prefill_equals_advances(model, shape, seed, tolerance)
    _check_many_equals_one_by_one(model, shape, seed, tolerance)
    first, again = (_Driver(model, shape, random.Random(seed), tolerance) for _ in range(2))
    for number in range(rounds):
        first.round(number)
    again.compare = False
    for number in range(min(rounds, 25)):
        again.round(number)
    for call, (one, two) in enumerate(zip(first.results, again.results, strict=False)):
        assert torch.equal(one, two), f"determinism: call {call} gave other logits the second time"
    if "picks" in model.traits:
        _check_picks(model, shape, seed, tolerance)
    _check_training(made, artifact, device, seed)


@dataclass(frozen=True, slots=True)
class _Shape:
    batch: int
    context: int
    steps: int


class _Driver:
    """Plays random rounds on one state and keeps the text that each row stands for."""

    def __init__(self, model: Stepper, shape: _Shape, dice: random.Random, tolerance: float) -> None:
        self.model, self.shape, self.dice, self.tolerance = model, shape, dice, tolerance
        self.state = model.open(shape.batch, shape.context, shape.steps)
        self.texts: list[list[int]] = [[] for _ in range(shape.batch)]
        self.settled = [0] * shape.batch
        self.rollback = "rollback" in model.traits
        self.compare = True
        self.spot = random.Random(0)
        """What is compared; kept apart from what is called, so that calls repeat without comparisons."""
        self.what = "round 0"
        self.results: list[Tensor] = []
        self.last: _Call | None = None

    def round(self, number: int) -> None:
        """One round of a random kind, after rows that are nearly full have begun anew."""
        room = self.shape.context + self.shape.steps
        full = [len(text) + 2 * self.shape.steps > room or not text for text in self.texts]
        if any(full):
            self.what = f"round {number} (new prompts in {sum(full)} rows)"
            self.prefill([self.dice.randint(1, room // 3) if new else 0 for new in full], None)
        kinds: list[Any] = [self.target_round, self.target_round, self.continue_prompts, self.copy_rows]
        if self.rollback:
            kinds += [self.target_round, self.draft_round, self.draft_round, self.repeat]
        kind = self.dice.choice(kinds)
        self.what = f"round {number} ({kind.__name__.replace('_', ' ')})"
        try:
            kind()
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.what}: the backend raised {type(error).__name__}: {error}") from error

    def target_round(self) -> None:
        """Settles, and runs one token (no drafts) or more; anything since the last settling may be rejected."""
        self.advance(self.dice.choice((1, self.dice.randint(1, self.shape.steps))), self.starts(), settle=True)

    def draft_round(self) -> None:
        """A first step of two tokens that settles, then steps of one token that stay revocable, some repeated."""
        starts = [max(low, at - 1) for low, at in zip(self.settled, self.starts(), strict=True)]
        self.advance(min(2, self.shape.steps), starts, settle=True)
        for _ in range(self.dice.randint(0, self.shape.steps - 2)):
            self.advance(1, [len(text) for text in self.texts], settle=False)
            if self.dice.random() < 0.2:
                self.repeat()
        if self.dice.random() < 0.3:
            self.advance(1, self.starts(reserve=1), settle=False)

    def repeat(self) -> None:
        """The last call again in every row, or in some while the others go on."""
        if self.last is None:
            return
        call = self.last
        if not call.settle or self.dice.random() < 0.5:
            got = self.call(call)
            if self.compare:
                _close(got, call.logits, self.tolerance, f"{self.what}: the same call twice")
            return
        count = call.ids.shape[1]
        starts, again = self.starts(), call.start.tolist()
        finished = [self.dice.random() < 0.5 for _ in starts]
        ids = self.tokens(count)
        for row, done in enumerate(finished):
            if done:
                starts[row], ids[row] = again[row], call.ids[row]
        self.call(_Call(ids, self.vector(starts), settle=True))

    def continue_prompts(self) -> None:
        """More prompt tokens in some rows, from any revocable position."""
        lengths = [self.dice.choice((0, self.dice.randint(1, self.shape.steps))) for _ in self.texts]
        self.prefill(lengths, self.starts())

    def copy_rows(self) -> None:
        """Rows become copies of others."""
        rows = [self.dice.randrange(self.shape.batch) for _ in self.texts]
        self.model.take(self.state, torch.tensor(rows, device=self.model.device))
        self.texts = [list(self.texts[row]) for row in rows]
        self.settled = [self.settled[row] for row in rows]
        self.last = None
        self.target_round()

    def starts(self, reserve: int = 0) -> list[int]:
        """Any revocable position of each row; the end where nothing can be taken back."""
        if not self.rollback:
            return [len(text) for text in self.texts]
        return [
            self.dice.randint(low, max(low, min(len(text), low + self.shape.steps - reserve)))
            for low, text in zip(self.settled, self.texts, strict=True)
        ]

    def advance(self, count: int, starts: list[int], settle: bool) -> None:
        """Random tokens at `starts`, unless a row would hold more revocable tokens than it may."""
        if not settle and any(
            at + count - low > self.shape.steps for at, low in zip(starts, self.settled, strict=True)
        ):
            return
        self.call(_Call(self.tokens(count), self.vector(starts), settle))

    def call(self, call: _Call) -> Tensor:
        """Makes an `advance`, moves the rows' texts, and compares every logit that came out."""
        got = self.model.advance(call.ids, call.start, self.state, settle=call.settle)
        wanted = (*call.ids.shape, self.model.vocab_size)
        assert got.shape == wanted, f"{self.what}: advance gave logits {list(got.shape)}, not {list(wanted)}"
        for row, at in enumerate(call.start.tolist()):
            self.texts[row] = self.texts[row][:at] + call.ids[row].tolist()
            if call.settle:
                self.settled[row] = at
        self.results.append(got)
        self.last = _Call(call.ids, call.start, call.settle, got)
        self.check(got, call.start.tolist())
        return got

    def prefill(self, lengths: list[int], starts: list[int] | None) -> None:
        """Random prompts, with random tokens as padding."""
        ids = self.tokens(max(max(lengths), 1))
        start = None if starts is None else self.vector(starts)
        known = {"counts": lengths} if "counts" in self.model.traits and self.dice.random() < 0.5 else {}
        got = self.model.prefill(ids, self.vector(lengths), self.state, start, **known)
        wanted = (self.shape.batch, self.model.vocab_size)
        assert got.shape == wanted, f"{self.what}: prefill gave logits {list(got.shape)}, not {list(wanted)}"
        for row, length in enumerate(lengths):
            if length:
                kept = [] if starts is None else self.texts[row][: starts[row]]
                self.texts[row] = kept + ids[row, :length].tolist()
                self.settled[row] = len(self.texts[row])
        touched = torch.tensor([length > 0 for length in lengths], device=got.device)
        self.results.append(got[touched])
        self.last = None
        if self.compare and any(lengths):
            want = recompute(self.model, [text for text, length in zip(self.texts, lengths, strict=True) if length])
            _close(got[touched], want, self.tolerance, f"{self.what}: prefill against full recomputation")

    def check(self, got: Tensor, starts: list[int]) -> None:
        """Every position by the score of a token after it; now and then one position of each row by all its logits."""
        if not self.compare:
            return
        count = got.shape[1]
        texts = [[*text, self.spot.randrange(self.model.vocab_size)] for text in self.texts]
        ids, lengths = pad(texts, self.model.device)
        scores = self.model.score(ids, lengths)
        columns = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(count, device=ids.device)
        logprobs = got.log_softmax(-1).gather(-1, ids.gather(1, columns + 1)[..., None])[..., 0]
        _close(logprobs, scores.logprob.gather(1, columns), self.tolerance, f"{self.what}: advance against score")
        if self.spot.random() < 0.6:
            return
        chosen = [self.spot.randrange(count) for _ in starts]
        prefixes = [text[: at + t + 1] for text, at, t in zip(self.texts, starts, chosen, strict=True)]
        picked = got[torch.arange(len(chosen)), torch.tensor(chosen)]
        _close(
            picked, recompute(self.model, prefixes), self.tolerance, f"{self.what}: advance against full recomputation"
        )

    def tokens(self, count: int) -> Tensor:
        """Random tokens int64 [B, count]."""
        rows = [[self.dice.randrange(self.model.vocab_size) for _ in range(count)] for _ in self.texts]
        return torch.tensor(rows, device=self.model.device)

    def vector(self, numbers: list[int]) -> Tensor:
        """int32 [B]."""
        return torch.tensor(numbers, dtype=torch.int32, device=self.model.device)


@dataclass(slots=True)
class _Call:
    ids: Tensor
    start: Tensor
    settle: bool
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def pad(texts: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    """Token lists -> ids int64 [B, L] right-padded with 0 and lengths int32 [B]."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    return ids.to(device), torch.tensor([len(text) for text in texts], dtype=torch.int32, device=device)


def recompute(model: Stepper, texts: list[list[int]]) -> Tensor:
    """Logits [B, V] after each text, from scratch."""
    ids, lengths = pad(texts, model.device)
    return model.prefill(ids, lengths, model.open(len(texts), ids.shape[1], 1))


def _limit(logits: Tensor, tolerance: float) -> float:
    return tolerance * max(1.0, float(logits.abs().max()))


def _close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    error = float((got - want).abs().max())
    limit = _limit(want, tolerance)
    assert error <= limit, f"{what}: logits are {error:.1e} apart, more than {limit:.1e}"


def _check_attributes(model: Stepper, shape: _Shape) -> None:
    for name in ("tokenizer", "vocab_size", "max_context", "device", "dtype", "traits"):
        assert hasattr(model, name), f"the loaded model lacks the attribute {name}"
    assert model.max_context > shape.steps, f"max_context {model.max_context} leaves no room for text"
    ids = torch.zeros(2, 5, dtype=torch.int64, device=model.device)
    scores = model.score(ids, torch.tensor([5, 3], dtype=torch.int32, device=model.device))
    assert scores.logprob.shape == scores.greedy.shape == (2, 4), "score: one entry for each token but the first"
    assert scores.greedy.dtype == torch.bool, f"score: greedy is {scores.greedy.dtype}, not bool"
    exact = torch.float64 if model.dtype == "float64" else torch.float32
    logits = model.prefill(ids, torch.tensor([5, 3], dtype=torch.int32, device=model.device), model.open(2, 5, 1))
    for name, tensor in (("prefill", logits), ("score", scores.logprob)):
        assert tensor.dtype == exact, f"{name}: {tensor.dtype} for a {model.dtype} model, not {exact}"
    cost = model.cost(1, shape.context, 1)
    assert cost.weight_bytes > 0, f"cost: {cost}"


def _check_greedy(model: Stepper, shape: _Shape, seed: int, tolerance: float) -> None:
    """`Scores.greedy` marks the token with the largest recomputed logit, the lowest index of equal ones, and no other.

    Of logits that differ by less than the tolerance either may be the larger one: those tokens are not compared.
    """
    dice = random.Random(seed)
    texts = [[dice.randrange(model.vocab_size)] for _ in range(shape.batch)]
    wanted: list[tuple[int, int, bool]] = []
    for place in range(min(shape.context, 20)):
        for row, logits in enumerate(recompute(model, texts)):
            gaps = logits.max() - logits
            limit = _limit(logits, tolerance)
            first, second = gaps.sort(stable=True).indices[:2].tolist()
            token = dice.choice((first, first, second, dice.randrange(model.vocab_size)))
            texts[row].append(token)
            if gaps[token] > limit or not ((gaps > 0) & (gaps <= limit)).any():
                wanted.append((row, place, token == first))
    greedy = model.score(*pad(texts, model.device)).greedy
    for row, place, want in wanted:
        token, got = texts[row][place + 1], bool(greedy[row, place])
        assert got == want, f"score: greedy is {got} for token {token} after {texts[row][: place + 1]}, not {want}"


def _check_prefill_equals_advances(model: Stepper, shape: _Shape, seed: int, tolerance: float) -> None:
    """Empty rows that are only advanced come to the logits of a prompt."""
    driver = _Driver(model, shape, random.Random(seed), tolerance)
    driver.what = "prefill against repeated advance"
    for _ in range(max(1, min(4, shape.context // shape.steps))):
        driver.advance(shape.steps, [len(text) for text in driver.texts], settle=True)


def _check_many_equals_one_by_one(model: Stepper, shape: _Shape, seed: int, tolerance: float) -> None:
    """One call of K tokens and K calls of one token give the same logits."""
    driver = _Driver(model, shape, random.Random(seed), tolerance)
    prompts, lengths = driver.tokens(7), driver.vector([3 + row % 5 for row in range(shape.batch)])
    ids = driver.tokens(shape.steps)
    together, apart = (model.open(shape.batch, shape.context, shape.steps) for _ in range(2))
    for state in (together, apart):
        model.prefill(prompts, lengths, state)
    many = model.advance(ids, lengths, together)
    one = [model.advance(ids[:, t : t + 1], lengths + t, apart) for t in range(shape.steps)]
    _close(torch.cat(one, dim=1), many, tolerance, f"advance of {shape.steps} tokens against one token at a time")


def _check_picks(model: Stepper, shape: _Shape, seed: int, tolerance: float) -> None:
    """The likeliest of the logits that come with a call, the lowest index of equal ones, are its last tokens."""
    driver = _Driver(model, shape, random.Random(seed), tolerance)
    prompts, lengths = driver.tokens(7), driver.vector([3 + row % 5 for row in range(shape.batch)])
    for count in sorted({1, min(2, shape.steps), shape.steps}):
        given, plain = (model.open(shape.batch, shape.context, shape.steps) for _ in range(2))
        last, _ = (model.prefill(prompts, lengths, state) for state in (given, plain))
        last = last.round()
        ids = driver.tokens(count).T.contiguous().T
        picked = ids.clone()
        picked[:, -1] = last.sort(dim=1, descending=True, stable=True).indices[:, 0]
        logits = model.advance(ids, lengths, given, last=last)  # type: ignore[call-arg]
        what = f"advance of {count} tokens with a pick"
        assert torch.equal(ids, picked), f"{what}: the last tokens are {ids[:, -1].tolist()}, not the likeliest"
        _close(logits, model.advance(picked, lengths, plain), tolerance, f"{what} against the same tokens")


def _check_training(backend: Backend, artifact: Path, device: str, seed: int) -> None:
    """What is trained is what is decoded: a module has the logits of the loaded model, and comes back from `save`."""
    try:
        module = backend.module(artifact)
    except Unsupported:
        return
    kinds = {(str(p.dtype).removeprefix("torch."), p.device.type) for p in module.parameters()}
    assert kinds == {("float32", "cpu")}, f"module: parameters are {sorted(kinds)}, not float32 on cpu"
    module.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    model = backend.load(artifact, device, "float32")
    ids = torch.randint(model.vocab_size, (2, min(12, model.max_context)), generator=generator).to(device)
    logits = _module_logits(module, ids)
    _close(logits, _every_logit(model, ids), TRAINED, "module against the loaded model")
    _check_loss(module, ids, logits)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator).to(device))
    moved = float((_module_logits(module, ids) - logits).abs().max())
    assert moved > _limit(logits, TRAINED), "module: its logits do not depend on its parameters"
    with tempfile.TemporaryDirectory() as folder:
        _check_save(backend, module, artifact, Path(folder), ids)


def _check_loss(module: nn.Module, ids: Tensor, logits: Tensor) -> None:
    """The loss is the mean cross entropy of the next tokens (-100: none), and has gradients."""
    labels = ids.clone()
    labels[0, :3] = -100
    loss = module(input_ids=ids, labels=labels).loss
    assert loss.requires_grad, "module: the loss reaches no parameter"
    loss.backward()
    got, want = float(loss.detach()), float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    assert abs(got - want) <= TRAINED * max(1.0, want), f"module: the loss is {got:.5f}, its logits give {want:.5f}"
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients), "module: a gradient is not finite"


def _check_save(backend: Backend, module: nn.Module, artifact: Path, out: Path, ids: Tensor) -> None:
    """A trained module comes back from disk, for decoding and for more training, with its tokenizer."""
    try:
        backend.save(module, out, like=artifact)
    except Unsupported:
        return
    device, want = str(ids.device), _module_logits(module, ids)
    _close(_every_logit(backend.load(out, device, "float32"), ids), want, TRAINED, "save, then load")
    _close(_module_logits(backend.module(out).to(device).eval(), ids), want, TRAINED, "save, then module")
    old, new = backend.describe(artifact), backend.describe(out)
    changed = sorted(name for name in DESCRIBED - {"weight_bytes"} if old[name] != new[name])
    assert not changed, f"save: describe gives other values of {', '.join(changed)} than before"
    text = backend.tokenizer(artifact).decode(ids[0].tolist())
    assert backend.tokenizer(out).decode(ids[0].tolist()) == text, "save: the tokenizer is another one"


@torch.no_grad()
def _module_logits(module: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = module(input_ids=ids).logits
    return logits


def _every_logit(model: Stepper, ids: Tensor) -> Tensor:
    """Logits [B, L, V] after every token of ids [B, L]."""
    texts = [text[: t + 1] for text in ids.tolist() for t in range(len(text))]
    return recompute(model, texts).unflatten(0, ids.shape)
