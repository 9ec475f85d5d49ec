"""The two distillers end to end on a very small teacher, and text that a teacher writes."""

import json
from dataclasses import replace

import pytest
import torch
from mambabench.distillers.data_configs import PreferencePairsConfig, PseudoLabelsConfig
from mambabench.distillers.plugin import ProgressiveConfig, TrainTeacherConfig
from mambabench.distillers.progressive import Progressive
from mambabench.distillers.pseudo_labels import WRITTEN, PseudoLabels, beginning
from mambabench.distillers.train_teacher import TrainTeacher
from mambabench.harness.documents import read_documents
from mambabench.harness.interfaces import MambabenchError

SMALL = {"layers": 2, "hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 16, "batch": 4}


def weights(artifact):
    return dict(artifact.backend.module(artifact.path).named_parameters())


def test_progressive_changes_the_mamba_mixers_and_nothing_else(make_job, write_tiny, teacher, hybrid):
    job = make_job(data={"text": write_tiny(documents=8)}, teacher=teacher, parent=hybrid, backend=hybrid.backend)
    Progressive(ProgressiveConfig(data="text", tokens=2000, batch=4, lr=1e-2)).train(job)
    before, after = weights(hybrid), dict(hybrid.backend.module(job.out).named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mamba." in name}
    assert changed
    losses = job.emit.of("loss")
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert hybrid.backend.tokenizer(job.out).encode("ask balo") == teacher.backend.tokenizer(teacher.path).encode(
        "ask balo"
    )


def test_progressive_refuses_a_model_without_mamba_mixers(make_job, write_tiny, teacher):
    job = make_job(data={"text": write_tiny(documents=4)}, teacher=teacher, parent=teacher, backend=teacher.backend)
    with pytest.raises(MambabenchError, match="teacher has no Mamba mixers"):
        Progressive(ProgressiveConfig(data="text", tokens=100)).train(job)


def test_a_teacher_is_trained_from_scratch_with_the_tokenizer_of_its_data(make_job, write_tiny, teacher):
    job = make_job(data={"text": write_tiny(documents=16)}, backend=teacher.backend)
    TrainTeacher(TrainTeacherConfig(data="text", tokens=8000, lr=1e-2, **SMALL)).train(job)
    described = teacher.backend.describe(job.out)
    assert (described["layers"], described["attention_layers"]) == (2, [0, 1])
    losses = [loss["loss"] for loss in job.emit.of("loss")]
    assert losses[-1] < losses[0] - 0.5
    assert job.emit.facts["trainable_share"] == 1
    assert job.emit.facts["parameters"] == described["parameters"]
    assert job.emit.of("progress")[-1]["done"] == job.emit.facts["training_steps"]
    assert teacher.backend.tokenizer(job.out).decode([1]) == "<s>"


def test_the_same_seed_trains_the_same_teacher(make_job, write_tiny, teacher):
    text = write_tiny(documents=8)
    config = TrainTeacherConfig(data="text", tokens=1000, **SMALL)
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        job = make_job(name, data={"text": text}, backend=teacher.backend, seed=seed)
        TrainTeacher(config).train(job)
        folders.append(job.out)
    one, again, other = (dict(teacher.backend.module(folder).named_parameters()) for folder in folders)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_data_without_a_tokenizer_is_refused_by_name(make_job, tmp_path, teacher):
    file = tmp_path / "text.txt"
    file.write_text("ask balo tea .")
    job = make_job(data={"text": file}, backend=teacher.backend)
    with pytest.raises(MambabenchError, match="data 'text' brings no tokenizer"):
        TrainTeacher(TrainTeacherConfig(data="text", tokens=100)).train(job)


def written(make_job, name, teacher, data=None, **options):
    job = make_job(name, teacher=teacher, backend=teacher.backend, data=data or {})
    PseudoLabels(PseudoLabelsConfig(**{"new_tokens": 12, **options})).write(job)
    return [json.loads(line) for line in (job.out / "data.jsonl").read_text().splitlines()]


def test_pseudo_labels_depend_neither_on_the_batch_nor_on_the_range(make_job, teacher):
    whole = written(make_job, "whole", teacher, documents=7, batch=7)
    assert written(make_job, "small", teacher, documents=7, batch=2) == whole
    assert written(make_job, "later", teacher, documents=4, first=3, batch=4) == whole[3:]
    assert len({tuple(document["ids"]) for document in whole}) == 7
    assert written(make_job, "other", teacher, documents=7, batch=7, seed=1) != whole


def test_pseudo_labels_begin_with_the_begin_token_and_hold_what_was_sampled(make_job, teacher):
    words = teacher.backend.tokenizer(teacher.path)
    for document in written(make_job, "job", teacher, documents=5):
        assert document["prompt"] == 1
        assert document["ids"][0] == words.bos_token_id
        assert 2 <= len(document["ids"]) <= 13
        assert words.eos_token_id not in document["ids"][1:-1]
        assert document["text"] == words.decode(document["ids"], skip_special_tokens=True)


def test_pseudo_labels_continue_given_documents(make_job, write_tiny, teacher):
    text = write_tiny(part="prompts", documents=2)
    documents = written(make_job, "job", teacher, data={"seeds": text}, documents=2, prompts="seeds", prompt_tokens=6)
    beginnings = [json.loads(line)["text"].split()[:3] for line in (text / "data.jsonl").read_text().splitlines()]
    assert [document["prompt"] for document in documents] == [6, 6]
    assert [document["text"].split()[:3] for document in documents] == beginnings


def test_held_out_pseudo_labels_never_have_the_prompts_of_others(make_job, write_tiny, teacher):
    options = {"data": {"seeds": write_tiny(part="prompts", documents=5)}, "prompts": "seeds", "prompt_tokens": 6}
    whole = written(make_job, "whole", teacher, documents=5, **options)
    assert written(make_job, "later", teacher, documents=2, first=3, **options) == whole[3:]
    with pytest.raises(MambabenchError, match=r"5 prompts .*where first \+ documents is 7; lower documents"):
        written(make_job, "beyond", teacher, documents=2, first=5, **options)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("temperature", -1.0, "temperature is -1.0; it must be a number, 0"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_p", 7.0, "top_p is 7.0; it must be above 0 and at most 1"),
        ("top_p", 0.0, "top_p is 0.0"),
        ("top_k", -3, "top_k is -3; it must be 0"),
        ("first", -5, "first is -5; it must not be below 0"),
        ("batch", 0, "batch is 0; it must be at least 1"),
    ],
)
def test_what_a_teacher_cannot_write_by_is_refused(option, value, complaint):
    for config, needed in ((PseudoLabelsConfig, {"documents": 4}), (PreferencePairsConfig, {"data": "x", "pairs": 4})):
        with pytest.raises(ValueError, match=complaint):
            config(**needed, **{option: value})


def test_pseudo_labels_answer_whole_prompts_and_leave_out_long_ones(make_job, teacher, tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    records = [
        {"prompt": "ask coal", "completion": " tea"},
        {"prompt": "ask coal tea , " * 13, "completion": " tea"},
        {"prompt": "ask silk tea", "completion": " ,"},
    ]
    seeds.write_text("".join(json.dumps(record) + "\n" for record in records))
    documents = written(make_job, "job", teacher, data={"seeds": seeds}, documents=2, prompts="seeds", prompt_tokens=6)
    assert [document["prompt"] for document in documents] == [3, 4]
    words = teacher.backend.tokenizer(teacher.path)
    prompts = [words.decode(document["ids"][1 : document["prompt"]]) for document in documents]
    assert prompts == [
        words.decode(words.encode(text, add_special_tokens=False)) for text in ("ask coal", "ask silk tea")
    ]


def test_a_chat_is_answered_behind_its_template(teacher, tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    chat = [{"role": "user", "content": "ask balo"}, {"role": "assistant", "content": "tea"}]
    seeds.write_text(json.dumps({"messages": chat}) + "\n")
    words = teacher.backend.tokenizer(teacher.path)
    words.chat_template = (
        "{% for turn in messages %}{{ ', ' if turn.role == 'assistant' }}{{ turn.content }} {% endfor %}"
        "{{ ', ' if add_generation_prompt }}"
    )
    (document,) = read_documents(seeds)
    assert words.decode(beginning(document, words, 9)) == "<s> ask balo ,"
    assert beginning(document, words, 3) == []
    assert beginning(replace(document, whole=True), words, 9) == beginning(document, words, 9)


def test_the_length_of_a_pseudo_label_does_not_depend_on_those_beside_it(make_job, teacher, tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"text": "ask balo"}\n' + json.dumps({"text": "ask balo tea , " * 13}) + "\n")
    options = {"data": {"seeds": seeds}, "documents": 2, "prompts": "seeds", "prompt_tokens": 70, "new_tokens": 400}
    together = written(make_job, "together", teacher, batch=2, **options)
    assert written(make_job, "alone", teacher, batch=1, **options) == together


def test_prompts_that_fill_the_context_are_refused(make_job, teacher, tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(json.dumps({"text": "ask balo tea , " * 200}) + "\n")
    with pytest.raises(MambabenchError, match="lower prompt_tokens"):
        written(make_job, "job", teacher, data={"seeds": seeds}, documents=1, prompts="seeds", prompt_tokens=500)


def test_pseudo_labels_go_on_after_a_kill(make_job, teacher):
    whole = written(make_job, "whole", teacher, documents=6, batch=3)
    job = make_job("killed", teacher=teacher, backend=teacher.backend)
    lines = [json.dumps(document) for document in whole]
    (job.scratch / WRITTEN).write_text("\n".join(lines[:2]) + "\n" + lines[2][:10])
    PseudoLabels(PseudoLabelsConfig(new_tokens=12, documents=6, batch=3)).write(job)
    assert (job.out / "data.jsonl").read_text().splitlines() == lines
    assert job.emit.of("progress")[0]["done"] == 5
