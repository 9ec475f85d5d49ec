"""A step's operations, counted by hand and against what torch counts."""

import copy

import pytest
import torch
from mambabench.distillers.flops import Work, peak, step, work_of
from mambabench.distillers.mixers import choose_trained
from mambabench.harness.interfaces import Unsupported
from torch.utils.flop_counter import FlopCounterMode

WORK = Work(tokens=20, targets=20, documents=[(4, 2), (12, 1)])
PAIRS = 2 * 10 + 78


@pytest.fixture
def pair(hybrid, teacher):
    """Layer 0 is Mamba-2, layer 1 attention; E = 16, MLP 16, 2 heads of 8, 1 KV head."""
    return hybrid.backend.module(hybrid.path), teacher.backend.module(teacher.path).requires_grad_(False)


def shapes(words):
    """Weights of: the Mamba mixer in and out, attention in and out, gate and up, down, the head."""
    return 16 * (16 + 8 + 8 + 16 + 2), 16 * 16, 16 * (16 + 8 + 8), 16 * 16, 2 * 16 * 16, 16 * 16, words * 16


def test_mixers_alone_are_counted_as_by_hand(pair):
    student, teacher = pair
    choose_trained(student, ("mixers",), "half")
    into, out, qkv, o, up, down, head = shapes(student.config.vocab_size)
    scan, attention = 5 * 20 * 2 * 8 * 8, 4 * PAIRS * 16
    flops = step(student, teacher, WORK)
    assert flops.student == 2 * 20 * (into + out + qkv + o + 2 * (up + down) + head) + scan + attention
    assert flops.teacher == 2 * 20 * (2 * (qkv + o + up + down) + head) + 2 * attention
    # What goes into the first mixer needs no gradient: nothing trained stands before it.
    assert flops.inputs == 2 * 20 * (out + qkv + o + 2 * (up + down) + head) + 2 * (scan + attention)
    assert flops.weights == 2 * 20 * (into + out)
    assert flops.total == flops.student + flops.teacher + flops.inputs + flops.weights


def test_no_gradient_flows_below_what_is_trained(pair):
    student, _ = pair
    choose_trained(student, ("*.layers.1.mlp.down_proj.*",), "half")
    *_, down, head = shapes(student.config.vocab_size)
    flops = step(student, None, WORK)
    assert (flops.inputs, flops.weights, flops.teacher) == (2 * 20 * head, 2 * 20 * down, 0)


TRAINED = [("mixers",), ("all",), ("*.layers.1.mlp.*",), ("*.layers.0.mlp.up_proj.*", "model.norm.*"), ("lm_head.*",)]


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("trained", TRAINED, ids=str)
def test_matrix_products_are_those_that_torch_counts(pair, trained, untied):
    student, teacher = pair
    if untied:
        student.lm_head.weight = copy.deepcopy(student.lm_head.weight)
    elif trained == ("lm_head.*",):
        trained = ("*.embed_tokens.*",)
    choose_trained(student, trained, "half")
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(20).view(1, 20)
        teacher(input_ids=ids)
        student(input_ids=ids).logits.sum().backward()
    counts = {str(kernel): number for kernel, number in counter.get_flop_counts()["Global"].items()}
    products = sum(number for kernel, number in counts.items() if kernel in ("aten.mm", "aten.addmm"))
    nothing_between = step(student, teacher, Work(tokens=20, targets=20, documents=[]))
    scans = 5 * 20 * 2 * 8 * 8 * (3 if trained[0] in ("mixers", "all", "*.embed_tokens.*") else 1)
    assert products == nothing_between.total - scans


def test_a_window_bounds_what_is_read():
    work = Work(tokens=12, targets=12, documents=[(12, 1), (3, 2)])
    read = sum(min(t + 1, 4) for size in (12, 3, 3) for t in range(size))
    assert work.pairs(4) == read
    assert work.pairs() == 78 + 2 * 6


def test_documents_are_found_in_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 0, 1, 2, 3, 4]])
    work = work_of(positions, torch.tensor([8, 5]), torch.tensor([6, 2]), windows=4)
    assert (work.tokens, work.targets) == (26, 16)
    assert dict(work.documents) == {1: 2, 2: 4, 3: 2, 5: 2}


def test_the_speed_of_a_gpu_is_known_by_its_name_or_not_at_all():
    assert peak("NVIDIA H200") == peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA GeForce RTX 4090") is None


def test_a_model_whose_parts_are_unknown_is_refused():
    with pytest.raises(Unsupported, match="Linear: only the work of layers"):
        step(torch.nn.Linear(2, 2), None, WORK)
