"""The small operations of a decoding round in plain PyTorch: each is many kernels of a microsecond, or one of ours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .filters import top_k_mask, top_p_mask

TOKEN, DRAFT, ACCEPT = range(3)
"""Purposes of a random number: the emitted token, a draft's own draw, the acceptance of a drafted token."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def aligned(batch: int) -> int:
    """With so many numbers apart, rows begin at multiples of 16 bytes, and kernels need no form for others."""
    return -(-batch // 4) * 4


class Inputs(NamedTuple):
    """What a round's calls of models are given, by place: a text's last two tokens, and the drafts behind them."""

    tokens: Tensor
    """int64 [J + 2, B]: the last token but one, the last, J drafts."""
    positions: Tensor
    """int32 [J + 2, B]."""

    @classmethod
    def empty(cls, drafts: int, batch: int, device: torch.device | str) -> Inputs:
        """Zeros."""
        shape = drafts + 2, aligned(batch)
        both = (torch.zeros(shape, dtype=kind, device=device)[:, :batch] for kind in (torch.int64, torch.int32))
        return cls(*both)

    def ids(self, first: int, count: int) -> Tensor:
        """Of so many places: int64 [B, count]."""
        return self.tokens[first : first + count].T

    def drafts(self, count: int) -> Tensor:
        """int64 [B, count]."""
        return self.ids(2, count)

    def begin(self, ids: Tensor, length: Tensor) -> None:
        """Of texts ids int64 [B, S], length int64 [B]."""
        first = length - 2
        ends = first.clamp(min=0).unsqueeze(1) + torch.arange(2, device=ids.device)
        self.tokens[:2].copy_(ids.gather(1, ends).T)
        torch.add(first, torch.arange(len(self.positions), device=ids.device).unsqueeze(1), out=self.positions)


class Rows(NamedTuple):
    """The texts of a batch: row b's is the first length[b] of ids[b]; nothing is said of those behind."""

    ids: Tensor
    """int64 [B, S], with room for a round's tokens behind the longest text."""
    length: Tensor
    """int64 [B]."""
    full: Tensor
    """int64 [B]: the length at which a text ends."""
    running: Tensor
    """bool [B]."""
    stops: Tensor
    """int64 [n]: tokens that end a text."""
    stream: Tensor
    """int64 [B]: the keys of random numbers."""
    inputs: Inputs
    """Of the next round."""


class Ring(NamedTuple):
    """What rounds made of a batch, for the host to read: the round that is row b's turn[b]-th lies in slot
    turn[b] mod R."""

    slots: Tensor
    """int64 [R, B, W + 2]: W tokens, of which a round may fill fewer, the real drafts, the accepted ones."""
    turn: Tensor
    """int64 [B]."""
    mirror: Tensor | None = None
    """Memory of the host that a GPU writes into, of the shape of the slots. Kernels write there in their place."""


WHOLE = 1 << 14
"""Logits of a row that one program reads alone: beyond, a second kernel takes less time than the wait."""
PART = 2048
"""Logits of which a kernel makes one sum."""


class Drawn(NamedTuple):
    """What drafts were drawn from, softmax(logits / temperature), for J drafts of each row."""

    logits: Tensor
    """[J, B, V]."""
    most: Tensor
    """fp64 [J, B, parts]: the largest logit of each part of a row. Only kernels keep it, and the next."""
    mass: Tensor
    """fp64 [J, B, parts]: the sum of exp((logit - largest) / temperature)."""
    temperature: float

    @classmethod
    def empty(cls, count: int, batch: int, width: int, temperature: float, like: Tensor) -> Drawn:
        """Room for `count` drafts, in the dtype and on the device of `like`."""
        most = like.new_empty(count, batch, parts_of(width)[0], dtype=torch.float64)
        return cls(like.new_empty(count, batch, width), most, torch.empty_like(most), temperature)

    def dense(self, count: int) -> Tensor:
        """The distributions of the first drafts, fp64 [B, count, V]."""
        return softmax(self.logits[:count].transpose(0, 1), self.temperature)


def parts_of(width: int) -> tuple[int, int]:
    """Into how many parts a row of logits is cut, and the length of one."""
    part = min(PART, 1 << (width - 1).bit_length())
    return -(-width // part), part


def streams(seed: int, sequence: Tensor) -> Tensor:
    """The keys of all random numbers of texts: int64, of the shape of `sequence` (int64).

    SplitMix64 (Steele, Lea, Flood 2014), its finaliser chained over seed and sequence, as `uniform` goes on.
    """
    return _mix((sequence.long() ^ _mix_number(seed + _GOLDEN)) + _signed(_GOLDEN))


def uniform(stream: Tensor, position: Tensor, purpose: int) -> Tensor:
    """Random numbers in [0, 1), fp64, of the broadcast shape of `stream` and `position` (int64); 53 bits count."""
    state = _mix((stream ^ position.long()) + _signed(_GOLDEN))
    state = _mix((state ^ purpose) + _signed(_GOLDEN))
    return _shift(state, 11).double() * 2.0**-53


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The index of the largest of logits [..., V], the lowest of equal ones: int64 [...]."""
    return torch.argmax(logits, dim=-1) if out is None else torch.argmax(logits, dim=-1, out=out)


def keep(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits fp32 or fp64 [..., V] of which only the top_k largest, and of these the fewest whose probabilities reach
    top_p, are as they were; the others are -inf. Of equal ones the lowest indices are kept."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(~top_k_mask(logits, top_k), -torch.inf)
    if top_p < 1:
        weights = ((logits.double() - logits.amax(-1, keepdim=True)) / temperature).exp()
        logits = logits.masked_fill(~top_p_mask(logits, weights, top_p), -torch.inf)
    return logits


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) of logits [..., V], in fp64."""
    weights = ((logits.double() - logits.amax(-1, keepdim=True)) / temperature).exp()
    return weights / weights.sum(-1, keepdim=True)


def draw(weights: Tensor, at: Tensor) -> Tensor:
    """Inverse of the distribution function. weights fp64 [..., V], non-negative, need not sum to 1; at fp64 [...] in
    [0, 1). Returns int64 [...]; never an index of weight 0 unless all are."""
    cumulative = weights.cumsum(-1)
    reached = (cumulative > at.unsqueeze(-1) * cumulative[..., -1:]) & (weights > 0)
    first = reached.to(torch.uint8).argmax(-1)
    return first.where(reached.any(-1), weights.argmax(-1))


def drawn(
    logits: Tensor,
    temperature: float,
    stream: Tensor,
    before: Tensor,
    purpose: int,
    kept: Drawn | None = None,
    place: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Tokens int64 [B] or [B, T] drawn from logits [B, V] or [B, T, V]; arguments as in the room's `drawn`."""
    if kept is not None:
        kept.logits[place].copy_(logits)
    places = torch.arange(1, 2 if logits.dim() == 2 else logits.shape[1] + 1, device=logits.device)
    at = uniform(stream.unsqueeze(1), before.long().unsqueeze(1) + places, purpose).view(logits.shape[:-1])
    tokens = draw(softmax(logits, temperature), at)
    return tokens if out is None else out.copy_(tokens)


def finish_rejected(
    target: Tensor, kept: Drawn, drafts: Tensor, real: Tensor, rows: Rows, ring: Ring, chance: float | None = None
) -> None:
    """`reject` by logits, then `finish`; arguments as in the room's `finish_rejected`."""
    count = target.shape[1]
    position = rows.length.unsqueeze(1) + torch.arange(count, device=target.device)
    accept, token = (uniform(rows.stream.unsqueeze(1), position, purpose) for purpose in (ACCEPT, TOKEN))
    q = kept.dense(drafts.shape[1])
    accepted, tokens = reject(softmax(target, kept.temperature), q, drafts, real, accept, token)
    finish(tokens, drafts[:, : count - 1], real, rows, ring, chance, accepted if chance is None else None)


def reject(
    target: Tensor, draft: Tensor, drafts: Tensor, real: Tensor, accept: Tensor, token: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling (Leviathan et al. 2023, Algorithm 1): draft d stands with probability min(1, p(d) / q(d)); the
    token after the last standing one is drawn from max(p - q, 0), or from p where no draft was left to judge.

    target p [B, K + 1, V] and draft q [B, K, V] are filtered probabilities, drafts int64 [B, K], real int [B], accept
    and token random numbers [B, K + 1] of the emitted tokens' positions. Returns how many of the first K drafts stand,
    int64 [B], and the tokens [B, K + 1], of which one more than that are emitted.

    With K + 1 drafts (q [B, K + 1, V]) the last one is judged in the bonus token's place. Then each token depends on
    the text before it and on its own random numbers alone, not on where rounds begin: sampled text is the same for
    every K.
    """
    count, judged = target.shape[1], drafts.shape[1]
    counts = torch.arange(judged, device=drafts.device) < real.unsqueeze(1)
    p = target[:, :judged].gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    q = draft.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    stands = (accept[:, :judged] * q < p) & counts
    standing = stands.long().cumprod(1).sum(1)

    at = standing.clamp(max=count - 1)
    row = torch.arange(len(drafts), device=drafts.device)
    plain = target[row, at]
    tried = at.clamp(max=judged - 1)
    residual = (plain - draft[row, tried].double() * (counts[row, tried] & (at < judged)).unsqueeze(-1)).clamp(min=0)
    residual = residual.where(residual.sum(-1, keepdim=True) > 0, plain)
    after = draw(residual, token[row, at])
    tokens = torch.cat([drafts, drafts[:, :1]], dim=1)[:, :count]
    # Where all of K + 1 stand, the last of them is what the bonus token's place holds already.
    after = after.where(standing < count, tokens[:, -1])
    return at, tokens.scatter(1, at.unsqueeze(1), after.unsqueeze(1))


def match(
    ids: Tensor, length: Tensor, k: int, longest: int, shortest: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What followed the most recent earlier occurrence of each text's last `longest` tokens, or fewer down to
    `shortest`: drafts int64 [B, k], and how many are real, int32 [B]: k or none.

    A copy that reaches the end of the text goes on with itself. ids int64 [B, S], length int64 [B].
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    matches = places < (length - 1).unsqueeze(1)
    end = torch.zeros_like(length)
    for back in range(min(longest, ids.shape[1])):
        last = ids.gather(1, (length - 1 - back).clamp(min=0).unsqueeze(1))
        matches[:, :back] = False
        matches[:, back:] &= ids[:, : ids.shape[1] - back] == last
        if back + 1 >= shortest:
            latest = torch.where(matches, places + 1, 0).amax(1)
            end = torch.where(latest > 0, latest, end)
    found = end > 0
    # Where nothing was found, the copy is of any tokens: none of them counts.
    period = torch.where(found, length - end, 1).unsqueeze(1)
    copied = end.unsqueeze(1) + torch.arange(k, device=ids.device) % period
    drafts = ids.gather(1, copied)
    return (drafts if out is None else out.copy_(drafts)), found.int() * k


def finish(
    tokens: Tensor,
    drafts: Tensor,
    real: Tensor,
    rows: Rows,
    ring: Ring,
    chance: float | None = None,
    accepted: Tensor | None = None,
) -> None:
    """The end of a round: how many drafts stand, what is put behind each text, the inputs of the next round, and this
    one's place in the ring.

    tokens int64 [B, K + 1], drafts int64 [B, K], real int [B]: so many drafts count. A draft stands if it is the token
    at its place and all before it stand; or `accepted` (int64 [B]) do. With a `chance` all K count, and each stands
    with it if those before it do. Texts get the drafts that stand and the token after them, up to their end: their last
    place, or a stop token. A text that has ended stays as it is.
    """
    k = drafts.shape[1]
    places = torch.arange(k + 1, device=tokens.device)
    drafted = real.long().clamp(max=k)
    if accepted is None:
        if chance is None:
            stands = (drafts == tokens[:, :k]) & (places[:k] < real.unsqueeze(1))
        else:
            stands = uniform(rows.stream.unsqueeze(1), rows.length.unsqueeze(1) + places[:k], ACCEPT) < chance
            drafted = torch.full_like(drafted, k)
        accepted = stands.long().cumprod(1).sum(1)
    tokens = torch.cat([torch.where(places[:k] < accepted.unsqueeze(1), drafts, tokens[:, :k]), tokens[:, k:]], dim=1)
    rows.ids.scatter_(1, rows.length.unsqueeze(1) + places, tokens)
    grown = torch.minimum(rows.length + accepted + 1, rows.full)
    # k + 1 stands for "none of them".
    stops = torch.where((tokens.unsqueeze(-1) == rows.stops).any(-1), places, k + 1).amin(1)
    ended = rows.length + stops + 1
    stopped = ended <= grown
    grown = torch.minimum(grown, ended)
    rows.length.copy_(torch.where(rows.running, grown, rows.length))
    rows.running.logical_and_(~stopped & (rows.length < rows.full))
    rows.inputs.begin(rows.ids, rows.length)
    slot = ring.turn % ring.slots.shape[0]
    at = slot, torch.arange(len(slot), device=slot.device)
    ring.slots[:, :, : k + 1].index_put_(at, tokens)
    ring.slots[:, :, -2:].index_put_(at, torch.stack([drafted, accepted], dim=1))
    ring.turn.add_(1)
    if ring.mirror is not None:
        ring.mirror.copy_(ring.slots, non_blocking=True)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _mix_number(x: int) -> int:
    """`_mix` of one number, as a signed one."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return _signed(x ^ (x >> 31))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The low 64 bits of x as a signed number; int64 tensors wrap around."""
    return (x + 2**63) % 2**64 - 2**63
