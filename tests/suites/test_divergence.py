"""KL(teacher || model) per token, held against its definition in fp64 on whole documents."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from mambabench.harness.documents import encode_document, read_documents
from mambabench.harness.interfaces import Artifact, Bench, MambabenchError, Subject, Unsupported
from mambabench.harness.mockmodel import MockTokenizer
from mambabench.harness.suites import divergence as suite
from mambabench.harness.suites.configs import DivergenceConfig
from mambabench.harness.suites.divergence import Divergence, divergence
from torch import nn

LETTERS = "abcdefg"


class Causal(nn.Module):
    """Logits that depend on all tokens before: a running mean of embeddings, through a layer."""

    def __init__(self, seed: int, vocab: int = len(LETTERS) + 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(vocab, 16), nn.Linear(16, vocab)

    def forward(self, input_ids, use_cache=None):
        mixed = self.embedding(input_ids).cumsum(1) / torch.arange(
            1, input_ids.shape[1] + 1, device=input_ids.device
        ).unsqueeze(1)
        return SimpleNamespace(logits=self.head(mixed.tanh()))


class Folders:
    """A backend whose folder names are seeds."""

    def __init__(self, room: int = 64, vocab: int = len(LETTERS) + 1) -> None:
        self.room, self.vocab = room, vocab

    def describe(self, path):
        return {"max_context": self.room}

    def tokenizer(self, path):
        return MockTokenizer(LETTERS)

    def module(self, path):
        return Causal(int(path.name), self.vocab)


def run(tmp_path, texts, seed=1, backend=None, context=32, device="cpu", **options):
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    records = []
    model = Artifact("half", tmp_path / str(seed), backend or Folders())
    bench = Bench(
        subject=Subject(model, "", None, device, "float32"),
        reference=None,
        data={"text": data},
        seed=0,
        scratch=tmp_path,
        emit=lambda kind, /, **fields: records.append({"kind": kind, **fields}),
        models={"teacher": Artifact("teacher", tmp_path / "0", Folders())},
    )
    Divergence(DivergenceConfig(data="text", context=context, **options)).run(bench)
    return data, [record for record in records if record["kind"] == "sample"]


TEXTS = ["abcabcgg", "a", "gfedcba" * 3, "bb"]


@pytest.mark.parametrize("batch", [1, 3])
def test_values_are_those_of_the_definition(tmp_path, batch, monkeypatch):
    monkeypatch.setattr(suite, "LOGITS_AT_A_TIME", 20)
    data, samples = run(tmp_path, TEXTS, context=9, batch=batch)
    teacher, student = (Causal(seed).double().requires_grad_(False) for seed in (0, 1))
    for document, sample in zip(read_documents(data), samples, strict=True):
        ids, context = encode_document(document, MockTokenizer(LETTERS))
        assert (sample["item"], sample["metric"]) == (document.item, "kl_per_token")
        assert sample["weight"] == len(ids) - context
        total = 0.0
        for place in range(context, len(ids)):
            begin = (place - 1) // 8 * 8
            shown = torch.tensor([ids[begin:place]])
            p, q = (model(shown).logits[0, -1].log_softmax(-1) for model in (teacher, student))
            total += float((p.exp() * (p - q)).sum())
        assert sample["value"] == pytest.approx(total, abs=1e-6 * sample["weight"])


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_does(tmp_path):
    """To a millionth of a nat a token: nothing on the way is in less than fp32, TF32 included."""
    texts = [text * 40 for text in TEXTS]
    (_, here), (_, there) = (run(tmp_path, texts, batch=3, device=device) for device in ("cpu", "cuda"))
    for one, other in zip(here, there, strict=True):
        assert one["item"] == other["item"]
        assert one["value"] / one["weight"] == pytest.approx(other["value"] / other["weight"], abs=1e-6)


def test_the_teachers_own_divergence_is_nothing(tmp_path):
    _, samples = run(tmp_path, TEXTS, seed=0)
    assert [sample["value"] for sample in samples] == [0.0] * len(TEXTS)


def test_rounding_is_below_a_millionth_of_a_nat():
    generator = torch.Generator().manual_seed(0)
    theirs = 4 * torch.randn(2000, 8192, generator=generator)
    for distance in (0.0, 0.01, 0.5):
        own = theirs + distance * torch.randn(theirs.shape, generator=generator)
        exact = divergence(theirs.double(), own.double())
        found = divergence(theirs, own).double()
        assert abs(float((found - exact).mean())) < 1e-7
        assert float((found - exact).abs().max()) < 1e-5


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="half has 8"):
        run(tmp_path, TEXTS, backend=Folders(room=8), context=10)
    with pytest.raises(Unsupported, match="the teacher has 8 tokens, the model 12"):
        run(tmp_path, TEXTS, backend=Folders(vocab=12))
    with pytest.raises(MambabenchError, match="no documents"):
        run(tmp_path, [])


def test_only_so_many_documents_are_read(tmp_path):
    _, all_ = run(tmp_path, TEXTS)
    _, few = run(tmp_path, TEXTS, limit=2)
    assert [sample["item"] for sample in few] == [sample["item"] for sample in itertools.islice(all_, 2)]
