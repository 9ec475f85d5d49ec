"""What a run was made with: machine, versions, code, settings. Text only, without importing the model stack.

Absent parts are left out, not guessed. Nothing here names the user or the host.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .interfaces import Host, MambabenchError

PACKAGES = (
    *("torch", "triton", "transformers", "safetensors", "tokenizers", "accelerate", "trl", "datasets", "lm-eval"),
    *("mamba-ssm", "causal-conv1d", "numpy", "pandas", "pyarrow", "scipy", "ray"),
)
SETTINGS = ("OMP_", "MKL_", "KMP_", "OPENBLAS_", "CUDA_", "CUBLAS_", "NVIDIA_TF32", "PYTORCH_", "TORCH_", "TRITON_")
SETTINGS_EXACT = (
    "PYTHONHASHSEED",
    "TOKENIZERS_PARALLELISM",
    "HF_HUB_OFFLINE",
    "MAMBABENCH_DEBUG",
    "MAMBABENCH_EARLY",
    "MAMBABENCH_GRAPHS",
    "MAMBABENCH_KERNELS",
    "MAMBABENCH_PLUGINS",
    "MAMBABENCH_PLUGINS_BLOCK",
    "MAMBABENCH_REPLAY",
    "MAMBA_DETERMINISTIC",
)


def capture(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this process. `extra` (from plug-ins) adds facts but overwrites none."""
    return {**(extra or {}), **machine(), **versions(), **gpu_facts(), **settings()}


def machine() -> dict[str, str]:
    """The host without its GPUs, and the interpreter."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": str(cores()),
        "memory_gib": f"{memory_bytes() / 2**30:.1f}",
    }
    return {name: value for name, value in facts.items() if value}


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settings() -> dict[str, str]:
    """Environment variables that decide threads, devices and kernels; without paths, which name the user."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith(SETTINGS) or name in SETTINGS_EXACT) and value and not _is_path(name, value)
    }


def _is_path(name: str, value: str) -> bool:
    return any(sign in value for sign in "/\\~") or name.endswith(("_DIR", "_PATH", "_HOME", "_ROOT", "_FILE"))


@cache
def gpus() -> tuple[str, ...]:
    """Names of the machine's NVIDIA GPUs in the order of `nvidia-smi`; empty without a driver."""
    return tuple(_nvml()[0])


def gpu_facts() -> dict[str, str]:
    names, driver = _nvml()
    facts = {f"gpu{index}": name for index, name in enumerate(names)}
    return {**facts, "driver": driver} if driver else facts


@cache
def _nvml() -> tuple[list[str], str]:
    try:
        import pynvml
    except ImportError:
        return [], ""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], ""
    try:
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return [_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles], _text(
            pynvml.nvmlSystemGetDriverVersion()
        )
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def host(indices: Sequence[int] = ()) -> Host:
    """What hooks see of this machine. Raises MambabenchError for a GPU that is not there."""
    names = gpus()
    for index in indices:
        if index >= len(names):
            raise MambabenchError(f"--gpus {index}: this machine has {len(names)} NVIDIA GPUs, counted from 0")
    return Host(cpus=cores(), gpus=tuple(names[index] for index in indices), platform=platform.platform())


def machine_facts(indices: Sequence[int] = ()) -> dict[str, str]:
    """What speed depends on and a plan does not say; part of the keys of speed steps.

    A step uses one of the GPUs, so it does not matter how many of a kind there are.
    """
    known = versions()
    decide: tuple[str, ...] = ("torch", "triton", "mamba-ssm", "causal-conv1d")
    facts = {name: known[name] for name in decide if name in known}
    if not indices:
        return {**facts, "cpu": cpu_model()}
    return {**facts, "gpu": ", ".join(sorted(set(host(indices).gpus))), "driver": gpu_facts().get("driver", "")}


def code() -> dict[str, str | bool | None]:
    """The version of this package and, in a checkout, its git revision and whether it has changes or new modules."""
    from .. import __version__

    source = checkout()
    revision = _git(source, "rev-parse", "HEAD") if source else None
    changes = _git(source, "status", "--porcelain", "-z", "--untracked-files=all") if source and revision else None
    dirty = None if changes is None else any(map(_is_change, changes.split("\0")))
    return {"version": __version__, "revision": revision, "dirty": dirty}


def _is_change(entry: str) -> bool:
    """Whether an entry of `git status` tells of other code than the revision's; of new files, modules do."""
    return entry.endswith(".py") if entry.startswith("?? ") else bool(entry)


def checkout() -> Path | None:
    """The git checkout that this package runs from, also where an editable install links to it."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        return root
    try:
        text = importlib.metadata.distribution(__package__.partition(".")[0]).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(text) if text else {}
    if not origin.get("dir_info", {}).get("editable"):
        return None
    root = Path(unquote(urlsplit(origin["url"]).path))
    return root if (root / ".git").exists() else None


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
