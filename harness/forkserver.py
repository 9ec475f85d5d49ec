"""A fork server: imports the heavy modules once, then forks a child per step in milliseconds.

Our own, not multiprocessing's, because children must get a clean sys.path, their own session and log, and must all be
gone when the run is gone, `kill -9` included. Run as `python -P -m mambabench.harness.forkserver IN OUT PARENT` with
an inherited socket and pipe; requests and replies are JSON lines (see `Server`). The server stays single-threaded and
only imports: forking is safe then, and a forked child may start CUDA.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from .locks import Lock

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SERVER, LEASED, BEGAN, ATTEMPT, THREADS, CODE, SHARE = (
    f"MAMBABENCH_{name}" for name in ("SERVER", "LEASED", "BEGAN", "ATTEMPT", "THREADS", "CODE", "SHARE")
)
"""Variables of a child: process of the server, Unix time at which the run started the step, time of the lease on the
monotonic clock of its own machine, number of the attempt, threads, `environment.code()` as JSON from before the
imports, and how many steps may be on its GPU, where that is not one."""

POLL_S = 0.2
MOST_DESCRIPTORS = 64


class Server:
    """Requests: `preload` (modules, quiet: the lock file to share meanwhile), `start` (id, command, env, log, leases:
    how many descriptors of locks come with it), `kill` (id). Replies: `waiting` (the lock file is taken), `ready`
    (failed: module -> reason, cuda: the module that made a CUDA context or null, threads, seconds), `started` (id,
    pid), `ended` (id, code).
    """

    def __init__(self, requests: socket.socket, replies: int, parent: int) -> None:
        self.requests, self.replies, self.parent = requests, replies, parent
        self.running: dict[int, int] = {}
        """pid -> id"""
        self.leases: dict[int, list[int]] = {}
        """id -> descriptors of locks, held until all of the child is gone."""
        self.handed: list[int] = []
        """Descriptors that came with requests that are not read yet."""
        self.wanted: Mapping[str, Any] | None = None
        """The preload that is to be done."""
        self.waiting = False
        """Whether it waits for the lock, and that was told."""
        self.failed: dict[str, str] = {}
        self.cuda: str | None = None

    def serve(self) -> None:
        """Answers requests until the pipe closes, then ends everything that was started."""
        wake, wake_end = os.pipe()
        for end in (wake, wake_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        buffered = b""
        requests = self.requests.fileno()
        while True:
            ready, _, _ = select.select([requests, wake], [], [], POLL_S if self.wanted else None)
            if wake in ready:
                with suppress(BlockingIOError):
                    os.read(wake, 4096)
                self.reap()
            if requests in ready:
                data, descriptors, _, _ = socket.recv_fds(self.requests, 65536, MOST_DESCRIPTORS)
                if not data:
                    break
                for descriptor in descriptors:
                    os.set_inheritable(descriptor, False)
                self.handed += descriptors
                *lines, buffered = (buffered + data).split(b"\n")
                for line in lines:
                    self.answer(json.loads(line))
            if self.wanted:
                self.preload(self.wanted)
        self.end_all()

    def answer(self, request: Mapping[str, Any]) -> None:
        match request["op"]:
            case "preload":
                self.wanted = request
            case "start":
                self.start(request)
            case "kill":
                for pid, number in list(self.running.items()):
                    if number == request["id"]:
                        kill_tree(pid)

    def preload(self, request: Mapping[str, Any]) -> None:
        """Imports modules, unless a measurement of speed would hear it; what fails is told and met again by the child
        that needs it.
        """
        quiet = Lock.take(Path(request["quiet"]), shared=True)
        if quiet is None:
            if not self.waiting:
                self.reply("waiting")
            self.waiting = True
            return
        self.wanted, self.waiting = None, False
        began = time.perf_counter()
        with dies_with(self.parent):
            for module in request["modules"]:
                try:
                    importlib.import_module(module)
                except (Exception, SystemExit) as error:
                    self.failed[module] = f"{type(error).__name__}: {error}"
                    traceback.print_exc()
                if self.cuda is None and cuda_in_use():
                    self.cuda = module
        gc.collect()
        gc.freeze()
        quiet.release()
        seconds = time.perf_counter() - began
        self.reply("ready", failed=self.failed, cuda=self.cuda, threads=threads(), seconds=seconds)

    def start(self, request: Mapping[str, Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        server = os.getpid()
        self.leases[request["id"]], self.handed = self.handed[: request["leases"]], self.handed[request["leases"] :]
        try:
            pid = os.fork()
        except OSError as error:
            with suppress(OSError), open(request["log"], "a") as log:
                print(f"mambabench: cannot fork: {error}", file=log)
            self.reply("started", id=request["id"], pid=0)
            self.ended(request["id"], 1)
            return
        if pid == 0:
            self.become(request, server)
        self.running[pid] = request["id"]
        self.reply("started", id=request["id"], pid=pid)

    def become(self, request: Mapping[str, Any], server: int) -> None:
        """The child's way from the fork to its command; never returns."""
        code = 1
        try:
            os.setsid()
            die_with_parent()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self.requests.close()
            os.close(self.replies)
            mine = self.leases.pop(request["id"])
            for descriptor in [*self.handed, *(each for held in self.leases.values() for each in held)]:
                os.close(descriptor)
            redirect(request["log"])
            if os.getppid() != server:
                os._exit(1)
            os.environ.update(request["env"])
            os.environ[SERVER] = str(server)
            for module, reason in self.failed.items():
                print(f"mambabench: {module} could not be imported beforehand: {reason}", file=sys.stderr)
            code = self.run(request["command"], mine)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            leave(code & 0xFF)

    def run(self, command: Sequence[str], leases: Sequence[int]) -> int:
        """Runs `python [-P] -m MODULE ARGUMENTS…` in this process, or anew where this one cannot use its GPUs."""
        if self.cuda is not None and os.environ.get("CUDA_VISIBLE_DEVICES"):
            print(f"mambabench: started anew, since importing {self.cuda} made a CUDA context", flush=True)
            for descriptor in leases:
                os.set_inheritable(descriptor, True)
            os.execv(sys.executable, [sys.executable, *command[1:]])
        at = command.index("-m")
        sys.argv = list(command[at + 1 :])
        return int(importlib.import_module(command[at + 1]).main(command[at + 2 :]) or 0)

    def reap(self) -> None:
        """Tells of children that ended and ends what they left behind."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self.running.pop(pid, None)
            if number is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                self.end_strays(pid)
                self.ended(number, os.waitstatus_to_exitcode(status))

    def ended(self, number: int, code: int) -> None:
        for descriptor in self.leases.pop(number):
            os.close(descriptor)
        self.reply("ended", id=number, code=code)

    def end_strays(self, session: int) -> None:
        """Orphans come to the server (it is their subreaper): ends those of a session, all where no step runs."""
        for pid in children_of(os.getpid()):
            with suppress(ProcessLookupError):
                if pid not in self.running and (not self.running or os.getsid(pid) == session):
                    kill_tree(pid)

    def end_all(self) -> None:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            left = children_of(os.getpid())
            for pid in left:
                kill_tree(pid)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not left:
                return
            time.sleep(0.01)

    def reply(self, event: str, **fields: Any) -> None:
        # A closed pipe shows as the end of requests, which ends the server in order.
        with suppress(BrokenPipeError):
            os.write(self.replies, json.dumps({"event": event, **fields}).encode() + b"\n")


class dies_with:  # noqa: N801  (used like a function)
    """While the server imports it does not read its pipe, so the kernel must end it with its parent."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __enter__(self) -> None:
        die_with_parent()
        if os.getppid() != self.parent:
            os._exit(1)

    def __exit__(self, *_: object) -> None:
        # From here on the end of the pipe tells, and the server still has children to end then.
        die_with_parent(0)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Has the kernel send a signal when the parent ends (Linux; `watch` does it elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def leave(code: int) -> NoReturn:
    """Ends a process at once, without what its imports, or the process that it was forked from, would do at the end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def watch(parent: int = 0) -> None:
    """Ends this process once the one that forked it is gone: `parent`, or else the server, and then its group as well.
    Called by every child."""
    server = int(os.environ.get(SERVER, 0))
    if not parent and not server:
        return

    def loop() -> None:
        while os.getppid() == (parent or server):
            time.sleep(POLL_S)
        if parent:
            os.kill(os.getpid(), signal.SIGKILL)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=loop, name="watch-server", daemon=True).start()


def redirect(log: str) -> None:
    """Sends output to the end of a log, and takes input from nowhere."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.close(nothing)


def children_of(pid: int) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    return []


def kill_tree(pid: int) -> None:
    """Ends a process, its group, and all that descends from it, whatever session it went to."""
    tree: list[int] = [pid]
    with suppress(psutil.NoSuchProcess):
        tree += [child.pid for child in psutil.Process(pid).children(recursive=True)]
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    for each in tree:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def kill_forsaken(server: int) -> None:
    """Ends what a dead server's steps left behind; they carry its number in their environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(SERVER) == str(server):
                kill_tree(process.pid)


def cuda_in_use() -> bool:
    """Whether this process holds a CUDA context, which children could not use."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return bool(cuda is not None and cuda.is_initialized())


def threads() -> int:
    """Threads of this process as the kernel counts them."""
    return psutil.Process().num_threads()


def main(argv: Sequence[str]) -> NoReturn:
    requests, replies, parent = (int(value) for value in argv)
    for end in (requests, replies):
        os.set_inheritable(end, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Server(socket.socket(fileno=requests), replies, parent).serve()
    # What is imported takes its time to be taken down, long after the run may have been killed.
    leave(0)


if __name__ == "__main__":
    # Under its own name, so that children do not import it a second time.
    importlib.import_module(__spec__.name).main(sys.argv[1:])
