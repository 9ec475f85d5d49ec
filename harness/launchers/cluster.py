"""The launcher on a Ray cluster, for who outgrows one machine.

A step runs in a *place*: an actor that holds what Ray gave it on one machine of the cluster, cores and GPUs, and has a
`LocalLauncher` there, so that a step is started, leased, measured and ended as it would be at home. A place serves one
step after the other, as long as there are some with the same needs, and imports what they share only once. Steps read
and write the store themselves: it must lie in a folder that all machines share, under one path, and be able to lock.

Light steps stay at home: they compute next to nothing, and the key of a judge is there and is to be told to nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..environment import code, machine_facts, settings, versions
from ..interfaces import MambabenchError, Needs, Unsupported
from .configs import LocalConfig, RayConfig
from .local import KILL_S, Child, LocalLauncher

CONNECT_S = 10.0
POLL_S = 0.05
IDLE_S, UNWANTED_S = 30.0, 1.0
"""How long a place is kept that no step asks for, since its imports took time: as long as nothing else needs what it
holds, and where something does."""
ENVIRONMENT = {"RAY_kill_child_processes_on_worker_exit": "false"}
"""Of a place, beside the run's own settings. Ray must not end the server of children before that has ended them."""


class Size(NamedTuple):
    """What a place takes of Ray, all of it on one machine."""

    cpus: int
    gpus: float
    """A part of one where steps share it."""

    def __str__(self) -> str:
        gpus = f" and {self.gpus:.3g} GPU{'s' * (self.gpus > 1)}" if self.gpus else ""
        return f"{self.cpus} CPU core{'s' * (self.cpus != 1)}{gpus}"


class Host(NamedTuple):
    """A machine of the cluster, as a place sees it."""

    name: str
    code: Mapping[str, Any]
    node: str = ""
    """Its number in the cluster."""
    versions: Mapping[str, str] = {}
    facts: Mapping[str, str] = {}
    """What speed depends on there."""


class Place:
    """The end on the machine where steps run. Its methods take turns, as those of every asynchronous actor."""

    def __init__(self, modules: Sequence[str], config: LocalConfig) -> None:
        self.gpus = tuple(int(index) for index in ray.get_gpu_ids())
        self.launcher = LocalLauncher(LocalConfig(gpus=self.gpus, share=config.share, jobs=1, threads=config.threads))
        self.launcher.prepare(modules)
        self.child: Child | None = None

    async def host(self) -> Host:
        node = ray.get_runtime_context().get_node_id()
        facts: Mapping[str, str] = {}
        # Ray may have been told of GPUs that are not there.
        with suppress(MambabenchError):
            facts = machine_facts(self.gpus)
        return Host(socket.gethostname(), code(), node, versions(), facts)

    async def start(self, command: Sequence[str], needs: Needs, env: Mapping[str, str], log: Path) -> str | None:
        """Starts a child; otherwise returns what is waited for, empty where no other run is to blame."""
        if not log.parent.is_dir():
            raise MambabenchError(
                f"has no folder {log.parent}; the launcher 'ray' needs a store in a folder that all machines of the "
                "cluster share, under one path"
            )
        self.child = self.launcher.start(command, needs, env, log)
        return self.launcher.waiting if self.child is None else None

    async def ended(self) -> int:
        """The child's exit code, once there is one."""
        assert self.child is not None
        while (code := self.child.poll()) is None:
            await asyncio.sleep(POLL_S)
        return code

    async def kill(self) -> None:
        """Ends the child and everything that it started; returns when they are gone."""
        if self.child is not None and self.child.poll() is None:
            self.child.kill()

    async def close(self) -> None:
        self.launcher.close()


class Rented:
    """This end of a place."""

    def __init__(self, size: Size, actor: Any) -> None:
        self.size, self.actor = size, actor
        self.known = actor.host.remote()
        """Comes true when Ray has found room."""
        self.host = Host("", {})
        self.asked = self.wanted = time.monotonic()
        """When it was asked of Ray, and when a step last asked for it."""

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Calls a method and waits for its answer. What it raises of ours is raised here, with the machine's name."""
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout)
        except RayTaskError as error:
            if isinstance(error.cause, MambabenchError):
                raise MambabenchError(f"{self.host.name}: {error.cause}") from None
            raise

    def give_back(self) -> None:
        ray.kill(self.actor)


class Away:
    """A step on another machine."""

    def __init__(self, launcher: RayLauncher, place: Rented, alone: bool) -> None:
        self.code: int | None = None
        self.why = ""
        """What ended it, where that was no signal of its own."""
        self._launcher, self._place, self._alone = launcher, place, alone
        self._ended = place.actor.ended.remote()

    def poll(self) -> int | None:
        if self.code is None and ray.wait([self._ended], timeout=0)[0]:
            try:
                self._end(ray.get(self._ended))
            except RayError as error:
                self._lost(_cause(error))
        elif self.code is None and not self._alone:
            self._launcher.tidy()
        return self.code

    def kill(self) -> None:
        """Ends the child and everything that it started; returns when they are gone."""
        try:
            self._place.ask("kill", timeout=2 * KILL_S)
            ray.wait([self._ended], timeout=KILL_S)
        except (RayError, MambabenchError) as error:
            self._lost(_cause(error))
        if self.poll() is None:
            self._lost("it does not answer")

    def _lost(self, cause: str) -> None:
        """Its worker is not heard of any more; ends it, should it live."""
        self._place.give_back()
        self.why = f"its worker on {self._place.host.name} is lost to the cluster ({cause})"
        self._end(-signal.SIGKILL)

    def _end(self, code: int) -> None:
        self.code = code
        self._launcher.free(self._place, lost=bool(self.why))


class RayLauncher:
    """Starts steps wherever the cluster has room for what they need."""

    def __init__(self, config: RayConfig) -> None:
        self.config = config
        self.waiting = ""
        """Why the last `start` gave nothing, where that is up to others."""
        self._local = LocalConfig(share=config.share, threads=config.threads or 1)
        self._facts, self._versions = machine_facts(config.gpus), versions()
        self._environment = {**settings(), **ENVIRONMENT}
        # Which GPUs a place gets is Ray's to say.
        self._environment.pop("CUDA_VISIBLE_DEVICES", None)
        self._modules: list[str] = []
        self._home: LocalLauncher | None = None
        """Where light steps run, once there was one."""
        self._code = code()
        self._strange: dict[str, Host] = {}
        """Machines where speed is not measured, since they are of another kind than this one."""
        self._asked: dict[tuple[Size, frozenset[str]], Rented] = {}
        """Places that Ray looks for: at most one of each size and of each set of machines where it may not be."""
        self._idle: list[Rented] = []
        self._busy: list[Rented] = []
        self._connected = not ray.is_initialized()
        if self._connected:
            connect()

    def prepare(self, modules: Iterable[str]) -> None:
        """Has places import `modules` when they are made."""
        self._modules = sorted({*self._modules, *modules})

    def start(self, command: Sequence[str], needs: Needs, env: Mapping[str, str], log: Path) -> Away | Child | None:
        """Starts `python -m MODULE …` on some machine; None while there is no room or the machine must stay quiet.

        Raises Unsupported where no machine of the cluster can ever give what the step needs.
        """
        self.waiting = ""
        self.tidy()
        if needs.light:
            return self._start_at_home(command, needs, env, log)
        if self.config.jobs and len(self._busy) >= self.config.jobs:
            return None
        place = self._place(self._size(needs), needs.alone)
        if place is None:
            return None
        try:
            waiting = place.ask("start", list(command), needs, dict(env), log.resolve())
        except RayActorError:
            self._idle.remove(place)
            return None
        if waiting is not None:
            self.waiting = "" if self._busy else waiting
            return None
        self._idle.remove(place)
        self._busy.append(place)
        return Away(self, place, needs.alone)

    def _start_at_home(self, command: Sequence[str], needs: Needs, env: Mapping[str, str], log: Path) -> Child | None:
        if self._home is None:
            self._home = LocalLauncher(LocalConfig(jobs=self.config.jobs, threads=self._local.threads))
            self._home.prepare(self._modules)
        child = self._home.start(command, needs, env, log)
        self.waiting = self._home.waiting
        return child

    def free(self, place: Rented, *, lost: bool) -> None:
        """Takes a place back from its step."""
        if place in self._busy:
            self._busy.remove(place)
            if not lost:
                place.wanted = time.monotonic()
                self._idle.append(place)

    def close(self) -> None:
        """Ends every child and leaves the cluster."""
        if self._home is not None:
            self._home.close()
        if ray.is_initialized():
            closed = [place.actor.close.remote() for place in (*self._idle, *self._busy)]
            ray.wait(closed, num_returns=len(closed), timeout=KILL_S)
            for place in (*self._idle, *self._busy, *self._asked.values()):
                place.give_back()
        self._idle, self._busy, self._asked = [], [], {}
        if self._connected:
            ray.shutdown()

    def _size(self, needs: Needs) -> Size:
        shares = needs.gpus == 1 and not needs.alone
        return Size(self._local.threads * needs.ranks, needs.gpus / (self.config.share if shares else 1))

    def _place(self, size: Size, alone: bool) -> Rented | None:
        """An idle place, of a step that must be `alone` on a machine like this one. Where there is none, asks Ray for
        one, and makes room by giving back what nobody wants."""
        for place in self._idle:
            if place.size == size:
                if alone and place.host.facts != self._facts:
                    self._strange[place.host.node] = place.host
                    continue
                place.wanted = time.monotonic()
                return place
        without = frozenset(self._strange if alone else ())
        self._check(size, without)
        self._give_back(UNWANTED_S)
        if (size, without) not in self._asked:
            where = {"label_selector": {"ray.io/node-id": f"!in({','.join(without)})"}} if without else {}
            made = ray.remote(Place).options(
                num_cpus=size.cpus, num_gpus=size.gpus, runtime_env={"env_vars": self._environment}, **where
            )
            actor = made.remote(self._modules, self._local)
            self._asked[size, without] = Rented(size, actor)
        asked = self._asked[size, without]
        asked.wanted = time.monotonic()
        if not ray.wait([asked.known], timeout=0)[0]:
            if not self._busy and asked.wanted - asked.asked > IDLE_S:
                self.waiting = f"Ray has no room for {size} yet"
            return None
        del self._asked[size, without]
        try:
            asked.host = ray.get(asked.known)
        except RayActorError as error:
            if error.actor_init_failed:
                found = re.search(r"\bip=([^,)\s]+)", str(error))
                raise MambabenchError(
                    f"{found[1] if found else 'a machine'} of the Ray cluster cannot run steps: {_last_line(error)}"
                ) from error
            return None
        if wrong := self._difference(asked.host):
            asked.give_back()
            raise MambabenchError(f"{asked.host.name}: {wrong}")
        self._idle.append(asked)
        return self._place(size, alone)

    def _difference(self, host: Host) -> str:
        """What of a machine would give other results; empty where nothing does."""
        if host.code != self._code:
            return f"runs mambabench {_named(host.code)}, this is {_named(self._code)}"
        here, there = self._versions, host.versions
        other = [name for name, version in here.items() if _release(there.get(name)) != _release(version)]
        found = ", ".join(f"{name} {there[name]}" if name in there else f"no {name}" for name in other)
        wanted = ", ".join(f"{name} {here[name]}" for name in other)
        return f"has {found}; this machine has {wanted}" if other else ""

    def _check(self, size: Size, without: frozenset[str]) -> None:
        """Raises Unsupported where no machine but those can ever be a place's."""
        machines = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        large = [
            node for node, has in machines.items() if has.get("CPU", 0) >= size.cpus and has.get("GPU", 0) >= size.gpus
        ]
        if not large:
            raise Unsupported(f"needs {size} on one machine, and no machine of the Ray cluster has as much")
        if without.issuperset(large):
            host = self._strange[large[0]]
            wrong = ", ".join(
                f"{name} {host.facts.get(name)}, not {fact}"
                for name, fact in self._facts.items()
                if host.facts.get(name) != fact
            )
            raise Unsupported(f"{host.name} is another kind of machine than the one that plans: {wrong}")

    def tidy(self) -> None:
        """Gives back what has not been asked for in long."""
        self._give_back(IDLE_S)

    def _give_back(self, unwanted_s: float) -> None:
        """Gives back the places that no step has asked for in some time, and those that Ray is still to find for none:
        what such a step was to do may be done by another run."""
        now = time.monotonic()
        for place in [each for each in self._idle if now - each.wanted > unwanted_s]:
            self._idle.remove(place)
            place.give_back()
        for which, place in [(which, each) for which, each in self._asked.items() if now - each.wanted > IDLE_S]:
            del self._asked[which]
            place.give_back()


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names, or the one that this machine belongs to."""
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise MambabenchError(f"RAY_ADDRESS={address}: an address for clients of Ray; HEAD:6379 would be right")
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():
            # Ray itself goes on asking for many minutes, and does not say what is wrong.
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
            _check_part(address)
        ray.init(address="auto", log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, RayError) as error:
        if str(error).startswith("Version mismatch"):
            raise MambabenchError(" ".join(str(error).split())) from error
        raise MambabenchError(
            f"no Ray cluster was found ({_first_line(error)}); start one by `ray start --head`, or set RAY_ADDRESS"
        ) from error


def _check_part(address: str) -> None:
    """Refuses the address of a cluster that this machine is no part of, for Ray lends nothing to others. A machine may
    go by several names, so ports are what is compared."""
    found: set[str] = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            words = process.info["cmdline"] or []
            found |= {word.partition("=")[2] for word in words if word.startswith("--gcs-address=")}
    if not found:
        raise MambabenchError(
            f"RAY_ADDRESS={address}: this machine is no part of that cluster; `ray start --address={address} "
            "--num-cpus=0` makes it one, without steps of its own"
        )
    if address.rpartition(":")[2] not in {each.rpartition(":")[2] for each in found}:
        raise MambabenchError(f"RAY_ADDRESS={address}: this machine is a part of {', '.join(sorted(found))} instead")


def _named(code: Mapping[str, Any]) -> str:
    revision = str(code.get("revision") or "")[:10]
    return " ".join(filter(None, [str(code["version"]), revision, "with changes" if code.get("dirty") else ""]))


def _release(version: str | None) -> str | None:
    """Without the build, of which a package has one for the CPU and others for GPUs."""
    return version.partition("+")[0] if version else None


def _cause(error: Exception) -> str:
    """What ended an actor: it stands behind a general line, and what is known of the actor in lines that begin with a
    tab."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line[0].isspace()]
    return (lines[1:] or lines or [type(error).__name__])[0][:300]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _last_line(error: Exception) -> str:
    return [type(error).__name__, *filter(None, map(str.strip, str(error).splitlines()))][-1][:300]
