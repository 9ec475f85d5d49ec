import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.plugin import NgramConfig
from mambabench.harness.interfaces import Limits, Prompt
from mambabench.harness.mockmodel import MockStepper

texts = st.lists(st.integers(1, 3), min_size=1, max_size=20)


def by_search(text: list[int], longest: int, shortest: int, k: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if size < len(text) and text[end - size : end] == text[-size:]:
                grown = list(text)
                for place in range(end, end + k):
                    grown.append(grown[place])
                return grown[len(text) :]
    return []


@settings(deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=3),
    st.data(),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_drafts_continue_the_latest_longest_match(prompts, data, shortest, more, k, junk):
    draft = NgramDraft(NgramConfig(longest=shortest + more, shortest=shortest))
    draft.open(MockStepper(), [Prompt(tuple(p)) for p in prompts], Limits(new_tokens=9), k)
    grown = [list(prompt) for prompt in prompts]
    for _ in range(3):
        length = torch.tensor([len(text) for text in grown])
        ids = torch.tensor([text + [junk] * (40 - len(text)) for text in grown])
        drafts, real, q = draft.follow(None, ids, length, k)
        assert q is None
        assert drafts.shape == (len(prompts), k)
        for text, row, count in zip(grown, drafts.tolist(), real.tolist(), strict=True):
            assert row[:count] == by_search(text, shortest + more, shortest, k)
            text.extend(data.draw(st.lists(st.integers(1, 3), max_size=4)))
