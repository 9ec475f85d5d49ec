"""Calls that are recorded keep the stepping contract, on memory that is handed on from request to request.

Without a GPU a stand-in runs the recorded work again, on the same buffers, wherever a graph would be started.
"""

import contextlib
import gc
import importlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mambabench import MambabenchError
from mambabench.backends import graphs
from mambabench.backends.hybrid import Mamba2HybridBackend, MambaBackend, TeacherBackend
from mambabench.backends.plugin import Mamba2HybridConfig, MambaConfig, TeacherConfig
from mambabench.backends.stepper import BLOCK, HybridStepper
from mambabench.harness.conformance import check_backend
from mambabench.kernels import decode_attention as room
from mambabench.kernels.support import Support


class Recorded(TeacherBackend):
    """Loads models whose calls are recorded, whatever the device."""

    def __init__(self) -> None:
        super().__init__(TeacherConfig())

    def load(self, artifact: Path, device: str, dtype: str) -> HybridStepper:
        model = super().load(artifact, device, dtype)
        return HybridStepper(model.model, model.tokenizer, graphs=True)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_recorded_calls_keep_the_stepping_contract(artifact: Path, replays: list[torch.Size]) -> None:
    check_backend(Recorded(), artifact, rounds=60, seed=5)
    assert len({shape[1] for shape in replays}) > 2


def test_in_the_interpreter_the_kernel_keeps_it_too(
    half: Path, interpret: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attention of decoding by the kernel."""
    module = interpret(room.fused.MODULE)
    ran = []

    def kernel(_: str, name: str) -> Callable[..., torch.Tensor]:
        ran.append(name)
        return getattr(module, name)

    monkeypatch.setattr(room.fused, "kernel", kernel)
    monkeypatch.setattr(room.fused, "supports", lambda *_: Support.yes())
    backend = TeacherBackend(TeacherConfig())
    check_backend(backend, half, rounds=3, batch=2, steps=3, context=8, dtype="float32", tolerance=1e-4)
    assert set(ran) == {"decode_attention"}


def test_a_kind_of_call_is_recorded_once_for_all_requests(half: Path, replays: list[torch.Size]) -> None:
    model = Recorded().load(half, "cpu", "float32")
    for request in range(3):
        state = model.open(2, 20 + request, 4)
        model.prefill(torch.ones(2, 3, dtype=torch.int64), ints(3, 2), state)
        for step in range(4):
            model.advance(torch.ones(2, 1, dtype=torch.int64), ints(3 + step, 2 + step), state)
        del state
    assert model.facts()["graphs"] == (1, "")
    assert len([shape for shape in replays if shape[1] == 1]) == 11
    other = model.open(2, BLOCK + 20, 4)
    model.prefill(torch.ones(2, 3, dtype=torch.int64), ints(3, 2), other)
    for settle in (True, True, False, False):
        model.advance(torch.ones(2, 1, dtype=torch.int64), ints(3, 2), other, settle)
    assert model.facts()["graphs"] == (3, "")


def test_memory_is_handed_on_only_when_nobody_has_it_and_then_it_is_empty(half: Path) -> None:
    model = Recorded().load(half, "cpu", "float32")
    first, second = model.open(2, 20, 4), model.open(2, 20, 4)
    assert first.end.data_ptr() != second.end.data_ptr()
    model.prefill(torch.ones(2, 3, dtype=torch.int64), ints(3, 2), first)
    assert any(bool(tensor.any()) for tensor in first.tensors())
    place = first.end.data_ptr()
    del first
    gc.collect()
    assert model.open(3, 20, 4).end.data_ptr() != place
    third = model.open(2, 100, 4)
    assert third.end.data_ptr() == place
    assert not any(bool(tensor.any()) for tensor in third.tensors())


def test_kept_memory_makes_room_for_new(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorded().load(half, "cpu", "float32")
    del model.open(2, 20, 4).graphs
    stepper = importlib.import_module("mambabench.backends.stepper")
    whole, tries = stepper.open_state, []

    def full(*given):
        assert not any(begun() is not None for begun in tries), "what the first try had made is still held"
        begun = torch.zeros(1)
        tries.append(weakref.ref(begun))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("no room")
        return whole(*given)

    monkeypatch.setattr(stepper, "open_state", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert len(model.open(3, 20, 4).end) == 3
    assert len(tries) == 2


def test_what_other_models_keep_makes_room_too(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft, other = (Recorded().load(half, "cpu", "float32") for _ in range(3))
    state, of_draft = target.open(2, 20, 4), draft.open(2, 20, 4)
    kept = weakref.ref(of_draft.end)
    state.graphs.kept["recorded rounds"] = of_draft
    del state, of_draft
    gc.collect()
    stepper = importlib.import_module("mambabench.backends.stepper")
    whole = stepper.open_state

    def full(*given):
        if kept() is not None:
            raise torch.OutOfMemoryError("no room")
        return whole(*given)

    monkeypatch.setattr(stepper, "open_state", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert len(other.open(3, 20, 4).end) == 3


def test_without_kept_memory_a_full_device_is_an_error(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorded().load(half, "cpu", "float32")

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("mambabench.backends.stepper.open_state", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        model.open(3, 20, 4)


def test_the_contract_is_checked_where_the_host_can_look(half: Path, replays: list[torch.Size]) -> None:
    model = Recorded().load(half, "cpu", "float32")
    state = model.open(1, 20, 4)
    model.prefill(torch.ones(1, 3, dtype=torch.int64), ints(3), state)
    for _ in range(3):
        model.advance(torch.ones(1, 2, dtype=torch.int64), ints(3), state)
    with pytest.raises(MambabenchError, match="start 2 of row 0 is not between its settled position 3 and its end 5"):
        model.advance(torch.ones(1, 2, dtype=torch.int64), ints(2), state)


def test_logits_of_a_recorded_call_are_the_callers_to_keep(half: Path, replays: list[torch.Size]) -> None:
    model = Recorded().load(half, "cpu", "float32")
    state = model.open(1, 20, 4)
    model.prefill(torch.ones(1, 3, dtype=torch.int64), ints(3), state)
    ids = torch.arange(5).view(5, 1, 1)
    held = [model.advance(tokens, ints(3), state) for tokens in ids]
    kept = [logits.clone() for logits in held]
    model.advance(ids[0], ints(3), state)
    assert all(torch.equal(one, two) for one, two in zip(held, kept, strict=True))
    assert not torch.equal(held[3], held[4])


@pytest.mark.parametrize(
    ("variable", "device", "want"), [("", "cuda", True), ("off", "cuda", False), ("", "cpu", False)]
)
def test_graphs_are_for_gpus_and_can_be_turned_off(
    variable: str, device: str, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(graphs.VARIABLE, variable)
    assert graphs.wanted(torch.device(device)) is want


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """Pool and stream of every capture, by stand-ins for torch's."""

    class Graph:
        def replay(self) -> None:
            pass

    found, numbers = [], itertools.count()

    @contextlib.contextmanager
    def graph(_: Graph, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        found.append((pool, stream))
        yield

    stands = {"CUDAGraph": Graph, "graph": graph, "device": lambda _: contextlib.nullcontext()}
    stands |= {name: lambda: next(numbers) for name in ("Stream", "graph_pool_handle")}
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    return found


def test_graphs_share_memory_only_with_graphs_that_there_still_are(captures: list[tuple[object, object]]) -> None:
    recorder = graphs.Recorder(torch.device("cuda"))
    held = [recorder.capture(lambda: None) for _ in range(3)]
    assert len({pool for pool, _ in captures}) == 1
    held.pop()
    held.append(recorder.capture(lambda: None))
    assert len({pool for pool, _ in captures}) == 1
    held.clear()
    recorder.capture(lambda: None)
    assert len({pool for pool, _ in captures}) == 2


def test_models_record_on_streams_of_their_own(captures: list[tuple[object, object]]) -> None:
    for recorder in [graphs.Recorder(torch.device("cuda")) for _ in range(2)]:
        for _ in range(2):
            recorder.capture(lambda: None)
    streams = [stream for _, stream in captures]
    assert streams[0] == streams[1] != streams[2] == streams[3]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("way", ["", "off"], ids=["graphs", "eager"])
def test_on_a_gpu_both_ways_keep_the_stepping_contract(
    way: str, dtype: str, tolerance: float, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(graphs.VARIABLE, way)
    check_backend("teacher", artifact, rounds=150, device="cuda:0", dtype=dtype, tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_a_graph_is_what_its_kernels_are(half: Path, dtype: str) -> None:
    """The same calls by graphs and without, position by position, over accepted and rejected drafts."""
    eager = TeacherBackend(TeacherConfig()).load(half, "cuda:0", dtype)
    models = (
        HybridStepper(eager.model, eager.tokenizer, graphs=True),
        HybridStepper(eager.model, eager.tokenizer, graphs=False),
    )
    dice = torch.Generator().manual_seed(0)
    states = [model.open(3, 60, 5) for model in models]
    prompts = torch.randint(models[0].vocab_size, (3, 7), generator=dice).cuda()
    for model, state in zip(models, states, strict=True):
        model.prefill(prompts, ints(7, 4, 1).cuda(), state)
    start = ints(7, 4, 1)
    for _ in range(10):
        ids = torch.randint(models[0].vocab_size, (3, 5), generator=dice).cuda()
        one, two = (m.advance(ids, start.cuda(), s) for m, s in zip(models, states, strict=True))
        assert (one - two).abs().max() <= 1e-3 * two.abs().max()
        start += torch.randint(1, 6, (3,), generator=dice, dtype=torch.int32)
    assert models[0].facts()["graphs"] == (1, "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recorded", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("rope", ["dropped", "kept"])
@pytest.mark.parametrize("family", ["mamba2", "mamba"])
def test_on_a_gpu_kernels_that_begin_early_give_the_same_bits(
    family: str,
    rope: str,
    recorded: bool,
    dtype: str,
    make_llama: Callable[..., Path],
    tmp_path: Path,
    begin_early: Callable[[bool], None],
) -> None:
    """Over rounds of drafts of which any number stands, one behind the other without a pause."""
    kind = MambaBackend(MambaConfig(rope=rope))
    if family == "mamba2":
        kind = Mamba2HybridBackend(Mamba2HybridConfig(chunk=8, rope=rope))
    llama = make_llama(hidden_size=256, intermediate_size=384, num_attention_heads=4, head_dim=64)
    kind.convert(llama, [1, 3], tmp_path / "artifact", seed=0)
    dice, rounds = torch.Generator().manual_seed(0), 24
    ids = torch.randint(61, (rounds, 3, 4), generator=dice).cuda()
    steps = torch.randint(1, 5, (rounds, 3), generator=dice).cuda()
    starts = (1 + steps.cumsum(0) - steps).int()
    found = []
    for early in (False, True, True):
        begin_early(early)
        loaded = kind.load(tmp_path / "artifact", "cuda:0", dtype)
        model = HybridStepper(loaded.model, loaded.tokenizer, graphs=recorded)
        state = model.open(3, 120, 4)
        model.prefill(ids[0, :, :1], torch.ones(3, dtype=torch.int32).cuda(), state)
        torch.cuda.synchronize()
        found.append(torch.stack([model.advance(*given, state) for given in zip(ids, starts, strict=True)]))
    assert not found[0].isnan().any()
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.gpu
def test_on_a_gpu_a_callers_graph_takes_a_call_in(half: Path) -> None:
    model = TeacherBackend(TeacherConfig()).load(half, "cuda:0", "bfloat16")
    state = model.open(2, 40, 1)
    model.prefill(torch.ones(2, 3, dtype=torch.int64).cuda(), ints(3, 2).cuda(), state)
    ids, start = torch.ones(2, 1, dtype=torch.int64).cuda(), ints(3, 2).cuda()
    want = [model.advance(ids, start + step, state).argmax(-1) for step in range(3)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chosen = model.advance(ids, start, state).argmax(-1)
        start += 1
    model.prefill(torch.ones(2, 3, dtype=torch.int64).cuda(), ints(3, 2).cuda(), state)
    for step in range(3):
        graph.replay()
        assert torch.equal(chosen, want[step])


def texts(model: HybridStepper, device: str) -> list[torch.Tensor]:
    """Logits of five calls, the first as it is, the second recorded."""
    state = model.open(2, 40, 1)
    model.prefill(torch.ones(2, 3, dtype=torch.int64, device=device), ints(3, 2).to(device), state)
    ids = torch.ones(2, 1, dtype=torch.int64, device=device)
    return [model.advance(ids, ints(3, 2).to(device) + step, state) for step in range(5)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_graphs_outlive_those_of_other_models_and_can_be_made_anew(half: Path, dtype: str) -> None:
    models = [TeacherBackend(TeacherConfig()).load(half, "cuda:0", dtype) for _ in range(2)]
    _, wanted = (texts(model, "cuda:0") for model in models)
    models.pop(0)
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.full((64 << 20,), torch.nan, device="cuda:0")
    for kept in (True, False):
        if not kept:
            models[0]._kept.clear()
            gc.collect()
        again = texts(models[0], "cuda:0")
        assert all(torch.equal(one, two) for one, two in zip(wanted, again, strict=True))
    assert models[0].facts()["graphs"] == (2, "")
    assert held.isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one_calls_are_recorded_too(half: Path) -> None:
    here, there = (
        texts(TeacherBackend(TeacherConfig()).load(half, f"cuda:{number}", "float32"), f"cuda:{number}")
        for number in range(2)
    )
    assert all(torch.equal(one.cpu(), two.cpu()) for one, two in zip(here, there, strict=True))
