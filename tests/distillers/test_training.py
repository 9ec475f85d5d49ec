"""Packing, accumulation, resuming: what all trainers share."""

import json
import math
import shutil
import time

import pytest
import torch
from accelerate import DistributedType
from hypothesis import given
from hypothesis import strategies as st
from mambabench.distillers import checkpoints, training
from mambabench.distillers.checkpoints import ACCOUNT, WHOLE, Account, whole_checkpoint
from mambabench.distillers.distillation import DistillationTrainer
from mambabench.distillers.flops import step, work_of
from mambabench.distillers.losses import IGNORED
from mambabench.distillers.mixers import choose_trained
from mambabench.distillers.placement import lighten
from mambabench.distillers.plugin import ProgressiveConfig
from mambabench.distillers.training import Recipe
from mambabench.distillers.windows import Windows, collate, pack, read_windows
from mambabench.harness.interfaces import MambabenchError
from transformers import TrainerCallback

END = 99
FIELDS = ("ids", "labels", "lengths", "positions")
documents = st.lists(
    st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), min_size=1, max_size=30
)


def row(number: int, length: int, prompt: int) -> tuple[list[int], list[int]]:
    ids = [100 * number + place for place in range(length)]
    return ids, [IGNORED] * prompt + ids[prompt:]


@given(documents, st.integers(2, 40))
def test_packing_loses_no_label_and_cuts_only_what_is_too_long(sizes, context):
    rows = [row(number, length, prompt) for number, (length, prompt) in enumerate(sizes, 1)]
    learnt = sum(label != IGNORED for _, labels in rows for place, label in enumerate(labels) if place % context)
    if not learnt:
        return
    windows = pack(rows, context)
    assert windows.ids.shape == windows.labels.shape == (len(windows), context)
    assert int((windows.labels != IGNORED).sum()) == learnt
    packed = [ids[:length] for ids, length in zip(windows.ids.tolist(), windows.lengths.tolist(), strict=True)]
    assert all(windows.labels[:, 0] == IGNORED)
    for number, (length, prompt) in enumerate(sizes, 1):
        if length <= context and prompt < length:
            ids = rows[number - 1][0]
            assert any(ids == window[at : at + length] for window in packed for at in range(len(window)))
    labelled = windows.labels != IGNORED
    assert torch.equal(windows.labels[labelled], windows.ids[labelled])


@given(documents, st.integers(2, 40))
def test_positions_begin_anew_in_each_document(sizes, context):
    rows = [row(number, length, 0) for number, (length, _) in enumerate(sizes, 1)]
    windows = pack(rows, context)
    assert windows.positions.shape == windows.ids.shape
    for ids, positions, length in zip(windows.ids, windows.positions, windows.lengths.tolist(), strict=True):
        assert positions[:length].tolist() == [place % 100 % context for place in ids[:length].tolist()]
        assert (torch.diff(positions[length - 1 :]) == 1).all()


def test_documents_of_a_window_are_learnt_as_if_alone(make_job, hybrid, teacher):
    """The losses of packed documents are those that each has in a window of its own, for student and teacher."""
    rows = [row(0, size, 1) for size in (9, 14, 5, 3)]
    logged = []
    for context in (32, 14):
        windows = pack(rows, context) if context > 14 else alone(rows)
        job = make_job(str(context))
        _, trainer = distil(job, hybrid, teacher, windows, steps=1, batch=len(windows))
        trainer.train()
        logged += job.emit.of("loss")
    assert logged[0]["ce"] == pytest.approx(logged[1]["ce"], rel=1e-5)
    assert logged[0]["kl"] == pytest.approx(logged[1]["kl"], rel=1e-4)
    assert logged[0]["gradient_norm"] == pytest.approx(logged[1]["gradient_norm"], rel=1e-4)


def alone(rows):
    parts = [pack([given], 14) for given in rows]
    return Windows(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))


@given(st.lists(st.integers(2, 16), min_size=50, max_size=200))
def test_packing_wastes_little(lengths):
    windows = pack([row(number, length, 1) for number, length in enumerate(lengths)], 64)
    assert len(windows) <= sum(lengths) / 64 * 1.1 + 1


def test_documents_begin_and_end_with_their_tokens(tmp_path, teacher):
    words = teacher.backend.tokenizer(teacher.path)
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "ask coal tea ."}\n{"text": "", "ids": [1, 5, 6, 2], "prompt": 2}\n')
    windows = read_windows(file, words, 16)
    first = [words.bos_token_id, *words.encode("ask coal tea .", add_special_tokens=False), words.eos_token_id]
    assert windows.ids.tolist() == [[*first, 1, 5, 6, 2, *[0] * 6]]
    assert windows.labels.tolist() == [[IGNORED, *first[1:], IGNORED, IGNORED, 6, 2, *[IGNORED] * 6]]
    assert windows.lengths.tolist() == [10]


def test_a_document_of_ids_that_was_cut_teaches_no_end(tmp_path, teacher):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "", "ids": [1, 5, 6, 7], "prompt": 1}\n')
    windows = read_windows(file, teacher.backend.tokenizer(teacher.path), 8)
    assert windows.labels.tolist() == [[IGNORED, 5, 6, 7, *[IGNORED] * 4]]


def test_no_text_is_an_error_that_names_the_file(tmp_path, teacher):
    file = tmp_path / "text.jsonl"
    file.write_text("")
    with pytest.raises(MambabenchError, match=r"text\.jsonl: no text"):
        read_windows(file, teacher.backend.tokenizer(teacher.path), 16)


def test_batches_are_cut_after_their_longest_window():
    windows = pack([row(1, 5, 1), row(2, 7, 1)], 8)
    batch = collate([windows[0], windows[1]])
    assert batch["input_ids"].shape == (2, 7)
    assert batch["attention_mask"].sum(1).tolist() == windows.lengths.tolist()


class Gradients(TrainerCallback):
    """Copies the gradients of each optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


def distil(job, hybrid, teacher, windows, steps, **options):
    config = ProgressiveConfig(data="text", tokens=1, kl=0.5, **options)
    student = hybrid.backend.module(hybrid.path)
    choose_trained(student, ("mixers",), "half")
    tokens = int((steps - 0.5) * config.batch * windows.lengths.double().mean().item())
    how = {name: getattr(config, name) for name in ("accumulation", "checkpointing")}
    recipe = Recipe(tokens=tokens, batch=config.batch, lr=1e-3, warmup=0, clip=1e9, **how)
    module = teacher.backend.module(teacher.path)
    return student, DistillationTrainer(job, student, module, windows, recipe, config)


@pytest.fixture
def windows(write_tiny, teacher):
    text = write_tiny(documents=24)
    whole = read_windows(text, teacher.backend.tokenizer(teacher.path), 96)
    # Windows of very different length, so that a mean over each part would be seen.
    ragged = whole.labels.clone()
    for index in range(len(ragged)):
        ragged[index, 8 + 5 * (index % 13) :] = IGNORED
    return Windows(whole.ids, ragged, whole.lengths, whole.positions)


def test_one_step_at_batch_8_equals_2_of_4_accumulated(make_job, hybrid, teacher, windows):
    gradients = []
    for accumulation in (1, 2):
        _, trainer = distil(
            make_job(str(accumulation)), hybrid, teacher, windows, steps=1, batch=8, accumulation=accumulation
        )
        trainer.model.double()
        trainer.teacher.double()
        seen = Gradients()
        trainer.add_callback(seen)
        trainer.train()
        assert len(seen.steps) == 1
        gradients.append(seen.steps[0])
    assert len(gradients[0]) > 5
    for one, two in zip(*gradients, strict=True):
        assert (one - two).abs().max() <= 1e-9 * one.abs().max() + 1e-15


def test_the_loss_that_is_logged_is_the_weighted_sum_of_its_parts(make_job, hybrid, teacher, windows):
    job = make_job()
    _, trainer = distil(job, hybrid, teacher, windows, steps=6, batch=4)
    training.report(trainer, job, training.run(trainer, job))
    losses = job.emit.of("loss")
    assert [loss["step"] for loss in losses] == [1, 2, 3, 4, 5, 6]
    for loss in losses:
        assert loss["loss"] == pytest.approx(loss["ce"] + 0.5 * loss["kl"], rel=1e-4)
    assert job.emit.facts["training_steps"] == 6
    assert job.emit.facts["training_tokens"] == losses[-1]["tokens"]
    assert job.emit.facts["weight_per_token_ce"] == 1.0
    assert job.emit.facts["weight_per_token_kl"] == 0.5
    assert 0 < job.emit.facts["trainable_share"] < 1
    work = work_of(windows.positions, windows.lengths, (windows.labels[:, 1:] != IGNORED).sum(1), 4)
    assert job.emit.facts["training_flops_per_step"] == step(trainer.student, trainer.teacher, work).total > 0
    assert "model_flop_utilisation" not in job.emit.facts, "a CPU has no known peak"
    assert job.emit.facts["training_wall"] > 0
    step_time, rate = job.emit.facts["step_time"], job.emit.facts["training_rate"]
    assert 0 < step_time < job.emit.facts["training_wall"]
    assert rate * step_time == pytest.approx(job.emit.facts["training_tokens"] / 6)


def test_the_parts_of_a_loss_are_means_over_the_labels_of_the_step(make_job, hybrid, teacher, windows):
    job, batch = make_job(), len(windows)
    student, trainer = distil(job, hybrid, teacher, windows, steps=1, batch=batch)
    with torch.no_grad():
        labels = windows.labels[:, 1:]
        asked = labels != IGNORED
        said, told = (
            module(input_ids=windows.ids, position_ids=windows.positions).logits[:, :-1].log_softmax(-1)
            for module in (student, teacher.backend.module(teacher.path))
        )
        ce = -said.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[asked].mean()
        kl = (told.exp() * (told - said)).sum(-1)[asked].mean()
    trainer.train()
    (logged,) = job.emit.of("loss")
    assert logged["ce"] == pytest.approx(float(ce), rel=1e-5)
    assert logged["kl"] == pytest.approx(float(kl), rel=1e-4)


class Killed(BaseException):
    pass


class Kill(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise Killed


def test_a_killed_training_resumes_to_the_same_weights_and_records(make_job, hybrid, teacher, windows, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE", math.inf)
    steps, killed_at = 110, 66
    uninterrupted = make_job("whole")
    whole, trainer = distil(uninterrupted, hybrid, teacher, windows, steps=steps, batch=2)
    training.run(trainer, uninterrupted)

    job = make_job("killed", checkpoint_s=0.0)
    _, trainer = distil(job, hybrid, teacher, windows, steps=steps, batch=2)
    trainer.add_callback(Kill(killed_at))
    with pytest.raises(Killed):
        training.run(trainer, job)
    torso = job.scratch / "trainer" / f"checkpoint-{killed_at}"
    shutil.copytree(job.scratch / "trainer" / f"checkpoint-{killed_at - 2}", torso)
    (torso / WHOLE).unlink()
    checkpoint = whole_checkpoint(job.scratch / "trainer")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{killed_at - 1}"
    assert (killed_at - 1) % trainer.args.logging_steps, "a record that is half from before the kill"
    account = json.loads((job.scratch / "trainer" / ACCOUNT).read_text())
    assert account["wall"] > 0
    assert account["gpu"] == 0
    resumed, trainer = distil(job, hybrid, teacher, windows, steps=steps, batch=2)
    training.report(trainer, job, training.run(trainer, job))
    records = job.emit.of("loss")
    assert [loss["step"] for loss in records] == list(range(2, steps + 1, 2))
    for one, two in zip(uninterrupted.emit.of("loss"), records, strict=True):
        assert one == pytest.approx(two, rel=1e-9)
    assert job.emit.facts["training_wall"] > account["wall"]
    assert job.emit.facts["training_tokens"] == records[-1]["tokens"]
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("begun", "ended"),
    [
        ({}, {"checkpointing": True}),
        ({}, {"accumulation": 4}),
        ({"accumulation": 8, "slice": 16}, {"accumulation": 2, "checkpointing": True}),
    ],
)
def test_a_killed_training_is_resumed_by_one_that_computes_otherwise(
    make_job, hybrid, teacher, windows, monkeypatch, begun, ended
):
    """Recomputing changes no bit; parts and slices add in another order."""
    monkeypatch.setattr(checkpoints, "SHARE", math.inf)
    uninterrupted, job = make_job("whole"), make_job("killed", checkpoint_s=0.0)
    whole, trainer = distil(uninterrupted, hybrid, teacher, windows, steps=12, batch=8)
    training.run(trainer, uninterrupted)
    _, trainer = distil(job, hybrid, teacher, windows, steps=12, batch=8, **begun)
    trainer.add_callback(Kill(7))
    with pytest.raises(Killed):
        training.run(trainer, job)
    resumed, trainer = distil(job, hybrid, teacher, windows, steps=12, batch=8, **ended)
    training.run(trainer, job)
    assert trainer.state.global_step == 12
    assert [loss["step"] for loss in job.emit.of("loss")] == list(range(1, 13))
    for one, two in zip(uninterrupted.emit.of("loss"), job.emit.of("loss"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert (one - two).abs().max() <= (0 if ended == {"checkpointing": True} else 1e-4 * one.abs().max()), name


def test_seconds_of_gpus_are_those_of_the_gpus_that_each_attempt_had(tmp_path):
    """Of an attempt that was killed, the work that was lost counts as well."""
    one = Account(tmp_path, gpus=1)
    time.sleep(0.05)
    one.count()
    time.sleep(0.05)
    one.on_save(None, None, None)
    two = Account(tmp_path, gpus=2)
    assert (two.wall, two.gpu) == (one.wall, one.wall)
    assert one.wall >= 0.1
    time.sleep(0.05)
    two.count()
    assert two.gpu - one.gpu == pytest.approx(2 * (two.wall - one.wall))
    assert two.wall - one.wall >= 0.05


def test_a_stage_tells_the_most_memory_of_its_phases(make_job, hybrid, teacher, windows, monkeypatch):
    before = training.Spent(steps=3, tokens=30, seconds=50.0, gpu_seconds=100.0, peak=10**15)
    job = make_job()
    _, trainer = distil(job, hybrid, teacher, windows, steps=2, batch=2)
    trainer.before = before
    spent = training.run(trainer, job)
    training.report(trainer, job, spent)
    assert job.emit.facts["peak_memory"] == before.peak
    assert job.emit.facts["training_gpu"] == 100.0
    assert job.emit.facts["training_wall"] > 50.0
    trainer.before = training.Spent()
    assert 0 < training.run(trainer, job).peak < before.peak


def test_a_model_is_told_once_that_it_trains(make_job, hybrid, teacher, windows, monkeypatch):
    """Not at every step, for which all of its modules have to be visited."""
    model, trainer = distil(make_job(), hybrid, teacher, windows, steps=6, batch=2)
    model.eval()
    told, train = [], type(model).train
    monkeypatch.setattr(type(model), "train", lambda self, mode=True: (told.append(mode), train(self, mode))[1])
    training.run(trainer, make_job())
    assert all(module.training for module in model.modules())
    assert told.count(True) <= 2
    assert not any(module.training for module in trainer.teacher.modules())


def test_a_process_trains_on_its_own_gpu_whatever_others_it_sees(make_job, hybrid, teacher, windows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    _, trainer = distil(make_job(device="cuda:0"), hybrid, teacher, windows, steps=1, batch=2)
    assert trainer.args.distributed_state.distributed_type == DistributedType.NO
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2
    assert trainer._wrap_model(trainer.model) is trainer.model


class Hurry(TrainerCallback):
    """Makes any wait for the GPU an error from where a step begins to where it ends; the first ones compile kernels."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step > 5:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(make_job, hybrid, teacher, windows):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    job = make_job(device="cuda:0")
    _, trainer = distil(job, hybrid, teacher, windows, steps=20, batch=8, accumulation=2, slice=64)
    lighten(trainer.student, job.device)
    lighten(trainer.teacher, job.device)
    trainer.callback_handler.callbacks.insert(0, Hurry())
    try:
        training.run(trainer, job)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(job.emit.of("loss")) == 20
