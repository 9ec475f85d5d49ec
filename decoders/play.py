"""Plays rounds on a batch: opens what they need, records them as a whole where the model can, and has the host read one
round while the device plays the next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..harness.interfaces import DeviceDraft, Draft, Limits, Prompt, Recording, Rollback, Stepper, Unsupported
from .adaptive import Chooser
from .batch import Batch
from .results import Results, Round
from .rounds import Board, append, draft_round, drafting, plain_round
from .sampling import prefill
from .texts import Texts

BLOCK = 256
"""Positions by which texts grow that outlive a request."""
BOARDS = 4
"""Kept on a state's memory, the one used last at the end."""


class Rounds:
    """The rounds of one request. `steps`: most tokens of a call; `look`: rounds that are read at once; `steady` and
    `script` as `SpeculativeDecoder` has them."""

    def __init__(
        self,
        model: Stepper,
        prompts: Sequence[Prompt],
        limits: Limits,
        steps: int = 1,
        look: int = 1,
        draft: Draft | DeviceDraft | None = None,
        steady: bool = True,
        script: float | None = None,
        rollback: Rollback = "replay",
    ) -> None:
        self.model, self.prompts, self.limits, self.steps = model, prompts, limits, steps
        self.draft, self.steady, self.script = draft, steady, script
        self.k = steps - 1
        self.longest = max(len(prompt.ids) for prompt in prompts)
        if steps > model.max_context:
            raise Unsupported(f"k = {self.k}: the model has {model.max_context} positions, which one round would pass")
        if rollback != "replay" and "snapshots" not in model.traits:
            raise Unsupported(f"rollback = {rollback!r} needs a backend that keeps snapshots (trait `snapshots`)")
        chosen = {} if rollback == "replay" else {"rollback": rollback}
        self.state = model.open(len(prompts), self.longest + limits.new_tokens, steps, **chosen)
        self._recording: Recording | None = getattr(model, "recording", _none)(self.state)
        self.board = self._board(min(look, limits.new_tokens))
        self.board.texts.begin(prompts, limits)
        self.board.results.begin()
        self._play: Callable[[int], None] = partial(plain_round, model, self.state, self.board, limits)

    def prefill(self) -> None:
        """Starts the reading of the prompts, which gives each row its first token."""
        texts = self.board.texts
        counts = [len(prompt.ids) for prompt in self.prompts]
        ids = texts.ids[:, : self.longest].contiguous()
        logits = prefill(self.model, ids, texts.length.int(), self.state, counts)
        append(self.board, self.limits, logits.unsqueeze(1))
        self.board.results.sent()

    def first(self) -> Round:
        """Waits for the first tokens."""
        return self.board.results.read(1)[0]

    def open_draft(self) -> None:
        """Before the first round of a decoder that drafts."""
        board, draft = self.board, self.draft
        assert draft is not None
        again = getattr(draft, "again", _never)
        if board.memory is None or not again(board.memory[0], self.prompts, self.limits):
            board.recorded.clear()
            board.memory = None
            on_device = hasattr(draft, "follow")
            more = on_device and self.steady and self.limits.temperature > 0
            opened = draft.open(self.model, self.prompts, self.limits, self.steps if more else self.steps - 1)
            board.memory = (opened,)
        follow = drafting(draft, board.memory[0])
        if not getattr(draft, "records", _never)(board.memory[0]):
            self._recording = None
        given = self.model, self.state, board, self.limits, follow
        self._play = partial(draft_round, *given, self.steady, self.script)

    def play(self, k: int) -> None:
        """Starts a round of k drafts. The first of its kind runs as it is, the second is recorded."""
        recorded = self.board.recorded
        if self._recording is None:
            self._play(k)
        elif k not in recorded:
            with self._recording.unrecorded():
                self._play(k)
            recorded[k] = None
        else:
            start = recorded[k] or self._recording.record(partial(self._play, k))
            recorded[k] = start
            start()
        self.board.results.sent()

    def recorded_anew(self, k: int) -> Callable[[], None]:
        """What starts a round of k drafts as it is now."""
        work = partial(self._play, k)
        if self._recording is None:
            return work
        with self._recording.unrecorded():
            work()
        return self._recording.record(work)

    def seconds(self, k: int, count: int) -> float:
        """What one of `count` rounds of k drafts takes that change no text and that nobody reads. On a GPU the next one
        is always waiting, from before the first on."""
        with self.board.texts.held():
            if self.model.device.startswith("cuda"):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                stream = torch.cuda.current_stream(self.model.device)
                self.play(k)
                begin.record(stream)
                self._repeat(k, count)
                end.record(stream)
                end.synchronize()
                whole = begin.elapsed_time(end) / 1e3
            else:
                began = time.perf_counter()
                self._repeat(k, count)
                whole = time.perf_counter() - began
        self.board.results.drop()
        return whole / count

    def _repeat(self, k: int, count: int) -> None:
        for _ in range(count):
            self.play(k)

    def _board(self, look: int) -> Board:
        """What an earlier request of the same kind left, or a new one."""
        limits, room = self.limits, self.longest + self.limits.new_tokens + self.steps
        if self._recording is not None:
            room = -(-room // BLOCK) * BLOCK
        kept = {} if self._recording is None else self._recording.kept
        sampling = limits.temperature, limits.top_k, limits.top_p
        key = (id(self.draft), self.steps, self.steady, self.script, look, room, limits.stop_tokens, sampling)
        board = kept.pop(key, None)
        if board is None:
            batch, device = len(self.prompts), self.model.device
            texts = Texts(batch, room, limits.stop_tokens, device, drafts=self.steps)
            while len(kept) >= BOARDS:
                del kept[next(iter(kept))]
            none = torch.zeros(batch, dtype=torch.int32, device=device)
            board = Board(texts, Results(batch, self.steps - 1, 2 * look, device), none, self.draft)
        kept[key] = board
        return board


def run(batch: Batch, rounds: Rounds, look: int, chooser: Chooser | None = None) -> None:
    """Plays until all texts have ended, `look` rounds between two looks of the host.

    On a GPU the next rounds are on their way while the host reads: unless the texts may have ended by then, but for
    stop tokens and strings, where a round for nothing costs less than the device's waiting at every round.
    """
    k = rounds.k
    ahead = 1 if rounds.board.results.apart else 0
    flying: deque[list[int]] = deque()
    while batch.running:
        while not flying or (len(flying) <= ahead and batch.missing > sum(each + 1 for ks in flying for each in ks)):
            ks = [k] * min(look, batch.missing - sum(map(len, flying)))
            for each in ks:
                rounds.play(each)
            flying.append(ks)
        ks = flying.popleft()
        accepted = batch.look(rounds.board.results.read(len(ks)), drafts=rounds.draft is not None)
        if chooser is not None:
            k = chooser.next(accepted, ks[0])


def _none(state: Any) -> None:
    """What a model answers whose calls nobody can record."""


def _never(*given: Any) -> bool:
    return False
