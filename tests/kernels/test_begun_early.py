"""Kernels that begin while the one before ends touch nothing that it may still write or read, in whatever room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import mambabench.kernels
import pytest
import torch
from mambabench.kernels import support

ROOT = Path(mambabench.kernels.__file__).parent
HARMLESS = {"program_id", "num_programs", "arange", "cdiv", "full", "minimum", "maximum", "where", "to"}
"""What is called before memory is touched."""
AHEAD = {"decode_attention": "_attend", "multistep": ""}
"""Rooms of which kernels whose names begin so read, before they wait, what no kernel right before may have written."""
WEIGHTS = "weight", "bias", "taps_ptr", "step_ptr", "decay_ptr", "skip_ptr", "norm_ptr"
LOADS = {"load", "part", "_pieces"}


def kernels() -> Iterator[tuple[str, ast.FunctionDef, dict[str, ast.FunctionDef]]]:
    """Room and definition of every kernel that can begin early, and the functions that stand beside it."""
    for path in sorted(ROOT.rglob("*.py")):
        beside = {
            node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
        }
        for node in beside.values():
            if any(arg.arg == "PDL" for arg in node.args.args):
                yield path.parent.name, node, beside


def calls_of(node: ast.AST) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call)]


def named(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


FOUND = list(kernels())


@pytest.mark.parametrize(
    ("room", "kernel", "beside"), FOUND, ids=[f"{room}-{kernel.name}" for room, kernel, _ in FOUND]
)
def test_a_kernel_that_begins_early_waits_before_it_lets_the_next_begin(
    room: str, kernel: ast.FunctionDef, beside: dict[str, ast.FunctionDef]
) -> None:
    calls = [call for line in kernel.body for call in calls_of(line)]
    waits = sorted(call.lineno for call in calls if named(call) == "gdc_wait")
    lets = sorted(call.lineno for call in calls if named(call) == "gdc_launch_dependents")
    assert len(waits) == len(lets) >= 1
    assert all(wait < let for wait, let in zip(waits, lets, strict=True))
    before = [call for call in calls if call.lineno < waits[0] and named(call) not in HARMLESS]
    if room in AHEAD and kernel.name.startswith(AHEAD[room]):
        called = {named(call): beside[named(call)] for call in before if {named(call)} & beside.keys() - LOADS}
        before += [call for function in called.values() for call in calls_of(function)]
        assert not {"store", "atomic_add", "atomic_cas", "atomic_xchg"} & {named(call) for call in before}
        loads = [ast.unparse(call) for call in before if named(call) in LOADS]
        # A processor's own cache may still have what an earlier call read.
        assert [load for load in loads if "'.cg'" not in load and not any(name in load for name in WEIGHTS)] == []
    else:
        assert [named(call) for call in before] == []
        assert len(waits) == 1


@pytest.mark.parametrize(
    ("setting", "capability", "device", "want"),
    [
        ("", (9, 0), "cuda", True),
        ("off", (9, 0), "cuda", False),
        ("", (8, 0), "cuda", False),
        ("", (9, 0), "cpu", False),
    ],
)
def test_kernels_begin_early_where_the_gpu_can_unless_told_not_to(
    setting: str, capability: tuple[int, int], device: str, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(support.EARLY, setting)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert support.begins_early.__wrapped__(torch.device(device)) is want


def test_a_caller_can_decide() -> None:
    here = torch.zeros(1)
    assert support.begun_early(here) == {"PDL": False, "launch_pdl": False}
    assert support.begun_early(here, True) == {"PDL": True, "launch_pdl": True}
