"""Divergence and agreement by depth, held against their definitions in fp64, one token at a time."""

import json
from types import SimpleNamespace

import pytest
import torch
from mambabench.harness.documents import encode_document, read_documents
from mambabench.harness.interfaces import Artifact, Bench, Subject
from mambabench.harness.mockmodel import MockTokenizer
from mambabench.harness.suites import divergence as shared
from mambabench.harness.suites.agreement import Agreement
from mambabench.harness.suites.configs import AgreementConfig
from torch import nn

LETTERS = "abcdefg"
TEXTS = ["abcabcgg", "a", "gfedcba" * 3, "bb"]


class Causal(nn.Module):
    """Logits that depend on all tokens before."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(8, 16), nn.Linear(16, 8)

    def forward(self, input_ids, use_cache=None):
        count = torch.arange(1, input_ids.shape[1] + 1).unsqueeze(1)
        return SimpleNamespace(logits=self.head((self.embedding(input_ids).cumsum(1) / count).tanh()))


class Folders:
    """A backend whose folder names are seeds."""

    def describe(self, path):
        return {"max_context": 64}

    def tokenizer(self, path):
        return MockTokenizer(LETTERS)

    def module(self, path):
        return Causal(int(path.name))


def run(tmp_path, seed=1, texts=TEXTS, **options):
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    records = []
    bench = Bench(
        subject=Subject(Artifact("half", tmp_path / str(seed), Folders()), "", None, "cpu", "float32"),
        reference=None,
        data={"text": data},
        seed=0,
        scratch=tmp_path,
        emit=lambda kind, /, **fields: records.append({"kind": kind, **fields}),
        models={"teacher": Artifact("teacher", tmp_path / "0", Folders())},
    )
    Agreement(AgreementConfig(data="text", **{"context": 32, **options})).run(bench)
    found = {(r["item"], r["metric"], r["depth"]): r for r in records if r["kind"] == "sample"}
    return data, found


@pytest.mark.parametrize(("batch", "context"), [(1, 32), (3, 32), (3, 7)])
def test_values_are_those_of_the_definition(tmp_path, batch, context, monkeypatch):
    monkeypatch.setattr(shared, "LOGITS_AT_A_TIME", 40)
    data, found = run(tmp_path, batch=batch, context=context, depths=(2, 5, 9))
    teacher, student = (Causal(seed).double().requires_grad_(False) for seed in (0, 1))
    expected = {}
    for document in read_documents(data):
        ids, begin = encode_document(document, MockTokenizer(LETTERS))
        for place in range(begin, len(ids)):
            depth = max(edge for edge in (1, 2, 5, 9) if edge <= place)
            shown = torch.tensor([ids[(place - 1) // (context - 1) * (context - 1) : place]])
            p, q = (model(shown).logits[0, -1].log_softmax(-1) for model in (teacher, student))
            for metric, value in (
                ("kl_per_token", float((p.exp() * (p - q)).sum())),
                ("top1_per_token", float(p.argmax() == q.argmax())),
            ):
                old, count = expected.get((document.item, metric, depth), (0.0, 0))
                expected[document.item, metric, depth] = old + value, count + 1
    assert found.keys() == expected.keys()
    for where, (value, tokens) in expected.items():
        assert found[where]["value"] == pytest.approx(value, abs=1e-6 * tokens)
        assert found[where]["weight"] == tokens


def test_the_teacher_agrees_with_itself_everywhere(tmp_path):
    _, found = run(tmp_path, seed=0, depths=(4,))
    for (_, metric, _), record in found.items():
        assert record["value"] == (0.0 if metric == "kl_per_token" else record["weight"])


def test_every_token_behind_the_leading_one_has_a_depth(tmp_path):
    _, found = run(tmp_path, texts=["abcdef"], depths=(3,))
    assert {depth: r["weight"] for (_, metric, depth), r in found.items() if metric == "kl_per_token"} == {1: 2, 3: 4}


def test_depths_ascend():
    with pytest.raises(ValueError, match="ascend"):
        AgreementConfig(data="text", depths=(8, 4))
