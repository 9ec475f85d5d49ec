"""The engine over its Triton kernels, in Triton's interpreter on a CPU, gives the logits of the model."""

import os
import subprocess
import sys

import pytest
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig

SCRIPT = """
import sys
import torch
from pathlib import Path
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.kernels import support

backend, folder, steps = TeacherBackend(TeacherConfig()), Path(sys.argv[1]), 5
ids = torch.randint(0, 60, (2, 23), generator=torch.Generator().manual_seed(1))
exact = backend.load(folder, "cpu", "float64").model(input_ids=ids).logits

support.on_cuda = lambda tensor: True
model = backend.load(folder, "cpu", "float32")
with support.reference_only():
    own = (model.model(input_ids=ids).logits - exact).norm()
state, said, at, settled = model.open(2, 23, steps), [], 0, 0
for count in (1, 5, 3, 4, 1, 5, 2, 2):
    start = torch.full((2,), at, dtype=torch.int32)
    wrong = (ids[:, at : at + count] + 1) % 60
    if at - settled + count <= steps:
        model.advance(wrong, start, state, settle=False)
    said.append(model.advance(ids[:, at : at + count], start, state))
    settled, at = at, at + count
error = (torch.cat(said, 1) - exact).norm()
assert error <= 4 * own, (error, own)
ran = [name for name, found in support.record().items() if found["fused"]]
assert set(sys.argv[2:]) <= set(ran), ran
"""


def logits_are_the_models(folder, *kernels):
    """Of tokens that are advanced a few at a time, some of them again after others that were not kept."""
    given = [sys.executable, "-c", SCRIPT, str(folder), *kernels]
    done = subprocess.run(given, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")


def test_of_a_model_of_mamba_ssm(make_native, teacher_backend, tmp_path):
    teacher_backend.convert(make_native(headdim=16, d_state=32)[0], [], tmp_path / "ours", seed=0)
    logits_are_the_models(tmp_path / "ours", "enter", "fused_step")


def test_of_a_hybrid(half):
    logits_are_the_models(half, "enter", "decode_attention", "fused_step")


@pytest.mark.parametrize(
    "options",
    [{"rope": "kept"}, {"rope": "kept", "norm": "none", "gate": "open", "activation": "none"}],
    ids=str,
)
def test_of_a_hybrid_with_options(options, llama, tmp_path):
    """B and C that are rotated, and gates with a bias and no norm."""
    Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, **options)).convert(llama, [1], tmp_path / "mamba2", seed=0)
    logits_are_the_models(tmp_path / "mamba2", "enter", "decode_attention", "fused_step")


@pytest.mark.parametrize("rope", ["dropped", "kept"])
def test_of_mamba_1(rope, llama, tmp_path):
    MambaBackend(MambaConfig(rope=rope)).convert(llama, [1], tmp_path / "mamba", seed=0)
    logits_are_the_models(tmp_path / "mamba", "enter", "selective_ring_multistep")
