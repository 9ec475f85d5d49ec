"""The suite's view of a real teacher against lm-eval's own class on the same folder."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.config import Structurer
from mambabench.harness.interfaces import silent
from mambabench.harness.plugins import build, registry
from mambabench.harness.suites import likelihoods
from mambabench.harness.suites.lm_eval_model import StepperLM

STORY = "Once upon a time there was a little girl named Lily. She liked to play with her dog in the park. "
LONG = STORY * 24
"""Some 700 tokens; the teacher has 512 positions."""
NAMES = ("Lily", "Tim", "The dog")
CONTINUATIONS = [
    ("Once upon a time", " there was"),
    ("", "Once upon"),
    ("Lily went to the park. ", "She saw a dog."),
    (STORY * 12, " The end."),
    (LONG, " dog"),
    (LONG, " dog and a cat"),
    ("a", " " + STORY * 12),
]
TEXTS = [
    ("Once upon a time", {"until": ["."], "max_gen_toks": 40}),
    ("Lily", {"until": [], "max_gen_toks": 30}),
    (LONG, {"until": ["\n"], "max_gen_toks": 20}),
    ("Tim had a ball. ", {"until": [" She", " He"], "max_gen_toks": 60}),
    ("One day,", {"until": "\n\n", "max_gen_toks": 300}),
    ("One day,", {"max_new_tokens": 25}),
    ("Once upon a time", {"until": ["<s>"], "max_completion_tokens": 200}),
]


@pytest.fixture(scope="module")
def ours(shared: Path) -> StepperLM:
    model = TeacherBackend(TeacherConfig()).load(shared / "models" / "stories-260k", "cpu", "float32")
    return StepperLM(model, StandardDecoder(), 4, 0, silent)


@pytest.fixture(scope="module")
def theirs(shared: Path) -> HFLM:
    return HFLM(pretrained=str(shared / "models" / "stories-260k"), batch_size=4, device="cpu", dtype="float32")


def requests(kind: str, arguments: list[tuple[object, ...]]) -> list[Instance]:
    return [Instance(kind, {}, of, number) for number, of in enumerate(arguments)]


def test_likelihoods_are_those_of_lm_eval_also_behind_a_context_that_is_too_long(ours: StepperLM, theirs: HFLM) -> None:
    assert len(ours.tok_encode(LONG)) > ours.model.max_context
    got = ours.loglikelihood(requests("loglikelihood", CONTINUATIONS))
    wanted = theirs.loglikelihood(requests("loglikelihood", CONTINUATIONS), disable_tqdm=True)
    for (value, greedy), (other, other_greedy) in zip(got, wanted, strict=True):
        assert value == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy


def test_windows_are_those_of_lm_eval(ours: StepperLM, theirs: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(text,) for text in ("Once upon a time there was a cat.", STORY * 12, LONG, LONG * 2)]
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    # HFLM would score the beginning-of-text token as well, behind another one.
    encode = theirs.tok_encode
    monkeypatch.setattr(theirs, "tok_encode", lambda text, **options: encode(text, add_special_tokens=False))
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-3)


def test_texts_are_those_of_lm_eval(ours: StepperLM, theirs: HFLM) -> None:
    got = ours.generate_until(requests("generate_until", TEXTS))
    assert got == theirs.generate_until(requests("generate_until", TEXTS), disable_tqdm=True)
    assert len(set(map(len, got))) > 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_hybrid_continues_shared_contexts_as_it_scores_whole_texts(
    device: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = build(Structurer(registry()).choice("backend", {"use": "mamba2-hybrid", "chunk": 16}))
    backend.convert(shared / "models" / "stories-260k", [1, 3], tmp_path / "hybrid", 0)
    lm = StepperLM(backend.load(tmp_path / "hybrid", device, "float32"), StandardDecoder(), 8, 0, silent)
    ends = (" dog", " dog and a cat", " She was happy.", " It was a big red ball that Tim had lost in the park.")
    asked = requests(
        "loglikelihood", [(STORY * times + name, end) for times in (4, 5) for name in NAMES for end in ends]
    )
    together = lm.loglikelihood(asked, disable_tqdm=True)
    assert lm.model.saved > 300
    monkeypatch.setattr(likelihoods, "WORTH", float("inf"))
    whole = lm.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in together] == pytest.approx([value for value, _ in whole], abs=1e-3)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in whole]
