"""What would run a GPU's operations on this machine is told before anything runs."""

import pytest
import torch
from click.testing import CliRunner
from mambabench.harness.cli import cli
from mambabench.kernels import support
from mambabench.kernels.overview import overview
from mambabench.kernels.support import Support


def test_a_command_says_what_runs_in_pytorch_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = CliRunner().invoke(cli, ["kernels"])
    assert told.exit_code == 0
    lines = [line.split("  ") for line in told.output.splitlines()]
    assert [(line[0], line[-1].strip()) for line in lines] == [
        (name, "in PyTorch: torch finds no GPU") for name in overview()
    ]


def test_with_a_gpu_each_package_that_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = ("causal_conv1d", "mamba_ssm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(support.VARIABLE, raising=False)

    def installed(module: str) -> Support:
        package = module.partition(".")[0]
        return Support.no(f"no {package}") if package in lacking else Support.yes()

    monkeypatch.setattr("mambabench.kernels.overview.installed", installed)
    assert {name: by.reason for name, by in overview().items()} == {
        "decoding, norms and gates": "",
        "scan of Mamba-2": "no mamba_ssm",
        "scan of Mamba-1": "no mamba_ssm",
        "convolution": "no causal_conv1d",
    }
    monkeypatch.setenv(support.VARIABLE, "reference")
    assert {by.reason for by in overview().values()} == {"the reference was asked for"}
