"""What the host knows of a batch of windows, said to the models and losses so that nothing waits for a device to ask.

A question such as "does any document begin inside a row?" costs nothing where the batch is put together. Asked of a
tensor on a GPU, it empties the queue of work that keeps the GPU busy.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..harness.interfaces import MambabenchError
from .losses import IGNORED, shifted

ALWAYS = ("input_ids", "position_ids")
"""What every model is given of a batch, where it is there; windows are padded at the right, where causal models need
no mask."""
ASKED = ("cu_seq_lens_q", "max_length_q", "max_documents")
"""What those models are given that name it in their forward."""


def known(labels: Tensor, positions: Tensor) -> dict[str, Any]:
    """What follows from labels and positions, int64 [B, L] on the host.

    `counted` int64 [N]: the places, in all rows one after the other, that predict something. Where a row has more than
    one document: `position_ids`, and as transformers calls them, `cu_seq_lens_q` int32 [documents + 1], the places
    where documents begin and the number of all, and `max_length_q`, the length of the longest; `max_documents` are
    those of the row that has most. Where none has, there are no positions: they count from 0 in each row.
    """
    said: dict[str, Any] = {"counted": (shifted(labels) != IGNORED).flatten().nonzero().squeeze(1)}
    if torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions)):
        return said
    begins = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
    offsets = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=begins.numel())
    return said | {
        "position_ids": positions,
        "cu_seq_lens_q": offsets.to(torch.int32),
        "max_length_q": int(offsets.diff().max()),
        "max_documents": int(begins.sum(1).max()),
    }


def read(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch `model`, without anything that wraps it, is given. Raises MambabenchError for a model of
    transformers that would read the documents of a row as one."""
    named = inspect.signature(type(model).forward).parameters
    if isinstance(model, PreTrainedModel) and "position_ids" in inputs and "position_ids" not in named:
        raise MambabenchError(
            f"{type(model).__name__}: takes no position_ids, by which documents of one window are kept apart; give it "
            "data whose documents fill a window each, or a shorter context"
        )
    return {name: inputs[name] for name in (*ALWAYS, *(name for name in ASKED if name in named)) if name in inputs}


def counted(inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """int64 [N]: the places that predict something, among all of targets [B, L]. The host waits for the device where
    the batch does not say it."""
    said: Tensor | None = inputs.get("counted")
    return (targets != IGNORED).flatten().nonzero().squeeze(1) if said is None else said
