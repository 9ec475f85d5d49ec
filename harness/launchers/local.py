"""The launcher on this machine: children forked by one server per run, side by side as far as leases allow."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import forkserver
from ..environment import cores
from ..interfaces import MambabenchError, Needs, Unsupported
from .configs import LocalConfig
from .leases import QUIET, Lease, obstacle, runtime_folder, take

SERVER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONSAFEPATH": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_CACHE_AUTOTUNING": "1",
}
"""Read when the libraries are imported, so they must stand before the server starts. PASSIVE keeps idle OpenMP threads
from spinning beside other steps; NVML lets torch count GPUs without making a CUDA context; what Triton found fastest in
one step is known to the next."""

KILL_S = 10.0


class Child:
    """A forked step. It holds its lease, and this end does too until the end is known."""

    def __init__(self, server: ForkServer, number: int, lease: Lease, light: bool) -> None:
        self.number = number
        self.light = light
        self.pid = 0
        self.code: int | None = None
        self._server, self._lease = server, lease

    def poll(self) -> int | None:
        self._server.listen()
        return self.code

    def kill(self) -> None:
        """Ends the child and everything that it started; returns when they are gone."""
        self._server.send(op="kill", id=self.number)
        deadline = time.monotonic() + KILL_S
        while self.code is None and time.monotonic() < deadline:
            self._server.listen(timeout=0.1)
        if self.code is None:
            raise MambabenchError(f"process {self.pid} does not end, not even by SIGKILL")

    def ended(self, code: int) -> None:
        if self.code is None:
            self.code = code
            self._lease.release()


class ForkServer:
    """The parent's end of `harness.forkserver`."""

    def __init__(self) -> None:
        self.ready: Mapping[str, Any] | None = None
        self.waiting = False
        """Whether it has to wait with the imports, for the sake of a measurement of speed."""
        self.children: dict[int, Child] = {}
        self._numbers = 0
        self._buffer = b""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the server)
        self._requests, theirs_in = socket.socketpair()
        self._replies, theirs_out = os.pipe()
        ends = (theirs_in.fileno(), theirs_out)
        command = [sys.executable, "-P", "-m", forkserver.__name__, *map(str, ends), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=ends,
                env={**os.environ, **SERVER_ENVIRONMENT},
                # Ctrl-C in a terminal goes to the run alone, which ends its steps in order.
                start_new_session=True,
            )
        finally:
            theirs_in.close()
            os.close(theirs_out)

    def preload(self, modules: Sequence[str], quiet: Path) -> None:
        self.ready = None
        self.send(op="preload", modules=list(modules), quiet=str(quiet))

    def start(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, lease: Lease, light: bool = False
    ) -> Child:
        self._numbers += 1
        child = self.children[self._numbers] = Child(self, self._numbers, lease, light)
        held = lease.descriptors
        request = {"op": "start", "id": child.number, "command": list(command), "env": dict(env), "log": str(log)}
        self.send(held, **request, leases=len(held))
        return child

    def send(self, descriptors: Sequence[int] = (), **request: Any) -> None:
        try:
            data = json.dumps(request).encode() + b"\n"
            if descriptors:
                data = data[socket.send_fds(self._requests, [data], list(descriptors)) :]
            self._requests.sendall(data)
        except ConnectionError:
            self.listen(timeout=1.0)

    def listen(self, timeout: float = 0.0) -> None:
        """Takes in what the server says. A server that died ends its children's handles as killed."""
        while self._replies >= 0 and select.select([self._replies], [], [], timeout)[0]:
            timeout = 0.0
            data = os.read(self._replies, 65536)
            if not data:
                self._gone()
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _hear(self, reply: Mapping[str, Any]) -> None:
        match reply["event"]:
            case "waiting":
                self.waiting = True
            case "ready":
                self.ready, self.waiting = reply, False
            case "started":
                self.children[reply["id"]].pid = reply["pid"]
            case "ended":
                self.children.pop(reply["id"]).ended(reply["code"])

    def _gone(self) -> None:
        os.close(self._replies)
        self._replies = -1
        if self.children:
            for child in self.children.values():
                if child.pid:
                    forkserver.kill_tree(child.pid)
            forkserver.kill_forsaken(self.process.pid)
        for child in self.children.values():
            child.ended(-signal.SIGKILL)
        self.children.clear()

    @property
    def alive(self) -> bool:
        return self._replies >= 0

    def last_words(self) -> str:
        """The last line that the server printed, and how it ended."""
        code = self.process.wait()
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """Closes the socket, upon which the server ends all children and itself."""
        if self._requests.fileno() < 0:
            return
        self._requests.close()
        try:
            self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            forkserver.kill_tree(self.process.pid)
            self.process.wait()
        if self._replies >= 0:
            self._gone()
        self._output.close()


class LocalLauncher:
    """Starts steps on this host's CPU or GPUs."""

    def __init__(self, config: LocalConfig) -> None:
        self.gpus, self.share = config.gpus, config.share
        self.jobs = config.jobs or len(config.gpus) * config.share or cores()
        self.threads = config.threads or (max(1, cores() // self.jobs) if config.gpus else 1)
        self._modules: list[str] = []
        self._server: ForkServer | None = None
        self._runtime = runtime_folder()
        self.waiting = ""
        """Why the last `start` gave nothing, where that is up to another run."""

    def prepare(self, modules: Iterable[str]) -> None:
        """Has the server import `modules`; returns at once, and `start` gives None until it is ready."""
        self._modules += sorted(set(modules) - set(self._modules))
        if self._server is None:
            self._server = ForkServer()
        self._server.preload(self._modules, self._runtime / QUIET)

    @property
    def ready(self) -> Mapping[str, Any] | None:
        """What the server said when it had imported everything: seconds, failed modules, threads, CUDA."""
        return self._server.ready if self._server else None

    def start(self, command: Sequence[str], needs: Needs, env: Mapping[str, str], log: Path) -> Child | None:
        """Starts `python -m MODULE …`, whose MODULE has `main(arguments)`; None while a lease or the server is awaited.

        Raises Unsupported where this launcher can never give what the step needs.
        """
        if needs.gpus > len(self.gpus):
            have = f"{len(self.gpus)} (see --gpus)" if self.gpus else "none (see --gpus)"
            raise Unsupported(f"needs {needs.gpus} GPU{'s' * (needs.gpus != 1)}, this run has {have}")
        self.waiting = ""
        server = self._awaited()
        if server is None:
            if self._server is not None and self._server.waiting:
                self.waiting = "another run has this machine for itself to measure speed"
            return None
        if sum(child.light == needs.light for child in server.children.values()) >= self.jobs:
            return None
        lease = take(needs, self.gpus, self._runtime, self.share)
        if lease is None:
            if not server.children:
                self.waiting = obstacle(needs, self._runtime)
            return None
        threads = str(self.threads)
        devices = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, lease.gpus))}
        surroundings = {**env, **devices, "OMP_NUM_THREADS": threads, forkserver.THREADS: threads}
        surroundings[forkserver.BEGAN] = repr(time.monotonic())
        if lease.share > 1:
            surroundings[forkserver.SHARE] = str(lease.share)
        return server.start(command, surroundings, log, lease, needs.light)

    def _awaited(self) -> ForkServer | None:
        """The server once it is ready. One that died later is replaced; one that never got ready is an error."""
        if self._server is None:
            self.prepare(())
        assert self._server is not None
        self._server.listen()
        if self._server.alive:
            return self._server if self._server.ready else None
        if self._server.ready is None:
            raise MambabenchError(f"the server of child processes did not start: {self._server.last_words()}")
        self.close()
        self.prepare(())
        return None

    def close(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            with suppress(ProcessLookupError):
                server.close()
