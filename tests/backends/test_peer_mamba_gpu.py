"""On a GPU: mamba-ssm's own model and ours of the same weights say the same."""

import pytest
import torch
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.peer_mamba import MambaSsmBackend
from mambabench.backends.plugin import MambaSsmConfig, TeacherConfig
from mambabench.distillers.random_configs import RandomMambaConfig
from mambabench.distillers.random_mamba import RandomMamba
from mambabench.harness.interfaces import Job, Limits, Prompt, silent

pytestmark = pytest.mark.gpu


def test_logits_and_text_are_those_of_our_engine(tmp_path):
    pytest.importorskip("mamba_ssm")
    ours, peer = TeacherBackend(TeacherConfig()), MambaSsmBackend(MambaSsmConfig())
    job = Job(
        seed=0, device="cuda:0", data={}, models={}, teacher=None, parent=None, backend=ours,
        scratch=tmp_path, out=tmp_path / "ours", emit=silent,
    )  # fmt: skip
    RandomMamba(RandomMambaConfig(layers=4, hidden=512, vocabulary=300, init=0.06, dtype="float32")).train(job)
    peer.convert(tmp_path / "ours", [], tmp_path / "theirs", seed=0)
    own, theirs = ours.load(tmp_path / "ours", "cuda:0", "float32"), peer.load(tmp_path / "theirs", "cuda:0", "float32")
    ids = torch.randint(3, 250, (2, 40), device="cuda:0", generator=torch.Generator("cuda:0").manual_seed(0))
    lengths = torch.tensor([40, 40], dtype=torch.int32, device="cuda:0")
    said, wanted = own.score(ids, lengths), theirs.score(ids, lengths)
    torch.testing.assert_close(said.logprob, wanted.logprob, rtol=0, atol=2e-2)
    prompts = [Prompt(tuple(row)) for row in ids[:, :8].tolist()]
    for answer, prompt in zip(theirs.generate(prompts, Limits(new_tokens=24), silent), prompts, strict=True):
        text = torch.tensor([prompt.ids + answer.ids], device="cuda:0")
        gap = own.score(text, torch.tensor([text.shape[1]], dtype=torch.int32, device="cuda:0")).gap
        assert gap is not None
        assert gap[0, 7:].max() < 2e-2
