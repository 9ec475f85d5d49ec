"""The scan of Mamba-2 by mamba-ssm's Triton kernels (Dao and Gu, arXiv 2405.21060), forward and backward.

They have an x for every head, and B and C in equal groups, so x, and B where it has fewer than C, are repeated; in
backward that is a sum. Sums, decays and states are in fp32; what enters a matrix product is rounded to the dtype of the
inputs, or to tf32, and so is y. Scores and prompts take it too: the logits of a bf16 model are as near to the exact
ones as by our own form, and inputs in fp32 would take twice the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents
from ..support import Support, installed, kernel, served
from ..tuning import compile_side_by_side
from .reference import exact, mask_dt, repeated

MODULE = "mamba_ssm.ops.triton.ssd_combined"
TUNED = tuple(
    f"mamba_ssm.ops.triton.ssd_{part}" for part in ("bmm", "chunk_scan", "chunk_state", "combined", "state_passing")
)
CHUNK = 128
"""With a C for every head, the products of C and B take as much memory as the states between chunks where a chunk is
as long as a state is wide. It changes nothing else but rounding, so the model's own `chunk` is not used."""


def may_round() -> bool:
    """Whether torch itself may round fp32 inputs of matrix products to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def supports(x: Tensor, C: Tensor) -> Support:
    """Whether `scan` can serve these of its inputs; the others may be any."""
    support = served(x, (torch.bfloat16, torch.float32))
    if not support:
        return support
    if x.dtype == torch.float32 and not may_round():
        return Support.no("the kernel rounds fp32 inputs to tf32, which torch is not set to allow")
    if C.shape[0] * C.shape[1] * max(x.shape[2], C.shape[2]) * max(CHUNK, x.shape[-1], C.shape[-1]) >= 2**31:
        return Support.no("the kernel counts in int32, which this batch is too large for")
    return installed(MODULE)


@exact
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk: int = CHUNK,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the reference's `scan`. y has x's dtype, the state is fp32."""
    compile_side_by_side(TUNED)
    y, final = kernel(MODULE, "mamba_chunk_scan_combined")(
        repeated(x, dt.shape[2]),
        mask_dt(dt.float(), lengths),
        A.float(),
        repeated(B.to(x.dtype), C.shape[2]),
        C.to(x.dtype),
        CHUNK,
        D=None if D is None else D.float(),
        initial_states=None if state is None else state.float(),
        seq_idx=None if documents is None else documents.sequence,
        return_final_states=True,
    )
    return y, final
