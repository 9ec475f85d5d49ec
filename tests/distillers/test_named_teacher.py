"""A stage may ask another model than the plan's teacher; attention is lent by the model before its conversion."""

import pytest
import torch
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.distillers.plugin import ProgressiveConfig, SftConfig
from mambabench.distillers.progressive import ALIGNED, Progressive
from mambabench.distillers.random_configs import RandomTeacherConfig
from mambabench.distillers.random_teacher import RandomTeacher
from mambabench.distillers.sft import Sft
from mambabench.harness.interfaces import Artifact, MambabenchError

SHORT = {"data": "data", "tokens": 400, "batch": 4, "context": 64, "lr": 1e-9}


@pytest.fixture
def start(make_job, write_tiny, teacher, hybrid):
    def make(name, **models):
        data = write_tiny(documents=8)
        return make_job(
            name, data={"data": data}, parent=hybrid, teacher=teacher, backend=hybrid.backend, models=models
        )

    return make


def first_kl(job):
    return job.emit.of("loss")[0]["kl"]


@pytest.mark.parametrize(
    ("stage", "config"), [(Sft, SftConfig), (Progressive, ProgressiveConfig)], ids=["sft", "progressive"]
)
def test_the_divergence_asks_the_model_that_is_named(start, hybrid, stage, config):
    plain, itself = start("plain"), start("itself", other=hybrid)
    stage(config(**SHORT, kl=1.0)).train(plain)
    stage(config(**SHORT, kl=1.0, teacher="other")).train(itself)
    assert first_kl(plain) > 0.01
    assert abs(first_kl(itself)) < 1e-5


def test_mixers_are_aligned_with_the_attention_that_they_replaced(start, hybrid):
    learnt = []
    for name, options in (("plain", {}), ("named", {"teacher": "other"})):
        job = start(name, other=hybrid)
        Progressive(ProgressiveConfig(**SHORT | {"lr": 1e-3}, kl=1.0, align_tokens=400, **options)).train(job)
        learnt.append(torch.load(job.scratch / ALIGNED, weights_only=True)["mixers"])
    assert learnt[0].keys() == learnt[1].keys()
    assert all(torch.equal(learnt[0][name], learnt[1][name]) for name in learnt[0])


def test_another_vocabulary_is_refused(start, make_job):
    backend = TeacherBackend(TeacherConfig())
    job = make_job("big", backend=backend)
    shape = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16, "vocabulary": 300}
    RandomTeacher(RandomTeacherConfig(**shape)).train(job)
    big = Artifact("big", job.out, backend)
    with pytest.raises(MambabenchError, match=r"sft: the teacher big has a vocabulary of 300 tokens, half one of \d+"):
        Sft(SftConfig(**SHORT, kl=1.0, teacher="big")).train(start("stage", big=big))


def test_a_teacher_whom_nobody_asks_is_refused():
    with pytest.raises(ValueError, match="teacher is named and kl is 0"):
        SftConfig(**SHORT, teacher="other")
