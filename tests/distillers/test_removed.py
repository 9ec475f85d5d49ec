"""A model whose attention was taken away trains by what its plan names: there are no mixers in it."""

import pytest
import torch
from mambabench.backends.hybrid import RemovedBackend
from mambabench.backends.plugin import RemovedConfig
from mambabench.distillers.plugin import ProgressiveConfig, SftConfig
from mambabench.distillers.progressive import Progressive
from mambabench.distillers.sft import Sft
from mambabench.harness.interfaces import Artifact, MambabenchError


@pytest.fixture(scope="module")
def bare(teacher, tmp_path_factory) -> Artifact:
    """The teacher without the attention of its first layer."""
    out = tmp_path_factory.mktemp("bare")
    backend = RemovedBackend(RemovedConfig())
    backend.convert(teacher.path, [1], out, 0)
    return Artifact("bare", out, backend)


@pytest.fixture
def start(make_job, write_tiny, teacher, bare):
    def make(name):
        data = write_tiny(documents=8)
        return make_job(name, data={"data": data}, parent=bare, teacher=teacher, backend=bare.backend)

    return make


def changed(artifact, folder):
    before, after = (dict(artifact.backend.module(path).named_parameters()) for path in (artifact.path, folder))
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("schedule", ["together", "stepwise"])
def test_progressive_trains_what_globs_name(start, bare, schedule):
    job = start("job")
    config = ProgressiveConfig(data="data", tokens=1000, batch=4, train=("*.mlp.*",), schedule=schedule)
    Progressive(config).train(job)
    assert changed(bare, job.out) == {
        f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("gate", "up", "down")
    }


def test_sft_trains_all_of_it(start, bare):
    job = start("job")
    Sft(SftConfig(data="data", tokens=1000, batch=4, kl=1.0)).train(job)
    assert changed(bare, job.out) == set(dict(bare.backend.module(bare.path).named_parameters()))


@pytest.mark.parametrize("options", [{}, {"align_tokens": 500, "train": ("all",)}], ids=["train", "align"])
def test_mixers_that_are_not_there_are_said_to_be_missing(start, options):
    config = ProgressiveConfig(data="data", tokens=1000, batch=4, **options)
    with pytest.raises(MambabenchError, match=r"^progressive: bare has no Mamba mixers, so there is nothing to train$"):
        Progressive(config).train(start("job"))
