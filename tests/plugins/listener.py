"""A plug-in file that implements every hook, so that the tests can see when each is called and what it may do."""

import os
from dataclasses import dataclass
from pathlib import Path

from mambabench import Component, Refusal, Verdict, hookimpl


@dataclass(frozen=True)
class Options:
    n: int = 4


def note(line):
    with Path(os.environ["LISTENER_NOTES"]).open("a") as file:
        file.write(line + "\n")


@hookimpl
def mambabench_components():
    target = "mambabench_bigram.decoder:NoRepeat"
    return [Component(kind="decoder", name="refused-here", target=target, config=Options)]


@hookimpl
def mambabench_refuse(step, host):
    if any("/refused/" in label for label in step.labels):
        return Refusal(f"not on a machine with {host.cpus} cores")
    return None


@hookimpl
def mambabench_step_started(step):
    note(f"started {step.component} {step.labels[0]}")
    raise RuntimeError("an exception in a hook")


@hookimpl
def mambabench_step_finished(step, outcome):
    note(f"finished {step.component} {step.labels[0]} {outcome.state}")


@hookimpl
def mambabench_environment():
    return {"laboratory": "under the roof", "python": "a lie"}


@hookimpl
def mambabench_verdict(comparison):
    if comparison.metric.startswith("distinct"):
        return Verdict("fail", "variety is never good enough")
    return Verdict("pass", "all is well")
