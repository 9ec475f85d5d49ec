"""The suite `train-speed` takes the steps that a stage takes, side by side, and tells their times and memory apart."""

import json

import pytest
import torch
from mambabench.distillers.distillation import DistillationTrainer
from mambabench.distillers.flops import Work, step
from mambabench.distillers.mixers import choose_trained
from mambabench.distillers.train_speed import Arm, TrainSpeed, forever, load_arms, peaks
from mambabench.distillers.train_speed_config import TrainSpeedConfig
from mambabench.harness.interfaces import Bench, MambabenchError, Subject
from mambabench.harness.metrics import request_frame
from pandas import DataFrame

SMALL = {"context": (8, 16), "tokens": 32, "steps": 3, "pairs": 2, "warmup": 1}


@pytest.fixture
def bench(tmp_path, make_job, teacher, hybrid):
    """A bench over the hybrid and its teacher."""

    def make(subject=hybrid, beside=teacher, device="cpu", **fields):
        given = {
            "subject": Subject(subject, "", None, device, "float32"),
            "reference": None,
            "data": {},
            "seed": 0,
            "scratch": tmp_path / "scratch",
            "emit": make_job("bench").emit,
            "models": {"teacher": beside},
        } | fields
        return Bench(**given)

    return make


def test_blocks_alternate_and_every_step_has_its_time(bench):
    made = bench()
    TrainSpeed(TrainSpeedConfig(**SMALL)).run(made)
    bursts = made.emit.of("burst")
    assert len(bursts) == 2 * 2 * 2 * 3
    order = list(dict.fromkeys((burst["block"], burst["order"], burst["arm"]) for burst in bursts))
    assert order == [
        (0, 0, "subject"),
        (0, 1, "reference"),
        (1, 0, "reference"),
        (1, 1, "subject"),
        (2, 0, "subject"),
        (2, 1, "reference"),
        (3, 0, "reference"),
        (3, 1, "subject"),
    ]
    assert [burst["prompt_tokens"] for burst in bursts] == [8] * 12 + [16] * 12
    assert [burst["batch"] for burst in bursts] == [4] * 12 + [2] * 12
    frame = request_frame(DataFrame(bursts).assign(key="k"))
    assert (frame["tokens"] == 3 * 32).all()
    assert (frame["last_s"] > frame["ttft_s"]).all()
    assert (frame["ttft_s"] > 0).all()
    assert {fact["name"] for fact in made.emit.of("fact")} >= {"warm-up, 8 tokens", "trained parameters"}


def test_flops_of_a_step_are_those_of_its_model_and_windows(bench, hybrid, teacher):
    made = bench()
    TrainSpeed(TrainSpeedConfig(**SMALL, kl=0.1)).run(made)
    told = {(fact["name"], fact["arm"]): fact["value"] for fact in made.emit.of("fact") if "FLOPs" in fact["name"]}
    for arm, artifact in (("subject", hybrid), ("reference", teacher)):
        model = artifact.backend.module(artifact.path)
        choose_trained(model, ("mixers",) if arm == "subject" else ("*.layers.0.self_attn.*",), arm)
        for context in (8, 16):
            rows = 32 // context
            work = Work(32, 32 - rows, [(context, rows)])
            wanted = step(model, teacher.backend.module(teacher.path), work).total
            assert told[f"FLOPs a step, {context} tokens", arm] == pytest.approx(wanted)


def test_a_step_is_the_stage_s_step(bench, hybrid, monkeypatch):
    """Same losses of the same batch, and AdamW moves what is trained and nothing else."""
    seen = []
    whole = DistillationTrainer.losses

    def watched(self, model, inputs):
        parts = whole(self, model, inputs)
        seen.append((self, inputs, {name: value.detach().clone() for name, value in parts.items()}))
        return parts

    monkeypatch.setattr(DistillationTrainer, "losses", watched)
    config = TrainSpeedConfig(**SMALL | {"context": (16,)}, kl=0.5)
    made = bench()
    arms = load_arms(made, config)
    before = {name: value.clone() for name, value in arms["subject"].model.named_parameters()}
    batches = forever(TrainSpeed(config)._windows(made, 16, 2), 2, "cpu")
    arms["subject"].steps(batches, 2)
    moved = {name for name, value in arms["subject"].model.named_parameters() if not torch.equal(before[name], value)}
    assert moved == {name for name in before if ".mamba." in name}
    assert set(seen[0][2]) >= {"ce", "kl"}
    _, inputs, parts = seen[0]
    fresh = hybrid.backend.module(hybrid.path)
    logits = fresh(input_ids=inputs["input_ids"]).logits
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(parts["ce"] / (2 * 15), ce)


def test_mixers_of_the_teacher_are_the_attention_that_the_model_traded(bench):
    arms = load_arms(bench(), TrainSpeedConfig(**SMALL))
    named = {name: value for name, value in arms["reference"].model.named_parameters() if value.requires_grad}
    assert named
    assert all(".layers.0.self_attn." in name for name in named)
    assert arms["reference"].trained == sum(value.numel() for value in named.values())


def test_the_teacher_s_own_row_has_one_arm(bench, teacher):
    made = bench(subject=teacher)
    TrainSpeed(TrainSpeedConfig(**SMALL)).run(made)
    assert {burst["arm"] for burst in made.emit.of("burst")} == {"subject"}


def test_memory_of_one_model_is_counted_without_the_other_s(bench):
    arms = load_arms(bench(), TrainSpeedConfig(**SMALL | {"train": ("all",)}))
    batches = forever(TrainSpeed(TrainSpeedConfig(**SMALL))._windows(bench(), 8, 4), 4, "cpu")
    for arm in arms.values():
        arm.steps(batches, 1)
    for arm in arms.values():
        weights = sum(value.numel() for value in arm.model.parameters())
        buffers = sum(value.nbytes for value in arm.model.buffers())
        steps = 4 * len(list(arm.model.parameters()))
        assert arm.resident() == pytest.approx(3 * 4 * weights + buffers + steps, rel=0.05)
    whole = {"subject": 1000 + arms["reference"].resident(), "reference": 2000 + arms["subject"].resident()}
    for name, arm in arms.items():
        arm.peak = whole[name]
    assert peaks(arms) == {"subject": 1000, "reference": 2000}
    assert peaks(arms) == {}


def test_checkpointing_changes_no_gradient(bench):
    gradients = []
    for checkpointing in (False, True):
        made = bench()
        config = TrainSpeedConfig(**SMALL, checkpointing=checkpointing)
        arm: Arm = load_arms(made, config)["subject"]
        samples, items = arm.trainer.get_batch_samples(
            forever(TrainSpeed(config)._windows(made, 8, 4), 4, "cpu"), 1, torch.device("cpu")
        )
        arm.trainer.training_step(arm.model, samples[0], items)
        gradients.append({name: value.grad for name, value in arm.model.named_parameters() if value.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_text_of_the_plan_is_trained_on_in_whole_windows(bench, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"ids": [5] * length}) + "\n" for length in (40, 3, 3, 16, 16)))
    made = bench(data={"text": text})
    batches = forever(TrainSpeed(TrainSpeedConfig(**SMALL, data="text"))._windows(made, 16, 2), 2, "cpu")
    assert all(next(batches)["input_ids"].shape == (2, 16) for _ in range(5))
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"ids": [5] * 20}) + "\n")
    with pytest.raises(MambabenchError, match="text fills 1 windows of 16 tokens; a step needs 2"):
        TrainSpeed(TrainSpeedConfig(**SMALL, data="text"))._windows(bench(data={"text": short}), 16, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": (24,), "tokens": 32}, "context 24 does not divide tokens = 32"),
        ({"context": ()}, "context is empty; it must name at least one"),
        ({"steps": 1}, "steps is 1; it must be at least 2"),
        ({"ce": 0.0}, "ce and kl are both 0; one of them must be above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainSpeedConfig(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("train", ["mixers", "all"])
def test_a_gpu_s_clock_and_memory_are_on_record(bench, train):
    made = bench(device="cuda:0")
    TrainSpeed(TrainSpeedConfig(**SMALL, train=(train,), kl=0.1)).run(made)
    assert all(burst["at_s"] > 0 for burst in made.emit.of("burst"))
    memory = [fact for fact in made.emit.of("fact") if fact["name"].startswith("peak memory")]
    assert {(fact["arm"], fact["name"]) for fact in memory} == {
        (arm, f"peak memory, {context} tokens") for arm in ("subject", "reference") for context in (8, 16)
    }
    assert all(fact["value"] > 0 for fact in memory)
