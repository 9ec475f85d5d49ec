"""A local plug-in for the tests of runner and child: components that behave as their options say."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mambabench import Component, DataRef, MambabenchError, Refusal, Unsupported, hookimpl

HERE = __name__


@dataclass(frozen=True, slots=True, kw_only=True)
class ActConfig:
    do: str = "finish"
    trace: str = ""
    """A file that gets a line at each start: what was done, and the process."""
    seconds: float = 0.0
    sets: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Empty:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    data: DataRef


def trace(path: str, *words: object) -> None:
    if path:
        with open(path, "a") as file:
            file.write(" ".join(map(str, words)) + "\n")


class Act:
    """The source `act`."""

    def __init__(self, config: ActConfig) -> None:
        self.config = config

    def write(self, job) -> None:
        trace(self.config.trace, self.config.do, os.getpid())
        job.emit("fact", name="seed", value=job.seed)
        time.sleep(self.config.seconds)
        getattr(self, self.config.do)(job)
        (job.out / "data.jsonl").write_text('{"text": "one"}\n')

    def finish(self, job) -> None:
        """Ends well."""

    def exit(self, job) -> None:
        raise SystemExit(3)

    def unsupported(self, job) -> None:
        raise Unsupported("not in this world")

    def line(self, job) -> None:
        raise MambabenchError("config.json: hidden = 3 is odd")

    def error(self, job) -> None:
        raise ValueError("a bug\nwith two lines")

    def memory(self, job) -> None:
        raise MemoryError("no more of it")

    def tensor(self, job) -> None:
        """Asks for more memory than an address can name."""
        import torch

        torch.empty(2**60, dtype=torch.int8)

    def full_disk(self, job) -> None:
        """What it is to write has no room."""
        (job.out / "data.jsonl").symlink_to("/dev/full")

    def full_checkpoint(self, job) -> None:
        """Its checkpoint has no room, and torch does not say so."""
        import torch

        torch.save(torch.zeros(2**16), "/dev/full")

    def full_records(self, job) -> None:
        """Its next record has no room."""
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, job.emit._descriptor)
        job.emit("fact", name="a", value=1)

    def clock(self, job) -> None:
        """Somebody sets the clock to yesterday."""
        true = time.time
        time.time = lambda: true() - 86400.0
        job.emit("fact", name="a", value=1)

    def kill(self, job) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_beside_family(self, job) -> None:
        """Dies once another step, with the same trace, has its `family`."""
        while Path(self.config.trace).read_text().count("\n") < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    def segv(self, job) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def speak(self, job) -> None:
        logging.getLogger("mambabench.kernels").info("this and that")

    def leave(self, job) -> None:
        print("last words", flush=True)
        os._exit(7)

    def kill_at_rename(self, job) -> None:
        """Dies when the step is whole and its folder is to be moved into place."""
        os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, job) -> None:
        time.sleep(60)

    def fail_in_rank_1(self, job) -> None:
        """The second rank has a bug, and the first one waits for it."""
        if os.environ["RANK"] == "1":
            raise ValueError("a bug in one rank")
        time.sleep(60)

    def kill_rank_1(self, job) -> None:
        """The second rank is killed, upon which the first one fails."""
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        while Path(self.config.trace).read_text().count("\n") < 2:
            time.sleep(0.05)
        raise ConnectionError("the other rank is gone")

    def fail_before_rename(self, job) -> None:
        """The second rank fails when the outcome of the first one is on disk, but not yet in its place."""
        outcome = job.scratch.parent / "outcome.json"
        self.fail_late(outcome, lambda *_: time.sleep(60))

    def fail_after_rename(self, job) -> None:
        """The second rank fails when the first one has moved its folder, but has not ended."""
        partial, rename = job.scratch.parent, os.rename
        moved = partial.parents[1] / "steps" / partial.name
        self.fail_late(moved, lambda *paths: (rename(*paths), time.sleep(60)))

    def fail_late(self, awaited, rename) -> None:
        if os.environ["RANK"] == "0":
            os.rename = rename
            return
        while not awaited.exists():
            time.sleep(0.01)
        raise ValueError("a bug that comes late")

    def owe_in_rank_1(self, job) -> None:
        """The second rank is done but for what it has queued, and the first one waits for that."""
        owed = job.scratch / "owed"
        if os.environ["RANK"] == "1":
            threading.Thread(target=lambda: (time.sleep(1.0), owed.touch()), daemon=True).start()
            return
        while not owed.exists():
            time.sleep(0.01)

    def linger_in_rank_1(self, job) -> None:
        """The second rank does not end when the first one is done."""
        if os.environ["RANK"] == "1":
            time.sleep(60)

    def family(self, job) -> None:
        """Hangs with a grandchild in its group, one in a session of its own, and one whose parent is gone."""
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        group = subprocess.Popen(sleep)
        session = subprocess.Popen(sleep, start_new_session=True)
        script = (
            f"import subprocess; print(subprocess.Popen({sleep!r}, start_new_session=True, stdout=-3, stderr=-3).pid)"
        )
        orphan = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        trace(self.config.trace, "family", group.pid, session.pid, orphan.strip())
        time.sleep(60)

    def once(self, job) -> None:
        """Dies at the first attempt, leaving something in scratch."""
        kept = job.scratch / "checkpoint"
        if not kept.exists():
            kept.write_text("half way")
            (job.out / "rubbish").write_text("from the first attempt")
            job.emit("loss", step=1, tokens=10, loss=3.0)
            job.emit("loss", step=2, tokens=20, loss=2.9)
            os.kill(os.getpid(), signal.SIGKILL)
        job.emit("loss", step=2, tokens=20, loss=2.5)
        job.emit("loss", step=3, tokens=30, loss=2.0)


class Backend:
    """The backend `toy`: an artifact is one JSON file."""

    def __init__(self, config: Empty) -> None:
        pass

    def convert(self, parent: Path, keep, out: Path, seed: int) -> None:
        (out / "toy.json").write_text(json.dumps({"parent": parent.name, "keep": list(keep), "seed": seed}))

    def describe(self, artifact: Path):
        return {"layers": 3, "attention_layers": [0, 1, 2], "parameters": 7}


class Select:
    def __init__(self, config: Empty) -> None:
        pass

    def select(self, job):
        assert job.parent is not None
        assert job.parent.path.joinpath("toy.json").is_file()
        return [2, 0]


class Train:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def train(self, job) -> None:
        import torch

        text = (job.data[self.config.data] / "data.jsonl").read_text()
        job.emit("loss", step=1, tokens=5, loss=torch.tensor(1.5))
        toy = json.loads((job.parent.path / "toy.json").read_text())
        toy |= {"text": text, "teacher": job.teacher.name, "random": torch.rand(()).item()}
        (job.out / "toy.json").write_text(json.dumps(toy))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    seconds: float = 0.0


class Measure:
    def __init__(self, config: MeasureConfig) -> None:
        self.config = config

    def run(self, bench) -> None:
        time.sleep(self.config.seconds)
        toy = json.loads((bench.subject.artifact.path / "toy.json").read_text())
        bench.emit("sample", task="toy", item="a", metric="kept", value=len(toy["keep"]))
        bench.emit("fact", name="subject", value=bench.subject.artifact.name)
        bench.emit("fact", name="decoder", value=bench.subject.decoder_name)
        bench.emit("fact", name="dtype", value=bench.subject.dtype)


class Decoder:
    def __init__(self, config: Empty) -> None:
        pass


@hookimpl
def mambabench_components() -> Iterable[Component]:
    def of(kind: str, name: str, target: str, config: type = Empty, traits: frozenset[str] = frozenset()) -> Component:
        return Component(kind=kind, name=name, target=f"{HERE}:{target}", config=config, traits=traits)

    return (
        of("source", "act", "Act", ActConfig),
        of("backend", "toy", "Backend"),
        of("selector", "toy-select", "Select"),
        of("distiller", "toy-train", "Train", TrainConfig),
        of("decoder", "toy-decoder", "Decoder"),
        of("distiller", "toy-train-together", "Train", TrainConfig, frozenset({"ranks"})),
        of("suite", "toy-measure", "Measure", MeasureConfig, frozenset({"pair"})),
        of("suite", "toy-speed", "Measure", MeasureConfig, frozenset({"pair", "alone"})),
    )


@hookimpl
def mambabench_refuse(step, host):
    return Refusal("refused by a hook") if "data/refused" in step.labels else None


@hookimpl
def mambabench_step_finished(step, outcome):
    if "data/angry" in step.labels:
        raise RuntimeError("this hook is angry")


@hookimpl
def mambabench_environment():
    raise RuntimeError("no facts today")
