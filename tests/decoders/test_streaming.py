"""Text in pieces, rounds that the host sees late, and rows that ended meanwhile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import StandardConfig
from mambabench.decoders.results import Results
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.decoders.texts import Texts
from mambabench.harness.answers import Pieces, make_answer
from mambabench.harness.conformance_decoders import answer_with_records, check_answers, check_decoder, check_records
from mambabench.harness.interfaces import Answer, Limits, Prompt, silent
from mambabench.harness.mockmodel import MockStepper
from mambabench.kernels.rounds import finish

prompt_lists = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=9), min_size=1, max_size=4)
decoders = st.one_of(
    st.builds(lambda look: StandardDecoder(StandardConfig(look=look)), st.integers(1, 5)),
    st.builds(
        lambda k, look, window: SpeculativeDecoder(NgramDraft(), k, look=look, window=window),
        st.integers(1, 5),
        st.integers(1, 5),
        st.sampled_from([0, 1, 3]),
    ),
)
limit_sets = st.builds(
    Limits,
    new_tokens=st.integers(1, 20),
    stop_tokens=st.sampled_from([(), (0,), (0, 3, 5)]),
    stop_strings=st.sampled_from([(), ("ab",), ("a", "gf", "dcd"), ("b$", "aaa")]),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 5),
)


@settings(deadline=None, max_examples=100)
@given(prompt_lists, decoders, limit_sets, st.integers(0, 20))
def test_pieces_add_up_to_the_text_however_late_the_host_looks(prompts, decoder, limits, seed):
    model = MockStepper(seed=seed)
    requests = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    wanted = StandardDecoder().generate(model, requests, limits, silent)
    shown = [""] * len(prompts)
    records = []

    def on_text(row, piece):
        assert piece
        shown[row] += piece
        assert wanted[row].text.startswith(shown[row])

    def emit(kind, /, **fields):
        records.append({"kind": kind, **fields})

    answers = decoder.generate(model, requests, limits, emit, on_text=on_text)
    assert answers == wanted
    assert shown == [answer.text for answer in answers]
    check_answers(answers, requests, limits, model)
    check_records(records, answers)


def test_a_decoder_that_looks_rarely_conforms():
    check_decoder(SpeculativeDecoder(NgramDraft(), 3, look=3))


def test_what_became_known_at_once_is_one_burst():
    decoder = StandardDecoder(StandardConfig(look=4))
    model = MockStepper()
    answers, records = answer_with_records(decoder, model, [Prompt((1, 2))], Limits(new_tokens=10))
    assert [r["tokens"] for r in records] == [1, 4, 4, 1]
    assert len(answers[0].ids) == model.calls == 10


def test_to_look_once_for_all_rounds_takes_no_memory_for_more_rounds():
    request, limits = [Prompt((1, 2))], Limits(new_tokens=10)
    rarely = StandardDecoder(StandardConfig(look=10**30))
    assert rarely.generate(MockStepper(), request, limits, silent) == StandardDecoder().generate(
        MockStepper(), request, limits, silent
    )


def test_text_is_shown_as_soon_as_nothing_can_change_it():
    shown = []
    limits = Limits(new_tokens=8)
    StandardDecoder().generate(
        MockStepper(), [Prompt((1,))], limits, silent, on_text=lambda row, piece: shown.append(piece)
    )
    assert [len(piece) for piece in shown] == [1] * 8


class Bytes:
    """A tokenizer whose tokens are bytes; special ones are above them; the first space of a text is left out."""

    eos_token_id, bos_token_id = 256, None

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens=False):
        parts = bytearray()
        for token in ids:
            parts += b"" if token > 255 and skip_special_tokens else b"<end>" if token > 255 else bytes([token])
        return parts.decode(errors="replace").removeprefix(" ")


@settings(deadline=None)
@given(
    st.text("aé€😀 b", max_size=6),
    st.text("aé€😀 b", min_size=1, max_size=8),
    st.lists(st.text("ab é", min_size=1, max_size=3), max_size=2),
    st.data(),
)
def test_no_piece_has_half_a_character_or_part_of_a_stop_string(prompt, text, stops, data):
    tokenizer = Bytes()
    ids = tokenizer.encode("x" + prompt)
    cut = min((at + len(stop) for stop in stops if (at := text.find(stop)) >= 0), default=None)
    new = tokenizer.encode(text[:cut])
    limits = Limits(new_tokens=len(new), stop_strings=tuple(stops))
    pieces, given, shown = Pieces(ids, limits, tokenizer), 0, ""
    while given < len(new):
        given = data.draw(st.integers(given + 1, len(new)))
        piece = pieces.more(new[:given], finished=given == len(new))
        assert "\N{REPLACEMENT CHARACTER}" not in piece
        shown += piece
    answer = make_answer(new, limits, tokenizer)
    assert shown in (answer.text, " " + answer.text)
    if not stops and text != " ":  # of a lone space the answer has nothing
        assert prompt + shown == prompt + text


def test_a_model_with_its_own_loop_is_shown_whole():
    class Own(MockStepper):
        traits = frozenset({"generate"})

        def generate(self, prompts, limits, emit):
            return [Answer((1,), "a", "length")]

    shown = []
    StandardDecoder().generate(
        Own(), [Prompt((1,))], Limits(new_tokens=1), silent, on_text=lambda row, piece: shown.append((row, piece))
    )
    assert shown == [(0, "a")]


def test_a_text_that_ended_stays_as_it_is():
    prompts = [Prompt((1, 2)), Prompt((1,)), Prompt((1,))]
    texts, results = Texts(3, 12, (9,), "cpu", drafts=1), Results(3, 2, 2, "cpu")
    texts.begin(prompts, Limits(new_tokens=5, stop_tokens=(9,)))
    tokens, real = torch.tensor([[4, 9, 5], [4, 5, 9], [3, 3, 3]]), torch.tensor([2, 2, 2])
    accepted = torch.tensor([2, 1, 2])
    finish(tokens, tokens[:, :2], real, texts.rows, results.ring, accepted=accepted)
    assert texts.length.tolist() == [4, 3, 4]
    assert texts.running.tolist() == [False, True, True]
    with texts.held():
        finish(tokens, tokens[:, :2], real, texts.rows, results.ring, accepted=accepted)
    assert texts.length.tolist() == [4, 3, 4]
    finish(tokens, tokens[:, :2], real, texts.rows, results.ring, accepted=accepted)
    assert texts.length.tolist() == [4, 5, 6]
    assert texts.running.tolist() == [False, True, False]
    assert texts.inputs.ids(0, 2).tolist() == [[4, 9], [4, 5], [3, 3]]
    assert texts.inputs.positions.tolist() == [[2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert texts.inputs.positions.dtype == torch.int32


def test_a_round_that_fails_while_texts_are_held_leaves_them_running():
    texts = Texts(1, 12, (), "cpu")
    texts.begin([Prompt((1, 2))], Limits(new_tokens=5))
    with pytest.raises(KeyboardInterrupt), texts.held():
        raise KeyboardInterrupt
    assert texts.running.tolist() == [True]


def test_texts_serve_one_request_after_the_other():
    texts = Texts(2, 12, (), "cpu")
    for prompts in ([Prompt((1, 2, 3)), Prompt((4,))], [Prompt((5,), 7), Prompt((6, 7), 8)]):
        limits = Limits(new_tokens=5, seed=len(prompts[0].ids))
        texts.begin(prompts, limits)
        fresh = Texts(2, 12, (), "cpu")
        fresh.begin(prompts, limits)
        for one, two, prompt in zip(texts.ids, fresh.ids, prompts, strict=True):
            assert one[: len(prompt.ids)].tolist() == two[: len(prompt.ids)].tolist() == list(prompt.ids)
        assert texts.length.tolist() == [len(prompt.ids) for prompt in prompts]
        assert torch.equal(texts.stream, fresh.stream)
        assert torch.equal(texts.full, texts.length + 5)
        assert texts.running.all()
        texts.running[0] = False
