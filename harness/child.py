"""One step in one process: builds the component that step.json names, gives it its inputs, and leaves an outcome.

Run as `python -P -m mambabench.harness.child STORE KEY [--plugin FILE]…`, by a launcher or by hand. Whatever happens
inside becomes a state with a reason; only what ends the process itself is left for the runner to see.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import Structurer, restore
from .environment import code, machine, versions
from .events import EVENTS, Muted, Recorder
from .forkserver import ATTEMPT, BEGAN, CODE, LEASED, SHARE, THREADS, watch
from .interfaces import (
    CHECKPOINT_S,
    DTYPES,
    Artifact,
    Backend,
    Bench,
    Binds,
    Job,
    MambabenchError,
    Review,
    Subject,
    Unsupported,
)
from .locks import Lock
from .plugins import Registry, make, registry
from .ranks import together
from .store import Store, disk_errors, read_json, write_json

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What torch says where it raises nothing but a RuntimeError."""
DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "] . unexpected pos ",
)
"""What libraries say that raise no OSError; the last two are torch's writer of files, which does not know why."""
VERSIONS = ("torch", "triton", "transformers", "numpy", "mamba-ssm", "causal-conv1d")
ARTIFACT_KINDS = ("data", "select", "convert", "train")
LOCK_S = 15.0


def main(argv: Sequence[str]) -> int:
    """Runs a step. Returns 0 once an outcome is on disk, whatever its state."""
    path, key, *rest = argv
    plugins = [Path(value) for flag, value in zip(rest[::2], rest[1::2], strict=True) if flag == "--plugin"]
    store = Store.open(path)
    alive = _only_child(store, key)
    attempt = Attempt()
    _speak()
    store.begin(key)
    step = read_json(store.partial(key) / "step.json")
    ranks = int(step["needs"].get("ranks", 1))
    try:
        if ranks > 1:
            failure: Mapping[str, Any] | None = None
            failed = together(ranks, lambda rank: work_on(store, key, step, plugins, attempt, rank))
            # A rank may fail while the first one, done with its work, makes the step whole.
            told = failed is not None and failed.rank == 0 and failed.record is not None
            if failed is not None and (told or not store.complete(key)):
                device = f"cuda:{failed.rank}" if step["needs"]["gpus"] else "cpu"
                failure = failed.record or attempt.record("crashed", failed.reason(), Muted(), device, [])
        else:
            watch()
            failure = work_on(store, key, step, plugins, attempt)
        if failure is not None:
            print(f"{failure['state']}: {failure['reason']}", file=sys.stderr, flush=True)
            store.fail(key, failure)
    finally:
        alive.release()
    return 0


def work_on(
    store: Store, key: str, step: Mapping[str, Any], plugins: Sequence[Path], attempt: Attempt, rank: int = 0
) -> dict[str, Any] | None:
    """Does a step, or a rank's part of it; the first rank leaves its records and its result. Returns how it failed."""
    recorder: Recorder | Muted = Muted()
    device = "cpu"
    try:
        if rank == 0:
            recorder = Recorder(store.partial(key), key, attempt=attempt.number)
        device = _device(step, rank)
        _settle(step["seed"])
        work = Work(store, key, step, registry(plugins), device, recorder, rank)
        work.run()
        if rank == 0:
            if step["kind"] == "train" and os.environ.get(SHARE):
                recorder("fact", name="gpu_shared_by", value=int(os.environ[SHARE]), unit="steps")
            facts = recorder.finish()
            if step["kind"] in ARTIFACT_KINDS:
                work.sign(facts, attempt)
            outcome = attempt.record("ok", "", recorder, device, facts)
            if device != "cpu":
                outcome["detail"]["kernels"] = work.kernels()
            store.finish(key, outcome)
    except (Exception, SystemExit) as error:
        state, reason = classify(error)
        if state != "unsupported":
            traceback.print_exc()
        if rank and not isinstance(error, MambabenchError):
            reason = f"rank {rank}: {reason}"
        return attempt.record(state, reason, recorder, device, [])
    return None


def classify(error: BaseException) -> tuple[str, str]:
    """The state and the one-line reason that an exception of a component means."""
    import torch

    text = " ".join(traceback.format_exception_only(error)[-1].split())
    if isinstance(error, Unsupported):
        return "unsupported", str(error)
    if isinstance(error, MambabenchError):
        return "error", str(error)
    if (isinstance(error, OSError) and error.errno in disk_errors.FULL) or any(sign in text for sign in DISK_FULL):
        return "error", f"{disk_errors.ADVICE} ({text[:300]})"
    if (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(sign in text for sign in OUT_OF_MEMORY)
    ):
        return "out-of-memory", text[:300]
    return "error", text[:500]


class Attempt:
    """When, where and with which code an attempt began, and what it took since; times count from the lease, on a clock
    that nobody sets.

    Code and machine are noted at the start: files may change while a step runs, but it runs what it has imported.
    """

    def __init__(self) -> None:
        self.leased = float(os.environ.get(LEASED) or time.time())
        self._began = float(os.environ.get(BEGAN) or time.monotonic())
        self.number = int(os.environ.get(ATTEMPT) or 1)
        self.rss = _peak_rss()
        self.code: dict[str, Any] = json.loads(os.environ[CODE]) if os.environ.get(CODE) else code()
        self.began_with = {**machine(), **versions(VERSIONS)}

    def environment(self, device: str) -> dict[str, str]:
        """Machine and versions; the GPU once the component has used it, since asking for it would start CUDA."""
        import torch

        if not device.startswith("cuda") or not torch.cuda.is_initialized():
            return self.began_with
        return {**self.began_with, "gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}

    def record(
        self, state: str, reason: str, recorder: Recorder | Muted, device: str, facts: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """An outcome.json."""
        import torch

        def since(moment: float | None) -> float | None:
            return None if moment is None else round(moment - self._began, 4)

        detail = {
            "device": device,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
            "gpu_shared_by": int(os.environ.get(SHARE) or 1),
            "first_record_s": since(recorder.first),
            "last_record_s": since(recorder.last),
            "peak_rss_bytes": _peak_rss(),
            "rss_at_start_bytes": self.rss,
        }
        if device.startswith("cuda"):
            detail["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if device.startswith("cuda") and torch.cuda.is_initialized():
            detail["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        return {
            "state": state,
            "reason": reason,
            "attempt": self.number,
            "started": self.leased,
            "wall_s": since(time.monotonic()),
            "detail": detail,
            "facts": facts,
            "code": self.code,
            "environment": self.environment(device),
        }


class Work:
    """A step with everything that it names brought to life."""

    def __init__(
        self,
        store: Store,
        key: str,
        step: Mapping[str, Any],
        plugins: Registry,
        device: str,
        recorder: Recorder | Muted,
        rank: int = 0,
    ) -> None:
        self.store, self.key, self.step, self.device, self.recorder = store, key, step, device, recorder
        self.registry, self.structurer = plugins, Structurer(plugins)
        self.folder = store.partial(key)
        self.out = self.folder / "artifact"
        if rank:
            # What it writes there is the first rank's to write, and vanishes with the scratch folder.
            self.out = self.folder / "scratch" / f"rank-{rank}"
            self.out.mkdir(parents=True, exist_ok=True)
        self.seed, self.rank = int(step["seed"]), rank
        self.backends: list[Any] = []

    def run(self) -> None:
        match self.step["kind"]:
            case "data":
                self._component("source").write(self._job())
            case "select":
                keep = sorted(int(layer) for layer in self._component("selector").select(self._job()))
                write_json(self.out / "layers.json", {"keep": keep})
                for layer in keep:
                    self.recorder("fact", name="keeps_attention", value=layer, arm=f"layer {layer}")
            case "convert":
                self._convert()
            case "train":
                self._component("distiller").train(self._job())
            case "measure":
                self._component("suite").run(self._bench())
            case "answer":
                self._component("questions").answer(self._bench())
            case "judge":
                self._component("suite").judge(self._review())
            case kind:
                raise MambabenchError(f"step.json: unknown kind of step {kind!r}")
        if self.rank == 0 and self.step["kind"] in ARTIFACT_KINDS and not any(self.out.iterdir()):
            raise MambabenchError(f"{self._name()} ended without writing anything to its output folder")

    def sign(self, facts: list[dict[str, Any]], attempt: Attempt) -> None:
        """Says in artifact.json what made this artifact."""
        record = {
            "schema": 1,
            "key": self.key,
            "kind": self.step["kind"],
            "model": self.step.get("model", ""),
            "labels": self.step["labels"],
            "backend": self.step.get("backend"),
            "component": self.step["component"],
            "seed": self.seed,
            "code": attempt.code,
            "environment": attempt.environment(self.device),
            "facts": facts,
        }
        write_json(self.out / "artifact.json", record)

    def kernels(self) -> dict[str, Any]:
        """By which kernels the operations of those models ran whose backend tells."""
        return {name: how for each in self.backends if hasattr(each, "kernels") for name, how in each.kernels().items()}

    def _convert(self) -> None:
        backend = self._build("backend", self.step["backend"])
        if "path" in self.step:
            parent = Path(self.step["path"])
            if not parent.is_dir():
                raise MambabenchError(f"{parent}: there is no such folder (nothing is fetched from a hub)")
            keep = list(backend.describe(parent)["attention_layers"])
        else:
            parent = self.store.artifact(self.step["inputs"]["parent"])
            keep = read_json(self.store.artifact(self.step["inputs"]["selection"]) / "layers.json")["keep"]
        backend.convert(parent, keep, self.out, self.seed)
        self.recorder("fact", name="parameters", value=backend.describe(self.out)["parameters"])

    def _job(self) -> Job:
        backend = self.step.get("backend")
        return Job(
            seed=self.seed,
            device=self.device,
            data=self._data(),
            models=self._models(),
            teacher=self._role("teacher"),
            parent=self._role("parent"),
            backend=self._build("backend", backend) if backend else None,
            scratch=self.folder / "scratch",
            out=self.out,
            emit=self.recorder,
            cache=self.store.cache,
            checkpoint_s=float(self.step["needs"].get("checkpoint_s", CHECKPOINT_S)),
        )

    def _bench(self) -> Bench:
        artifact = self._role("subject")
        if artifact is None:
            raise MambabenchError("step.json: a measuring step without a subject")
        subject = self._subject(artifact, self.step.get("decoder"))
        reference = self.step.get("reference")
        return Bench(
            subject=subject,
            reference=self._subject(artifact, reference) if reference else None,
            data=self._data(),
            seed=self.seed,
            scratch=self.folder / "scratch",
            emit=self.recorder,
            models=self._models(),
            cache=self.store.cache,
            answers=self.step.get("answers", ""),
        )

    def _review(self) -> Review:
        answers = self.step["inputs"].get("answers")
        return Review(
            model=self.step["model"],
            answers=self.store.records(answers, EVENTS) if answers else None,
            data=self._data(),
            seed=self.seed,
            scratch=self.folder / "scratch",
            emit=self.recorder,
            cache=self.store.cache,
        )

    def _subject(self, artifact: Artifact, decoder: Mapping[str, Any] | None) -> Subject:
        made = self._build("decoder", decoder) if decoder else None
        if isinstance(made, Binds):
            made.bind(self._models())
        return Subject(
            artifact=artifact,
            decoder_name=decoder["plan_name"] if decoder else "",
            decoder=made,
            device=self.device,
            dtype=DTYPES[self.device.partition(":")[0]],
        )

    def _data(self) -> dict[str, Path]:
        return {
            name: self.store.artifact(data["step"]) / data.get("inside", "") if "step" in data else Path(data["file"])
            for name, data in self.step.get("data", {}).items()
        }

    def _models(self) -> dict[str, Artifact]:
        return {name: self._artifact(found["step"], name) for name, found in self.step.get("models", {}).items()}

    def _role(self, role: str) -> Artifact | None:
        key = self.step["inputs"].get(role)
        if key is None:
            return None
        name = self.step.get("model", "") if role == "subject" else ""
        return self._artifact(key, name)

    def _artifact(self, key: str, name: str = "") -> Artifact:
        """A model made by another step, with the backend that made it; `name` where this plan calls it otherwise."""
        path = self.store.artifact(key)
        made = read_json(path / "artifact.json")
        backend: Backend = self._build("backend", made["backend"])
        return Artifact(name or made["model"], path, backend)

    def _component(self, kind: str) -> Any:
        return self._build(kind, self.step["component"])

    def _build(self, kind: str, record: Mapping[str, Any]) -> Any:
        made = make(*restore(self.structurer, kind, record))
        if kind == "backend":
            self.backends.append(made)
        return made

    def _name(self) -> str:
        return f"{self.step['component']['kind']} {self.step['component']['name']!r}"


def _only_child(store: Store, key: str) -> Lock:
    """Waits for the last of an earlier child of this step, which may be ending."""
    deadline = time.monotonic() + LOCK_S
    while True:
        lock = Lock.take(store.child_lock(key))
        if lock is not None:
            return lock
        if time.monotonic() > deadline:
            raise MambabenchError(f"{store.partial(key)}: another process still works on this step")
        time.sleep(0.05)


def _device(step: Mapping[str, Any], rank: int) -> str:
    if not step["needs"]["gpus"]:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise MambabenchError("this step needs a GPU, and torch finds none that it can use")
    return f"cuda:{rank}"


def _speak() -> None:
    """Lets what our own code has to say, such as which kernels do not serve and why, stand in the step's log."""
    ours = logging.getLogger("mambabench")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())


def _settle(seed: int) -> None:
    """Sets threads and every global generator of random numbers, which the fork would share otherwise."""
    import numpy
    import torch

    if os.environ.get(THREADS):
        torch.set_num_threads(int(os.environ[THREADS]))
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
