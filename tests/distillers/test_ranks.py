"""Several processes that train together do what one does with the same batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANKS = Path(__file__).with_name("ranks.py")


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def trained(out, number, teacher, hybrid, text, **options):
    """Trains with `number` processes on CPU (gloo). Returns each rank's weights and records of losses."""
    together = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, RANKS, teacher.path, hybrid.path, text, out, json.dumps(options)]
    children = [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **({**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0] * number, "\n".join(errors)
    return [
        (
            dict(hybrid.backend.module(out / str(rank) / "out").named_parameters()),
            json.loads((out / str(rank) / "losses.json").read_text()),
        )
        for rank in range(number)
    ]


@pytest.mark.slow
def test_two_ranks_of_four_windows_are_one_batch_of_eight(tmp_path, teacher, hybrid, write_standin):
    text = write_standin(documents=48)
    # Less than one pass: at its end a batch has fewer windows, which ranks fill up.
    options = {"tokens": 1400, "batch": 8, "slice": 16}
    ((alone, losses),) = trained(tmp_path / "alone", 1, teacher, hybrid, text, **options)
    pair = trained(tmp_path / "pair", 2, teacher, hybrid, text, **options)
    before = dict(hybrid.backend.module(hybrid.path).named_parameters())
    for weights, told in pair:
        assert len(told) == len(losses) >= 3
        for one, two in zip(losses, told, strict=True):
            assert two == pytest.approx(one, rel=1e-4)
        for name, weight in weights.items():
            moved = (alone[name] - before[name]).abs().max()
            assert (weight - alone[name]).abs().max() <= 1e-3 * moved + 1e-7, name
    assert all(torch.equal(pair[0][0][name], pair[1][0][name]) for name in alone)
