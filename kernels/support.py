"""Whether a fused kernel of another package runs an operation, or our PyTorch form does, and why.

Every room has `supports(...)`, which says so of the inputs given; whoever calls the operation need not know. A reason
is logged once, and `reasons` tells those met so far.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG = logging.getLogger("mambabench.kernels")
VARIABLE = "MAMBABENCH_KERNELS"
"""`reference` in this environment variable keeps every operation to our PyTorch form."""
EARLY = "MAMBABENCH_EARLY"
"""`off` in this environment variable has kernels of decoding begin behind the end of the one before."""
FEW = 512
"""Rows up to which a kernel that serves any number of them begins early: beyond, a launch is little of its time."""
ELSEWHERE = "the tensors are on"


@dataclass(frozen=True, slots=True)
class Support:
    """True where a kernel can serve, else the reason why not."""

    reason: str = ""

    @classmethod
    def yes(cls) -> Support:
        return cls()

    @classmethod
    def no(cls, reason: str) -> Support:
        return cls(reason)

    def __bool__(self) -> bool:
        return not self.reason


class _Held:
    """How many blocks of `reference_only` are open. Of the process, not of the thread: layers that are computed again
    in backward run in a thread of autograd's."""

    count = 0


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Keeps every operation to our PyTorch form, whatever is installed."""
    _Held.count += 1
    try:
        yield
    finally:
        _Held.count -= 1


_met: dict[str, dict[str, None]] = {}
_fused: set[str] = set()


def reasons() -> dict[str, tuple[str, ...]]:
    """Of every operation that our PyTorch form ran so far: why."""
    return {operation: tuple(found) for operation, found in _met.items()}


def record() -> dict[str, dict[str, Any]]:
    """Of every operation so far: whether a kernel ever ran it, and the reasons where none did."""
    return {name: {"fused": name in _fused, "reasons": list(_met.get(name, ()))} for name in sorted({*_met, *_fused})}


def chosen(operation: str, support: Support) -> bool:
    """Whether the kernel runs. Logs a reason that is new; that there is no GPU goes without saying."""
    if not support and support.reason not in _met.setdefault(operation, {}):
        _met[operation][support.reason] = None
        level = logging.DEBUG if support.reason.startswith(ELSEWHERE) else logging.INFO
        LOG.log(level, "%s runs in PyTorch: %s", operation, support.reason)
    if support:
        _fused.add(operation)
    return bool(support)


def on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def served(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> Support:
    """What all kernels ask of their main input."""
    if not on_cuda(tensor):
        return Support.no(f"{ELSEWHERE} {tensor.device.type}")
    if _Held.count or os.environ.get(VARIABLE) == "reference":
        return Support.no("the reference was asked for")
    if tensor.dtype not in dtypes:
        return Support.no(f"the kernel does not serve {str(tensor.dtype).removeprefix('torch.')}")
    return Support.yes() if tensor.numel() else Support.no("there are no tokens")


@functools.cache
def begins_early(device: torch.device) -> bool:
    """Whether kernels of decoding begin while the one before ends (programmatic dependent launch), which GPUs from
    Hopper on can. docs/decoding-kernels.md has what these may do before they wait for it."""
    can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return can and os.environ.get(EARLY) != "off"


def begun_early(tensor: Tensor, early: bool | None = None, rows: int = 0) -> dict[str, bool]:
    """What a Triton kernel is launched with that begins early on the tensor's device (`early`: whether it does; None:
    where the device can and `rows` are few). In every program it first waits, by `gdc_wait` where PDL is set, and only
    then lets its successor begin, by `gdc_launch_dependents`."""
    if early is None:
        early = rows <= FEW and begins_early(tensor.device)
    return {"PDL": early, "launch_pdl": early}


@functools.cache
def timing_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded that are timed. torch's own stream for that is on the GPU that recorded first, and
    whoever records on it has the memory of cuBLAS in common with these, which are given up."""
    return torch.cuda.Stream(device)


@functools.cache
def installed(module: str) -> Support:
    """Whether `module` imports. Asked only once everything else is right: the packages take seconds to import."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            return Support.no(f"{package.replace('_', '-')} is not installed")
        return Support.no(f"{package.replace('_', '-')} does not import: {error}")
    except (ImportError, OSError, RuntimeError) as error:
        return Support.no(f"{package.replace('_', '-')} does not import: {error}")
    return Support.yes()


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)
        elif dataclasses.is_dataclass(arg):
            yield from _tensors(getattr(arg, field.name) for field in dataclasses.fields(arg))


def kernel(module: str, name: str) -> Callable[..., Any]:
    """`name` of a module that is `installed`, run on the GPU of its first tensor, which may stand in a tuple or a
    dataclass.

    Triton launches on the current GPU, whatever the tensors are on, and so do some functions of mamba-ssm. In backward
    autograd has made that of forward the current one.
    """
    function = getattr(importlib.import_module(module), name)

    def run(*args: Any, **named: Any) -> Any:
        tensor = next(_tensors(args), None)
        with contextlib.nullcontext() if tensor is None else torch.cuda.device_of(tensor):
            return function(*args, **named)

    return run
