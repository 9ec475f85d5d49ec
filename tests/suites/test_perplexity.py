import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.harness.documents import Document
from mambabench.harness.interfaces import Artifact, Bench, MambabenchError, Subject, Unsupported
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.configs import PerplexityConfig
from mambabench.harness.suites.perplexity import Perplexity, scored_bytes
from mambabench.harness.suites.windows import disjoint, packed, sliding
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


def nll(model: MockStepper, ids: list[int], context: int, longest: int = 10**6) -> float:
    """By definition: -log softmax of each scored token, given what its window shows before it."""
    total = 0.0
    for place in range(context, len(ids)):
        begin = (place - 1) // (longest - 1) * (longest - 1)
        logits = model.logits(ids[begin:place])
        total += math.log(np.exp(logits).sum()) - logits[ids[place]]
    return total


def samples(records, metric):
    return [(r["value"], r["weight"]) for r in records if r["kind"] == "sample" and r["metric"] == metric]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_values_are_those_of_the_definition(measure, bos, batch):
    texts = ["abc", "gfedcbaabcdefg", "a", "bb", "cacacacacacaca"]

    def make():
        return MockStepper(bos=bos)

    suite = Perplexity(PerplexityConfig(data="text", context=6, batch=batch))
    records = measure(suite, texts, make=make)
    model = make()
    lead = model.tokenizer.bos_token_id if bos else model.tokenizer.eos_token_id
    encoded = [[lead, *model.tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    assert [weight for _, weight in samples(records, "nll_per_token")] == [len(text) for text in texts]
    assert [weight for _, weight in samples(records, "nll_per_byte")] == [len(text) for text in texts]
    for (value, _), ids in zip(samples(records, "nll_per_token"), encoded, strict=True):
        assert value == pytest.approx(nll(model, ids, 1, 6), rel=1e-12)
    assert samples(records, "nll_per_token")[0][0] == samples(records, "nll_per_byte")[0][0]
    assert {r["better"] for r in records if r["kind"] == "sample"} == {"lower"}
    assert len({r["item"] for r in records if r["kind"] == "sample"}) == len(texts)


def test_a_window_may_be_one_longer_than_the_model(measure):
    class Short(MockStepper):
        max_context = 5

    records = measure(Perplexity(PerplexityConfig(data="text", context=6)), ["gfedcbaabcdefg"], make=Short)
    ((value, _),) = samples(records, "nll_per_token")
    assert value == pytest.approx(nll(Short(), [0, *Short().tokenizer.encode("gfedcbaabcdefg")], 1, 6), rel=1e-12)


def test_a_prompt_is_context_only(measure):
    ids = [0, 1, 2, 3, 4, 5]
    records = measure(Perplexity(PerplexityConfig(data="text")), [{"ids": ids, "prompt": 4}])
    ((value, weight),) = samples(records, "nll_per_token")
    assert weight == 2
    assert value == pytest.approx(nll(MockStepper(), ids, 4), rel=1e-12)
    assert samples(records, "nll_per_byte")[0][1] == len("de")


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer as Llama's: pieces that begin with their space, bytes for what is in none, special tokens."""
    vocabulary = ["<s>", "</s>", "<unk>", "▁Lily", "▁ran", "▁a", "way", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], byte_fallback=True))
    space = decoders.Replace("▁", " ")
    words.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return tokenizer, {piece: i for i, piece in enumerate(vocabulary)}


@pytest.mark.parametrize(
    ("context", "scored", "text"),
    [
        (["<s>"], ["▁Lily", "▁ran"], "Lily ran"),
        (["<s>", "▁Lily"], ["▁ran", "▁a", "way"], " ran away"),
        (["<s>", "▁Lily"], ["▁ran", "</s>"], " ran"),
        (["<s>", "▁Lily"], ["</s>"], ""),
        (["<s>", "▁Lily"], ["▁a", "<0xC3>", "<0xA9>"], " aé"),
        (["<s>", "▁Lily", "<0xC3>"], ["<0xA9>", "▁ran"], "é ran"),
    ],
)
def test_bytes_are_those_that_the_scored_tokens_add_to_the_text(pieces, context, scored, text):
    tokenizer, numbers = pieces
    ids = [numbers[piece] for piece in context + scored]
    assert scored_bytes(Document("", tuple(ids)), ids, len(context), tokenizer) == len(text.encode())


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 39), st.integers(2, 12), st.data())
def test_windows_score_every_token_once_with_context(length, context, longest, data):
    context, stride = min(context, length - 1), data.draw(st.integers(1, longest - 1))
    ids = list(range(length))
    for windows, seen in (
        (disjoint(0, ids, context, longest), 1),
        (sliding(0, ids, context, longest, stride), longest - stride),
    ):
        scored = []
        for window in windows:
            ((document, begin, end),) = window.pieces
            assert document == 0
            assert min(seen, window.ids[begin]) <= begin < end == len(window.ids) <= longest
            scored += window.ids[begin:end]
        assert scored == list(range(context, length))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.integers(2, 12))
def test_packed_windows_score_every_token_once_for_its_document(shapes, longest):
    encoded = [([100 * number + place for place in range(length)], min(context, length))
               for number, (length, context) in enumerate(shapes)]  # fmt: skip
    scored = [[] for _ in encoded]
    for window in packed(encoded, longest):
        assert len(window.ids) <= longest
        for document, begin, end in window.pieces:
            assert 1 <= begin < end <= len(window.ids)
            scored[document] += window.ids[begin:end]
    assert scored == [ids[context:] for ids, context in encoded]


def test_sliding_windows_are_those_of_the_definition(measure):
    """Against a sum over single tokens, each with exactly what it sees of a document longer than the context."""
    text, longest, stride = "gfedcbaabcdefgcacabbd", 8, 3
    records = measure(
        Perplexity(PerplexityConfig(data="text", context=longest, windows="sliding", stride=stride)), [text]
    )
    model = MockStepper()
    ids = [0, *model.tokenizer.encode(text)]
    total = 0.0
    for place in range(1, len(ids)):
        moves = max(0, -(-(place + 1 - longest) // stride))
        logits = model.logits(ids[moves * stride : place])
        total += math.log(np.exp(logits).sum()) - logits[ids[place]]
    ((value, weight),) = samples(records, "nll_per_token")
    assert (value, weight) == (pytest.approx(total, rel=1e-12), len(text))


def test_a_stride_of_one_token_gives_each_all_the_context_there_is_room_for(measure):
    config = PerplexityConfig(data="text", context=6, windows="sliding", stride=1)
    records = measure(Perplexity(config), ["gfedcbaabcdefg"])
    model = MockStepper()
    ids = [0, *model.tokenizer.encode("gfedcbaabcdefg")]
    total = 0.0
    for place in range(1, len(ids)):
        logits = model.logits(ids[max(0, place - 5) : place])
        total += math.log(np.exp(logits).sum()) - logits[ids[place]]
    assert samples(records, "nll_per_token")[0][0] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("batch", [1, 4])
def test_packed_documents_see_those_before_them(measure, batch):
    texts, longest = ["abc", "gfedcbaabcdefg", "bb"], 7
    records = measure(Perplexity(PerplexityConfig(data="text", context=longest, windows="packed", batch=batch)), texts)
    model = MockStepper()
    encoded = [[0, *model.tokenizer.encode(text)] for text in texts]
    stream = [token for ids in encoded for token in ids]
    at = 0
    for ids, (value, weight) in zip(encoded, samples(records, "nll_per_token"), strict=True):
        total = 0.0
        for place in range(at + 1, at + len(ids)):
            begin = (place - 1) // (longest - 1) * (longest - 1)
            logits = model.logits(stream[begin:place])
            total += math.log(np.exp(logits).sum()) - logits[stream[place]]
        assert (value, weight) == (pytest.approx(total, rel=1e-12), len(ids) - 1)
        at += len(ids)


def test_a_stride_belongs_to_sliding_windows():
    with pytest.raises(ValueError, match="only sliding windows"):
        PerplexityConfig(data="text", stride=4)
    with pytest.raises(ValueError, match="below context = 8"):
        PerplexityConfig(data="text", windows="sliding", context=8, stride=8)


def test_limits_and_bad_sizes(measure):
    records = measure(Perplexity(PerplexityConfig(data="text", limit=2)), ["ab", "cd", "ef"])
    assert len(samples(records, "nll_per_token")) == 2
    with pytest.raises(Unsupported, match="perplexity: context = 4098 needs 4097 positions, the model has 4096"):
        measure(Perplexity(PerplexityConfig(data="text", context=4098)), ["ab"])
    with pytest.raises(MambabenchError, match="no documents"):
        measure(Perplexity(PerplexityConfig(data="text")), [])


@pytest.mark.parametrize(("windows", "stride"), [("disjoint", 0), ("sliding", 16), ("packed", 0)])
def test_a_real_teacher_scores_as_transformers_does_directly(shared, tmp_path, windows, stride):
    """Token by token, each given what its window shows before it, in transformers' own model."""
    folder, longest = shared / "models" / "stories-260k", 48
    texts = ["Once upon a time there was a little girl named Lily. " * 6, "Tim had a red ball.", "The dog ran. " * 9]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    records = []
    bench = Bench(
        subject=Subject(Artifact("teacher", folder, TeacherBackend(TeacherConfig())), "", None, "cpu", "float32"),
        reference=None,
        data={"text": data},
        seed=0,
        scratch=tmp_path,
        emit=lambda kind, /, **fields: records.append({"kind": kind, **fields}),
    )
    Perplexity(PerplexityConfig(data="text", context=longest, windows=windows, stride=stride)).run(bench)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    encoded = [[1, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    step = stride or longest - 1
    whole, at = [token for ids in encoded for token in ids], 0
    for text, ids, (value, weight), (same, size) in zip(
        texts, encoded, samples(records, "nll_per_token"), samples(records, "nll_per_byte"), strict=True
    ):
        total, stream, first = 0.0, (whole if windows == "packed" else ids), (at if windows == "packed" else 0)
        for place in range(first + 1, first + len(ids)):
            begin = max(0, -(-(place + 1 - longest) // step)) * step
            with torch.inference_mode():
                logits = model(torch.tensor([stream[begin:place]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[stream[place]])
        assert value == pytest.approx(total, rel=1e-5)
        assert (weight, size, same) == (len(ids) - 1, len(text.encode()), value)
        at += len(ids)
