"""Prompts that are recorded give what they give kernel by kernel, and leave the same behind.

Without a GPU a stand-in runs the recorded work again, on the same buffers, wherever a graph would be started.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from mambabench import MambabenchError
from mambabench.backends import graphs, stepper
from mambabench.backends.config import HybridConfig
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.state import State
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.interfaces import Rollback
from mambabench.harness.mockmodel import MockTokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OWN = {"mamba_heads": 8, "mamba_head_dim": 16, "mamba_states": 16, "mamba_groups": 1, "intermediate_size": 0}
FAMILIES = {
    "attention": (["attention"] * 2, {"qk_norm": True}),
    "sliding": (["attention"] * 2, {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "mamba2": (["mamba2"] * 2, {}),
    "mamba2 with options": (["mamba2", "attention"], {"mamba_rope": True, "mamba_gate_bias": True, "qk_norm": True}),
    "mamba": (["mamba", "attention"], {}),
    "mamba with options": (["mamba", "attention"], {"mamba_rope": True, "mamba_gate_bias": True, "qk_norm": True}),
    "mamba2 and mamba": (["mamba2", "mamba", "attention"], {}),
    "removed": (["none", "mamba2"], {}),
    "mamba-ssm": (["mamba2"] * 2, OWN),
}
SYNCHRONISES = {"_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "is_nonzero", "masked_select", "unique"}


def build(family: str, dtype: str, device: str = "cpu", recorded: bool = True) -> HybridStepper:
    mixers, options = FAMILIES[family]
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=61,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        mixers=mixers,
        **{"hidden_size": 64, "intermediate_size": 96, "chunk": 16, "initializer_range": 0.2, **options},
    )
    model = HybridForCausalLM(config).to(device, getattr(torch, dtype))
    return HybridStepper(model, MockTokenizer("a" * 60), graphs=recorded)


class Request:
    """Prompts of several lengths, and what is decoded behind them."""

    def __init__(self, lengths: Sequence[int], seed: int, device: str = "cpu") -> None:
        dice = torch.Generator().manual_seed(seed)
        self.counts = list(lengths)
        self.ids = torch.randint(61, (len(lengths), max(lengths)), generator=dice).to(device)
        self.more = torch.randint(61, (3, len(lengths), 2), generator=dice).to(device)
        self.lengths = torch.tensor(self.counts, dtype=torch.int32, device=device)

    def __call__(self, model: HybridStepper, state: State) -> list[Tensor]:
        """Logits behind the prompts, and of three calls of two tokens, of which one stands each time."""
        found = [model.prefill(self.ids, self.lengths, state, counts=self.counts)]
        found += [model.advance(ids, self.lengths + step, state) for step, ids in enumerate(self.more)]
        return found


def alike(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def kernel_by_kernel(request: Request, model: HybridStepper, state: State) -> list[Tensor]:
    assert state.graphs is not None
    with state.graphs.unrecorded():
        return request(model, state)


SHORT = [(5, 30, 1), (40, 33, 64), (7, 2, 20), (9, 9, 9), (64, 1, 50)]
"""Lengths of requests in turn, in buckets of 32 and 64."""
LONG = [(130, 4, 129), (200, 256, 3)]
"""In buckets of 256."""


def check_requests(family: str, dtype: str, device: str, lengths_in_turn: list[tuple[int, ...]]) -> HybridStepper:
    """One request after the other on the same memory, as graphs and kernel by kernel."""
    model = build(family, dtype, device)
    for seed, lengths in enumerate(lengths_in_turn):
        request = Request(lengths, seed, device)
        state = model.open(3, 300, 5)
        place = state.end.data_ptr()
        got = request(model, state)
        assert not any(logits.isnan().any() for logits in got)
        left = [tensor.clone() for tensor in state.cursors]
        del state
        state = model.open(3, 300, 5)
        assert state.end.data_ptr() == place
        assert alike(got, kernel_by_kernel(request, model, state)), f"request {seed}, lengths {lengths}"
        assert alike(left, list(state.cursors))
        del state
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_by_graphs_are_those_kernel_by_kernel_to_the_bit(family: str, replays: list[torch.Size]) -> None:
    model = check_requests(family, "float32", "cpu", SHORT)
    assert [shape[1] for shape in replays if shape[1] > 2] == [32, 32, 64]
    assert model.facts()["graphs of prompts"] == (2, "")


@pytest.mark.parametrize("rollback", ["replay", "snapshot"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_to_a_bucket_changes_nothing(family: str, rollback: Rollback, replays: list[torch.Size]) -> None:
    recorded, plain = (build(family, "float64", recorded=wanted) for wanted in (True, False))
    for seed, lengths in enumerate(SHORT):
        request = Request(lengths, seed)
        one, two = (request(model, model.open(3, 300, 5, rollback)) for model in (recorded, plain))
        for got, want in zip(one, two, strict=True):
            assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    assert {32, 64} <= {shape[1] for shape in replays}


def test_a_bucket_may_be_longer_than_what_was_opened(replays: list[torch.Size], monkeypatch) -> None:
    monkeypatch.setattr(stepper, "BLOCK", 1)
    recorded, plain = (build("mamba2 with options", "float64", recorded=wanted) for wanted in (True, False))
    request = Request((9, 3), 0)
    for _ in range(3):
        one, two = (request(model, model.open(2, 9, 5)) for model in (recorded, plain))
        assert max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) < 1e-10
    assert [shape[1] for shape in replays if shape[1] > 2] == [32, 32]


def read(model: HybridStepper, state: State, lengths: Sequence[int], **given: object) -> Tensor:
    request = Request(lengths, 0)
    return model.prefill(request.ids, request.lengths, state, **given)


def test_the_recordings_used_last_are_kept(replays: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "PROMPTS", 2)
    model = build("mamba2", "float32")
    state = model.open(1, 300, 1)
    for length in (20, 50, 70):
        read(model, state, [length])
    assert not replays
    for length, recorded in ((20, 1), (50, 2), (21, 2), (70, 3), (20, 3), (50, 4), (51, 4), (96, 5)):
        read(model, state, [length])
        assert model.facts()["graphs of prompts"] == (recorded, ""), length
    assert model.facts()["graphs"] == (0, "")


@pytest.mark.parametrize(
    ("family", "lengths", "reason"),
    [
        ("mamba2", [3, 0], "some rows have none"),
        ("mamba2", [300, 2], "more than 512 tokens"),
        ("mamba", [129, 2], "the scan of Mamba-1 in PyTorch"),
    ],
)
def test_what_is_not_recorded_says_why(
    family: str, lengths: list[int], reason: str, replays: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepper, "ASKED", 512)
    recorded, plain = (build(family, "float64", recorded=wanted) for wanted in (True, False))
    for _ in range(3):
        one, two = (read(model, model.open(2, 400, 1), lengths) for model in (recorded, plain))
        assert (one - two).abs().max() < 1e-10
    assert not replays
    assert recorded.facts()[f"prompts without a graph: {reason}"] == (3, "")


def test_prompts_that_go_on_and_models_under_inspection_are_not_recorded(replays: list[torch.Size]) -> None:
    model = build("mamba2", "float32")
    state = model.open(1, 100, 1)
    for _ in range(3):
        read(model, state, [4], start=state.end.clone())
    assert model.facts()["prompts without a graph: they go on from a text"] == (3, "")
    model.debug = True
    for _ in range(3):
        read(model, state, [4])
    assert model.facts()["prompts without a graph: debugging"] == (3, "")
    assert not replays


def test_a_recording_that_finds_no_memory_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(self, work, ids, lengths):
        asked.append(ids.shape[1])
        if ids.shape[1] > 32:
            raise torch.OutOfMemoryError("no room")
        return lambda: None, work(ids, lengths)

    monkeypatch.setattr(graphs.Recorder, "record", record)
    model = build("mamba2", "float32")
    state = model.open(1, 300, 1)
    first = read(model, state, [50])
    assert all(torch.equal(read(model, state, [50]), first) for _ in range(1))
    for _ in range(2):
        assert torch.allclose(read(model, state, [50]), first)
        read(model, state, [70])
        read(model, state, [20])
    assert asked == [64, 32]
    assert model.facts()["prompts without a graph: no memory for a graph"] == (4, "")


def test_lengths_that_the_host_is_told_are_the_lengths() -> None:
    model = build("mamba2", "float32", recorded=False)
    state = model.open(2, 20, 1)
    with pytest.raises(MambabenchError, match=r"counts \[3, 3\] are not the lengths \[3, 2\]"):
        read(model, state, [3, 2], counts=[3, 3])
    with pytest.raises(MambabenchError, match="30 positions do not fit in the 21"):
        read(model, state, [30, 2], counts=[30, 2])


class Waits(TorchDispatchMode):
    """Refuses what would have the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in SYNCHRONISES, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_prompts_of_known_lengths_ask_nothing_of_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a recording would fail, and a draft's prompt wait for the end of the target's."""

    def wait(_: Tensor) -> list[int]:
        raise AssertionError("the host waits")

    monkeypatch.setattr(HybridStepper, "_looks", lambda *_: False)
    monkeypatch.setattr(Tensor, "tolist", wait)
    model, request = build(family, "float32"), Request((9, 30, 2), 0)
    state = model.open(3, 100, 1)
    with Waits(), state.graphs.unrecorded():
        model.prefill(request.ids, request.lengths, state, counts=request.counts)
        with pytest.raises(AssertionError, match="the host waits"):
            model.prefill(request.ids, request.lengths, state)


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_prompts_by_graphs_are_those_kernel_by_kernel_to_the_bit(family: str, dtype: str) -> None:
    model = check_requests(family, dtype, "cuda:0", SHORT + LONG)
    assert model.facts()["graphs of prompts"] == (3, "")


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_host_does_not_wait_for_prompts(family: str) -> None:
    for recorded in (True, False):
        model, request = build(family, "bfloat16", "cuda:0", recorded), Request((9, 30, 2), 0, "cuda:0")
        state = model.open(3, 100, 1)
        first = request(model, state)
        request(model, state)
        with without_waiting():
            again = model.prefill(request.ids, request.lengths, state, counts=request.counts)
        assert torch.equal(again, first[0])


@pytest.mark.gpu
def test_on_a_gpu_recorded_prompts_outlive_other_recordings(begin_early: Callable[[bool], None]) -> None:
    """Of calls and of prompts, some of which are given up, in memory that all have in common."""
    begin_early(True)
    model = build("mamba2 and mamba", "bfloat16", "cuda:0")
    requests = [Request((length, length // 2 + 1), length, "cuda:0") for length in range(20, 1000, 61)]
    state = model.open(2, 1024, 5)
    wanted = [request(model, state) for request in requests]
    for turn in range(3):
        for request, want in zip(requests, wanted, strict=True):
            assert alike(request(model, state), want), turn
    assert model.facts()["graphs of prompts"][0] > graphs.PROMPTS
