"""In which precision weights are held while they are trained, and that nothing of it is in what is saved."""

import shutil
from pathlib import Path

import pytest
import torch
from mambabench.distillers import training
from mambabench.distillers.distillation import load_frozen
from mambabench.distillers.mixers import choose_trained
from mambabench.distillers.placement import gather, gather_states, lighten, restored, spread, spread_states
from mambabench.distillers.plugin import ProgressiveConfig, SftConfig
from mambabench.distillers.progressive import Progressive
from mambabench.distillers.sft import Sft
from mambabench.harness.interfaces import Artifact, MambabenchError
from safetensors.torch import load_file, save_file

EXACT = ("A_log", "D", "dt_bias")
"""Of a mixer, in fp32 in every precision."""


@pytest.mark.parametrize("wanted", ["mixers", "*.mlp.*", "all"])
def test_frozen_weights_are_bf16_but_for_those_that_stay_exact(hybrid, wanted):
    model = hybrid.backend.module(hybrid.path)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    choose_trained(model, (wanted,), "half")
    lighten(model, "cuda:0")
    for name, weight in model.named_parameters():
        exact = weight.requires_grad or name.rpartition(".")[2] in EXACT
        assert weight.dtype == (torch.float32 if exact else torch.bfloat16), name
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_was_rounded_is_saved_as_it_was(make_job, hybrid):
    before = hybrid.backend.module(hybrid.path)
    model = hybrid.backend.module(hybrid.path)
    choose_trained(model, ("mixers",), "half")
    lighten(model, "cuda:0")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    job = make_job(parent=hybrid, backend=hybrid.backend)
    training.save(job, model)
    saved = dict(hybrid.backend.module(job.out).named_parameters())
    rounded = 0
    for name, weight in before.named_parameters():
        trained = ".mamba." in name
        assert torch.equal(saved[name], weight + 1 if trained else weight), name
        rounded += not trained and not torch.equal(weight, weight.bfloat16().float())
    assert rounded > 3


def test_a_checkpoint_of_another_training_is_refused(hybrid):
    model = hybrid.backend.module(hybrid.path)
    choose_trained(model, ("mixers",), "half")
    tensors = gather(model, keep=True)
    spread(model, tensors)
    choose_trained(model, ("all",), "half")
    with pytest.raises(MambabenchError, match="trained in only one of them"):
        spread(model, tensors)
    with pytest.raises(MambabenchError, match="has no model\\.other"):
        restored(hybrid, {"model.other": torch.zeros(1)})


def test_an_optimiser_comes_back_as_it_was():
    def stepped():
        weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
        optimizer = torch.optim.AdamW(
            [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], fused=True
        )
        return weights, optimizer

    (one, first), (two, second) = stepped(), stepped()
    for step in range(4):
        for weights, optimizer in ((one, first), (two, second)):
            for weight in weights:
                weight.grad = torch.full_like(weight, 1.0 + step)
            optimizer.step()
        if step == 1:
            kept = gather_states(second, keep=True)
            two, second = stepped()
            with torch.no_grad():
                for weight, value in zip(two, one, strict=True):
                    weight.copy_(value)
            spread_states(second, kept)
    assert all(torch.equal(weight, other) for weight, other in zip(one, two, strict=True))


def test_a_model_of_which_ranks_hold_parts_is_a_view_of_its_files_until_then(hybrid, tmp_path, monkeypatch):
    """For a GPU in bf16 and on the CPU all the same; no process has a copy of what the files have in bf16."""
    folder = tmp_path / "halved"
    shutil.copytree(hybrid.path, folder)
    file = folder / "model.safetensors"
    before = load_file(file)
    save_file({name: tensor.bfloat16() for name, tensor in before.items()}, file)
    artifact = Artifact("halved", folder, hybrid.backend)
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = load_frozen(artifact, "cuda:0", "fsdp")
    begins, ends = zip(*mapping_of(file), strict=True)
    exact = 0
    for name, weight in model.named_parameters():
        at, kept = weight.data_ptr(), name.rpartition(".")[2] in EXACT
        exact += kept
        assert weight.device.type == "cpu"
        assert weight.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert any(begin <= at < end for begin, end in zip(begins, ends, strict=True)) != kept, name
        assert torch.equal(weight, before[name].bfloat16().to(weight.dtype)), name
        assert not weight.requires_grad
    assert exact == len(EXACT)


def mapping_of(file):
    """Where this process has a file in its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if line.endswith(str(file))]


@pytest.mark.parametrize("stage", ["sft", "progressive"])
def test_recomputing_activations_changes_no_weight(make_job, write_tiny, teacher, hybrid, stage):
    """Bit for bit: the same operations run once more in the same order."""
    text = write_tiny(documents=8)
    found = []
    for checkpointing in (False, True):
        options = {"data": "data", "tokens": 1200, "batch": 4, "checkpointing": checkpointing}
        job = make_job(
            f"{stage}-{checkpointing}", data={"data": text}, parent=hybrid, teacher=teacher, backend=hybrid.backend
        )
        if stage == "sft":
            Sft(SftConfig(kl=1.0, **options)).train(job)
        else:
            Progressive(ProgressiveConfig(align_tokens=400, **options)).train(job)
        found.append((load_file(job.out / "model.safetensors"), job.emit.of("loss")))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(weight, found[1][0][name]) for name, weight in found[0][0].items())


def test_a_model_that_cannot_recompute_is_refused():
    with pytest.raises(MambabenchError, match="Linear has no activation checkpointing"):
        training.recompute(torch.nn.Linear(2, 2))


@pytest.mark.gpu
def test_recomputing_needs_less_memory_and_frozen_weights_half_of_theirs(make_job, write_tiny, teacher, hybrid):
    """On a GPU, where trained weights are fp32, frozen ones bf16, and what is saved is fp32 and the parent's."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    text, peaks = write_tiny(documents=400), []
    for checkpointing in (False, True):
        options = {"data": "data", "tokens": 60_000, "context": 96, "batch": 64, "checkpointing": checkpointing}
        fields = {"parent": hybrid, "teacher": teacher, "backend": hybrid.backend, "device": "cuda:0"}
        job = make_job(str(checkpointing), data={"data": text}, **fields)
        Progressive(ProgressiveConfig(**options)).train(job)
        peaks.append(job.emit.facts["peak_memory"])
        before, after = load_file(hybrid.path / "model.safetensors"), load_file(job.out / "model.safetensors")
        for name, weight in before.items():
            assert torch.equal(weight, after[name]) == (".mamba." not in name), name
    assert peaks[1] < 0.9 * peaks[0]
