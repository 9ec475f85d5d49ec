"""The stepping engine: a hybrid model as decoders see it.

Positions are absolute and belong to the caller (`harness.interfaces.Stepper` has the contract). A call makes its
indices once, every layer reads them, and the cursors move before the first one. On a GPU nothing of a call depends
on what the host knows of positions, so that it can be recorded as a graph; on a CPU the host looks, and the same code
reads no more than it must.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.interfaces import Cost, MambabenchError, Rollback, Scores, Tokenizer
from ..kernels.entry import enter
from ..kernels.few_rows import Projection, project
from ..kernels.rounds import greedy
from ..kernels.scan.reference import compute_dtype
from ..kernels.selective_scan import serves as scans_by_kernel
from .calls import AttentionStep, Fill, MambaStep, attention_step, fill, mamba_step
from .graphs import ASKED, Graphs, Recorder, alone, bucket, capturing, wanted
from .mixers import MAMBAS
from .model import HybridForCausalLM
from .shrink import shrink
from .state import Kept, State, held_bytes, open_state, recurrent, replayable

BLOCK = 256
"""Positions by which memory grows where calls are recorded on it."""
LOOPED = 128
"""Tokens a row of recorded prompts, at most, where PyTorch runs a scan token by token."""
HEAD_SLICE = 1 << 24
"""Logits that `score` holds at a time."""


class HybridStepper:
    """Drives a `HybridForCausalLM`. Takes the model over: its projections are laid out anew, without a second copy."""

    def __init__(
        self, model: HybridForCausalLM, tokenizer: Tokenizer, debug: bool = False, graphs: bool | None = None
    ) -> None:
        """`graphs`: whether calls are recorded as CUDA graphs; None as the device and the environment say."""
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.tokenizer = tokenizer
        self.vocab_size: int = model.config.vocab_size
        self.max_context: int = model.config.max_position_embeddings
        weight = model.lm_head.weight
        self.device, self.dtype = str(weight.device), str(weight.dtype).removeprefix("torch.")
        self.traits = frozenset({"rollback", "shrinks", "snapshots", "picks", "counts", "ends"})
        self.layers = len(model.model.layers)
        self.debug = debug
        """Checks the contract at every call, where that makes the host wait for the device. Always on on CPU."""
        self.graphs = wanted(weight.device) if graphs is None else graphs
        self._recorder, self._kept = Recorder(weight.device), Kept()
        self._unrecorded: Counter[str] = Counter()
        """Prompts that were launched kernel by kernel, by the reason."""
        self._windows = [self.config.windows[index] for index in self.config.attention_layers]
        self._layers = list(model.model.layers)
        for layer in self._layers:
            layer.fuse()
        norm = model.model.norm
        self._into_logits = Projection(weight, None, norm.weight, norm.eps)

    @torch.inference_mode()
    def open(self, batch: int, context: int, steps: int, rollback: Rollback = "replay") -> State:
        """Takes the memory for `batch` rows of `context + steps` positions. With graphs a request takes over what an
        earlier one of about its length had."""
        rope, weight, capacity = self.model.model.rope, self.model.lm_head.weight, self._capacity(context + steps)
        rope.check(context)

        def make() -> State:
            state = open_state(self.config, rope, batch, capacity, steps, weight, rollback == "snapshot")
            state.graphs = Graphs(self._recorder) if self.graphs else None
            return state

        sizes = batch, capacity, steps, rollback == "snapshot"
        return self._kept.take(sizes, make) if self.graphs else make()

    @torch.inference_mode()
    def prefill(
        self,
        ids: Tensor,
        lengths: Tensor,
        state: State,
        start: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Runs prompts; ids [B, L], lengths [B], start [B] -> logits [B, V] at each last token. Zeros elsewhere.

        With `counts`, the lengths as the host knows them, it does not wait for the device where all rows begin anew.
        """
        counts = self._counted(ids, lengths, counts)
        longest, whole = max(counts, default=0), start is None and min(counts, default=0) > 0
        if start is None and longest > state.capacity:
            raise MambabenchError(f"prefill: {longest} positions do not fit in the {state.capacity} that open() took")
        if whole and state.graphs is not None:
            return self._read_recorded(ids[:, :longest], lengths, state, state.graphs)
        if whole:
            return self._read(ids[:, :longest], lengths, state)
        self._unrecorded["they go on from a text" if start is not None else "some rows have none"] += 1
        logits = ids.new_zeros(ids.shape[0], self.vocab_size, dtype=compute_dtype(self.model.lm_head.weight))
        if longest:
            rows = lengths.nonzero().squeeze(1)
            first = None if start is None else self._continued(lengths, state, start, rows)
            call = fill(self.config, state, ids[rows], rows, lengths[rows].long(), first)
            logits[rows] = self._prompts(ids[rows], state, call)
        return logits

    def _read_recorded(self, ids: Tensor, lengths: Tensor, state: State, graphs: Graphs) -> Tensor:
        """Fresh prompts in all rows, as a graph where that can be. Always padded alike, so that it makes no difference
        to a bit."""
        width = bucket(ids.shape[1])
        reason = "no memory for a graph" if width > graphs.room else self._unrecordable(len(ids), width)
        if reason:
            self._unrecorded[reason] += 1
            return self._read(ids, lengths, state)
        ids = F.pad(ids, (0, width - ids.shape[1]))
        if alone(ids):
            return self._read(ids, lengths, state)
        return graphs.read(lambda ids, lengths: self._read(ids, lengths, state), ids, lengths)

    def _unrecordable(self, batch: int, width: int) -> str:
        """Why fresh prompts of so many tokens are launched kernel by kernel; empty where a graph serves."""
        if self.debug:
            return "debugging"
        if batch * width > ASKED:
            return f"more than {ASKED} tokens"
        if "mamba" in self.config.mixers and width > LOOPED and not scans_by_kernel(self.model.lm_head.weight):
            return "the scan of Mamba-1 in PyTorch"
        return ""

    def _read(self, ids: Tensor, lengths: Tensor, state: State) -> Tensor:
        """Fresh prompts in all rows, without a look at what is on the device."""
        return self._prompts(ids, state, fill(self.config, state, ids, None, lengths.long(), None))

    def _prompts(self, ids: Tensor, state: State, call: Fill) -> Tensor:
        """Prompts ids [n, L] -> logits [n, V]."""
        h, added = self.model.model.embed_tokens(ids), None
        for layer, cache in zip(self._layers, state.layers, strict=True):
            h, added = layer.fill(h, added, cache, call)
        last = torch.arange(h.shape[0], device=h.device), call.lengths - 1
        for cursor in (state.end, state.settled, state.saved):
            cursor[call.into] = call.end.int()
        return self._logits(h[last], None if added is None else added[last])

    @torch.inference_mode()
    def advance(
        self, ids: Tensor, start: Tensor, state: State, settle: bool = True, last: Tensor | None = None
    ) -> Tensor:
        """Runs ids [B, T] at `start` [B] -> logits [B, T, V]. The likeliest of logits `last` [B, V], if given, are put
        into ids[:, -1], contiguous, first. A caller that records a graph of its own records the
        call with it; its memory must have met a call of the same shape before."""
        if state.graphs is None or alone(start):
            return self._run(ids, start, state, settle, last)
        if last is not None:
            greedy(last, ids[:, -1])
        if self._looks(start):
            self._check(ids.shape[1], start, state, settle)
        return state.graphs.run(lambda ids, start: self._run(ids, start, state, settle), ids, start, settle)

    def _run(self, ids: Tensor, start: Tensor, state: State, settle: bool, last: Tensor | None = None) -> Tensor:
        calls = self._advance(ids.shape[1], start, state, settle)
        table, plan = self.model.model.embed_tokens.weight, state.plan(ids.shape[1], settle)
        stream = enter(ids, table, start, state.cursors, plan, last)
        for name, layer, cache in zip(self.config.calls, self._layers, state.layers, strict=True):
            stream = layer.step(stream, cache, calls.get(name))
        return project(self._into_logits, stream, compute_dtype(stream.h))[0].view(*ids.shape, -1)

    def recording(self, state: State) -> Graphs | None:
        """Where a decoder records rounds with calls on this memory; None where nothing is recorded."""
        return state.graphs

    @torch.inference_mode()
    def take(self, state: State, rows: Tensor) -> None:
        """Row b becomes a copy of row rows[b]."""
        for tensor in state.tensors():
            tensor.copy_(tensor[rows])

    @torch.inference_mode()
    def score(self, ids: Tensor, lengths: Tensor, begins: Tensor | None = None) -> Scores:
        """Scores ids [B, L] in parallel, running all but the last column. Logits are made of what is asked for alone,
        from `begins` [B] on, a few tokens at a time; zeros elsewhere."""
        h = self.model.model(input_ids=ids[:, : max(ids.shape[1] - 1, 1)]).last_hidden_state
        targets = ids[:, 1:]
        logprob = torch.zeros(targets.shape, dtype=compute_dtype(h), device=h.device)
        gap, greedy = torch.zeros_like(logprob), torch.zeros_like(targets, dtype=torch.bool)
        places = torch.arange(1, ids.shape[1], device=h.device)
        asked = places < lengths.unsqueeze(1)
        if begins is not None:
            asked &= places >= begins.unsqueeze(1)
        for part in asked.nonzero().split(max(1, HEAD_SLICE // self.vocab_size)):
            where = part[:, 0], part[:, 1]
            logits, wanted = self._head(h[where]), targets[where].unsqueeze(1)
            chosen, best = logits.gather(1, wanted), logits.argmax(1, keepdim=True)
            logprob[where] = (chosen - logits.logsumexp(1, keepdim=True)).squeeze(1)
            gap[where] = (logits.gather(1, best) - chosen).squeeze(1)
            greedy[where] = (best == wanted).squeeze(1)
        return Scores(logprob, greedy, gap)

    def shrunk(self, layers: Sequence[int]) -> HybridStepper:
        """A stepper of these layers alone, on the same weights."""
        return HybridStepper(shrink(self.model, layers), self.tokenizer, self.debug, self.graphs)

    def facts(self) -> dict[str, tuple[float, str]]:
        """What its engine has done so far: figures with their units, by name."""
        if not self.graphs:
            return {}
        prompts = self._recorder.prompts
        return {
            "graphs": (self._recorder.count - prompts, ""),
            "graphs of prompts": (prompts, ""),
            "recording graphs": (self._recorder.seconds, "s"),
            **{f"prompts without a graph: {reason}": (count, "") for reason, count in self._unrecorded.items()},
        }

    def cost(self, batch: int, context: int, steps: int, rollback: Rollback = "replay") -> Cost:
        """Least bytes and FLOPs of one `advance`: each weight, cached key and checkpoint read once, the new ones
        written; the mean over the calls between two writes of a checkpoint, if all tokens stay. A product of n weights
        with a token is 2 n FLOPs. What is held counts the embedding, which a step reads a few rows of, and whole
        rings."""
        config, size = self.config, self.model.lm_head.weight.element_size()
        attention = len(config.attention_layers)
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        embedding = self.model.model.embed_tokens.weight
        held = {p.data_ptr(): p for p in self.model.parameters()}
        tied = embedding.data_ptr() == self.model.lm_head.weight.data_ptr()
        read = [p for p in held.values() if tied or p is not embedding]
        numbers, tokens = sum(p.numel() for p in read), batch * steps
        weight = self.model.lm_head.weight
        exact, rounds = compute_dtype(weight).itemsize, replayable(config, weight, steps) // steps
        kinds = [recurrent(config, mixer) for mixer in config.mixers if mixer in MAMBAS]
        cells, slots = sum(math.prod(shape) for shape, _ in kinds), size * sum(slot for _, slot in kinds)
        reached = [min(context, window or context) + steps for window in self._windows]
        slot_bytes = 2 * groups * width * size * batch
        moved = (1 + 1 / rounds) * cells * exact + (3 + rounds) / 2 * steps * slots
        if rollback == "snapshot":
            moved = (1 + steps) * cells * exact + steps * slots
        return Cost(
            weight_bytes=sum(p.nbytes for p in read),
            kv_bytes=slot_bytes * sum(reached),
            state_bytes=round(batch * moved),
            flops=2 * numbers * tokens + 4 * tokens * sum(reached) * heads * width + tokens * 8 * cells,
            held_weight_bytes=sum(p.nbytes for p in held.values()),
            held_kv_bytes=slot_bytes * attention * self._capacity(context + steps),
            held_state_bytes=batch * held_bytes(config, weight, steps, rollback == "snapshot"),
        )

    def _logits(self, h: Tensor, added: Tensor | None) -> Tensor:
        return self._head(self.model.model.norm.add(h, added)[1])

    def _head(self, h: Tensor) -> Tensor:
        """Logits in fp32 or better, never rounded to the weights' dtype."""
        weight = self.model.lm_head.weight
        if weight.dtype.itemsize >= 4:
            return F.linear(h, weight)
        if weight.is_cuda:
            return torch.mm(h.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, h.shape[:-1])
        return F.linear(h.float(), weight.float())

    def _counted(self, ids: Tensor, lengths: Tensor, counts: Sequence[int] | None) -> Sequence[int]:
        """The lengths on the host."""
        if counts is None or self._looks(lengths):
            found: list[int] = lengths.tolist()
            if counts is not None and list(counts) != found:
                raise MambabenchError(f"prefill: counts {list(counts)} are not the lengths {found}")
            counts = found
        if max(counts, default=0) > ids.shape[1]:
            raise MambabenchError(f"prefill: lengths up to {max(counts)} but ids have {ids.shape[1]} columns")
        return counts

    @staticmethod
    def _continued(lengths: Tensor, state: State, start: Tensor, rows: Tensor) -> Tensor:
        """Where the prompts of `rows` go on, int64 [n], held against the contract."""
        reached = int((lengths + start)[rows].max())
        if reached > state.capacity:
            raise MambabenchError(f"prefill: {reached} positions do not fit in the {state.capacity} that open() took")
        if bool(((start < state.settled) | (start > state.end))[rows].any()):
            raise MambabenchError("prefill: start must lie between the settled position and the end of its row")
        return start[rows].long()

    def _advance(self, count: int, start: Tensor, state: State, settle: bool) -> dict[str, AttentionStep | MambaStep]:
        """The indices for each kind of mixer that the model has."""
        live, longest, even = state.capacity, state.replay, False
        if state.graphs is None and self._looks(start):
            live, longest, even = self._check(count, start, state, settle)
        if state.snapshots:
            longest = 0
        calls: dict[str, AttentionStep | MambaStep] = {}
        for name, window in {"attention": 0, "sliding": self.config.sliding_window or 0}.items():
            if name in self.config.calls:
                calls[name] = attention_step(self.config, state, start, count, live, even, window)
        if not MAMBAS.keys().isdisjoint(self.config.mixers):
            calls["mamba"] = calls["mamba2"] = mamba_step(self.config, state, start, count, longest, settle)
        return calls

    def _looks(self, start: Tensor) -> bool:
        """Whether the host looks at what is on the device."""
        return (self.debug or start.device.type == "cpu") and not capturing(start)

    def _capacity(self, positions: int) -> int:
        """Slots of a row: with graphs whole blocks, so that requests of about one length can share memory."""
        return -(-positions // BLOCK) * BLOCK if self.graphs else positions

    @staticmethod
    def _check(count: int, start: Tensor, state: State, settle: bool) -> tuple[int, int, bool]:
        """Holds a call against the contract. Returns the cache slots in use, the longest replay, and whether all rows
        start at one position."""
        starts, settled, ends = start.tolist(), state.settled.tolist(), state.end.tolist()
        for row, (at, low, high) in enumerate(zip(starts, settled, ends, strict=True)):
            if not low <= at <= high:
                raise MambabenchError(
                    f"advance: start {at} of row {row} is not between its settled position {low} and its end {high}"
                )
            if at + count - (at if settle else low) > state.steps:
                raise MambabenchError(
                    f"advance: {count} tokens at {at} of row {row}, settled up to {at if settle else low}, "
                    f"are more than the {state.steps} steps that open() took"
                )
        live = max(starts) + count
        if live > state.capacity:
            raise MambabenchError(f"advance: {live} positions do not fit in the {state.capacity} that open() took")
        longest = max(at - low for at, low in zip(starts, settled, strict=True))
        return live, longest, min(starts) == max(starts)
