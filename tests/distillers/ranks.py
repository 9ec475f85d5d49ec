"""One of the processes that train together in test_ranks.py: `ranks.py TEACHER HYBRID DATA OUT OPTIONS`."""

import json
import os
import sys
from pathlib import Path

import torch
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, TeacherConfig
from mambabench.distillers.plugin import SftConfig
from mambabench.distillers.sft import Sft
from mambabench.harness.interfaces import Artifact, Job


def main(teacher: str, hybrid: str, data: str, out: str, options: str) -> None:
    torch.manual_seed(0)
    backend = Mamba2HybridBackend(Mamba2HybridConfig(chunk=16))
    folder = Path(out) / os.environ.get("RANK", "0")
    losses: list[dict[str, object]] = []
    job = Job(
        seed=0,
        device="cpu",
        data={"text": Path(data)},
        models={},
        teacher=Artifact("teacher", Path(teacher), TeacherBackend(TeacherConfig())),
        parent=Artifact("half", Path(hybrid), backend),
        backend=backend,
        scratch=folder / "scratch",
        out=folder / "out",
        emit=lambda kind, **fields: losses.append(fields) if kind == "loss" else None,
    )
    for made in (job.scratch, job.out):
        made.mkdir(parents=True)
    Sft(SftConfig(data="text", context=48, lr=1e-2, kl=0.5, **json.loads(options))).train(job)
    (folder / "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
