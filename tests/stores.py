"""Synthetic stores for the tests of results, reports and comparisons: real files, invented numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mambabench.harness.events import FILES, write_parquet
from mambabench.harness.store import Store

PLAIN = {"plan_name": "plain", "kind": "decoder", "name": "standard", "config": {}}
CODE = {"version": "0.1.0", "revision": "abc", "dirty": False}
LOOKUP = {"plan_name": "lookup", "kind": "decoder", "name": "speculative", "config": {"k": 4}}


def hashed(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@dataclass
class Builder:
    """Fills a store step by step; `write` makes run.json of what was added."""

    path: Path
    seeds: Sequence[int] = (0,)
    began: float = 1_000_000.0
    models: list[dict[str, Any]] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    decoders: tuple[str, ...] = ("plain", "lookup")
    code: Mapping[str, Any] = field(default_factory=lambda: CODE)
    asked: Sequence[str] | None = None
    """The labels that runs were asked for; None as older versions left it, who did not say."""
    environment: dict[str, str] = field(default_factory=lambda: {"cpu": "a CPU", "python": "3.11.9", "torch": "2.13.0"})

    def __post_init__(self) -> None:
        self.store = Store.create(self.path)

    def model(self, name: str, keep: object = None, teacher: bool = False, backend: str = "mamba2-hybrid") -> None:
        self.models.append({"name": name, "backend": backend, "keep": keep, "teacher": teacher})

    def step(
        self,
        label: str,
        kind: str = "measure",
        records: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
        *,
        key: str = "",
        state: str = "ok",
        reason: str = "",
        use: str = "",
        traits: Sequence[str] = ("score",),
        config: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        subject: str | None = "",
        facts: Sequence[Mapping[str, Any]] = (),
        decoder: Mapping[str, Any] | None = None,
        reference: Mapping[str, Any] | None = None,
        device: str = "cpu",
        kernels: Mapping[str, Any] | None = None,
        wall: float = 3.0,
        artifact: str = "",
        code: Mapping[str, Any] | None = CODE,
        parent: str = "",
    ) -> str:
        """Adds a finished or failed step with its records by kind (`sample`, `burst`, `round`, `loss`); one that judges
        recorded answers has None for a subject."""
        name, _, seed = label.partition("@seed")
        parts = name.split("/")
        key = key or hashed(label, config)
        measures = kind in ("measure", "answer", "judge")
        self.cells.append(
            {
                "label": label,
                "key": key,
                "kind": kind,
                "model": parts[0] if kind != "data" else "",
                "decoder": parts[1] if measures and parts[1] != "-" else "",
                "suite": parts[2] if measures else "",
                "stage": parts[1] if kind == "train" else "",
                "seed": int(seed) if seed else None,
                "why": "",
            }
        )
        if measures:
            self.suites.setdefault(parts[2], {"name": parts[2], "use": use or parts[2], "traits": list(traits)})
        if self.store.state(key) == "ok":
            return key
        step = {
            "schema": 1,
            "key": key,
            "kind": kind,
            "component": {"kind": "suite", "name": use or parts[-1], "revision": 1, "config": dict(config or {})},
            "inputs": {"subject": subject or hashed(parts[0], seed)}
            if measures and subject is not None
            else {"parent": parent}
            if parent
            else {},
            "data": dict(data or {}),
            "decoder": decoder,
            "reference": reference,
        }
        folder = self.store.prepare(key, step)
        for of, rows in (records or {}).items():
            if rows := [dict(row) for row in rows]:
                write_parquet(folder / f"{FILES[of]}.parquet", key, of, rows)
        if artifact:
            (folder / "artifact").mkdir()
            (folder / "artifact" / "weights").write_text(artifact)
            (folder / "artifact" / "artifact.json").write_text(json.dumps({} if code is None else {"code": code}))
        self.began += 10.0
        outcome = {
            "state": state,
            "reason": reason,
            "attempt": 1,
            "wall_s": wall,
            "started": self.began,
            "detail": {"device": device, "threads": 1, "first_record_s": 0.5, "last_record_s": wall - 0.25}
            | ({} if kernels is None else {"kernels": dict(kernels)}),
            "facts": [{"unit": "", "arm": "", **fact} for fact in facts],
            "environment": {},
        }
        if state == "ok":
            self.store.finish(key, outcome)
        else:
            self.store.fail(key, outcome)
        return key

    def skip(self, label: str, why: str) -> None:
        model, decoder, suite = label.partition("@")[0].split("/")
        seed = int(label.partition("@seed")[2])
        cell = {"label": label, "key": "", "kind": "measure", "model": model, "decoder": decoder, "suite": suite}
        self.cells.append({**cell, "stage": "", "seed": seed, "why": why})

    def planned(self, label: str) -> None:
        """Adds a cell that no run came to."""
        self.skip(label, "")
        self.cells[-1]["key"] = hashed(label)

    def write(self) -> Path:
        self.store.write_run(
            {
                "plan": {"name": "synthetic", "sha256": "0" * 64, "toml": "", "seeds": list(self.seeds)},
                "code": self.code,
                "environment": self.environment,
                "plugins": [],
                "models": self.models,
                "decoders": list(self.decoders),
                "suites": list(self.suites.values()),
                "cells": self.cells,
                **({} if self.asked is None else {"asked": self.asked}),
            }
        )
        return self.path


def samples(
    rng: np.random.Generator,
    task: str = "lookup",
    metric: str = "acc",
    items: int = 100,
    chance: float | np.ndarray = 0.8,
    clusters: int = 0,
) -> list[dict[str, Any]]:
    """Items that are right with a chance each (0/1), in clusters of neighbours if asked."""
    right = rng.random(items) < chance
    return [
        {
            "task": task,
            "item": hashed(task, i),
            "metric": metric,
            "value": float(right[i]),
            "weight": 1.0,
            "cluster": hashed(task, i % clusters if clusters else i),
            "better": "higher",
        }
        for i in range(items)
    ]


def losses_of_text(
    rng: np.random.Generator, nll: float, documents: int = 40, task: str = "unseen"
) -> list[dict[str, Any]]:
    """Documents' summed negative log-likelihoods (nat), weighted by their tokens."""
    tokens = rng.integers(50, 200, documents)
    per_token = nll + 0.1 * rng.standard_normal(documents)
    return [
        {
            "task": task,
            "item": hashed(task, i),
            "metric": "nll_per_token",
            "value": float(per_token[i] * tokens[i]),
            "weight": float(tokens[i]),
            "cluster": hashed(task, i),
            "better": "lower",
        }
        for i in range(documents)
    ]


def bursts(
    rng: np.random.Generator,
    seconds: Mapping[str, float],
    blocks: int = 8,
    batch: int = 1,
    new_tokens: int = 16,
    noise: float = 0.02,
    accepted: float = 0.0,
    k: int = 4,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Bursts of both arms (seconds per model call by arm) and the rounds of the subject, if it drafts."""
    timed, rounds = [], []
    for block in range(blocks):
        for arm, step in seconds.items():
            slow = np.exp(noise * rng.standard_normal())
            for row in range(batch):
                request = {"batch": batch, "prompt_tokens": 32, "new_tokens": new_tokens, "temperature": 0.0}
                where = {"arm": arm, "block": block, "row": row, **request}
                at, left, burst = 3 * step * slow, new_tokens - 1, 0
                timed.append({**where, "burst": 0, "at_s": at, "tokens": 1})
                while left > 0:
                    burst, at = burst + 1, at + step * slow
                    taken = 0
                    if accepted and arm == "subject":
                        while taken < k and rng.random() < accepted:
                            taken += 1
                        rounds.append({**where, "round": burst - 1, "drafted": k, "accepted": taken})
                    count = min(taken + 1, left)
                    left -= count
                    timed.append({**where, "burst": burst, "at_s": float(at), "tokens": count})
    return timed, rounds
