"""What the stages train, in which order, and that a killed one goes on."""

import json
import math

import pytest
import torch
from mambabench.distillers import checkpoints, progressive, training
from mambabench.distillers.dpo import Dpo, PreferenceTrainer, answer_logprob, collate_pairs, read_pairs
from mambabench.distillers.losses import IGNORED
from mambabench.distillers.mixers import choose_trained, give_back, lend, mixers, replaced
from mambabench.distillers.plugin import DpoConfig, ProgressiveConfig, SftConfig
from mambabench.distillers.progressive import Progressive, join
from mambabench.distillers.sft import Sft
from mambabench.distillers.training import Recipe, pace
from mambabench.harness.interfaces import MambabenchError
from transformers import get_cosine_schedule_with_warmup


@pytest.fixture
def text(write_tiny):
    return write_tiny(documents=8)


@pytest.fixture
def pairs(write_tiny):
    return write_tiny(part="preferences", documents=12)


@pytest.fixture
def start(make_job, teacher, hybrid):
    """A job that trains `parent` (the hybrid) on `data`."""

    def make(name, data, parent=hybrid, **fields):
        fields = {"teacher": teacher, "backend": parent.backend} | fields
        return make_job(name, data={"data": data}, parent=parent, **fields)

    return make


def weights(artifact, folder=None):
    return dict(artifact.backend.module(folder or artifact.path).named_parameters())


def changed(artifact, folder):
    before, after = weights(artifact), weights(artifact, folder)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (("all",), lambda name: True),
        (("mixers",), lambda name: ".mamba." in name),
        (("*.layers.1.mlp.*", "*.norm.weight"), lambda name: ".layers.1.mlp." in name or name.endswith(".norm.weight")),
    ],
)
def test_sft_changes_what_train_names_and_nothing_else(start, text, hybrid, wanted, fits):
    job = start("job", text)
    Sft(SftConfig(data="data", tokens=1000, batch=4, train=wanted)).train(job)
    assert changed(hybrid, job.out) == {name for name in weights(hybrid) if fits(name)}
    assert job.emit.facts["weight_per_token_ce"] == 1
    assert "weight_per_token_kl" not in job.emit.facts


def test_a_glob_that_names_no_parameter_is_refused(start, text):
    with pytest.raises(MambabenchError, match=r"no parameter of sft: half is called '\*\.mpl\.\*'"):
        Sft(SftConfig(data="data", tokens=100, train=("all", "*.mpl.*"))).train(start("job", text))


def test_the_teacher_itself_is_trained_on_without_a_teacher(start, text, teacher):
    job = start("job", text, parent=teacher, teacher=None)
    Sft(SftConfig(data="data", tokens=500, batch=4)).train(job)
    assert changed(teacher, job.out)
    with pytest.raises(MambabenchError, match="say kl = 0"):
        Sft(SftConfig(data="data", tokens=500, kl=1.0)).train(job)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_slices_of_positions_change_no_record(start, text, kind):
    records = []
    for size in (0, 7):
        job = start(f"slice-{size}", text)
        Sft(SftConfig(data="data", tokens=800, batch=4, ce=0.5, kl=2.0, kl_kind=kind, slice=size)).train(job)
        records.append([(loss["ce"], loss["kl"], loss["loss"], loss["gradient_norm"]) for loss in job.emit.of("loss")])
    assert len(records[0]) > 1
    for one, two in zip(*records, strict=True):
        assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "sets", "expected"),
    [
        ("together", (), [[0, 1, 2, 4, 5]]),
        ("stepwise", (), [[0], [1], [2], [4], [5]]),
        ("interleaved", (), [[0], [2], [5], [1], [4]]),
        ("stepwise", ((1, 4), (0,)), [[1, 2, 4, 5], [0]]),
    ],
)
def test_layers_join_in_the_order_of_the_schedule(schedule, sets, expected):
    assert [sorted(part) for part in join(schedule, [0, 1, 2, 4, 5], sets)] == expected


def test_sets_of_layers_that_are_not_converted_are_refused():
    with pytest.raises(MambabenchError, match="layer 3 is not converted"):
        join("stepwise", [0, 1], ((3,),))
    with pytest.raises(MambabenchError, match="layer 1 is named twice"):
        join("stepwise", [0, 1], ((1,), (0, 1)))


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0.1), (7, 0.0)])
def test_one_phase_has_the_cosine_schedule_of_transformers(steps, warmup):
    recipe = Recipe(tokens=1, batch=1, lr=1, warmup=warmup, clip=1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    (theirs,) = get_cosine_schedule_with_warmup(optimizer, round(warmup * steps), steps).lr_lambdas
    for step in range(steps):
        assert pace(step, steps, recipe) == pytest.approx(theirs(step), abs=1e-12)


def test_each_phase_has_a_learning_rate_that_rises_and_falls():
    recipe = Recipe(tokens=1, batch=1, lr=1, warmup=0.2, clip=1, phases=2)
    rates = [pace(step, 20, recipe) for step in range(20)]
    assert rates[:10] == rates[10:]
    assert rates[0] == 0
    assert max(rates) == rates[2] == 1


@pytest.fixture
def pure(teacher, hybrid, tmp_path):
    """The teacher with Mamba mixers in both layers."""
    out = tmp_path / "pure"
    hybrid.backend.convert(teacher.path, [], out, 0)
    return type(hybrid)("pure", out, hybrid.backend)


def test_a_hybrid_that_borrows_all_attention_is_its_teacher(pure, teacher):
    student, module = pure.backend.module(pure.path), teacher.backend.module(teacher.path)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        own, theirs = student(input_ids=ids).logits, module(input_ids=ids).logits
        pairs = replaced(student, module)
        assert sorted(pairs) == [0, 1]
        for mixer, attention in pairs.values():
            lend(mixer, attention)
        torch.testing.assert_close(student(input_ids=ids).logits, theirs)
        for mixer, _ in pairs.values():
            give_back(mixer)
        assert torch.equal(student(input_ids=ids).logits, own)


def test_stepwise_layers_join_one_after_the_other(start, text, pure, monkeypatch):
    trained = []

    def note(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        names = [name for name, tensor in model.named_parameters() if tensor.requires_grad and ".dt_bias" in name]
        reached = torch.autograd.grad(
            loss, [dict(model.named_parameters())[name] for name in names], retain_graph=True, allow_unused=True
        )
        trained.append([gradient is not None for gradient in reached])
        return loss

    compute = progressive.DistillationTrainer.compute_loss
    monkeypatch.setattr(progressive.DistillationTrainer, "compute_loss", note)
    job = start("job", text, parent=pure)
    Progressive(ProgressiveConfig(data="data", tokens=1500, batch=4, schedule="stepwise", kl=1.0)).train(job)
    half = len(trained) // 2
    assert trained[:half] == [[True, False]] * half
    assert trained[half + 1 :] == [[True, True]] * (len(trained) - half - 1)
    assert not changed(pure, job.out) - {name for name in weights(pure) if ".mamba." in name}


def test_more_phases_than_steps_are_refused(start, text, pure):
    with pytest.raises(MambabenchError, match="1 steps cannot be split into 2 phases"):
        Progressive(ProgressiveConfig(data="data", tokens=10, schedule="stepwise")).train(
            start("job", text, parent=pure)
        )


def test_alignment_comes_first_and_brings_mixers_nearer_to_attention(start, text, pure):
    job = start("job", text, parent=pure)
    Progressive(ProgressiveConfig(data="data", tokens=500, align_tokens=4000, batch=4, lr=1e-2)).train(job)
    losses = job.emit.of("loss")
    aligned = [loss["align"] for loss in losses if "align" in loss]
    assert aligned[-1] < 0.8 * aligned[0]
    assert [loss["step"] for loss in losses] == sorted({loss["step"] for loss in losses})
    assert "ce" in losses[-1]
    assert job.emit.facts["training_tokens"] == losses[-1]["tokens"] > 4000
    assert job.emit.facts["training_steps"] == losses[-1]["step"]


def test_a_stage_that_was_killed_after_alignment_goes_on_from_there(start, text, pure, monkeypatch):
    config = ProgressiveConfig(data="data", tokens=500, align_tokens=500, batch=4)
    whole = start("whole", text, parent=pure)
    Progressive(config).train(whole)
    job = start("killed", text, parent=pure)
    run, report = training.run, training.report

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "report", killed)
    with pytest.raises(KeyboardInterrupt):
        Progressive(config).train(job)
    ran = []
    monkeypatch.setattr(training, "run", lambda trainer, job: ran.append(type(trainer).__name__) or run(trainer, job))
    monkeypatch.setattr(training, "report", report)
    Progressive(config).train(job)
    assert ran == ["DistillationTrainer"]
    for (name, one), two in zip(weights(pure, whole.out).items(), weights(pure, job.out).values(), strict=True):
        assert torch.equal(one, two), name
    assert job.emit.facts["training_tokens"] == whole.emit.facts["training_tokens"]


def test_pairs_are_collated_chosen_first_with_their_prompts_masked(pairs, teacher):
    words = teacher.backend.tokenizer(teacher.path)
    data = read_pairs(pairs, words, 96)
    batch = collate_pairs([data[0], data[1]])
    assert batch["input_ids"].shape == batch["answers"].shape == batch["attention_mask"].shape
    row = json.loads((pairs / "data.jsonl").read_text().splitlines()[0])
    for place, side in ((0, "chosen"), (2, "rejected")):
        answer = batch["answers"][place]
        assert words.decode(answer[answer != IGNORED].tolist()) == f"{row[side]} </s>"
    assert int((batch["labels"] != IGNORED).sum()) == 2


def test_pairs_without_an_answer_in_the_context_are_counted_or_refused(pairs, teacher, tmp_path):
    words = teacher.backend.tokenizer(teacher.path)
    file = tmp_path / "pairs.jsonl"
    short = {"prompt": "ask coal ", "chosen": "tea .", "rejected": "salt ."}
    file.write_text(json.dumps(short) + "\n" + json.dumps({**short, "prompt": "a " * 20}) + "\n")
    data = read_pairs(file, words, 8)
    assert (len(data), data.dropped) == (1, 1)
    with pytest.raises(MambabenchError, match="within context = 2"):
        read_pairs(file, words, 2)


def test_slices_change_no_log_probability(pairs, hybrid):
    module = hybrid.backend.module(hybrid.path)
    data = read_pairs(pairs, hybrid.backend.tokenizer(hybrid.path), 96)
    batch = collate_pairs([data[index] for index in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(*(answer_logprob(module, module, batch, size) for size in (0, 3)))


def test_dpo_begins_at_log_2_and_widens_the_margin(start, pairs, hybrid):
    job = start("job", pairs)
    Dpo(DpoConfig(data="data", epochs=20, batch=4, lr=5e-3, warmup=0, beta=1.0)).train(job)
    losses = job.emit.of("loss")
    assert (losses[0]["dpo"], losses[0]["margin"], losses[0]["accuracy"]) == (pytest.approx(0.6931, abs=1e-3), 0, 0)
    assert losses[-1]["margin"] > 0.5
    assert losses[-1]["accuracy"] > 0.8
    assert losses[-1]["dpo"] < 0.6
    assert changed(hybrid, job.out)
    assert job.emit.facts["weight_per_pair_dpo"] == 1
    assert (job.emit.facts["pairs"], job.emit.facts["pairs_dropped"]) == (12, 0)


def test_a_reference_that_was_asked_beforehand_says_the_same(start, pairs):
    records = []
    for precompute in (False, True):
        job = start(str(precompute), pairs)
        config = DpoConfig(
            data="data", batch=8, accumulation=2, epochs=2, lr=1e-3, reference="teacher", precompute=precompute
        )
        Dpo(config).train(job)
        records.append(job.emit.of("loss"))
        assert (job.scratch / "reference.pt").is_file() == precompute
    assert len(records[0]) == 3
    for one, two in zip(*records, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_killed_stage_may_go_on_with_a_reference_that_is_asked_beforehand(start, pairs, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE", math.inf)
    options = {"data": "data", "batch": 8, "epochs": 4, "lr": 1e-3, "reference": "teacher"}
    whole, job = start("whole", pairs), start("killed", pairs, checkpoint_s=0.0)
    Dpo(DpoConfig(**options)).train(whole)
    losses = PreferenceTrainer.losses

    def killed(self, model, inputs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return losses(self, model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "losses", killed)
        with pytest.raises(KeyboardInterrupt):
            Dpo(DpoConfig(**options)).train(job)
    assert not (job.scratch / "reference.pt").exists()
    Dpo(DpoConfig(**options, accumulation=4, precompute=True)).train(job)
    assert (job.scratch / "reference.pt").is_file()
    assert [record["step"] for record in job.emit.of("loss")] == list(range(1, 7))
    for one, two in zip(whole.emit.of("loss"), job.emit.of("loss"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_the_teacher_as_reference_gives_another_start(start, pairs):
    job = start("job", pairs)
    Dpo(DpoConfig(data="data", batch=4, reference="teacher", beta=1.0)).train(job)
    assert job.emit.of("loss")[0]["margin"] != 0
    with pytest.raises(MambabenchError, match='"teacher" needs a teacher'):
        Dpo(DpoConfig(data="data", reference="teacher")).train(start("alone", pairs, teacher=None))


def test_a_batch_of_pairs_equals_two_accumulated_halves(start, pairs, hybrid):
    norms = []
    for accumulation in (1, 2):
        job = start(str(accumulation), pairs)
        Dpo(DpoConfig(data="data", batch=12, accumulation=accumulation, clip=1e9, reference="teacher")).train(job)
        norms.append(job.emit.of("loss")[0]["gradient_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SftConfig(data="d", tokens=1, ce=0, kl=0), "ce and kl are both 0"),
        (lambda: SftConfig(data="d", tokens=1, kl_kind="js", js_beta=1.0), "js_beta is 1.0"),
        (lambda: SftConfig(data="d", tokens=1, train=()), "train is empty"),
        (lambda: ProgressiveConfig(data="d", tokens=1, align_tokens=-1), "align_tokens is -1"),
        (lambda: ProgressiveConfig(data="d", tokens=1, sets=((0,),)), "stepwise"),
        (lambda: DpoConfig(data="d", beta=0), "beta is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mixers_are_found_by_their_place(hybrid):
    module = hybrid.backend.module(hybrid.path)
    assert (sorted(mixers(module, "mamba")), sorted(mixers(module, "self_attn"))) == ([0], [1])
    numbers = choose_trained(module, ("mixers",), "half")
    assert numbers == sum(tensor.numel() for tensor in mixers(module, "mamba")[0].parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 16])
def test_stages_train_fp32_weights_under_bf16_on_a_gpu(start, text, pairs, pure, size):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    stages = {
        "together": (text, Progressive, ProgressiveConfig(data="data", tokens=1500, align_tokens=1500, slice=size)),
        "stepwise": (text, Progressive, ProgressiveConfig(data="data", tokens=6000, schedule="stepwise", slice=size)),
        "sft": (text, Sft, SftConfig(data="data", tokens=1500, kl=1.0, slice=size)),
        "dpo": (pairs, Dpo, DpoConfig(data="data", epochs=4, slice=size)),
    }
    for name, (data, distiller, config) in stages.items():
        job = start(name, data, parent=pure, device="cuda:0")
        distiller(config).train(job)
        assert changed(pure, job.out)
        assert all(tensor.isfinite().all() for tensor in weights(pure, job.out).values())
        assert all(tensor.dtype == torch.float32 for tensor in weights(pure, job.out).values())
        assert job.emit.facts["training_gpu"] > 0
        assert all(math.isfinite(value) for loss in job.emit.of("loss") for value in loss.values())
