import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.decoders.batch import Row
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.conformance_decoders import answer_with_records, check_answers, check_decoder
from mambabench.harness.interfaces import Answer, Limits, MambabenchError, Prompt
from mambabench.harness.mockmodel import MockStepper, MockTokenizer

prompt_lists = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=9), min_size=1, max_size=4)


def test_standard_decoding_conforms():
    check_decoder(StandardDecoder())


def test_each_token_after_the_prompt_costs_one_call():
    model = MockStepper()
    _, records = answer_with_records(StandardDecoder(), model, [Prompt((1, 2)), Prompt((3,))], Limits(new_tokens=6))
    assert model.calls == 6
    assert [r["tokens"] for r in records] == [1] * 12


@settings(deadline=None)
@given(prompt_lists, st.integers(0, 9), st.sampled_from([(0, 1.0), (3, 1.0), (0, 0.8), (4, 0.6)]))
def test_sampled_text_does_not_depend_on_the_batch(prompts, seed, filters):
    model = MockStepper(seed=seed)
    limits = Limits(new_tokens=8, temperature=0.9, top_k=filters[0], top_p=filters[1], seed=seed, stop_tokens=(0,))
    requests = [Prompt(tuple(ids), row) for row, ids in enumerate(prompts)]
    together, _ = answer_with_records(StandardDecoder(), model, requests, limits)
    backwards, _ = answer_with_records(StandardDecoder(), model, requests[::-1], limits)
    alone = [answer_with_records(StandardDecoder(), model, [request], limits)[0][0] for request in requests]
    assert together == alone == backwards[::-1]


def test_equal_prompts_of_different_sequences_are_sampled_apart():
    limits = Limits(new_tokens=12, temperature=1.0)
    prompts = [Prompt((1, 2), row) for row in range(8)]
    answers, _ = answer_with_records(StandardDecoder(), MockStepper(habit=0.0), prompts, limits)
    assert len({answer.ids for answer in answers}) == 8


def test_a_backend_with_its_own_loop_runs_it():
    class Own(MockStepper):
        traits = frozenset({"generate"})

        def generate(self, prompts, limits, emit):
            return [Answer((1,), "a", "length") for _ in prompts]

    answers, _ = answer_with_records(StandardDecoder(), Own(), [Prompt((1,))], Limits(new_tokens=1))
    assert answers == [Answer((1,), "a", "length")]


@settings(deadline=None, max_examples=200)
@given(
    prompt_lists,
    st.integers(0, 9),
    st.lists(st.text("abc$", min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from([(), (2,)]),
)
def test_text_is_that_of_the_tokens_up_to_a_stop_special_tokens_left_out(prompts, seed, strings, stop_tokens):
    model = MockStepper(seed=seed, letters="abc", habit=0.3)
    limits = Limits(new_tokens=12, stop_tokens=stop_tokens, stop_strings=tuple(strings), temperature=1.5, seed=seed)
    requests = [Prompt(tuple(token % 4 for token in ids), row) for row, ids in enumerate(prompts)]
    answers, _ = answer_with_records(StandardDecoder(), model, requests, limits)
    check_answers(answers, requests, limits, model)


@pytest.mark.parametrize(
    ("strings", "taken", "text"),
    [(("b$",), 4, "a"), (("$",), 2, "a"), (("ab",), 3, ""), (("g", "$b$c"), 5, "a"), (("dd", "g"), 6, "abc")],
)
def test_a_stop_string_may_hold_special_tokens(strings, taken, text):
    row = Row(Prompt((1,)), Limits(new_tokens=6, stop_strings=strings), MockTokenizer("abcdefg"))
    assert row.extend([1, 0, 2, 0, 3, 0]) == taken
    assert row.answer() == Answer((1, 0, 2, 0, 3, 0)[:taken], text, "stop" if strings != ("dd", "g") else "length")


def test_no_prompts_give_no_answers_and_empty_ones_are_refused():
    assert answer_with_records(StandardDecoder(), MockStepper(), [], Limits(new_tokens=1)) == ([], [])
    with pytest.raises(MambabenchError, match="at least one token"):
        answer_with_records(StandardDecoder(), MockStepper(), [Prompt(())], Limits(new_tokens=1))
    with pytest.raises(MambabenchError, match="new_tokens must be at least 1"):
        answer_with_records(StandardDecoder(), MockStepper(), [Prompt((1,))], Limits(new_tokens=0))
