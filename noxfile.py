"""Everything that a developer or a CI job runs, in one shared environment: `nox -s bench`, `nox -s tests`, `nox -l`.

A full environment takes minutes and gigabytes to install, so the session `env` makes one and the others run in it;
where nothing changed, `env` takes seconds.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (an older Python may well start nox)
    sys.exit("mambabench needs Python 3.11 or newer; this nox runs on Python {}.{}.{}".format(*sys.version_info[:3]))

import os
import re
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests"]

EXTRAS = "triton,train,eval,ray,dev"
CONSTRAINTS = "constraints.txt"
SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONSAFEPATH": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


WORKERS = ("-n", "logical", "--maxprocesses", "4", "--dist", "worksteal")
"""Tests side by side, each worker with one thread and the memory of a model stack."""


def run(session: nox.Session, *command: str, **settings: str) -> None:
    """Runs a command in the environment that the session `env` made."""
    scripts = session.cache_dir.parent / "env" / "bin"
    path = os.pathsep.join([str(scripts), os.environ.get("PATH", "")])
    program, *arguments = command
    session.run(str(scripts / program), *arguments, env={**SETTINGS, "PATH": path, **settings}, external=True)


@nox.session(reuse_venv=True, default=False)
def env(session: nox.Session) -> None:
    """Install the package, editable, and all that its tests need."""
    # Some dependencies come as source only and need these at hand, since isolated builds would fetch them each time.
    session.install("-c", CONSTRAINTS, "setuptools", "setuptools-scm")
    session.install(
        "--no-build-isolation", "--config-settings=editable_mode=strict", "-c", CONSTRAINTS, "-e", f".[{EXTRAS}]"
    )


@nox.session(venv_backend="none", requires=["env"])
def lint(session: nox.Session) -> None:
    """Check style and format."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session(venv_backend="none", requires=["env"])
def types(session: nox.Session) -> None:
    """Check types."""
    run(session, "mypy")


@nox.session(venv_backend="none", requires=["env"])
def tests(session: nox.Session) -> None:
    """Run all tests that need no GPU. Arguments after `--` go to pytest; `-n 0` runs one after the other."""
    run(session, "python", "-m", "pytest", *WORKERS, *session.posargs, OMP_NUM_THREADS="1")


@nox.session(venv_backend="none", requires=["env"])
def plugins(session: nox.Session) -> None:
    """Install the example plug-ins for real and run their tests."""
    run(session, "python", "-m", "pytest", "tests/plugins", *session.posargs)


@nox.session(venv_backend="none", requires=["env"])
def gpu_tests(session: nox.Session) -> None:
    """Run the tests that need a GPU. Arguments after `--` go to pytest."""
    run(session, "python", "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session(venv_backend="none", requires=["env"])
def bench(session: nox.Session) -> None:
    """Run the default plan and print its report. Arguments after `--` go to `mambabench run`."""
    try:
        run(session, "mambabench", "run", "plans/tiny.toml", "--store", "runs/tiny", *session.posargs)
    finally:
        run(session, "mambabench", "report", "runs/tiny")


@nox.session(venv_backend="none", requires=["env"])
def lock(session: nox.Session) -> None:
    """Write constraints.txt from what is installed in the environment."""
    python = session.cache_dir.parent / "env" / "bin" / "python"
    frozen = subprocess.run([python, "-m", "pip", "freeze", "--all"], check=True, capture_output=True, text=True).stdout
    Path(CONSTRAINTS).write_text("\n".join(pins(frozen)) + "\n")


def pins(frozen: str) -> list[str]:
    """The lines of `pip freeze --all` that hold on any machine: no paths, no build tags, not our own package."""
    found = {}
    for line in frozen.splitlines():
        pin = re.fullmatch(r"([\w.-]+)(?:==([^+\s]+)(?:\+\S+)?| @ file:\S*/[^/]+?-(\d[^-+%/]*)\S*\.whl\S*)", line)
        if pin and pin[1].lower() not in {"mambabench", "pip", "wheel"}:
            found[pin[1].lower()] = f"{pin[1]}=={pin[2] or pin[3]}"
    return [found[name] for name in sorted(found)]


@nox.session(venv_backend="none", requires=["env"])
def kernels(session: nox.Session) -> None:
    """Time the kernels on a GPU, beside what its memory and tensor cores allow. Arguments after `--` go to pytest."""
    shown = "--benchmark-columns=median,iqr,rounds,iterations"
    run(session, "python", "-m", "pytest", "-m", "gpu", "--benchmark-enable", shown, "tests/bench", *session.posargs)
