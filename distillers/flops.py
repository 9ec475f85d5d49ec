"""How many floating-point operations a training step needs, so that its use of a GPU can be told honestly.

Counted is what the model asks for, whatever the code does: matrix products of student and teacher forward (2 for each
weight and token; heads only where something is predicted), gradients of their inputs wherever a trained parameter
stands before them, gradients of trained weights alone, the two products of causal attention within documents, and the
scans as the recurrence that defines them, which is less than their chunked form computes. Not counted: what is computed
again in backward, element-wise work, convolutions of four taps, the loss, the optimiser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..harness.interfaces import Unsupported

PEAKS = {
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 SXM": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s of GPUs whose name has this in it, from NVIDIA's data sheets."""
SAMPLE = 4096
"""Windows that are looked at to know how long documents are."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)$")
_STAGES = (
    (r"input_layernorm\.", 0),
    (r"(mamba|self_attn)\.(o_proj|out_proj)\.", 4),
    (r"(mamba|self_attn)\.(q_proj|k_proj|v_proj|in_proj)\.", 1),
    (r"(mamba|self_attn)\.", 2),
    (r"post_attention_layernorm\.", 5),
    (r"mlp\.(gate_proj|up_proj)\.", 6),
    (r"mlp\.", 7),
)
"""In which order the parts of a layer run; attention itself and the scan are 3."""
SCAN = 5
"""Operations of a recurrence on each number of the state: it decays, is added to a product, and is read."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step goes over."""

    tokens: float
    targets: float
    """Tokens whose logits are needed."""
    documents: Sequence[tuple[int, float]]
    """Length, and how many documents have it."""

    def pairs(self, window: int = 0) -> float:
        """Of a token and one that it reads, itself included; at most the last `window` if that is not 0."""
        return sum(count * _pairs(length, window) for length, count in self.documents)


@dataclass(frozen=True, slots=True)
class Flops:
    """Of a step."""

    student: float
    """Its forward."""
    teacher: float
    """Its forward."""
    inputs: float
    """Gradients of inputs, and all of attention's and the scans' backward."""
    weights: float
    """Gradients of trained weights."""

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.inputs + self.weights


def step(student: nn.Module, teacher: nn.Module | None, work: Work) -> Flops:
    """FLOPs of a step of training `student`, whose parameters say whether they are trained. Raises Unsupported for a
    model whose parts are not known."""
    forward = inputs = weights = 0.0
    trained = [_place(name) for name, tensor in _named_parameters(student) if tensor.requires_grad]
    lowest = min(trained, default=(1 << 30, 0))
    for place, flops, weight in _parts(student, work):
        forward += flops
        if weight is None:
            inputs += 2 * flops if lowest < place else 0
        else:
            inputs += flops if lowest < place else 0
            weights += flops if weight.requires_grad else 0
    theirs = 0.0 if teacher is None else sum(flops for _, flops, _ in _parts(teacher, work))
    return Flops(forward, theirs, inputs, weights)


def work_of(positions: Tensor, lengths: Tensor, targets: Tensor, windows: int) -> Work:
    """What `windows` windows hold on average, from position ids int [N, context], of which the first `lengths` [N] of
    each are real, and how many places of each [N] predict something; of many windows, a sample is looked at."""
    every = max(1, len(positions) // SAMPLE)
    positions, lengths, targets = positions[::every], lengths[::every], targets[::every]
    real = torch.arange(positions.shape[1]) < lengths[:, None]
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    bounds = torch.nn.functional.pad(begins[real].nonzero().squeeze(1), (0, 1), value=int(lengths.sum()))
    share = windows / len(positions)
    sizes, counts = bounds.diff().unique(return_counts=True)
    documents = [(size, count * share) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)]
    return Work(float(lengths.sum()) * share, float(targets.sum()) * share, documents)


def peak(device: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU of this name; None where that is not known.

    >>> peak("NVIDIA H200"), peak("NVIDIA A100-SXM4-80GB"), peak("NVIDIA T4")
    (989000000000000.0, 312000000000000.0, None)
    """
    return next((flops for name, flops in PEAKS.items() if name in device), None)


def _parts(model: nn.Module, work: Work) -> Iterator[tuple[tuple[int, int], float, Tensor | None]]:
    """Where each piece of work stands, its FLOPs forward, and its weight if it is a matrix product with one."""
    if not any(name.endswith((".self_attn", ".mamba")) for name, _ in model.named_modules() if _LAYER.search(name)):
        raise Unsupported(f"{type(model).__name__}: only the work of layers with self_attn or mamba can be counted")
    for name, module in model.named_modules():
        place = _place(f"{name}.weight")
        if isinstance(module, nn.Linear):
            rows = work.targets if place == _HEAD else work.tokens
            yield place, 2 * rows * module.weight.numel(), module.weight
        elif _LAYER.search(name) and name.endswith(".self_attn"):
            read = work.pairs(int(getattr(module, "window", 0) or 0))
            yield (place[0], 3), 4 * read * _product(module, "q_proj").out_features, None
        elif _LAYER.search(name) and name.endswith(".mamba"):
            yield (place[0], 3), SCAN * work.tokens * _state(module), None


def _state(mixer: nn.Module) -> int:
    """Numbers in the state of a Mamba mixer: A is [inner, N] in Mamba-1, [H] in Mamba-2, where states are as wide as
    heads are."""
    decay = getattr(mixer, "A_log", None)
    if not isinstance(decay, Tensor):
        raise Unsupported(f"{type(mixer).__name__}: only the work of mixers with A_log can be counted")
    inner = _product(mixer, "out_proj").in_features
    return decay.numel() if decay.dim() == 2 else inner * (inner // len(decay))


def _product(module: nn.Module, name: str) -> nn.Linear:
    product = getattr(module, name, None)
    if not isinstance(product, nn.Linear):
        raise Unsupported(f"{type(module).__name__}: only the work of mixers with {name} can be counted")
    return product


_HEAD = (1 << 29, 1)


def _place(name: str) -> tuple[int, int]:
    """Layer and stage of a parameter, in the order in which a model runs."""
    found = _LAYER.search(name)
    if found:
        return int(found[1]), next((stage for pattern, stage in _STAGES if re.match(pattern, found[2])), 0)
    if "embed" in name:
        return -1, 0
    return _HEAD if "lm_head" in name else (_HEAD[0], 0)


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A tied weight under both names."""
    yield from model.named_parameters(remove_duplicate=False)


def _pairs(length: int, window: int) -> float:
    if not window or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window
