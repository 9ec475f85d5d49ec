"""DPO as this project computes it, against TRL's own trainer on the same pairs, student and reference."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mambabench.distillers.dpo import PreferenceTrainer, collate_pairs, read_pairs
from mambabench.distillers.losses import IGNORED
from mambabench.distillers.plugin import DpoConfig

trl = pytest.importorskip("trl")


@pytest.fixture
def pairs(hybrid, write_tiny):
    return read_pairs(write_tiny(part="preferences", documents=5), hybrid.backend.tokenizer(hybrid.path), 96)


@pytest.fixture
def models(hybrid):
    """A reference, and a student that has left it."""
    reference = hybrid.backend.module(hybrid.path).double()
    student = copy.deepcopy(reference).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return student, reference


def parts(pair):
    """The ids of a pair as TRL's collator takes them."""
    (chosen, labels), (rejected, _) = pair
    prompt = int((labels == IGNORED).sum())
    cut = {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}
    return {name: ids.tolist() for name, ids in cut.items()}


@pytest.mark.parametrize("size", [0, 3])
def test_losses_rewards_and_gradients_of_dpo_equal_those_of_trl(hybrid, pairs, models, tmp_path, size):
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    student, reference = models
    config = DpoConfig(data="pairs", beta=0.3, slice=size)
    ours = SimpleNamespace(student=student, reference=reference, config=config)
    # TRL's trainer gives models another forward.
    theirs, asked = copy.deepcopy(student), copy.deepcopy(reference)
    trainer = trl.DPOTrainer(
        theirs,
        ref_model=asked,
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=config.beta, report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=hybrid.backend.tokenizer(hybrid.path),
    )
    wanted = trainer.compute_loss(theirs, DataCollatorForPreference(pad_token_id=0)([*map(parts, pairs.rows)]))
    wanted.backward()
    trainer.log(logged := {})

    sums = PreferenceTrainer.losses(ours, student, collate_pairs(list(pairs)))
    means = {name: value / len(pairs) for name, value in sums.items()}
    means["dpo"].backward()
    # TRL's head computes in fp32.
    assert means["dpo"].item() == pytest.approx(wanted.item(), rel=1e-6)
    assert means["margin"].item() == pytest.approx(logged["rewards/margins"], rel=1e-5)
    assert means["accuracy"].item() == pytest.approx(logged["rewards/accuracies"])
    assert 0 < logged["rewards/accuracies"] < 1
    got = dict(student.named_parameters())
    for name, parameter in theirs.named_parameters():
        largest = parameter.grad.abs().max().item()
        assert largest > 1e-4, name
        torch.testing.assert_close(got[name].grad, parameter.grad, rtol=0, atol=1e-5 * largest)
