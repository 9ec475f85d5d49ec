"""The dispatch takes a kernel where it serves, says why where not, and can be held to the reference."""

import contextlib
import logging
import subprocess
import sys
import threading

import pytest
import torch
from mambabench.kernels import conv as conv_room
from mambabench.kernels import gated_norm as norm_room
from mambabench.kernels import pointwise as pointwise_room
from mambabench.kernels import rms_norm as rms_room
from mambabench.kernels import scan as scan_room
from mambabench.kernels import selective_scan as selective_room
from mambabench.kernels import support
from mambabench.kernels.documents import Documents


def scan_inputs(dtype: torch.dtype = torch.bfloat16) -> tuple:
    x, b, c = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 4), torch.randn(2, 5, 4, 4)
    return x.to(dtype), torch.rand(2, 5, 4), -torch.rand(4), b.to(dtype), c.to(dtype), torch.randn(4)


def selective_inputs(dtype: torch.dtype = torch.bfloat16) -> tuple:
    x, raw, b, c = (torch.randn(2, 5, *shape).to(dtype) for shape in ((8,), (8,), (2, 4), (2, 4)))
    return x, raw, -torch.rand(8, 4), b, c, torch.randn(8), torch.randn(8)


def conv_inputs(dtype: torch.dtype = torch.bfloat16, channels: int = 16, taps: int = 4) -> tuple:
    return torch.randn(2, 5, channels).to(dtype), torch.randn(channels, taps), torch.randn(channels)


def norm_inputs(dtype: torch.dtype = torch.bfloat16) -> tuple:
    return torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, 16).to(dtype), torch.randn(16), None, 8, 1e-5


def rms_inputs() -> tuple:
    return torch.randn(2, 5, 16).bfloat16(), torch.randn(16), 1e-5, torch.bfloat16


def gate_inputs() -> tuple:
    return torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 5, 16).bfloat16()


ROOMS = [
    ("scan", scan_room, scan_inputs),
    ("selective_scan", selective_room, selective_inputs),
    ("conv", conv_room, conv_inputs),
    ("gated_norm", norm_room, norm_inputs),
]
rooms = pytest.mark.parametrize(("name", "room", "inputs"), ROOMS, ids=[room[0] for room in ROOMS])


@rooms
def test_a_kernel_runs_where_it_serves(name, room, inputs, standins) -> None:
    getattr(room, name)(*inputs())
    assert standins == [name]
    assert support.reasons() == {}


def test_a_record_says_what_ran_by_a_kernel_and_why_the_rest_did_not(standins, monkeypatch) -> None:
    monkeypatch.setattr(support, "_fused", set())
    conv_room.conv(*conv_inputs())
    conv_room.conv(*conv_inputs(taps=6))
    scan_room.scan(*scan_inputs(torch.float64))
    assert support.record() == {
        "conv": {"fused": True, "reasons": ["the kernel has 2 to 4 taps, not 6"]},
        "scan": {"fused": False, "reasons": ["the kernel does not serve float64"]},
    }


@rooms
def test_a_kernel_runs_on_the_gpu_of_its_tensors(name, room, inputs, standins, monkeypatch) -> None:
    """Which the launch itself does not see to."""
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.dtype)
        yield
        assert standins == [name]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    getattr(room, name)(*inputs())
    assert current == [torch.bfloat16]


def test_the_first_tensor_tells_the_gpu_wherever_it_stands(monkeypatch) -> None:
    tensor, current = torch.zeros(1), []
    monkeypatch.setattr(torch.cuda, "device_of", lambda given: current.append(given) or contextlib.nullcontext())
    assert support.kernel("builtins", "max")(3, 4, key=lambda number: -number) == 3
    assert current == []
    assert support.kernel("builtins", "len")((tensor, tensor)) == 2
    assert support.kernel("builtins", "isinstance")(tensor, torch.Tensor)
    assert all(given is tensor for given in current)
    assert len(current) == 2


ON_EITHER_GPU = [*ROOMS, ("rms_norm", rms_room, rms_inputs), ("swiglu", pointwise_room, gate_inputs)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "room", "inputs"), ON_EITHER_GPU, ids=[room[0] for room in ON_EITHER_GPU])
def test_a_kernel_on_another_gpu_than_the_current_one_gives_what_it_gives_there(name, room, inputs, asked) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"torch finds {torch.cuda.device_count()} GPUs, and two are needed")
    given, found = inputs(), []
    for device in ("cuda:0", "cuda:1"):
        leaves = [t.to(device, copy=True).requires_grad_() if isinstance(t, torch.Tensor) else t for t in given]
        made = getattr(room, name)(*leaves)
        result = made[0] if isinstance(made, tuple) else made
        result.float().square().sum().backward()
        found.append([result, *(t.grad for t in leaves if isinstance(t, torch.Tensor))])
    assert support.reasons() == {}
    for one, two in zip(*found, strict=True):
        assert str(two.device) == "cuda:1"
        assert two.isfinite().all()
        # Some kernels add up in any order in backward.
        assert (one.cpu().float() - two.cpu().float()).norm() <= 2e-3 * one.float().norm().cpu()


@rooms
def test_tensors_on_cpu_never_reach_it(name, room, inputs, standins, monkeypatch, caplog) -> None:
    monkeypatch.setattr(support, "on_cuda", lambda tensor: tensor.is_cuda)
    caplog.set_level(logging.INFO, "mambabench.kernels")
    getattr(room, name)(*inputs())
    assert standins == []
    assert support.reasons() == {name: ("the tensors are on cpu",)}
    assert not caplog.records


@rooms
def test_the_reference_can_be_asked_for(name, room, inputs, standins, monkeypatch) -> None:
    def run() -> None:
        getattr(room, name)(*inputs())

    with support.reference_only():
        run()
        with support.reference_only():
            pass
        elsewhere = threading.Thread(target=run)
        elsewhere.start()
        elsewhere.join()
    monkeypatch.setenv(support.VARIABLE, "reference")
    run()
    assert standins == []
    assert support.reasons() == {name: ("the reference was asked for",)}
    monkeypatch.delenv(support.VARIABLE)
    run()
    assert standins == [name]


@rooms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_refused_by_name(name, room, inputs, dtype, standins) -> None:
    getattr(room, name)(*inputs(dtype))
    assert support.reasons() == {name: (f"the kernel does not serve {str(dtype)[6:]}",)}


class Without:
    """Finds that a package is not there, whether it is or not."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


@rooms
def test_a_package_that_is_missing_is_a_reason(name, room, inputs, standins, monkeypatch) -> None:
    package = {"conv": "causal_conv1d", "gated_norm": "triton"}.get(name, "mamba_ssm")
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    monkeypatch.setattr(room.fused, "installed", support.installed)
    getattr(room, name)(*inputs())
    assert standins == []
    assert support.reasons() == {name: (f"{package.replace('_', '-')} is not installed",)}


def test_a_package_that_does_not_import_is_a_reason(tmp_path, monkeypatch, asked) -> None:
    (tmp_path / "half_built.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "half_there.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    assert support.installed("half_built").reason == "half-built does not import: undefined symbol: _ZN3c10"
    assert "half-there does not import: No module named 'surely_not" in support.installed("half_there").reason


def test_a_reason_is_logged_once(standins, caplog) -> None:
    caplog.set_level(logging.INFO, "mambabench.kernels")
    for taps in (5, 5, 1):
        conv_room.conv(*conv_inputs(taps=taps))
    assert [record.getMessage() for record in caplog.records] == [
        "conv runs in PyTorch: the kernel has 2 to 4 taps, not 5",
        "conv runs in PyTorch: the kernel has 2 to 4 taps, not 1",
    ]
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_fp32_stays_exact_unless_torch_may_round_it(standins, monkeypatch) -> None:
    monkeypatch.setattr(scan_room.fused, "may_round", lambda: False)
    x, *_, c, _ = scan_inputs(torch.float32)
    refused = scan_room.fused.supports(x, c)
    assert refused.reason == "the kernel rounds fp32 inputs to tf32, which torch is not set to allow"
    assert scan_room.fused.supports(x.bfloat16(), c.bfloat16())
    u, _, decay, *_ = selective_inputs(torch.float32)
    assert selective_room.fused.supports(u, decay)
    assert conv_room.fused.supports(*conv_inputs(torch.float32))


def test_what_a_kernel_does_not_know_is_refused(standins) -> None:
    x, _, decay, *_ = selective_inputs()
    assert "empty state" in selective_room.fused.supports(x, decay, torch.zeros(2, 8, 4)).reason
    assert "up to 256 states" in selective_room.fused.supports(x, torch.zeros(8, 257)).reason
    u, weight, bias = conv_inputs()
    documents = Documents(torch.zeros(2, 5, dtype=torch.int32))
    assert "in front of packed" in conv_room.fused.supports(u, weight, bias, u[:, :3], documents).reason
    assert "does not divide 12" in conv_room.fused.supports(*conv_inputs(channels=12)).reason
    assert "in one dtype" in conv_room.fused.supports(u, weight, bias.bfloat16()).reason
    assert "up to 8192, not 16384" in norm_room.fused.supports(norm_inputs()[0], 16384).reason
    assert scan_room.fused.supports(x[:, :0], x[:, :0]).reason == "there are no tokens"


def test_a_batch_beyond_int32_is_refused(standins) -> None:
    x, *_, c, _ = (t.to("meta") for t in scan_inputs())
    assert "int32" in scan_room.fused.supports(x, c[:1, :1].expand(2**12, 2**12, -1, -1)).reason


def test_nothing_is_imported_on_cpu() -> None:
    code = """if True:
        import sys, torch
        from mambabench.kernels.conv import conv
        from mambabench.kernels.gated_norm import gated_norm
        from mambabench.kernels.scan import scan
        from mambabench.kernels.selective_scan import selective_scan
        conv(torch.randn(1, 3, 8), torch.randn(8, 4), torch.randn(8), silu=True)
        x = torch.randn(1, 3, 2, 4)
        scan(x, torch.rand(1, 3, 2), -torch.rand(2), x, x)
        gated_norm(x.flatten(2), x.flatten(2), torch.ones(8), None, 4, 1e-5)
        selective_scan(x[..., 0], x[..., 1], -torch.rand(2, 4), x, x)
        assert not {"mamba_ssm", "causal_conv1d"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_gpu_has_one_stream_for_graphs_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    support.timing_stream.cache_clear()
    devices = [torch.device("cuda", number) for number in (0, 1, 0)]
    assert [support.timing_stream(device) for device in devices] == [1, 2, 1]
    assert made == devices[:2]
    support.timing_stream.cache_clear()
