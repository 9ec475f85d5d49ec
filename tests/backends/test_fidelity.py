"""The suite `init-fidelity` measures what it says it measures."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mambabench import Unsupported
from mambabench.backends.fidelity import InitFidelity, divergence
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.plugin import InitFidelityConfig, Mamba2HybridConfig, TeacherConfig
from mambabench.harness.interfaces import Artifact, Bench, Subject

TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w9 w8 w7", "w11 w12 w13 w14 w15 w16", "w20"]


@pytest.fixture
def measure(llama: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Records of a run on a model of a folder."""

    def run(folder: Path, teacher: Path = llama, **options: int) -> list[dict[str, Any]]:
        data = tmp_path / "text.txt"
        data.write_text("\n<|endoftext|>\n".join(TEXTS))
        records: list[dict[str, Any]] = []
        of_teacher = Artifact("teacher", teacher, TeacherBackend(TeacherConfig()))
        bench = Bench(
            subject=Subject(Artifact("model", folder, Mamba2HybridBackend(Mamba2HybridConfig())), "", None, "cpu", ""),
            reference=None,
            data={"text": data},
            seed=0,
            scratch=tmp_path,
            emit=lambda kind, **fields: records.append({"kind": kind, **fields}),
            models={"teacher": of_teacher},
        )
        InitFidelity(InitFidelityConfig(data="text", **options)).run(bench)
        return records

    return run


def facts(records: list[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    return {(record["arm"], record["name"]): record["value"] for record in records if record["kind"] == "fact"}


def test_the_teacher_is_no_distance_from_itself(llama: Path, measure: Callable) -> None:
    records = measure(llama)
    samples = [record for record in records if record["kind"] == "sample"]
    assert [sample["weight"] for sample in samples] == [9, 3, 6, 1]
    assert [sample["value"] for sample in samples] == [0, 0, 0, 0]
    assert facts(records) == {}


def test_distances_are_those_of_the_formula(llama: Path, half: Path, measure: Callable) -> None:
    """Document by document, without a batch, from hidden states that are followed by hand."""
    records = measure(half, batch=2, documents=3, context=6)
    backend = Mamba2HybridBackend(Mamba2HybridConfig())
    teacher, model, tokenizer = backend.module(llama), backend.module(half), backend.tokenizer(llama)
    layer, squares, errors, cosines, tokens = 2, 0.0, 0.0, 0.0, 0
    samples = [record for record in records if record["kind"] == "sample"]
    for sample, text in zip(samples, TEXTS, strict=False):
        ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False)]])[:, :6]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1].double().softmax(-1) for m in (teacher, model))
            h = teacher.model.embed_tokens(ids)
            cos, sin = teacher.model.rope(torch.arange(ids.shape[1]).unsqueeze(0), h)
            for index in range(layer):
                h = teacher.model.layers[index](h, cos, sin, None, None)
            theirs = teacher.model.layers[layer]
            a = theirs.mixer(theirs.input_layernorm(h), cos, sin, None, None)[0]
            y = model.model.layers[layer].mixer(theirs.input_layernorm(h), cos, sin, None, None)[0]
        assert sample["value"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
        squares, errors = squares + float(a.square().sum()), errors + float((y - a).square().sum())
        cosines += float(torch.cosine_similarity(y, a, dim=-1).sum())
        tokens += len(a)
    assert len(samples) == 3
    found = facts(records)
    assert {arm for arm, _ in found} == {"layer 0", "layer 2"}
    assert found["layer 2", "relative_error"] == pytest.approx(math.sqrt(errors / squares), rel=1e-4)
    assert found["layer 2", "cosine"] == pytest.approx(cosines / tokens, rel=1e-4, abs=1e-6)


def test_divergence_is_that_of_the_formula() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.25, 0.25, 0.5])
    want = 0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(p.log().unsqueeze(0) + 3, q.log().unsqueeze(0) - 1) == pytest.approx(want, rel=1e-6)


def test_models_of_other_sizes_are_refused(half: Path, make_llama: Callable[..., Path], measure: Callable) -> None:
    with pytest.raises(Unsupported, match="init-fidelity: the teacher has num_hidden_layers 2, the model 4"):
        measure(half, teacher=make_llama(num_hidden_layers=2))
