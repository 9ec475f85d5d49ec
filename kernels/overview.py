"""What would run a GPU's operations here, before anything has: each result records what did."""

from __future__ import annotations

import os

import torch

from . import conv, scan, selective_scan
from .support import VARIABLE, Support, installed

BY = {
    "decoding, norms and gates": "triton",
    "scan of Mamba-2": scan.fused.MODULE,
    "scan of Mamba-1": selective_scan.fused.MODULE,
    "convolution": conv.fused.MODULE,
}
"""The operations of prompts and training that other packages have kernels of, and all that have ours."""


def overview() -> dict[str, Support]:
    """Of each kind of operations, whether kernels can run it on a GPU of this machine."""
    reason = ""
    if not torch.cuda.is_available():
        reason = "torch finds no GPU"
    elif os.environ.get(VARIABLE) == "reference":
        reason = "the reference was asked for"
    return {name: Support.no(reason) if reason else installed(module) for name, module in BY.items()}
